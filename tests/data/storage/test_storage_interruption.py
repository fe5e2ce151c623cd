"""An interrupted run leaves no half file, keeps what it finished, and ends as if it had never been interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.data.readers import read_records
from finetune.data.storage import ImageOptions, SetInfo, iter_stored, open_writer, read_manifest
from finetune.errors import ConfigError, DataFormatError, ForensicsError
from finetune.schema import Record

# Writes the records of argv[2] into argv[1]; waits after record argv[4], or at each a little, until it is killed.
WRITE = """
import sys, time
from finetune.data.readers import read_records
from finetune.data.storage import open_writer
out, source, storage, stop_at, shard_bytes = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
with open_writer(out, "train", storage, shard_bytes=shard_bytes, resume=True) as writer:
    for index, record in enumerate(read_records(source)):
        if index >= writer.next_source:
            writer.write(record)
        if index == stop_at:
            print("waiting", flush=True)
            time.sleep(60)
        time.sleep(0.01 * (stop_at < 0))
"""
SHARD_BYTES = 9000


@pytest.fixture
def source(tmp_path: Path, make_records: Any) -> Path:
    """A data file of 40 records."""
    path = tmp_path / "source.jsonl"
    from finetune.data.storage import json_text, record_to_json

    records = make_records(40)
    path.write_text("".join(json_text(record_to_json(r, tmp_path), r) + "\n" for r in records), encoding="utf-8")
    return path


def write(out: Path, source: Path, storage: Any, **options: Any) -> None:
    with open_writer(out, "train", storage, shard_bytes=SHARD_BYTES, **options) as writer:
        for index, record in enumerate(read_records(source)):
            if index >= writer.next_source:
                writer.write(record)


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by its name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / ".writing" / "train.json").read_text())["shards"]


def kill_in_the_middle(out: Path, source: Path, storage: str, stop_at: int) -> None:
    command = [sys.executable, "-c", WRITE, str(out), str(source), storage, str(stop_at), str(SHARD_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, source: Path, storage: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write(whole, source, storage)
    for stop_at in (14, 27):  # twice
        kill_in_the_middle(killed, source, storage, stop_at)
        shards = finished(killed)
        assert 0 < shards[-1]["source_end"] <= stop_at + 1
        visible = sorted(path.name for path in killed.glob("train*"))
        assert visible == ([Path(shard["file"]).name for shard in shards] if storage == "parquet" else [])
        if storage == "parquet":  # what is there can be read
            assert sum(1 for _ in iter_stored(killed / "train-*.parquet")) == shards[-1]["source_end"]
    with open_writer(killed, "train", storage, shard_bytes=SHARD_BYTES, resume=True) as writer:
        records = read_records(source)
        assert 0 < writer.next_source < len(records)
        for record in records[writer.next_source :]:
            writer.write(record)
    assert tree(killed) == tree(whole)
    assert not (killed / ".writing").exists()


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_a_killed_run_at_any_moment_continues(tmp_path: Path, source: Path, storage: str) -> None:
    """Killed by the clock, so also within a shard's last steps."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write(whole, source, storage)
    command = [sys.executable, "-c", WRITE, str(killed), str(source), storage, "-1", str(SHARD_BYTES)]
    for attempt in range(3):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 20
            enough = 9 * (attempt + 1)
            while time.monotonic() < deadline and process.poll() is None:
                if len(list(killed.glob("images/train/*/*"))) + 9 * len(list(killed.glob("train-*"))) >= enough:
                    break
            process.kill()
    write(killed, source, storage, resume=True)
    assert tree(killed) == tree(whole)


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_an_exception_keeps_the_finished_shards(tmp_path: Path, source: Path, storage: Any) -> None:
    records = read_records(source)
    out = tmp_path / "set"

    def interrupted() -> None:
        with open_writer(out, "train", storage, shard_bytes=SHARD_BYTES) as writer:
            for record in records[:20]:
                writer.write(record)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert finished(out)
    assert [path.name for path in (out / ".writing").iterdir() if path.name.endswith((".tmp", ".parquet"))] == []
    write(out, source, storage, resume=True)
    write(tmp_path / "whole", source, storage)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_damaged_shard_is_written_again(tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "whole", source, "parquet")
    out = tmp_path / "set"
    kill_in_the_middle(out, source, "parquet", 27)
    second = out / finished(out)[1]["file"]
    data = bytearray(second.read_bytes())
    data[100] ^= 1
    second.write_bytes(data)
    with open_writer(out, "train", "parquet", shard_bytes=SHARD_BYTES, resume=True, verify="hash") as writer:
        assert "train-00001.parquet has other bytes than when it was written" in caplog.text
        assert len(writer.shards) == 1
        for record in read_records(source)[writer.next_source :]:
            writer.write(record)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_lost_picture_of_a_finished_part_is_written_again(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "whole", source, "jsonl")
    out = tmp_path / "set"
    kill_in_the_middle(out, source, "jsonl", 27)
    sorted(out.glob("images/train/*/*"))[1].unlink()
    with open_writer(out, "train", shard_bytes=SHARD_BYTES, resume=True, verify="size") as writer:
        assert writer.next_source == 0
        for record in read_records(source):
            writer.write(record)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_a_complete_split_has_nothing_left_to_do(tmp_path: Path, source: Path, storage: Any) -> None:
    out = tmp_path / "set"
    write(out, source, storage)
    before = tree(out)
    with open_writer(out, "train", storage, shard_bytes=SHARD_BYTES, resume=True) as writer:
        assert writer.is_complete
        assert writer.next_source == 40
        assert writer.counts.records == 40
        with pytest.raises(ConfigError, match="is complete; use overwrite"):
            writer.write(read_records(source)[0])
    assert tree(out) == before
    (out / ("train.jsonl" if storage == "jsonl" else "train-00001.parquet")).write_bytes(b"edited")
    with pytest.raises(DataFormatError, match=r"another size.*make the split again with overwrite"):
        open_writer(out, "train", storage, shard_bytes=SHARD_BYTES, resume=True)
    write(out, source, storage, overwrite=True)
    assert tree(out) == before


