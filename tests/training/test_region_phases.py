"""The three phases on candidate regions, from the ready files: each goes on from the one before, on the tiny model.

As written there (bf16, gradient checkpointing, QLoRA); smaller are the model, the images, and the number of steps.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from child_process import killed_at, run_in_child
from safetensors.torch import load_file

from finetune.cli import main
from finetune.config import ModelConfig, RunConfig, load_config
from finetune.data.image_frame import processed_size
from finetune.models.loading import load_bundle
from finetune.training.checkpoint import checkpoints
from finetune.training.run import build_trainer, train

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("runtime", "per_second", "seconds", "memory")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about the candidates of the samples: `train.jsonl`, `val.jsonl`, `test.jsonl`."""
    out = tmp_path_factory.mktemp("regions")
    config = ["--config", str(ROOT / "configs" / "data" / "regions.yaml"), "--set", f"out_dir={out}"]
    places = [f"{kind}_dir={ROOT / 'data' / 'samples' / 'regions' / kind}" for kind in ("abnormal", "normal")]
    assert main(["regions", "prepare", *config, *places]) == 0
    assert main(["regions", "build", *config, *places, "--template", "en"]) == 0
    for split, count in (("train", 6), ("val", 4)):
        path = out / f"{split}.jsonl"
        path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    return out


def overrides(built: Path, model: Path, out: Path, *more: str) -> list[str]:
    return [
        f"model_name={model}",
        f"output_dir={out}",
        "image_short_side=84",
        f"data.train_jsonl={built / 'train.jsonl'}",
        f"data.val_jsonl=[{built / 'val.jsonl'}]",
        "optim.grad_accum=1",
        "optim.warmup_steps=0",
        "train.max_steps=3",
        "trainer.eval_steps=2",
        "trainer.logging_steps=1",
        "trainer.dataloader_num_workers=0",
        "trainer.report_to=none",
        "trainer.disable_tqdm=true",
        *more,
    ]


def config_of(name: str, built: Path, model: Path, out: Path, *more: str) -> RunConfig:
    return load_config(ROOT / "configs" / "train" / f"{name}.yaml", overrides(built, model, out, *more))


def whole_and_lora(folder: Path) -> tuple[set[str], set[str]]:
    """Modules that an adapter folder holds whole, and those it has LoRA on; numbers of language layers dropped."""
    names = {name.removeprefix("base_model.model.") for name in load_file(folder / "adapter_model.safetensors")}
    lora = {re.sub(r"layers\.\d+", "layers", name.split(".lora_")[0]) for name in names if ".lora_" in name}
    whole = {re.sub(r"(merger|blocks\.\d+)\..*", r"\1", name) for name in names if ".lora_" not in name}
    return whole, lora


def losses(out: Path) -> dict[int, float]:
    history = json.loads((out / "history.json").read_text())
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


@pytest.mark.parametrize("first", ["regions_phase1", pytest.param("regions_phase1_qlora", marks=pytest.mark.slow)])
def test_three_phases_go_on_from_each_other(first: str, built: Path, tiny_dir: Path, tmp_path: Path) -> None:
    rates = ["optim.lr_lm=1e-3", "optim.lr_proj=1e-3", "optim.lr_vision=1e-3"]
    outs = [tmp_path / f"phase{number}" for number in (1, 2, 3)]
    starts = [[], *([f"model.adapter={out / 'best'}"] for out in outs)]
    towers = ["true", "lora_top_2", "top_1"]
    names = [first, "regions_phase2", "regions_phase3"]
    for name, out, start, tower in zip(names, outs, starts, towers, strict=False):
        config = config_of(name, built, tiny_dir, out, f"freeze.vision_tower={tower}", *start, *rates)
        assert (config.train.precision, config.model.dtype) == ("bf16", "bfloat16")
        record = train(config)
        assert record["steps"] == 3
        best = json.loads((out / "best" / "best.json").read_text())
        assert (best["metric"], best["value"]) == ("eval_loss", min(losses(out).values()))
        rows = re.findall(r"^(\w+) +\d+ +[\d,]+ +(\S+)$", (out / "trainable.txt").read_text(), re.MULTILINE)
        assert rows == [(group, "0.001") for group in config.train.trainable]

    layers = {f"model.language_model.layers.self_attn.{part}_proj" for part in "qkvo"}
    layers |= {f"model.language_model.layers.mlp.{part}_proj" for part in ("gate", "up", "down")}
    blocks = {
        number: {f"model.visual.blocks.{number}.attn.{part}" for part in ("qkv", "proj")}
        | {f"model.visual.blocks.{number}.mlp.{part}_proj" for part in ("gate", "up", "down")}
        for number in (1, 2)
    }
    merger = "model.visual.merger"
    assert whole_and_lora(outs[0] / "best") == ({merger}, layers)
    assert whole_and_lora(outs[1] / "best") == ({merger}, layers | blocks[1] | blocks[2])
    assert whole_and_lora(outs[2] / "best") == ({merger, "model.visual.blocks.2"}, layers | blocks[1])

    loaded = load_bundle(ModelConfig(path=str(outs[2] / "best")))  # from its own folder and the base alone
    assert not loaded.base.has_heads
    assert processed_size((112, 224), loaded.processor.image_processor) == (84, 168)


