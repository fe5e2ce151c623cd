"""Conversations of generated sets: they say what the provenance says, leak no target, and keep the splits clean."""

from __future__ import annotations

import json
import re
import string
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.chat import conversation
from finetune.data.masks import rasterize_polygons
from finetune.data.readers import read_records
from finetune.data.synthesis import SynthConfig, synthesize
from finetune.data.synthesis.answers import LANGUAGES, PLACES, place_words
from finetune.data.synthesis.conversation_phrases import PHRASES, STEPS, TYPES
from finetune.data.synthesis.conversations import RECORD_KINDS, is_kept_by_resizing
from finetune.data.synthesis.degradations import DEGRADATIONS
from finetune.data.synthesis.operations import OPERATIONS
from finetune.data.template import load_template
from finetune.data.token_checks import leaking_tokens
from finetune.data.validation import check_records
from finetune.special_tokens import IMAGE_PLACEHOLDER, SpecialTokens

KINDS = {"multi_image": 0.5, "multi_turn": 1.0, "conclusion_only": 0.5, "comparison": 1.0, "paraphrase": 1.0}
CONFIG = SynthConfig(
    num_train=36,
    num_eval=16,
    num_val=0,
    seed=3,
    sizes_hw=((112, 140), (140, 112)),
    language="both",
    record_kinds=KINDS,
    workers=1,
)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("conversations") / "set"
    synthesize(CONFIG, root, progress=False)
    return root


def read(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name).read_text(encoding="utf-8").splitlines()]


def of_kind(root: Path, kind: str, name: str = "train_instruct.jsonl") -> list[dict[str, Any]]:
    return [record for record in read(root, name) if record["provenance"]["kind"] == kind]


def answers(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in record["messages"] if message["role"] == "assistant"]


def fits(text: str, key: str, language: str) -> bool:
    """Whether a text begins with a phrasing of `key`, whatever stands in its placeholders."""
    patterns = (re.sub(r"\\\{\w+\\\}", ".+", re.escape(phrase)) for phrase in PHRASES[language][key])
    return any(re.match(pattern, text) for pattern in patterns)


def test_every_kind_is_made_as_often_as_asked(data_set: Path) -> None:
    manifest = json.loads((data_set / "manifest.json").read_text(encoding="utf-8"))
    for split, images in (("train", 36), ("eval", 16)):
        records = read(data_set, f"{split}_instruct.jsonl")
        counts = {kind: sum(r["provenance"]["kind"] == kind for r in records) for kind in KINDS}
        assert counts == {kind: round(share * images) for kind, share in KINDS.items()}
        assert manifest["counts"][split]["records"] == {**counts, "single": images}
        assert len({record["id"] for record in records}) == len(records)
        assert len(read(data_set, f"{split}.jsonl")) == images
    assert set(RECORD_KINDS) == {*KINDS, "single"}


@pytest.mark.parametrize("tokens", [SpecialTokens(1, 32), SpecialTokens(3, 4)])
def test_records_pass_the_check_and_leak_no_target(data_set: Path, tokens: SpecialTokens) -> None:
    for split in ("train", "eval"):
        records = read_records(data_set / f"{split}_instruct.jsonl")
        assert check_records(records, tokens) == []
        for record in records:
            template = load_template("zh")
            turns = conversation(record, template, tokens, "tokens_first", [()] * len(record.images))
            assert not leaking_tokens(replace(record, turns=turns), tokens)
            first = next(turn for turn in turns if turn.role == "assistant")
            assert first.content.startswith(tokens.run * len(record.images))
            assert sum(len(tokens.find(turn.content)) for turn in turns) == len(tokens.all) * len(record.images)
            before = turns[: turns.index(first)]
            assert sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in before) == len(record.images)


def test_the_verdict_is_the_label(data_set: Path) -> None:
    for kind, key in (("multi_turn", "verdict"), ("conclusion_only", "conclusion")):
        labels = set()
        for record in of_kind(data_set, kind):
            label, language = record["labels"][0], record["provenance"]["language"]
            labels.add(label)
            right, wrong = ("fake", "real") if label else ("real", "fake")
            assert fits(answers(record)[0], f"{key}.{right}", language), answers(record)[0]
            assert answers(record)[0] not in PHRASES[language][f"{key}.{wrong}"]
        assert labels == {0, 1}


