"""Pictures of a prediction: mask overlay, heat map, side-by-side panel, mask files. No model, no HTML, no torch.

Images are RGB uint8 (H, W, 3); masks are (H, W) scores in [0, 1] or bool in the image's own frame. A pixel counts as
marked where `score >= threshold`. Built-in labels are ASCII: a machine without a CJK font would draw boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

UInt8 = NDArray[np.uint8]
Color = tuple[int, int, int]

PREDICTED_COLOR: Color = (255, 64, 48)
TRUE_COLOR: Color = (0, 229, 255)

_SOFTWARE = "qwen-forensics"
_CJK_FONT_NAMES = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.ttf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "Arial Unicode.ttf",
)


def overlay_mask(
    image_rgb: UInt8,
    mask_scores: NDArray[np.generic],
    color: Color = PREDICTED_COLOR,
    alpha: float = 0.45,
    threshold: float = 0.5,
    draw_contour: bool = True,
) -> UInt8:
    """Tint the marked pixels and outline them.

    Args:
        image_rgb: (H, W, 3) uint8.
        mask_scores: (H, W) float in [0, 1] or bool.
        color: RGB of the tint.
        alpha: opacity of the tint in [0, 1].
        threshold: a pixel is marked where its score is at least this.
        draw_contour: outline each region (and hole) with `draw_outline`.

    Returns:
        (H, W, 3) uint8, a new array.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    image = _check_image(image_rgb)
    marked = binarize(_check_mask(mask_scores, image), threshold)  # (H, W)
    shown = image.copy()
    tint = np.asarray(color, dtype=np.float32)
    blended = image[marked].astype(np.float32) * (1.0 - alpha) + tint * alpha  # (K, 3)
    shown[marked] = np.clip(np.rint(blended), 0, 255).astype(np.uint8)
    return draw_outline(shown, marked, color) if draw_contour else shown


def draw_outline(image_rgb: UInt8, marked: NDArray[np.bool_], color: Color, width: int | None = None) -> UInt8:
    """Outline the regions of a bool mask (H, W) in `color` between two thin dark lines, so it shows on bright and dark.

    The time does not depend on the number of regions. A region cut off by the image's border is open there.

    Args:
        width: width of the coloured line in pixels, even; by default 2 per 400 of the longer side, at least 2.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    shown = _check_image(image_rgb).copy()
    radius = max(1, round(max(marked.shape) / 400) if width is None else width // 2)
    shown[_edge_band(marked, radius + max(1, radius // 2))] = 0
    shown[_edge_band(marked, radius)] = color
    return shown


def _edge_band(marked: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Pixels within `radius` of the edge of the regions, on either side: (H, W) bool."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    mask = marked.astype(np.uint8)
    return np.asarray(cv2.dilate(mask, kernel) != cv2.erode(mask, kernel))


def heat_map(scores: NDArray[np.generic]) -> UInt8:
    """Colour scores with the perceptually uniform `inferno` map over the fixed range 0 (black) to 1 (pale yellow).

    The range is never stretched to the image's own, so that two heat maps can be compared; values outside are clipped
    and NaN is drawn grey.

    Args:
        scores: (H, W) float in [0, 1] or bool.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    values = np.asarray(scores, dtype=np.float32)  # (H, W)
    if values.ndim != 2:
        raise ValueError(f"scores of shape {values.shape}, expected (H, W)")
    missing = np.isnan(values)
    levels = np.rint(np.clip(np.where(missing, 0.0, values), 0.0, 1.0) * 255).astype(np.uint8)
    colored = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)  # (H, W, 3)
    colored[missing] = 128
    return np.asarray(colored, dtype=np.uint8)


def mask_picture(marked: NDArray[np.generic]) -> UInt8:
    """White-on-black (H, W) uint8 picture of a mask that is bool, 0/1 or scores (marked from 0.5 on)."""
    return np.where(binarize(marked, 0.5), np.uint8(255), np.uint8(0))


def binarize(mask_scores: NDArray[np.generic], threshold: float = 0.5) -> NDArray[np.bool_]:
    """Marked pixels: a bool mask as it is, any other where `score >= threshold`; NaN is not marked."""
    mask = np.asarray(mask_scores)
    return mask if mask.dtype == np.bool_ else np.asarray(mask >= threshold)


def evidence_overlay(
    image_rgb: UInt8,
    true_mask: NDArray[np.generic] | None,
    mask_scores: NDArray[np.generic],
    threshold: float = 0.5,
) -> UInt8:
    """`overlay_mask` of the prediction in red with the outline of the true mask, if there is one, in cyan above it."""
    shown = overlay_mask(image_rgb, mask_scores, threshold=threshold)
    if true_mask is None:
        return shown
    return draw_outline(shown, binarize(_check_mask(true_mask, shown)), TRUE_COLOR)