@pytest.mark.slow
def test_region_features_go_on_with_the_phases(built: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Switched on in phase 1 alone: its folder brings them along, and they stay as they are."""
    starts = {"regions_phase1": "null", "regions_phase2": str(tmp_path / "regions_phase1" / "best")}
    held = []
    for name, start in starts.items():
        more = [f"model.adapter={start}", f"model.region_features={start == 'null'}".lower()]
        tower = "true" if start == "null" else "lora_top_2"
        config = config_of(name, built, tiny_dir, tmp_path / name, *more, f"freeze.vision_tower={tower}")
        assert ("region_features" in config.train.trainable) == (start == "null")
        train(config)
        tensors = load_file(tmp_path / name / "best" / "adapter_model.safetensors")
        held.append({key: value for key, value in tensors.items() if "region_projection" in key})
    assert held[0]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(value, held[1][key]) for key, value in held[0].items())


def test_a_phase_starts_where_the_one_before_ended(built: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """In float32 the validation loss before the first step of phase 3 is that of phase 2's model; the block that had
    LoRA and now trains whole among it."""
    rates = ["optim.lr_lm=1e-3", "optim.lr_proj=1e-3", "optim.lr_vision=1e-3"]
    exact = ["precision=fp32", "trainer.bf16=false", "peft.dropout=0"]
    found = {}
    for name, tower, start in (
        ("regions_phase2", "lora_top_2", "null"),
        ("regions_phase3", "top_1", str(tmp_path / "regions_phase2" / "best")),
    ):
        more = [f"freeze.vision_tower={tower}", f"model.adapter={start}", *rates, *exact, "trainer.eval_steps=3"]
        config = config_of(name, built, tiny_dir, tmp_path / name, *more)
        trainer = build_trainer(config)[0]
        found[name, "before"] = trainer.evaluate()["eval_loss"]
        if name == "regions_phase2":
            train(config, overwrite=True)  # the folder holds the run that was only built
            found[name, "after"] = losses(tmp_path / name)[3]
    assert found["regions_phase3", "before"] == pytest.approx(found["regions_phase2", "after"], abs=1e-6)
    named = [*exact, "freeze.vision_tower=top_1", "model.adapter=null", f"model_name={start}"]
    trainer = build_trainer(config_of("regions_phase3", built, tiny_dir, tmp_path / "named", *named))[0]
    assert trainer.evaluate()["eval_loss"] == found["regions_phase3", "before"]  # model_name may be the folder itself
    assert found["regions_phase2", "before"] != pytest.approx(found["regions_phase2", "after"], abs=1e-3)


@pytest.mark.parametrize("name", ["regions_phase1", "regions_phase1_qlora"])
@pytest.mark.slow
def test_killed_phase_resumes_with_equal_losses(name: str, built: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """`--resume` after a `kill -9` in the middle of step 4; every logged number is that of the uninterrupted run."""
    more = ["train.max_steps=5", "trainer.save_steps=2", "train.resume=auto"]
    outs = {kind: tmp_path / kind for kind in ("whole", "killed")}
    torch.set_num_threads(1)
    train(config_of(name, built, tiny_dir, outs["whole"], *more))
    config = config_of(name, built, tiny_dir, outs["killed"], *more)
    assert run_in_child(killed_at("on_pre_optimizer_step", 3), config) == -signal.SIGKILL
    assert [path.name for path in checkpoints(outs["killed"])] == ["checkpoint-2"]
    arguments = [each for each in overrides(built, tiny_dir, outs["killed"], *more) if each != "train.resume=auto"]
    path = ROOT / "configs" / "train" / f"{name}.yaml"
    assert main(["train", "--config", str(path), "--resume", *arguments]) == 0
    histories = [
        [
            {key: value for key, value in entry.items() if not any(part in key for part in TIMES)}
            for entry in json.loads((out / "history.json").read_text())
        ]
        for out in outs.values()
    ]
    assert histories[0] == histories[1]
    ours, theirs = (load_file(out / "best" / "adapter_model.safetensors") for out in outs.values())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_long_lists_are_shortened_in_training_and_divided_in_validation(
    built: Path, tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of("regions_phase1", built, tiny_dir, tmp_path / "run", "max_regions_per_image=2")
    with caplog.at_level("WARNING"):
        trainer = build_trainer(config)[0]
    lengths = {
        split: [len(r["provenance"]["regions"]) for r in read(built / f"{split}.jsonl")] for split in ("train", "val")
    }
    left_out = sum(max(length - 2, 0) for length in lengths["train"])
    assert left_out
    assert f"data.max_regions = 2 candidate regions: {left_out} candidates are left out" in caplog.text
    counts = [len(record.provenance["regions"]) for record in trainer.train_dataset.records]
    assert counts == [min(length, 2) for length in lengths["train"]]
    held = [len(record.provenance["regions"]) for record in trainer.eval_dataset.records]
    assert max(held) <= 2
    assert sum(held) == sum(lengths["val"])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("image_short_side=0", "data.image_short_side is 0; expected at least 1"),
        ("max_regions_per_image=0", "data.max_regions is 0; expected at least 1"),
        ("optim.warmup_steps=-1", "train.warmup_steps is -1; expected a number from 0 on"),
        ("trainer.logging_step=2", "'logging_step' is no field of transformers.TrainingArguments; did you mean"),
        (
            "train.trainer_args.lr_scheduler_type=cosine",
            "train.trainer_args.lr_scheduler_type .* set train.lr_scheduler",
        ),
    ],
)
def test_doctor_names_what_is_wrong(
    built: Path, tiny_dir: Path, tmp_path: Path, change: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "configs" / "train" / "regions_phase1.yaml"
    more = overrides(built, tiny_dir, tmp_path / "run", "optim.weight_decay=0.02")
    more = [each for each in more if each.split("=")[0] != change.split("=")[0]]
    assert main(["doctor", "--config", str(path), *more, change]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert main(["doctor", "--config", str(path), *more]) == 0
