"""What a run shows of itself: rates, throughput, text retention, pictures, and a complete record of its making."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config import RunConfig
from finetune.errors import ConfigError
from finetune.training.monitoring import Throughput, evaluation_warnings, tinted
from finetune.training.retention import PROMPTS, REFERENCE, TextRetention
from finetune.training.run import build_trainer, train

Make = Callable[..., RunConfig]
LORA = ["new_tokens", "cls_head", "mask_head", "noise_residual", "lm_lora"]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, synth_dir: Path, write_small: Callable[..., Path]
) -> Path:
    """Four steps of LoRA with two rates, evaluated every two, with TensorBoard."""
    from finetune.config import load_config

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("watched") / "run"
    section = {"trainable": LORA, "max_steps": 4, "eval_steps": 2, "report_to": ["tensorboard"], "warmup_ratio": 0}
    path = write_small(
        out.with_suffix(".yaml"),
        output_dir=str(out),
        model={"path": str(tiny_dir)},
        data={split: [str(synth_dir / f"{split}.jsonl")] for split in ("train", "eval")},
        train={**section, "group_learning_rates": {"lm_lora": 5.0e-4}},
    )
    train(load_config(path))
    return out


def test_log_has_rates_throughput_and_memory(finished: Path) -> None:
    entries = [e for e in json.loads((finished / "history.json").read_text()) if "loss" in e]
    for entry in entries:
        assert entry["lr_cls_head"] == pytest.approx(entry["learning_rate"])
        assert entry["lr_lm_lora"] == pytest.approx(entry["learning_rate"] / 2)
        assert entry["images_per_second"] > 0
        assert entry["tokens_per_second"] > 20 * entry["images_per_second"]  # a record has tokens beside its image's
        assert 0.1 < entry["peak_memory_gb"] < 50
    assert entries[0]["lr_lm_lora"] == 5.0e-4


def test_tensorboard_has_pictures_and_numbers(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/lr_lm_lora", "train/images_per_second", "eval/text_drift", "eval/recall_fake"} <= set(
        tags["scalars"]
    )
    assert len(tags["images"]) == 4
    for tag in tags["images"]:
        shown = events.Images(tag)
        assert [picture.step for picture in shown] == [2, 4]
        assert shown[0].width == 3 * (shown[0].width // 3) > shown[0].height


def test_tint_is_red_where_the_score_is() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    shown = tinted(image, np.array([[0.0, 1.0], [0.5, 0.0]]))
    assert shown[0, 0].tolist() == shown[1, 1].tolist() == [100, 100, 100]
    assert shown[0, 1].tolist() == [193, 40, 40]
    assert shown[1, 0].tolist() == [146, 70, 70]


def test_throughput_leaves_evaluations_out() -> None:
    watch = Throughput()
    watch.count({"cls_labels": torch.zeros(6), "attention_mask": torch.ones(2, 50)})
    watch._start -= 110.0
    watch.pause(100.0)
    found = watch.take(world_size=2)
    assert found["images_per_second"] == pytest.approx(1.2, rel=1e-2)
    assert found["tokens_per_second"] == pytest.approx(20.0, rel=1e-2)


def test_record_says_what_the_run_was_made_of(finished: Path) -> None:
    record = json.loads((finished / "run_record.json").read_text())
    assert {"versions", "commit", "config", "config_hash", "data_hash", "seed", "hardware", "world_size"} <= set(record)
    assert all(record["data_hash"].values())
    assert record["world_size"] == 1
    assert {"platform", "cpu_threads", "gpus"} <= set(record["hardware"])


def test_wandb_that_is_missing_is_one_line(make_config: Make) -> None:
    import importlib.util

    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match=r"report_to names wandb.*pip install wandb"):
        build_trainer(make_config(train={"report_to": ["wandb"]}))


@pytest.mark.slow
def test_wandb_gets_what_tensorboard_gets(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps offline; the run's file, read back, holds every loss term, rate and metric per class."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path), "PROJECT": "forensics"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    section = {"trainable": LORA, "max_steps": 3, "eval_steps": 3, "report_to": ["tensorboard", "wandb"]}
    train(make_config(train=section))
    wandb.finish()
    file = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 60  # another process writes the file
    while len((logged := wandb_history(file)).get("train/loss", [])) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(logged["train/loss"]) == 3
    expected = {"train/loss_text", "train/loss_focal", "train/lr_lm_lora", "train/tokens_per_second"}
    assert expected | {"eval/recall_fake", "eval/text_drift"} <= logged.keys()
    assert sum(name.startswith("eval/0_") and name.endswith("/_type") for name in logged) == 1  # its picture


def wandb_history(file: Path) -> dict[str, list[str]]:
    """Every logged value by name, as JSON, from a run's file: records in blocks of 32 KiB, as LevelDB writes logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    found: dict[str, list[str]] = {}
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            for item in record.history.item:
                found.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
    return found


# ---- text retention ----


def test_drift_is_zero_at_the_base_and_grows(make_config: Make) -> None:
    """By the adapter switched off, and the same number from the file in a resumed run."""
    config = make_config(train={"trainable": LORA, "max_steps": 1, "learning_rate": 0.05}, data={"eval": []})
    trainer = build_trainer(config)[0]
    retention = TextRetention(trainer.bundle, config.output_dir)
    retention.prepare(trainer.model, resumed_from=None, is_main=True)
    assert retention.drift(trainer.model) == pytest.approx(0, abs=1e-6)
    assert len(retention.rows) == len(PROMPTS)
    assert all(1 <= len(continuation) <= 24 for _, continuation in retention.rows)
    trainer.train()
    drift = retention.drift(trainer.model)
    assert drift > 0.001
    again = TextRetention(trainer.bundle, config.output_dir)
    again.prepare(trainer.model, resumed_from=str(Path(config.output_dir, "checkpoint-1")), is_main=True)
    assert again.drift(trainer.model) == drift
    anew = TextRetention(trainer.bundle, Path(config.output_dir) / "other")
    anew.prepare(trainer.model, resumed_from=None, is_main=True)  # of the base, not of what it has become
    assert anew.rows == retention.rows
    assert anew.base_loss == pytest.approx(retention.base_loss, abs=1e-6)


