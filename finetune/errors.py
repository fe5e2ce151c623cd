"""Errors a user can cause, each one line: what was found, what was expected, what to do, which record.

The command line prints `ForensicsError`s without a traceback and exits with status 2; any other exception is a bug.
"""

from __future__ import annotations


class ForensicsError(Exception):
    """Base of every error that is the input's fault, not the program's."""

    exit_code = 2


class ConfigError(ForensicsError):
    """A configuration file, key or command-line override cannot be used."""


class ModelLoadError(ForensicsError):
    """A model, adapter or tokenizer folder cannot be used."""


class MissingDependencyError(ForensicsError):
    """An optional package is not installed."""


class CheckpointError(ForensicsError):
    """A checkpoint cannot be written or resumed from."""


class TrainingDivergedError(ForensicsError):
    """A loss or gradient stopped being finite."""


class DataFormatError(ForensicsError):
    """A record, image or mask cannot be used.

    Args:
        problem: what is wrong, without the record's name, e.g. `"label is neither 0 nor 1"`.
        record: id of the record, or None where the whole file is meant.
        source: where it stands, `"train.jsonl:12"`.
        field: the record's field.
        found: the offending value (shortened when printed).
        expected: what a good value looks like.
        fix: the next action for the user.
    """

    def __init__(
        self,
        problem: str,
        *,
        record: str | None = None,
        source: str | None = None,
        field: str | None = None,
        found: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.record, self.source, self.field = problem, record, source, field
        self.found, self.expected, self.fix = found, expected, fix
        where = " ".join(
            part for part in (f"record '{record}'" if record else "", f"({source})" if source else "") if part
        )
        parts = [f"{where}: {problem}" if where else problem]
        if field:
            parts.append(f"field '{field}'")
        if found is not None:
            parts.append(f"found {shorten(found)}")
        if expected:
            parts.append(f"expected {expected}")
        if fix:
            parts.append(f"fix: {fix}")
        text = "; ".join(parts).replace("\n", "\\n")
        super().__init__(text.encode("utf-8", "backslashreplace").decode())  # half a character could not be printed


def shorten(value: object, limit: int = 120) -> str:
    """`repr` of a value on one line, cut in the middle at `limit` characters."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
