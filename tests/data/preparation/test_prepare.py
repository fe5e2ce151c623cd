"""Preparation: nothing is lost, splits are disjoint, workers and interruptions do not change a byte of the result."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.cli import main
from finetune.config import load_config
from finetune.data.audit.run import find_sources, run_audit
from finetune.data.audit.writing import summary_lines
from finetune.data.preparation.config import PrepareConfig, PrepareSource
from finetune.data.preparation.prepare import prepare
from finetune.data.readers import scan_records
from finetune.errors import ConfigError, DataFormatError

MakeSource = Callable[..., Path]
RUN = """
import sys
from finetune.config import load_config
from finetune.data.preparation.config import PrepareConfig
from finetune.data.preparation.prepare import prepare
if __name__ == "__main__":
    prepare(load_config(sys.argv[1], [], PrepareConfig), progress=False)
"""


def picture(seed: int, side: int = 208) -> Image.Image:
    """A picture like no other: random patches, with noise that keeps its PNG above 100 kB."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 200, (13, 13, 3), dtype=np.uint8).repeat(side // 13, 0).repeat(side // 13, 1)
    return Image.fromarray(patches + rng.integers(0, 40, patches.shape, dtype=np.uint8))


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """`make_source(count, name)`: a JSONL file with images and masks; record k is tampered where k is odd."""

    def make(count: int = 24, name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for k in range(count):
            picture(zlib.crc32(name.encode()) + k).save(folder / f"{k}.png")
            mask: str = "208x208"
            if k % 2:
                marks = np.zeros((208, 208), np.uint8)
                marks[20:90, 30:120] = 255
                mask = f"{k}_mask.png"
                Image.fromarray(marks).save(folder / mask)
            lines.append(
                {"id": f"r{k}", "group": f"scene{k // 2}", "images": [f"{k}.png"], "labels": [k % 2], "masks": [mask]}
            )
        path = folder / "list.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return make


def config_for(out_dir: Path, *sources: Path, **changes: Any) -> PrepareConfig:
    return PrepareConfig(
        out_dir=str(out_dir), sources=[PrepareSource(str(source)) for source in sources], workers=1, **changes
    )


def run(config: PrepareConfig, **options: Any) -> Any:
    return prepare(config, progress=False, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def records_of(out_dir: Path) -> list[Any]:
    return [r for split in ("train", "val", "test") for r in _read(out_dir / f"{split}")]


def _read(path: Path) -> list[Any]:
    records, errors = scan_records(path)
    assert all("empty" in str(error) or "no record" in str(error) for error in errors)
    return records


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_every_record_comes_out_in_the_split_of_its_group(
    tmp_path: Path, make_source: MakeSource, storage: Any
) -> None:
    source = make_source()
    done = run(config_for(tmp_path / "out", source, storage=storage))
    found = records_of(tmp_path / "out")
    assert sorted(record.id for record in found) == sorted(f"r{k}" for k in range(24))
    assert sum(done.written.values()) == 24
    assert done.rejected == 0
    splits = {split: {r.group for r in _read(tmp_path / "out" / split)} for split in ("train", "val", "test")}
    assert not splits["train"] & splits["test"]
    assert not splits["train"] & splits["val"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert sum(entry["records"] for entry in manifest["splits"].values()) == 24
    assert not (tmp_path / "out" / ".writing").exists()


@pytest.mark.parametrize("rule", ["group", "parent"])
def test_a_set_is_divided_alike_wherever_it_lies(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Records without a group, read by a relative path, an absolute one, and after the folder was moved: same bytes."""
    source = make_source(12)
    lines = []
    for k, line in enumerate(map(json.loads, source.read_text("utf-8").splitlines())):
        (source.parent / f"scene{k // 3}").mkdir(exist_ok=True)
        (source.parent / f"{k}.png").rename(source.parent / f"scene{k // 3}" / f"{k}.png")
        lines.append({**line, "images": [f"scene{k // 3}/{k}.png"], "group": None})
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.chdir(source.parent)
    found = []
    for name, place in (
        ("as_said", Path("list.jsonl")),
        ("absolute", source),
        ("moved", tmp_path / "m" / "list.jsonl"),
    ):
        if name == "moved":
            monkeypatch.chdir(tmp_path)
            source.parent.rename(tmp_path / "m")
        config = load_config(None, [], PrepareConfig)
        config.out_dir, config.workers, config.sources = str(tmp_path / name), 1, [PrepareSource(str(place))]
        config.splits.ratios, config.splits.group_by = {"train": 0.6, "test": 0.4}, rule
        run(config)
        found.append(tree(tmp_path / name))
        del found[-1]["manifest.json"]  # its fingerprint of the sources knows their paths
    assert found[0] == found[1] == found[2]
    groups = {record.group for split in ("train", "test") for record in _read(tmp_path / "moved" / split)}
    assert groups == (
        {f"scene{k}" for k in range(4)} if rule == "parent" else {f"image:scene{k // 3}/{k}.png" for k in range(12)}
    )


def test_the_number_of_workers_changes_nothing(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(20)
    one = config_for(tmp_path / "one", source, storage="parquet")
    two = config_for(tmp_path / "two", source, storage="parquet")
    two.workers = 2
    run(one)
    run(two)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_first_unusable_record_stops_before_anything_is_written(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(6)
    lines = source.read_text().splitlines()
    lines[3] = '{"id": "odd", "images": ["3.png"], "labels": ["fake"]}'
    source.write_text("\n".join(lines))
    with pytest.raises(DataFormatError, match=r"list\.jsonl:4.*labels"):
        run(config_for(tmp_path / "out", source))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_skipped_records_are_counted_and_listed(tmp_path: Path, make_source: MakeSource, storage: Any) -> None:
    source = make_source(12)
    lines = source.read_text().splitlines()
    lines[3] = '{"id": "odd", "images": ["3.png"], "labels": ["fake"]}'
    lines[4] = "{damaged"
    source.write_text("\n".join(lines))
    (source.parent / "7.png").write_bytes((source.parent / "7.png").read_bytes()[:5000])  # truncated
    (source.parent / "8.png").write_bytes(b"")
    done = run(config_for(tmp_path / "out", source, storage=storage, on_error="skip"))
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert done.rejected == len(rejected) == 4
    assert f"8 records written to {tmp_path / 'out'} (train " in done.lines()[-1]
    assert [entry["index"] for entry in rejected] == [3, 4, 7, 8]
    assert [entry["source"] for entry in rejected] == [f"list.jsonl:{line}" for line in (4, 5, 8, 9)]
    assert rejected[0]["field"] == "labels[0]"
    assert rejected[0]["found"] == "'fake'"
    assert "truncated" in rejected[2]["problem"]
    assert "0 bytes" in rejected[3]["problem"]
    assert sorted(r.id for r in records_of(tmp_path / "out")) == sorted(f"r{k}" for k in (0, 1, 2, 5, 6, 9, 10, 11))


def test_stop_names_the_broken_image(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(6)
    (source.parent / "2.png").write_bytes(b"")
    with pytest.raises(DataFormatError, match=r"record 'r2' \(list\.jsonl:3\).*0 bytes"):
        run(config_for(tmp_path / "out", source))


def test_the_same_picture_in_two_splits_is_an_error(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(40)
    first = run(config_for(tmp_path / "first", source))
    assert first.overlaps == ()
    train, test = _read(tmp_path / "first" / "train")[0].id, _read(tmp_path / "first" / "test")[0].id
    original = Image.open(source.parent / f"{train[1:]}.png")
    original.resize((130, 130)).resize((208, 208)).save(source.parent / f"{test[1:]}.png")  # a rescaled copy
    with pytest.raises(DataFormatError, match="pictures that look the same") as caught:
        run(config_for(tmp_path / "out", source))
    assert train in str(caught.value)
    assert test in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    config = config_for(tmp_path / "out", source)
    config.splits.on_overlap = "warn"
    (overlap,) = run(config).overlaps
    assert overlap.startswith("pictures that look the same: ")


def test_several_sources_keep_their_own_division_and_names(tmp_path: Path, make_source: MakeSource) -> None:
    a, b = make_source(8, "a"), make_source(8, "b")
    config = config_for(tmp_path / "out", a, b)
    with pytest.raises(ConfigError, match=r"both called 'list'"):
        run(config)
    config.sources[0].name, config.sources[1].name = "a", "b"
    config.sources[1].split = "test"
    with pytest.raises(DataFormatError, match="records of one group"):  # scene0 of both may be one scene
        run(config)
    config.sources[1].own_groups = True
    run(config, overwrite=True)
    assert {f"b/r{k}" for k in range(8)} <= {record.id for record in _read(tmp_path / "out" / "test")}


def test_a_hold_out_list_is_obeyed(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(24)
    (tmp_path / "held.txt").write_text("# scenes\nscene3\n10.png\nnothing*\n")
    config = config_for(tmp_path / "out", source)
    config.splits.holdout_list = str(tmp_path / "held.txt")
    done = run(config)
    assert {"r6", "r7", "r10", "r11"} <= {record.id for record in _read(tmp_path / "out" / "test")}
    assert any("nothing*" in warning for warning in done.splits.warnings)


def test_a_log_tells_how_far_it_is(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard error is no terminal here: lines instead of a bar, of preparing and of the audit behind it."""
    monkeypatch.setattr("finetune.progress.LINE_SECONDS", 0.0)
    (tmp_path / "c.yaml").write_text(
        f"out_dir: {tmp_path / 'out'}\nsources: [{{path: {make_source(8)}}}]\nworkers: 1\n"
    )
    assert main(["prepare", "--config", str(tmp_path / "c.yaml")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert next(line for line in reversed(lines) if line.startswith("prepare:")).startswith("prepare: 100%")
    assert any(line.startswith("audit: 8record") for line in lines)


def test_a_killed_preparation_goes_on_to_the_same_bytes(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(60)
    (source.parent / "5.png").write_bytes(b"")
    yaml = f"sources: [{{path: {source}}}]\nstorage: parquet\nshard_megabytes: 1\non_error: skip\nworkers: 1\n"
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(f"out_dir: {tmp_path / name}\n{yaml}")
    run(load_config(tmp_path / "whole.yaml", [], PrepareConfig))
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "killed.yaml")])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("train-00001.parquet")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    monkeypatch.setattr("finetune.progress.LINE_SECONDS", 0.0)
    done = prepare(load_config(tmp_path / "killed.yaml", [], PrepareConfig))
    bar = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare:")]
    counts = [int(re.search(r"(\d+)/60", line)[1]) for line in bar]  # type: ignore[index]
    assert counts == sorted(counts)
    assert counts[-1] == 60
    assert done.num_done_before > 0
    assert done.rejected == 1
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_changed_data_are_not_mixed_into_an_interrupted_set(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(8)
    (source.parent / "7.png").write_bytes(b"")
    with pytest.raises(DataFormatError):
        run(config_for(tmp_path / "out", source))
    lines = source.read_text().splitlines()
    source.write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match="config_hash"):
        run(config_for(tmp_path / "out", source, on_error="skip"))
    run(config_for(tmp_path / "out", source, on_error="skip"), overwrite=True)
    assert len(records_of(tmp_path / "out")) == 6


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_files_that_changed_since_the_interruption_are_noticed(
    tmp_path: Path, make_source: MakeSource, kind: str
) -> None:
    source = make_source(40)
    whole = (source.parent / "38.png").read_bytes()
    (source.parent / "38.png").write_bytes(b"")
    config = config_for(tmp_path / "out", source, storage="parquet", shard_megabytes=1)
    with pytest.raises(DataFormatError, match="0 bytes"):
        run(config)
    done = json.loads((tmp_path / "out" / ".writing" / "train.json").read_text())["shards"][0]
    assert done["rows"] > 1
    (source.parent / "38.png").write_bytes(whole)
    ledger = [json.loads(line) for line in (tmp_path / "out" / ".writing" / "ledger.jsonl").read_text().splitlines()]
    settled = [e["id"] for e in ledger if e["split"] == "train" and e["index"] < done["source_end"]]
    number = next(int(name[1:]) for name in settled if int(name[1:]) % 2)
    file = source.parent / (f"{number}.png" if kind == "image" else f"{number}_mask.png")
    before, times = file.read_bytes(), file.stat()
    marks = np.zeros((208, 208), np.uint8)
    marks[:10] = 255
    (picture(999) if kind == "image" else Image.fromarray(marks)).save(file)
    with pytest.raises(DataFormatError, match=rf"1 finished records changed.*r{number} \(list.jsonl.*--overwrite"):
        run(config)
    file.write_bytes(before)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # put back with its time: the run goes on
    assert run(config).num_done_before > 0
    run(config_for(tmp_path / "again", source, storage="parquet", shard_megabytes=1))
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_everyone_counts_images_by_label(tmp_path: Path, make_source: MakeSource) -> None:
    """A record of a real, a tampered and an unlabelled image is one of each: in the lines, the manifest, the audit."""
    source = make_source(6)
    lines = [
        {
            "id": f"c{k}",
            "group": f"scene{k}",
            "images": [f"{3 * k + place}.png" for place in range(3)],
            "labels": [0, 1, None],
            "messages": [{"role": "user", "content": "<image>" * 3}, {"role": "assistant", "content": "x"}],
        }
        for k in range(2)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = config_for(tmp_path / "out", source)
    config.splits.ratios = {"train": 1.0}
    counted = "6 images: 2 real, 2 tampered, 2 without label"
    assert run(config).lines()[0] == f"train: 2 records (100.0%) in 2 groups, {counted}"
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]
    assert [stored[key] for key in ("images", "authentic", "tampered", "unlabelled")] == [6, 2, 2, 2]
    audit = run_audit(find_sources([str(tmp_path / "out")]), progress=False)
    assert summary_lines(audit)[0] == f"train: 2 records in 2 groups, {counted}"


def test_the_manifest_says_what_each_source_was(tmp_path: Path, make_source: MakeSource) -> None:
    """The recognised format, not `auto`; a hash of the file, or of the listing of a folder of images."""
    mixed, folder = make_source(4, "mixed"), tmp_path / "casia"
    lines = mixed.read_text().splitlines()
    lines[3] = json.dumps({"image_path": "3.png", "mask_path": "3_mask.png", "label": 1})
    mixed.write_text("\n".join(lines))
    for place in ("Au", "Tp", "CASIA 2 Groundtruth"):
        (folder / place).mkdir(parents=True)
    picture(901).save(folder / "Au" / "Au_ani_00001.png")
    picture(902).save(folder / "Tp" / "Tp_D_NRN_S_N_ani00002_nat00003_00004.png")
    marks = np.zeros((208, 208), np.uint8)
    marks[20:90] = 255
    Image.fromarray(marks).save(folder / "CASIA 2 Groundtruth" / "Tp_D_NRN_S_N_ani00002_nat00003_00004_gt.png")
    config = config_for(tmp_path / "out", mixed, folder)
    config.splits.ratios = {"train": 1.0}
    run(config)
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert [source["format"] for source in told] == ["annotation, messages", "folder: casia2"]
    assert told[0]["sha256"] == hashlib.sha256(mixed.read_bytes()).hexdigest()
    listing = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        listing.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
    assert told[1]["listing_sha256"] == listing.hexdigest()
    again = config_for(tmp_path / "second", tmp_path / "out" / "train")
    again.splits.ratios = {"train": 1.0}
    run(again)
    (stored,) = json.loads((tmp_path / "second" / "manifest.json").read_text())["sources"]
    assert (stored["format"], len(stored["sha256"])) == ("stored", 64)


def test_a_complete_set_is_not_made_again_unless_asked(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(8)
    run(config_for(tmp_path / "out", source))
    with pytest.raises(ConfigError, match="--overwrite"):
        run(config_for(tmp_path / "out", source))
    before = tree(tmp_path / "out")
    run(config_for(tmp_path / "out", source), overwrite=True)
    assert tree(tmp_path / "out") == before


def test_images_are_encoded_anew_with_their_masks(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(4)
    yaml = tmp_path / "p.yaml"
    yaml.write_text(
        f"out_dir: {tmp_path / 'out'}\nsources: [{{path: {source}}}]\nworkers: 1\nstorage: parquet\n"
        "images: {mode: reencode, quality: 85, max_size_hw: [112, 1024]}\n"
    )
    run(load_config(yaml, [], PrepareConfig))
    from finetune.data.images import load_image
    from finetune.data.masks import load_mask

    for record in records_of(tmp_path / "out"):
        assert load_image(record.images[0]).size == (112, 112)
        mask = load_mask(record.targets[0], (112, 112))
        assert mask is not None
        assert (mask.sum() > 0) == (record.label == 1)


def test_a_synth_section_is_made_and_divided(tmp_path: Path) -> None:
    config = PrepareConfig(out_dir=str(tmp_path / "out"), workers=1)
    config.synth = {"num_train": 12, "num_eval": 6, "num_val": 0, "workers": 1}
    config.splits.ratios = {"train": 1.0, "test": 0.0}
    run(config)
    assert len(_read(tmp_path / "out" / "train")) == 12
    assert len(_read(tmp_path / "out" / "test")) == 6
    config.synth["seed"] = 3
    with pytest.raises(ConfigError, match="another 'seed'"):
        run(config, overwrite=True)
    config.synth["seed"] = 0
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{number}.png")
    config.synth["photos_dir"] = str(tmp_path / "photos")
    with pytest.raises(ConfigError, match="made from other photographs"):
        run(config, overwrite=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_dir": ""}, "out_dir is empty"),
        ({"sources": []}, "no sources"),
        ({"workers": -1}, "workers"),
        ({"sources": [PrepareSource("x", split="dev")]}, "splits.ratios has train, val, test"),
        ({"sources": [PrepareSource("")]}, r"sources\[0\].path is empty"),
    ],
)
def test_mistakes_in_the_configuration_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = PrepareConfig(out_dir=str(tmp_path / "out"), sources=[PrepareSource("x.jsonl")])
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        run(config)
