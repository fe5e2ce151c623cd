"""A heat map in words: its regions as boxes in pixels of the original image, where they lie, how large, how certain.

No model and no torch. The words are Chinese or English; what stands in them is measured from the map, never guessed. An
empty map names the threshold that emptied it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from finetune.inference.visualization import binarize

Language = Literal["zh", "en"]

_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
_WHOLE = "whole"
_WHOLE_SHARE = 0.8

PLACES: dict[str, tuple[str, str]] = {
    "top-left": ("左上部", "upper left"),
    "top-middle": ("上部中央", "top centre"),
    "top-right": ("右上部", "upper right"),
    "middle-left": ("左侧", "left side"),
    "middle-middle": ("中央", "centre"),
    "middle-right": ("右侧", "right side"),
    "bottom-left": ("左下部", "lower left"),
    "bottom-middle": ("下部中央", "bottom centre"),
    "bottom-right": ("右下部", "lower right"),
    _WHOLE: ("几乎整幅图像", "nearly the whole image"),
}
"""Key of a place to its Chinese and English words: the third of height and width in which a region's centre lies."""


@dataclass(frozen=True)
class Region:
    """One connected region of a heat map.

    Args:
        box_xyxy: (x0, y0, x1, y1) in whole pixels of the original image, half-open: x1, y1 are just outside.
        place: a key of `PLACES`.
        area: marked pixels as a share of the image, in (0, 1].
        score: mean score of the marked pixels, in [0, 1].
    """

    box_xyxy: tuple[int, int, int, int]
    place: str
    area: float
    score: float


@dataclass(frozen=True)
class Evidence:
    """What was found out about one image; everything an explanation may lean on.

    Args:
        score: probability in [0, 1] that the image is tampered; label: `score` against `threshold`.
        size_hw: of the upright original.
        heatmap_threshold: score from which a pixel is marked.
        regions: the largest ones, largest first.
        num_regions: how many there are in all, without specks (`find_regions`).
        area: share of the image that is marked, specks included; regions_area: that of the `num_regions` alone.
        peak: largest score of the map, None without a map.
    """

    score: float
    label: int
    threshold: float
    size_hw: tuple[int, int]
    heatmap_threshold: float
    regions: tuple[Region, ...]
    num_regions: int
    area: float
    regions_area: float
    peak: float | None


def find_regions(
    mask_scores: np.ndarray, threshold: float, *, max_regions: int = 5, min_area: float = 0.0005
) -> tuple[tuple[Region, ...], int, float]:
    """The regions (8-connected) of the marked pixels, largest first, how many there are without the specks, and the
    share of the image of all those.

    Args:
        mask_scores: (H, W) in [0, 1]; NaN is not marked.
        threshold: a pixel is marked where its score is at least this.
        max_regions: at most this many are given.
        min_area: regions below this share of the image are specks and left out, but never the largest one.
    """
    marked = binarize(mask_scores, threshold)
    height, width = marked.shape
    count, components, stats, centres = cv2.connectedComponentsWithStats(marked.astype(np.uint8), connectivity=8)
    sizes = stats[:, cv2.CC_STAT_AREA]
    order = sorted(range(1, count), key=lambda k: (-int(sizes[k]), k))  # component 0 is the background
    kept = [k for n, k in enumerate(order) if n == 0 or sizes[k] >= min_area * marked.size]
    regions = []
    for k in kept[:max_regions]:
        left, top, wide, high = (int(value) for value in stats[k, :4])
        window = (slice(top, top + high), slice(left, left + wide))
        own = np.asarray(mask_scores)[window][components[window] == k]
        is_whole = wide >= _WHOLE_SHARE * width and high >= _WHOLE_SHARE * height
        place = _WHOLE if is_whole else _place(float(centres[k][0]) + 0.5, float(centres[k][1]) + 0.5, width, height)
        score = float(np.clip(own.mean(dtype=np.float64), 0.0, 1.0))
        regions.append(Region((left, top, left + wide, top + high), place, float(sizes[k]) / marked.size, score))
    return tuple(regions), len(kept), float(sum(int(sizes[k]) for k in kept)) / marked.size


def _place(x: float, y: float, width: int, height: int) -> str:
    column, row = min(2, int(3 * x / width)), min(2, int(3 * y / height))
    return f"{_ROWS[row]}-{_COLUMNS[column]}"


def gather_evidence(
    score: float,
    label: int,
    mask_scores: np.ndarray | None,
    size_hw: tuple[int, int],
    *,
    threshold: float,
    heatmap_threshold: float,
    max_regions: int = 5,
    min_area: float = 0.0005,
) -> Evidence:
    """The evidence of one image; without a map there are no regions and no peak."""
    if mask_scores is None:
        return Evidence(score, label, threshold, size_hw, heatmap_threshold, (), 0, 0.0, 0.0, None)
    regions, count, share = find_regions(mask_scores, heatmap_threshold, max_regions=max_regions, min_area=min_area)
    area = float(binarize(mask_scores, heatmap_threshold).mean())
    peak = float(np.nanmax(mask_scores))
    return Evidence(score, label, threshold, size_hw, heatmap_threshold, regions, count, area, share, peak)


