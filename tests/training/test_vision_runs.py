"""Stages A, B and C on pictures alone: what each writes, takes over and leaves as it was."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.config import RunConfig
from finetune.errors import ConfigError
from finetune.metrics.calibration import Calibration
from finetune.training.checks import run_problems
from finetune.training.evaluation_table import row
from finetune.training.run import train

HEADS = {"source": "vision", "vision_layers": [0, 2], "noise_residual": {"enabled": False}}
NO_MASK = {"dice": 0.0, "boundary": 0.0, "authentic": 0.0, "contrast_region": 0.0}
STAGE_A: dict[str, Any] = {
    "heads": {**HEADS, "mask": "none"},
    "loss": {"text": 0.0, **NO_MASK},
    "train": {
        "trainable": ["neck", "cls_head"],
        "max_steps": 4,
        "eval_steps": 2,
        "metric_for_best": "eval_auroc",
        "best_folders": {"best_val_auc": "eval_auroc"},
    },
}
STAGE_B: dict[str, Any] = {
    "heads": HEADS,
    "loss": {"text": 0.0},
    "train": {
        **STAGE_A["train"],
        "trainable": ["neck", "cls_head", "mask_head"],
        "best_folders": {"best_val_auc": "eval_auroc", "best_val_iou": "eval_pixel_iou"},
        "heatmap_snapshots": 3,
    },
}
STAGE_C: dict[str, Any] = {
    "heads": HEADS,
    "loss": {"text": 0.0, "evidence": 0.5, "sparsity": 0.1},
    "vision_lora": {"blocks": [0, 2], "r": 4, "alpha": 8},
    "train": {**STAGE_B["train"], "trainable": ["neck", "cls_head", "mask_head", "vision_lora"], "max_steps": 2},
}


@pytest.fixture(scope="module")
def stages(
    tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, synth_dir: Path, write_small: Callable[..., Path]
) -> dict[str, Path]:
    """The folders of A, B and C, each started from the one before; A and B share a feature cache."""
    from finetune.config import load_config

    folder = tmp_path_factory.mktemp("vision")
    data = {split: [str(synth_dir / f"{split}.jsonl")] for split in ("train", "eval")}
    start, found = str(tiny_dir), {}
    for name, changes in (("a", STAGE_A), ("b", STAGE_B), ("c", STAGE_C)):
        cache = False if name == "c" else str(folder / "features")
        tree = {**changes, "train": {**changes["train"], "feature_cache": cache}}
        path = write_small(folder / f"{name}.yaml", **tree)
        config = load_config(path, [f"output_dir={folder / name}", f"model.path={start}"])
        config.data.train, config.data.eval = ([_source(data[split][0])] for split in ("train", "eval"))
        train(config)
        found[name] = folder / name
        start = str(folder / name / "best_val_auc")
    return found


def _source(path: str) -> Any:
    from finetune.config import SourceConfig

    return SourceConfig(path=path)


def test_no_stage_copies_the_tower_or_loads_the_language_model(stages: dict[str, Path]) -> None:
    for name, folder in stages.items():
        files = {path.name for path in (folder / "best").iterdir()}
        assert {"heads.safetensors", "best.json", "calibration.json", "config.json"} <= files, name
        assert "model.safetensors" not in files
        assert ("vision_lora" in files) == (name == "c")
        assert json.loads((folder / "best" / "config.json").read_text())["has_language"] is False
        assert all("visual" not in key for key in load_file(folder / "best" / "heads.safetensors"))


def test_every_stage_begins_with_the_heads_of_the_one_before(stages: dict[str, Path]) -> None:
    """After four steps at 1e-3 a weight is still near where it started; another seed's would not be."""
    for first, second in (("a", "b"), ("b", "c")):
        before, after = (
            load_file(stages[first] / "best_val_auc" / "heads.safetensors"),
            load_file(stages[second] / "best" / "heads.safetensors"),
        )
        shared = [key for key in before if before[key].ndim == 2]
        assert shared
        assert all((before[key] - after[key]).abs().max() < 0.02 for key in shared)
        new = {key.split(".")[0] for key in set(after) - set(before)}
        assert new == ({"mask_head", "mask_queries", "cls_head"} if second == "b" else set())


