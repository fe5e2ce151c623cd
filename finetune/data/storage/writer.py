"""Writes one split of a data set, as JSONL or Parquet, so that an interrupted run can continue where it stopped.

Shards appear whole or not at all; which are finished, and how many source records they account for, stands in
`.writing/` until the split is complete and then in the manifest. Encoding is done elsewhere (encoding.prepare_payload).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from finetune.data.storage.atomic import TEMPORARY_SUFFIX, file_pieces, file_sha256, move_durably, write_atomically
from finetune.data.storage.encoding import Blob, EncodedRecord, ImageOptions, prepare_payload, zero_mask_png
from finetune.data.storage.jsonl import LIST_SUFFIX, JsonlPartWriter
from finetune.data.storage.manifest import Counts, SetInfo, Shard, add_split, read_manifest, total
from finetune.data.storage.parquet import ParquetFileWriter
from finetune.data.storage.serialization import json_text, record_to_json
from finetune.data.storage.state import (
    FILES_PER_FOLDER,
    WORK_DIR,
    check_settings,
    load_state,
    refuse_strangers,
    remove_leftovers,
    remove_split,
    save_state,
    shard_problem,
    state_path,
)
from finetune.errors import ConfigError, DataFormatError, ForensicsError
from finetune.schema import ImageInput, Record

SHARD_BYTES = 256 * 2**20
GROUP_BYTES = 2**20
"""What is read to get one sample at random: about a millisecond's worth."""
GROUP_ROWS = 256
"""Enough that of small images too the bytes decide: every row group costs 10 kB of memory in each open file."""

Storage = Literal["jsonl", "parquet"]


def open_writer(
    out_dir: str | os.PathLike[str],
    split: str,
    storage: Storage = "jsonl",
    images: ImageOptions | None = None,
    *,
    info: SetInfo | None = None,
    shard_bytes: int = SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    verify: Literal["hash", "size"] = "hash",
) -> SplitWriter:
    """A writer for one split; several splits may share a folder, one process at a time.

    Args:
        out_dir: made if need be.
        split: letters, digits and `_`.
        storage: "parquet" holds the images inside; "jsonl" has them in files below `out_dir`.
        images: how they are stored; copied byte for byte by default.
        info: seed, configuration hash and sources, for the manifest.
        shard_bytes: a shard ends with the record that reaches this; what is lost at most by an interruption.
        resume: continue an interrupted run: the caller starts with source record `writer.next_source`.
        overwrite: remove an earlier result of this split first.
        verify: how finished shards are checked on resuming.

    Raises:
        ConfigError: options that cannot be used, a split that is there already, or one begun with other settings.
        ForensicsError: the folder cannot be written.
    """
    options = images or ImageOptions()
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise ConfigError(f"split name '{split}'; expected letters, digits and _ (datasets allows nothing else)")
    if storage not in ("jsonl", "parquet"):
        raise ConfigError(f"storage is '{storage}'; expected jsonl or parquet")
    if storage == "parquet" and options.mode == "reference":
        raise ConfigError("Parquet holds the images inside; images.mode 'reference' is for storage: jsonl")
    if shard_bytes < 1 or (resume and overwrite):
        raise ConfigError("expected shard_bytes of at least 1, and resume or overwrite, not both")
    folder = Path(out_dir)
    info = info or SetInfo()
    settings = {
        "storage": storage,
        "images": {key: value for key, value in asdict(options).items() if key != "is_checked"},
        "shard_bytes": shard_bytes,
        "group": [GROUP_ROWS, GROUP_BYTES],
        "seed": info.seed,
        "config_hash": info.config_hash,
    }
    try:
        shards, is_complete = _begin(folder, split, settings, resume, overwrite, verify == "hash")
    except OSError as error:
        raise _storage_error(error, folder, 0) from error
    return SplitWriter(folder, split, storage, options, info, settings, shards, is_complete)


def _begin(
    folder: Path, split: str, settings: dict[str, Any], resume: bool, overwrite: bool, use_hashes: bool
) -> tuple[list[Shard], bool]:
    """(finished shards, whether they are all of the split); the folder is ready for the next one."""
    unfinished = state_path(folder, split)
    unfinished.with_name(unfinished.name + TEMPORARY_SUFFIX).unlink(missing_ok=True)
    manifest = read_manifest(folder)
    others = {name: entry for name, entry in manifest["splits"].items() if name != split} if manifest else {}
    if manifest and others and manifest["storage"] != settings["storage"]:
        raise ConfigError(f"{folder} holds {manifest['storage']} splits; write {settings['storage']} to another folder")
    if manifest and resume and split in manifest["splits"] and not unfinished.exists():
        check_settings(manifest["settings"], settings, split)
        shards = [Shard.from_json(shard) for shard in manifest["splits"][split]["shards"]]
        for shard in shards:
            if problem := shard_problem(folder, shard, use_hashes=use_hashes):
                raise DataFormatError(problem, source=str(folder), fix="make the split again with overwrite")
        return shards, True
    if overwrite:
        remove_split(folder, split)
    if resume and unfinished.exists():
        shards = load_state(folder, split, settings, use_hashes=use_hashes)
        remove_leftovers(folder, split, shards)
    else:
        refuse_strangers(folder, split)
        shards = []
    (folder / WORK_DIR).mkdir(parents=True, exist_ok=True)
    save_state(folder, split, shards, settings)
    return shards, False


