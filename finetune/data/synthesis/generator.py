"""Make a data set of authentic and tampered images, with masks, polygons, evidence and provenance, from photographs.

Same seed, same files byte for byte, whatever the number of workers and however often it was interrupted. The set is
written beside its final place (`partial`) and renamed at the end, so that it is never half there. One image is made in
`samples`, conversations about several in `conversations`.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import skimage

from finetune.data import masks
from finetune.data.edit_operations import FURTHER
from finetune.data.locking import locked
from finetune.data.parallel import num_workers, ordered_map
from finetune.data.synthesis.answers import (
    LANGUAGES,
    SENTENCES,
    answer_polygons,
    describe_region,
    difficulty,
    evidence_text,
    source_place,
)
from finetune.data.synthesis.config import SynthConfig
from finetune.data.synthesis.image_files import (
    IMAGE_FORMATS,
    encode_image,
    encode_numbers,
    encode_png,
    photo_exif,
    write_whole,
)
from finetune.data.synthesis.partial import Entry, PartialSet
from finetune.data.synthesis.photos import SPLITS, PhotoSet, find_photos
from finetune.data.synthesis.record_files import write_record_files
from finetune.data.synthesis.samples import AppliedEdit, Sample, SampleTask, make_sample, plan_tasks
from finetune.errors import ForensicsError
from finetune.progress import progress_bar

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3


def synthesize(
    config: SynthConfig, out_dir: str | Path, progress: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """Write `{train,val,eval}/{images,masks}/`, `{train,val,eval}.jsonl`, `eval_annotations.json`, manifest.json.

    Kinds of records beyond `single` go to `{train,val,eval}_instruct.jsonl`. An interrupted run with the same
    configuration is continued. With more than one worker the caller's script needs the usual
    `if __name__ == "__main__":` (processes are spawned).

    Args:
        config: what to make.
        out_dir: new or empty folder; its parent is created.
        progress: show a bar on stderr.
        overwrite: replace a folder that holds an earlier generated set; any other non-empty folder is refused anyway.

    Returns:
        the manifest, as written.

    Raises:
        ForensicsError: unusable photographs, an `out_dir` that is not empty, or another process at work there.
    """
    out_dir = Path(out_dir).resolve()
    _check_target(out_dir, overwrite)
    photos = find_photos(config.photos_dir, config.held_out_fraction, config.workers, progress, config.train_photos_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is making {str(out_dir)!r}; wait for it, or choose another --out"
    with locked(out_dir.parent / f".{out_dir.name}.lock", refusal):
        _check_target(out_dir, overwrite)  # another process may have finished meanwhile
        partial = PartialSet(out_dir, {**_content(config, photos), "code": _code_hash()})
        try:
            manifest = _write_set(config, photos, partial, progress)
        except BaseException:
            if kept := partial.drop_if_empty():
                logger.warning("%d finished images are kept; the same command goes on from there", kept)
            raise
        partial.publish()
    return manifest


def _check_target(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if out_dir.is_file():
        raise ForensicsError(f"output {str(out_dir)!r} is a file; give a folder")
    if not overwrite:
        raise ForensicsError(f"output {str(out_dir)!r} is not empty; choose another folder or add --overwrite")
    if not (out_dir / "manifest.json").is_file():
        raise ForensicsError(
            f"output {str(out_dir)!r} holds no manifest.json, so it is not a generated set; it is not"
            " overwritten, choose another folder"
        )


def _write_set(config: SynthConfig, photos: PhotoSet, partial: PartialSet, progress: bool) -> dict[str, Any]:
    tasks = [task for split in SPLITS for task in plan_tasks(config, split)]
    folders = [f"{split}/{kind}" for split in SPLITS for kind in ("images", "masks")]
    finished = partial.open([task.id for task in tasks], folders)
    if finished:
        logger.warning("continuing an interrupted run: %d of %d images are there", finished, len(tasks))
    entries = partial.add(_make_all(config, photos, partial.root, tasks[finished:]))
    bar = progress_bar(entries, total=len(tasks), initial=finished, desc="synth", unit="img", disable=not progress)
    for _ in bar:
        pass
    counts, hashes = write_record_files(config, partial)
    content = _content(config, photos)
    manifest = {
        "format_version": FORMAT_VERSION,
        "seed": config.seed,
        "counts": counts,
        "sha256": hashes,
        **content,
    }
    partial.write_json("manifest.json", manifest)
    return manifest


def _make_all(config: SynthConfig, photos: PhotoSet, root: Path, tasks: list[SampleTask]) -> Iterator[Entry]:
    """Samples of the tasks in their order, made in this process or in spawned ones."""
    workers = min(num_workers(config.workers), max(1, len(tasks) // 16))
    chunk = max(1, min(32, len(tasks) // (4 * workers)))
    threads = cv2.getNumThreads()
    try:
        yield from ordered_map(
            _make_one, tasks, workers, chunk=chunk, initializer=_start_worker, initargs=(config, photos, root)
        )
    finally:
        cv2.setNumThreads(threads)
        _context.clear()


_context: dict[str, Any] = {}
"""What every sample of a run needs, sent once to each process instead of with each task."""


def _start_worker(config: SynthConfig, photos: PhotoSet, root: Path) -> None:
    cv2.setNumThreads(1)
    _context.update(config=config, photos=photos, root=root)


def _make_one(task: SampleTask) -> Entry:
    return write_sample(task, _context["config"], _context["photos"], _context["root"])


def write_sample(task: SampleTask, config: SynthConfig, photos: PhotoSet, root: Path) -> Entry:
    """Make one image, write its files under `root`; returns its jsonl record (paths relative to `root`) and hashes."""
    sample = make_sample(task, config, photos)
    mask, findings = sample.mask, [_finding(edit, sample) for edit in sample.edits]
    rng = np.random.default_rng([config.seed, SPLITS.index(task.split), task.index, 1])
    language = config.language if config.language != "both" else LANGUAGES[int(rng.integers(2))]
    exif, camera = photo_exif(sample.photo.path)
    container = sample.provenance["container"]
    height, width = sample.image.shape[:2]
    image_path = f"{task.split}/images/{task.index:06d}{IMAGE_FORMATS[container['format']]}"
    mask_path = f"{task.split}/masks/{task.index:06d}.png" if mask is not None else f"{height}x{width}"
    files = {image_path: encode_image(sample.image, container, exif if config.metadata == "carry" else b"")}
    if mask is not None:
        files[mask_path] = _encode_mask(sample)
    for name, data in files.items():
        write_whole(root / name, data)
    provenance = {
        **sample.provenance,
        **_told(findings),
        "language": language,
        **({"exif": camera} if camera else {}),
    }
    said = [evidence_text(one, language, rng, config.evidence_detail) for one in findings or [provenance]]
    record = {
        "id": task.id,
        "group": sample.photo.group,
        "images": [image_path],
        "labels": [int(task.operation is not None)],
        "masks": [mask_path],
        "polygons": [[] if mask is None else answer_polygons(mask, config.max_points)],
        "evidence": [SENTENCES[language].join(said)],
        "provenance": provenance,
    }
    return {"record": record, "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}


def _encode_mask(sample: Sample) -> bytes:
    """The mask file: 0 and 255; of several edits their numbers, the later ones on top."""
    if len(sample.edits) == 1:
        return encode_png(sample.edits[0].mask.astype(np.uint8) * 255)
    numbers = np.zeros(sample.image.shape[:2], dtype=np.uint8)
    for number, edit in enumerate(sample.edits, start=1):
        numbers[edit.mask] = number
    return encode_numbers(numbers)


def _finding(edit: AppliedEdit, sample: Sample) -> dict[str, Any]:
    """`operation`, `region` and `difficulty` of one edit, from which every answer is worded."""
    region = describe_region(edit.mask)
    if place := source_place(edit.canvas_mask, edit.operation, sample.host.shape[:2]):
        region["source_place"] = place
    hardness = difficulty(edit.operation, sample.provenance["degradations"])
    return {"operation": edit.operation, "region": region, "difficulty": hardness}


def _told(findings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The findings as a provenance holds them: the first one's as they are, each further one as its operation."""
    if not findings:
        return {}
    further = [
        {**found["operation"], "region": found["region"], "difficulty": found["difficulty"]} for found in findings[1:]
    ]
    return {**findings[0], **({FURTHER: further} if further else {})}


def _content(config: SynthConfig, photos: PhotoSet) -> dict[str, Any]:
    """All that decides the bytes of a set, as the manifest lists it; no machine path and no number of processes."""
    values = asdict(config)
    del values["workers"]
    for key in ("photos_dir", "train_photos_dir"):
        if values[key] is not None:
            values[key] = Path(values[key]).name
    settings = values["operation_settings"]
    if settings.get("diffusion_model"):
        settings["diffusion_model"] = Path(settings["diffusion_model"]).name
    return {
        "photos": [{key: value for key, value in asdict(photo).items() if key != "path"} for photo in photos.photos],
        "rejected_photos": list(photos.rejected),
        "config": values,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "pillow": PIL.__version__,
            "scikit-image": skimage.__version__,
        },
    }


@cache
def _code_hash() -> str:
    """Of the source that makes images: samples of an older version are not continued."""
    files = [*sorted(Path(__file__).parent.rglob("*.py")), Path(masks.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
