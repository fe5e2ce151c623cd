"""Decoded images are kept within a budget, oldest forgotten first; a training set that uses it sees the same pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConfig
from finetune.data.dataset import ForensicDataset
from finetune.data.image_cache import ImageCache
from finetune.data.preview import without_tokenizer
from finetune.data.readers import read_records
from finetune.errors import ConfigError
from finetune.schema import ImageInput
from finetune.special_tokens import SpecialTokens


@pytest.fixture
def images(tmp_path: Path) -> list[ImageInput]:
    found = []
    for index in range(4):
        path = tmp_path / f"{index}.png"
        Image.fromarray(np.full((400, 400, 3), 40 * index, np.uint8)).save(path)
        found.append(ImageInput(path=str(path)))
    return found


def test_the_budget_holds_and_the_oldest_goes_first(images: list[ImageInput]) -> None:
    cache = ImageCache(1)  # two pictures of 480,000 bytes
    first, second = cache.load(images[0]), cache.load(images[1])
    assert cache.load(images[0]) is first
    third = cache.load(images[2])  # the second was not asked for longest
    assert cache.num_bytes == 960_000
    assert cache.load(images[0]) is first
    assert cache.load(images[2]) is third
    assert cache.load(images[1]) is not second
    assert np.array_equal(np.asarray(cache.load(images[1])), np.asarray(second))


def test_nothing_is_kept_without_a_budget_or_a_name_or_room(images: list[ImageInput], tmp_path: Path) -> None:
    none = ImageCache()
    assert none.load(images[0]) is not none.load(images[0])
    cache = ImageCache(1)
    data = ImageInput(data=Path(images[0].path or "").read_bytes())
    assert cache.load(data) is not cache.load(data)
    large = tmp_path / "large.png"
    Image.new("RGB", (900, 900)).save(large)
    assert cache.load(ImageInput(path=str(large))).size == (900, 900)
    assert cache.num_bytes == 0


def test_a_dataset_decodes_each_image_once(photo_records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.data.image_cache as module

    decoded: list[str | None] = []
    load = module.load_image
    monkeypatch.setattr(module, "load_image", lambda image, *rest: (decoded.append(image.path), load(image, *rest))[1])
    records = [record for record in read_records(photo_records) if record.images]
    paths = [image.path for record in records for image in record.images]

    def seen(megabytes: int) -> list[np.ndarray]:
        decoded.clear()
        config = DataConfig(image_cache_megabytes=megabytes)
        dataset = ForensicDataset(records, without_tokenizer(config), SpecialTokens(), config)
        rounds = [dataset.rendered(index)[0].images for _ in range(2) for index in range(len(records))]
        return [np.asarray(image) for images in rounds for image in images]

    plain = seen(0)
    assert decoded == paths * 2
    cached = seen(8)
    assert sorted(map(str, decoded)) == sorted(map(str, set(paths)))
    assert all(np.array_equal(one, other) for one, other in zip(plain, cached, strict=True))


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_cache_megabytes is -1"):
        ImageCache(-1)