def test_the_table_has_a_row_for_each_evaluation(stages: dict[str, Path]) -> None:
    for name, folder in stages.items():
        with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        history = json.loads((folder / "history.json").read_text())
        evaluations = [entry for entry in history if "eval_loss" in entry]
        assert [int(r["step"]) for r in rows] == [entry["step"] for entry in evaluations]
        for r, entry in zip(rows, evaluations, strict=True):
            assert float(r["auroc"]) == pytest.approx(entry["eval_auroc"], abs=1e-5)
            assert float(r["accuracy"]) == pytest.approx(entry["eval_accuracy"], abs=1e-5)
            assert float(r["eval_loss"]) == pytest.approx(entry["eval_loss"], rel=1e-4)
            assert float(r["learning_rate"]) > 0
            losses = [e["loss"] for e in history if "loss" in e and entry["step"] - 2 < e["step"] <= entry["step"]]
            assert float(r["train_loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            if name == "a":
                assert r["iou"] == r["dice"] == ""  # there is no map yet
            else:
                assert float(r["iou"]) == pytest.approx(entry["eval_pixel_iou"], abs=1e-5)
        seconds = [float(r["seconds"]) for r in rows]
        assert seconds == sorted(seconds)
        assert set(rows[0]) >= {"epoch", "f1", "dice", *(f"eval_loss_{term}" for term in ("focal",))}


def test_the_calibration_is_of_the_best_evaluation(stages: dict[str, Path]) -> None:
    for folder in stages.values():
        found = Calibration.load(folder / "best" / "calibration.json")
        assert (found.num_images, found.num_tampered) == (8, 4)
        assert Calibration.load(folder / "calibration.json") == found


def test_the_same_pictures_are_drawn_at_every_evaluation(stages: dict[str, Path]) -> None:
    assert not (stages["a"] / "heatmaps").exists()
    folders = sorted((stages["b"] / "heatmaps").iterdir())
    assert [folder.name for folder in folders] == ["step-2", "step-4"]
    names = [sorted(path.name for path in folder.glob("*.png")) for folder in folders]
    assert len(names[0]) == 3
    assert names[0] == names[1]
    with Image.open(folders[0] / names[0][0]) as picture:
        assert picture.width % 3 == 0  # image, truth and map side by side


def test_best_folders_follow_their_own_metric(stages: dict[str, Path]) -> None:
    history = json.loads((stages["b"] / "history.json").read_text())
    for folder, metric in (("best_val_auc", "eval_auroc"), ("best_val_iou", "eval_pixel_iou")):
        best = json.loads((stages["b"] / folder / "best.json").read_text())
        assert best["metric"] == metric
        assert best["value"] == max(entry[metric] for entry in history if metric in entry)
    assert not (stages["a"] / "best_val_iou").exists()


def test_only_the_chosen_blocks_got_lora(stages: dict[str, Path]) -> None:
    keys = load_file(stages["c"] / "best" / "vision_lora" / "adapter_model.safetensors")
    assert {key.split("visual.blocks.")[1].split(".")[0] for key in keys} == {"0", "2"}
    moved = [key for key, value in keys.items() if "lora_B" in key and value.abs().max() > 0]
    assert moved


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(make_config: Callable[..., RunConfig]) -> None:
    """Rows of the table, best folders and weights; the run is cut after its first evaluation."""
    whole = make_config("whole", **STAGE_B)
    cut = make_config("cut", **STAGE_B)
    train(whole)
    out = Path(cut.output_dir)
    train(make_config("cut", **{**STAGE_B, "train": {**STAGE_B["train"], "max_steps": 4}}))
    import shutil

    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "best")
    cut.train.resume = "auto"
    train(cut)
    ours, theirs = (load_file(Path(c.output_dir) / "checkpoint-4" / "heads.safetensors") for c in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    steps = [line.split(",")[1] for line in (out / "log.csv").read_text().splitlines()]
    assert steps == ["step", "2", "4"]


def test_a_row_has_loss_and_rate_wherever_logging_falls(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("rare", ["train.logging_steps=1000", "train.best_folders={}"], **STAGE_A)
    train(config)
    with (Path(config.output_dir) / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(float(row["train_loss"]) > 0 and float(row["learning_rate"]) > 0 for row in rows)


def test_groups_of_the_training_data_serve_where_there_is_no_validation_file(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("split", ["data.eval=[]", "data.val_ratio=0.3"], **STAGE_A)
    config.train.metric_for_best = "eval_loss"
    config.train.best_folders = {}
    train(config)
    printed = capsys.readouterr().out
    numbers = [
        int(word) for word in printed.split("data: ")[1].split("\n")[0].replace(",", "").split() if word.isdigit()
    ]
    assert numbers[0] + numbers[-1] == 12
    assert numbers[-1] >= 1
    assert (Path(config.output_dir) / "log.csv").is_file()


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("data.val_ratio=1.0", "data.val_ratio is 1.0"),
        ("loss.evidence_share=0.0", "loss.evidence_share is 0.0"),
        ("loss.cls_pos_weight=0.0", "loss.cls_pos_weight is 0.0"),
        ("loss.evidence=1.0", "loss.evidence is 1.0 with heads.mask: none"),
        ("train.best_folders={best_val_iou: eval_iou}", "did you mean 'eval_pixel_iou'?"),
        ("train.best_folders={../x: eval_auroc}", "expected a name like best_val_auc"),
        ("data.eval=[]", "train.best_folders needs data.eval or data.val_ratio"),
        ("train.heatmap_snapshots=-1", "heatmap_snapshots is -1"),
    ],
)
def test_mistakes_are_known_before_the_run(override: str, found: str, make_config: Callable[..., RunConfig]) -> None:
    assert [problem for problem in run_problems(make_config("c", [override], **STAGE_A)) if found in problem]


def test_text_cannot_be_trained_on_a_model_without_language(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("c", ["loss.text=1.0", "model.language=skip"], **STAGE_A)
    with pytest.raises(ConfigError, match=r"loss\.text is 1\.0 with model.language: skip"):
        train(config)


def test_a_metric_that_a_stage_does_not_have_is_named(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("c", ["train.best_folders={best_val_iou: eval_pixel_iou}"], **STAGE_A)
    with pytest.raises(ConfigError, match=r"train\.best_folders\.best_val_iou.*eval_pixel_iou.*eval_auroc"):
        train(config)


def test_doctor_looks_at_no_conversation_of_such_a_run(
    make_config: Callable[..., RunConfig], tmp_path: Path, synth_dir: Path
) -> None:
    from finetune.training.doctor import check_config

    rows = [json.loads(line) for line in (synth_dir / "eval.jsonl").read_text().splitlines()][:2]
    for record in rows:
        record["images"] = [str(synth_dir / path) for path in record["images"]]
        record["masks"] = [None if path is None else str(synth_dir / path) for path in record.get("masks", [None])]
        record["messages"] = [{"role": "user", "content": "no placeholder"}]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in rows), encoding="utf-8")
    errors = [
        [p.message for p in check_config(make_config("c", [f"data.train=[{path}]"], **stage)) if p.severity == "error"]
        for stage in (STAGE_A, {})
    ]
    assert errors[0] == []
    assert errors[1]


def test_doctor_names_heads_that_the_model_cannot_have(make_config: Callable[..., RunConfig]) -> None:
    """Of every stage, from the shape in config.json, before a weight is read."""
    from finetune.training.doctor import check_config

    def errors(config: RunConfig) -> list[str]:
        return [p.message for p in check_config(config) if p.severity == "error" and "heads." in p.message]

    assert errors(make_config("c", **STAGE_A)) == []
    assert "expected blocks of the vision tower" in errors(make_config("c", ["heads.vision_layers=[31]"], **STAGE_A))[0]
    [problem] = errors(make_config("c", ["heads.layer=99"]))
    assert problem.startswith("heads.layer is 99; expected last, weighted or 0 (embeddings) to ")
    staged = make_config("c", ["stages=[{name: one}, {name: two, heads: {layer: 99}}]"])
    [problem] = errors(staged)
    assert problem.startswith("stage 'two': heads.layer is 99")


def test_the_loss_of_a_row_is_the_mean_over_its_steps() -> None:
    """Logged every 50 steps and before each evaluation: entries are means over 50 and over 25 steps."""
    logged = [(50, 9.0), (75, 9.0), (100, 3.0), (150, 1.0)]
    history = [{"step": step, "loss": loss, "learning_rate": 0.1} for step, loss in logged]
    history.insert(2, {"step": 75, "eval_loss": 1.0})
    assert row(history, {}, 150, 1.0)["train_loss"] == pytest.approx((25 * 3.0 + 50 * 1.0) / 75)
    assert row(history, {}, 75, 1.0)["train_loss"] == pytest.approx(9.0)


def test_a_row_without_losses_or_maps_has_empty_cells() -> None:
    found = row([{"step": 3, "epoch": 0.5, "eval_loss": 1.0}], {"eval_loss": 1.0, "eval_auroc": 0.7}, 3, 12.34)
    assert found == {
        "epoch": 0.5, "step": 3, "seconds": 12.3, "learning_rate": None, "train_loss": None, "auroc": 0.7,
        "accuracy": None, "balanced_accuracy": None, "f1": None, "iou": None, "dice": None,
        "false_positive_area": None, "eval_loss": 1.0,
    }  # fmt: skip