def test_several_turns_give_place_reason_certainty_from_the_provenance(data_set: Path) -> None:
    with_history = 0
    for record in of_kind(data_set, "multi_turn"):
        provenance, language = record["provenance"], record["provenance"]["language"]
        verdict, where, why, sure, *history = answers(record)
        with_history += len(history)
        steps = [STEPS[language][step["name"]].format(**step) for step in provenance["degradations"]]
        assert all(words in text for text in history for words in steps)
        if record["labels"] == [0]:
            key = "sure.real_processed" if steps else "sure.real"
            assert fits(where, "where.real", language)
            assert fits(sure, key, language)
            continue
        assert TYPES[language][provenance["operation"]["name"]] in verdict
        place = place_words(provenance["region"]["place"], language)
        assert place in where
        assert place in why
        assert f"{max(1, round(100 * provenance['region']['share']))}%" in where
        assert fits(sure, f"sure.{provenance['difficulty']}", language)
    assert 9 <= with_history <= 27  # half of 36; standard deviation 3


def test_comparisons_name_the_tampered_one(data_set: Path) -> None:
    labels, twins = [], 0
    images = {record["id"]: record for record in read(data_set, "train.jsonl")}
    for record in of_kind(data_set, "comparison"):
        language = record["provenance"]["language"]
        classes = tuple("fake" if label else "real" for label in record["labels"])
        labels.append(classes)
        (answer,) = answers(record)
        pairs = {images[name]["provenance"]["pair"] for name in record["provenance"]["from"]}
        assert len(set(record["images"])) == 2
        if len(pairs) == 1:
            twins += 1
            same = next(text for text in PHRASES[language]["comparison.same"] if answer.startswith(text))
            answer = answer.removeprefix(same)
        else:
            assert not answer.startswith(PHRASES[language]["comparison.same"])
        assert fits(answer, f"comparison.{classes[0]}_{classes[1]}", language), answer
    assert set(labels) == {(a, b) for a in ("real", "fake") for b in ("real", "fake")}
    assert twins >= 4


def test_joint_answers_are_left_to_the_template(data_set: Path) -> None:
    records = of_kind(data_set, "multi_image")
    assert {len(record["images"]) for record in records} == {2, 3, 4}
    for record in records:
        assert "messages" not in record
        assert len(set(record["images"])) == len(record["images"])
        assert len(record["labels"]) == len(record["masks"]) == len(record["evidence"]) == len(record["images"])
        assert len(record["provenance"]["images"]) == len(record["images"])


def test_paraphrases_are_answered_as_the_template_would(data_set: Path) -> None:
    prompts = {prompt for name in LANGUAGES for prompt in load_template(name).prompts}
    for record in of_kind(data_set, "paraphrase"):
        (question, answer) = (message["content"] for message in record["messages"])
        assert question not in prompts
        tree = json.loads(answer)
        assert list(tree) == ["result", "mask", "evidence"]
        assert tree["result"] == ("fake" if record["labels"][0] else "real")
        xs_ys = [axis for polygon in record["polygons"][0] for axis in zip(*polygon, strict=True)]
        assert tree["mask"] == [list(axis) for axis in xs_ys]


def test_coordinates_lie_on_the_mask(data_set: Path) -> None:
    found = 0
    for record in of_kind(data_set, "multi_turn"):
        where = answers(record)[1]
        if record["labels"] == [0]:
            assert "[[" not in where
            continue
        lists = json.loads(where[where.index("[[") :])
        polygons = [tuple(zip(lists[i], lists[i + 1], strict=True)) for i in range(0, len(lists), 2)]
        mask = np.asarray(Image.open(data_set / record["masks"][0])) > 0
        drawn = rasterize_polygons(polygons, mask.shape).astype(bool)
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.75
        found += 1
    assert found >= 12


def test_written_coordinates_need_sizes_that_resizing_keeps() -> None:
    from finetune.data.image_frame import processed_size

    processor = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 1003520})
    for size in ((224, 224), (196, 252), (28, 112), (28, 84), (200, 252), (1008, 980), (1008, 1008), (1036, 1036)):
        assert is_kept_by_resizing(*size) == (processed_size(size, processor) == size), size