def test_several_splits_share_one_source(tmp_path: Path, source: Path) -> None:
    """Each split knows how far it came; the caller gives it the source records from there on."""
    records = read_records(source)

    def run(out: Path, stop_at: int | None) -> None:
        writers = {n: open_writer(out, n, "parquet", shard_bytes=SHARD_BYTES, resume=True) for n in ("train", "val")}
        first = min(writer.next_source for writer in writers.values())
        for index, record in enumerate(records[first:], start=first):
            if index == stop_at:
                for writer in writers.values():
                    writer.abort()
                return
            writer = writers["val" if index % 5 == 0 else "train"]
            if index >= writer.next_source:
                writer.write(record, source_index=index)
        for writer in writers.values():
            writer.close()

    run(tmp_path / "whole", None)
    for stop_at in (13, 30, None):
        run(tmp_path / "parts", stop_at)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_nothing_is_replaced_unless_asked(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "set"
    write(out, source, "jsonl")
    with pytest.raises(ConfigError, match=r"train\.jsonl is there already; continue the run with resume"):
        open_writer(out, "train")
    other = tmp_path / "other"
    (other / "images" / "train").mkdir(parents=True)
    for overwrite in (False, True):  # not made by a writer, so never removed
        with pytest.raises(ConfigError, match="is there already"):
            open_writer(other, "train", overwrite=overwrite)


@pytest.mark.parametrize(
    "changed", [{"images": ImageOptions("reencode")}, {"info": SetInfo(seed=1)}, {"shard_bytes": 123}]
)
def test_other_settings_are_not_mixed_into_a_begun_split(tmp_path: Path, source: Path, changed: dict[str, Any]) -> None:
    out = tmp_path / "set"
    kill_in_the_middle(out, source, "parquet", 14)
    with pytest.raises(ConfigError, match="was begun with"):
        open_writer(out, "train", "parquet", **{"shard_bytes": SHARD_BYTES, "resume": True, **changed})


# Runs out of room in the middle: the kernel refuses to let a file grow beyond the limit, as a full disk would.
FULL = """
import resource, sys
from finetune.data.readers import read_records
from finetune.data.storage import open_writer
from finetune.errors import ForensicsError
out, source, storage = sys.argv[1:4]
records = read_records(source)
try:
    with open_writer(out, "train", storage, shard_bytes=9000) as writer:
        for index, record in enumerate(records):
            if index == 20:
                resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
            writer.write(record)
except ForensicsError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_a_full_disk_is_one_line_and_keeps_the_finished_shards(tmp_path: Path, source: Path, storage: str) -> None:
    out = tmp_path / "set"
    command = [sys.executable, "-c", FULL, str(out), str(source), storage]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert "cannot write (File too large)" in line
    shards = finished(out)
    assert f"{len(shards)} finished shards are kept" in line
    assert shards[-1]["source_end"] > 5
    write(out, source, storage, resume=True)
    write(tmp_path / "whole", source, storage)
    assert tree(out) == tree(tmp_path / "whole")


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ForensicsError, match="cannot write"):
        open_writer(tmp_path / "file" / "set", "train")


def test_a_bad_record_does_not_end_the_run(tmp_path: Path, source: Path) -> None:
    records: list[Record] = read_records(source)[:3]
    bad = tmp_path / "source" / "Tp_1.jpg"
    bad.write_bytes(b"")
    with open_writer(tmp_path / "set", "train", "parquet") as writer:
        writer.write(records[0])
        with pytest.raises(DataFormatError, match=r"record 'r1'.*empty \(0 bytes\)"):
            writer.write(records[1], source_index=1)
        writer.write(records[2], source_index=2)
    manifest = read_manifest(tmp_path / "set")
    assert manifest is not None
    assert manifest["splits"]["train"]["records"] == 2
    assert manifest["splits"]["train"]["source_records"] == 3
