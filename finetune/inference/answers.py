"""Generated answers read back through the template they were written with: one parsed answer per image.

The strict parser is `finetune.metrics.text.parse_answer`; here the template's own words and the looser form of
`text_first` (`"result": real` without quotes) are brought to what it reads, and coordinates back to the original image.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

from finetune.data.answer_polygons import PolygonFrame
from finetune.data.template import Template
from finetune.metrics.text import ParsedAnswer, parse_answer
from finetune.schema import RESULT_WORDS


def read_answers(
    text: str, template: Template, num_images: int, frames: Sequence[PolygonFrame] | None = None
) -> list[ParsedAnswer] | None:
    """One answer per image, or None where the text is not what the template asks for.

    Args:
        text: generated answer without forensic tokens; for several images a JSON list of objects.
        frames: of each image, what its coordinates were written in; the polygons are then in pixels of the upright
            original image (unrounded, not clipped to it). Without frames they stay as written.
    """
    answers = _parse_all(canonical(text, template), template, num_images)
    if answers is None or frames is None:
        return answers
    return [
        dataclasses.replace(answer, polygons=frame.read(answer.polygons))
        for answer, frame in zip(answers, frames, strict=True)
    ]


def _parse_all(text: str, template: Template, num_images: int) -> list[ParsedAnswer] | None:
    if num_images == 1:
        answer = parse_answer(text, required=_required(template))
        return None if answer is None else [answer]
    try:
        objects = json.loads(text)
    except ValueError:
        return None
    if not isinstance(objects, list) or len(objects) != num_images:
        return None
    answers = [parse_answer(json.dumps(each, ensure_ascii=False), required=_required(template)) for each in objects]
    return None if any(answer is None for answer in answers) else [a for a in answers if a is not None]


def canonical(text: str, template: Template) -> str:
    """`text` with the template's result words as `"real"` and `"fake"`, quoted or not."""
    names = {label: word for word, label in RESULT_WORDS.items()}
    for label, word in template.result.items():
        quoted = re.escape(word)
        text = re.sub(rf'("result"\s*:\s*)(?:"{quoted}"|{quoted}(?=\s*[,}}]))', rf'\1"{names[label]}"', text)
    return text


def _required(template: Template) -> tuple[str, ...]:
    """Keys both layouts of the template write besides `result`."""
    return ("mask",) if all("{mask}" in answer for answer in template.answers.values()) else ()
