"""What `forensics vision infer` writes: a CSV for people, a journal to go on from, and a picture per image.

The journal (`results.jsonl`, a line per image, flushed as it comes) is what counts: a resumed run reads it, drops a
half-written last line and writes the CSV anew from it. The CSV is UTF-8 with a byte-order mark, for Excel.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from finetune.data.locking import locked
from finetune.data.storage.atomic import write_atomically
from finetune.errors import ConfigError, DataFormatError
from finetune.inference.replacing import refuse_foreign
from finetune.inference.run_folder import INFERENCE, LOCK_FILE, open_run
from finetune.inference.visualization import UInt8, save_mask_png

JOURNAL = "results.jsonl"
OVERLAYS, HEAT_MAPS = "overlays", "heatmaps"
CSV_COLUMNS = (
    "id",
    "image_path",
    "label",
    "verdict",
    "score",
    "raw_score",
    "num_regions",
    "area",
    "boxes",
    "regions",
    "prompt_index",
    "explanation",
    "overlay",
    "heatmap",
    "error",
)
"""Columns of the CSV, all of them in the journal too; `prompt` and `stamp` are in the journal only."""


@contextmanager
def held(evidence_dir: str | Path) -> Iterator[None]:
    """Keep every other process out of an evidence folder, which is made where it is not there.

    Raises:
        ForensicsError: another process writes to it.
    """
    folder = Path(evidence_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output.evidence_dir is {folder}, which is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is writing to {folder}; wait for it, or give another output.evidence_dir"
    with locked(folder / LOCK_FILE, refusal):
        yield


class EvidenceFolder:
    """A CSV file and an evidence folder that are written together; a context manager.

    Args:
        csv_path, evidence_dir: as configured.
        identity: what the results depend on, see `run_folder.open_run`.
        overwrite: replace the output of an earlier run.

    Raises:
        ConfigError: the folder or the CSV belongs to another run, or the journal is damaged in its middle.
    """

    def __init__(
        self, csv_path: str | Path, evidence_dir: str | Path, identity: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.csv_path, self.dir = Path(csv_path), Path(evidence_dir)
        if self.csv_path.is_dir():
            raise ConfigError(f"output.csv is {self.csv_path}, which is a folder; give a file, e.g. results.csv")
        is_new = not (self.dir / JOURNAL).exists()
        if is_new and self.csv_path.exists() and not overwrite:
            raise ConfigError(
                f"output.csv is {self.csv_path}, which exists and is of no run here; give another file, or add "
                "--overwrite where it is the table of another run"
            )
        if overwrite:
            header = ",".join(CSV_COLUMNS)
            refuse_foreign(self.csv_path, "output.csv", lambda text: text.startswith(header), "table of results")
        own = (JOURNAL, OVERLAYS, HEAT_MAPS)
        self.is_resumed = open_run(self.dir, INFERENCE, identity, own=own, overwrite=overwrite, can_continue=True)
        self.rows = _read_journal(self.dir / JOURNAL) if self.is_resumed else {}
        if self.is_resumed and self.csv_path.exists() and not _is_written_from(self.rows, self.csv_path):
            raise ConfigError(
                f"output.csv is {self.csv_path}, which exists and holds nothing of the run in {self.dir}; give another "
                "file, or move it away: it is written anew from that run"
            )
        self._journal: TextIO | None = None
        self._csv: TextIO | None = None

    def __enter__(self) -> EvidenceFolder:
        for folder in (self.dir / OVERLAYS, self.dir / HEAT_MAPS, self.csv_path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())
        write_atomically(self.dir / JOURNAL, [lines.encode()])
        text = "\ufeff" + _csv_text(list(self.rows.values()), has_header=True)
        write_atomically(self.csv_path, [text.encode()])
        self._journal = (self.dir / JOURNAL).open("a", encoding="utf-8")
        self._csv = self.csv_path.open("a", encoding="utf-8", newline="")
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._journal, self._csv):
            if stream is not None:
                stream.close()

    def named_as_before(self, images: Mapping[str, str]) -> dict[str, str]:
        """Files by id, those that have a row under its id, however the folders are named or ordered this time.

        A row whose file is gone stands for the file that has its id now: the folder was moved.

        Args:
            images: file by id, as this run alone would call them.

        Raises:
            ConfigError: an id belongs to a file of another folder, whose pictures would be replaced.
        """
        rows = {os.path.abspath(row["image_path"]): name for name, row in self.rows.items()}
        asked = {os.path.abspath(path) for path in images.values()}
        found: dict[str, str] = {}
        for name, path in images.items():
            own = rows.get(os.path.abspath(path))
            row = self.rows.get(name)
            if own is None and row is not None and (before := row["image_path"]) != path and os.path.isfile(before):
                if os.path.abspath(before) not in asked:
                    raise ConfigError(
                        f"{self.dir} holds the results of {before} under the id '{name}', which {path} would have "
                        "too; give another output.evidence_dir and output.csv, name both folders, or add --overwrite"
                    )
                own = Path(path).as_posix()
            found[own or name] = path
        return found

    def pending(self, stamps: Mapping[str, list[int] | None]) -> list[str]:
        """Ids that have no row yet, or whose row holds an error or another file; such rows are dropped.

        Args:
            stamps: `file_stamp` of each image's file, by id.
        """
        todo = [
            name
            for name, stamp in stamps.items()
            if (row := self.rows.get(name)) is None or row["error"] or row["stamp"] != stamp
        ]
        for name in todo:
            self.rows.pop(name, None)
        return todo

    def save_pictures(self, image_id: str, overlay: UInt8, mask_scores: Any) -> tuple[str, str | None]:
        """Write overlay and heat map (8-bit PNG, score times 255); their paths below the evidence folder.

        Heads without a map have no heat map: None.
        """
        name = picture_name(image_id)
        paths = f"{OVERLAYS}/{name}", f"{HEAT_MAPS}/{name}"
        try:
            Image.fromarray(overlay).save(self.dir / paths[0])
            if mask_scores is not None:
                save_mask_png(mask_scores, self.dir / paths[1])
        except OSError as error:
            raise _unwritable(self.dir / paths[0], error) from error
        return paths[0], None if mask_scores is None else paths[1]

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the row of one image, to the journal first; `row` has every key of `CSV_COLUMNS`, `prompt`, `stamp`."""
        assert self._journal is not None, "use EvidenceFolder as a context manager"
        assert self._csv is not None
        self.rows[row["id"]] = dict(row)
        try:
            self._journal.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._journal.flush()
            self._csv.write(_csv_text([row]))
            self._csv.flush()
        except OSError as error:
            raise _unwritable(self.csv_path, error) from error