def score_text(score: float, threshold: float, digits: int = 2) -> str:
    """A score with so many digits, or as many more as it takes to stand on its own side of the threshold."""
    for count in range(digits, 17):
        text = f"{score:.{count}f}"
        if (float(text) >= threshold) == (score >= threshold):
            return text
    return repr(score)


def verdict_word(label: int, language: Language) -> str:
    """`疑似篡改`/`真实` or `tampered`/`authentic`."""
    words = (("真实", "authentic"), ("疑似篡改", "tampered"))
    return words[label][language == "en"]


def place_word(region: Region, language: Language) -> str:
    """Where a region lies, in words."""
    return PLACES[region.place][language == "en"]


def boxes_text(evidence: Evidence) -> str:
    """`[[x0, y0, x1, y1], ...]` of the regions named, in pixels of the original image."""
    return str([list(region.box_xyxy) for region in evidence.regions])


def regions_text(evidence: Evidence, language: Language) -> str:
    """The regions in one sentence each, or why there is none."""
    if not evidence.regions:
        return empty_map_text(evidence, language)
    lines, least = [], evidence.heatmap_threshold
    for number, region in enumerate(evidence.regions, start=1):
        box = ", ".join(map(str, region.box_xyxy))
        if language == "zh":
            lines.append(
                f"区域{number}位于{place_word(region, language)}，边界框[{box}]，占图像{_percent(region.area)}，"
                f"平均得分{score_text(region.score, least)}"
            )
        else:
            lines.append(
                f"region {number}: {place_word(region, language)}, box [{box}], {_percent(region.area)} of the image, "
                f"mean score {score_text(region.score, least)}"
            )
    rest = evidence.num_regions - len(evidence.regions)
    if rest:
        lines.append(f"另有{rest}处较小区域" if language == "zh" else f"and {rest} smaller ones")
    return ("；" if language == "zh" else "; ").join(lines)


def empty_map_text(evidence: Evidence, language: Language) -> str:
    """Why no region is named: there is no map, or no pixel reaches the threshold (which, and what the map reaches)."""
    if evidence.peak is None:
        return "没有热图" if language == "zh" else "there is no heat map"
    peak, threshold = score_text(evidence.peak, evidence.heatmap_threshold, 3), f"{evidence.heatmap_threshold:g}"
    if language == "zh":
        return f"热图中没有像素达到阈值 heatmap_threshold={threshold}（最高得分 {peak}）"
    return f"no pixel of the heat map reaches heatmap_threshold={threshold} (the highest score is {peak})"


def evidence_text(evidence: Evidence, language: Language) -> str:
    """Verdict, score and regions as the language model reads them; boxes are in pixels of the original image."""
    height, width = evidence.size_hw
    verdict = verdict_word(evidence.label, language)
    found = regions_text(evidence, language)
    score = score_text(evidence.score, evidence.threshold)
    specks = evidence.area - evidence.regions_area
    if language == "zh":
        text = (
            f"检测模型判定：{verdict}（篡改得分{score}，判定阈值{evidence.threshold:g}）。"
            f"图像尺寸：宽{width}像素，高{height}像素。"
        )
        if not evidence.regions:
            return f"{text}{found}。"
        others = f"，此外零星小块占{_percent(specks)}" if specks > 0 else ""
        return (
            f"{text}热图中得分不低于{evidence.heatmap_threshold:g}的可疑区域共{evidence.num_regions}处，合计占图像"
            f"{_percent(evidence.regions_area)}{others}（边界框为[左, 上, 右, 下]，单位为原图像素）：{found}。"
        )
    text = (
        f"The detector's verdict: {verdict} (tampering score {score}, threshold {evidence.threshold:g}). "
        f"Image size: {width} pixels wide, {height} pixels high. "
    )
    if not evidence.regions:
        return f"{text}{found[0].upper()}{found[1:]}."
    others = f", and specks of {_percent(specks)}" if specks > 0 else ""
    noun = "region" if evidence.num_regions == 1 else "regions"
    return (
        f"{text}The heat map has {evidence.num_regions} suspicious {noun} with scores of at least "
        f"{evidence.heatmap_threshold:g}, {_percent(evidence.regions_area)} of the image together{others} "
        f"(boxes are [left, top, right, bottom] in pixels of the original image): {found}."
    )


def _percent(share: float) -> str:
    """A share as a percentage; a tiny one is not rounded to nothing."""
    value = 100 * share
    return "<0.1%" if 0 < value < 0.05 else f"{value:.1f}%"
