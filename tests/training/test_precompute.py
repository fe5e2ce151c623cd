"""Searches before training: the pictures that a run asks for, pairs whole, the time kept, and mistakes said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.cli import main
from finetune.config import RegionMaskingConfig, RunConfig, SourceConfig, StageConfig
from finetune.errors import ConfigError, DataFormatError
from finetune.training import precompute
from finetune.training.checks import run_problems
from finetune.training.precompute import search_ahead
from finetune.training.run import build_trainer
from finetune.training.search_cache import SearchCache

NOISE = {"enabled": True, "channels": 8, "widths": [8, 8, 8], "global_blocks": 1, "self_similarity": True}


@pytest.fixture
def config(make_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    return make_config(
        "run", heads={"noise_residual": NOISE}, train={"search_cache": str(tmp_path / "searches"), "max_steps": 6}
    )


def _cache(config: RunConfig) -> SearchCache:
    return SearchCache(Path(str(config.train.search_cache)))


def _train(config: RunConfig) -> tuple[SearchCache, list[bool]]:
    """The run's memory afterwards, and of every picture of a training step whether there were maps."""
    trainer = build_trainer(config)[0]
    (stream,) = (module for module in trainer.bundle.model.modules() if hasattr(module, "recall"))
    seen = []
    search = stream._search

    def watched(image: Tensor) -> Tensor:
        maps: Tensor = search(image)
        if stream.training:
            seen.append(bool(maps.any()))
        return maps

    stream._search = watched
    trainer.train()
    return stream.search, seen


@pytest.mark.parametrize(("similarity_share", "padding"), [(1.0, "none"), (0.4, "none"), (1.0, "square")])
def test_training_and_evaluation_find_every_search_they_ask_for(
    config: RunConfig, similarity_share: float, padding: Any
) -> None:
    config.heads.noise_residual.similarity_share = similarity_share
    config.data.image_padding = padding
    done = search_ahead(config, workers=1)
    assert done.searched == _cache(config).store.count() > 8  # all pictures of the evaluation at least
    assert done.left == done.stored == 0
    cache, seen = _train(config)
    assert cache.num_searched == 0
    assert all(seen) == (similarity_share == 1)
    assert any(seen)
    again = search_ahead(config, workers=1)
    assert (again.searched, again.stored) == (0, done.searched)


def test_what_was_searched_is_used_and_nothing_else(config: RunConfig) -> None:
    config.heads.noise_residual.similarity_share = 0.0
    for empty in (run_problems(config), run_problems(replace(config, train=replace(config.train, search_cache=False)))):
        assert any("similarity_share is 0" in problem and "forensics precompute" in problem for problem in empty)
    search_ahead(config, workers=1, share=0.5)
    assert run_problems(config) == []
    cache, seen = _train(config)
    assert cache.num_searched == 0
    assert 0 < sum(seen) < len(seen)


def test_a_picture_never_comes_without_its_twin(config: RunConfig, synth_dir: Path) -> None:
    pairs = _pairs(synth_dir)
    assert len(set(pairs.values())) == len(pairs) / 2
    config.data.eval = []
    chosen = [tuple(record.id for record in task.records) for task in precompute._tasks(config, 0.5)]
    assert 0 < len(chosen) < len(pairs) / 2
    for names in chosen:
        assert len(names) == 2
        assert len({pairs[name] for name in names}) == 1
    assert len(list(precompute._tasks(config, 1.0))) == len(pairs) / 2
    assert not list(precompute._tasks(config, 0.0))


