"""The real trainer on the tiny model: what it logs, keeps, restores, refuses and learns."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.config import ModelConfig, RunConfig, SourceConfig, load_config
from finetune.data.image_frame import padded_size
from finetune.errors import ModelLoadError, TrainingDivergedError
from finetune.losses.criterion import TERMS
from finetune.models.loading import load_bundle
from finetune.special_tokens import SpecialTokens
from finetune.training.doctor import check_data_file
from finetune.training.evaluation import EvaluationState, forward
from finetune.training.reproducibility import file_hash
from finetune.training.run import build_trainer, train
from finetune.training.trainer import ForensicTrainer

from transformers import TrainerCallback  # isort: skip

Make = Callable[..., RunConfig]
STAGE_1 = ["new_tokens", "cls_head", "mask_head", "noise_residual"]
SEQUENTIAL = {"train_sampling_strategy": "sequential", "disable_tqdm": True}


def build(config: RunConfig) -> ForensicTrainer:
    return build_trainer(config)[0]


def history(trainer: ForensicTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# ---- a finished run ----


@dataclass
class Finished:
    out: Path
    record: dict[str, Any]
    printed: str
    history: list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, synth_dir: Path, write_small: Callable[..., Path]
) -> Finished:
    """Six steps with every loss term, evaluated every three, TensorBoard on."""
    out = tmp_path_factory.mktemp("finished") / "run"
    path = write_small(
        out.with_suffix(".yaml"),
        output_dir=str(out),
        model={"path": str(tiny_dir)},
        data={split: [str(synth_dir / f"{split}.jsonl")] for split in ("train", "eval")},
        heads={"operations": ["splice", "copy_move", "erase", "remove", "retouch"]},
        loss={"bce": 0.3, "contrast_image": 0.1, "evidence": 0.2, "sparsity": 0.1, "operation": 0.4},
        train={"max_steps": 6, "eval_steps": 3, "batch_size": 4, "report_to": ["tensorboard"]},
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        record = train(load_config(path))
    return Finished(out, record, printed.getvalue(), json.loads((out / "history.json").read_text()))


def test_every_term_is_logged_and_in_the_event_files(finished: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = {key for entry in finished.history for key in entry}
    assert {"loss", "learning_rate", "grad_norm", *(f"loss_{term}" for term in TERMS)} <= logged
    assert {f"eval_loss_{term}" for term in TERMS} <= logged
    events = EventAccumulator(str(finished.out / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", *(f"train/loss_{term}" for term in TERMS)} <= tags
    assert {f"eval/{name}" for name in ("auroc", "recall_real", "recall_fake", "pixel_f1", "score")} <= tags
    dice = {event.step: event.value for event in events.Scalars("train/loss_dice")}
    for entry in finished.history:
        if "loss_dice" in entry:
            assert dice[entry["step"]] == pytest.approx(entry["loss_dice"], rel=1e-6)


def test_logged_terms_add_up_to_the_loss(finished: Finished) -> None:
    """Balanced batches of four: every step has every term."""
    weights = {"bce": 0.3, "contrast_image": 0.1, "contrast_region": 0.1, "boundary": 0.2}
    weights |= {"evidence": 0.2, "sparsity": 0.1, "operation": 0.4}
    for entry in finished.history:
        if "loss" in entry and "eval_loss" not in entry:
            total = sum(weights.get(term, 1.0) * entry[f"loss_{term}"] for term in TERMS)
            assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_evaluation_has_metrics_per_class(finished: Finished) -> None:
    evaluations = [entry for entry in finished.history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    for entry in evaluations:
        recalls = entry["eval_recall_real"], entry["eval_recall_fake"]
        assert all(recall in (0, 0.25, 0.5, 0.75, 1) for recall in recalls)  # of four images each
        assert entry["eval_balanced_accuracy"] == pytest.approx(sum(recalls) / 2)
        assert entry["eval_score"] == pytest.approx((entry["eval_auroc"] + entry["eval_pixel_f1"]) / 2)


def test_output_folder_is_complete(finished: Finished) -> None:
    names = {path.name for path in finished.out.iterdir()}
    assert {"best", "config.yaml", "run_record.json", "trainable.txt", "history.json", "tensorboard"} <= names
    assert {"checkpoint-3", "checkpoint-6"} <= names
    assert not [name for name in names if name.startswith("best.")]
    again = load_config(finished.out / "config.yaml")
    assert again.train.max_steps == 6
    record = json.loads((finished.out / "run_record.json").read_text())
    assert record["steps"] == 6
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    assert record["best"] == max(entry["eval_score"] for entry in finished.history if "eval_score" in entry)


def test_best_loads_and_equals_its_checkpoint(finished: Finished) -> None:
    assert not list(finished.out.rglob("calibration.json"))  # scores of heads on tokens are used as they are
    best = json.loads((finished.out / "best" / "best.json").read_text())
    bundle = load_bundle(ModelConfig(path=str(finished.out / "best"), dtype="float32"))
    assert bundle.settings["layout"] == "tokens_first"
    ours = load_file(finished.out / "best" / "model.safetensors")
    theirs = load_file(finished.out / f"checkpoint-{best['step']}" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert bundle.base.config.text_config.use_cache is not False


def test_output_is_one_line_per_event(finished: Finished) -> None:
    lines = finished.printed.splitlines()
    assert [line.split("  ")[0] for line in lines if "loss" in line and "evaluation" not in line] == [
        f"step {step}/6" for step in range(1, 7)
    ]
    assert sum("evaluation: loss" in line and "recall_fake" in line and "pixel_f1" in line for line in lines) == 2
    assert not [line for line in lines if line.startswith("{")]  # no dictionaries
    assert not [line for line in lines if "Warning" in line or "it/s" in line]


# ---- optimiser ----


def test_groups_have_their_own_rate_and_decay(make_config: Make) -> None:
    config = make_config(
        train={
            "group_learning_rates": {"cls_head": 0.5, "vision_full": 0.25},
            "learning_rate": 0.125,
            "weight_decay": 0.1,
            "warmup_ratio": 0,
            "lr_scheduler": "constant",
        }
    )
    trainer = build(config)
    trainer.create_optimizer()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    rates = {"cls_head": 0.5, "vision_full": 0.25, "mask_head": 0.125, "noise_residual": 0.125, "lm_full": 0.125}
    for name, rate in rates.items():
        assert groups[name]["lr"] == groups[f"{name} (no decay)"]["lr"] == rate
        assert (groups[name]["weight_decay"], groups[f"{name} (no decay)"]["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    for name, group in groups.items():
        for parameter in group["params"]:
            is_free = parameter.ndim == 1 or "norm" in names[id(parameter)]
            assert ("no decay" in name) == is_free, names[id(parameter)]
    in_groups = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)


def test_token_rows_and_layer_weights_do_not_decay(make_config: Make) -> None:
    """Decay would pull rows towards zero at every step, also those that a batch does not use."""
    trainer = build(make_config(heads={"layer": "weighted"}, train={"trainable": STAGE_1, "weight_decay": 0.1}))
    trainer.create_optimizer()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert "new_tokens" not in groups
    assert [p.ndim for p in groups["new_tokens (no decay)"]["params"]] == [2]
    assert groups["new_tokens (no decay)"]["weight_decay"] == 0.0
    (mix,) = [p for n, p in trainer.model.named_parameters() if "layer_mix" in n and p.requires_grad]
    assert any(p is mix for p in groups["cls_head (no decay)"]["params"])


def test_only_the_group_with_a_rate_moves(make_config: Make) -> None:
    rates = {"cls_head": 1e-2, "mask_head": 0.0, "lm_full": 0.0, "vision_full": 0.0, "noise_residual": 0.0}
    trainer = build(make_config(data={"eval": []}, train={"group_learning_rates": rates, "max_steps": 1}))
    before = weights_of(trainer.model)
    trainer.train()
    moved = {name for name, weight in weights_of(trainer.model).items() if not torch.equal(weight, before[name])}
    assert moved
    assert all(name.startswith("cls_head.") for name in moved)


def test_term_mean_is_over_the_steps_that_have_it(make_config: Make, synth_dir: Path, tmp_path: Path) -> None:
    """Batches of one, real and tampered in turn: the logged Dice is the tampered step's, not half of it."""
    records = [json.loads(line) for line in (synth_dir / "train.jsonl").read_text().splitlines()]
    for record in records:
        record["images"] = [str(synth_dir / name) for name in record["images"]]
        record["masks"] = [str(synth_dir / name) if "." in str(name) else name for name in record["masks"]]
    real = next(record for record in records if record["labels"] == [0])
    fake = next(record for record in records if record["labels"] == [1])
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps(real) + "\n" + json.dumps(fake) + "\n")
    logs = []
    for every in (1, 2):
        trainer = build(
            make_config(
                f"every{every}",
                data={"train": [str(path)], "eval": [], "class_balanced": False},
                train={"batch_size": 1, "learning_rate": 0.0, "logging_steps": every, "trainer_args": SEQUENTIAL},
            )
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    (first, second), (both,) = logs
    assert "loss_dice" not in first
    assert "loss_authentic" not in second
    for name, single in (("loss_dice", second), ("loss_authentic", first)):
        assert both[name] == pytest.approx(single[name], rel=1e-5)
    assert both["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2, rel=1e-5)


def test_batch_without_any_weighted_term_is_a_step_of_zero(make_config: Make, mixed_records: Path) -> None:
    config = make_config(
        data={"train": [str(mixed_records)], "eval": [], "class_balanced": False},
        loss={"text": 0.0},
        train={"batch_size": 2, "max_steps": 1, "trainer_args": SEQUENTIAL},
    )
    trainer = build(config)  # the first two records are text only
    trainer.train()
    assert history(trainer, "loss") == [0.0]


# ---- budget, early stop ----


def test_time_budget_stops_and_completes_the_schedule(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.1 * next(readings))  # some steps, however slow the machine
    monkeypatch.setattr("finetune.training.schedule.time", clock)
    config = make_config(train={"max_steps": 100_000, "max_seconds": 3.0, "eval_steps": 100_000, "warmup_ratio": 0.1})
    record = train(config)
    logged = json.loads(Path(config.output_dir, "history.json").read_text())
    rates = [entry["learning_rate"] for entry in logged if "learning_rate" in entry]
    assert 8 <= record["steps"] <= 30
    assert max(rates) > 0.5e-3
    assert rates[-1] < 0.05e-3
    assert Path(config.output_dir, "best", "model.safetensors").is_file()  # evaluated once more at the end


def test_a_budget_that_is_not_needed_changes_nothing(make_config: Make) -> None:
    logs = []
    for seconds in (None, 1000.0):
        trainer = build(make_config(data={"eval": []}, train={"max_steps": 3, "max_seconds": seconds}))
        trainer.train()
        logs.append((history(trainer, "loss"), history(trainer, "learning_rate")))
    assert logs[0] == logs[1]


def test_early_stop_keeps_the_best_of_a_real_run(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.9, 0.5, 0.4, 0.99])
    monkeypatch.setattr(EvaluationState, "metrics", lambda self, weights: {"loss": 1.0, "score": next(scores)})
    config = make_config(
        train={"max_steps": 20, "eval_steps": 1, "early_stopping_patience": 2, "save_total_limit": 10, "batch_size": 1}
    )
    record = train(config)
    assert (record["steps"], record["best"]) == (4, 0.9)
    best = load_file(Path(config.output_dir, "best", "model.safetensors"))
    of_step = {n: load_file(Path(config.output_dir, f"checkpoint-{n}", "model.safetensors")) for n in (2, 4)}
    assert all(torch.equal(tensor, of_step[2][name]) for name, tensor in best.items())
    assert not all(torch.equal(tensor, of_step[4][name]) for name, tensor in best.items())


# ---- evaluation without a leak ----


@pytest.fixture
def leaking_sets(photo_records: Path, tmp_path: Path) -> dict[str, Path]:
    """The same images with a right and with a wrong reference answer, which stands before the forensic tokens."""
    records = [json.loads(line) for line in photo_records.read_text().splitlines()]
    paths = {}
    for name, words in {"right": ("authentic", "tampered"), "wrong": ("tampered", "authentic")}.items():
        lines = []
        for record in records:
            if len(record.get("images", [])) != 1 or record["id"].startswith("unmasked"):
                continue
            answer = f"This photograph is {words[record['labels'][0]]}. <cls> <mask_1> - <mask_32>"
            turns = [{"role": "user", "content": "<image>Judge."}, {"role": "assistant", "content": answer}]
            lines.append({**record, "messages": turns, "images": [str(photo_records.parent / record["images"][0])]})
            if "masks" in record and "." in record["masks"][0]:
                lines[-1]["masks"] = [str(photo_records.parent / record["masks"][0])]
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def test_head_metrics_do_not_read_the_reference_answer(
    make_config: Make, leaking_sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[EvaluationState] = []
    original = EvaluationState.metrics
    monkeypatch.setattr(EvaluationState, "metrics", lambda s, w: states.append(s) or original(s, w))  # type: ignore[func-returns-value]
    metrics = []
    for path in leaking_sets.values():
        trainer = build(make_config(data={"eval": [str(path)], "template": "en"}))
        assert trainer.eval_dataset.heads_may_read_answers
        metrics.append(trainer.evaluate())
    right, wrong = metrics
    for name in ("auroc", "recall_real", "recall_fake", "pixel_f1", "pixel_iou", "false_positive_area", "score"):
        assert right[f"eval_{name}"] == wrong[f"eval_{name}"], name
    assert states[0].scores == states[1].scores
    assert states[0].labels == states[1].labels == [1, 0, 1, 0]
    # The teacher-forced pass did see the answers: had the heads been scored on it, the comparison would have failed.
    assert right["eval_loss_focal"] != wrong["eval_loss_focal"]
    assert right["eval_loss_text"] != wrong["eval_loss_text"]


def test_a_calibration_knows_which_images_belong_together(
    make_config: Make, mixed_records: Path, tmp_path: Path
) -> None:
    """A record's group, else its pair, else its picture; of every image that is judged."""
    trainer = build(make_config(data={"eval": [str(mixed_records)]}))
    records = trainer.eval_dataset.records
    records[-1] = replace(records[-1], group="house")
    records[-2] = replace(records[-2], provenance={"pair": "twins"})
    trainer.evaluate()
    state = trainer.last_evaluation
    expected = []
    for record in records:
        own = record.group or record.provenance.get("pair") or f"image:{record.images[0].path}" if record.images else ""
        expected += [own for target in record.targets if target.label is not None]
    assert state.groups == expected
    assert len(state.groups) == len(state.logits)
    assert {"house", "twins"} <= set(expected)


@pytest.mark.parametrize("target", ["features", "pixels"])
def test_a_padded_run_trains_under_attack_and_its_folder_pads(make_config: Make, target: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"image_padding": "square"},
        "adversarial": {"share": 1.0, "target": target, "steps": 1},
    }
    heads = {"noise_residual": {"to_language": True}}
    record = train(make_config("padded", heads=heads, **changes))
    assert record["steps"] == 2
    history = json.loads((tmp_path / "padded" / "history.json").read_text())
    assert 0 <= next(entry["eval_pixel_f1"] for entry in history if "eval_pixel_f1" in entry) <= 1
    best = load_bundle(ModelConfig(path=str(tmp_path / "padded" / "best")))
    assert padded_size((84, 112), best.processor.image_processor) == (112, 112)


def test_what_a_model_was_trained_on_and_how_it_saw_is_remembered(
    make_config: Make, synth_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [str(synth_dir / name) for name in ("train.jsonl", "eval.jsonl")]
    start = make_config("first", data={"image_padding": "square"}, train={"max_steps": 1})
    train(start)
    assert "sees images otherwise" not in caplog.text
    data = {"train": [files[1]], "eval": [], "image_padding": "none"}
    train(make_config("second", [f"model.path={tmp_path}/first/best"], data=data, train={"max_steps": 1}))
    assert "{'image_padding': 'square'} and goes on with neither: it sees images otherwise" in caplog.text
    trained = json.loads((tmp_path / "second" / "best" / "forensics.json").read_text())["trained"]
    assert trained["earlier_data"] == sorted(map(file_hash, files))
    assert list(trained["data_hash"]) == [files[1]]


def test_text_first_layout_is_scored_without_answers(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    for layout, leaks in (("text_first", True), ("tokens_first", False)):
        caplog.clear()
        trainer = build(make_config(layout, data={"layout": layout}))
        assert trainer.eval_dataset.heads_may_read_answers is leaks
        assert 0 <= trainer.evaluate()["eval_auroc"] <= 1
        warnings = [message for message in caplog.messages if "gives its target away" in message]
        assert len(warnings) == 2 * leaks  # of training data and of evaluation data
        assert all("(data.layout: text_first)" in message for message in warnings)


def test_tokens_put_after_an_answer_about_an_earlier_image_are_warned_about(
    make_config: Make, photo_records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokens of all images stand together after the last one, and so behind what was said of the first."""
    pictures = [str(photo_records.parent / "a.png"), str(photo_records.parent / "b.png")]
    says = [("user", "<image>?"), ("assistant", "It is fake."), ("user", "<image>?"), ("assistant", "Real.")]
    records = [
        {"id": "late", "images": pictures, "labels": [1, 0], "messages": [{"role": r, "content": c} for r, c in says]},
        {"id": "fine", "images": pictures[:1], "labels": [1],
         "messages": [{"role": r, "content": c} for r, c in says[:2]]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = build(make_config(data={"eval": [str(tmp_path / "a.jsonl")]}))
    assert trainer.eval_dataset.leaking == ["late"]
    (warning,) = [message for message in caplog.messages if "gives its target away" in message]
    assert "in record 'late' a forensic token" in warning
    assert "ask about every image before the first answer" in warning
    _, problems = check_data_file(SourceConfig(str(tmp_path / "a.jsonl")), SpecialTokens())
    assert [problem.record for problem in problems if "gives its target away" in problem.message] == ["late"]
    _, problems = check_data_file(SourceConfig(str(tmp_path / "a.jsonl")), SpecialTokens(), layout="text_first")
    assert any("record 'late' and 1 more" in problem.message for problem in problems)


def test_without_heads_nothing_leaks(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    build(make_config(data={"layout": "text_first"}, heads={"enabled": False}))
    assert not any("gives its target away" in message for message in caplog.messages)


def test_records_of_one_name_are_scored_as_themselves(
    make_config: Make, leaking_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids may repeat over data files; each record keeps its own image and label."""
    states: list[EvaluationState] = []
    original = EvaluationState.metrics
    monkeypatch.setattr(EvaluationState, "metrics", lambda s, w: states.append(s) or original(s, w))  # type: ignore[func-returns-value]
    lines = [json.loads(line) for line in leaking_sets["right"].read_text().splitlines()]
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({**line, "id": "same"}) + "\n")
    for files in ([leaking_sets["right"]], [tmp_path / f"{n}.jsonl" for n in range(len(lines))]):
        build(make_config(data={"eval": [str(file) for file in files], "template": "en"})).evaluate()
    assert states[0].labels == states[1].labels
    assert states[0].scores == pytest.approx(states[1].scores, abs=1e-6)
    assert len(set(states[0].scores)) == 4


# ---- divergence ----


def test_loss_that_is_not_finite_names_the_records(make_config: Make) -> None:
    trainer = build(make_config())
    with torch.no_grad():
        trainer.bundle.base.cls_head.out.weight.fill_(math.nan)
    with pytest.raises(TrainingDivergedError, match=r"not finite at step 1 .*focal nan.*records \['") as caught:
        trainer.train()
    assert sum(record.id in str(caught.value) for record in trainer.train_dataset.records) == 2
    with pytest.raises(TrainingDivergedError, match=r"in evaluation .*'focal' is nan on records \['"):
        trainer.evaluate()


def test_gradient_that_is_not_finite_stops_before_the_weights_are_ruined(make_config: Make) -> None:
    trainer = build(make_config(train={"gradient_accumulation_steps": 2}))
    before = weights_of(trainer.model)
    trainer.bundle.base.cls_head.out.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDivergedError, match="gradient is not finite at step 1") as caught:
        trainer.train()
    assert sum(record.id in str(caught.value) for record in trainer.train_dataset.records) == 4  # the whole window
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer.model).items())


