"""Container paths open like files, in every kind of process, and a damaged Parquet file is named, row and column."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config import DataConfig, TokensConfig
from finetune.data.containers import backing_file, container_path, is_embedded, read_embedded
from finetune.data.images import image_size_hw, load_image
from finetune.data.masks import load_mask
from finetune.data.storage import iter_stored, open_writer
from finetune.data.storage.parquet import arrow_schema
from finetune.data.storage.serialization import COLUMNS
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record


@pytest.fixture
def stored(tmp_path: Path, make_records: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Parquet file of 40 records in two row groups."""
    monkeypatch.setattr("finetune.data.storage.writer.GROUP_ROWS", 32)
    with open_writer(tmp_path / "set", "train", "parquet") as writer:
        for record in make_records(40):
            writer.write(record)
    return tmp_path / "set" / "train-00000.parquet"


def paths_of(file: Path) -> list[str]:
    return [str(image.path) for _, _, record in iter_stored(file) for image in record.images]  # type: ignore[union-attr]


def errors_of(file: Path) -> list[DataFormatError]:
    return [value for _, _, value in iter_stored(file) if isinstance(value, DataFormatError)]


def mean_colour(path: str) -> float:
    return float(np.asarray(load_image(ImageInput(path=path))).mean())


def test_container_paths_are_told_from_files() -> None:
    path = container_path("/a/b.parquet", 12, "masks", 0)
    assert path == "/a/b.parquet#12/masks/0"
    assert is_embedded(path)
    assert backing_file(path) == "/a/b.parquet"
    for other in ("/a/b.parquet", "/a/b.jpg", "/a/b.parquet#1/images/x", "/a/b.zip#1/images/0", ""):
        assert not is_embedded(other)
        assert backing_file(other) == other


def test_masks_and_sizes_are_read_inside(stored: Path) -> None:
    mask_path = container_path(stored, 1, "masks", 0)
    mask = load_mask(ImageTarget(label=1, mask_path=mask_path), (40, 56))
    assert mask is not None
    assert mask.sum() == 16 * 24
    assert image_size_hw(ImageInput(path=container_path(stored, 0, "images", 0))) == (40, 56)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_every_process_opens_its_own_file(stored: Path, method: str) -> None:
    paths = paths_of(stored)
    expected = [mean_colour(path) for path in paths]  # the file is open here when the workers are forked
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(mean_colour, paths, chunksize=3) == expected


def test_threads_share_no_file(stored: Path) -> None:
    paths = paths_of(stored) * 3
    random.Random(0).shuffle(paths)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(mean_colour, paths)) == [mean_colour(path) for path in paths]


def test_a_replaced_file_is_noticed(tmp_path: Path, stored: Path, make_records: Any) -> None:
    path = container_path(stored, 0, "images", 0)
    before = read_embedded(path)
    with open_writer(stored.parent, "train", "parquet", overwrite=True) as writer:
        writer.write(make_records(2)[1])
    assert read_embedded(path) != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.replace("train", "other"), "Parquet file not found"),
        (lambda path: path.replace("#0/", "#40/"), r"no such image in the Parquet file \(row 40 of 40\)"),
        (lambda path: path.replace("images/0", "images/1"), r"no such image in the Parquet file \(images\[1\] of 1\)"),
        (lambda path: path.replace("#0/images", "#3/masks"), "no bytes are embedded here"),
    ],
)
def test_what_a_path_does_not_lead_to_is_named(stored: Path, spoil: Callable[[str], str], message: str) -> None:
    path = spoil(container_path(stored, 0, "images", 0))
    with pytest.raises(DataFormatError, match=rf"record 'r' \(s:1\): {message}.*found .*parquet#.*fix: ") as caught:
        load_image(ImageInput(path=path), "r", "s:1")
    assert "\n" not in str(caught.value)


