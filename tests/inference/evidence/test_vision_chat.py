"""`forensics vision infer --chat`: the evidence stands in the first question and stays in the dialogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.cli import main
from finetune.inference.predictor import Predictor


@pytest.fixture
def arguments(tiny_dir: Path, vision_parts: Path, tmp_path: Path) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tree: dict[str, Any] = {"base_model_path": str(tiny_dir), "head_checkpoint": str(vision_parts)}
    tree |= {"heatmap_threshold": 0.45, "device": "cpu", "generation": {"max_new_tokens": 5}}
    (tmp_path / "c.json").write_text(json.dumps(tree | {"chat_system_prompt": "系统"}), encoding="utf-8")
    return ["vision", "infer", str(tmp_path / "a.png"), "--chat", "--config", str(tmp_path / "c.json")]


def test_a_dialogue_leans_on_the_evidence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["为什么{score}？", "", "<image>再看", "那么位置呢？", "/quit", "never asked"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    asked: list[Any] = []
    real = Predictor.write

    def watched(self: Predictor, queries: Any, images: Any, **keywords: Any) -> list[str]:
        asked.append((queries[0].turns, len(images[0]), keywords["uses_adapter"]))
        return real(self, queries, images, **keywords)

    monkeypatch.setattr(Predictor, "write", watched)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "检测模型判定" in printed
    assert "error: the message holds <image>" in printed
    (first, shown, uses_adapter), (second, *_) = asked
    assert [turn.role for turn in first] == ["system", "user"]
    assert first[0].content == "系统"
    assert first[1].content.startswith("<image>检测模型判定")
    assert first[1].content.endswith("\n为什么{score}？")
    assert (shown, uses_adapter) == (1, False)
    assert [turn.role for turn in second] == ["system", "user", "assistant", "user"]
    assert second[:2] == first
    assert second[3].content == "那么位置呢？"
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "c.json"}


def test_one_image_is_talked_about(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert main([*arguments, str(tmp_path / "b.png")]) == 2
    assert "--chat talks about one image, found 2" in capsys.readouterr().err


def test_the_image_of_the_file_is_talked_about(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads((tmp_path / "c.json").read_text("utf-8"))
    (tmp_path / "c.json").write_text(json.dumps(tree | {"images": str(tmp_path / "a.png")}), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    assert main([argument for argument in arguments if not argument.endswith("a.png")]) == 0
    assert "a.png: 检测模型判定" in capsys.readouterr().out
