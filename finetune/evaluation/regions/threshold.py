"""threshold.json: the threshold of an evaluation of candidate regions, and what it was chosen on, so that a later test
can be kept apart from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.storage.atomic import write_atomically
from finetune.errors import ConfigError
from finetune.evaluation.regions.sets import Seen

THRESHOLD_FILE = "threshold.json"


@dataclass(frozen=True)
class Threshold:
    """A decision threshold for the probability that a region is abnormal.

    Args:
        value: in [0, 1]; a region is called abnormal from it on.
        swept: whether it was chosen on a validation file, by region F1.
        chosen_on: that file. f1: region F1 there. model: the weights it was chosen with, as `run_folder` tells them.
        images, groups: of that file, see `Seen`.
    """

    value: float
    swept: bool = False
    chosen_on: str | None = None
    f1: float | None = None
    model: Mapping[str, Any] | None = None
    images: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    @property
    def seen(self) -> Seen:
        """What must not be tested on."""
        return Seen(frozenset(self.images), frozenset(self.groups))

    @property
    def summary(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        return {"value": self.value, "swept": self.swept, "chosen_on": self.chosen_on, "val_f1": self.f1}

    def save(self, folder: Path) -> None:
        """Write threshold.json."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / THRESHOLD_FILE, [text.encode()])


def read_threshold(path: str) -> Threshold:
    """What `Threshold.save` wrote.

    Raises:
        ConfigError: not such a file.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        found = Threshold(**tree)
        is_usable = isinstance(found.value, int | float) and 0 <= found.value <= 1
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--threshold-from {path} cannot be used ({error}); give the {THRESHOLD_FILE} of an earlier evaluation, or "
            "the number with --threshold"
        ) from error
    if not is_usable:
        raise ConfigError(f"--threshold-from {path}: value is {found.value!r}; expected a number between 0 and 1")
    return found
