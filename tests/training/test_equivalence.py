"""Test 3 of the main job: one batch of 4, four accumulated ones of 1 and two ranks of 2 give one loss and one gradient.

The records have unequal numbers of tokens, masks and images. `contrast_image` is left out on purpose: its pairs are the
images of one micro-batch on one device, so its value depends on how the batch is cut (`functional.image_contrast`).

A gradient's difference is measured against the largest entry of its tensor (or a thousandth of the largest of all, for
tensors whose gradient vanishes). In float32 on CPU it is at most 1e-5.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_capture import train_and_capture

from finetune.config import RunConfig

TOLERANCE = 2e-5  # of a tensor's largest gradient entry
LOSSES = {
    "text": 1.0, "focal": 1.0, "dice": 0.7, "boundary": 0.3, "authentic": 0.9, "bce": 0.4, "contrast_region": 0.2,
    "operation": 0.6,
}  # fmt: skip
OPERATIONS = ["splice", "retouch"]
ALL_GROUPS = ["cls_head", "mask_head", "noise_residual", "lm_full", "vision_full"]
STAGE_1 = ["new_tokens", "cls_head", "mask_head", "noise_residual"]


@pytest.fixture
def equal_config(make_config: Callable[..., RunConfig], mixed_records: Path) -> Callable[..., RunConfig]:
    """Same records in file order, plain SGD without clipping, so that step 2 also shows step 1's update."""

    def make(name: str, batch_size: int, accumulation: int, trainable: list[str], **data: Any) -> RunConfig:
        return make_config(
            name,
            heads={"noise_residual": {"content_residuals": True, "exact_repeats": True}, "operations": OPERATIONS},
            data={"train": [str(mixed_records)], "eval": [], "class_balanced": False, "template": "en", **data},
            loss=LOSSES,
            train={
                "trainable": trainable,
                "batch_size": batch_size,
                "gradient_accumulation_steps": accumulation,
                "max_grad_norm": 0,
                "learning_rate": 1.0e-2,
                "lr_scheduler": "constant",
                "warmup_ratio": 0,
                "trainer_args": {"optim": "sgd", "train_sampling_strategy": "sequential", "save_strategy": "no"},
            },
        )

    return make