# ---- resume ----


@pytest.mark.parametrize("trainable", [None, [*STAGE_1, "lm_lora"]], ids=["full", "lora"])
def test_resumed_run_ends_as_the_uninterrupted_one(make_config: Make, trainable: list[str] | None) -> None:
    train_section: dict[str, Any] = {"max_steps": 4, "eval_steps": 2, "save_total_limit": 10}
    if trainable:
        train_section["trainable"] = trainable
    whole = make_config("whole", train=train_section, lora={"r": 4, "dropout": 0.0})
    train(whole)
    name = "adapter_model.safetensors" if trainable else "model.safetensors"
    resumed = make_config("resumed", train={**train_section, "resume": "auto"}, lora={"r": 4, "dropout": 0.0})
    shutil.copytree(Path(whole.output_dir, "checkpoint-2"), Path(resumed.output_dir, "checkpoint-2"))
    Path(resumed.output_dir, "checkpoint-9").mkdir()  # a crash while saving: incomplete, must not be taken
    record = train(resumed)
    assert record["steps"] == 4
    steps = [e["step"] for e in json.loads(Path(resumed.output_dir, "history.json").read_text()) if "loss" in e]
    assert steps == [1, 2, 3, 4]  # 1 and 2 from the checkpoint's state
    ours = load_file(Path(resumed.output_dir, "checkpoint-4", name))
    theirs = load_file(Path(whole.output_dir, "checkpoint-4", name))
    start = load_file(Path(whole.output_dir, "checkpoint-2", name))
    assert ours.keys() == theirs.keys() == start.keys()
    assert any(not torch.equal(tensor, start[key]) for key, tensor in ours.items())
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-6, msg=key)