def test_truncated_and_empty_files_are_one_line(stored: Path) -> None:
    data = stored.read_bytes()
    for content in (b"", b"PAR1", data[:1000], data[: len(data) // 2], data[:-5], b"x" * 5000):
        stored.write_bytes(content)
        with pytest.raises(
            DataFormatError, match=r"\(train-00000\.parquet\): Parquet file is truncated or damaged"
        ) as e:
            list(iter_stored(stored))
        assert "\n" not in str(e.value)
        with pytest.raises(DataFormatError, match="truncated or damaged"):
            load_image(ImageInput(path=container_path(stored, 0, "images", 0)))


def test_flipped_bits_give_errors_and_never_other_pixels(stored: Path) -> None:
    """Anywhere in the file: the checksums find it, or what is read is what was written."""
    data = stored.read_bytes()
    good = {path: read_embedded(path) for path in paths_of(stored)}
    records = [record for _, _, record in iter_stored(stored)]
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.randrange(4, len(data) - 8)] ^= 1 << rng.randrange(8)
        stored.write_bytes(damaged)
        with contextlib.suppress(DataFormatError):
            for (_, _, value), record in zip(iter_stored(stored), records, strict=True):
                assert isinstance(value, DataFormatError) or value == record
        for path in list(good)[:: len(good) // 4]:
            with contextlib.suppress(DataFormatError):
                assert read_embedded(path) == good[path]


def test_a_damaged_column_names_its_rows_and_leaves_the_others(stored: Path) -> None:
    group = pq.ParquetFile(stored).metadata.row_group(0)
    column = next(group.column(k) for k in range(group.num_columns) if group.column(k).path_in_schema.startswith("evi"))
    data = bytearray(stored.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 255
    stored.write_bytes(data)
    values = [value for _, _, value in iter_stored(stored)]
    assert len(values) == 40
    assert str(values[0]).startswith("(train-00000.parquet#0): cell cannot be read")
    assert "field 'evidence'" in str(values[31])
    assert all(isinstance(value, Record) for value in values[32:])


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(file)), file)


def with_column(table: pa.Table, name: str, values: Any, kind: pa.DataType | None = None) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def test_missing_and_mistyped_columns_are_named(stored: Path) -> None:
    table = pq.read_table(stored)
    pq.write_table(table.drop_columns(["labels"]), stored)
    with pytest.raises(DataFormatError, match=r"\(train-00000\.parquet\): column 'labels' is missing; .*prepare"):
        list(iter_stored(stored))
    wrong: dict[str, list[Any]] = {
        "labels": [["0"]] * 40,
        "images": [["a.jpg"]] * 40,
        "messages": [[{"role": "user"}]] * 40,
        "id": list(range(40)),
        "polygons": [[1.0]] * 40,
    }
    for name, values in wrong.items():
        pq.write_table(with_column(table, name, values), stored)
        with pytest.raises(DataFormatError, match=rf"column '{name}' has another type; .*found .*expected"):
            list(iter_stored(stored))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", [7], "label is neither 0 nor 1"),
        ("labels", [0, 1], "2 values for 1 images"),
        ("id", None, "stored record without an id"),
        ("id", " ", "stored record without an id"),
        ("provenance", "{", "cell cannot be read"),
        ("provenance", "[1]", "provenance is not an object"),
        ("images", [None], "image missing"),
        ("polygons", [[[[1.0, 2.0]]]], "polygon"),
        ("messages", [{"role": "judge", "content": "x"}], "known role"),
    ],
)
def test_a_bad_cell_is_an_error_of_its_row(stored: Path, name: str, value: Any, message: str) -> None:
    table = pq.read_table(stored)
    kind = table.schema.field(name).type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    values = [*(table.column(name)[k].as_py() for k in range(40))]
    values[5] = value
    pq.write_table(with_column(table, name, values, kind), stored)
    (error,) = errors_of(stored)
    assert "train-00000.parquet#5)" in str(error)
    assert message in str(error)


def test_text_that_is_not_utf8_is_an_error_of_its_row(stored: Path) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        values = [b"g"] * 39 + [b"\xb9\xe3"]
        broken = pa.Array.from_buffers(pa.string(), 40, pa.array(values, pa.binary()).buffers())
        return table.set_column(1, "group", broken)

    rewrite(stored, spoil)
    (error,) = errors_of(stored)
    assert str(error).startswith("(train-00000.parquet#39): cell cannot be read")
    assert "field 'group'" in str(error)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "role"]), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(COLUMNS), anything, max_size=3), keep_types=st.booleans())
def test_any_columns_give_records_or_errors(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], keep_types: bool
) -> None:
    """Cells of any kind, in columns of their own type or, where they fit, of ours."""
    row = {name: [] for name in COLUMNS} | {"id": "r", "group": "", "provenance": "{}"}
    row["messages"] = [{"role": "user", "content": "x"}]
    schema = arrow_schema()
    columns = {}
    for name, value in (row | changes).items():
        kind = schema.field(name).type if keep_types or name not in changes else None
        try:
            columns[name] = pa.array([value], kind)
        except (pa.ArrowException, TypeError, ValueError):
            columns[name] = pa.array([row[name]], schema.field(name).type)
    file = tmp_path_factory.getbasetemp() / "any.parquet"
    try:
        pq.write_table(pa.table(columns), file)
    except pa.ArrowException:  # Parquet knows no struct without fields
        return
    with contextlib.suppress(DataFormatError):
        for _, _, value in iter_stored(file):
            assert isinstance(value, Record | DataFormatError)


def test_training_reads_a_parquet_set(stored: Path, tiny_dir: Path) -> None:
    """Dataset and collator, in forked workers, give what the files themselves give."""
    from torch.utils.data import DataLoader

    from finetune.data.collator import ForensicCollator
    from finetune.data.dataset import ForensicDataset
    from finetune.models.loading import load_processor
    from finetune.special_tokens import SpecialTokens

    records = [r for _, _, r in iter_stored(stored) if isinstance(r, Record) and not r.turns]
    assert len(records) == 20
    processor = load_processor(str(tiny_dir), None, None)
    tokens = SpecialTokens(TokensConfig().num_cls, TokensConfig().num_mask)
    dataset = ForensicDataset(records, processor, tokens, DataConfig())
    assert dataset.check_lengths() == []
    loader = DataLoader(dataset, 5, num_workers=2, collate_fn=ForensicCollator(processor, tokens))
    batches = list(loader)
    assert len(batches) == 4
    assert [int(label) for batch in batches for label in batch["cls_labels"]] == [0, 1] * 10
