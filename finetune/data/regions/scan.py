"""`forensics regions scan`: the third column of the label files as statistics and as a `label_map` to paste.

Nothing is changed. Spellings that differ in width or white space only are brought together in the proposed map.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetune.data.regions.settings import RegionsConfig
from finetune.data.regions.survey import RegionImage, plain, survey
from finetune.data.storage.atomic import write_atomically
from finetune.errors import DataFormatError

STATS_NAME = "label_stats.json"


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Args:
        stats: the contents of `label_stats.json`.
        problems: see `labels.Labels`, of all images, in their order.
        notes: as problems.
        label_map: type as labelled -> proposed name, the commonest type first.
    """

    stats: dict[str, Any]
    problems: list[DataFormatError]
    notes: list[DataFormatError]
    label_map: dict[str, str]

    @property
    def pasteable(self) -> str:
        """`label_map:` as YAML."""
        return yaml.safe_dump({"label_map": self.label_map}, allow_unicode=True, sort_keys=False).strip()


def scan(config: RegionsConfig) -> Scan:
    """Count lines, boxes, types and sizes of all labels; write `label_stats.json` into `out_dir`.

    Raises:
        ForensicsError: as `survey`.
    """
    images = list(survey(replace(config, label_map={})))
    problems = [problem for image in images for problem in image.problems]
    notes = [note for image in images for note in image.notes]
    label_map = _proposed_map(images)
    stats = _statistics(images, problems, notes)
    stats["label_map"] = label_map
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stats, ensure_ascii=False, indent=2) + "\n"
    write_atomically(out_dir / STATS_NAME, [text.encode()])
    return Scan(stats, problems, notes, label_map)


def _statistics(
    images: list[RegionImage], problems: list[DataFormatError], notes: list[DataFormatError]
) -> dict[str, Any]:
    boxes: Counter[str] = Counter()
    in_images: defaultdict[str, set[str]] = defaultdict(set)
    lines: defaultdict[str, set[str]] = defaultdict(set)
    sides: list[tuple[float, float]] = []
    for image in images:
        for box in image.boxes:
            boxes[box.defect_type] += 1
            in_images[box.defect_type].add(image.id)
            lines[box.defect_type].add(f"{image.id} {box.source}")
            x1, y1, x2, y2 = box.box_xyxy
            sides.append((x2 - x1, y2 - y1))
    return {
        "abnormal_images": sum(image.is_abnormal and bool(image.path) for image in images),
        "normal_images": sum(not image.is_abnormal and bool(image.path) for image in images),
        "groups": len({image.group for image in images}),
        "lines": sum(image.num_lines for image in images),
        "boxes": sum(boxes.values()),
        "boxes_per_image": dict(sorted(Counter(len(image.boxes) for image in images if image.boxes).items())),
        "types": {
            kind: {"boxes": count, "images": len(in_images[kind]), "lines": len(lines[kind])}
            for kind, count in sorted(boxes.items(), key=lambda item: (-item[1], item[0]))
        },
        "box_pixels": {
            "width": _quartiles([width for width, _ in sides]),
            "height": _quartiles([height for _, height in sides]),
        },
        "problems": [str(problem) for problem in problems],
        "notes": [str(note) for note in notes],
    }


def _proposed_map(images: list[RegionImage]) -> dict[str, str]:
    counts = Counter(box.defect_type for image in images for box in image.boxes)
    ordered = [kind for kind, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    names: dict[str, str] = {}
    for kind in ordered:
        names.setdefault(plain(kind), kind)
    return {kind: names[plain(kind)] for kind in ordered}


def _quartiles(values: list[float]) -> dict[str, float]:
    """Least, quarters and greatest of some numbers; {} of none."""
    ordered = sorted(values)
    names = ("min", "p25", "median", "p75", "max")
    return {name: ordered[round(i / 4 * (len(ordered) - 1))] for i, name in enumerate(names)} if ordered else {}