def test_resumed_loader_on_two_ranks_draws_the_right_epoch(make_config: Make) -> None:
    """accelerate's skipping loader over a shard hides the sampler from `set_epoch`; the trainer reaches it anyway."""
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
    from torch.utils.data import BatchSampler

    trainer = build(make_config())
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1]
    sampler.set_epoch(0)
    shard = BatchSamplerShard(BatchSampler(sampler, 2, False), 2, 1)
    loader = skip_first_batches(DataLoaderShard(trainer.train_dataset, batch_sampler=shard, collate_fn=list), 1)
    trainer.state.epoch = 1.25
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    loader.set_epoch(1)
    drawn = [sample.record_id for batch in loader for sample in batch]
    records = trainer.train_dataset.records
    assert drawn == [records[i].id for i in [*orders[1][6:8], *orders[1][10:12]]]


def test_resuming_another_kind_of_run_is_refused(make_config: Make) -> None:
    lora = make_config("lora", train={"trainable": STAGE_1, "max_steps": 1}, data={"eval": []})
    train(lora)
    folder = str(Path(lora.output_dir, "checkpoint-1"))
    full = make_config("full", train={"resume": folder}, data={"eval": []})
    with pytest.raises(ModelLoadError):
        train(full)
    other = make_config("other", train={"resume": folder, "trainable": ["cls_head", "lm_lora"]}, data={"eval": []})
    with pytest.raises(ModelLoadError, match="do not fit this run"):
        train(other)


