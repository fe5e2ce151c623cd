"""Random access to one stored report, and its preview, at many rows of Parquet.

    python bench/report_access.py [--rows 10000] [--pictures 200] [--draws 300] [--out FILE]

Rows name drawn pictures over and over (bytes are stored for each row). Reported: milliseconds to fetch and to fetch and
decode a random image, warm (each draw has another row group than the last), the process's own time beside the wall
clock, and what a preview of three records reads of the file. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from finetune.cli import main as forensics
from finetune.data.containers import read_embedded
from finetune.data.images import load_image
from finetune.data.readers import read_records
from finetune.data.reports.command import preview_stored
from finetune.data.synthesis.wall_photos import write_wall_reports
from finetune.schema import ImageInput


def make_set(folder: Path, rows: int, pictures: int) -> Path:
    """A stored set of one split; returns its folder."""
    table = write_wall_reports(folder, pictures)
    with table.open(encoding="utf-8", newline="") as stream:
        header, *drawn = csv.reader(stream)
    with table.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *([index, *drawn[index % pictures][1:]] for index in range(rows))])
    arguments = ["--csv", str(table), "--out", str(folder / "set"), "--format", "parquet", "--keep-images"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = forensics(["reports", "prepare", *arguments, "--set", "splits.ratios={train: 1.0}"])
    assert status == 0, status
    return folder / "set"


def bytes_read() -> int:
    """By this process so far, from files and the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def timed(draws: list[str], load: Callable[[str], object]) -> dict[str, float]:
    """Milliseconds for each of the paths: median, 95th percentile, and the process's own time."""
    wall, start = [], time.process_time()
    for path in draws:
        begin = time.perf_counter()
        load(path)
        wall.append(1000 * (time.perf_counter() - begin))
    wall.sort()
    own = 1000 * (time.process_time() - start) / len(draws)
    return {
        "median_ms": round(wall[len(wall) // 2], 2),
        "p95_ms": round(wall[int(0.95 * len(wall))], 2),
        "own_ms": round(own, 2),
    }


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--out", help="append the line to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = make_set(Path(name), options.rows, options.pictures)
        size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
        before, start = bytes_read(), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            preview_stored(str(folder), 3)
        preview = {"ms": round(1000 * (time.perf_counter() - start), 1), "read_bytes": bytes_read() - before}
        paths = [record.images[0].path or "" for record in read_records(folder / "train")]
        draws = random.Random(0).choices(paths, k=options.draws)
        for path in draws:  # warm: the page cache, and the files open
            read_embedded(path)
        result = {
            "rows": options.rows,
            "file_bytes": size,
            "preview_of_3": preview,
            "fetch": timed(draws, read_embedded),
            "fetch_and_decode": timed(draws, lambda path: load_image(ImageInput(path=path))),
            "cpus": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
        }
    line = json.dumps(result)
    print(line)
    if options.out:
        with Path(options.out).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


if __name__ == "__main__":
    main()
