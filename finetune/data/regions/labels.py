"""Label files of region data: `filename ; coords ; defect_type` per line, to boxes in pixels of the original image.

Full-width punctuation and digits count as ASCII; the coordinates may hold the column separator too, and several boxes.
A problem names file, line, column and value; nothing is repaired but what lies outside the image, which is cut off and
reported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.readers.table import text_encoding
from finetune.data.regions.settings import WIDE_TO_ASCII, RegionsConfig
from finetune.errors import DataFormatError

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the upright original image, half-open."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_CORNERS, _CENTRE = ("x1", "y1", "x2", "y2"), ("cx", "cy", "w", "h")


@dataclass(frozen=True)
class LabelledBox:
    """One box of a label file.

    Args:
        box_xyxy: its corners.
        defect_type: third column as written, stripped.
        source: `file:line`.
    """

    box_xyxy: Box
    defect_type: str
    source: str


@dataclass
class Labels:
    """What one file, or one line, holds.

    Args:
        boxes: usable ones, in the order of the file.
        problems: why a line cannot be used; with any of these the image's labels are not complete.
        notes: what was changed or left out: boxes cut at the image's edge, too small, or written twice.
        too_small: boxes that were left out; a defect is there all the same.
        num_lines: lines that are not blank.
    """

    boxes: list[LabelledBox] = field(default_factory=list)
    problems: list[DataFormatError] = field(default_factory=list)
    notes: list[DataFormatError] = field(default_factory=list)
    too_small: list[Box] = field(default_factory=list)
    num_lines: int = 0


def read_labels(path: Path, size_hw: tuple[int, int], config: RegionsConfig, name: str | None = None) -> Labels:
    """The boxes of one image.

    Args:
        path: its `.txt`; UTF-8 with or without BOM, GBK and UTF-16 with BOM are recognised.
        size_hw: (H, W) of the upright image.
        name: how messages call the file (default: its name).

    Raises:
        DataFormatError: the file cannot be read, or has no line.
    """
    name = name or path.name
    lines = path.read_text(encoding=text_encoding(path)).split("\n")
    found = Labels()
    for number, line in enumerate(lines, 1):
        if line.strip().strip("\ufeff"):
            found.num_lines += 1
            _add(found, parse_line(line.strip("\ufeff"), f"{name}:{number}", config, path.stem), size_hw, config)
    if not found.num_lines:
        raise DataFormatError(
            "label file without a line",
            source=name,
            expected="filename ; coords ; defect_type",
            fix="label the image, or move it to normal_dir",
        )
    return found


def parse_line(line: str, source: str, config: RegionsConfig, stem: str | None = None) -> Labels:
    """The boxes of one line as they are written, neither cut nor filtered.

    Args:
        stem: name of the image without its ending; a line about another image is a problem.
    """
    found = Labels(num_lines=1)
    columns = _columns(line, config)
    if len(columns) < 3:
        problem = DataFormatError(
            f"line of {len(columns)} columns",
            source=source,
            found=line.strip(),
            expected=f"filename {config.column_delim[0]} coords {config.column_delim[0]} defect_type",
            fix="complete the line, or set column_delim",
        )
        return Labels(problems=[problem], num_lines=1)
    filename, coords, kind = columns
    if stem is not None and not _names(filename, stem):
        found.problems.append(
            DataFormatError(
                "line about another image", source=source, field="filename", found=filename, expected=f"{stem}.*"
            )
        )
    if not kind:
        found.problems.append(
            DataFormatError("no defect type", source=source, field="defect_type", found=line.strip(), fix="write one")
        )
    numbers, bad = _numbers(coords, config)
    if bad:
        found.problems.append(
            DataFormatError("not a number", source=source, field="coords", found=bad[0], expected="a pixel coordinate")
        )
    elif not numbers or len(numbers) % 4:
        found.problems.append(
            DataFormatError(
                f"{len(numbers)} numbers make no boxes",
                source=source,
                field="coords",
                found=coords,
                expected=f"four for each box: {', '.join(_CORNERS if config.coords_are_xyxy else _CENTRE)}",
                fix="correct the line; its third column, the defect type, must be there too",
            )
        )
    else:
        for start in range(0, len(numbers), 4):
            _add_box(found, numbers[start : start + 4], kind, source, config)
    if not kind:
        found.boxes = []  # checked, but no type to count them under
    return found


def _columns(line: str, config: RegionsConfig) -> list[str]:
    """Filename, coordinates, type of a line, as written and stripped; fewer where the line has fewer columns.

    The first separator ends the filename. Coordinates go on to the last column that holds numbers only, but never take
    the line's last column: that is, or belongs to, the type.
    """
    plain = line.translate(WIDE_TO_ASCII)
    cuts = [index for index, character in enumerate(plain) if character in config.column_delims]
    starts, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(plain)]
    while len(starts) > 3 and not plain[starts[-1] :].strip() and _has_letters(plain[starts[-2] : ends[-2]]):
        starts, ends = starts[:-1], ends[:-1]  # a separator that closes the line
    if len(starts) < 3:
        return [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
    numeric = [
        index
        for index in range(1, len(starts) - 1)
        if (each := _numbers(plain[starts[index] : ends[index]], config))[0] and not each[1]
    ]
    last = numeric[-1] if numeric else 1
    return [line[: ends[0]].strip(), line[starts[1] : ends[last]].strip(), line[starts[last + 1] : ends[-1]].strip()]


def _has_letters(text: str) -> bool:
    return any(character.isalpha() for character in text)


def _numbers(text: str, config: RegionsConfig) -> tuple[list[float], list[str]]:
    """The numbers of a column, and the pieces of it that are none."""
    delims = re.escape(config.inner_delims + config.column_delims)
    pieces = [piece for piece in re.split(f"[{delims}\\s]+", text.translate(WIDE_TO_ASCII)) if piece]
    bad = [piece for piece in pieces if not _NUMBER.fullmatch(piece)]
    return ([] if bad else [float(piece) for piece in pieces]), bad


def _names(filename: str, stem: str) -> bool:
    """Whether the first column is the image's name, with or without folder and ending."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return name == stem or name.rpartition(".")[0] == stem


