"""`forensics vision evaluate` from an annotation list to numbers, tables, curves and pictures."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from finetune.cli import main
from finetune.config.vision_runs import VisionEvalConfig
from finetune.errors import ConfigError
from finetune.evaluation.vision import output_files
from finetune.evaluation.vision_files import Judged, empty_maps, empty_maps_text, worst_cases, write_predictions
from finetune.metrics.calibration import Calibration
from finetune.metrics.localization import pixel_metrics
from finetune.schema import ImageInput, ImageTarget, Prediction, Record

NUM = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An annotation list as in the specification, paths relative to its folder; masks of real images as `HxW`."""
    folder = tmp_path_factory.mktemp("set")
    for name in ("image", "spatial_localize"):
        (folder / name).mkdir()
    entries = []
    for number in range(NUM):
        rng = np.random.default_rng(number)
        height, width = 56 + 7 * number, 84 - 5 * number
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        name, label = f"x{number}.png", number % 2
        mask_path = f"{height}x{width}"
        if label:
            mask = np.zeros((height, width), np.uint8)
            mask[5:30, 4:20] = 255
            pixels[mask > 0] //= 4
            mask_path = f"spatial_localize/{name}"
            Image.fromarray(mask).save(folder / mask_path)
        Image.fromarray(pixels).save(folder / "image" / name)
        entries.append({"image_path": f"image/{name}", "mask_path": mask_path, "label": label})
    (folder / "eval.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(tiny_dir: Path, vision_parts: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        "base_model_path": str(tiny_dir),
        "visual_lora.path": str(vision_parts / "vision_lora"),
        "visual_lora.layers": [0, 2],
        "head_checkpoint": str(vision_parts),
        "ann_eval": str(data / "eval.json"),
        "data_root": str(data),
        "classification_threshold": 0.5,
        "heatmap_threshold": 0.45,
        "batch_size": 3,
        "num_workers": 2,
        "device": "cpu",
    }
    path = tmp_path_factory.mktemp("settings") / "config_eval.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def evaluate(settings: Path, out: Path, *more: str, overwrite: bool = False) -> int:
    arguments = ["vision", "evaluate", "--config", str(settings), "--set", f"inference_output={out}", *more]
    return main([*arguments, *(["--overwrite"] if overwrite else [])])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def evaluated(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    calibration = folder.parent / "calibration.json"
    Calibration(method="temperature", temperature=3.0).save(calibration)
    assert evaluate(settings, folder, f"calibration={calibration}", "worst_cases=4", "report_samples=6") == 0
    return folder


def test_numbers_are_those_of_the_predictions(evaluated: Path, data: Path) -> None:
    """From the files alone: scikit-learn on the predictions' scores, and the maps against the masks."""
    metrics = json.loads((evaluated / "metrics.json").read_text("utf-8"))
    rows = table(evaluated / "predictions.csv")
    lines = [json.loads(line) for line in (evaluated / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    assert len(rows) == NUM
    assert [int(row["label_true"]) for row in rows] == [line["label_true"] for line in lines]
    labels = [int(row["label_true"]) for row in rows]
    scores, raw = [float(row["score"]) for row in rows], [float(row["raw_score"]) for row in rows]
    assert metrics["image"]["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert metrics["image_uncalibrated"]["auroc"] == pytest.approx(roc_auc_score(labels, raw))
    assert metrics["image"]["average_precision"] == pytest.approx(average_precision_score(labels, scores))
    assert metrics["image"]["ece"] != metrics["image_uncalibrated"]["ece"]
    assert metrics["run"]["calibration"] == {"method": "temperature", "num_images": 0}
    assert "scores before calibration" in (evaluated / "report.html").read_text("utf-8")
    logits = np.log(np.array(raw) / (1 - np.array(raw)))
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits / 3)), atol=1e-5)
    f1 = []
    for row in rows:
        if row["label_true"] == "0":
            assert row["f1"] == ""
            continue
        mask = np.asarray(Image.open(data / "spatial_localize" / Path(row["image_path"]).name))
        heat = np.asarray(Image.open(evaluated / row["heatmap"]), dtype=np.float32) / 255
        expected = pixel_metrics(heat, mask, 0.45)
        assert float(row["f1"]) == pytest.approx(expected["f1"], abs=0.02)  # the file has 256 levels
        assert float(row["iou"]) == pytest.approx(expected["iou"], abs=0.02)
        f1.append(float(row["f1"]))
    assert metrics["localization"]["f1"] == pytest.approx(np.mean(f1), abs=1e-5)
    assert metrics["run"]["thresholds"] == {"image": 0.5, "mask": 0.45}
    assert metrics["intervals"]["image.auroc"] is not None
    csv_rows = {(row["section"], row["metric"]): row for row in table(evaluated / "metrics.csv")}
    assert float(csv_rows["image", "auroc"]["value"]) == pytest.approx(metrics["image"]["auroc"])
    assert float(csv_rows["localization", "f1"]["low"]) == pytest.approx(metrics["intervals"]["localization.f1"][0])
    assert (evaluated / "metrics.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_tables_and_curves_agree_with_the_metrics(evaluated: Path) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_text("utf-8"))
    pixel = {float(row["threshold"]): row for row in table(evaluated / "curves" / "thresholds_pixel.csv")}
    assert float(pixel[0.45]["f1"]) == pytest.approx(metrics["localization"]["f1"])
    assert float(pixel[0.45]["iou"]) == pytest.approx(metrics["localization"]["iou"])
    assert float(pixel[0.45]["false_positive_area"]) == pytest.approx(metrics["authentic"]["false_positive_area"])
    image = {float(row["threshold"]): row for row in table(evaluated / "curves" / "thresholds_image.csv")}
    assert float(image[0.5]["accuracy"]) == pytest.approx(metrics["image"]["accuracy"])
    roc = [(float(r["false_alarm_rate"]), float(r["detection_rate"])) for r in table(evaluated / "curves" / "roc.csv")]
    assert np.trapezoid([y for _, y in roc], [x for x, _ in roc]) == pytest.approx(metrics["image"]["auroc"])
    precision = table(evaluated / "curves" / "pr.csv")
    assert float(precision[-1]["recall"]) == 1.0
    assert float(precision[-1]["precision"]) == pytest.approx(0.5)


def test_pictures_and_the_page_are_there(evaluated: Path) -> None:
    worst = sorted(path.name for path in (evaluated / "worst").iterdir())
    assert 1 <= len(worst) <= 4
    assert all(name.split("-")[1] in ("missed", "false_alarm", "misplaced") for name in worst)
    page = (evaluated / "report.html").read_text("utf-8")
    for words in ("像素阈值", "Pixel threshold", "Precision-recall curve", "ROC curve", 'class="used"'):
        assert words in page
    assert page.count("<article") == 6
    assert "error levels" not in page  # no baseline ran


def test_the_language_model_is_not_loaded(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.evaluation import vision

    seen: list[Any] = []
    real = vision.open_vision_predictor

    def watched(*arguments: Any, **keywords: Any) -> Any:
        seen.append(real(*arguments, **keywords)[0])
        return seen[-1], {}

    monkeypatch.setattr(vision, "open_vision_predictor", watched)
    assert evaluate(settings, tmp_path / "out", "max_samples=5", "heatmap_threshold=0.999", "report_samples=2") == 0
    assert not hasattr(seen[0].bundle.base, "lm_head")
    assert not hasattr(seen[0].bundle.base.model, "language_model")
    printed = capsys.readouterr().out
    assert "visual.blocks.2.attn.qkv" in printed  # loaded LoRA modules are printed by name
    empty = r"([1-4]) of \1 tampered images have an empty heat map: no pixel reaches heatmap_threshold=0\.999"
    assert re.search(empty, printed)
    assert (tmp_path / "out" / "metrics.csv").is_file()
    notes = [row["note"] for row in table(tmp_path / "out" / "predictions.csv") if row["label_pred"] == "1"]
    assert all("heatmap_threshold=0.999" in note for note in notes)


def test_a_named_file_of_predictions_and_an_output_that_exists(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "pred.csv"
    metrics_csv = tmp_path / "m.csv"
    few = ("max_samples=3", "report_samples=1", "worst_cases=0", f"metrics_csv={metrics_csv}")
    assert evaluate(settings, out, *few) == 0
    assert len(table(out)) == 3
    assert metrics_csv.is_file()
    before = out.read_bytes()
    assert evaluate(settings, out, *few[:3]) == 2
    assert "holds the output of another run: settings.metrics_csv" in capsys.readouterr().err
    assert evaluate(settings, out, *few) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    for unwritten in (out.parent / "metrics.json", metrics_csv):
        unwritten.unlink()
    assert evaluate(settings, out, *few) == 0  # begun anew, as after a bad record in the middle
    assert metrics_csv.is_file()
    assert evaluate(settings, out, *few, "heatmap_threshold=0.5", overwrite=True) == 0
    assert evaluate(settings, tmp_path / "x.txt", *few, overwrite=True) == 2
    assert ".csv or .jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ann_eval=nowhere.json", ["nowhere.json"]),
        ("data_root=nowhere", ["nowhere", "data root"]),
        ("heatmap_threshold=1.5", ["heatmap_threshold", "1.5"]),
        ("visual_lora.layers=[1]", ["[1]", "[0, 2]"]),
        ("head_checkpoint=nowhere", ["nowhere"]),
        ("heatmap_treshold=0.5", ["did you mean 'heatmap_threshold'"]),
        ("device=cuda:77", ["cuda:77"]),
        ("metrics_csv=/proc/nowhere/m.csv", ["/proc/nowhere/m.csv", "give another file"]),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    settings: Path, tmp_path: Path, change: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(settings, tmp_path / "out", change) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "metrics_csv", "message"),
    [
        ("out/metrics.csv", None, "where the table of metrics goes"),
        ("out/res.csv", "out/res.csv", "metrics_csv is out/res.csv, which the evaluation writes itself"),
        ("out", "out/predictions.csv", "which the evaluation writes itself"),
        ("out", "out/report.html", "which the evaluation writes itself"),
        ("out.json", None, "give a folder, or a file ending in .csv or .jsonl"),
    ],
)
def test_two_files_in_one_place_are_refused(output: str, metrics_csv: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        output_files(VisionEvalConfig(inference_output=output, metrics_csv=metrics_csv))


@pytest.mark.parametrize(
    ("output", "folder", "predictions"),
    [
        ("runs/eval_0.4", "runs/eval_0.4", "predictions.jsonl"),
        ("runs/v1.2.3", "runs/v1.2.3", "predictions.jsonl"),
        ("runs/e/p.CSV", "runs/e", "p.jsonl"),
    ],
)
def test_a_folder_may_have_a_dot_in_its_name(output: str, folder: str, predictions: str) -> None:
    found = output_files(VisionEvalConfig(inference_output=output))
    assert found == (Path(folder), Path(folder) / "metrics.csv", predictions)


def test_what_was_stopped_while_it_drew_is_begun_anew(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("max_samples=3", "report_samples=1", "worst_cases=1")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finetune.evaluation.vision.draw_worst", stop)
        with contextlib.suppress(KeyboardInterrupt):
            evaluate(settings, tmp_path / "out", *few)
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert evaluate(settings, tmp_path / "out", *few) == 0
    assert {"metrics.json", "metrics.csv", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_note_says_which_threshold_emptied_the_map_of_a_missed_image_too(tmp_path: Path) -> None:
    cases = [
        case("missed", 1, 0.1, 0.0, 0.49999, 0.0),
        case("called", 0, 0.9, peak=0.3, area=0.0),
        case("unknown", 1, 0.9, 0.0, 0.3, 0.0),
        case("right", 0, 0.1, peak=0.3, area=0.0),
        case("marked", 1, 0.1, 0.1),
    ]
    write_predictions(tmp_path / "p.csv", cases, 0.5)
    notes = {row["id"]: row["note"] for row in table(tmp_path / "p.csv")}
    assert notes["missed"] == "empty heat map: its peak 0.49999 is below heatmap_threshold=0.5"
    assert [name for name, note in notes.items() if not note] == ["right", "marked"]


def case(name: str, label: int, score: float, f1: float | None = None, peak: float = 0.9, area: float = 0.1) -> Judged:
    prediction = Prediction(name, "", int(score >= 0.5), score, None, (), "", False, (4, 4))
    record = Record(name, (ImageInput(path=name),), (ImageTarget(label=label),))
    return Judged(record, 0, prediction, label, None, f1, f1, peak, area)


def test_worst_cases_take_the_kinds_in_turn_from_the_worst_on() -> None:
    judged = [
        case("found", 1, 0.9, 0.8),
        case("missed late", 1, 0.4, 0.0),
        case("missed", 1, 0.1, 0.0),
        case("alarm", 0, 0.95),
        case("alarm late", 0, 0.6),
        case("beside", 1, 0.9, 0.1),
        case("right", 0, 0.2),
    ]
    found = [(kind, c.prediction.id) for kind, c in worst_cases(judged, 9)]
    assert found == [
        ("missed", "missed"),
        ("false_alarm", "alarm"),
        ("misplaced", "beside"),
        ("missed", "missed late"),
        ("false_alarm", "alarm late"),
    ]
    assert len(worst_cases(judged, 2)) == 2


def test_empty_maps_are_counted_among_tampered_images() -> None:
    judged = [
        case("a", 1, 0.9, 0.0, 0.31, 0.0),
        case("b", 1, 0.2, 0.0, 0.4, 0.0),
        case("c", 1, 0.9, 0.5),
        case("d", 0, 0.1, area=0.0),
    ]
    found = empty_maps(judged, 0.5)
    assert (found["n"], found["of_tampered"], found["lowest_peak"], found["highest_peak"]) == (2, 3, 0.31, 0.4)
    assert "2 of 3 tampered images have an empty heat map: no pixel reaches heatmap_threshold=0.5" in empty_maps_text(
        found
    )
    assert empty_maps_text(empty_maps(judged[2:], 0.5)) == ""
