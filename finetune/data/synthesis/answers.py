"""Words and polygons for the answer of a generated sample, made from its mask and provenance only.

Evidence says what was done, where, and how hard it is to see; several phrasings, Chinese and English. Conversations are
in `conversations`, chat templates in finetune.data.chat.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from finetune.data.answer_polygons import PolygonFrame
from finetune.data.masks import polygons_from_mask

LANGUAGES = ("zh", "en")
EVIDENCE_DETAILS = ("short", "full")
IntPolygon = list[list[int]]
"""[[x, y], ...] in whole pixels of the image's own frame, (0, 0) the corner of the first pixel; the last point is not
repeated."""
PLACES = (
    ("upper left", "top", "upper right"),
    ("left", "centre", "right"),
    ("lower left", "bottom", "lower right"),
)
"""Names of the nine fields of an image in provenance, row by row."""
LEVELS = ("easy", "medium", "hard")
"""How hard an edit is to see, in provenance."""

_PLACES = {
    "zh": (("左上", "上方", "右上"), ("左侧", "中央", "右侧"), ("左下", "下方", "右下")),
    "en": (PLACES[0], ("left side", "centre", "right side"), PLACES[2]),
}
_LEVELS = {"zh": ("易", "中", "难"), "en": LEVELS}
_FINDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "zh": {
        "splice": ("{place}区域的噪声与压缩痕迹和周围不一致，疑似由另一张照片拼接而来",
                   "{place}有一块内容来自其他图像，边界处颜色与清晰度突变",
                   "{place}的颗粒和锐度与画面其余部分不同，判断为拼接"),
        "splice.blended": ("{place}的内容来自另一张照片，边界经过无缝融合，但内部纹理与周围不是同一来源",
                           "{place}由另一张照片拼接而来，边缘做过梯度域融合，属于拼接"),
        "splice.matched": ("{place}的内容取自另一张照片，颜色与噪声被调整得接近周围，属于拼接",
                           "{place}由另一张照片拼接而来，色调和噪点经过匹配，痕迹较浅"),
        "copy_move": ("{place}的内容与画面别处重复，判断为复制-移动",
                      "{place}区域由本图其他位置复制而来，纹理重复出现",
                      "{place}出现与另一处相同的图案，属于同图复制粘贴"),
        "erase": ("{place}区域纹理模糊、噪声消失，疑似有物体被擦除后修补填充",
                  "{place}的内容被移除，由周围像素填补，细节呈涂抹状",
                  "{place}缺少自然的传感器噪声，判断为擦除修补"),
        "remove": ("{place}的内容被移除，用画面中相似的纹理填补，属于内容识别填充",
                   "{place}由图中别处的小块纹理拼补而成，判断为移除后填充",
                   "{place}原有内容被去掉，填充的纹理在附近可以找到相同的小块"),
        "inpaint_diffusion": ("{place}的内容由生成模型重绘，噪声与周围的传感器噪声不同",
                              "{place}是扩散模型局部生成的内容，判断为生成式修补",
                              "{place}区域由生成式编辑填入，细节不是相机拍摄所得"),
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
        "splice.blended": ("content of the {place} is from another photo, its border was blended seamlessly: a splice",
                           "the {place} was spliced from another photo and blended in the gradient domain"),
        "splice.matched": ("content of the {place} is from another photo, its colour and noise were fitted: a splice",
                           "the {place} was spliced from another photo, tone and grain matched to the surroundings"),
        "copy_move": ("the {place} repeats content from elsewhere in the picture: copy-move",
                      "the {place} was copied from another part of this image, its texture appears twice",
                      "the same pattern appears in the {place} and elsewhere, a copy within the image"),
        "erase": ("texture in the {place} is smeared and noise is gone: something was erased and filled in",
                  "content was removed from the {place} and filled from the surrounding pixels",
                  "the {place} lacks natural sensor noise, which points to inpainting"),
        "remove": ("content of the {place} was removed and filled with texture of the picture: content-aware fill",
                   "the {place} is patched together from small pieces of texture found elsewhere in the picture",
                   "what stood in the {place} was taken out, its filling repeats small patches from nearby"),
        "inpaint_diffusion": ("the {place} was repainted by a generative model, its noise is not that of the sensor",
                              "the {place} was made by a diffusion model: generative inpainting",
                              "a generative edit fills the {place}, its detail was not taken by a camera"),
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
_SIZES = {
    "zh": ("面积较小", "面积中等", "面积较大"),
    "en": ("a small area", "an area of medium size", "a large area"),
}
_SHARE = {"zh": "{size}，约占画面{percent}%", "en": "{size}, about {percent}% of the picture"}
SENTENCES = {"zh": "。另外，", "en": ". Also, "}
"""Between the sentences about several edits of one picture."""
_SEMICOLON, _COMMA = {"zh": "；", "en": "; "}, {"zh": "，", "en": ", "}
_SEGMENT_SHAPES = ("segment", "superpixels", "felzenszwalb")
_SHAPES = {
    "zh": {
        "ellipse": "形状接近椭圆",
        "polygon": "边界为直线段",
        "text": "形状为文字行",
        **dict.fromkeys(_SEGMENT_SHAPES, "轮廓近似物体"),
    },
    "en": {
        "ellipse": "of elliptical shape",
        "polygon": "with straight edges",
        "text": "shaped like lines of text",
        **dict.fromkeys(_SEGMENT_SHAPES, "with an object-like outline"),
    },
}
_COPIED_FROM = {"zh": "内容来自画面{place}", "en": "copied from the {place}"}
_HARDNESS = {"zh": "；取证难易：{level}", "en": "; difficulty: {level}"}


def describe_region(mask: np.ndarray) -> dict[str, Any]:
    """Where a tampered region is and how large, as JSON values for the provenance.

    Args:
        mask: (H, W) bool of the finished image, at least one pixel.

    Returns:
        `place`: of the centre of the largest piece, a name of `PLACES`; `share`: of the image in (0, 1].
    """
    _, _, stats, centres = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    x, y = centres[1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())]
    return {"place": _place_name(x / mask.shape[1], y / mask.shape[0]), "share": round(float(mask.mean()), 4)}


def source_place(mask: np.ndarray, operation: dict[str, Any], canvas_hw: tuple[int, int]) -> str | None:
    """Where a copied piece came from, a name of `PLACES`; None where nothing was moved within the picture.

    Args:
        mask: (H, W) bool of the pasted region on the canvas.
        operation: its provenance; `shift_xy` is how far the piece was moved, in pixels of the canvas.
        canvas_hw: size of the picture at the operation.
    """
    if operation["name"] != "copy_move" or operation.get("mask_convention") != "target":
        return None
    rows, columns = np.nonzero(mask)
    x, y = columns.mean() - operation["shift_xy"][0], rows.mean() - operation["shift_xy"][1]
    return _place_name(x / canvas_hw[1], y / canvas_hw[0])


def _place_name(x: float, y: float) -> str:
    """Name of the field of a 3×3 grid that holds a point given in shares of width and height."""
    return PLACES[min(max(int(3 * y), 0), 2)][min(max(int(3 * x), 0), 2)]


def place_words(place: str, language: str) -> str:
    """A name of `PLACES` in a language: `upper left` / `左上`."""
    row = next(i for i, names in enumerate(PLACES) if place in names)
    return _PLACES[language][row][PLACES[row].index(place)]


def level_words(level: str, language: str) -> str:
    """A name of `LEVELS` in a language: `easy` / `易`."""
    return _LEVELS[language][LEVELS.index(level)]


def size_words(region: dict[str, Any], language: str) -> str:
    """How large a region is: in words below 5 %, below 15 % or above, and in per cent of the picture."""
    share = region["share"]
    size = _SIZES[language][0 if share < 0.05 else 1 if share < 0.15 else 2]
    return _SHARE[language].format(size=size, percent=max(1, round(100 * share)))


def difficulty(operation: dict[str, Any], degradations: list[dict[str, Any]]) -> str:
    """How hard the edit is to see, a name of `LEVELS`: from what the finished picture still shows of it, from its size
    and from what came after it."""
    points = sum(operation["visible_change"] < levels for levels in (20, 8, 4))
    points += operation["area"] < 0.06
    points += bool(operation.get("colour_match", 0) > 0.5 or operation.get("blend") == "poisson")
    points += operation["name"] in ("copy_move", "remove", "inpaint_diffusion")  # texture of the picture's own kind
    points += any(
        step["name"] in ("double_jpeg", "noise", "blur", "resize_back") or step.get("quality", 100) < 80
        for step in degradations
    )
    return LEVELS[0 if points <= 1 else 1 if points == 2 else 2]


def evidence_text(provenance: dict[str, Any], language: str, rng: np.random.Generator, detail: str = "short") -> str:
    """One sentence of evidence.

    Args:
        provenance: of one image, with `operation` (None when authentic), `region` and `difficulty`.
        language: `zh` or `en`.
        rng: chooses the phrasing.
        detail: `short`: what, where, how hard to see; `full`: also how large, and shape and origin where known.
    """
    finding = finding_text(provenance, language, rng)
    operation = provenance["operation"]
    if operation is None:
        return finding
    if detail == "full":
        finding += _SEMICOLON[language] + detail_text(provenance, language)
    return finding + _HARDNESS[language].format(level=level_words(provenance["difficulty"], language))


def finding_text(provenance: dict[str, Any], language: str, rng: np.random.Generator) -> str:
    """What was done and where, or that nothing was found; arguments as of `evidence_text`."""
    operation = provenance["operation"]
    choices = _FINDINGS[language]["authentic" if operation is None else _finding_key(operation)]
    place = "" if operation is None else place_words(provenance["region"]["place"], language)
    return choices[int(rng.integers(len(choices)))].format(place=place)


def detail_text(provenance: dict[str, Any], language: str) -> str:
    """Size, shape and origin of a tampered region as far as the provenance holds them, as a clause to append."""
    operation = provenance["operation"]
    parts = [size_words(provenance["region"], language), _SHAPES[language].get(operation.get("shape", ""), "")]
    return _COMMA[language].join(part for part in (*parts, origin_text(provenance, language)) if part)


def origin_text(provenance: dict[str, Any], language: str) -> str:
    """Where a copied piece came from, "" where nothing was copied within the picture or the provenance says not."""
    if "source_place" not in provenance["region"]:
        return ""
    return _COPIED_FROM[language].format(place=place_words(provenance["region"]["source_place"], language))


def _finding_key(operation: dict[str, Any]) -> str:
    name = str(operation["name"])
    if name == "retouch":
        return f"retouch.{operation['kind']}"
    if name == "splice" and operation.get("donor_match"):
        return "splice.matched"
    if name == "splice" and operation.get("blend") == "poisson":
        return "splice.blended"
    return name


def answer_polygons(mask: np.ndarray, max_points: int) -> list[IntPolygon]:
    """Outlines of a mask, simplified until all of them together have at most `max_points` points.

    Pieces and holes under 0.2 % of the image are left out, unless that leaves nothing. `masks.rasterize_polygons` gives
    the mask back but for the simplification and for rounding to whole pixels.

    Args:
        mask: (H, W) bool.
        max_points: >= 4.
    """
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    # Only the piece around the region is traced, which is several times faster; the rim keeps bays open to the outside.
    piece = np.pad(mask[top : top + height, left : left + width], 1)
    outlines = polygons_from_mask(piece, max_points, max(16.0, 0.002 * mask.size))
    outlines = outlines or polygons_from_mask(piece, max_points, 0)
    placed = [tuple((x + left - 1, y + top - 1) for x, y in points) for points in outlines]
    size_hw = (mask.shape[0], mask.shape[1])
    whole = PolygonFrame("absolute", size_hw, size_hw).write(placed)
    return [[[int(x), int(y)] for x, y in points] for points in whole]


def phrases(language: str) -> list[str]:
    """Every sentence that short evidence can hold, with each place and level: text a tokenizer can be trained on."""
    places = [place for row in _PLACES[language] for place in row]
    sentences = [s.format(place=place) for choices in _FINDINGS[language].values() for s in choices for place in places]
    return sentences + [_HARDNESS[language].format(level=level) for level in _LEVELS[language]]
