"""Tampering operations: one file each. `tamper` runs one and gives the altered image, the mask of the pixels it really
altered, and its parameters.

An edit that changed almost nothing, or of which post-processing leaves nothing to see, is drawn again on the same host
(never a new host: that would make tampered pictures a selection of the authentic ones), so that no invisible edit is
labelled. Post-processing itself is in `degradations`.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from finetune.data.synthesis.operations.blending import altered_pixels, blend
from finetune.data.synthesis.operations.copy_move import copy_move
from finetune.data.synthesis.operations.diffusion import inpaint_diffusion
from finetune.data.synthesis.operations.edits import (
    MASK_CONVENTIONS,
    Donor,
    DrawDonor,
    Edit,
    NoVisibleEditError,
    Operation,
    OperationSettings,
    Tampering,
)
from finetune.data.synthesis.operations.inpainting import erase
from finetune.data.synthesis.operations.removal import remove
from finetune.data.synthesis.operations.retouch import retouch
from finetune.data.synthesis.operations.splice import splice
from finetune.data.synthesis.operations.visibility import visible_change
from finetune.data.synthesis.regions import DoesNotFitError

__all__ = [
    "MASK_CONVENTIONS",
    "OPERATIONS",
    "Donor",
    "DrawDonor",
    "Edit",
    "NoVisibleEditError",
    "OperationSettings",
    "Tampering",
    "altered_pixels",
    "tamper",
]

OPERATIONS: dict[str, Operation] = {
    "splice": splice,
    "copy_move": copy_move,
    "erase": erase,
    "remove": remove,
    "retouch": retouch,
    "inpaint_diffusion": inpaint_diffusion,
}
"""Every operation: host, generator, settings, donor → an edit; raises `DoesNotFitError` where a draw does not fit."""
MAX_REDRAWS = 120
"""The worst of 4000 pictures took 18 (a copy within a smooth retina); a large set must not fail for one picture."""


def tamper(
    host: np.ndarray,
    operation: str,
    rng: np.random.Generator,
    settings: OperationSettings,
    draw_donor: DrawDonor,
    finish: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Tampering:
    """Tamper with a picture.

    The mask is exact: outside it the image equals the host bit by bit. Inside it a pixel may by accident keep its value
    (a blurred highlight, say); such gaps of up to 7 px are closed, larger unaltered parts are not masked.

    Args:
        host: (H, W, 3) uint8 RGB authentic picture; not modified.
        operation: a name of `OPERATIONS`.
        rng: the sample's own generator.
        settings: ranges to draw from.
        draw_donor: gives another authentic picture of the host's size; only `splice` calls it.
        finish: post-processing, a picture like `host` to one of the final size; the same result at every call. None
            leaves it as it is.

    Raises:
        NoVisibleEditError: none after `MAX_REDRAWS` tries, e.g. when host and donor are both black.
        ConfigError, MissingDependencyError: the pipeline of `inpaint_diffusion` cannot be used.
    """
    finished_host = host if finish is None else finish(host)
    for redraws in range(MAX_REDRAWS):
        try:
            edit = OPERATIONS[operation](host, rng, settings, draw_donor)
            image, support = blend(host, edit)
        except DoesNotFitError:
            continue
        mask = altered_pixels(host, image, support)
        change = float(cv2.absdiff(image, host)[mask].mean()) if mask.any() else 0.0
        least, largest = settings.area_ranges[operation]
        if change < settings.min_change or not 0.6 * least <= mask.mean() <= 1.15 * largest:
            continue
        finished = image if finish is None else finish(image)
        finished_mask = _resized(mask, finished.shape[:2])
        if not finished_mask.any():
            continue
        shown, shown_share = visible_change(finished_host, finished, finished_mask)
        if shown_share < settings.min_visible_share:
            continue
        if edit.source is not None and settings.mask_convention == "source_and_target":
            mask = mask | edit.source
            finished_mask = _resized(mask, finished.shape[:2])
        measured = {
            "mean_abs_change": round(change, 3),
            "area": round(float(mask.mean()), 5),
            "redraws": redraws,
            "min_change": settings.min_change,
            "visible_change": round(shown, 3),
            "visible_share": round(shown_share, 3),
        }
        parameters = {**edit.parameters, "feather": edit.feather, **measured}
        return Tampering(image, mask, finished, finished_mask, parameters)
    raise NoVisibleEditError(f"{operation}: no visible edit after {MAX_REDRAWS} tries")


def _resized(mask: np.ndarray, size_hw: tuple[int, ...]) -> np.ndarray:
    """(*size_hw) bool: a pixel is marked where at least half of what it shows was."""
    if mask.shape == tuple(size_hw):
        return mask
    return cv2.resize(mask.astype(np.float32), size_hw[::-1], interpolation=cv2.INTER_LINEAR) >= 0.5