def test_new_lora_matrices_follow_the_seed(make_config: Make) -> None:
    drawn = []
    for seed in (5, 5, 6):
        config = make_config(train={"trainable": ["lm_lora"]}, seed=seed)
        drawn.append(weights_of(build(config).model))
    name = next(name for name in drawn[0] if "lora_A" in name)
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


# ---- the text loss is the usual one ----


def test_text_loss_equals_transformers(make_config: Make) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    trainer = build(make_config(train={"batch_size": 4}))
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.bundle.base.eval()
    with torch.no_grad():
        kept = forward(model, batch)
        ours = trainer.criterion(kept, batch)["text"]
        full = model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids",
                                                                 "pixel_values", "image_grid_thw")})  # fmt: skip
        theirs = ForCausalLMLoss(full.logits, batch["labels"], vocab_size=full.logits.shape[-1])
    assert ours.count == int((batch["labels"][:, 1:] != -100).sum())
    assert float(ours.sum) / ours.count == pytest.approx(float(theirs), rel=1e-5)


def test_text_training_equals_trl(make_config: Make, tmp_path: Path) -> None:
    """One AdamW step of TRL's SFTTrainer on the same batch: same loss, same new weights of language and vision."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    section = {"trainable": ["lm_full", "vision_full"], "batch_size": 4, "max_steps": 1}
    config = make_config(
        data={"eval": []},
        loss={name: 0.0 for name in TERMS if name != "text"},
        train={**section, "lr_scheduler": "constant", "warmup_ratio": 0},
    )
    trainer = build(config)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    reference = load_bundle(config.model, heads=config.heads).base
    for parameter in [p for module in reference.head_modules() for p in module.parameters()]:
        parameter.requires_grad_(False)
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "labels")
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / "trl"),
        "max_steps": 1,
        "learning_rate": config.train.learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "activation_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    theirs = SFTTrainer(
        model=reference,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_dict({"number": list(range(4))}),
        data_collator=lambda _: {key: batch[key] for key in keys},
        processing_class=trainer.bundle.processor,
    )
    theirs.train()
    logged = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert history(trainer, "loss") == pytest.approx(logged, rel=1e-5)
    expected = dict(reference.named_parameters())
    for name, weight in weights_of(trainer.bundle.base).items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=0, atol=2e-5, msg=name)


# ---- it learns ----


class StopWhenLearnt(TrainerCallback):
    """Ends the run as soon as the logged terms are small enough, so that the test takes no longer than needed."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if logs.get("loss_dice", 9) < 0.15 and logs.get("loss_text", 9) < 0.1 and logs.get("loss_focal", 9) < 0.02:
            control.should_training_stop = True


