"""`forensics chat --script`: the users' own dialogues asked of several models, answers side by side.

Every user turn is asked in turn; between the turns stand the model's own answers, never the dialogue's. The dialogue's
assistant turns go into the output as `reference` and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.chat import prompt
from finetune.data.images import image_size_hw
from finetune.data.readers import read_records
from finetune.data.readers.options import options_from
from finetune.data.template import Template, load_template, template_of
from finetune.data.token_checks import program_token
from finetune.errors import ConfigError, DataFormatError
from finetune.inference.chat.contestants import Contestants, contestants
from finetune.inference.chat.dialogue import ImageVerdict, Reply, Speaker
from finetune.inference.chat.image_memory import ImageMemory
from finetune.inference.chat.page import write_chat_report
from finetune.inference.chat.summary import summarize, summary_text
from finetune.inference.queries import Query
from finetune.inference.replacing import begins_with_key, is_page, refuse_foreign, refuse_inputs
from finetune.inference.visualization import save_mask_png
from finetune.progress import progress_bar
from finetune.schema import Record, Turn
from finetune.special_tokens import IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class Question:
    """One user turn.

    Args:
        text: with `<image>` where an image stands.
        images: indices of those images.
        reference: the dialogue's own answer, for the output only.
    """

    text: str
    images: tuple[int, ...]
    reference: str | None


@dataclass
class Dialogue:
    """A record as questions; `answers[t]` maps the name of a model to its answer to question t, as JSON."""

    record: Record
    system: str | None
    questions: list[Question]
    answers: list[dict[str, Any]] = field(default_factory=list)

    def as_line(self) -> dict[str, Any]:
        """The JSON object of one output line."""
        turns = [
            {
                "question": question.text,
                "images": list(question.images),
                "reference": question.reference,
                "answers": answers,
            }
            for question, answers in zip(self.questions, self.answers, strict=True)
        ]
        return {
            "id": self.record.id,
            "source": self.record.source,
            "images": [image.path or "(embedded)" for image in self.record.images],
            "labels": [target.label for target in self.record.targets],
            "turns": turns,
        }


def script_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics chat --script`; exit status 0."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    out = Path(arguments.out)
    if out.suffix.lower() not in (".jsonl", ".json"):
        raise ConfigError(f"--out {out} is no .jsonl file; give e.g. answers.jsonl")
    models = contestants(arguments)
    template = load_template(arguments.template or "zh")
    options = options_from(arguments.option)
    records = read_records(arguments.script, arguments.format, arguments.data_root, options)[: arguments.max_samples]
    dialogues = [dialogue_of(record, template) for record in records]
    if arguments.system is not None:
        for dialogue in dialogues:
            dialogue.system = arguments.system
    check_images(records)
    inputs = [arguments.script, *(image.path for record in records for image in record.images)]
    refuse_inputs(out, "--out", inputs)
    refuse_foreign(out, "--out", lambda text: begins_with_key(text, "turns"), "file of answers")
    if arguments.html:
        refuse_inputs(arguments.html, "--html", inputs)
        refuse_foreign(arguments.html, "--html", is_page, "page")
    for name in run_script(models, dialogues, out):
        print(f"asked {name}: {sum(len(d.questions) for d in dialogues)} questions in {len(dialogues)} dialogues")
    lines = [dialogue.as_line() for dialogue in dialogues]
    summary = summarize(lines, models.names, out.parent, models.generation.mask_threshold)
    print(summary_text(summary))
    print(f"wrote {out}" + (f" and masks in {masks_dir(out)}" if masks_dir(out).is_dir() else ""))
    if arguments.html:
        write_chat_report(
            arguments.html,
            lines,
            models.names,
            summary,
            pictures=[record.images for record in records],
            masks_root=out.parent,
            mask_threshold=models.generation.mask_threshold,
            facts={"script": arguments.script, **{m.name: f"{m.kind}, {m.path}" for m in models.models.values()}},
        )
        print(f"wrote {arguments.html}")
    return 0


def dialogue_of(record: Record, template: Template) -> Dialogue:
    """The questions of a record: its user turns, or the template's question where it has no conversation.

    An image that stands in an assistant's turn belongs to the next question (as in `chat.question_turns`); where none
    follows, the images alone are asked about.

    Raises:
        DataFormatError: `<image>` and images differ in number, nothing is asked, or a user's text holds control tokens.
    """
    if not record.turns:
        text = prompt(template_of(record, template), len(record.images))
        return _new(record, None, [Question(text, tuple(range(len(record.images))), None)])
    placed = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in record.turns)
    if placed != len(record.images):
        raise _error(record, f"{placed} {IMAGE_PLACEHOLDER} for {len(record.images)} images", "correct the turns")
    system = "\n".join(turn.content for turn in record.turns if turn.role == "system") or None
    questions: list[Question] = []
    waiting, next_image = 0, 0
    for turn in record.turns:
        count = turn.content.count(IMAGE_PLACEHOLDER)
        if turn.role == "user":
            _check_text(record, turn.content)
            images = tuple(range(next_image, next_image + waiting + count))
            questions.append(Question(IMAGE_PLACEHOLDER * waiting + turn.content, images, None))
            next_image, waiting = next_image + waiting + count, 0
        elif turn.role == "assistant":
            if questions and questions[-1].reference is None:
                questions[-1] = Question(questions[-1].text, questions[-1].images, turn.content)
            waiting += count
    if waiting:
        answer = next(turn.content for turn in reversed(record.turns) if turn.role == "assistant")
        images = tuple(range(next_image, next_image + waiting))
        questions.append(Question(IMAGE_PLACEHOLDER * waiting, images, answer))
    if not questions:
        raise _error(record, "the conversation has no user turn and no image", "add a question")
    return _new(record, system, questions)


def check_images(records: Sequence[Record]) -> None:
    """Every image's header is read before any model is, so that a long run does not end at a missing file.

    Raises:
        DataFormatError: the first image that cannot be opened.
    """
    for record in records:
        for image in record.images:
            image_size_hw(image, record.id, record.source)


def run_script(models: Contestants, dialogues: Sequence[Dialogue], out: Path) -> Iterator[str]:
    """Ask one model after the other, writing all answers so far after each; yields the name of each that is done."""
    for name in models.names:
        speaker = models.speaker(name)
        with progress_bar(total=len(dialogues), desc=name, unit="dialogue") as progress:
            for start in range(0, len(dialogues), models.generation.batch_size):
                chunk = dialogues[start : start + models.generation.batch_size]
                ask_batch(speaker, name, chunk, masks_dir(out), start)
                progress.update(len(chunk))
        models.release(name)
        write_lines(out, dialogues)
        yield name


def ask_batch(speaker: Speaker, name: str, dialogues: Sequence[Dialogue], folder: Path, first_number: int) -> None:
    """Every question of some dialogues, turn by turn, all dialogues that have one in the same batch."""
    contents: list[list[str]] = [[] for _ in dialogues]
    num_images = sum(len(dialogue.record.images) for dialogue in dialogues)
    speaker.memory = ImageMemory(speaker.bundle.base, num_images)  # none of them is encoded twice
    for t in range(max(len(dialogue.questions) for dialogue in dialogues)):
        rows = [row for row, dialogue in enumerate(dialogues) if t < len(dialogue.questions)]
        queries = [query_at(dialogues[row], t, contents[row]) for row in rows]
        for row, reply in zip(rows, speaker.answer(queries), strict=True):
            contents[row].append(reply.content)
            stem = f"{first_number + row + 1:04d}_{_safe(dialogues[row].record.id)}"
            dialogues[row].answers[t][name] = _as_json(reply, speaker, folder, f"{stem}_{{image}}_{_safe(name)}.png")


def query_at(dialogue: Dialogue, t: int, own_answers: Sequence[str]) -> Query:
    """The dialogue up to question t, with the model's own answers to the questions before it."""
    turns = [Turn("system", dialogue.system)] if dialogue.system is not None else []
    for question, answer in zip(dialogue.questions[:t], own_answers, strict=True):
        turns += [Turn("user", question.text), Turn("assistant", answer)]
    turns.append(Turn("user", dialogue.questions[t].text))
    shown = sum(len(question.images) for question in dialogue.questions[: t + 1])
    return Query(dialogue.record.id, dialogue.record.images[:shown], tuple(turns))


