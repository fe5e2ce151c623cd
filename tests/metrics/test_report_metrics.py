"""Metrics of written reports agree with scikit-learn, rouge-score and sacrebleu; gaps count as wrong."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, f1_score

from finetune.metrics.reports import MISSING, field_metrics, level_metrics
from finetune.metrics.text_overlap import chrf, rouge_l

LEVELS = ["轻微", "中等", "严重"]
WORDS = "墙体开裂渗水发霉脱落 建议修补防水涂料，。ab1"


def texts(count: int, seed: int, longest: int = 30) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(WORDS, k=draw.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_levels_agree_with_scikit_learn(seed: int) -> None:
    draw = random.Random(seed)
    true = draw.choices(LEVELS, k=60)
    written = [draw.choice([*LEVELS, level, level, None, "极重"]) for level in true]
    found = level_metrics(written, true, LEVELS)
    usable = [level if level in LEVELS else "?" for level in written]
    assert found["accuracy"] == pytest.approx(accuracy_score(true, usable), abs=1e-9)
    assert found["macro_f1"] == pytest.approx(f1_score(true, usable, labels=LEVELS, average="macro"), abs=1e-9)
    pairs = [(a, b) for a, b in zip(true, usable, strict=True) if b != "?"]
    kappa = cohen_kappa_score(*zip(*pairs, strict=True), labels=LEVELS, weights="quadratic")
    assert found["quadratic_kappa"] == pytest.approx(kappa, abs=1e-9)
    matrix = confusion_matrix(true, usable, labels=[*LEVELS, "?"])
    assert [list(found["confusion"][level].values()) for level in LEVELS] == matrix[:3].tolist()
    assert list(found["confusion"]["轻微"]) == [*LEVELS, MISSING]
    assert (found["n"], found["n_graded"]) == (60, len(pairs))


def test_levels_by_hand() -> None:
    found = level_metrics(["轻微", "严重", None, "中等"], ["轻微", "轻微", "中等", "中等"], LEVELS)
    assert found["accuracy"] == 0.5
    assert found["within_one"] == 0.5
    assert found["majority"] == 0.5
    # 轻微: 2*1/(2+1); 中等: 2*1/(2+1); 严重 was written once and is never true: 0
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_levels_without_anything_to_compare() -> None:
    assert level_metrics([], [], LEVELS)["accuracy"] is None
    one = level_metrics(["中等"] * 3, ["中等"] * 3, LEVELS)
    assert (one["accuracy"], one["macro_f1"], one["quadratic_kappa"]) == (1.0, 1.0, None)
    none = level_metrics([None, "x"], ["中等", "轻微"], LEVELS)
    assert (none["accuracy"], none["macro_f1"], none["quadratic_kappa"], none["n_graded"]) == (0.0, 0.0, None, 0)
    with pytest.raises(ValueError, match="none of"):
        level_metrics(["轻微"], ["一般"], LEVELS)
    with pytest.raises(ValueError, match="one true level"):
        level_metrics([], ["轻微"], LEVELS)


def test_chrf_agrees_with_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    for seed in range(8):
        ours, theirs = texts(12, seed), texts(12, seed + 50)
        ours[0] = theirs[0]
        expected = sacrebleu.corpus_chrf(ours, [theirs]).score / 100
        assert chrf(ours, theirs) == pytest.approx(expected, abs=1e-6)
    for ours, theirs in (("墙体开裂", "墙体开裂"), ("墙", "开"), ("墙体开裂", "墙体渗水严重"), ("", "墙")):
        expected = sacrebleu.corpus_chrf([ours], [[theirs]]).score / 100
        assert chrf([ours], [theirs]) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_agrees_with_rouge_score_on_characters() -> None:
    scorer_module = pytest.importorskip("rouge_score.rouge_scorer")

    class Characters:
        def tokenize(self, text: str) -> list[str]:
            return list("".join(text.split()))

    scorer = scorer_module.RougeScorer(["rougeL"], tokenizer=Characters())
    for ours, theirs in zip(texts(40, 1), texts(40, 2), strict=True):
        if ours.strip() and theirs.strip():
            expected = scorer.score(theirs, ours)["rougeL"].fmeasure
            assert rouge_l(ours, theirs) == pytest.approx(expected, abs=1e-9)


def test_overlap_by_hand() -> None:
    assert rouge_l("墙体开裂", "墙面开裂") == pytest.approx(0.75)
    assert rouge_l("墙 体", "墙体") == 1.0
    assert rouge_l("", "") == 1.0
    assert rouge_l("", "墙") == rouge_l("墙", "") == 0.0
    assert chrf([], []) is None
    with pytest.raises(ValueError, match="one reference"):
        chrf(["a"], [])


def test_a_missing_field_counts_as_wrong_and_an_unknown_truth_is_not_compared() -> None:
    written = [{"风险": "墙体 开裂", "建议": "修补"}, {"建议": "修补"}]
    true = [{"风险": "墙体开裂", "建议": "修补"}, {"风险": "渗水"}]
    found = field_metrics(written, true, ["风险", "建议", "位置"])
    assert found["风险"] == {
        "exact": 0.5,
        "rouge_l": 0.5,
        "chrf": pytest.approx(chrf(["墙体开裂", ""], ["墙体开裂", "渗水"])),
        "n": 2,
    }
    assert found["建议"] == {"exact": 1.0, "rouge_l": 1.0, "chrf": 1.0, "n": 1}
    assert found["位置"] == {"exact": None, "rouge_l": None, "chrf": None, "n": 0}
    with pytest.raises(ValueError, match="one truth"):
        field_metrics([], [{}], [])
