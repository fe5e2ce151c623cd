"""Tampering operations: one file each. `tamper` runs one and gives the altered image, the mask of the pixels it really
altered, and its parameters.

An edit that changed almost nothing is drawn again on the same host (never a new host: that would make tampered pictures
a selection of the authentic ones), so that no invisible edit is labelled. Post-processing is in `degradations`.
"""

from __future__ import annotations

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
    host: np.ndarray, operation: str, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor
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

    Raises:
        NoVisibleEditError: none after `MAX_REDRAWS` tries, e.g. when host and donor are both black.
        ConfigError, MissingDependencyError: the pipeline of `inpaint_diffusion` cannot be used.
    """
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
        if edit.source is not None and settings.mask_convention == "source_and_target":
            mask = mask | edit.source
        measured = {
            "mean_abs_change": round(change, 3),
            "area": round(float(mask.mean()), 5),
            "redraws": redraws,
            "min_change": settings.min_change,
        }
        return Tampering(image, mask, {**edit.parameters, "feather": edit.feather, **measured})
    raise NoVisibleEditError(f"{operation}: no visible edit after {MAX_REDRAWS} tries")