def failed_row(image_id: str, path: str, stamp: list[int] | None, error: str) -> dict[str, Any]:
    """The row of an image that could not be inspected."""
    empty = dict.fromkeys((*CSV_COLUMNS, "prompt"))
    return {**empty, "id": image_id, "image_path": path, "stamp": stamp, "error": error}


def file_stamp(path: str) -> list[int] | None:
    """Size and time of change of a file, by which a resumed run notices another one; None without a file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def picture_name(image_id: str) -> str:
    """Name of an image's pictures, its own whatever else is in the folder: `a.png` of `a.png`, `a.jpg.png` of `a.jpg`.

    `a.jpg.png`, if there should be one, gets a hash.
    """
    path = Path(image_id)
    if path.suffix.lower() != ".png":
        return f"{file_stem(image_id)}.png"
    stem = file_stem(image_id[: -len(path.suffix)])
    is_plain = stem == path.stem and path.suffix == ".png" and not Path(stem).suffix
    return f"{stem}.png" if is_plain else f"{stem}-{_short_hash(image_id)}.png"


def file_stem(image_id: str) -> str:
    """A file name that is the image's own whatever else is in the folder: its id, with a hash where letters change."""
    stem = re.sub(r"[^\w.-]+", "_", image_id.replace("/", "__"))[:100].strip(".") or "image"
    if stem == image_id:
        return stem
    return f"{stem}-{_short_hash(image_id)}"


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


def _csv_text(rows: list[Any], *, has_header: bool = False) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    if has_header:
        writer.writerow(CSV_COLUMNS)
    for row in rows:
        writer.writerow(["" if row[name] is None else _cell(row[name]) for name in CSV_COLUMNS])
    return stream.getvalue()


def _is_written_from(rows: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Whether a CSV is the table of this journal, as far as either got: its header, and a row that both have."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    try:
        header, *found = [tuple(line) for line in csv.reader(io.StringIO(text, newline=""))] or [()]
    except csv.Error:  # no table at all
        return False
    own = {tuple(line) for line in csv.reader(io.StringIO(_csv_text(list(rows.values())), newline=""))}
    return not text or (header == CSV_COLUMNS and (not own or not found or not own.isdisjoint(found)))


def _cell(value: Any) -> Any:
    """Lists as JSON; text without the characters a CSV file cannot hold."""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return value.replace("\0", "") if isinstance(value, str) else value


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by id, a later row in place of an earlier one; what an interruption left of the last line is dropped."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines[:-1], start=1):  # the last piece is empty, or a line that was not finished
        try:
            row = json.loads(line)
            rows[row["id"]] = {**dict.fromkeys((*CSV_COLUMNS, "prompt", "stamp")), **row}
        except (ValueError, KeyError, TypeError) as error:
            raise DataFormatError(
                "the journal of the earlier run cannot be read",
                source=f"{path.name}:{number}",
                found=str(path),
                fix="start again with --overwrite",
            ) from error
    return rows


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written: {error.strerror or error}; free space or rights, then run it again")