def test_where_time_ends_has_nothing_to_do_with_labels(config: RunConfig, synth_dir: Path, tmp_path: Path) -> None:
    """Sources in the order of their labels, as in `[real.jsonl, fake.jsonl]`: no cut leaves one class without maps."""
    records = [json.loads(line) for line in (synth_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    config.data.eval, config.data.train = [], []
    for label in (0, 1):
        own = [record for record in records if record["labels"] == [label]]
        path = tmp_path / f"{label}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in own), encoding="utf-8")
        config.data.train.append(SourceConfig(str(path), root=str(synth_dir)))
    tasks = list(precompute._tasks(config, 1.0))
    for task in tasks:  # a cut lies between tasks
        assert {record.label for record in task.records} == {0, 1}
    in_file = [record["provenance"]["pair"] for record in records if record["labels"] == [0]]
    assert [task.records[0].provenance["pair"] for task in tasks] != in_file


def _pairs(synth_dir: Path) -> dict[str, str]:
    lines = (synth_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["id"]: record["provenance"]["pair"] for record in map(json.loads, lines)}


def test_records_held_back_for_evaluation_are_searched_too(config: RunConfig) -> None:
    config.data.eval, config.data.val_ratio = [], 0.4
    config.heads.noise_residual.similarity_share = 1.0
    assert search_ahead(config, workers=1).searched == 12


def test_stages_that_see_other_pixels_have_searches_of_their_own(config: RunConfig) -> None:
    config.stages = [StageConfig("a"), StageConfig("b", data={"max_pixels": 28 * 28 * 6})]
    assert search_ahead(config, workers=1).searched == 40


def test_a_store_of_other_pictures_is_said(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    cache = _cache(config)
    cache(torch.zeros(3, 56, 56))
    picture = torch.ones(3, 56, 56)
    for _ in range(500):
        assert cache.recall(picture) is None
    assert caplog.text.count("none of the first 500 training pictures") == 1
    assert "forensics precompute" in caplog.text


def test_processes_find_the_same_as_one(config: RunConfig, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for workers, folder in enumerate(folders, start=1):
        config.train.search_cache = str(folder)
        search_ahead(config, workers=workers)
    files = [{p.name: p for p in folder.rglob("*.safetensors")} for folder in folders]
    assert files[0].keys() == files[1].keys()
    for name, file in files[0].items():
        maps = [SearchCache(folder).store.load(file.stem) for folder in folders]
        torch.testing.assert_close(maps[0][0], maps[1][0], msg=name)


def test_no_picture_is_begun_after_the_time_is_over(config: RunConfig) -> None:
    done = search_ahead(config, workers=1, seconds=0)
    assert done.searched == _cache(config).store.count() == 0
    assert done.left == 20


def test_stages_share_their_searches(config: RunConfig) -> None:
    config.stages = [StageConfig("a"), StageConfig("b", loss={"text": 0.5})]
    done = search_ahead(config, workers=1)
    assert (done.searched, done.stored) == (20, 0)


def test_mistakes_are_said(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="region_masking changes the pixels"):
        search_ahead(replace(config, region_masking=RegionMaskingConfig(enabled=True)))
    config.heads.noise_residual.similarity_share = 0.0
    with pytest.raises(ConfigError, match=r"chooses no training picture; .* --share 0\.25"):
        search_ahead(config)
    config.train.search_cache = False
    with pytest.raises(ConfigError, match=r"give it a folder, e\.g\. train\.search_cache=runs/searches"):
        search_ahead(config)
    assert main(["precompute", "--config", "configs/train/quickstart.yaml"]) == 2
    assert "train.search_cache is off" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_named(config: RunConfig, tmp_path: Path, synth_dir: Path) -> None:
    record = json.loads((synth_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({**record, "images": ["absent.png"], "masks": [None]}), encoding="utf-8")
    config.data.train[0].path = str(broken)
    with pytest.raises(DataFormatError, match=record["id"]):
        search_ahead(config, workers=1)


def test_the_command_says_what_it_did(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "searches"
    path = write_config(heads={"noise_residual": NOISE}, data={"eval": []}, train={"search_cache": str(folder)})
    command = ["precompute", "--config", str(path), "--workers", "1", "--share", "0.5"]
    assert main(command) == 0
    count = len(list(folder.rglob("*.safetensors")))
    assert count
    assert capsys.readouterr().out.startswith(f"searched {count} pictures in ")
    assert main(command) == 0
    assert re.match(rf"searched 0 pictures in \d+ s, {count} were stored already", capsys.readouterr().out)
