"""The memory of searches: the same maps to the bit, each picture searched once, and words where it is of no use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config import AdversarialConfig, RegionMaskingConfig, RunConfig
from finetune.errors import ConfigError
from finetune.models.noise_residual import search_picture
from finetune.training.run import build_trainer
from finetune.training.search_cache import SearchCache, search_cache_problems

NOISE = {"enabled": True, "self_similarity": True}


def test_stored_maps_are_those_of_the_search(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 64, 72), generator=torch.Generator().manual_seed(0)).float()
    cache = SearchCache(tmp_path)
    assert torch.equal(cache(image), search_picture(image))
    again = SearchCache(tmp_path)
    found = again(image)
    assert (cache.num_searched, again.num_searched) == (1, 0)
    assert found.dtype == torch.float32
    assert torch.equal(found, search_picture(image))
    image[0, 3, 5] += 1
    again(image)
    again(image.view(3, 72, 64))  # the same bytes in another shape are another picture
    assert again.num_searched == 2


def test_a_run_with_it_has_the_numbers_of_one_without(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def run(name: str, **train: Any) -> tuple[list[float], list[Any]]:
        config = make_config(
            name,
            heads={"source": "vision", "mask": "query", "vision_layers": [0, 2], "noise_residual": NOISE},
            loss={"text": 0.0},
            train={"trainable": ["cls_head", "mask_head", "noise_residual"], "max_steps": 6, "eval_steps": 3, **train},
        )
        trainer = build_trainer(config)[0]
        trainer.train()
        keys = ("loss", "grad_norm", "eval_loss")
        numbers = [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]
        return numbers, [m.search for m in trainer.bundle.model.modules() if hasattr(m, "search")]

    plain, _ = run("plain")
    folder = str(tmp_path / "searches")
    first, (cache,) = run("first", search_cache=folder)
    assert cache.num_searched == cache.store.count() > 0
    again, (cache,) = run("again", search_cache=folder)
    assert cache.num_searched == 0
    assert plain == first == again


def test_where_it_is_of_no_use_is_said(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config("run", heads={"noise_residual": NOISE}, train={"search_cache": "searches"})
    assert search_cache_problems(config) == []
    masked = dataclasses.replace(config, region_masking=RegionMaskingConfig(enabled=True))
    attacked = dataclasses.replace(config, adversarial=AdversarialConfig(share=0.5, target="pixels"))
    for changed in (masked, attacked):
        (problem,) = search_cache_problems(changed)
        assert "changes the pixels" in problem
    idle = make_config("idle", train={"search_cache": "searches"})
    with pytest.raises(ConfigError, match=r"nothing is searched; it needs heads\.noise_residual"):
        build_trainer(idle)
