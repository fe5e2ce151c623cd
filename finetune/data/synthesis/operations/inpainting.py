"""Erase: what is inside a region gives way to a smooth continuation of its surroundings. OpenCV's and scikit-image's
methods; they leave no grain, which is the trace. For a fill with texture see `removal`.
"""

from __future__ import annotations

import cv2
import numpy as np
from skimage.restoration import inpaint_biharmonic

from finetune.data.synthesis.operations.edits import DrawDonor, Edit, OperationSettings, draw_feather
from finetune.data.synthesis.regions import draw_region, soft_edge

METHODS = {"telea": 0.4, "navier_stokes": 0.4, "biharmonic": 0.6}
"""Inpainting method → weight: OpenCV's Telea 2004 and Bertalmio et al. 2001, scikit-image's Damelin and Hoang 2018."""
MAX_BIHARMONIC_PIXELS = 3000
"""It solves a sparse system of the size of the hole: 14 ms for 2000 pixels in colour, then growing faster than the
hole. Larger holes take one of the others."""


def erase(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Remove what is inside a region by inpainting from its surroundings, by one of `METHODS`."""
    del draw_donor
    region, parameters = draw_region(host, rng, settings.area_ranges["erase"], settings.shape_weights)
    feather = draw_feather(rng, settings)
    hole = soft_edge(region, feather) > 0
    names = [name for name in METHODS if name != "biharmonic" or hole.sum() <= MAX_BIHARMONIC_PIXELS]
    p = np.array([METHODS[name] for name in names])
    method, radius = names[int(rng.choice(len(names), p=p / p.sum()))], int(rng.integers(2, 5))
    parameters |= {"method": method}
    if method == "biharmonic":
        content = np.clip(inpaint_biharmonic(host, hole, channel_axis=2), 0, 1).astype(np.float32) * 255
    else:
        parameters |= {"radius": radius}
        flag = cv2.INPAINT_TELEA if method == "telea" else cv2.INPAINT_NS
        content = cv2.inpaint(host, hole.astype(np.uint8), radius, flag)
    return Edit(content, region, feather, parameters)
