"""`forensics evaluate` from files to numbers, and the bookkeeping behind its metrics."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from finetune.cli import main
from finetune.data.readers import read_records
from finetune.evaluation.evaluate import report_sample
from finetune.evaluation.results import EvaluationResults, Origin
from finetune.inference.pages import frame
from finetune.inference.pages.markup import bilingual
from finetune.metrics.localization import authentic_metrics, localization_metrics
from finetune.schema import Prediction
from finetune.training.reproducibility import file_hash, seen_before


def prediction(score: float, mask_scores: np.ndarray | None, text_label: int | None = None) -> Prediction:
    text = "{}" if text_label is None else "answer"
    return Prediction(
        "x", "", int(score >= 0.5), score, mask_scores, (), text, text_label is not None, (8, 8), text_label
    )


def test_streamed_means_equal_the_metrics_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    results = EvaluationResults()
    pairs = []
    for index in range(12):
        mask = np.zeros((9, 11), np.uint8)
        if index % 3:
            mask[: 2 + index % 4, 3:8] = 1
        scores = np.clip(0.6 * mask + rng.uniform(0, 0.6, mask.shape), 0, 1).astype(np.float32)
        f1 = results.add(prediction(0.5 + 0.04 * index * (1 if index % 3 else -1), scores), int(index % 3 > 0), mask)
        assert (f1 is None) == (index % 3 == 0)
        pairs.append((scores, mask))
    metrics = results.metrics(0.5)
    for name, value in localization_metrics(pairs).items():
        assert metrics["localization"][name] == pytest.approx(value)
    for name, value in authentic_metrics(pairs).items():
        assert metrics["authentic"][name] == pytest.approx(value)
    low, high = metrics["intervals"]["localization.f1"]
    assert low < metrics["localization"]["f1"] < high
    assert metrics["image"]["n_real"] == 4


def test_operations_are_told_apart_and_groups_are_drawn_whole() -> None:
    results = EvaluationResults()
    rng = np.random.default_rng(1)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 2:6] = 1
    scores: dict[str, list[float]] = {"": [], "splice": [], "erase": []}
    for number in range(120):
        name = ("", "splice", "erase")[number % 3]
        photo = f"photo{number // 3 % 4}"
        score = float(np.clip(0.4 + 0.2 * (name == "splice") + 0.1 * int(photo[-1]) + rng.normal(0, 0.1), 0, 1))
        scores[name].append(score)
        target = mask if name else np.zeros_like(mask)
        results.add(prediction(score, target.astype(np.float32)), int(bool(name)), target, Origin(photo, name))
    metrics = results.metrics(0.5)
    for name in ("splice", "erase"):
        expected = roc_auc_score([0] * 40 + [1] * 40, scores[""] + scores[name])
        assert metrics["operations"][name]["auroc"] == pytest.approx(expected)
        assert metrics["operations"][name]["n"] == 40
        assert metrics["operations"][name]["recall"] == np.mean(np.array(scores[name]) >= 0.5)
        assert metrics["operations"][name]["f1"] == 1.0
    assert set(metrics["operations"]) == {"splice", "erase"}
    narrow, wide = metrics["intervals"]["image.auroc"], metrics["intervals_over_groups"]["image.auroc"]
    assert narrow[0] < metrics["image"]["auroc"] < narrow[1]
    assert wide[0] < metrics["image"]["auroc"] < wide[1]


def test_recognized_operations_count_kinds_as_their_operation() -> None:
    results = EvaluationResults()
    told = {"splice": 0.4, "retouch.tone": 0.35, "retouch.grain": 0.25}  # together more than the splice
    assert replace(prediction(0.9, None), operations=told).operation == "retouch.tone"
    for name, label in (("retouch", 1), ("retouch", 1), ("splice", 1), ("", 0)):
        results.add(replace(prediction(0.9, None), operations=told), label, None, Origin("p", name))
    results.add(
        replace(prediction(0.1, None), operations={"splice": 0.6, "retouch.tone": 0.4}), 1, None, Origin("p", "retouch")
    )
    assert {name: found["recognized"] for name, found in results.operations().items()} == {
        "retouch": 2 / 3,
        "splice": 0.0,
    }
    results.add(replace(prediction(0.9, None), operations=told), 0, None, Origin("p", "retouch"))  # its authentic twin
    assert results.operations()["retouch"]["recognized"] == 2 / 3
    own = EvaluationResults()
    own.add(replace(prediction(0.9, None), operations={"v1.5 inpaint": 1.0}), 1, None, Origin("p", "v1.5 inpaint"))
    assert own.operations()["v1.5 inpaint"]["recognized"] == 1.0
    without = EvaluationResults()
    without.add(prediction(0.9, None), 1, None, Origin("p", "splice"))
    assert "recognized" not in without.operations()["splice"]


def test_without_groups_there_is_no_interval_over_them() -> None:
    results = EvaluationResults()
    for number in range(6):
        results.add(prediction(number / 6, None), number % 2, None, Origin(f"own{number}"))
    assert results.metrics(0.5)["intervals_over_groups"] == {}


def test_a_missing_mask_counts_as_empty_and_an_unlabelled_image_not_at_all() -> None:
    results = EvaluationResults()
    mask = np.ones((4, 4), np.uint8)
    assert results.add(prediction(0.9, None), 1, mask) == 0.0
    assert results.add(prediction(0.9, None), None, None) is None
    for unlabelled in (mask, np.zeros_like(mask)):  # of which the baselines measure nothing either
        assert results.add(prediction(0.9, mask.astype(np.float32)), None, unlabelled, Origin("p", "splice")) is None
    metrics = results.metrics(0.5)
    assert (metrics["authentic"]["n"], metrics["operations"]) == (0, {})
    assert metrics["localization"]["n"] == 1
    assert metrics["image"]["n_fake"] == 1
    assert metrics["image"]["n_real"] == 0


def test_text_agreement_is_with_the_head_and_accuracy_with_the_truth() -> None:
    results = EvaluationResults()
    for score, text_label, truth in ((0.9, 1, 0), (0.1, 0, 0), (0.9, 0, 1), (0.9, None, 1)):
        results.add(prediction(score, None, text_label), truth, None)
    text = results.metrics(0.5)["text"]
    assert text["parse_rate"] == 0.75
    assert text["label_agreement"] == pytest.approx(2 / 3)
    assert text["label_accuracy"] == pytest.approx(1 / 3)


def test_without_a_cls_head_the_text_agrees_with_nobody_and_unread_answers_are_wrong() -> None:
    results = EvaluationResults()
    for source, label, truth in (("text", 1, 1), ("text", 0, 0), ("nothing", 0, 1), ("nothing", 0, 0)):
        score = 0.5 if source == "nothing" else float(label)
        written = prediction(score, None, None if source == "nothing" else label)
        results.add(replace(written, label=label, verdict_from=source), truth, None)  # type: ignore[arg-type]
    metrics = results.metrics(0.5)
    assert (metrics["image"]["recall_real"], metrics["image"]["recall_fake"]) == (0.5, 0.5)
    assert metrics["image"]["n_without_verdict"] == 2
    assert metrics["text"]["label_agreement"] is None
    assert metrics["text"]["label_accuracy"] == 1.0
    assert "n_without_verdict" not in EvaluationResults(labels=[1], scores=[0.5], judged=[True]).image(0.5)


def test_written_regions_are_compared_with_the_mask() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    box = ((0.0, 0.0), (8.0, 0.0), (8.0, 2.0), (0.0, 2.0))  # half of it
    results = EvaluationResults()
    for text, polygons in (("a", (box,)), ("b", (box, tuple((x, y + 2) for x, y in box))), ("b", ()), ("", None)):
        said = replace(prediction(0.9, None, 1), text=text, text_polygons=polygons)
        results.add(said, 1, mask)
    results.add(prediction(0.1, None, 0), 0, np.zeros((8, 8), np.uint8))  # an authentic image has no region to find
    text = results.metrics(0.5)["text"]
    assert text["polygon_iou"] == pytest.approx((0.5 + 1.0 + 0 + 0) / 4)
    assert text["n_distinct"] == 4  # a, b, nothing and the last one's


def test_an_empty_answer_counts_as_unreadable() -> None:
    results = EvaluationResults()
    results.add(prediction(0.9, None, 1), 1, None)
    empty = Prediction("x", "", 1, 0.9, None, (), "", False, (8, 8))
    results.add(empty, 1, None)
    assert results.metrics(0.5)["text"]["parse_rate"] == 0.5
    silent = EvaluationResults(with_text=False)
    silent.add(empty, 1, None)
    assert silent.metrics(0.5)["text"]["parse_rate"] is None


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An annotation list as the users write it, with HxW for authentic images, in a folder of its own."""
    root = tmp_path_factory.mktemp("annotated")
    (root / "image").mkdir()
    (root / "mask").mkdir()
    rng = np.random.default_rng(1)
    entries = []
    for index in range(6):
        pixels = rng.integers(0, 255, (84 + 28 * (index % 2), 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "image" / f"{index}.png")
        entry = {"image_path": f"image/{index}.png", "label": index % 2}
        if index % 2:
            mask = np.zeros(pixels.shape[:2], np.uint8)
            mask[10:50, 20:70] = 255
            Image.fromarray(mask).save(root / "mask" / f"{index}.png")
            entry["mask_path"] = f"mask/{index}.png"
        else:
            entry["mask_path"] = f"{pixels.shape[0]}x{pixels.shape[1]}"
        entries.append(entry)
    (root / "list").mkdir()
    path = root / "list" / "eval.json"
    path.write_text(json.dumps(entries))
    return path


def test_evaluate_writes_everything(
    saved_model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate",
        "--model",
        str(saved_model),
        "--data",
        str(manifest),
        "--data-root",
        str(manifest.parent.parent),
    ]
    status = main([*arguments, "--out", str(tmp_path), "--max-new-tokens", "4", "--device", "cpu"])
    assert status == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["image"]) >= {
        "auroc", "average_precision", "balanced_accuracy", "accuracy", "f1", "ece", "n_real", "n_fake",
    }  # fmt: skip
    assert set(metrics["localization"]) == {"f1", "iou", "dice", "auc", "f1_best_threshold", "n"}
    assert set(metrics["authentic"]) >= {"false_alarm_rate", "false_positive_area"}
    assert set(metrics["text"]) >= {"parse_rate", "label_agreement"}
    assert set(metrics["baselines"]) == {"ela", "noise_variance"}
    assert metrics["image"]["n_real"] == metrics["image"]["n_fake"] == metrics["localization"]["n"] == 3
    assert metrics["run"]["seed"] == 7
    assert set(metrics["run"]) >= {"versions", "seconds", "seed", "commit", "config_hash"}
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert (tmp_path / line["mask_path"]).is_file()
        assert Image.open(tmp_path / line["mask_path"]).size[::-1] == tuple(line["size_hw"])
    labels, scores = [line["label_true"] for line in lines], [line["score"] for line in lines]
    assert metrics["image"]["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert all((line["f1"] is None) == (line["label_true"] == 0) for line in lines)
    f1 = [line["f1"] for line in lines if line["f1"] is not None]
    assert metrics["localization"]["f1"] == pytest.approx(sum(f1) / len(f1), abs=1e-5)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")[:200]
    assert "AUROC" in capsys.readouterr().out


def test_a_prediction_stands_beside_the_label_of_its_own_image(
    saved_model: Path, manifest: Path, tmp_path: Path
) -> None:
    images = [str(path) for path in sorted((manifest.parent.parent / "image").iterdir())[:4]]
    rows = [
        {"id": "two", "images": images[:2], "labels": [0, 1]},
        {"id": "swapped", "images": images[2:], "labels": [1, 0]},
        {"id": "half", "images": images[:2], "labels": [None, 1]},
    ]
    turns = [("user", "<image><image>?"), ("assistant", "one of them")]
    rows[2]["messages"] = [{"role": role, "content": content} for role, content in turns]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "--model", str(saved_model), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*command, "--no-text", "--no-baselines", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["label_true"] for line in lines] == [0, 1, 1, 0, None, 1]
    assert [line["image_path"] for line in lines] == [*images, *images[:2]]
    assert all(line["f1"] is None for line in lines)  # there is no mask


