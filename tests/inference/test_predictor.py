"""The predictor: one prefill for verdict and mask, batches equal to single images, nothing but questions goes in."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import GenerationConfig, HeadsConfig, ModelConfig
from finetune.data.chat import question_turns
from finetune.data.readers import read_records
from finetune.data.template import load_template
from finetune.errors import DataFormatError
from finetune.inference.answers import canonical, read_answers
from finetune.inference.commands import describe
from finetune.inference.output import PredictionWriter, as_line
from finetune.inference.predictor import Predictor, _HeadResult, operation_shares
from finetune.inference.queries import Query, queries_of, query_for_image
from finetune.models.loading import load_bundle
from finetune.schema import ImageInput, Prediction
from finetune.special_tokens import SpecialTokens


def queries(predictor: Predictor, path: Path) -> list[Query]:
    records = [record for record in read_records(path) if record.images]
    return list(queries_of(records, lambda record: question_turns(record, predictor.template)))


def test_masks_have_each_images_own_size_and_polygons_its_frame(bundle: Any, photo_records: Path) -> None:
    predictor = Predictor(bundle, GenerationConfig(batch_size=3))
    answers = list(predictor.predict(queries(predictor, photo_records), with_text=False))
    assert [len(predictions) for predictions in answers] == [1, 1, 1, 1, 1, 2]
    for predictions in answers:
        for prediction in predictions:
            assert prediction.mask_scores is not None
            assert prediction.mask_scores.shape == prediction.size_hw
            assert prediction.mask_scores.min() >= 0
            assert prediction.mask_scores.max() <= 1
            assert 0 < prediction.score < 1
            height, width = prediction.size_hw
            points = np.array([point for polygon in prediction.polygons for point in polygon]).reshape(-1, 2)
            assert (points >= 0).all()
            assert (points <= (width, height)).all()
    assert answers[2][0].size_hw == (150, 211)
    assert [prediction.id for prediction in answers[5]] == ["pair#1", "pair#2"]


def test_batches_equal_single_images_with_and_without_text(bundle: Any, photo_records: Path) -> None:
    """Left padding: scores, masks and greedy text do not depend on the neighbours."""
    settings = GenerationConfig(batch_size=1, max_new_tokens=6)
    single = Predictor(bundle, settings)
    batched = Predictor(bundle, dataclasses.replace(settings, batch_size=6))
    asked = queries(single, photo_records)
    alone = [p for answer in single.predict(asked) for p in answer]
    together = [p for answer in batched.predict(asked) for p in answer]
    without_text = [p for answer in batched.predict(asked, with_text=False) for p in answer]
    assert any(prediction.text for prediction in alone)
    for a, b, c in zip(alone, together, without_text, strict=True):
        assert a.text == b.text
        assert c.text == ""
        for other in (b, c):
            assert a.score == pytest.approx(other.score, abs=1e-5)
            np.testing.assert_allclose(a.mask_scores, other.mask_scores, atol=1e-5)


def test_heads_and_text_come_from_one_prefill(bundle: Any, photo_records: Path) -> None:
    """The vision tower runs once per batch, and the heads on the first pass only."""
    predictor = Predictor(bundle, GenerationConfig(max_new_tokens=5))
    passes = {"tower": 0, "heads": 0, "forward": 0}
    handles = [
        bundle.base.model.visual.register_forward_hook(lambda *_: passes.__setitem__("tower", passes["tower"] + 1)),
        bundle.base.cls_head.register_forward_hook(lambda *_: passes.__setitem__("heads", passes["heads"] + 1)),
        bundle.base.register_forward_hook(lambda *_: passes.__setitem__("forward", passes["forward"] + 1)),
    ]
    try:
        list(predictor.predict(queries(predictor, photo_records)[:1]))
    finally:
        for handle in handles:
            handle.remove()
    assert passes["tower"] == 1
    assert passes["heads"] == 1
    assert passes["forward"] == 5  # the prefill gives the first of five tokens


def test_predictor_reads_no_reference_answer(bundle: Any, photo_records: Path) -> None:
    """A record with turns gives the question only, whatever its answer says."""
    record = next(record for record in read_records(photo_records) if record.id == "tampered_224x196")
    from finetune.schema import Turn

    ask = Turn("user", "<image>real or fake?")
    texts = [f'<cls><mask_1><mask_2><mask_3><mask_4>{{"result": "{word}", "mask": []}}' for word in ("real", "fake")]
    template = load_template("en")
    asked = [
        question_turns(dataclasses.replace(record, turns=(ask, Turn("assistant", text))), template) for text in texts
    ]
    assert asked[0] == asked[1] == (ask,)


def test_text_first_reads_the_tokens_the_model_wrote(bundle: Any, photo_records: Path) -> None:
    """Heads run on the model's own answer; an untrained model writes no tokens, so they are appended."""
    predictor = Predictor(bundle, GenerationConfig(max_new_tokens=4, batch_size=4), layout="text_first")
    alone = Predictor(bundle, GenerationConfig(max_new_tokens=4, batch_size=1), layout="text_first")
    asked = queries(predictor, photo_records)
    answers = [p for answer in predictor.predict(asked) for p in answer]
    singles = [p for answer in alone.predict(asked) for p in answer]
    for a, b in zip(answers, singles, strict=True):
        assert a.mask_scores is not None
        assert a.score == pytest.approx(b.score, abs=1e-5)


