"""Which calibration an image score goes through: the one place that decides, for every verb that opens heads on the
vision tower.

`calibration.json` beside such heads is used unless it is switched off. Heads on forensic tokens give their own scores:
their figures and thresholds are those of the training log. Fitting is `finetune.metrics.calibration`'s part.
"""

from __future__ import annotations

from pathlib import Path

from finetune.config.model_folder import CALIBRATION
from finetune.errors import ConfigError
from finetune.metrics.calibration import Calibration
from finetune.models.loading import Bundle


def find_calibration(asked: str, heads: Path) -> Path | None:
    """The file of `calibration`: beside the heads where it is `auto` (None where there is none), None for `off`.

    Raises:
        ConfigError: a file that is named and not there.
    """
    if asked == "off":
        return None
    path = heads / CALIBRATION if asked == "auto" else Path(asked)
    if path.is_file():
        return path
    if asked == "auto":
        return None
    raise ConfigError(f"calibration is {asked}, which is no file; give a {CALIBRATION}, auto or off")


def calibration_of(bundle: Bundle, folder: str | Path, asked: str = "auto") -> Calibration | None:
    """From a model's image logits to calibrated scores, for `Predictor`; None where scores stay as they are (also by
    a file that says so).

    Args:
        folder: the heads were read from. asked: `auto`, `off` or a file.

    Raises:
        ConfigError: as `find_calibration`. DataFormatError: the file is no calibration.
    """
    if not bundle.base.reads_tower:
        return None
    path = find_calibration(asked, Path(folder))
    calibration = None if path is None else Calibration.load(path)
    return None if calibration is None or calibration.method == "none" else calibration
