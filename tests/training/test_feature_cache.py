"""The feature cache: the numbers of an uncached run, never a stale file, and words where it cannot be."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import run_in_child
from PIL import Image

from finetune.config import HeadsConfig, ModelConfig, RunConfig, load_config
from finetune.errors import ConfigError, DataFormatError
from finetune.models.loading import Bundle, load_bundle
from finetune.models.vision_loading import load_vision
from finetune.schema import ImageInput
from finetune.training import feature_cache
from finetune.training.checks import run_problems
from finetune.training.feature_cache import FeatureCache, FeatureStore, cache_folder, weights_hash
from finetune.training.run import build_trainer

VISION = {
    "heads": {"source": "vision", "mask": "query", "vision_layers": [0, 2]},
    "loss": {"text": 0.0},
    "train": {"trainable": ["neck", "cls_head", "mask_head", "noise_residual"]},
}


def maps() -> list[torch.Tensor]:
    return [torch.randn(4, 2, 3, dtype=torch.bfloat16), torch.randn(4, 2, 3)]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "store", needs_pixels=False)


def test_what_was_saved_comes_back_to_the_bit(store: FeatureStore) -> None:
    stored = maps()
    assert store.load("ab12") is None
    store.save("ab12", stored, (35, 50))
    found = store.load("ab12")
    assert found is not None
    assert found[1] == (35, 50)
    assert [part.dtype for part in found[0]] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], stored, strict=True))
    assert store.count() == 1


def test_names_come_from_the_bytes_and_follow_a_changed_file(store: FeatureStore, tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    Image.new("RGB", (30, 40), "red").save(one)
    shutil.copy(one, two)
    key = store.key(ImageInput(str(one)), "r", "s")
    assert key == store.key(ImageInput(str(two)), "r", "s") == store.key(ImageInput(data=one.read_bytes()), "r", "s")
    Image.new("RGB", (30, 40), "blue").save(one)
    assert store.key(ImageInput(str(one)), "r", "s") != key
    with pytest.raises(DataFormatError, match=r"record 'r'.*cannot be read"):
        store.key(ImageInput(str(tmp_path / "gone.png")), "r", "s")


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, None])
def test_a_damaged_file_is_said_and_computed_anew(
    store: FeatureStore, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    store.save("cd34", maps(), (4, 6))
    file = store.folder / "cd" / "cd34.safetensors"
    file.write_bytes(file.read_bytes()[:-7] if content is None else content)  # as a power cut leaves it
    assert store.load("cd34") is None
    assert "is damaged" in caplog.text
    assert not file.exists()
    store.save("cd34", maps(), (4, 6))
    assert store.load("cd34") is not None


def test_a_full_disk_is_said_once_and_leaves_nothing_half_written(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.save("aa00", maps(), (4, 6))

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for key in ("aa11", "bb22"):
        store.save(key, maps(), (4, 6))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left on device" in caplog.text
    assert sorted(path.name for path in store.folder.rglob("*") if path.is_file()) == ["aa00.safetensors"]
    assert store.load("aa00") is not None  # what is there is used on


# ---- in a run ----


@pytest.fixture(scope="module")
def bundle(tiny_dir: Path) -> Bundle:
    heads = HeadsConfig(source="vision", hidden_size=16, num_layers=1, num_heads=2, vision_layers=[0, 2])
    return load_bundle(ModelConfig(path=str(tiny_dir), dtype="float32"), None, heads)


def folder_name(bundle: Bundle, tmp_path: Path, precision: str = "no") -> str:
    return FeatureCache(bundle.base, bundle.processor, tmp_path, torch.enable_grad, precision).store.folder.name


def test_a_folder_is_for_one_tower_and_one_way_of_looking_through_it(bundle: Bundle, tmp_path: Path) -> None:
    first = folder_name(bundle, tmp_path)
    assert folder_name(bundle, tmp_path / "elsewhere") == first
    names = {first, folder_name(bundle, tmp_path, "bf16")}
    base, image_processor = bundle.base, bundle.processor.image_processor
    weight = next(iter(base.model.visual.blocks[0].parameters()))
    value = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[3] += 1e-3
    names.add(folder_name(bundle, tmp_path))
    with torch.no_grad():
        weight.copy_(value)
    size = image_processor.size
    image_processor.size = {**size, "longest_edge": size["longest_edge"] // 2}
    names.add(folder_name(bundle, tmp_path))
    image_processor.size = size
    for owner, name, value in [
        (image_processor, "resample", 0),
        (image_processor, "do_normalize", False),
        (base.config.vision_config, "num_heads", 2),
        (base.config.vision_config, "window_size", 56),
    ]:
        own = getattr(owner, name)
        setattr(owner, name, value)
        names.add(folder_name(bundle, tmp_path))
        setattr(owner, name, own)
    heads = base.heads_config
    base.heads_config = dataclasses.replace(heads, vision_layers=[1, 2])
    names.add(folder_name(bundle, tmp_path))
    base.heads_config = dataclasses.replace(heads, vision_layers=[-3, -1])  # the same blocks, counted from the end
    assert folder_name(bundle, tmp_path) == first
    base.heads_config = heads
    assert len(names) == 9
    assert folder_name(bundle, tmp_path) == first


def test_the_weight_of_a_frozen_lora_counts(tiny_dir: Path, vision_parts: Path, tmp_path: Path) -> None:
    """alpha stands in no weight, and changes what the tower gives."""
    lora = tmp_path / "lora"
    shutil.copytree(vision_parts / "vision_lora", lora)
    names = []
    for alpha in (16, 16, 48):
        config = json.loads((lora / "adapter_config.json").read_text("utf-8"))
        (lora / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}), encoding="utf-8")
        names.append(folder_name(load_vision(str(tiny_dir), vision_parts, lora), tmp_path))
    assert names[0] == names[1] != names[2]


def test_weights_of_every_type_count() -> None:
    one, two = torch.nn.Linear(3, 2).bfloat16(), torch.nn.Linear(3, 2).bfloat16()
    assert weights_hash(one) != weights_hash(two)
    two.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(two) != weights_hash(two.float())


@pytest.fixture
def losses(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., tuple[list[float], Any]]:
    """Trains six steps of two and evaluates; the losses, and the trainer."""

    def run(name: str, expert: bool, padding: str = "none", **train: Any) -> tuple[list[float], Any]:
        changes: dict[str, Any] = {section: dict(values) for section, values in VISION.items()}
        changes["data"] = {"image_padding": padding}
        changes["heads"]["noise_residual"] = {"enabled": expert}
        trained = VISION["train"]["trainable"][: 4 if expert else 3]
        changes["train"] = {"trainable": trained, "max_steps": 12, "eval_steps": 6, **train}
        trainer = build_trainer(make_config(name, **changes))[0]
        trainer.train()
        history = trainer.state.log_history
        values = [entry[key] for entry in history for key in ("loss", "grad_norm", "eval_loss") if key in entry]
        return values, trainer

    return run


@pytest.mark.parametrize(("expert", "padding"), [(False, "none"), (True, "none"), (True, "square")])
def test_a_cached_run_has_the_numbers_of_an_uncached_one(
    losses: Callable[..., tuple[list[float], Any]],
    expert: bool,
    padding: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, _ = losses("plain", expert, padding)
    cache = str(tmp_path / "features")
    first, trainer = losses("first", expert, padding, feature_cache=cache)
    assert len(plain) == 26  # twelve steps and two evaluations
    assert first == pytest.approx(plain, rel=1e-5, abs=1e-6)
    stored = trainer.features.store.count()
    assert 0 < trainer.features.num_computed == stored <= 20
    if padding != "none":  # batches of which some images are stored
        for path in sorted((tmp_path / "features").rglob("*.safetensors"))[::2]:
            path.unlink()
        assert losses("half", expert, padding, feature_cache=cache)[0] == pytest.approx(plain, rel=1e-5, abs=1e-6)
        capsys.readouterr()
    again, trainer = losses("again", expert, padding, feature_cache=cache)
    assert again == pytest.approx(plain, rel=1e-5, abs=1e-6)
    assert trainer.features.num_computed == 0
    assert f"{stored} stored" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["in the file", pytest.param("before its name", marks=pytest.mark.slow)])
def test_a_run_killed_while_it_writes_is_completed_by_the_next(
    losses: Callable[..., tuple[list[float], Any]], tmp_path: Path, moment: str
) -> None:
    """kill -9 in the fifth file, or between the file and its name: nothing of it is read, the rest is not lost."""
    cache = tmp_path / "features"

    def killed() -> None:
        write, calls = Path.write_bytes, itertools.count(1)

        def writing(self: Path, data: bytes) -> int:
            is_last = self.suffix == ".tmp" and next(calls) == 5
            written = write(self, data[: len(data) // 2] if is_last and moment == "in the file" else data)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return written

        Path.write_bytes = writing  # type: ignore[method-assign]
        losses("killed", False, feature_cache=str(cache))

    assert run_in_child(killed) == -signal.SIGKILL
    (folder,) = cache.iterdir()
    assert len(list(folder.glob("??/*.tmp"))) == 1  # half a file, under another name
    store = FeatureStore(folder, needs_pixels=False)
    assert store.count() == 4
    before = {path: path.read_bytes() for path in folder.glob("??/*.safetensors")}
    values, trainer = losses("next", False, feature_cache=str(cache))
    whole, other = losses("whole", False, feature_cache=str(tmp_path / "whole"))
    assert values == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert trainer.features.num_computed == other.features.num_computed - 4  # those that were complete are taken
    assert all(path.read_bytes() == data for path, data in before.items())
    names = {path.stem for path in other.features.store.folder.glob("??/*.safetensors")}
    assert names == {path.stem for path in folder.glob("??/*.safetensors")}
    for name in names:
        ours, theirs = store.load(name), other.features.store.load(name)
        assert ours is not None
        assert theirs is not None
        assert ours[1] == theirs[1]
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)  # batches are composed otherwise


def test_a_second_pass_opens_no_image(
    losses: Callable[..., tuple[list[float], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "features")
    losses("first", False, feature_cache=cache)

    def never(*_: Any) -> Any:
        raise AssertionError("an image was decoded")

    from finetune.data.image_cache import ImageCache

    monkeypatch.setattr(ImageCache, "load", never)
    _, trainer = losses("second", False, feature_cache=cache)
    monkeypatch.setattr(type(trainer.bundle.base), "tower_maps", never)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    assert "pixel_values" not in batch
    assert len(batch["tower_maps"]) == 2


def test_no_room_is_an_error_before_training(
    losses: Callable[..., tuple[list[float], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(ConfigError, match=r"of 20 images need about 0\.\d+ GB, and 0\.00 GB are free"):
        losses("full", False, feature_cache=str(tmp_path / "features"))
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        losses("file", False, feature_cache=str(tmp_path / "taken"))


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("heads.source=tokens", "it needs heads.source: vision"),
        ("loss.text=1.0", "set loss.text to 0"),
        ("train.trainable=[neck, cls_head, vision_lora]", "train.trainable names vision_lora"),
        ("region_masking.enabled=true", "region_masking changes the pixels"),
        ("adversarial.share=0.5", "adversarial training changes"),
    ],
)
def test_a_run_whose_features_change_is_refused_and_auto_does_without(
    override: str, found: str, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_config("c", **VISION)
    sound = load_config(path, ["train.feature_cache=auto"])
    assert cache_folder(sound) == Path(sound.output_dir) / "features"
    config = load_config(path, [f"train.feature_cache={tmp_path}", override])
    assert [problem for problem in run_problems(config) if found in problem]
    auto = load_config(path, ["train.feature_cache=auto", override])
    assert cache_folder(auto) is None
    assert not [problem for problem in run_problems(auto) if "feature_cache" in problem]


def test_off_is_off_however_it_is_written(write_config: Callable[..., Path]) -> None:
    for written in ("off", "false", "'off'"):
        assert cache_folder(load_config(write_config("c", **VISION), [f"train.feature_cache={written}"])) is None