@dataclass(frozen=True)
class EvidenceTiles:
    """The four pictures of one prediction, all at the same display size (h, w).

    Args:
        image: (h, w, 3) uint8 RGB.
        true_mask: (h, w) uint8, 0 or 255, or None where it is unknown.
        heat: (h, w, 3) uint8 RGB, `heat_map` of the scores.
        overlay: (h, w, 3) uint8 RGB, `evidence_overlay`.
    """

    image: UInt8
    true_mask: UInt8 | None
    heat: UInt8
    overlay: UInt8


def evidence_tiles(
    image: UInt8 | Image.Image,
    true_mask: NDArray[np.generic] | None,
    mask_scores: NDArray[np.generic],
    *,
    threshold: float = 0.5,
    side: int = 320,
) -> EvidenceTiles:
    """Scale image and masks so that the longer side is `side`, then tint and outline: lines are crisp at display size.

    Args:
        image: RGB, (H, W, 3) uint8 or PIL.
        true_mask: (H, W) bool or 0/1, or None.
        mask_scores: (H, W) in [0, 1].
    """
    rgb = to_rgb_array(image)
    scores = _check_mask(mask_scores, rgb).astype(np.float32)
    scale = side / max(rgb.shape[:2])
    size_wh = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    small = np.asarray(Image.fromarray(rgb).resize(size_wh, Image.Resampling.LANCZOS))  # (h, w, 3)
    small_scores = cv2.resize(scores, size_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    truth = None
    if true_mask is not None:
        marked = binarize(_check_mask(true_mask, rgb)).astype(np.uint8)
        truth = cv2.resize(marked, size_wh, interpolation=cv2.INTER_NEAREST).astype(bool)  # (h, w)
    return EvidenceTiles(
        image=small,
        true_mask=None if truth is None else mask_picture(truth),
        heat=heat_map(small_scores),
        overlay=evidence_overlay(small, truth, small_scores, threshold),
    )


def comparison_panel(
    image: UInt8 | Image.Image,
    true_mask: NDArray[np.generic] | None,
    mask_scores: NDArray[np.generic],
    title: str = "",
    *,
    threshold: float = 0.5,
    tile_side: int = 320,
    font_path: str | None = None,
) -> Image.Image:
    """One picture: image | true mask | predicted heat map with its colour bar | overlay, each labelled.

    Args:
        image: RGB, (H, W, 3) uint8 or PIL.
        true_mask: (H, W) bool or 0/1, or None where it is unknown (a hatched tile says so).
        mask_scores: (H, W) in [0, 1].
        title: one line above; characters that no font found can draw are left out.
        threshold: of the overlay.
        tile_side: longer side of one tile in pixels; small images are enlarged without smoothing of the masks.
        font_path: TrueType file to use instead of the first CJK font found.

    Returns:
        PIL RGB image.
    """
    shown = evidence_tiles(image, true_mask, mask_scores, threshold=threshold, side=tile_side)
    size_wh = (shown.image.shape[1], shown.image.shape[0])
    truth = _unknown_tile(size_wh) if shown.true_mask is None else Image.fromarray(shown.true_mask)
    overlay_label = f"predicted >= {threshold:g}" + ("" if shown.true_mask is None else " (red), true (cyan)")
    tiles = (
        ("image", Image.fromarray(shown.image)),
        ("true mask", truth),
        (_HEAT_LABEL, Image.fromarray(shown.heat)),
        (overlay_label, Image.fromarray(shown.overlay)),
    )
    return _lay_out(tiles, size_wh, title, font_path)


def save_mask_png(mask_scores: NDArray[np.generic], path: str | Path, threshold: float | None = None) -> None:
    """Write a mask as one-channel 8-bit PNG and make its folder: scores as round(255·score), or 0/255 with a threshold.

    Args:
        mask_scores: (H, W) float in [0, 1] or bool.
        path: file to write.
        threshold: None keeps the scores; a number marks `score >= threshold` with 255.
    """
    mask = np.asarray(mask_scores)
    if mask.ndim != 2:
        raise ValueError(f"mask of shape {mask.shape}, expected (H, W)")
    if threshold is None and mask.dtype != np.bool_:
        finite = np.nan_to_num(mask.astype(np.float32), nan=0.0)
        levels = np.rint(np.clip(finite, 0.0, 1.0) * 255).astype(np.uint8)
    else:
        levels = np.where(binarize(mask, 0.5 if threshold is None else threshold), np.uint8(255), np.uint8(0))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path, format="PNG", optimize=True, pnginfo=png_mark())