def test_unlabelled_data_cannot_be_evaluated(
    saved_model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "unlabelled.jsonl"
    image = str(manifest.parent.parent / "image" / "0.png")
    data.write_text(json.dumps({"images": [image], "messages": [{"role": "user", "content": "<image>?"}]}) + "\n")
    status = main(["evaluate", "--model", str(saved_model), "--data", str(data), "--out", str(tmp_path / "out")])
    assert status == 2
    error = capsys.readouterr().err
    assert "nothing to evaluate" in error
    assert "Traceback" not in error


def test_what_cannot_be_read_is_named_before_the_first_prediction(
    saved_model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last image is cut off and one mask has another size; nothing is predicted, nothing written."""
    root = tmp_path / "damaged"
    shutil.copytree(manifest.parent.parent, root)
    whole = (root / "image" / "5.png").read_bytes()
    (root / "image" / "5.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(root / "mask" / "3.png")
    arguments = ["--model", str(saved_model), "--data", str(root / "list" / "eval.json"), "--data-root", str(root)]
    assert main(["evaluate", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "2 problems in 2 of 6 records" in error
    assert "5.png" in error
    assert "9x9" in error
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_one_class_alone_is_said(
    saved_model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry for entry in json.loads(manifest.read_text()) if entry["label"] == 0]
    (tmp_path / "real.json").write_text(json.dumps(entries))
    arguments = ["--model", str(saved_model), "--data", str(tmp_path / "real.json"), "--out", str(tmp_path / "out")]
    where = ["--data-root", str(manifest.parent.parent), "--no-text", "--no-baselines"]
    assert main(["evaluate", *arguments, *where]) == 0
    assert "every labelled image is authentic" in capsys.readouterr().err


def test_a_benchmark_that_could_not_be_trained_on_is_evaluated(
    saved_model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image without a label, a question without an answer, an answer with another model's tokens."""
    images = [str(path) for path in sorted((manifest.parent.parent / "image").iterdir())[:4]]
    ask = [{"role": "user", "content": "<image>真假?"}]
    other = "<cls>" + "".join(f"<mask_{n}>" for n in range(1, 33)) + '{"result": "fake"}'
    rows = [
        {"id": "unknown", "images": images[:1]},
        {"id": "asked", "images": images[1:2], "labels": [1], "messages": ask},
        {"id": "answered", "images": images[2:3], "labels": [0], "messages": ask},
        {"id": "plain", "images": images[3:4], "labels": [1]},
    ]
    rows[2]["messages"] = [*ask, {"role": "assistant", "content": other}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "--model", str(saved_model), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*command, "--max-new-tokens", "4", "--no-baselines", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["label_true"] for line in lines] == [None, 1, 0, 1]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["image"]["n_real"], metrics["image"]["n_fake"], metrics["text"]["n"]) == (1, 2, 4)
    assert metrics["run"]["seen_in_training"] is False
    rows[1]["messages"] = [{"role": "user", "content": "<image><image>?"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "empty", "images": [], "messages": ask}]))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "2 <image> placeholders but 1 images" in error
    assert "no image, so there is nothing to judge" in error


