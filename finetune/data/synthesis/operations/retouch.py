"""Retouch: a region changed in place by smoothing, added grain, or resampling with a change of contrast."""

from __future__ import annotations

import cv2
import numpy as np

from finetune.data.synthesis.degradations import resize
from finetune.data.synthesis.operations.edits import DrawDonor, Edit, OperationSettings, draw_feather
from finetune.data.synthesis.regions import draw_region

KINDS = {"smooth": 0.45, "grain": 0.25, "tone": 0.3}
"""Kind of retouch → chance."""


def retouch(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Change a region in place: smoothing, added grain, or resampling with a change of contrast."""
    del draw_donor
    region, parameters = draw_region(host, rng, settings.area_ranges["retouch"], settings.shape_weights)
    kind = list(KINDS)[int(rng.choice(len(KINDS), p=list(KINDS.values())))]
    levels = host.astype(np.float32)
    if kind == "smooth":
        sigma = round(float(rng.uniform(0.9, 2.5)), 2)
        parameters |= {"sigma": sigma}
        content = cv2.GaussianBlur(levels, (0, 0), sigma)
    elif kind == "grain":
        sigma = round(float(rng.uniform(5, 13)), 2)
        grain = cv2.GaussianBlur(rng.standard_normal(host.shape[:2], dtype=np.float32), (0, 0), 0.6)
        parameters |= {"sigma": sigma}
        content = levels + sigma * (grain / grain.std())[..., None]
    else:
        factor, gain, lift = (round(float(rng.uniform(*limits)), 3) for limits in ((0.55, 0.85), (0.8, 1.3), (-18, 18)))
        height, width = host.shape[:2]
        small = resize(levels, (round(height * factor), round(width * factor)), "area")
        content = resize(small, (height, width), "cubic")
        mean = levels[region].mean(axis=0)
        content = (content - mean) * gain + mean + lift
        parameters |= {"factor": factor, "gain": gain, "lift": lift}
    return Edit(np.clip(content, 0, 255), region, draw_feather(rng, settings), {"kind": kind, **parameters})
