"""Copy-move: a region of the picture a second time in the same picture."""

from __future__ import annotations

import numpy as np

from finetune.data.synthesis.operations.edits import DrawDonor, Edit, OperationSettings, draw_blend
from finetune.data.synthesis.operations.placement import move
from finetune.data.synthesis.regions import DoesNotFitError, draw_region


def copy_move(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Copy a region of the host to another place of it: some exactly, the rest rotated, scaled or flipped; with a hard
    or soft edge or blended in the gradient domain."""
    del draw_donor
    source, parameters = draw_region(host, rng, settings.area_ranges["copy_move"], settings.shape_weights)
    content, target, pose = move(host, source, rng, unchanged_probability=0.1)
    if (target & source).sum() > 0.25 * min(target.sum(), source.sum()):
        raise DoesNotFitError("the copy covers its source")
    name, feather = draw_blend(rng, settings)
    parameters |= {**pose, "blend": name, "mask_convention": settings.mask_convention}
    return Edit(content, target, feather, parameters, source, name)
