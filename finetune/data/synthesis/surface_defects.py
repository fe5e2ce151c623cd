"""Procedural surfaces with cracks, seepage and spalls, and their label files, for trying part C out.

Several defects may lie on one picture; the label is the box around what was drawn. Normal pictures, and the rest of
abnormal ones, hold harmless marks (a joint, a soft shadow), so that not every mark is a defect. Not photographs: no
claim about real surfaces is meant. Same seed, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.errors import ConfigError

Picture = NDArray[np.float32]
"""(H, W, 3) RGB in 0..255."""
Cover = NDArray[np.float32]
"""(H, W) in 0..1: where a defect lies."""

_SPELLINGS = ("{name} ; {coords} ; {kind}", "{name}；{coords}；{kind}", "{name};{coords};{kind}")
_JOINS = (", ", "；", "，", " ", ";")
_MAX_TRIES = 30


def write_surface_samples(
    out_dir: str | Path, scenes: int, per_scene: int, side: int = 168, seed: int = 0, *, overwrite: bool = False
) -> tuple[int, int, int]:
    """Write `abnormal/SCENE/*.jpg` with a `.txt` each, and `normal/SCENE/*.jpg`; one surface per scene.

    Returns:
        Abnormal images, labelled boxes, normal images.

    Raises:
        ConfigError: there is such a folder already, or `side` is below 96.
    """
    folder = Path(out_dir)
    if side < 96:
        raise ConfigError(f"side is {side}; expected at least 96 pixels")
    if not overwrite and any((folder / kind).exists() for kind in ("abnormal", "normal")):
        raise ConfigError(f"{folder} holds samples already; give another folder, or --overwrite")
    num_boxes = 0
    for scene in range(scenes):
        style = np.random.default_rng([seed, scene])
        look = (style.uniform(120, 225) + style.uniform(-16, 16, 3), style.uniform(1.2, 4.0), style.uniform(10, 34))
        for kind in ("abnormal", "normal"):
            target = folder / kind / f"scene_{scene:02d}"
            target.mkdir(parents=True, exist_ok=True)
            for index in range(per_scene):
                rng = np.random.default_rng([seed, scene, index, kind == "abnormal"])
                picture = _surface(side, look, rng)
                boxes = _add_defects(picture, rng) if kind == "abnormal" else []
                _add_marks(picture, boxes, rng)
                picture += rng.normal(0, 2.0, picture.shape).astype(np.float32)
                image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
                image.save(target / f"{index:02d}.jpg", quality=85)
                if boxes:
                    (target / f"{index:02d}.txt").write_text(_lines(f"{index:02d}.jpg", boxes, rng), encoding="utf-8")
                num_boxes += len(boxes)
    return scenes * per_scene, num_boxes, scenes * per_scene


def _surface(side: int, look: tuple[np.ndarray, float, float], rng: np.random.Generator) -> Picture:
    """Concrete or plaster: a base colour, light from one side, grain of one coarseness."""
    base, coarse, strength = look
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    light = 20 * (rows * np.sin(angle) + columns * np.cos(angle))
    grain = cv2.GaussianBlur(rng.normal(0, 1, (side, side)), (0, 0), coarse)
    grain *= strength / 4 / grain.std()
    return (base + (light + grain)[..., None]).astype(np.float32)


def _add_defects(picture: Picture, rng: np.random.Generator) -> list[tuple[str, tuple[int, int, int, int]]]:
    """One to three defects that do not touch; their type and box."""
    side = len(picture)
    found: list[tuple[str, tuple[int, int, int, int]]] = []
    wanted = int(rng.integers(1, 4))
    for _ in range(_MAX_TRIES):
        if len(found) == wanted:
            break
        kind = str(rng.choice(list(_DEFECTS)))
        make_cover, paint = _DEFECTS[kind]
        size = side * rng.uniform(0.16, 0.36)
        center = rng.uniform(size * 0.6, side - size * 0.6, 2)
        cover = make_cover(side, center, size, rng)
        box = _box(cover)
        if box is None or any(_touch(box, other) for _, other in found):
            continue
        paint(picture, cover, rng)
        found.append((kind, box))
    return found


def _add_marks(picture: Picture, boxes: list[tuple[str, tuple[int, int, int, int]]], rng: np.random.Generator) -> None:
    """Up to two harmless marks away from the defects: a straight joint, or a soft shadow."""
    side = len(picture)
    for _ in range(int(rng.integers(0, 3))):
        size = side * rng.uniform(0.15, 0.35)
        x, y = rng.uniform(size * 0.6, side - size * 0.6, 2)
        box = (int(x - size / 2), int(y - size / 2), int(x + size / 2), int(y + size / 2))
        if any(_touch(box, other) for _, other in boxes):
            continue
        if rng.random() < 0.5:
            line = np.zeros((side, side), np.uint8)
            cv2.line(line, (box[0], round(y)), (box[2], round(y)), 255, 2, cv2.LINE_AA)
            picture *= 1 + 0.12 * (line.astype(np.float32) / 255)[..., None]
        else:
            cover = cv2.GaussianBlur(_blob(side, np.array([x, y]), size * 0.7, rng), (0, 0), size / 8)
            picture *= 1 - 0.1 * cover[..., None]


def _crack_cover(side: int, center: np.ndarray, size: float, rng: np.random.Generator) -> Cover:
    steps = 12
    turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.4, steps))
    points = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1), axis=0)
    points = (points - points.mean(axis=0)) * size / np.ptp(points, axis=0).max() + center
    line = np.zeros((side, side), np.uint8)
    cv2.polylines(line, [np.round(points).astype(np.int32)], False, 255, int(rng.integers(1, 4)), cv2.LINE_AA)
    return np.asarray(line / 255, np.float32)


def _paint_crack(picture: Picture, cover: Cover, rng: np.random.Generator) -> None:
    picture *= 1 - rng.uniform(0.6, 0.8) * cover[..., None]


def _blob(side: int, center: np.ndarray, size: float, rng: np.random.Generator) -> Cover:
    """A round patch with an uneven edge, about `size` wide; `center` is x, y."""
    rows, columns = np.mgrid[:side, :side]
    angles = np.arctan2(rows - center[1], columns - center[0])
    edge = np.ones_like(angles)
    for order in (2, 3, 5):
        edge += rng.uniform(0.05, 0.14) * np.sin(order * angles + rng.uniform(0, 2 * np.pi))
    return (np.hypot(rows - center[1], columns - center[0]) < size / 2.3 * edge).astype(np.float32)


def _paint_seepage(picture: Picture, cover: Cover, rng: np.random.Generator) -> None:
    soft = cv2.GaussianBlur(cover, (0, 0), 2.5)[..., None] * rng.uniform(0.45, 0.65)
    picture *= 1 - soft
    picture += soft * np.array((112, 84, 52), np.float32)


def _paint_spall(picture: Picture, cover: Cover, rng: np.random.Generator) -> None:
    rough = cv2.GaussianBlur(rng.normal(0, 40, cover.shape), (0, 0), 0.8)
    inside = np.array((150, 96, 76)) + rough[..., None]
    edge = cv2.dilate(cover, np.ones((3, 3), np.uint8)) - cover
    picture[cover > 0] = inside[cover > 0]
    picture[edge > 0] *= 0.55


_DEFECTS: dict[str, tuple[Callable[..., Cover], Callable[..., None]]] = {
    "裂缝": (_crack_cover, _paint_crack),
    "渗水": (_blob, _paint_seepage),
    "剥落": (_blob, _paint_spall),
}
DEFECT_TYPES = tuple(_DEFECTS)
"""Crack, seepage, spall: what `write_surface_samples` labels."""


def _box(cover: Cover) -> tuple[int, int, int, int] | None:
    """x1, y1, x2, y2 around a cover, two pixels wider on each side; at least 12 pixels a side."""
    rows, columns = np.nonzero(cover > 0.2)
    if not len(rows):
        return None
    limit = len(cover)
    box = []
    for values in (columns, rows):
        low, high = int(values.min()) - 2, int(values.max()) + 3
        spare = max(12 - (high - low), 0)
        box.append((max(low - spare // 2, 0), min(high + (spare + 1) // 2, limit)))
    return (box[0][0], box[1][0], box[0][1], box[1][1])


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return min(a[2], b[2]) + 4 > max(a[0], b[0]) and min(a[3], b[3]) + 4 > max(a[1], b[1])


def _lines(name: str, boxes: list[tuple[str, tuple[int, int, int, int]]], rng: np.random.Generator) -> str:
    """Label lines in the spellings that people use; boxes of one type share a line."""
    lines = []
    for kind in dict.fromkeys(kind for kind, _ in boxes):
        join = str(rng.choice(_JOINS))
        coords = "  ".join(join.join(map(str, box)) for each, box in boxes if each == kind)
        lines.append(str(rng.choice(_SPELLINGS)).format(name=name, coords=coords, kind=kind))
    return "\n".join(lines) + "\n"