def _add_box(found: Labels, numbers: Sequence[float], kind: str, source: str, config: RegionsConfig) -> None:
    x1, y1, x2, y2 = numbers
    if not config.coords_are_xyxy:
        cx, cy, width, height = numbers
        x1, y1, x2, y2 = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    if x2 > x1 and y2 > y1:
        found.boxes.append(LabelledBox((x1, y1, x2, y2), kind, source))
        return
    found.problems.append(
        DataFormatError(
            "box without an area",
            source=source,
            field="coords",
            found=_written(numbers),
            expected="x1 < x2 and y1 < y2" if config.coords_are_xyxy else "w and h above 0",
            fix="correct the box, or set coords_are_xyxy if these are "
            + ("centre, width and height" if config.coords_are_xyxy else "corners"),
        )
    )


def _add(total: Labels, line: Labels, size_hw: tuple[int, int], config: RegionsConfig) -> None:
    """Take over a line: cut its boxes at the image's edge, leave out those too small or already there."""
    total.problems += line.problems
    seen = {box.box_xyxy: box for box in total.boxes}
    height, width = size_hw
    for box in line.boxes:
        x1, y1, x2, y2 = box.box_xyxy
        cut = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        here = {"source": box.source, "field": "coords", "found": _written(box.box_xyxy)}
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            total.problems.append(
                DataFormatError("box outside the image", expected=f"within {width}x{height}", fix="correct it", **here)
            )
            continue
        if cut != box.box_xyxy:
            total.notes.append(DataFormatError(f"box cut at the edge of {width}x{height} to {_written(cut)}", **here))
        if min(cut[2] - cut[0], cut[3] - cut[1]) < config.min_box_size:
            expected = f"sides of at least min_box_size = {config.min_box_size:g}"
            total.notes.append(DataFormatError("box too small, left out", expected=expected, **here))
            total.too_small.append(cut)
        elif cut not in seen:
            seen[cut] = LabelledBox(cut, box.defect_type, box.source)
            total.boxes.append(seen[cut])
        elif seen[cut].defect_type == box.defect_type:
            total.notes.append(DataFormatError(f"box already in {seen[cut].source}, counted once", **here))
        else:
            kinds = f"{seen[cut].defect_type} ({seen[cut].source}) and {box.defect_type}"
            total.problems.append(DataFormatError(f"one box of two types: {kinds}", fix="keep one of them", **here))


def _written(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
