"""The answers of a record about regions, edited together with its list of candidates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from finetune.errors import DataFormatError
from finetune.schema import Record, Turn

Verdicts = dict[str, Any]
"""Region id to the word of its verdict, in the answer's order."""
Findings = list[dict[str, Any]]
"""What the answer says of each abnormal region: `id` and whatever else was written."""


def edited_answers(
    record: Record, edit: Callable[[Verdicts, Findings], tuple[Verdicts, Findings]], *, problem: str, fix: str
) -> tuple[Turn, ...]:
    """The record's turns, with verdicts and findings of every answer as `edit` returns them; the rest of it stays.

    Args:
        edit: may raise KeyError, TypeError, AttributeError or ValueError where an answer is not of the form below.
        problem, fix: of the error.

    Raises:
        DataFormatError: an answer is not `{"verdicts": {...}, "abnormal": [{"id": ...}, ...]}` about the candidates.
    """

    def edited(answer: str) -> str:
        try:
            tree = json.loads(answer)
            tree["verdicts"], tree["abnormal"] = edit(tree["verdicts"], tree["abnormal"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataFormatError(
                problem,
                record=record.id,
                source=record.source,
                found=answer[:60],
                expected='{"verdicts": {...}, "abnormal": [{"id": ...}, ...]} about the candidates',
                fix=fix,
            ) from error
        return json.dumps(tree, ensure_ascii=False)

    return tuple(Turn(turn.role, edited(turn.content)) if turn.role == "assistant" else turn for turn in record.turns)
