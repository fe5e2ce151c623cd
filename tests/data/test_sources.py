"""Records of several files: repeated and thinned out by weight, with every file's mixture kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.config import SourceConfig
from finetune.data.sources import read_sources, spread
from finetune.errors import ConfigError


@pytest.mark.parametrize(("weight", "count"), [(1.0, 7), (2.0, 14), (1.5, 10), (0.5, 4), (0.01, 1)])
def test_weights_of_sources(photo_records: Path, weight: float, count: int) -> None:
    records = read_sources([SourceConfig(str(photo_records), weight=weight)], "train")
    assert len(records) == count
    assert len({record.id for record in records}) == min(count, 7)


def test_sources_that_cannot_work(photo_records: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        read_sources([], "train")
    with pytest.raises(ConfigError, match=r"weight of .* is 0"):
        read_sources([SourceConfig(str(photo_records), weight=0.0)], "train")


@pytest.mark.parametrize("order", ["alternating", "one class after the other", "pairs of pairs"])
@pytest.mark.parametrize("count", [15, 20, 40, 50, 60, 79])
def test_a_part_of_a_file_keeps_its_mixture(order: str, count: int) -> None:
    period = {"alternating": 1, "one class after the other": 40, "pairs of pairs": 2}[order]
    labels = [number // period % 2 for number in range(80)]
    chosen = spread(range(80), count)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert chosen == spread(range(80), count)
    assert abs(sum(labels[number] for number in chosen) / count - 0.5) < 0.2
    assert max(later - earlier for earlier, later in itertools.pairwise(chosen)) < 2 * 80 / count + 1


def test_more_than_there_is_takes_all() -> None:
    assert spread([1, 2], 5) == [1, 2]


@pytest.mark.parametrize(("weight", "real", "fake"), [(0.5, 10, 10), (1.5, 30, 30), (2.5, 50, 50)])
def test_a_weight_keeps_both_classes_of_an_alternating_file(
    tmp_path: Path, weight: float, real: int, fake: int
) -> None:
    photo = tmp_path / "a.png"
    Image.new("RGB", (56, 56)).save(photo)
    lines = [
        {"id": f"r{n}", "images": ["a.png"], "label": n % 2, "messages": [{"role": "user", "content": "<image>?"}]}
        for n in range(40)
    ]
    file = tmp_path / "alternating.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    records = read_sources([SourceConfig(str(file), weight=weight)], "train")
    labels = [record.targets[0].label for record in records]
    assert len(labels) == real + fake
    assert abs(labels.count(0) - real) <= 5
