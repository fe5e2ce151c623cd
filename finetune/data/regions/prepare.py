"""`forensics regions prepare`: images to splits, each with its candidate regions, in `candidates_SPLIT.jsonl`.

Splits go by parent folder, a hold-out list is forced into test. An image with a problem is never used in part: with a
label missing, a box without a defect might lie on one. Such images stand in `rejected.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.preparation.ledger import REJECTED_NAME, described
from finetune.data.regions.candidates import MAX_OVERLAP, Candidate, Dealt, card_of, deal_candidates, overlap
from finetune.data.regions.geometry import geometry_aurocs
from finetune.data.regions.settings import SPLITS, RegionsConfig
from finetune.data.regions.survey import RegionImage, decode_images, survey
from finetune.data.splits import GroupBy, HoldOut, Splitter
from finetune.data.storage.atomic import write_atomically
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record

REPORT_NAME = "prepare_report.json"


@dataclass(frozen=True)
class Prepared:
    """What was made.

    Args:
        rejected: images, and label files without one, that were left out.
        report: contents of `prepare_report.json`.
        notes: boxes that were cut or left out.
        warnings: what a user should know.
    """

    rejected: int
    report: dict[str, Any]
    notes: list[DataFormatError]
    warnings: list[str]


def candidates_name(split: str) -> str:
    """File of one split's candidates in `out_dir`."""
    return f"candidates_{split}.jsonl"


def prepare_regions(config: RegionsConfig, images: Sequence[RegionImage] | None = None) -> Prepared:
    """Divide images, choose candidates, write them; images with problems are rejected.

    Same files and seed, same bytes. A line holds `id`, `image`, `size_hw`, `group` and `regions`: `id`, `box_xyxy` in
    pixels of the original image, `type` or null.

    Args:
        images: of `survey` and `decode_images`, where these were called already.

    Raises:
        ConfigError: nothing usable, no labelled box, one group only, a hold-out list that cannot be read.
        ForensicsError: as `survey`.
    """
    if images is None:
        images = list(survey(config))
        decode_images(images)
    usable = [image for image in images if not image.problems]
    if not any(image.boxes for image in usable):
        raise ConfigError(
            f"abnormal_dir '{config.abnormal_dir}': no image with usable labels among {len(images)}; "
            "forensics regions scan says why"
        )
    divided, warnings = _divide(usable, config)
    spare = [card_of(box.box_xyxy, image.size_hw) for image in usable for box in image.boxes]
    dealt = {
        split: deal_candidates(divided[split], config, np.random.default_rng([config.seed, number]), spare)
        for number, split in enumerate(SPLITS)
    }
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"config": asdict(config), "splits": {}}
    for split, made in dealt.items():
        by_id = {image.id: image for image in divided[split]}
        groups = {image.id: _scene(image, config) for image in divided[split]}
        write_atomically(out_dir / candidates_name(split), _lines(made.candidates, by_id, groups))
        report["splits"][split] = facts = _facts(made, by_id, groups)
        warnings += _warnings(split, made, facts)
    report["rejected"] = _write_rejected(images, out_dir)
    notes = [note for image in usable for note in image.notes]
    report["notes"] = [str(note) for note in notes]
    report["warnings"] = warnings
    text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
    write_atomically(out_dir / REPORT_NAME, [text.encode()])
    return Prepared(report["rejected"], report, notes, warnings)


def _divide(images: Sequence[RegionImage], config: RegionsConfig) -> tuple[dict[str, list[RegionImage]], list[str]]:
    records = [_record(image, config) for image in images]
    group_by = GroupBy("group")
    hold_out = HoldOut.read(config.holdout_list, group_by) if config.holdout_list else None
    splitter = Splitter(config.ratios, config.seed, group_by, hold_out, "test", ("normal", "abnormal"))
    splitter.scan(records)
    divided: dict[str, list[RegionImage]] = {split: [] for split in SPLITS}
    for record, image in zip(records, images, strict=True):
        divided[splitter.split_of(record)].append(image)
    return divided, list(splitter.report().warnings)


