"""Two CPU ranks under DDP, ZeRO-2 and ZeRO-3, started as a user starts them: `bash script/sft_llm.sh CONFIG overrides`.

The first start on a machine compiles one operator (about a minute); later ones find it in the torch extensions cache.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune.config import ModelConfig, load_config
from finetune.errors import ConfigError
from finetune.models.loading import load_bundle
from finetune.training.run import build_trainer, train
from finetune.training.sharding import check_sharding

STAGE_1 = ["new_tokens", "cls_head", "mask_head", "noise_residual"]
LORA = [*STAGE_1, "lm_lora"]
FULL = ["cls_head", "mask_head", "noise_residual", "lm_full", "vision_full"]


def launch(repo_root: Path, kind: str, config: Path, *overrides: str) -> str:
    """Two ranks with one thread each under a configuration of configs/accelerate; what they printed.

    Where this environment was not made by script/setup.sh, the script would begin by installing packages; then the
    command that it ends with is run directly.
    """
    accelerate = repo_root / "configs" / "accelerate" / f"{kind}.yaml"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "ACCELERATE_CONFIG": str(accelerate)}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if (repo_root / ".venv" / ".forensics-setup").is_file():
        command = ["bash", str(repo_root / "script" / "sft_llm.sh"), str(config)]
    else:
        tools = repo_root / ".venv" / "bin"
        environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
        launcher = ["accelerate", "launch", "--config_file", str(accelerate), "--main_process_port", "0"]
        command = [*launcher, str(repo_root / "sft_llm.py"), "--config", str(config)]
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


SEQUENTIAL = {"train_sampling_strategy": "sequential", "disable_tqdm": True}
SLOW = pytest.mark.slow
KEYS = ("learning_rate", "grad_norm", "eval_auroc", "eval_pixel_f1", "eval_text_drift")
"""Compared beside every loss. The text drift runs the model without images, under ZeRO-3 too."""


def section(trainable: list[str], **changes: Any) -> dict[str, Any]:
    """Clipping below the norms that occur, and weight decay, so that both must agree as well."""
    train = {"trainable": trainable, "max_steps": 4, "eval_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1}
    return {"train": {**train, "trainer_args": SEQUENTIAL, **changes}, "lora": {"dropout": 0.0}}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "trainable"),
    [
        ("zero2_cpu", STAGE_1),
        pytest.param("cpu_ddp", LORA, marks=SLOW),
        pytest.param("zero2_cpu", FULL, marks=SLOW),
        pytest.param("zero3_cpu", LORA, marks=SLOW),
        pytest.param("zero3_cpu", FULL, marks=SLOW),
    ],
    ids=["zero2-stage_1", "ddp-lora", "zero2-full", "zero3-lora", "zero3-full"],
)
def test_two_ranks_equal_one(
    kind: str, trainable: list[str], write_config: Callable[..., Path], repo_root: Path, tmp_path: Path
) -> None:
    """Same losses, gradient norms and metrics at every step, same weights at the end, in a folder that loads."""
    data = {"class_balanced": False}
    one = write_config("one", data=data, **section(trainable, batch_size=4))
    shape = {"batch_size": 2} if kind == "zero3_cpu" else {"batch_size": 1, "gradient_accumulation_steps": 2}
    two = write_config("two", data=data, **section(trainable, **shape))
    printed = launch(repo_root, kind, two, "seed=0")
    assert printed.count("trained 4 steps") == 1  # one rank speaks
    train(load_config(one))

    ours, theirs = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    assert any("eval_text_drift" in entry for entry in ours) == bool({"lm_lora", "lm_full"} & set(trainable))
    for expected, found in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            if "loss" in key or key in KEYS:
                assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (key, expected["step"])
    bundles = [
        load_bundle(ModelConfig(path=str(tmp_path / name / "checkpoint-4"), dtype="float32")) for name in ("one", "two")
    ]
    start = load_bundle(load_config(one).model, heads=load_config(one).heads).base.state_dict()
    states = [bundle.model.state_dict() for bundle in bundles]
    assert states[0].keys() == states[1].keys()
    moved = 0
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-4, msg=name)  # measured: 1.2e-5
        plain = name.replace("base_model.model.", "").replace("modules_to_save.default.", "")
        moved += plain in start and not torch.equal(tensor, start[plain])
    assert moved > 5


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("kind", ["cpu_ddp", "zero2_cpu", "zero3_cpu"])
def test_two_ranks_resume_bit_equal(
    kind: str, write_config: Callable[..., Path], repo_root: Path, tmp_path: Path
) -> None:
    """From a checkpoint in the middle of an epoch, with the class-balanced sampler."""
    changes = section(LORA, batch_size=2, eval_steps=2, trainer_args={"disable_tqdm": True})
    launch(repo_root, kind, write_config("whole", **changes))
    config = write_config("resumed", **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert "checkpoint-2" in launch(repo_root, kind, config, "train.resume=auto")
    names = ("whole", "resumed")
    ours, theirs = (json.loads((tmp_path / name / "history.json").read_text()) for name in names)
    for expected, found in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            if "loss" in key or key == "grad_norm":
                assert found[key] == value, (key, expected["step"])
    ours, theirs = (load_file(tmp_path / name / "checkpoint-4" / "adapter_model.safetensors") for name in names)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["zero2_cpu", "zero3_cpu"])
def test_bf16_trains_near_float32(
    kind: str, write_config: Callable[..., Path], repo_root: Path, tmp_path: Path
) -> None:
    """DeepSpeed casts heads and token rows too: they run in bf16, train, evaluate, and load from the checkpoint."""
    data = {"class_balanced": False}
    launch(repo_root, kind, write_config("half", data=data, **section(LORA, batch_size=2, precision="bf16")))
    one = write_config("one", data=data, **section(LORA, batch_size=4))
    train(load_config(one))
    ours, theirs = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("half", "one"))
    for found, expected in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            if "loss" in key:
                assert found[key] == pytest.approx(value, rel=0.1, abs=0.02), (key, expected["step"])
    stored = load_file(tmp_path / "half" / "checkpoint-4" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "_head." in name} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in stored.values())
    bundle = load_bundle(ModelConfig(path=str(tmp_path / "half" / "checkpoint-4"), dtype="bfloat16"))
    assert {p.dtype for module in bundle.base.head_modules() for p in module.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3000)  # the first start compiles DeepSpeed's CPU Adam, minutes on a busy machine
@pytest.mark.parametrize("kind", ["zero2_offload", "zero3_offload", "multi_node"])
def test_configurations_for_gpus_train_as_they_stand(
    kind: str, write_config: Callable[..., Path], repo_root: Path, tmp_path: Path
) -> None:
    """Offloaded parts, and two machines with a rank each; of the file only device, precision and counts differ."""
    settings = yaml.safe_load((repo_root / "configs" / "accelerate" / f"{kind}.yaml").read_text(encoding="utf-8"))
    accelerate = tmp_path / f"{kind}.yaml"
    accelerate.write_text(yaml.safe_dump({**settings, "use_cpu": True, "mixed_precision": "no", "num_processes": 2}))
    trainable = FULL if "offload" in kind else LORA
    changes = section(trainable, max_steps=2)
    data = {"class_balanced": False, "eval": []}
    path = write_config("two", data=data, **{**changes, "train": {**changes["train"], "batch_size": 2}})
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    tools = repo_root / ".venv" / "bin"
    program = str(tools / "accelerate") if (tools / "accelerate").is_file() else "accelerate"
    command = [program, "launch", "--config_file", str(accelerate), "--main_process_port", port]
    machines: list[list[str]] = [[]]
    if kind == "multi_node":
        machines = [["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"] for rank in (0, 1)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    started = [
        subprocess.Popen(
            [*command, *machine, str(repo_root / "sft_llm.py"), "--config", str(path)],
            env=environment,
            stdout=(tmp_path / f"machine{number}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for number, machine in enumerate(machines)
    ]
    for number, process in enumerate(started):
        assert process.wait(timeout=2400) == 0, (tmp_path / f"machine{number}.log").read_text()[-6000:]
    train(load_config(write_config("one", data=data, **{**changes, "train": {**changes["train"], "batch_size": 4}})))
    ours, theirs = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    for expected, found in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm"):
            if key in expected:
                assert found[key] == pytest.approx(expected[key], rel=1e-4), (key, expected["step"])
    states = list((tmp_path / "two" / "checkpoint-2").glob("rng_state_*.pth"))
    assert len(states) == 2  # two ranks, and DeepSpeed: accelerate's --cpu would have dropped both
    assert (tmp_path / "two" / "checkpoint-2" / "latest").is_file()


# ---- what ZeRO-3 cannot do ----


def arguments(gathers: bool = True, stage: int = 3, bf16: bool = False) -> Any:
    """What `check_sharding` reads of TrainingArguments: accelerate's own plugin."""
    from types import SimpleNamespace

    from accelerate import DeepSpeedPlugin

    return SimpleNamespace(
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, zero3_save_16bit_model=gathers, zero3_init_flag=False),
        bf16=bf16,
        fp16=False,
    )


def test_zero3_refuses_in_words(
    make_config: Callable[..., Any], mixed_records: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(data={"train": [str(mixed_records)], "eval": []})
    trainer = build_trainer(config)[0]
    with pytest.raises(ConfigError, match=r"record 'text' and 1 others have no image.*use zero2"):
        check_sharding(config, arguments(), trainer.train_dataset, None)
    check_sharding(config, arguments(stage=2), trainer.train_dataset, None)
    check_sharding(config, arguments(), None)
    assert not caplog.text
    check_sharding(config, arguments(bf16=True), None)
    assert "heads and new token rows in that precision too" in caplog.text
    with pytest.raises(ConfigError, match="zero3_save_16bit_model: true"):
        check_sharding(config, arguments(gathers=False), None)
    config.model.quantization = "nf4"
    with pytest.raises(ConfigError, match="nf4 cannot be divided by ZeRO-3"):
        check_sharding(config, arguments(), None)