def png_mark() -> PngInfo:
    """What the PNG files of predictions carry (their `Software` text), so that they are known again."""
    mark = PngInfo()
    mark.add_text("Software", _SOFTWARE)
    return mark


def is_marked(path: str | Path) -> bool:
    """Whether a file is a picture that carries `png_mark`."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return False


def to_rgb_array(image: UInt8 | Image.Image) -> UInt8:
    """(H, W, 3) uint8 of a PIL image of any mode or of an array that already is one."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    return _check_image(image)


# --- fonts ---


@lru_cache(maxsize=4)
def find_cjk_font(font_path: str | None = None) -> str | None:
    """File of a font with Chinese glyphs: `font_path` if it opens, else the first known one installed, else None."""
    for name in (font_path, *_CJK_FONT_NAMES):
        if name is None:
            continue
        try:
            found = ImageFont.truetype(name, 12).path  # Pillow searches the system's font folders by file name
        except OSError:
            continue
        return str(found)
    return None


def drawable_text(text: str, font_path: str | None = None) -> str:
    """`text` as it can be drawn without placeholder boxes: whole with a CJK font, its ASCII part without one."""
    line = " ".join(text.split())
    if line.isascii() or find_cjk_font(font_path):
        return line
    return " ".join("".join(char if char.isascii() else " " for char in line).split())


def font_for(text: str, size: int, font_path: str | None = None) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that can draw `drawable_text` of a line."""
    path = None if text.isascii() and font_path is None else find_cjk_font(font_path)
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


# --- layout of the panel ---

_MARGIN, _GAP, _LABEL_HEIGHT, _TITLE_HEIGHT, _BAR_HEIGHT = 12, 8, 22, 28, 8
_INK: Color = (32, 36, 44)
_HEAT_LABEL = "predicted score"


def _lay_out(
    tiles: tuple[tuple[str, Image.Image], ...], size_wh: tuple[int, int], title: str, font_path: str | None
) -> Image.Image:
    width, height = size_wh
    line = drawable_text(title, font_path)
    top = _MARGIN + (_TITLE_HEIGHT if line else 0)
    column = max(width, 120)
    panel_width = 2 * _MARGIN + len(tiles) * column + (len(tiles) - 1) * _GAP
    panel = Image.new("RGB", (panel_width, top + _LABEL_HEIGHT + height + _BAR_HEIGHT + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(panel)
    if line:
        font = font_for(line, 16, font_path)
        draw.text((_MARGIN, _MARGIN), _shorten_to(draw, line, font, panel_width - 2 * _MARGIN), fill=_INK, font=font)
    for index, (label, tile) in enumerate(tiles):
        left = _MARGIN + index * (column + _GAP) + (column - width) // 2
        font = font_for(label, 13)
        draw.text((left, top), _shorten_to(draw, label, font, column), fill=_INK, font=font)
        panel.paste(tile.convert("RGB"), (left, top + _LABEL_HEIGHT))
        if label == _HEAT_LABEL:
            bar = heat_map(np.tile(np.linspace(0, 1, width, dtype=np.float32), (_BAR_HEIGHT, 1)))
            panel.paste(Image.fromarray(bar), (left, top + _LABEL_HEIGHT + height + 4))
            _mark_bar_ends(draw, left, top + _LABEL_HEIGHT + height + 4 + _BAR_HEIGHT, width)
    return panel


def _mark_bar_ends(draw: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    font = font_for("0", 10)
    draw.text((left, top), "0", fill=_INK, font=font)
    draw.text((left + width - draw.textlength("1", font=font), top), "1", fill=_INK, font=font)


def _shorten_to(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _unknown_tile(size_wh: tuple[int, int]) -> Image.Image:
    """Diagonal hatching: a mask that is not known must not look like an empty one."""
    x, y = np.meshgrid(np.arange(size_wh[0]), np.arange(size_wh[1]))
    return Image.fromarray(np.where((x + y) % 16 < 2, np.uint8(170), np.uint8(225)))


def _check_image(image: UInt8) -> UInt8:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image of shape {image.shape} and dtype {image.dtype}, expected (H, W, 3) uint8")
    return image


def _check_mask(mask: NDArray[np.generic], image: UInt8) -> NDArray[np.generic]:
    array = np.asarray(mask)
    if array.shape != image.shape[:2]:
        raise ValueError(f"mask of shape {array.shape} for an image of {image.shape[:2]}; resize the mask first")
    return array
