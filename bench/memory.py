"""Peak memory of writing and reading stored sets at few and at many samples, and how long one random sample takes.

    python bench/memory.py [--counts 1000 20000] [--access-rows 10000] [--out bench/results/memory_2core_cpu.json]

Prints JSON lines. Every measurement runs in a process of its own on generated images; the peak is the kernel's
high-water mark of resident memory (VmHWM), which starts anew with each program.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.containers import container_path, read_embedded
from finetune.data.images import load_image
from finetune.data.masks import load_mask
from finetune.data.readers import iter_records
from finetune.data.storage import iter_stored, open_writer
from finetune.schema import ImageInput, ImageTarget, Record, Turn

NUM_PICTURES = 100
STORAGES = ("jsonl", "parquet")


def draw_pictures(folder: Path, side: int) -> None:
    """`NUM_PICTURES` JPEGs of smoothed noise and masks of a rectangle."""
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + rng.integers(-24, 25, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        mask = np.zeros((side, side), np.uint8)
        mask[side // 8 : side // 2, side // 4 : side // 2] = 255
        Image.fromarray(mask).save(folder / f"{number}.png")


def records(folder: Path, count: int, side: int) -> Iterator[Record]:
    """`count` records, every other one tampered."""
    for number in range(count):
        picture = number % NUM_PICTURES
        target = ImageTarget(label=0, mask_size_hw=(side, side))
        if number % 2:
            target = ImageTarget(label=1, mask_path=str(folder / f"{picture}.png"), evidence="the edges are too sharp")
        turns = (Turn("user", "<image>Is this photo real?"), Turn("assistant", "Yes." if number % 2 == 0 else "No."))
        image = ImageInput(path=str(folder / f"{picture}.jpg"))
        yield Record(f"r{number}", (image,), (target,), turns, f"g{number // 4}", provenance={"seed": [0, number]})


def peak_mb() -> float:
    """Highest resident memory of this process so far, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "no VmHWM in /proc/self/status: this benchmark needs Linux"
    return int(found[1]) / 1024


def write(folder: Path, count: int, side: int, storage: Any) -> None:
    """Copy the pictures into a set, each decoded and checked as in a preparation."""
    with open_writer(folder / f"{storage}-{count}", "train", storage) as writer:
        for record in records(folder, count, side):
            writer.write(record)


def read(folder: Path, count: int, storage: str) -> None:
    """Read every record of a set, decode its images and masks."""
    seen = 0
    for record in iter_records(folder / f"{storage}-{count}" / "train"):
        assert isinstance(record, Record), record
        for image, target in zip(record.images, record.targets, strict=True):
            picture = load_image(image, record.id)
            load_mask(target, (picture.height, picture.width), record.id)
        seen += 1
    assert seen == count


def access(folder: Path, count: int) -> dict[str, Any]:
    """Milliseconds to fetch one sample's bytes, and to fetch and decode it, in random order; all read once before.

    The clock on the wall also shows what else the machine does; the thread's own time is what the work takes.
    """
    files = sorted((folder / f"parquet-{count}").glob("train-*.parquet"))
    paths = [str(image.path) for file in files for _, _, r in iter_stored(file) for image in r.images]  # type: ignore[union-attr]
    assert len(paths) == count
    assert paths[0] == container_path(files[0], 0, "images", 0)
    order = random.Random(0).sample(paths, count)
    num_bytes = sum(len(read_embedded(path)) for path in order)
    result: dict[str, Any] = {"rows": count, "files": len(files), "mean_image_kb": round(num_bytes / count / 1024, 1)}
    for name, function in (("fetch", read_embedded), ("fetch_and_decode", lambda p: load_image(ImageInput(path=p)))):
        wall, cpu = [], []
        for path in order[:2000]:
            start, start_cpu = time.perf_counter(), time.thread_time()
            function(path)
            wall.append(1000 * (time.perf_counter() - start))
            cpu.append(1000 * (time.thread_time() - start_cpu))
        for clock, times in (("wall", wall), ("cpu", cpu)):
            result[f"{name}_median_ms_{clock}"] = round(statistics.median(times), 3)
            result[f"{name}_p95_ms_{clock}"] = round(statistics.quantiles(times, n=20)[-1], 3)
    return result


def measure(what: str, folder: Path, count: int, side: int, storage: str) -> dict[str, Any]:
    """One measurement in this process."""
    start = time.perf_counter()
    if what == "access":
        return {"what": what, **access(folder, count)}
    if what == "write":
        write(folder, count, side, storage)
    else:
        read(folder, count, storage)
    seconds = time.perf_counter() - start
    found = {"what": what, "storage": storage, "samples": count, "peak_rss_mb": round(peak_mb(), 1)}
    return {**found, "seconds": round(seconds, 1)}


def in_own_process(what: str, folder: Path, count: int, side: int, storage: str) -> dict[str, Any]:
    """One measurement in a process of its own, printed and returned."""
    command = [sys.executable, __file__, "--measure", what, str(folder), str(count), str(side), storage]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    print(done.stdout.strip(), flush=True)
    return json.loads(done.stdout)


def run(counts: list[int], side: int, access_rows: int, access_side: int) -> list[dict[str, Any]]:
    """All measurements, then the ratio of the peaks at the largest and the smallest count."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_pictures(folder, side)
        for storage in STORAGES:
            for what in ("write", "read"):
                own = [in_own_process(what, folder, count, side, storage) for count in counts]
                ratio = round(own[-1]["peak_rss_mb"] / own[0]["peak_rss_mb"], 4)
                own.append({"what": what, "storage": storage, "peak_ratio": ratio, "goal": 1.1})
                print(json.dumps(own[-1]), flush=True)
                results += own
    if access_rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            draw_pictures(folder, access_side)
            in_own_process("write", folder, access_rows, access_side, "parquet")
            results.append(in_own_process("access", folder, access_rows, access_side, "parquet"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 20000])
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--access-rows", type=int, default=10000, help="0: leave the random access out")
    parser.add_argument("--access-side", type=int, default=384, help="pixels")
    parser.add_argument("--out", help="also write the results to this file")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, folder, count, side, storage = options.measure
        print(json.dumps(measure(what, Path(folder), int(count), int(side), storage)))
        return
    results = run(options.counts, options.side, options.access_rows, options.access_side)
    if options.out:
        names = ("counts", "side", "access_rows", "access_side")
        values = {name: getattr(options, name) for name in names}
        versions = {name: importlib.metadata.version(name) for name in ("pillow", "pyarrow", "numpy")}
        report = {
            "command": "python bench/memory.py",
            "options": values,
            "hardware": f"{os.cpu_count()} CPU cores, no GPU; load average {os.getloadavg()[0]:.1f}",
            "versions": {"python": platform.python_version(), **versions},
            "results": results,
        }
        Path(options.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
