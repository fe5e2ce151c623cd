"""The users' dialogues through several models: own answers as history, nothing of the reference, side by side."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.cli import build_parser, main
from finetune.data.readers import read_records
from finetune.data.template import load_template
from finetune.errors import DataFormatError
from finetune.inference.chat.contestants import contestants
from finetune.inference.chat.dialogue import Speaker
from finetune.inference.chat.image_memory import ImageMemory
from finetune.inference.chat.script import ask_batch, dialogue_of, query_at
from finetune.inference.chat.summary import summarize

RUN = "<mask_1> - <mask_4>；真实性结论：<cls>"


def write(folder: Path, records: list[dict[str, Any]], name: str = "dialogues.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def users_file(photo_records: Path) -> Path:
    """Every reader format, one and several turns; beside the pictures."""
    folder = photo_records.parent
    buffer = io.BytesIO()
    Image.open(folder / "d.png").save(buffer, "PNG")
    records = [
        {
            "id": "multi",
            "conversations": [
                {"role": "user", "content": "<image> 这张证件照是否存在PS痕迹？"},
                {"role": "assistant", "content": f"SECRET-ONE 伪造区域: {RUN}"},
                {"role": "user", "content": "判断依据是什么？"},
                {"role": "assistant", "content": "SECRET-TWO 发际线羽化异常"},
                {"role": "user", "content": "再看这张<image>。"},
                {"role": "assistant", "content": "SECRET-THREE"},
            ],
            "images": ["a.png", "b.png"],
            "labels": [1, 0],
        },
        {
            "id": "told",
            "messages": [{"role": "assistant", "content": "<image>是一张真实图像，<image>是SECRET-FOUR伪造图像"}],
            "images": ["b.png", "c.png"],
        },
        {"id": "sharegpt", "conversations": [{"from": "human", "value": "<image>Is this photo real?"},
                                             {"from": "gpt", "value": "SECRET-FIVE"}], "image": "e.png"},
        {"id": "b64", "instruction": "分析该证件照", "input": base64.b64encode(buffer.getvalue()).decode(),
         "output": "SECRET-SIX"},
        {"id": "annotation", "image_path": "c.png", "mask_path": "c_mask.png", "label": 1},
    ]  # fmt: skip
    return write(folder, records)


@pytest.fixture(scope="module")
def adapter_dir(saved_model: Path, make_adapter: Callable[[Path, str, float], Path]) -> Path:
    """An adapter on the saved model, its heads and LoRA moved; read only."""
    return make_adapter(saved_model, "script", 0.1)


def dialogues(path: Path) -> dict[str, Any]:
    template = load_template("zh")
    return {record.id: dialogue_of(record, template) for record in read_records(path)}


# ---- questions ----


def test_questions_of_every_format(users_file: Path) -> None:
    found = dialogues(users_file)
    assert [(q.text, q.images, q.reference) for q in found["multi"].questions] == [
        ("<image> 这张证件照是否存在PS痕迹？", (0,), f"SECRET-ONE 伪造区域: {RUN}"),
        ("判断依据是什么？", (), "SECRET-TWO 发际线羽化异常"),
        ("再看这张<image>。", (1,), "SECRET-THREE"),
    ]
    assert [(q.text, q.images) for q in found["told"].questions] == [("<image><image>", (0, 1))]
    assert [q.text for q in found["sharegpt"].questions] == ["<image>Is this photo real?"]
    assert found["b64"].questions[0].text.count("<image>") == 1
    assert found["annotation"].questions[0].text == load_template("zh").prompts[0]


def test_bad_dialogues_are_named(photo_records: Path, tmp_path: Path) -> None:
    image = str(photo_records.parent / "a.png")
    ask = {"role": "user", "content": "<image>?"}
    for turns, words in (
        ([ask, {"role": "assistant", "content": "<image>"}], "2 <image> for 1 images"),
        ([{"role": "user", "content": "<image><|im_end|>"}], "only the program may write"),
        ([{"role": "system", "content": "<image>"}], "no user turn"),
    ):
        path = write(tmp_path, [{"id": "bad", "messages": turns, "images": [image]}])
        with pytest.raises(DataFormatError, match="bad") as caught:
            dialogues(path)
        assert words in str(caught.value)


def test_no_reference_reaches_the_model(users_file: Path, bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every id that any forward pass sees, decoded: the models' own words, never the data's."""
    from finetune.config import GenerationConfig

    speaker = Speaker(bundle, GenerationConfig(max_new_tokens=5))
    texts: list[str] = []
    original = Speaker._inputs

    def spy(self: Speaker, samples: Any) -> Any:
        texts.extend(bundle.tokenizer.decode(sample.input_ids) for sample in samples)
        return original(self, samples)

    monkeypatch.setattr(Speaker, "_inputs", spy)
    asked = list(dialogues(users_file).values())
    ask_batch(speaker, "m", asked, users_file.parent / "masks", 0)
    assert len(texts) == 7
    assert not any("SECRET" in text for text in texts)
    assert any("判断依据是什么？" in text for text in texts)
    own = [turn["m"]["text"] for turn in asked[0].answers]
    third = query_at(asked[0], 2, [bundle.tokens.run + own[0], own[1]])
    assert [turn.role for turn in third.turns] == ["user", "assistant"] * 2 + ["user"]
    assert own[0] in third.turns[1].content