def masks_dir(out: Path) -> Path:
    """Folder of the masks that belong to an answers file."""
    return out.with_name(f"{out.stem}_masks")


def write_lines(out: Path, dialogues: Sequence[Dialogue]) -> None:
    """One line per dialogue, in place of what was there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.writing")
    fresh.write_text(
        "".join(json.dumps(dialogue.as_line(), ensure_ascii=False) + "\n" for dialogue in dialogues), encoding="utf-8"
    )
    os.replace(fresh, out)


def _as_json(reply: Reply, speaker: Speaker, folder: Path, mask_name: str) -> dict[str, Any]:
    return {
        "text": reply.text,
        "parse_ok": reply.parse_ok,
        "has_heads": speaker.has_heads,
        "verdicts": [_verdict_json(verdict, folder, mask_name) for verdict in reply.verdicts],
    }


def _verdict_json(verdict: ImageVerdict, folder: Path, mask_name: str) -> dict[str, Any]:
    mask_path = None
    if verdict.mask_scores is not None:
        file = folder / mask_name.format(image=verdict.image + 1)
        save_mask_png(verdict.mask_scores, file)
        mask_path = f"{folder.name}/{file.name}"
    return {
        "image": verdict.image,
        "label": verdict.label,
        "score": None if verdict.score is None else round(verdict.score, 6),
        "mask_path": mask_path,
        "text_label": verdict.text_label,
    }


def _new(record: Record, system: str | None, questions: list[Question]) -> Dialogue:
    return Dialogue(record, system, questions, [{} for _ in questions])


def _check_text(record: Record, text: str) -> None:
    if found := program_token(text):
        raise _error(record, f"a user turn holds {found}, which only the program may write", "leave it out")


def _error(record: Record, problem: str, fix: str) -> DataFormatError:
    return DataFormatError(problem, record=record.id, source=record.source, field="messages", fix=fix)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:60]
