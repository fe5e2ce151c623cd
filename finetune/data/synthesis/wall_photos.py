"""Procedural photographs of walls with one defect each and a table of their inspection reports, for trying part D out.

Kind and severity of the defect can be seen (a crack's length and width, a stain's area); the words of the report follow
from them. Not photographs: no claim about real buildings is meant. Same seed, same bytes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.errors import ConfigError

HEADER = ("image_id", "image_path", "data_风险", "data_纠正和预防建议", "data_风险等级", "data_缺陷描述")
LEVELS = ("轻微", "中等", "严重")
SIDE = 168
"""Pixels of width and height: 36 image tokens."""

Picture = NDArray[np.float32]
"""(H, W, 3) RGB in 0..255."""


@dataclass(frozen=True)
class _Defect:
    """A kind of defect: how it is drawn, and its words.

    Args:
        draw: changes a picture; its second argument is the level 0..2.
        risk, name: of the report.
        advice: one per level.
    """

    draw: Callable[[Picture, int, np.random.Generator], None]
    risk: str
    name: str
    advice: tuple[str, str, str]


def write_wall_reports(out_dir: str | Path, num: int, seed: int = 0, *, overwrite: bool = False) -> Path:
    """Write `table.csv` (UTF-8, the default columns) and `images/`; kinds and levels occur equally often.

    Returns:
        The table.

    Raises:
        ConfigError: a table is there already.
    """
    folder = Path(out_dir)
    table = folder / "table.csv"
    if table.exists() and not overwrite:
        raise ConfigError(f"{table} is there already; give another folder, or --overwrite")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num):
        generator = np.random.default_rng([seed, index])
        case = index % (len(_DEFECTS) * len(LEVELS))
        kind, level = list(_DEFECTS)[case % len(_DEFECTS)], case // len(_DEFECTS)
        name = f"images/{index:04d}.jpg"
        draw_wall(kind, level, generator).save(folder / name, quality=92)
        defect, place = _DEFECTS[kind], str(generator.choice(_PLACES))
        rows.append((index, name, defect.risk, defect.advice[level], LEVELS[level], f"{place}墙面{defect.name}"))
    with table.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([HEADER, *rows])
    return table


def draw_wall(kind: str, level: int, generator: np.random.Generator) -> Image.Image:
    """One picture, `SIDE` pixels a side, with a defect of `DEFECT_KINDS` and level 0, 1 or 2."""
    picture = _wall(generator)
    _DEFECTS[kind].draw(picture, level, generator)
    picture += generator.normal(0, 2.5, picture.shape).astype(np.float32)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _wall(generator: np.random.Generator) -> Picture:
    """Paint of some light colour, lit from one side, with plaster's unevenness."""
    base = generator.uniform(185, 235) + generator.uniform(-14, 14, 3)
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    angle = generator.uniform(0, 2 * np.pi)
    light = 22 * (rows * np.sin(angle) + columns * np.cos(angle))
    rough = cv2.GaussianBlur(generator.normal(0, 30, (SIDE, SIDE)), (0, 0), 3)
    return (base + (light + rough)[..., None]).astype(np.float32)


def _crack(picture: Picture, level: int, generator: np.random.Generator) -> None:
    """Dark jagged lines: more and wider ones the more severe."""
    for _ in range((1, 2, 4)[level]):
        steps = 14
        angle = generator.uniform(0, 2 * np.pi)
        turns = angle + np.cumsum(generator.normal(0, 0.35, steps))
        length = (70, 120, 150)[level] / steps
        points = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * length, axis=0)
        points += generator.uniform(0.25, 0.75, 2) * SIDE - points.mean(axis=0)
        line = np.zeros((SIDE, SIDE), np.uint8)
        cv2.polylines(line, [np.round(points).astype(np.int32)], False, 255, (2, 3, 5)[level], cv2.LINE_AA)
        picture *= 1 - 0.75 * (line.astype(np.float32) / 255)[..., None]


def _stain(color: tuple[int, int, int], strength: float, spots: bool) -> Callable[..., None]:
    """A soft stain (seepage), or a cloud of spots (mould), of an area that grows with the level."""

    def draw(picture: Picture, level: int, generator: np.random.Generator) -> None:
        where = _blob((0.16, 0.28, 0.42)[level], generator)
        if spots:
            noise = cv2.GaussianBlur(generator.normal(0, 1, (SIDE, SIDE)), (0, 0), 2.2)
            where = where * (noise > 0.02)
        soft = cv2.GaussianBlur(where.astype(np.float32), (0, 0), 1.0 if spots else 4.0)[..., None] * strength
        picture *= 1 - soft
        picture += soft * np.array(color, np.float32)

    return draw


def _spall(picture: Picture, level: int, generator: np.random.Generator) -> None:
    """Plaster that has come off: brick with joints behind a shaded edge."""
    where = _blob((0.15, 0.26, 0.4)[level], generator)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    course = rows // 16
    is_joint = (rows % 16 < 3) | ((columns + 20 * (course % 2)) % 40 < 3)
    brick = np.where(is_joint[..., None], (150, 146, 138), (150, 78, 58)) + generator.normal(0, 7, (SIDE, SIDE, 1))
    edge = cv2.dilate(where, np.ones((5, 5), np.uint8)) - where
    picture[where > 0] = brick[where > 0]
    picture[edge > 0] *= 0.6


def _blob(radius: float, generator: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W) 0/1: a round patch with an uneven edge, its mean radius a share of the side."""
    center = generator.uniform(0.4, 0.6, 2) * SIDE
    rows, columns = np.mgrid[:SIDE, :SIDE]
    angles = np.arctan2(rows - center[0], columns - center[1])
    edge = np.ones_like(angles)
    for order in (2, 3, 5):
        edge += generator.uniform(0.05, 0.14) * np.sin(order * angles + generator.uniform(0, 2 * np.pi))
    distance = np.hypot(rows - center[0], columns - center[1])
    return (distance < radius * SIDE * edge).astype(np.uint8)


_PLACES = ("厨房", "卫生间", "客厅", "阳台")
_DEFECTS = {
    "crack": _Defect(
        _crack,
        "墙体开裂会继续发展并引起渗漏",
        "开裂",
        ("建议用腻子修补并观察", "建议开槽灌浆并贴网格布", "建议请结构工程师检测后加固"),
    ),
    "seepage": _Defect(
        _stain((166, 128, 78), 0.7, spots=False),
        "渗水会使涂料起皮并造成墙体潮湿",
        "渗水",
        ("建议晾干后补刷涂料", "建议查找水源并重做局部防水", "建议铲除面层并整体重做防水"),
    ),
    "mould": _Defect(
        _stain((38, 58, 44), 0.85, spots=True),
        "发霉会影响室内空气和人体健康",
        "发霉",
        ("建议清洗后加强通风", "建议铲除霉层并涂刷防霉涂料", "建议拆除受潮面层并重做防潮"),
    ),
    "spall": _Defect(
        _spall,
        "抹灰脱落会砸伤行人并暴露墙体",
        "脱落",
        ("建议局部修补抹灰", "建议清除空鼓后挂网抹灰", "建议立即围挡并整面重做抹灰"),
    ),
}
DEFECT_KINDS = tuple(_DEFECTS)
"""What `draw_wall` draws."""