@pytest.mark.distributed
def test_one_batch_equals_accumulation_equals_two_ranks(equal_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Rank 0's first batch is text only, its second has no tampered mask; neither may hang or weigh wrongly."""
    groups = {"full": ALL_GROUPS, "stage_1": STAGE_1}
    for name, trainable in groups.items():
        equal_config(f"ranks_{name}", 2, 1, trainable)
    ranks = run_ranks([tmp_path / f"ranks_{name}.yaml" for name in groups], tmp_path / "ranks.pt")
    for i, (name, trainable) in enumerate(groups.items()):
        whole = train_and_capture(equal_config(f"whole_{name}", 4, 1, trainable))
        assert len(whole["gradients"]) == 2
        assert_same(whole, train_and_capture(equal_config(f"single_{name}", 1, 4, trainable)))
        assert_same(whole, ranks[0][i])
        for parameter, weight in ranks[0][i]["weights"].items():
            assert torch.equal(weight, ranks[1][i]["weights"][parameter]), parameter


@pytest.mark.slow
@pytest.mark.distributed
def test_heads_on_the_tower_are_as_exact_and_ranks_share_a_feature_cache(
    make_config: Callable[..., RunConfig], mixed_records: Path, tmp_path: Path
) -> None:
    """Pictures alone: one batch of 4, four of 1, and two ranks of 2 that fill one cache together, with every loss."""
    pictures = mixed_records.with_name("pictures.jsonl")  # paths in it are relative
    records = [record for record in map(json.loads, mixed_records.read_text().splitlines()) if record.get("images")]
    again = [{**record, "id": f"{record['id']}_again"} for record in records[:2]]  # the same images: two cached names
    pictures.write_text("".join(json.dumps(record) + "\n" for record in [*records, *again]))
    assert len(records) == 6

    def make(name: str, batch_size: int, accumulation: int, **train: Any) -> RunConfig:
        return make_config(
            name,
            heads={"source": "vision", "vision_layers": [0, 2], "operations": OPERATIONS},
            data={"train": [str(pictures)], "eval": [], "class_balanced": False},
            loss={**LOSSES, "text": 0.0, "evidence": 0.6, "sparsity": 0.5},
            train={
                "trainable": ["neck", "cls_head", "mask_head", "noise_residual"],
                "batch_size": batch_size,
                "gradient_accumulation_steps": accumulation,
                "max_grad_norm": 0,
                "learning_rate": 1.0e-2,
                "lr_scheduler": "constant",
                "warmup_ratio": 0,
                "trainer_args": {"optim": "sgd", "train_sampling_strategy": "sequential", "save_strategy": "no"},
                **train,
            },
        )

    make("ranks", 2, 1, feature_cache=str(tmp_path / "features"))
    ranks = run_ranks([tmp_path / "ranks.yaml"], tmp_path / "ranks.pt")
    whole = train_and_capture(make("whole", 4, 1))
    assert len(whole["gradients"]) == 2
    assert_same(whole, train_and_capture(make("single", 1, 4)), "loss_evidence")
    assert_same(whole, ranks[0][0], "loss_evidence")
    for parameter, weight in ranks[0][0]["weights"].items():
        assert torch.equal(weight, ranks[1][0]["weights"][parameter]), parameter
    assert list((tmp_path / "features").rglob("*.safetensors"))
    assert not list((tmp_path / "features").rglob("*.tmp"))


def test_shorter_last_window_equals_one_batch(equal_config: Callable[..., RunConfig], mixed_records: Path) -> None:
    """Seven records: the second step has three, accumulated as 1+1+1 and as 2+1."""
    seven = mixed_records.with_name("seven.jsonl")
    seven.write_text("".join(mixed_records.read_text().splitlines(keepends=True)[:7]))
    runs = [
        train_and_capture(equal_config(f"run{size}", size, steps, ALL_GROUPS, train=[str(seven)]))
        for size, steps in ((4, 1), (1, 4), (2, 2))
    ]
    for run in runs[1:]:
        assert_same(runs[0], run)


def test_gradients_depend_on_every_term(equal_config: Callable[..., RunConfig]) -> None:
    """The comparison would see a term weighted wrongly: 1 % more of one weight is far beyond the tolerance."""
    base = train_and_capture(equal_config("base", 8, 1, ALL_GROUPS))["gradients"][:1]
    for name in LOSSES:
        config = equal_config(f"more_{name}", 8, 1, ALL_GROUPS)
        setattr(config.loss, name, LOSSES[name] * 1.01)
        config.train.max_steps = 1
        changed = train_and_capture(config)["gradients"]
        assert largest_difference(base, changed)[0] > 10 * TOLERANCE, name


def run_ranks(configs: list[Path], out: Path, processes: int = 2) -> list[list[dict[str, Any]]]:
    """`gradient_capture.py` on gloo processes with one thread each; per rank what each run captured."""
    script = Path(__file__).with_name("gradient_capture.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [
            *command,
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            str(script),
            str(out),
            *map(str, configs),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(processes)]


def largest_difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> tuple[float, str]:
    """Largest difference over steps and parameters, as a share of the tensor's largest entry, and where."""
    worst = (0.0, "")
    assert len(first) == len(second)
    for step, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        assert ours.keys() == theirs.keys()
        overall = max(gradient.abs().max() for gradient in ours.values())
        for name, gradient in ours.items():
            scale = max(float(gradient.abs().max()), 1e-3 * float(overall))
            worst = max(worst, (float((gradient - theirs[name]).abs().max()) / scale, f"step {step + 1} {name}"))
    return worst


def assert_same(first: dict[str, Any], second: dict[str, Any], term: str = "loss_text") -> None:
    difference, where = largest_difference(first["gradients"], second["gradients"])
    print(f"largest relative gradient difference {difference:.1e} at {where}")
    assert difference < TOLERANCE, where
    for ours, theirs in zip(first["logs"], second["logs"], strict=True):
        assert {key for key in ours if key.startswith("loss")} >= {"loss", term}
        for key in ours:
            if key.startswith("loss"):
                assert theirs[key] == pytest.approx(ours[key], rel=2e-5, abs=1e-6), key
