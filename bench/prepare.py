"""Speed of `forensics prepare` against Pillow alone, which decodes and encodes the same files on the same cores.

    python bench/prepare.py [--images 1200] [--workers 0] [--storage parquet] [--out FILE]

Both read JPEG photographs with PNG masks, decode both, and encode the image as JPEG 85; Pillow's side writes the bytes
to files and checks nothing. Ours also reads the records, checks masks against images, takes fingerprints, divides,
writes a stored set with hashes, and compares the splits. Files are drawn, so nothing is downloaded. Prints JSON lines;
`ratio` is our rate over Pillow's.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

QUALITY = 85
SIZE_HW = (512, 768)


def draw(number: int, folder: Path) -> str:
    """Write one photograph-like JPEG and its mask; returns its line of the list."""
    rng = np.random.default_rng(number)
    height, width = SIZE_HW
    coarse = Image.fromarray(rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = np.clip(smooth + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=92)
    mask = np.zeros(SIZE_HW, np.uint8)
    mask[100:300, 150:400] = 255
    Image.fromarray(mask).save(folder / f"{number}.png")
    return json.dumps(
        {
            "id": str(number),
            "group": str(number),
            "images": [f"{number}.jpg"],
            "labels": [1],
            "masks": [f"{number}.png"],
        }
    )


def pillow_alone(number: int, source: Path, target: Path) -> None:
    """Decode and encode one image and its mask, as plainly as it can be done."""
    for suffix, kind, options in ((".jpg", "JPEG", {"quality": QUALITY}), (".png", "PNG", {})):
        with Image.open(source / f"{number}{suffix}") as image:
            image.load()
            stream = io.BytesIO()
            image.save(stream, kind, **options)
        (target / f"{number}{suffix}").write_bytes(stream.getvalue())


def time_pillow(source: Path, count: int, workers: int) -> float:
    """Seconds of Pillow alone, start of the processes included, as in ours."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        start = time.perf_counter()
        work = partial(pillow_alone, source=source, target=Path(folder))
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(pool.map(work, range(count), chunksize=8))
        return time.perf_counter() - start


def time_ours(source: Path, storage: str, workers: int) -> float:
    """Seconds of a whole preparation."""
    from finetune.data.preparation.config import PrepareConfig, PrepareSource  # here: workers import this file again
    from finetune.data.preparation.prepare import prepare
    from finetune.data.storage import ImageOptions

    out_dir = source.parent / "prepared"
    config = PrepareConfig(
        out_dir=str(out_dir),
        sources=[PrepareSource(str(source / "list.jsonl"))],
        storage=storage,  # type: ignore[arg-type]
        images=ImageOptions(mode="reencode", quality=QUALITY),
        workers=workers,
    )
    start = time.perf_counter()
    prepare(config, progress=False)
    seconds = time.perf_counter() - start
    shutil.rmtree(out_dir)
    return seconds


def main() -> None:
    """Draw the files, measure both sides in turn, print the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--storage", choices=("jsonl", "parquet"), default="parquet")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts, for both sides")
    parser.add_argument("--out", help="write the JSON line to this file as well")
    arguments = parser.parse_args()
    from finetune.data.parallel import num_workers

    workers = num_workers(arguments.workers)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        lines = [draw(number, source) for number in range(arguments.images)]
        (source / "list.jsonl").write_text("\n".join(lines) + "\n")
        pillow, ours = [], []
        for _ in range(arguments.rounds):
            pillow.append(time_pillow(source, arguments.images, workers))
            ours.append(time_ours(source, arguments.storage, workers))
    result = {
        "command": " ".join(["python", "bench/prepare.py", *sys.argv[1:]]),
        "images": arguments.images,
        "size_hw": SIZE_HW,
        "workers": workers,
        "storage": arguments.storage,
        "pillow_images_per_s": round(arguments.images / min(pillow), 1),
        "prepare_images_per_s": round(arguments.images / min(ours), 1),
        "ratio": round(min(pillow) / min(ours), 3),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__},
    }
    line = json.dumps(result)
    print(line)
    if arguments.out:
        Path(arguments.out).write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