def test_dialogues_of_tables_and_parquet(users_file: Path, bundle: Any, tmp_path: Path) -> None:
    """A CSV with questions or whole conversations, and a stored Parquet set, are asked like the JSON they came from."""
    import csv

    from finetune.config import GenerationConfig
    from finetune.data.storage import open_writer

    folder = users_file.parent
    turns = [
        {"role": "user", "content": "真吗？<image>"},
        {"role": "assistant", "content": "SECRET"},
        {"role": "user", "content": "为什么？"},
    ]
    with (folder / "asked.csv").open("w", encoding="utf-8", newline="") as stream:
        rows = csv.DictWriter(stream, ["image_path", "label", "问题", "回答", "messages"])
        rows.writeheader()
        rows.writerow({"image_path": "a.png", "label": 1, "问题": "这张图片是真的吗？", "回答": "SECRET 伪造"})
        rows.writerow({"image_path": "b.png", "messages": json.dumps(turns, ensure_ascii=False)})
        rows.writerow({"image_path": "c.png", "label": 0})
    table = dialogues(folder / "asked.csv")
    assert [[(q.text, q.images, q.reference) for q in dialogue.questions] for dialogue in table.values()] == [
        [("<image>这张图片是真的吗？", (0,), "SECRET 伪造")],
        [("真吗？<image>", (0,), "SECRET"), ("为什么？", (), None)],
        [(load_template("zh").prompts[0], (0,), None)],
    ]
    with open_writer(tmp_path / "stored", "eval", "parquet") as writer:
        for record in read_records(users_file):
            writer.write(record)
    stored, plain = dialogues(tmp_path / "stored" / "eval"), dialogues(users_file)
    speaker = Speaker(bundle, GenerationConfig(max_new_tokens=4))
    for found in (table, stored, plain):
        ask_batch(speaker, "m", list(found.values()), tmp_path / "masks", 0)
    assert stored.keys() == plain.keys()
    for name, dialogue in stored.items():
        assert dialogue.questions == plain[name].questions
        assert [turn["m"]["text"] for turn in dialogue.answers] == [turn["m"]["text"] for turn in plain[name].answers]