@pytest.mark.parametrize(
    ("coordinates", "size"), [("absolute", (100, 130)), ("words", (112, 140)), ("relative", (100, 130))]
)
def test_coordinates_in_words_or_relative(coordinates: str, size: tuple[int, int], tmp_path: Path) -> None:
    config = replace(CONFIG, num_train=8, num_eval=0, sizes_hw=(size,), coordinates=coordinates)
    synthesize(config, tmp_path / "set", progress=False)
    for record in of_kind(tmp_path / "set", "multi_turn"):
        assert ("[[" in answers(record)[1]) == (coordinates == "relative" and record["labels"] == [1])
    for record in of_kind(tmp_path / "set", "paraphrase"):
        tree = json.loads(answers(record)[0])
        assert ("mask" in tree) == (coordinates == "relative")  # for both classes, so that its presence tells nothing
        if coordinates == "relative":
            xs_ys = [axis for polygon in record["polygons"][0] for axis in zip(*polygon, strict=True)]
            scaled = [[value * 1000 / size[1 - i % 2] for value in axis] for i, axis in enumerate(xs_ys)]
            assert np.concatenate([[0], *tree["mask"]]) == pytest.approx(np.concatenate([[0], *scaled]), abs=0.5)


def test_records_of_several_photographs_only_on_demand(data_set: Path, tmp_path: Path) -> None:
    for split in ("train", "eval"):
        groups = {record["id"]: record["group"] for record in read(data_set, f"{split}.jsonl")}
        for record in read(data_set, f"{split}_instruct.jsonl"):
            assert {groups[name] for name in record["provenance"]["from"]} == {record["group"]}
            assert "pair" not in record["provenance"]
    synthesize(replace(CONFIG, num_train=16, mix_photos=True), tmp_path / "mixed", progress=False)
    records = read(tmp_path / "mixed", "train_instruct.jsonl")
    groups = {record["id"]: record["group"] for record in read(tmp_path / "mixed", "train.jsonl")}
    assert any("+" in record["group"] for record in records)
    for record in records:
        assert record["group"] == "+".join(sorted({groups[name] for name in record["provenance"]["from"]}))
    held_out = {record["group"] for record in read(tmp_path / "mixed", "eval.jsonl")}
    assert not held_out & {part for record in records for part in record["group"].split("+")}


def test_missing_records_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(CONFIG, num_train=0, num_eval=3, sizes_hw=((112, 112),), seed=1)
    manifest = synthesize(config, tmp_path / "set", progress=False)
    made = manifest["counts"]["eval"]["records"]
    assert len(manifest["counts"]["eval"]["groups"]) == 3, "the case needs three photographs with one image each"
    assert "comparison" not in made
    assert "eval: 0 of 3 comparison records: too few photographs have two images" in caplog.text
    assert made["multi_turn"] == 3


def test_only_single_records_by_default_and_a_share_of_them_on_demand(tmp_path: Path) -> None:
    config = SynthConfig(num_train=8, num_eval=0, num_val=0, sizes_hw=((112, 112),), workers=1)
    synthesize(config, tmp_path / "default", progress=False)
    assert not list((tmp_path / "default").glob("*_instruct.jsonl"))
    assert len(read(tmp_path / "default", "train.jsonl")) == 8
    kinds = {"single": 0.25, "conclusion_only": 0.5}
    manifest = synthesize(replace(config, record_kinds=kinds), tmp_path / "some", progress=False)
    assert manifest["counts"]["train"]["records"] == {"single": 2, "conclusion_only": 4}
    assert len(read(tmp_path / "some", "train.jsonl")) == 2
    assert manifest["counts"]["train"]["images"] == 8


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_operation_and_step_has_a_name_and_every_question_several_phrasings(language: str) -> None:
    assert set(OPERATIONS) <= set(TYPES[language])
    assert set(DEGRADATIONS) == set(STEPS[language])
    assert set(PHRASES[language]) == set(PHRASES["zh"])
    known = {"image", "images", "type", "place", "size", "polygons", "finding", "history", "first", "second"}
    for key, phrases in PHRASES[language].items():
        assert len(set(phrases)) == len(phrases) >= 2, key
        for phrase in phrases:
            fields = {field for _, field, _, _ in string.Formatter().parse(phrase) if field is not None}
            assert fields <= known, phrase
            asks_with_image = key in ("verdict.ask", "conclusion.ask", "paraphrase.ask")
            assert ("image" in fields) == asks_with_image, phrase
            assert ("images" in fields) == (key == "comparison.ask"), phrase
    assert len({place_words(place, language) for row in PLACES for place in row}) == 9