def test_heads_that_do_not_run_are_an_error_not_a_score(bundle: Any, photo_records: Path, monkeypatch: Any) -> None:
    predictor = Predictor(bundle)
    monkeypatch.setattr(bundle.base, "_find_runs", lambda *_: None)
    with pytest.raises(RuntimeError, match="none ran"):
        list(predictor.predict(queries(predictor, photo_records)[:1], with_text=False))


def test_threshold_decides_the_label(bundle: Any, photo_records: Path) -> None:
    for threshold, expected in ((0.0, 1), (1.0, 0)):
        predictor = Predictor(bundle, GenerationConfig(score_threshold=threshold))
        (answer,) = predictor.predict(queries(predictor, photo_records)[:1], with_text=False)
        assert answer[0].label == expected


def test_unreadable_image_names_the_record(bundle: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no image")
    predictor = Predictor(bundle)
    with pytest.raises(DataFormatError, match=r"broken\.jpg"):
        list(predictor.predict([query_for_image(str(broken), predictor.template)]))


def test_template_and_layout_come_with_the_model(bundle: Any) -> None:
    predictor = Predictor(bundle)
    assert predictor.template == dataclasses.replace(load_template("en"), name="en")
    assert predictor.layout == "tokens_first"


def test_answers_of_both_layouts_are_read() -> None:
    template = load_template("zh")
    strict = '{"result": "fake", "mask": [[1, 2, 3], [4, 5, 6]], "evidence": "x"}'
    loose = '{"result": real, "mask": []}'
    assert read_answers(strict, template, 1)[0].label == 1  # type: ignore[index]
    assert read_answers(loose, template, 1)[0].label == 0  # type: ignore[index]
    both = read_answers(f"[{strict}, {loose}]", template, 2)
    assert both is not None
    assert [answer.label for answer in both] == [1, 0]
    assert read_answers(f"[{strict}]", template, 2) is None
    assert read_answers('{"result": "maybe", "mask": []}', template, 1) is None
    words = dataclasses.replace(template, result={0: "真实", 1: "伪造"})
    assert canonical('{"result": 伪造, "mask": []}', words) == '{"result": "fake", "mask": []}'
    assert read_answers('{"result": "真实", "mask": []}', words, 1)[0].label == 0  # type: ignore[index]


def test_operation_shares_by_hand() -> None:
    """Two places: one surely a splice, one surely authentic, which has no say."""
    p = torch.tensor([[[0.1, 1.0]], [[0.6, 0.0]], [[0.3, 0.0]]])  # authentic, splice, remove
    found = operation_shares(p.clamp(min=1e-30).log(), ["splice", "remove"])
    assert found == {"splice": pytest.approx(2 / 3), "remove": pytest.approx(1 / 3)}
    faint = operation_shares(torch.tensor([900.0, 0.0, 1.0]).reshape(3, 1, 1), ["splice", "remove"])
    assert faint["remove"] == pytest.approx(1 / (1 + math.exp(-1)))  # authentic all over: shares of what is left
    assert sum(faint.values()) == pytest.approx(1)


def test_a_model_with_operations_says_how(tiny_dir: Path, photo_records: Path, tmp_path: Path) -> None:
    heads = HeadsConfig(hidden_size=32, num_layers=1, num_heads=4, operations=["splice", "retouch.grain"])
    told = Predictor(load_bundle(ModelConfig(path=str(tiny_dir), dtype="float32"), SpecialTokens(), heads))
    asked = queries(told, photo_records)
    with PredictionWriter(tmp_path) as writer:
        for predictions in told.predict(asked, with_text=False):
            for prediction in predictions:
                assert prediction.operations is not None
                assert list(prediction.operations) == heads.operations
                assert sum(prediction.operations.values()) == pytest.approx(1)
                assert prediction.operation in heads.operations
                writer.write(prediction)
                label = dataclasses.replace(prediction, label=1)
                assert f"  {prediction.operation}?  " in describe(label, 0.5)
                assert prediction.operation not in describe(dataclasses.replace(prediction, label=0), 0.5)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    assert all(sum(line["operations"].values()) == pytest.approx(1, abs=1e-3) for line in lines)


def test_writer_gives_the_documented_line_and_unique_files(tmp_path: Path) -> None:
    scores = np.zeros((5, 7), np.float32)
    scores[1:3, 2:6] = 0.8
    prediction = Prediction(
        "a/b.png", "a/b.png", 1, 0.75, scores, (((2.0, 1.0), (6.0, 1.0), (6.0, 3.0)),), "{}", False, (5, 7)
    )
    with PredictionWriter(tmp_path) as writer:
        stems = [writer.write(prediction), writer.write(prediction)]
    assert len(set(stems)) == 2
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert list(lines[0]) == [
        "id", "image_path", "label", "score", "raw_score", "mask_path", "polygons", "text", "parse_ok", "text_polygons",
        "size_hw",
    ]  # fmt: skip
    from PIL import Image

    written = np.asarray(Image.open(tmp_path / lines[1]["mask_path"]))
    np.testing.assert_array_equal(written, np.round(scores * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("text", "verdict_from", "label", "score"),
    [
        ('{"result": "fake", "mask": [[1, 20, 20], [1, 1, 20]], "evidence": "x"}', "text", 1, 1.0),
        ('{"result": "real", "mask": [], "evidence": "x"}', "text", 0, 0.0),
        ('{"result": "fake", "mask": [[1, 20', "nothing", 0, 0.5),
        ("", "nothing", 0, 0.5),
    ],
)
def test_without_a_cls_head_the_answer_is_the_verdict(
    bundle: Any, photo_records: Path, text: str, verdict_from: str, label: int, score: float
) -> None:
    """A text that cannot be read is no verdict, least of all that of the tampered class."""
    predictor = Predictor(bundle)
    query = queries(predictor, photo_records)[0]
    pictures = [Image.new("RGB", (196, 224))]
    ((found,),) = predictor._predictions([query], [pictures], _HeadResult.empty(1), [text])
    assert (found.verdict_from, found.label, found.score) == (verdict_from, label, score)
    line = as_line(found, None)
    assert (line["label"], line["score"]) == ((None, None) if verdict_from == "nothing" else (label, score))
    assert ("no verdict" in describe(found, 0.5)) is (verdict_from == "nothing")
    ((headed,),) = predictor._predictions(
        [query], [pictures], dataclasses.replace(_HeadResult.empty(1), scores=[0.75]), [text]
    )
    assert (headed.verdict_from, headed.label, headed.score) == ("head", 1, 0.75)


def test_a_second_run_leaves_no_picture_of_the_first(tmp_path: Path) -> None:
    first = [
        Prediction(name, name, 1, 0.75, np.zeros((5, 7), np.float32), (), "", False, (5, 7)) for name in ("a", "b", "c")
    ]
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "mine.png").write_bytes(b"of somebody else")
    for predictions in (first, first[:1]):
        with PredictionWriter(tmp_path) as writer:
            for prediction in predictions:
                writer.write(prediction)
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.png", "mine.png"]


def test_predicting_leaves_gradients_and_weights_alone(bundle: Any, photo_records: Path) -> None:
    before = {name: parameter.clone() for name, parameter in bundle.base.named_parameters()}
    predictor = Predictor(bundle)
    list(predictor.predict(queries(predictor, photo_records)[:2], with_text=False))
    for name, parameter in bundle.base.named_parameters():
        assert torch.equal(before[name], parameter), name
        assert parameter.grad is None


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_python_of_the_readme_runs(
    readme: str, repo_root: Path, saved_model: Path, photo_records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repo_root / readme).read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "Predictor(" in block]
    for name, path in (
        ("runs/quickstart/best", saved_model),
        ("image.jpg", photo_records.parent / "a.png"),
        ("other.png", photo_records.parent / "b.png"),
    ):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(path)))
    exec(compile(code, readme, "exec"), {})
    printed = capsys.readouterr().out
    assert "a.png" in printed
    assert "(224, 196)" in printed
    assert "(112, 252)" in printed


def test_query_carries_no_target_field() -> None:
    assert {field.name for field in dataclasses.fields(Query)} == {"id", "images", "turns"}
    assert query_for_image("x.png", load_template("zh")).images == (ImageInput(path="x.png"),)
