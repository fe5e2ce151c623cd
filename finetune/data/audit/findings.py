"""What an audit finds, as plain values: findings with their examples, the leak table, counts. Wording: texts.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
MAX_EXAMPLES = 8


@dataclass(frozen=True)
class Example:
    """One record that shows a finding.

    Args:
        record: its id.
        number: its number in reading order over all sources, -1 where it could not be read.
        image: place of the image meant, None for the record as a whole.
        note: what is to be seen, one line; "" where the pictures say it.
    """

    record: str
    number: int = -1
    image: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of problem.

    Args:
        check: key of `texts.CHECKS`.
        severity: an error makes `forensics audit` exit with 1.
        count: how many records, images or sets, as the check says.
        subject: what the check is about in particular (a feature, a split), "".
        examples: the first few.
        details: values that the texts name.
    """

    check: str
    severity: Severity
    count: int
    subject: str = ""
    examples: tuple[Example, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Leak:
    """How well one thing gives the label away.

    Args:
        feature: key of `FEATURES`, or `combined` (all container features) or `prompt`.
        auroc, low, high: of held-out groups with the 95 % interval; None where it cannot be judged.
        num_images: with a value.
        is_grouped: folds keep groups whole; False where every group has one class only, so that this is impossible.
        note: what separates the classes, for people.
    """

    feature: str
    family: str
    auroc: float | None
    low: float | None
    high: float | None
    num_images: int
    is_grouped: bool = True
    note: str = ""


@dataclass
class Audit:
    """Everything that was found out about a data set."""

    sources: list[dict[str, str]]
    settings: dict[str, Any]
    counts: dict[str, Any]
    leaks: list[Leak]
    findings: list[Finding]
    seconds: float = 0.0

    @property
    def num_errors(self) -> int:
        """Findings that are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def num_warnings(self) -> int:
        """Findings that are warnings."""
        return sum(finding.severity == "warning" for finding in self.findings)