def _record(image: RegionImage, config: RegionsConfig) -> Record:
    """What the splitter needs: one scene has one name in both folders; without scenes each image is its own."""
    group = _scene(image, config) or f"image:{image.id}"
    return Record(image.id, (ImageInput(path=image.path),), (ImageTarget(int(image.is_abnormal)),), group=group)


def _scene(image: RegionImage, config: RegionsConfig) -> str:
    """The folder whose images are never parted; "" where each image is its own."""
    return image.group if config.split_by_parent else ""


def _lines(
    candidates: Mapping[str, Sequence[Candidate]], images: Mapping[str, RegionImage], groups: Mapping[str, str]
) -> Iterable[bytes]:
    for name, regions in candidates.items():
        image = images[name]
        line = {
            "id": name,
            "image": image.path,
            "size_hw": image.size_hw,
            "group": groups[name],
            "regions": [{"id": r.id, "box_xyxy": r.box_xyxy, "type": r.defect_type} for r in regions],
        }
        yield (json.dumps(line, ensure_ascii=False) + "\n").encode()


def _facts(made: Dealt, images: Mapping[str, RegionImage], groups: Mapping[str, str]) -> dict[str, Any]:
    sizes = {name: images[name].size_hw for name in made.candidates}
    regions = [region for each in made.candidates.values() for region in each]
    types = [region.defect_type for region in regions if region.defect_type is not None]
    return {
        "images": len(made.candidates),
        "abnormal_images": sum(images[name].is_abnormal for name in made.candidates),
        "groups": len({groups[name] or name for name in made.candidates}),
        "regions": len(regions),
        "positive_regions": len(types),
        "types": {kind: types.count(kind) for kind in sorted(set(types))},
        "overlapping_positives": sum(map(_num_overlapping, made.candidates.values())),
        "dropped_boxes": made.dropped,
        "missing_negatives": sum(made.missing.values()),
        "images_without_candidates": made.unused,
        "geometry_auroc": geometry_aurocs(made.candidates, sizes),
        "geometry_auroc_on_abnormal_images": geometry_aurocs(made.candidates, sizes, only_with_defects=True),
    }


def _num_overlapping(regions: Sequence[Candidate]) -> int:
    """Boxes with a defect that share more with another candidate than a box without one ever does."""
    boxes = [region.box_xyxy for region in regions]
    return sum(
        region.defect_type is not None
        and any(overlap(region.box_xyxy, box) > MAX_OVERLAP for box in boxes[:index] + boxes[index + 1 :])
        for index, region in enumerate(regions)
    )


def _warnings(split: str, made: Dealt, facts: Mapping[str, Any]) -> list[str]:
    said = []
    if made.dropped:
        said.append(
            f"{split}: {made.dropped} labelled boxes left out, their images have too many (max_boxes_per_image)"
        )
    if made.missing:
        said.append(
            f"{split}: {sum(made.missing.values())} boxes without a defect less than asked for, on {len(made.missing)} "
            "images: no room beside the labelled ones, or max_boxes_per_image"
        )
    if made.unused:
        said.append(f"{split}: {len(made.unused)} normal images have no candidate and are not used")
    if facts["overlapping_positives"] > 0.1 * facts["positive_regions"]:
        said.append(
            f"{split}: {facts['overlapping_positives']} of {facts['positive_regions']} labelled boxes overlap another "
            "one, which no box without a defect does, so they are known without looking; label a defect with one box"
        )
    if facts["positive_regions"] >= 50:
        for name, value in facts["geometry_auroc"].items():
            if value is not None and abs(value - 0.5) > 0.1:
                said.append(f"{split}: '{name}' alone tells boxes with a defect apart, AUROC {value:.2f} (.5 is none)")
    return said


def _write_rejected(images: Sequence[RegionImage], out_dir: Path) -> int:
    """One line per image that was left out, with all its problems; no file without any."""
    bad = [image for image in images if image.problems]
    (out_dir / REJECTED_NAME).unlink(missing_ok=True)
    if bad:
        lines = ({"id": image.id, "problems": [described(problem) for problem in image.problems]} for image in bad)
        write_atomically(
            out_dir / REJECTED_NAME, ((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
        )
    return len(bad)