class SplitWriter:
    """Writes the records of one split in order; a context manager, which keeps an unfinished split for a later resume.

    Attributes:
        next_source: how many records of the source are accounted for: the first one to write has this index.
        counts: what is in the finished shards and the open one.
        is_complete: nothing is left to write (a resumed run had ended).
    """

    def __init__(
        self,
        out_dir: Path,
        split: str,
        storage: Storage,
        options: ImageOptions,
        info: SetInfo,
        settings: dict[str, Any],
        shards: list[Shard],
        is_complete: bool,
    ) -> None:
        self.out_dir, self.split, self.storage, self.options = out_dir, split, storage, options
        self.is_complete = is_complete
        self.shards = shards
        self.next_source = shards[-1].source_end if shards else 0
        self._info, self._settings = info, settings
        self._num_written = sum(shard.rows for shard in shards)
        self._file: ParquetFileWriter | JsonlPartWriter | None = None
        self._file_bytes = 0
        self._file_counts = Counts()
        self._is_aborted = False

    @property
    def counts(self) -> Counts:
        """Records and images written so far."""
        return total([*self.shards, Shard("", 0, 0, "", 0, self._file_counts)])

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, record: Record, payload: EncodedRecord | None = None, source_index: int | None = None) -> None:
        """Append one record.

        Args:
            record: as read.
            payload: `prepare_payload(record, options)`, made here if None.
            source_index: its number in the source, from 0, where not every source record comes to this split; never
                falling. By default the number of records written.

        Raises:
            DataFormatError: an image or mask that cannot be used; the writer goes on.
            ForensicsError: the disk is full: the open shard is dropped, finished ones are kept.
        """
        if self.is_complete:
            raise ConfigError(f"split '{self.split}' in {self.out_dir} is complete; use overwrite to make it again")
        if self._is_aborted:
            raise ValueError("the writer was aborted; open it again with resume")
        index = self.next_source if source_index is None else source_index
        if index < self.next_source:
            raise ValueError(f"source record {index} after {self.next_source - 1}")
        payload = payload or prepare_payload(record, self.options)
        stored, files = self._named(record, payload)
        fields = record_to_json(stored, self.out_dir)
        line = json_text(fields, record)
        try:
            self._append(fields, line, files, stored, payload.num_bytes)
            self._num_written += 1
            self._file_counts.add(record)
            self._file_bytes += len(line) + payload.num_bytes
            self.next_source = index + 1
            if self._file_bytes >= self._settings["shard_bytes"]:
                self._finish_shard()
        except OSError as error:
            raise self._given_up(error) from error

    def close(self) -> None:
        """Finish the last shard, give a JSONL split its one file, and enter the split into the manifest.

        Raises:
            ForensicsError: the disk is full; finished shards are kept for a resume.
        """
        if self.is_complete:
            return
        try:
            if self._file is not None:
                self._finish_shard()
            shards = self._joined_parts() if self.storage == "jsonl" else self.shards
            add_split(self.out_dir, self.split, self.storage, shards, self._info, self._settings)
            self._remove_work_files()
        except OSError as error:
            raise self._given_up(error) from error
        self.is_complete = True

    def abort(self) -> None:
        """Drop the open shard; the finished ones stay for a resume."""
        self._is_aborted = True
        if self._file is not None:
            self._file.abort()
            self._file = None

    def _append(
        self, fields: dict[str, Any], line: str, files: list[tuple[str, bytes]], stored: Record, num_bytes: int
    ) -> None:
        if self._file is None:
            self._open_shard()
        if isinstance(self._file, JsonlPartWriter):
            self._file.add(line, files)
        elif self._file is not None:
            self._file.add(_parquet_row(fields, dict(files), stored), len(line) + num_bytes)

    def _named(self, record: Record, payload: EncodedRecord) -> tuple[Record, list[tuple[str, bytes]]]:
        """The record with the paths its files will have, and those files as (name below the folder, bytes).

        Names are numbers: the name a file had in its source often tells its label.
        """
        files: list[tuple[str, bytes]] = []

        def name(kind: str, index: int, blob: Blob) -> str:
            number = f"-{index}" if len(payload.images) > 1 else ""
            folder = f"{self._num_written // FILES_PER_FOLDER:05d}"
            text = f"{kind}/{self.split}/{folder}/{self._num_written:08d}{number}{blob.suffix}"
            files.append((text, blob.data))
            return os.path.join(self.out_dir, *text.split("/"))

        images = [
            image if blob is None else ImageInput(path=name("images", k, blob))
            for k, (image, blob) in enumerate(zip(record.images, payload.images, strict=True))
        ]
        targets = [
            target if blob is None else replace(target, mask_path=name("masks", k, blob))
            for k, (target, blob) in enumerate(zip(payload.targets, payload.masks, strict=True))
        ]
        return replace(record, images=tuple(images), targets=tuple(targets)), files

    def _open_shard(self) -> None:
        stem = f"{self.split}-{len(self.shards):05d}"
        work_dir = self.out_dir / WORK_DIR
        if self.storage == "parquet":
            self._file = ParquetFileWriter(work_dir / f"{stem}.parquet", GROUP_ROWS, GROUP_BYTES)
        else:
            self._file = JsonlPartWriter(work_dir / f"{stem}.jsonl.tmp", self.out_dir)

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        name = self._file.path.name.removesuffix(".tmp")
        path = self.out_dir / name if self.storage == "parquet" else self.out_dir / WORK_DIR / name
        digest, num_bytes = file_sha256(self._file.path), self._file.path.stat().st_size
        if isinstance(self._file, JsonlPartWriter):
            move_durably(self._file.list_path, path.with_suffix(LIST_SUFFIX))
        move_durably(self._file.path, path)
        file = path.relative_to(self.out_dir).as_posix()
        rows = self._file_counts.records
        self.shards.append(Shard(file, rows, num_bytes, digest, self.next_source, self._file_counts))
        self._file, self._file_bytes, self._file_counts = None, 0, Counts()
        save_state(self.out_dir, self.split, self.shards, self._settings)

    def _joined_parts(self) -> list[Shard]:
        """One file of all lines and one of all hashes; the entry of the former. Nothing where there is no record."""
        if not self.shards:
            return []
        parts = [self.out_dir / shard.file for shard in self.shards]
        lines, hashes = self.out_dir / f"{self.split}.jsonl", self.out_dir / f"{self.split}{LIST_SUFFIX}"
        write_atomically(lines, _all_pieces(parts))
        if self.options.mode != "reference":
            write_atomically(hashes, _all_pieces([part.with_suffix(LIST_SUFFIX) for part in parts]))
        return [
            Shard(
                lines.name,
                sum(shard.rows for shard in self.shards),
                lines.stat().st_size,
                file_sha256(lines),
                self.shards[-1].source_end,
                self.counts,
            )
        ]

    def _remove_work_files(self) -> None:
        state_path(self.out_dir, self.split).unlink()  # first: without it the manifest holds
        work_dir = self.out_dir / WORK_DIR
        for path in work_dir.glob(f"{self.split}-[0-9]*"):
            path.unlink()
        if not any(work_dir.iterdir()):
            work_dir.rmdir()

    def _given_up(self, error: OSError) -> ForensicsError:
        self.abort()
        return _storage_error(error, self.out_dir, len(self.shards))


def _all_pieces(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        yield from file_pieces(path)


def _parquet_row(fields: dict[str, Any], files: dict[str, bytes], stored: Record) -> dict[str, Any]:
    """A row of `parquet.arrow_schema` from the native object: structs with the files' bytes in place of their names."""
    masks: list[dict[str, Any] | None] = []
    for text, target in zip(fields["masks"], stored.targets, strict=True):
        if text is None:
            masks.append(None)
        elif target.mask_path is not None:
            masks.append({"bytes": files[text], "path": text})
        else:
            assert target.mask_size_hw is not None
            masks.append({"bytes": zero_mask_png(target.mask_size_hw, stored), "path": text})
    return fields | {
        "images": [{"bytes": files[text], "path": text} for text in fields["images"]],
        "masks": masks,
        "provenance": json_text(fields["provenance"], stored),
    }


def _storage_error(error: OSError, folder: Path, num_shards: int) -> ForensicsError:
    reason = error.strerror or str(error).splitlines()[0]
    return ForensicsError(
        f"{folder}: cannot write ({reason}); {num_shards} finished shards are kept; free space or correct the "
        "permissions, then continue with resume"
    )