def test_continuations_are_those_of_generate(make_config: Make) -> None:
    """The batched loop without a cache gives what transformers' greedy generation gives, prompt by prompt."""
    config = make_config(train={"trainable": ["lm_full"]}, data={"eval": []})
    trainer = build_trainer(config)[0]
    retention = TextRetention(trainer.bundle, config.output_dir)
    retention.prepare(trainer.model, resumed_from=None, is_main=False)
    assert not Path(config.output_dir, REFERENCE).exists()
    model = trainer.bundle.base.eval()
    end = trainer.bundle.tokenizer.eos_token_id
    for prompt, continuation in retention.rows[:3]:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=end
        )
        assert out[0, len(prompt) :].tolist() == continuation


def test_resumed_whole_model_is_never_its_own_base(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Its reference is the file, that of the folder it is resumed from, or nothing: the base is not there any more."""
    whole = {"trainable": ["lm_full"], "max_steps": 1, "eval_steps": 1, "learning_rate": 0.05}
    config = make_config("whole", train=whole)
    trainer = build_trainer(config)[0]
    trainer.train()
    drifts = [entry["eval_text_drift"] for entry in trainer.state.log_history if "eval_text_drift" in entry]
    assert drifts[0] > 0.001
    file = Path(config.output_dir, REFERENCE)
    point = str(Path(config.output_dir, "checkpoint-1"))
    elsewhere = TextRetention(trainer.bundle, Path(config.output_dir, "elsewhere"))
    elsewhere.prepare(trainer.model, point, is_main=True)
    assert elsewhere.drift(trainer.model) == pytest.approx(drifts[0], abs=1e-6)
    assert elsewhere.file.read_text() == file.read_text()
    file.rename(file.with_suffix(".away"))
    lost = TextRetention(trainer.bundle, config.output_dir)
    lost.prepare(trainer.model, point, is_main=True)
    assert not lost.rows
    assert not file.exists()
    assert "the text drift is not measured; put the file back" in caplog.text
    trainer.retention = lost
    assert "eval_text_drift" not in trainer.evaluate()
    file.with_suffix(".away").rename(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"text_retention.json is no valid JSON"):
        lost.prepare(trainer.model, point, is_main=True)


def test_second_stage_of_whole_weights_keeps_the_first_ones_base(make_config: Make) -> None:
    """The drift of both stages adds up; measured against its own start, the second would hide the first's."""
    whole = {"trainable": ["lm_full"], "max_steps": 1, "eval_steps": 1, "learning_rate": 0.05}
    first, frozen = make_config("first", train=whole), {**whole, "learning_rate": 0.0}
    train(first)
    found = []
    for overrides in ([], ["train.trainable=[new_tokens,lm_lora]"]):
        name = f"second{len(overrides)}"
        second = make_config(name, overrides, model={"path": str(Path(first.output_dir, "best"))}, train=frozen)
        train(second)
        found.append(Path(second.output_dir, "history.json"))
    drifts = [
        [entry["eval_text_drift"] for entry in json.loads(file.read_text()) if "eval_text_drift" in entry][-1]
        for file in (Path(first.output_dir, "history.json"), *found)
    ]
    assert drifts[0] > 0.001
    assert drifts[1:] == pytest.approx([drifts[0]] * 2, abs=1e-5)


def test_frozen_language_is_not_measured(make_config: Make) -> None:
    trainer = build_trainer(make_config(train={"trainable": ["cls_head", "mask_head", "noise_residual"]}))[0]
    assert trainer.retention is None


# ---- warnings ----


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"eval_recall_real": 1.0, "eval_recall_fake": 0.04}, ["only 4% of the tampered images.*'all authentic'"]),
        ({"eval_recall_real": 0.0, "eval_recall_fake": 1.0}, ["only 0% of the authentic images.*'all tampered'"]),
        ({"eval_recall_real": 0.3, "eval_recall_fake": 0.9, "eval_text_drift": 0.2}, []),
        ({"eval_recall_real": 0.0}, []),  # one class only: nothing to collapse to
        ({"eval_text_drift": 1.25}, ["moved 1.25 nats per token"]),
    ],
)
def test_warnings_name_what_has_gone_wrong(metrics: dict[str, Any], expected: list[str]) -> None:
    import re

    found = evaluation_warnings(metrics)
    assert len(found) == len(expected)
    assert all(re.search(pattern, message) for pattern, message in zip(expected, found, strict=True))


def test_collapse_of_a_real_run_is_written_down(make_config: Make) -> None:
    """A head that calls every image tampered."""
    config = make_config(train={"max_steps": 1, "eval_steps": 1, "learning_rate": 0.0})
    trainer = build_trainer(config)[0]
    with torch.no_grad():
        trainer.bundle.base.cls_head.out.bias.fill_(50.0)
    trainer.train()
    lines = Path(config.output_dir, "warnings.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["step"] == 1
    assert "collapsing to 'all tampered'" in lines[0]
