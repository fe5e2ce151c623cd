"""`forensics vision annotate`: evidence in the question, truth in the answer, and a part-A run that trains on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.cli import main
from finetune.data.readers import read_records
from finetune.inference.evidence.prompts import QUESTIONS
from finetune.schema import Record

NUM = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five records without turns, real and tampered, and a dialogue of two questions with tokens in its answer."""
    folder = tmp_path_factory.mktemp("set")
    entries: list[dict[str, Any]] = []
    for number in range(NUM):
        pixels = np.random.default_rng(number).integers(0, 255, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"x{number}.png")
        entry: dict[str, Any] = {"id": f"x{number}", "images": [f"x{number}.png"], "labels": [number % 2]}
        if number % 2:
            mask = np.zeros((60, 90), np.uint8)
            mask[2:20, 60:85] = 255
            Image.fromarray(mask).save(folder / f"m{number}.png")
            entry |= {"masks": [f"m{number}.png"], "evidence": ["边缘有拼接痕迹。"]}
        entries.append(entry)
    entries[4]["messages"] = [
        {"role": "user", "content": "<image>它的{score}是多少？"},
        {"role": "assistant", "content": "<cls><mask_1> - <mask_32>第一个回答"},
        {"role": "user", "content": "为什么？"},
        {"role": "assistant", "content": "第二个回答"},
    ]
    lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(tiny_dir: Path, vision_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "config.json"
    tree = {"base_model_path": str(tiny_dir), "head_checkpoint": str(vision_parts), "heatmap_threshold": 0.45}
    path.write_text(json.dumps(tree | {"batch_size": 4, "device": "cpu"}), encoding="utf-8")
    return path


def annotate(settings: Path, data: Path, out: Path, *more: str) -> int:
    return main(["vision", "annotate", str(data), "--config", str(settings), "--out", str(out), *more])


@pytest.fixture(scope="module")
def records(settings: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    out = tmp_path_factory.mktemp("annotated") / "train.jsonl"
    assert annotate(settings, data / "train.jsonl", out) == 0
    return read_records(str(out))


def test_questions_hold_the_evidence_and_answers_the_truth(records: list[Record]) -> None:
    assert [record.id for record in records] == [f"x{number}" for number in range(NUM)]
    asked = set()
    for number, record in enumerate(records):
        system, user, answer, *rest = record.turns
        assert (system.role, user.role, answer.role) == ("system", "user", "assistant")
        told = record.provenance["vision"]
        assert told["label"] == number % 2
        assert f"{told['score']:.2f}" in user.content
        assert user.content.count("<image>") == 1
        assert record.targets[0].label is None  # text only: no heads on tokens are trained on it
        if number == 4:
            assert user.content.endswith("它的{score}是多少？")  # the user's own braces are text
            assert [turn.content for turn in (answer, *rest)] == ["第一个回答", "为什么？", "第二个回答"]
        elif number % 2:
            assert answer.content == "结论：该图像经过篡改。依据：边缘有拼接痕迹。篡改区域：右上部[60, 2, 85, 20]。"
        else:
            assert answer.content == "结论：该图像真实。依据：未发现篡改痕迹。"
        asked.add(user.content.partition("：")[0][:12])
    assert len(asked) > 1
    assert len(QUESTIONS["zh"]) > 1


def test_overlay_targets_and_a_share_without_evidence(settings: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "more" / "train.jsonl"
    options = ("--set", "overlay_as_second_image=true", "language=en", "--keep-targets", "--without-evidence", "0.5")
    assert annotate(settings, data / "train.jsonl", out, *options) == 0
    found = read_records(str(out))
    with_evidence = [record for record in found if record.provenance["vision"]["has_evidence"]]
    assert 0 < len(with_evidence) < NUM
    for number, record in enumerate(found):
        has_evidence = record in with_evidence
        assert len(record.images) == 1 + has_evidence
        assert record.turns[1].content.count("<image>") == len(record.images)
        assert record.targets[0].label == number % 2
        assert ("threshold" in record.turns[1].content) == has_evidence
        if has_evidence:
            assert record.targets[1].label is None
            assert Image.open(record.images[1].path or "").size == (90, 60)
    text = found[1].turns[2].content
    assert text == "Conclusion: this image is tampered. Reason: 边缘有拼接痕迹. Tampered: upper right [60, 2, 85, 20]."
    assert "<cls>" in found[4].turns[2].content


def test_what_cannot_be_annotated_is_refused(
    settings: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    for entry, words in (
        ({"images": [str(data / "x0.png")]}, "neither a label nor a written answer"),
        ({"images": [str(data / "x0.png")] * 2, "labels": [0, 1]}, "one image only"),
        ({"images": ["gone.png"], "labels": [0]}, "gone.png"),
    ):
        file.write_text(json.dumps({"id": "odd"} | entry), encoding="utf-8")
        assert annotate(settings, file, tmp_path / "out.jsonl") == 2
        error = capsys.readouterr().err
        assert "odd" in error
        assert words in error
        assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "out.jsonl").write_text("mine")
    assert annotate(settings, data / "train.jsonl", tmp_path / "out.jsonl") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert annotate(settings, data / "train.jsonl", tmp_path / "out.json") == 2
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_part_a_trains_explanations_on_it(
    settings: Path, data: Path, tiny_dir: Path, tmp_path: Path, repo_root: Path
) -> None:
    """Two steps of configs/train/explain_tiny.yaml; then the merged model explains the vision heads' evidence."""
    train = tmp_path / "train.jsonl"
    assert annotate(settings, data / "train.jsonl", train, "--set", "overlay_as_second_image=true") == 0
    run = tmp_path / "run"
    overrides = [f"output_dir={run}", f"model.path={tiny_dir}", f"data.train=[{train}]", f"data.eval=[{train}]"]
    overrides += ["train.max_steps=2", "train.eval_steps=2", "train.batch_size=2", "train.text_retention=false"]
    assert main(["train", "--config", str(repo_root / "configs" / "train" / "explain_tiny.yaml"), *overrides]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(run / "best"), "--out", str(merged), "--plain"]) == 0
    output = {"csv": str(tmp_path / "r.csv"), "evidence_dir": str(tmp_path / "evidence")}
    more = {"base_model_path": str(merged), "output": output, "generation": {"max_new_tokens": 3}}
    other = tmp_path / "infer.json"
    other.write_text(json.dumps(json.loads(settings.read_text("utf-8")) | more), encoding="utf-8")
    assert main(["vision", "infer", str(data / "x0.png"), "--config", str(other)]) == 0
    row = json.loads((tmp_path / "evidence" / "results.jsonl").read_text("utf-8"))
    assert row["error"] == ""
    assert isinstance(row["explanation"], str)  # after two steps it may be without a word