def test_cards_name_the_operation_of_tampered_images_alone(photo_records: Path) -> None:
    record = next(r for r in read_records(str(photo_records)) if r.id == "pair")
    record = replace(record, provenance={"operation": {"name": "splice"}})
    found = prediction(0.9, None)
    named = [report_sample(record, k, found, None, None).operation for k in range(2)]
    assert named == ["splice" if target.label == 1 else "" for target in record.targets]
    assert sorted(named) == ["", "splice"]


def test_baseline_data_that_cannot_be_used_is_named_before_the_first_prediction(
    saved_model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(saved_model), "--data", str(manifest), "--data-root", str(manifest.parent.parent)]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"images": ["not_there.png"], "labels": [0]}) + "\n")
    for data, expected in ((tmp_path / "nowhere.json", "data file not found"), (bad, "image file not found")):
        where = ["--out", str(tmp_path / "out"), "--baseline-data", str(data)]
        assert main(["evaluate", *arguments, *where, "--no-text"]) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "out" / "predictions.jsonl").exists()
    assert main(["evaluate", *arguments, *where, "--no-text", "--no-baselines"]) == 0  # not read


def test_the_file_a_model_was_trained_on_is_known_again(
    saved_model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved_model, model)
    settings = json.loads((model / "forensics.json").read_text())
    settings["trained"]["data_hash"] = {"elsewhere/train.json": file_hash(str(manifest))}
    (model / "forensics.json").write_text(json.dumps(settings))
    after = tmp_path / "after"  # trained from it on something else
    shutil.copytree(saved_model, after)
    settings["trained"] |= {"data_hash": {"b.jsonl": "0" * 12}, "earlier_data": seen_before(settings)}
    (after / "forensics.json").write_text(json.dumps(settings))
    where = ["--data-root", str(manifest.parent.parent), "--no-text", "--no-baselines", "--device", "cpu"]
    for folder, is_known in ((model, True), (after, True), (saved_model, False)):
        out = tmp_path / f"out_{folder.name}"
        assert main(["evaluate", "--model", str(folder), "--data", str(manifest), "--out", str(out), *where]) == 0
        assert ("trained or chosen on" in capsys.readouterr().err) is is_known
        run = json.loads((out / "metrics.json").read_text())["run"]
        assert run["seen_in_training"] is is_known
        assert set(run) <= set(frame._FACTS)  # which have names in both languages
        page = (out / "report.html").read_text(encoding="utf-8")
        assert bilingual(*(("是", "yes") if is_known else ("否", "no"))) in page
