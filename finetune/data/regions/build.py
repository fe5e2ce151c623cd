"""`forensics regions build`: candidates to conversations, `SPLIT.jsonl` in `out_dir`, ready to train on.

Each line is a native record: `<image>`, the question with `<regions>`, and the JSON answer. Boxes stay in pixels of the
original image in `provenance.regions`; training writes them out in the frame the model sees (`text.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.regions.prepare import candidates_name
from finetune.data.regions.settings import SPLITS
from finetune.data.regions.text import POSITIVE_IDS, REGIONS
from finetune.data.regions.wording import BUILT_IN, RegionTemplate, load_region_template
from finetune.data.storage.atomic import write_atomically
from finetune.errors import ConfigError, DataFormatError


@dataclass(frozen=True)
class Built:
    """Records, regions and regions with a defect of one split's file."""

    path: Path
    records: int
    regions: int
    positive_regions: int


def build_sft(
    out_dir: str | Path, template: str = "zh", *, copy_images: bool = False, overwrite: bool = False
) -> list[Built]:
    """Write `train.jsonl`, `val.jsonl`, `test.jsonl` from the candidates in `out_dir`.

    Args:
        template: `zh`, `en`, `both` (a record in each language by turns), or the path of a template.
        copy_images: put the images under `out_dir/images`, so that the folder can be moved; else their paths stay, and
            are absolute where they do not lie below `out_dir`.
        overwrite: replace files of an earlier build.

    Raises:
        ConfigError: nothing prepared in `out_dir`, files there already, a template that cannot be used.
        DataFormatError: a damaged line, or an image that is gone.
    """
    folder = Path(out_dir)
    templates = [load_region_template(name) for name in (BUILT_IN if template == "both" else (template,))]
    missing = [split for split in SPLITS if not (folder / candidates_name(split)).is_file()]
    if missing:
        raise ConfigError(f"{folder}: no {candidates_name(missing[0])}; run forensics regions prepare first")
    there = [f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").exists()]
    if there and not overwrite:
        raise ConfigError(f"{folder} holds {', '.join(there)} already; give --overwrite to replace them")
    return [_build_split(folder, split, templates, copy_images) for split in SPLITS]


def _build_split(folder: Path, split: str, templates: list[RegionTemplate], copy_images: bool) -> Built:
    lines: list[bytes] = []
    num_regions = num_positive = 0
    for number, line in enumerate(_candidates(folder / candidates_name(split))):
        record = _record(line, split, templates[number % len(templates)], _image_path(line, folder, copy_images))
        num_regions += len(record["provenance"][REGIONS])
        num_positive += len(record["provenance"][POSITIVE_IDS])
        lines.append((json.dumps(record, ensure_ascii=False) + "\n").encode())
    path = folder / f"{split}.jsonl"
    write_atomically(path, lines)
    return Built(path, len(lines), num_regions, num_positive)


def _record(line: dict[str, Any], split: str, template: RegionTemplate, image: str) -> dict[str, Any]:
    types = {region["id"]: region["type"] for region in line["regions"]}
    provenance: dict[str, Any] = {
        "task": "regions",
        "split": split,
        REGIONS: line["regions"],
        POSITIVE_IDS: [name for name, kind in types.items() if kind is not None],
    }
    if template.name in BUILT_IN:
        provenance["language"] = template.name
    return {
        "id": line["id"],
        "group": line["group"],
        "images": [image],
        "messages": [
            {"role": "user", "content": template.question(line["id"])},
            {"role": "assistant", "content": template.answer(types)},
        ],
        "provenance": provenance,
    }


def _candidates(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for number, text in enumerate(stream, 1):
            try:
                line = json.loads(text)
                if not {"id", "image", "group", "regions"} <= set(line):
                    raise ValueError(f"keys {sorted(line)}")
            except (ValueError, TypeError) as error:
                raise DataFormatError(
                    f"no line of candidates ({error})", source=f"{path.name}:{number}", fix="prepare the regions again"
                ) from error
            yield line


def _image_path(line: dict[str, Any], folder: Path, copy_images: bool) -> str:
    """How the record names its image."""
    image = Path(line["image"])
    if not image.is_file():
        problem, fix = "image is gone", "prepare the regions again"
        raise DataFormatError(problem, record=line["id"], field="image", found=line["image"], fix=fix)
    if copy_images:
        copy = folder / "images" / f"{line['id']}{image.suffix}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, copy)
        image = copy
    relative = os.path.relpath(image.resolve(), folder.resolve())
    return str(image.resolve()) if relative.startswith("..") else relative.replace(os.sep, "/")
