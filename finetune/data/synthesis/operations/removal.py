"""Remove: what is inside a region gives way to texture and structure copied from the rest of the picture."""

from __future__ import annotations

import numpy as np

from finetune.data.synthesis.operations.edits import DrawDonor, Edit, OperationSettings, draw_feather
from finetune.data.synthesis.operations.patch_fill import patch_fill
from finetune.data.synthesis.regions import draw_region, soft_edge


def remove(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Remove what is inside a region by content-aware fill (`patch_fill`)."""
    del draw_donor
    region, parameters = draw_region(host, rng, settings.area_ranges["remove"], settings.shape_weights)
    feather = draw_feather(rng, settings)
    seed = int(rng.integers(2**31))
    content = patch_fill(host, soft_edge(region, feather) > 0, np.random.default_rng(seed))
    return Edit(content, region, feather, parameters | {"method": "patch_fill", "seed": seed})
