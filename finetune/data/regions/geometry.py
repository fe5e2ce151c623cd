"""How well geometry alone tells labelled boxes from the others: one AUROC per feature, .5 where it gives nothing away.

A check of prepared candidates, not of a model: what it finds, a model can learn without looking at the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from finetune.data.audit.leaks import auroc_interval
from finetune.data.regions.candidates import Candidate

FEATURES = ("width", "height", "area", "aspect", "center_x", "center_y", "number", "candidates")
"""Sizes and places in parts of the image, width / height in pixels, the number in its id, candidates of its image."""


def geometry_aurocs(
    candidates: Mapping[str, Sequence[Candidate]],
    sizes_hw: Mapping[str, tuple[int, int]],
    *,
    only_with_defects: bool = False,
) -> dict[str, float | None]:
    """AUROC of each of `FEATURES`, positive class: boxes with a defect; above or below .5 alike tells them apart.

    Args:
        candidates: by image id.
        sizes_hw: of each image.
        only_with_defects: look at images with a defect only.

    Returns:
        None for every feature where all boxes are of one kind.
    """
    rows, labels, groups = [], [], []
    for number, (image, regions) in enumerate(candidates.items()):
        if only_with_defects and all(region.defect_type is None for region in regions):
            continue
        for region in regions:
            rows.append(_features(region, sizes_hw[image], len(regions)))
            labels.append(int(region.defect_type is not None))
            groups.append(number)
    truth = np.array(labels)
    if not 0 < truth.sum() < len(truth):
        return dict.fromkeys(FEATURES)
    values = np.array(rows)  # (N, F)
    return {
        name: auroc_interval(values[:, column], truth, np.array(groups)).auroc for column, name in enumerate(FEATURES)
    }


def _features(region: Candidate, size_hw: tuple[int, int], num_regions: int) -> tuple[float, ...]:
    x1, y1, x2, y2 = region.box_xyxy
    height, width = size_hw
    sides = ((x2 - x1) / width, (y2 - y1) / height)
    center = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
    return (*sides, sides[0] * sides[1], (x2 - x1) / (y2 - y1), *center, float(region.id[1:]), num_regions)
