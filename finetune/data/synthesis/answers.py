"""Words and polygons for the answer of a generated sample, made from its mask and provenance only.

Evidence says what was done, where, and how hard it is to see; several phrasings, Chinese and English.
No chat templates here.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from skimage.draw import polygon as fill_polygon

LANGUAGES = ("zh", "en")
IntPolygon = list[list[int]]
"""[[x, y], ...] in whole pixels of the image's own frame, (0, 0) the corner of the first pixel; the last point is not
repeated."""

_PLACES = {
    "zh": (("左上", "上方", "右上"), ("左侧", "中央", "右侧"), ("左下", "下方", "右下")),
    "en": (("upper left", "top", "upper right"), ("left", "centre", "right"), ("lower left", "bottom", "lower right")),
}
_LEVELS = {"zh": ("易", "中", "难"), "en": ("easy", "medium", "hard")}
_FINDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "zh": {
        "splice": ("{place}区域的噪声与压缩痕迹和周围不一致，疑似由另一张照片拼接而来",
                   "{place}有一块内容来自其他图像，边界处颜色与清晰度突变",
                   "{place}的颗粒和锐度与画面其余部分不同，判断为拼接"),
        "copy_move": ("{place}的内容与画面别处重复，判断为复制-移动",
                      "{place}区域由本图其他位置复制而来，纹理重复出现",
                      "{place}出现与另一处相同的图案，属于同图复制粘贴"),
        "erase": ("{place}区域纹理模糊、噪声消失，疑似有物体被擦除后修补填充",
                  "{place}的内容被移除，由周围像素填补，细节呈涂抹状",
                  "{place}缺少自然的传感器噪声，判断为擦除修补"),
        "retouch.smooth": ("{place}被局部磨皮模糊，细节与噪声少于周围", "{place}区域经过局部平滑处理，清晰度低于四周"),
        "retouch.grain": ("{place}被局部添加噪点，颗粒明显强于周围", "{place}的颗粒强度与四周不一致，疑似局部加噪"),
        "retouch.tone": ("{place}经过局部调色与重采样，明暗和清晰度与周围不连贯",
                         "{place}的对比度被局部修改，细节有重采样痕迹"),
        "authentic": ("未发现拼接、复制、擦除或局部修饰的痕迹，全图噪声与清晰度一致",
                      "画面各处噪声、锐度与压缩痕迹一致，未见篡改",
                      "没有发现局部异常，判断为真实图像"),
    },
    "en": {
        "splice": ("noise and compression in the {place} differ from the surroundings: spliced from another photo",
                   "a piece in the {place} comes from another image, colour and sharpness jump at its border",
                   "grain and sharpness of the {place} do not fit the rest of the picture, which points to a splice"),
        "copy_move": ("the {place} repeats content from elsewhere in the picture: copy-move",
                      "the {place} was copied from another part of this image, its texture appears twice",
                      "the same pattern appears in the {place} and elsewhere, a copy within the image"),
        "erase": ("texture in the {place} is smeared and noise is gone: something was erased and filled in",
                  "content was removed from the {place} and filled from the surrounding pixels",
                  "the {place} lacks natural sensor noise, which points to inpainting"),
        "retouch.smooth": ("the {place} was smoothed locally, with less detail and noise than its surroundings",
                           "local blur in the {place}, less sharp than the rest"),
        "retouch.grain": ("grain was added locally in the {place}, clearly stronger than around it",
                          "grain in the {place} does not match the rest: local noise was added"),
        "retouch.tone": ("tone was changed locally in the {place} and detail was resampled",
                         "contrast of the {place} was edited locally, with traces of resampling"),
        "authentic": ("no trace of splicing, copying, erasing or local retouching; noise and sharpness are consistent",
                      "noise, sharpness and compression agree across the picture, no tampering seen",
                      "no local anomaly found, judged to be authentic"),
    },
}  # fmt: skip
_HARDNESS = {"zh": "；取证难易：{level}", "en": "; difficulty: {level}"}


def place_words(mask: np.ndarray, language: str) -> str:
    """Where the mask's largest piece is, on a 3×3 grid in words: `左上` / `upper left`.

    Args:
        mask: (H, W) bool with at least one pixel.
        language: `zh` or `en`.
    """
    _, _, stats, centres = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    x, y = centres[1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())]
    row, column = int(3 * y / mask.shape[0]), int(3 * x / mask.shape[1])
    return _PLACES[language][min(row, 2)][min(column, 2)]


def difficulty(operation: dict[str, Any], degradations: list[dict[str, Any]]) -> int:
    """How hard the edit is to see: 0 easy, 1 medium, 2 hard; from its strength, its size and what came after it."""
    points = 0
    points += operation["mean_abs_change"] < 20
    points += operation["mean_abs_change"] < 8
    points += operation["area"] < 0.06
    points += bool(operation.get("colour_match", 0) > 0.5)
    points += operation["name"] == "copy_move"
    points += any(
        step["name"] in ("double_jpeg", "noise", "blur", "resize_back") or step.get("quality", 100) < 80
        for step in degradations
    )
    return 0 if points <= 1 else 1 if points == 2 else 2


def evidence_text(
    mask: np.ndarray | None,
    operation: dict[str, Any] | None,
    degradations: list[dict[str, Any]],
    language: str,
    rng: np.random.Generator,
) -> str:
    """One sentence of evidence.

    Args:
        mask: (H, W) bool of the finished image, None when authentic.
        operation: its provenance (`name` and the parameters of `operations.tamper`), None when authentic.
        degradations: the plan that was applied; only the stated difficulty depends on it.
        language: `zh` or `en`.
        rng: chooses the phrasing.
    """
    if operation is None or mask is None:
        choices = _FINDINGS[language]["authentic"]
        return choices[int(rng.integers(len(choices)))]
    name = operation["name"]
    choices = _FINDINGS[language][f"retouch.{operation['kind']}" if name == "retouch" else name]
    finding = choices[int(rng.integers(len(choices)))].format(place=place_words(mask, language))
    return finding + _HARDNESS[language].format(level=_LEVELS[language][difficulty(operation, degradations)])


def mask_to_polygons(mask: np.ndarray, max_points: int = 24, min_area: float = 0.002) -> list[IntPolygon]:
    """Outlines of a mask, simplified until all of them together have at most `max_points` points.

    Args:
        mask: (H, W) bool.
        max_points: budget over all polygons, >= 4; the smallest pieces are dropped when even triangles exceed it.
        min_area: pieces smaller than this share of the image are left out, unless that leaves nothing.

    Returns:
        polygons from large to small, coordinates 0..W and 0..H on pixel corners, holes filled; [] for an empty mask.
    """
    # On a doubled grid the outline runs a quarter pixel inside the true border, so rounding lands on pixel corners.
    doubled = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outlines = [np.rint((contour[:, 0].astype(np.float32) + 0.5) / 2).astype(np.int32) for contour in contours]
    outlines = sorted((line for line in outlines if len(line) >= 3), key=cv2.contourArea, reverse=True)
    large = [line for line in outlines if cv2.contourArea(line) >= min_area * mask.size]
    outlines = (large or outlines[:1])[: max(1, max_points // 3)]
    epsilon = 0.5
    while True:
        simple = [cv2.approxPolyDP(line, epsilon, True)[:, 0] for line in outlines]
        simple = [line for line in simple if len(line) >= 3]
        if outlines and not simple:  # too thin for any outline: its bounding box
            x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
            return [[[x, y], [x + width, y], [x + width, y + height], [x, y + height]]]
        if sum(len(line) for line in simple) <= max_points:
            return [[[int(x), int(y)] for x, y in line] for line in simple]
        epsilon *= 1.2


def polygons_to_mask(polygons: list[IntPolygon], size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels whose centre (x + 0.5, y + 0.5) lies in any polygon. Inverse of `mask_to_polygons`."""
    mask = np.zeros(size_hw, dtype=bool)
    for points in polygons:
        corners = np.asarray(points, dtype=np.float64)
        rows, columns = fill_polygon(corners[:, 1] - 0.5, corners[:, 0] - 0.5, size_hw)
        mask[rows, columns] = True
    return mask


def phrases(language: str) -> list[str]:
    """Every sentence `evidence_text` can give, with each place and level: text a tokenizer can be trained on."""
    places = [place for row in _PLACES[language] for place in row]
    sentences = [s.format(place=place) for choices in _FINDINGS[language].values() for s in choices for place in places]
    return sentences + [_HARDNESS[language].format(level=level) for level in _LEVELS[language]]