def test_tables_say_what_is_wrong_with_a_conversation(photo_records: Path, tmp_path: Path) -> None:
    image = photo_records.parent / "a.png"
    for header, row, words in (
        ("image_path,answer", f"{image},yes", "an answer without a question"),
        ("image_path,messages", f"{image},no json", "messages are no JSON"),
        (
            "image_path,messages,question",
            f'{image},"[{{""role"": ""user"", ""content"": ""a""}}]",b',
            "keep one of them",
        ),
    ):
        (tmp_path / "bad.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
        with pytest.raises(DataFormatError, match=r"bad\.csv:2") as caught:
            dialogues(tmp_path / "bad.csv")
        assert words in str(caught.value)


def test_no_image_is_encoded_twice(
    users_file: Path, bundle: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three turns on two images, and other dialogues beside them: texts, scores and masks as with every turn anew."""
    from finetune.config import GenerationConfig

    def asked(num_images: int) -> tuple[list[Any], int]:
        monkeypatch.setattr("finetune.inference.chat.script.ImageMemory", lambda base, _: ImageMemory(base, num_images))
        seen: list[int] = []
        hook = bundle.base.model.visual.register_forward_pre_hook(
            lambda _m, _a, kw: seen.append(len(kw["grid_thw"])), with_kwargs=True
        )
        found = list(dialogues(users_file).values())
        ask_batch(Speaker(bundle, GenerationConfig(max_new_tokens=5)), "m", found, tmp_path / "masks", 0)
        hook.remove()
        return found, sum(seen)

    (anew, often), (remembered, once) = asked(0), asked(8)
    assert once == 5
    assert often == 5 + 1 + 2  # by turn; within one a picture is encoded once in any case
    for one, two in zip(anew, remembered, strict=True):
        for ours, theirs in zip(one.answers, two.answers, strict=True):
            assert ours["m"]["text"] == theirs["m"]["text"]
            scores = ([v["score"] for v in answer["m"]["verdicts"]] for answer in (ours, theirs))
            assert next(scores) == pytest.approx(next(scores), abs=1e-5)
    assert "get_image_features" not in vars(bundle.base.model)  # the model is as it was


# ---- side by side ----


def test_base_adapter_and_merged_side_by_side(
    users_file: Path, tiny_dir: Path, saved_model: Path, adapter_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An adapter and its merged folder answer the same; a plain model has no score, in the lines and on the page."""
    assert main(["merge", "--model", str(adapter_dir), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    out, page = tmp_path / "o" / "answers.jsonl", tmp_path / "o" / "page.html"
    arguments = [
        "chat", "--model", f"base={saved_model}", "--adapter", f"甲={adapter_dir}",
        "--merged", str(tmp_path / "merged"), "--merged", f"released={tiny_dir}", "--script", str(users_file),
        "--out", str(out), "--html", str(page), "--max-new-tokens", "4",
    ]  # fmt: skip
    name = f"{tmp_path.name}/merged"
    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["multi", "told", "sharegpt", "b64", "annotation"]
    assert list(lines[0]["turns"][0]["answers"]) == ["base", "甲", name, "released"]
    assert lines[0]["turns"][1]["reference"] == "SECRET-TWO 发际线羽化异常"
    for line in lines:
        for turn in line["turns"]:
            answers = turn["answers"]
            assert answers["甲"]["text"] == answers[name]["text"]
            for a, b, plain in zip(
                answers["甲"]["verdicts"], answers[name]["verdicts"], answers["released"]["verdicts"], strict=True
            ):
                assert a["score"] == pytest.approx(b["score"], abs=1e-4)
                assert plain["score"] is plain["label"] is plain["mask_path"] is None
                mask = np.asarray(Image.open(out.parent / a["mask_path"]))
                assert mask.shape[0] > 20
            assert not answers["released"]["has_heads"]
    assert [v["image"] for v in lines[0]["turns"][2]["answers"]["甲"]["verdicts"]] == [1]
    summary = summarize(lines, ["base", "甲", name, "released"], out.parent, 0.5)
    pairs = {(pair["a"], pair["b"]): pair for pair in summary["pairs"]}
    same = pairs["甲", name]
    assert same["verdict_agreement"] == same["same_text"] == 1
    assert same["max_score_difference"] <= 1e-4
    assert pairs["base", "甲"]["max_score_difference"] > 1e-4
    assert pairs["甲", "released"]["verdict_agreement"] is None
    assert summary["models"]["甲"]["scored"] == 7
    assert summary["models"]["released"]["mean_score"] is None
    assert "no heads" in printed
    html = page.read_text(encoding="utf-8")
    assert "无判定头" in html
    assert "http://" not in html
    assert "https://" not in html
    num_masks = sum(v["mask_path"] is not None for line in lines for t in line["turns"] for a in t["answers"].values()
                    for v in a["verdicts"])  # fmt: skip
    assert html.count('src="data:image/jpeg') == num_masks + 7


def test_text_from_data_cannot_write_html(photo_records: Path, saved_model: Path, tmp_path: Path) -> None:
    image = str(photo_records.parent / "d.png")
    evil = "<script>alert(1)</script>"
    turns = [{"role": "user", "content": f"<image>{evil}"}, {"role": "assistant", "content": evil}]
    path = write(tmp_path, [{"id": evil, "messages": turns, "images": [image]}])
    page = tmp_path / "page.html"
    assert main(["chat", "--merged", f"{evil[:8]}={saved_model}", "--script", str(path), "--max-new-tokens", "2",
                 "--out", str(tmp_path / "a.jsonl"), "--html", str(page)]) == 0  # fmt: skip
    assert evil not in page.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").count("<script>") == 1  # our own


def test_a_missing_image_is_found_before_any_model_is_loaded(
    tmp_path: Path, saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, [{"id": "gone", "image": "gone.png", "label": 1}])
    arguments = ["chat", "--merged", str(saved_model), "--script", str(path), "--out", str(tmp_path / "a.jsonl")]
    assert main(arguments) == 2
    assert "'gone'" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "a.txt")]) == 2
    assert "no .jsonl file" in capsys.readouterr().err


def test_summary_counts_by_hand(tmp_path: Path) -> None:
    """Two models, two images: numbers worked out on paper."""
    masks = {"a": np.zeros((4, 4), np.uint8), "b": np.zeros((4, 4), np.uint8)}
    masks["a"][:2, :2] = 255
    masks["b"][:2, :] = 255
    for name, mask in masks.items():
        Image.fromarray(mask).save(tmp_path / f"{name}.png")

    def answer(score: float, text_label: int | None, mask: str | None, parse_ok: bool | None = True) -> dict[str, Any]:
        verdict = {"image": 0, "label": int(score >= 0.5), "score": score, "mask_path": mask, "text_label": text_label}
        return {"text": f"{score}", "parse_ok": parse_ok, "has_heads": True, "verdicts": [verdict]}

    follow = {"text": "same", "parse_ok": None, "has_heads": True, "verdicts": []}
    lines = [
        {"labels": [1], "turns": [{"answers": {"a": answer(0.9, 1, "a.png"), "b": answer(0.4, 1, "b.png")}},
                                  {"answers": {"a": follow, "b": follow}}]},
        {"labels": [None], "turns": [{"answers": {"a": answer(0.2, None, None, False), "b": answer(0.3, 0, None)}}]},
    ]  # fmt: skip
    summary = summarize(lines, ["a", "b"], tmp_path, 0.5)
    a, b = summary["models"]["a"], summary["models"]["b"]
    assert (a["answers"], a["parse_rate"], a["scored"], a["tampered"]) == (3, 0.5, 2, 1)
    assert a["mean_score"] == pytest.approx(0.55)
    assert (a["accuracy"], b["accuracy"], b["written_accuracy"]) == (1, 0, 1)
    assert (a["self_agreement"], b["self_agreement"]) == (1, 0.5)
    (pair,) = summary["pairs"]
    assert pair["verdict_agreement"] == 0.5
    assert pair["written_agreement"] == 1
    assert pair["mean_score_difference"] == pytest.approx(0.3)
    assert pair["max_score_difference"] == pytest.approx(0.5)
    assert pair["mask_iou"] == pytest.approx(0.5)
    assert pair["same_text"] == pytest.approx(1 / 3)


def test_names_and_batches(saved_model: Path) -> None:
    arguments = build_parser().parse_args(["chat", "--merged", f"m={saved_model}", "--batch-size", "2"])
    assert contestants(arguments).generation.batch_size == 2
