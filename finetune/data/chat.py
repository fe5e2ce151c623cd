"""Records become conversations, and conversations become token ids with their loss mask, in one place.

Templates say how questions and answers are worded; ids and labels are rendered together, segment by segment, so that
the loss mask is exact. Only assistant turns are supervised, image tokens never. The text is Qwen2.5-VL's own chat
format.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from finetune.data.template_files import read_template_file
from finetune.data.token_checks import reserved
from finetune.errors import ConfigError, DataFormatError, shorten
from finetune.schema import RESULT_WORDS, ImageTarget, Polygon, Record, Turn
from finetune.special_tokens import IGNORE_INDEX, IMAGE_PLACEHOLDER, SpecialTokens

logger = logging.getLogger(__name__)

Layout = Literal["tokens_first", "text_first"]
LAYOUTS: tuple[Layout, ...] = ("tokens_first", "text_first")
BUILT_IN = ("zh", "en")
VISION_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
_ANSWER_FIELDS = {"tokens", "cls", "mask_tokens", "result", "mask", "evidence"}


@dataclass(frozen=True)
class Template:
    """Wording of questions and answers; see finetune/data/templates/zh.yaml for the placeholders."""

    name: str
    system: str
    prompts: tuple[str, ...]
    prompts_multi: tuple[str, ...]
    result: dict[int, str]
    evidence: dict[int, str]
    answers: dict[str, str]

    @property
    def result_words(self) -> dict[str, int]:
        """Label of each word that may stand under `"result"`: `real`, `fake` and the template's own."""
        return RESULT_WORDS | {word: label for label, word in self.result.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, to be saved beside a model."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Template:
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises:
            ConfigError: as `load_template`.
        """
        fields = dict(tree)
        name = fields.pop("name", "saved")
        for key in ("result", "evidence"):
            fields[key] = {int(label): text for label, text in fields[key].items()}
        return _check_template(name, fields)


class Segment(NamedTuple):
    """A piece of rendered chat text and whether its tokens are supervised."""

    text: str
    is_supervised: bool


def load_template(name: str) -> Template:
    """A built-in template (`zh`, `en`) or one from a YAML file.

    Raises:
        ConfigError: unknown name, missing or unknown key, unknown placeholder.
    """
    choices = "choose zh, en or give the path of a YAML file"
    tree = read_template_file(name, "data.template", f"{name}.yaml", choices)
    return _check_template(name, tree)


def template_of(record: Record, template: Template) -> Template:
    """The built-in template of a record's own language (`provenance.language`), where `template` is one of another.

    So a set in two languages is asked in the language it answers in. A template of the user's own holds for all.
    """
    language = record.provenance.get("language")
    is_other = language in BUILT_IN and template.name in BUILT_IN and language != template.name
    return _built_in(str(language)) if is_other else template


@cache
def _built_in(name: str) -> Template:
    return load_template(name)


def template_problem(template: Template, layout: Layout) -> str | None:
    """Why the heads cannot be trained on answers of this template: a layout whose answer lacks their tokens, or has
    them twice; None where all is well.

    Not asked of a model without heads, whose answers are text only.
    """
    expected = {"tokens_first": ("tokens",), "text_first": ("cls", "mask_tokens")}[layout]
    fields = [part[1] for part in string.Formatter().parse(template.answers[layout])]
    found = [field for field in fields if field in ("tokens", "cls", "mask_tokens")]
    if sorted(found) == sorted(expected):
        return None
    return (
        f"data.template {template.name}: answers.{layout} holds {_braced(found) or 'no forensic token'}; expected "
        f"{_braced(expected)}, once, where the heads read the image; or set heads.enabled: false to train text only"
    )


def _braced(fields: Sequence[str]) -> str:
    return " ".join(f"{{{field}}}" for field in fields)


def _check_template(name: str, tree: Any) -> Template:
    keys = {"system", "prompts", "prompts_multi", "result", "evidence", "answers"}
    if not isinstance(tree, dict) or set(tree) != keys:
        found = sorted(tree) if isinstance(tree, dict) else shorten(tree)
        raise ConfigError(f"data.template {name}: found {found}, expected the keys {sorted(keys)}")
    for field in ("result", "evidence"):
        if not isinstance(tree[field], dict) or set(tree[field]) != {0, 1}:
            raise ConfigError(f"data.template {name}: '{field}' needs one entry for 0 (real) and one for 1 (tampered)")
    _check_texts(name, tree)
    words = {label: word.strip() for label, word in tree["result"].items()}
    if not all(words.values()) or words[0] == words[1]:
        raise ConfigError(f"data.template {name}: result is {words}; expected two different words")
    if not isinstance(tree["answers"], dict) or set(tree["answers"]) != set(LAYOUTS):
        raise ConfigError(f"data.template {name}: 'answers' needs the layouts {', '.join(LAYOUTS)}")
    for layout, answer in tree["answers"].items():
        try:
            fields = {part[1] for part in string.Formatter().parse(answer) if part[1] is not None}
            if fields <= _ANSWER_FIELDS:
                answer.format_map(dict.fromkeys(fields, ""))
        except ValueError as error:
            reason = f"{error}; a literal brace is {{{{ or }}}}"
            raise ConfigError(f"data.template {name}: answers.{layout}: {reason}") from error
        if unknown := fields - _ANSWER_FIELDS:
            raise ConfigError(
                f"data.template {name}: answers.{layout} has the unknown placeholder '{min(unknown)}'; "
                f"known: {', '.join(sorted(_ANSWER_FIELDS))}"
            )
    for field, placeholder in (("prompts", IMAGE_PLACEHOLDER), ("prompts_multi", "{images}")):
        for prompt in tree[field]:
            num_images = prompt.replace("{images}", IMAGE_PLACEHOLDER).count(IMAGE_PLACEHOLDER)
            if prompt.count(placeholder) != 1 or num_images != 1:
                raise ConfigError(f"data.template {name}: {field} {prompt!r} needs exactly one {placeholder}")
    return Template(
        name=name,
        system=tree["system"],
        prompts=tuple(tree["prompts"]),
        prompts_multi=tuple(tree["prompts_multi"]),
        result=dict(tree["result"]),
        evidence=dict(tree["evidence"]),
        answers=dict(tree["answers"]),
    )


def _check_texts(name: str, tree: dict[str, Any]) -> None:
    """Every text of a template is one, and holds no token: those are put in by placeholders."""
    for field, value in tree.items():
        is_list = field in ("prompts", "prompts_multi")
        if is_list and (not isinstance(value, list) or not value):
            raise ConfigError(f"data.template {name}: '{field}' is {shorten(value)}; expected a list of texts")
        texts = enumerate(value) if is_list else value.items() if isinstance(value, dict) else [(None, value)]
        for key, text in texts:
            where = field if key is None else f"{field}.{key}"
            if not isinstance(text, str):
                raise ConfigError(f"data.template {name}: {where} is {shorten(text)}; expected a text, in quotes")
            if found := reserved(text.replace(IMAGE_PLACEHOLDER, "") if is_list else text):
                raise ConfigError(f"data.template {name}: {where} holds {found}; tokens are put in by the placeholders")


def conversation(
    record: Record,
    template: Template,
    tokens: SpecialTokens,
    layout: Layout,
    polygons: Sequence[Sequence[Polygon]] = (),
) -> tuple[Turn, ...]:
    """The turns a record is trained on: the user's own, shorthand written out and missing tokens added, or rendered
    ones.

    Args:
        polygons: per image, in pixels of the *processed* image; used for rendered answers.

    Raises:
        DataFormatError: a record without turns has an image without label.
    """
    if not record.turns:
        template = template_of(record, template)
        question = prompt(template, len(record.images), key=record.id)
        answer = render_answer(record, template, tokens, layout, polygons)
        return (Turn("user", question), Turn("assistant", answer))
    turns = tuple(
        Turn(turn.role, tokens.expand(turn.content) if turn.role == "assistant" else turn.content)
        for turn in record.turns
    )
    has_tokens = any(tokens.find(turn.content) for turn in turns)
    has_targets = any(target.label is not None or target.has_mask for target in record.targets)
    return turns if has_tokens or not has_targets else _insert_tokens(record, turns, tokens, layout)


def _insert_tokens(record: Record, turns: tuple[Turn, ...], tokens: SpecialTokens, layout: Layout) -> tuple[Turn, ...]:
    """Put the tokens into the first assistant turn that has seen every image; without such a turn the text stays."""
    last_image = max((i for i, turn in enumerate(turns) if IMAGE_PLACEHOLDER in turn.content), default=-1)
    runs = tokens.run * len(record.images)
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and index > last_image:
            content = runs + turn.content if layout == "tokens_first" else turn.content + runs
            return (*turns[:index], Turn("assistant", content), *turns[index + 1 :])
    _warn_without_place(record.id)
    return turns


@cache
def _warn_without_place(record_id: str) -> None:
    """Once per record, not once per epoch."""
    logger.warning(
        "record '%s' has labels but no assistant turn after its last image, so it trains the text only; "
        "put the forensic tokens where you want them",
        record_id,
    )


def prompt(template: Template, num_images: int, key: str = "") -> str:
    """A question about `num_images` images; `key` picks the phrasing ("" the first), the same one for the same key."""
    choice = zlib.crc32(key.encode())
    if num_images == 1:
        return template.prompts[choice % len(template.prompts)]
    wording = template.prompts_multi[choice % len(template.prompts_multi)]
    return wording.replace("{images}", IMAGE_PLACEHOLDER * num_images)


def question_turns(record: Record, template: Template) -> tuple[Turn, ...]:
    """What stands before the answer that concludes about all images: the turns up to the last image, or a prompt.

    The template's first phrasing is taken, so that a score does not depend on how a record is named.

    No written answer is left in it, since an earlier one may already give a verdict: an assistant's images become the
    user's, its words are dropped.
    """
    if not record.turns:
        return (Turn("user", prompt(template_of(record, template), len(record.images), key="")),)
    last_image = max((i for i, turn in enumerate(record.turns) if IMAGE_PLACEHOLDER in turn.content), default=-1)
    end = next(
        (i for i, turn in enumerate(record.turns) if turn.role == "assistant" and i > last_image), len(record.turns)
    )
    kept = []
    for turn in record.turns[:end]:
        if turn.role != "assistant":
            kept.append(turn)
        elif images := turn.content.count(IMAGE_PLACEHOLDER):
            kept.append(Turn("user", IMAGE_PLACEHOLDER * images))
    return tuple(kept)


def render_answer(
    record: Record,
    template: Template,
    tokens: SpecialTokens,
    layout: Layout,
    polygons: Sequence[Sequence[Polygon]] = (),
) -> str:
    """The assistant's answer in a layout: one object for one image, a JSON list for several.

    Raises:
        DataFormatError: an image has no label, so there is no answer to write.
    """
    objects = []
    for index, target in enumerate(record.targets):
        if target.label is None:
            raise DataFormatError(
                f"image {index + 1} has neither a label nor a written answer",
                record=record.id,
                source=record.source,
                fix="give 'labels' (0 real, 1 tampered) or 'messages' with an assistant turn",
            )
        own_polygons = polygons[index] if index < len(polygons) else (target.polygons or ())
        objects.append(_fill(template, layout, target, tokens, own_polygons, is_single=len(record.targets) == 1))
    if len(objects) == 1:
        return objects[0]
    joined = "[" + ", ".join(objects) + "]"
    return tokens.run * len(objects) + joined if layout == "tokens_first" else joined


def _fill(
    template: Template,
    layout: Layout,
    target: ImageTarget,
    tokens: SpecialTokens,
    polygons: Sequence[Polygon],
    is_single: bool,
) -> str:
    label = int(target.label or 0)
    return template.answers[layout].format(
        tokens=tokens.run if is_single else "",
        cls="".join(tokens.cls),
        mask_tokens="".join(tokens.mask),
        result=template.result[label],
        mask=polygon_text(polygons),
        evidence=json.dumps(target.evidence or template.evidence[label], ensure_ascii=False)[1:-1],
    )


def polygon_text(polygons: Sequence[Polygon]) -> str:
    """`[[x1, x2, ...], [y1, y2, ...], ...]` with whole numbers: a pair of lists for each region."""
    lists = [[round(point[axis]) for point in polygon] for polygon in polygons for axis in (0, 1)]
    return json.dumps(lists)


def segments(turns: Sequence[Turn], system: str, *, for_generation: bool = False) -> list[Segment]:
    """Turns as chat text in pieces, each wholly supervised or not.

    Args:
        system: used unless the first turn is a system turn.
        for_generation: end with an open assistant turn instead of nothing.
    """
    pieces: list[Segment] = []
    if not turns or turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    for turn in turns:
        pieces.append(Segment(f"<|im_start|>{turn.role}\n", False))
        is_answer = turn.role == "assistant"
        for index, text in enumerate(turn.content.split(IMAGE_PLACEHOLDER)):
            if index:
                pieces.append(Segment(VISION_BLOCK, False))
            if text:
                pieces.append(Segment(text, is_answer))
        pieces.append(Segment("<|im_end|>", is_answer))
        pieces.append(Segment("\n", False))
    if for_generation:
        pieces.append(Segment("<|im_start|>assistant\n", False))
    return pieces


def encode(pieces: Sequence[Segment], tokenizer: Any, image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids and labels of rendered segments.

    Args:
        image_tokens: number of image tokens of each image, in order of the placeholders.

    Returns:
        `input_ids` and `labels` of the same length; a label is the token's own id where it is supervised, else -100.
        Runs
        of segments between supervision changes are tokenised together, so the ids are those of the whole text: every
        boundary stands at a special token or after the header's line break, which no BPE merge crosses. The exception
        is an answer that begins with a line break; it is split there, as when the model writes it after the prompt.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, is_supervised in _written(pieces, image_tokens):
        ids = tokenizer.encode(text, add_special_tokens=False)
        input_ids += ids
        labels += ids if is_supervised else [IGNORE_INDEX] * len(ids)
    return input_ids, labels


def token_spans(
    pieces: Sequence[Segment], tokenizer: Any, image_tokens: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The whole text of `encode`, and of each of its ids the characters [start, end) it was made of."""
    whole = ""
    spans: list[tuple[int, int]] = []
    for text, _ in _written(pieces, image_tokens):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        spans += [(start + len(whole), end + len(whole)) for start, end in found]
        whole += text
    return whole, spans


def _written(pieces: Sequence[Segment], image_tokens: Sequence[int]) -> list[Segment]:
    """Runs of segments between supervision changes, with each image's tokens."""
    counts = iter(image_tokens)
    return [
        Segment(re.sub(re.escape(IMAGE_PAD), lambda _: IMAGE_PAD * next(counts), text), is_supervised)
        for text, is_supervised in _merge(pieces)
    ]


def _merge(pieces: Sequence[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for piece in pieces:
        if merged and merged[-1].is_supervised == piece.is_supervised:
            merged[-1] = Segment(merged[-1].text + piece.text, piece.is_supervised)
        else:
            merged.append(piece)
    return merged
