"""DeepSpeed ZeRO-2 on two CPU ranks, started as a user starts it: `bash script/sft_llm.sh CONFIG overrides`.

The first start on a machine compiles one operator (about a minute); later ones find it in the torch extensions cache.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config import ModelConfig, load_config
from finetune.models.loading import load_bundle
from finetune.training.run import train

STAGE_1 = ["new_tokens", "cls_head", "mask_head", "noise_residual"]
FULL = ["cls_head", "mask_head", "noise_residual", "lm_full", "vision_full"]


def launch(repo_root: Path, config: Path, *overrides: str) -> str:
    """Two ZeRO-2 ranks with one thread each; what they printed.

    Where this environment was not made by script/setup.sh, the script would begin by installing packages; then the
    command that it ends with is run directly.
    """
    zero2 = repo_root / "configs" / "accelerate" / "zero2_cpu.yaml"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "ACCELERATE_CONFIG": str(zero2), "OMP_NUM_THREADS": "1"}
    if (repo_root / ".venv" / ".forensics-setup").is_file():
        command = ["bash", str(repo_root / "script" / "sft_llm.sh"), str(config)]
    else:
        tools = repo_root / ".venv" / "bin"
        environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
        launcher = ["accelerate", "launch", "--config_file", str(zero2), "--main_process_port", "0"]
        command = [*launcher, str(repo_root / "sft_llm.py"), "--config", str(config)]
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("trainable", [STAGE_1, pytest.param(FULL, marks=pytest.mark.slow)], ids=["stage_1", "full"])
def test_zero2_on_two_ranks_equals_one(
    trainable: list[str], write_config: Callable[..., Path], repo_root: Path, tmp_path: Path
) -> None:
    section: dict[str, Any] = {
        "trainable": trainable,
        "max_steps": 3,
        "eval_steps": 3,
        "max_grad_norm": 0.5,  # below the norms that occur, so that clipping must agree as well
        "weight_decay": 0.1,
        "trainer_args": {"train_sampling_strategy": "sequential", "disable_tqdm": True},
    }
    data = {"class_balanced": False}
    one = write_config("one", data=data, train={**section, "batch_size": 4})
    two = write_config("two", data=data, train={**section, "batch_size": 1, "gradient_accumulation_steps": 2})
    printed = launch(repo_root, two, "seed=0")
    assert printed.count("trained 3 steps") == 1  # one rank speaks
    train(load_config(one))

    ours, theirs = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for expected, found in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            if "loss" in key or key in ("learning_rate", "eval_auroc", "eval_pixel_f1", "eval_recall_fake"):
                assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (key, expected["step"])
    bundles = [load_bundle(ModelConfig(path=str(tmp_path / name / "best"), dtype="float32")) for name in ("one", "two")]
    start = load_bundle(load_config(one).model, heads=load_config(one).heads).base.state_dict()
    states = [bundle.model.state_dict() for bundle in bundles]
    assert states[0].keys() == states[1].keys()
    moved = 0
    worst = max(float((states[1][name] - tensor).abs().max()) for name, tensor in states[0].items())
    print(f"largest difference of a weight {worst:.1e}")
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-4, msg=name)  # measured: 1.2e-5
        plain = name.replace("base_model.model.", "").replace("modules_to_save.default.", "")
        moved += plain in start and not torch.equal(tensor, start[plain])
    assert moved > 5
