"""What is asked of a predictor: images and the turns before the answer, never a target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune.data.chat import prompt
from finetune.data.template import Template
from finetune.schema import ImageInput, Record, Turn


@dataclass(frozen=True)
class Query:
    """What is asked: images and the turns before the answer; no targets."""

    id: str
    images: tuple[ImageInput, ...]
    turns: tuple[Turn, ...]


def query_for_image(path: str, template: Template) -> Query:
    """The template's question about one image file."""
    return Query(path, (ImageInput(path=path),), (Turn("user", prompt(template, 1)),))


def queries_of(records: Iterable[Record], questions: Any) -> Iterator[Query]:
    """Queries of records: images and questions, nothing else.

    Args:
        questions: function of a record giving the turns before its answer, e.g. `chat.question_turns`.
    """
    for record in records:
        yield Query(record.id, record.images, questions(record))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