def test_two_samples_are_learnt_by_heart(make_config: Make, photo_records: Path, tmp_path: Path) -> None:
    lines = photo_records.read_text().splitlines()
    chosen = [json.loads(line) for line in lines if json.loads(line)["id"] in ("tampered_224x196", "real_112x252")]
    for record in chosen:
        record["images"] = [str(photo_records.parent / name) for name in record["images"]]
        if "masks" in record:
            record["masks"] = [str(photo_records.parent / name) for name in record["masks"]]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in chosen))
    config = make_config(
        data={"train": [str(path)], "eval": [str(path)], "max_pixels": 224 * 196},
        heads={"hidden_size": 32},
        train={
            "max_steps": 100,
            "learning_rate": 5.0e-3,
            "eval_steps": 1000,
            "logging_steps": 5,
            "lr_scheduler": "linear",
        },
    )
    trainer = build(config)
    trainer.add_callback(StopWhenLearnt())
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.state.global_step < 100
    assert metrics["eval_loss_dice"] < 0.3
    assert (metrics["eval_recall_real"], metrics["eval_recall_fake"]) == (1, 1)
    assert metrics["eval_false_positive_area"] < 0.02
    assert metrics["eval_pixel_f1"] > 0.8
    model = trainer.bundle.base.eval()
    for sample in (trainer.train_dataset[i] for i in range(2)):  # every word of the answer, teacher-forced
        batch = trainer.data_collator([sample])
        with torch.no_grad():
            predicted = forward(model, batch).logits.argmax(dim=-1)
        assert torch.equal(predicted, batch["text_targets"]), sample.record_id


