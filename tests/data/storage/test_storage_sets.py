"""Both storages give back the records and the files that went in, to this project's reader and to `datasets`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from record_strategies import records

from finetune.data.containers import is_embedded, read_embedded
from finetune.data.images import load_image
from finetune.data.masks import load_mask
from finetune.data.readers import read_records
from finetune.data.storage import (
    ImageOptions,
    SetInfo,
    iter_stored,
    open_writer,
    read_manifest,
    stored_files,
    stored_hash,
)
from finetune.data.storage.parquet import FEATURES
from finetune.data.storage.serialization import COLUMNS
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import ImageInput, Record


def write(folder: Path, records: list[Record], split: str = "train", storage: Any = "jsonl", **options: Any) -> Path:
    with open_writer(folder, split, storage, **options) as writer:
        for record in records:
            writer.write(record)
    return folder


def read(path: Path | str) -> list[Record]:
    records = [record for _, _, record in iter_stored(path)]
    assert all(isinstance(record, Record) for record in records), records
    return records  # type: ignore[return-value]


def image_bytes(image: ImageInput) -> bytes:
    if image.path is None:
        return image.data or b""
    return read_embedded(image.path) if is_embedded(image.path) else Path(image.path).read_bytes()


def content(record: Record) -> Any:
    """Everything of a record, the bytes of its files in place of their names."""
    return (
        replace(
            record,
            images=tuple(ImageInput(data=image_bytes(image)) for image in record.images),
            targets=tuple(replace(target, mask_path=None) for target in record.targets),
            source="",
        ),
        [t.mask_path and image_bytes(ImageInput(path=t.mask_path)) for t in record.targets],
    )


@settings(max_examples=30, deadline=None)
@given(record=records())
def test_any_record_comes_back_from_both_storages(tmp_path_factory: pytest.TempPathFactory, record: Record) -> None:
    """Whatever is in its fields; the images are one small picture."""
    folder = tmp_path_factory.mktemp("any")
    Image.new("L", (3, 2)).save(folder / "p.png")
    picture = ImageInput(path=str(folder / "p.png"))
    targets = tuple(t if t.mask_path is None else replace(t, mask_path=picture.path) for t in record.targets)
    record = replace(record, images=(picture,) * len(record.images), targets=targets)
    for storage in ("jsonl", "parquet"):
        (again,) = read(write(folder / storage, [record], storage=storage, images=ImageOptions(is_checked=False)))
        assert content(again) == content(record)


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
@pytest.mark.parametrize("shard_bytes", [1, 5000, 10**9])
def test_records_and_files_come_back_equal(tmp_path: Path, make_records: Any, storage: str, shard_bytes: int) -> None:
    records = make_records(12)
    out = write(tmp_path / "set", records, storage=storage, shard_bytes=shard_bytes)
    again = read(out)
    assert [content(record) for record in again] == [content(record) for record in records]
    sizes = [(load_image(image).height, load_image(image).width) for image in again[2].images]
    assert sizes == [(40, 56)] * 2
    mask = load_mask(again[1].targets[0], (40, 56))
    assert mask is not None
    assert mask.sum() == 16 * 24


def test_the_jsonl_file_is_an_ordinary_data_file(tmp_path: Path, make_records: Any) -> None:
    out = write(tmp_path / "set", make_records(8))
    records = read_records(out / "train.jsonl")
    assert [content(record) for record in records] == [content(record) for record in read(out)]
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(tuple(line) == COLUMNS for line in lines)
    assert lines[0]["images"] == ["images/train/00000/00000000.jpg"]
    assert lines[2]["images"] == [f"images/train/00000/00000002-{k}.jpg" for k in (0, 1)]
    assert not (out / ".writing").exists()
    moved = out.rename(tmp_path / "moved")
    assert load_image(read_records(moved / "train.jsonl")[0].images[0]).size == (56, 40)


def test_hashes_are_as_sha256sum_checks_them(tmp_path: Path, make_records: Any) -> None:
    out = write(tmp_path / "set", make_records(4))
    done = subprocess.run(["sha256sum", "-c", "train.sha256"], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": OK") == 6


def test_both_storages_have_the_same_columns_and_values(tmp_path: Path, make_records: Any) -> None:
    """Opened by `datasets` itself; the JSONL has paths where the Parquet has pictures."""
    from datasets import Image as ImageFeature
    from datasets import List, load_dataset

    records = make_records(12)
    folders = {kind: write(tmp_path / kind, records, storage=kind, shard_bytes=9000) for kind in ("jsonl", "parquet")}
    cache = str(tmp_path / "cache")
    assert len(list(folders["parquet"].glob("train-*.parquet"))) > 1

    def opened(kind: str, how: str) -> Any:
        if how == "streamed folder":
            return load_dataset(str(folders[kind]), split="train", cache_dir=cache, streaming=True)
        if how == "folder":
            return load_dataset(str(folders[kind]), split="train", cache_dir=cache)
        files = str(folders[kind] / ("train.jsonl" if kind == "jsonl" else "train-*.parquet"))
        return load_dataset("json" if kind == "jsonl" else "parquet", data_files=files, split="train", cache_dir=cache)

    for how in ("files", "folder", "streamed folder"):
        lines, rows = opened("jsonl", how), opened("parquet", how)
        assert lines.column_names == rows.column_names == list(COLUMNS)
        assert rows.features["images"] == List(ImageFeature())
        raw = rows.cast_column("images", List(ImageFeature(decode=False)))
        raw = raw.cast_column("masks", List(ImageFeature(decode=False)))
        for line, row, bare, record in zip(lines, rows, raw, records, strict=True):
            for name in set(COLUMNS) - {"images", "masks"}:
                assert line[name] == row[name], (how, name)
            assert row["provenance"] == record.provenance
            assert row["labels"] == [target.label for target in record.targets]
            assert line["images"] == [cell["path"] for cell in bare["images"]]
            assert line["masks"] == [cell and cell["path"] for cell in bare["masks"]]
            for picture, cell, image in zip(row["images"], bare["images"], record.images, strict=True):
                assert isinstance(picture, Image.Image)
                assert np.array_equal(picture.convert("RGB"), load_image(image))
                assert (folders["jsonl"] / cell["path"]).read_bytes() == cell["bytes"] == image_bytes(image)
            for picture, target in zip(row["masks"], record.targets, strict=True):
                assert (picture is None) == (target.mask_path is None and target.mask_size_hw is None)
                if picture is not None:  # an HxW is a picture too: all zero, of that size
                    assert picture.size == (56, 40)
                    assert bool(np.asarray(picture).any()) == (target.label == 1)


def test_a_jsonl_set_whose_first_lines_know_nothing_opens_by_its_card(tmp_path: Path, make_records: Any) -> None:
    """Column types inferred from ten megabytes of nulls would not fit what follows; the card states them."""
    from datasets import load_dataset

    unlabelled, tampered = make_records(4)[3], make_records(4)[1]
    filler = replace(unlabelled, turns=(*unlabelled.turns, replace(unlabelled.turns[0], content="x" * 11_000_000)))
    out = write(tmp_path / "set", [filler, replace(tampered, turns=unlabelled.turns)], images=ImageOptions("reference"))
    loaded = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[1]["labels"] == [1]
    assert loaded[1]["provenance"]["operation"]["name"] == "splice"


def test_the_schema_is_what_datasets_writes() -> None:
    from datasets import Features, Json, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "id": Value("string"),
            "group": Value("string"),
            "images": List(ImageFeature()),
            "labels": List(Value("int64")),
            "masks": List(ImageFeature()),
            "polygons": List(List(List(List(Value("float64"))))),
            "evidence": List(Value("string")),
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "provenance": Json(),
        }
    )
    assert Features.from_dict(FEATURES) == features
    assert features.to_dict() == FEATURES


def test_a_set_saved_again_by_datasets_is_still_read(tmp_path: Path, make_records: Any) -> None:
    from datasets import load_dataset

    records = make_records(8)
    out = write(tmp_path / "set", records, storage="parquet")
    loaded = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    loaded.to_parquet(str(tmp_path / "again.parquet"))
    assert [content(record) for record in read(tmp_path / "again.parquet")] == [content(record) for record in records]


def test_splits_patterns_and_folders_name_their_files(tmp_path: Path, make_records: Any) -> None:
    records = make_records(6)
    out = write(tmp_path / "set", records[:4], storage="parquet", shard_bytes=1)
    assert [record.id for record in read(out)] == ["r0", "r1", "r2", "r3"]  # the only split
    write(out, records[4:], split="val", storage="parquet")
    for path in (out / "train-*.parquet", out / "train"):
        assert [record.id for record in read(path)] == ["r0", "r1", "r2", "r3"]
    assert [record.id for record in read(out / "train-00002.parquet")] == ["r2"]
    assert [path.name for path in stored_files(out / "val")] == ["val-00000.parquet"]
    with pytest.raises(
        DataFormatError, match=r"several splits.*expected train, val; fix: name one of them, e.g. .*train"
    ):
        stored_files(out)
    for missing in (out / "test", out / "test-*.parquet", tmp_path / "x.parquet"):
        with pytest.raises(DataFormatError, match="data file not found"):
            stored_files(missing)


def test_the_common_reader_reads_stored_sets(tmp_path: Path, make_records: Any) -> None:
    """By file, pattern and split; an id in two shards is found."""
    records = make_records(8)
    out = write(tmp_path / "set", records, storage="parquet", shard_bytes=7000)
    lines = write(tmp_path / "lines", records)
    expected = [content(record) for record in records]
    for path in (out / "train-*.parquet", out / "train", out, lines / "train", lines / "*.jsonl", lines):
        assert [content(record) for record in read_records(path)] == expected, path
    assert len(read_records(out / "train-00000.parquet")) < 8
    twice = write(tmp_path / "twice", [records[0], records[1], records[0]], storage="parquet", shard_bytes=1)
    with pytest.raises(DataFormatError, match=r"train-00002.parquet#0\): id used twice.*also at train-00000.parquet#0"):
        read_records(twice)


def test_the_manifest_counts_and_names_what_is_there(tmp_path: Path, make_records: Any) -> None:
    info = SetInfo(seed=3, config_hash="abc", sources=({"name": "casia"},))
    out = write(tmp_path / "set", make_records(8), storage="parquet", info=info, shard_bytes=7000)
    write(out, make_records(2), split="val", storage="parquet", info=info)
    manifest = read_manifest(out)
    assert manifest is not None
    assert list(manifest["schema"]) == list(COLUMNS)
    assert (manifest["seed"], manifest["config_hash"], manifest["sources"]) == (3, "abc", [{"name": "casia"}])
    assert {"python", "pillow", "pyarrow", "qwen-forensics"} <= set(manifest["versions"])
    train = manifest["splits"]["train"]
    assert [train[k] for k in ("records", "images", "authentic", "tampered", "unlabelled")] == [8, 10, 4, 4, 2]
    assert manifest["splits"]["val"]["records"] == 2
    for shard in train["shards"]:
        file = out / shard["file"]
        assert file.stat().st_size == shard["bytes"]
        done = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == shard["sha256"]
    assert sum(shard["rows"] for shard in train["shards"]) == 8


def test_a_set_is_hashed_without_reading_it(tmp_path: Path, make_records: Any) -> None:
    records = make_records(8)
    first, second = (write(tmp_path / n, records, storage="parquet", shard_bytes=7000) for n in ("first", "second"))
    other = write(tmp_path / "other", records[:-1], storage="parquet", shard_bytes=7000)
    assert stored_hash(first) == stored_hash(second / "train") == stored_hash(second / "train-*.parquet")
    assert stored_hash(first) != stored_hash(other)
    (second / "manifest.json").unlink()
    assert stored_hash(second / "train-*.parquet") == stored_hash(first)


def test_an_empty_split_is_entered_without_files(tmp_path: Path, make_records: Any) -> None:
    for storage in ("jsonl", "parquet"):
        out = write(tmp_path / storage, [], split="val", storage=storage)
        assert read_manifest(out)["splits"]["val"]["shards"] == []  # type: ignore[index]
        assert read(out / "val") == []
        write(out, make_records(2), storage=storage)
        from datasets import load_dataset

        loaded = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
        assert {name: len(split) for name, split in loaded.items()} == {"train": 2}


def test_images_can_stay_where_they_are(tmp_path: Path, make_records: Any) -> None:
    records = make_records(4)
    out = write(tmp_path / "set", records, images=ImageOptions("reference"))
    assert [replace(record, source="") for record in read(out)] == records
    assert not (out / "images").exists()
    assert not (out / "train.sha256").exists()


def test_a_stored_set_is_a_source_of_the_next(tmp_path: Path, make_records: Any) -> None:
    records = make_records(8)
    first = write(tmp_path / "first", records, storage="parquet")
    second = write(tmp_path / "second", read(first))
    third = write(tmp_path / "third", read(second), storage="parquet")
    assert (first / "train-00000.parquet").read_bytes() == (third / "train-00000.parquet").read_bytes()
    assert [content(record) for record in read(second)] == [content(record) for record in records]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "hold-out"}, "expected letters, digits and _"),
        ({"storage": "csv"}, "expected jsonl or parquet"),
        ({"storage": "parquet", "images": ImageOptions("reference")}, "Parquet holds the images inside"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"resume": True, "overwrite": True}, "not both"),
    ],
)
def test_unusable_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_writer(tmp_path / "set", **{"split": "train", **options})
    assert not (tmp_path / "set").exists()


def test_storages_do_not_mix_in_a_folder(tmp_path: Path, make_records: Any) -> None:
    out = write(tmp_path / "set", make_records(1))
    with pytest.raises(ConfigError, match="holds jsonl splits"):
        open_writer(out, "val", "parquet")


def test_neither_torch_nor_pyarrow_is_loaded_before_it_is_needed(repo_root: Path) -> None:
    code = (
        "import sys, finetune.data.storage, finetune.data.containers\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_embedded_pictures_are_the_files(tmp_path: Path, make_records: Any) -> None:
    records = make_records(2)
    out = write(tmp_path / "set", records, storage="parquet")
    path = read(out)[1].images[0].path
    assert path == f"{out}/train-00000.parquet#1/images/0"
    assert Image.open(io.BytesIO(read_embedded(path))).size == (56, 40)