# ---- kinds of edits ----


def test_operations_of_the_records_reach_the_loss(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    names = ["splice", "copy_move", "erase", "remove", "retouch.grain", "retouch.smooth", "retouch"]
    trainer = build(make_config(heads={"operations": [*names, "dent"]}, loss={"operation": 1.0}))
    dataset: Any = trainer.train_dataset
    maps = [dataset[index].operation_maps[0] for index in range(len(dataset))]
    labels = [int(found.max()) for found in maps]
    assert [label > 0 for label in labels] == [record.label == 1 for record in dataset.records]
    said = [record.provenance["operation"] for record in dataset.records if record.label == 1]
    found = [names[label - 1].split(".")[0] for label in labels if label > 0]
    assert found == [operation["name"] for operation in said]
    (warning,) = [message for message in caplog.messages if "heads.operations" in message]
    assert "dent" in warning.split(", which no tampered training image has")[0]
    batch = trainer.data_collator([dataset[index] for index in range(4)])
    assert [found.tolist() for found in batch["operation_maps"]] == [found.tolist() for found in maps[:4]]


def test_names_that_nothing_trains_are_warned_about(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    build(make_config(heads={"operations": ["splice"]}))
    assert any("loss.operation is 0: nothing trains that head" in message for message in caplog.messages)
