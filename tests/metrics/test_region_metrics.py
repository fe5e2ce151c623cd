"""Region and image metrics agree with scikit-learn; the sweep picks the best F1; types are counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from finetune.metrics.regions import ScoredImage, binary_metrics, region_metrics, sweep


def drawn(num: int, seed: int) -> list[ScoredImage]:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num):
        ids = [f"R{i}" for i in range(1, int(rng.integers(2, 6)))]
        positive = [name for name in ids if rng.random() < 0.4]
        scores = {name: float(np.round(rng.beta(3, 2) if name in positive else rng.beta(2, 3), 2)) for name in ids}
        images.append(ScoredImage(scores, positive, dict.fromkeys(positive, "crack"), {}))
    return images


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.8])
def test_regions_and_images_agree_with_scikit_learn(threshold: float) -> None:
    images = drawn(60, 1)
    found = region_metrics(images, threshold)
    roi = (
        np.array([int(name in image.positive_region_ids) for image in images for name in image.scores]),
        np.array([score for image in images for score in image.scores.values()]),
    )
    whole = (
        np.array([int(bool(image.positive_region_ids)) for image in images]),
        np.array([max(image.scores.values()) for image in images]),
    )
    for level, (truth, scores) in (("roi", roi), ("image", whole)):
        called = scores >= threshold
        wanted = {
            "precision": precision_score(truth, called),
            "recall": recall_score(truth, called),
            "f1": f1_score(truth, called),
            "auroc": roc_auc_score(truth, scores),
            "average_precision": average_precision_score(truth, scores),
            "all_positive_f1": f1_score(truth, np.ones_like(truth)),
            "n": len(truth),
            "n_positive": truth.sum(),
        }
        assert found[level] == pytest.approx(wanted, abs=1e-9)


def test_undefined_values_are_none() -> None:
    nothing = binary_metrics([], [], 0.5)
    assert (nothing["precision"], nothing["recall"], nothing["f1"], nothing["auroc"], nothing["n"]) == (*[None] * 4, 0)
    only_normal = binary_metrics([0.9, 0.1], [0, 0], 0.5)
    assert (only_normal["precision"], only_normal["recall"], only_normal["auroc"]) == (0, None, None)
    assert binary_metrics([0.1], [1], 0.5)["precision"] is None


def test_the_sweep_takes_the_best_threshold_and_the_lowest_of_equals() -> None:
    images = drawn(80, 2)
    best, values = sweep(images)
    assert min(values) == 0.4
    assert max(values) == 0.8
    assert values[best] == max(values.values())
    assert values[best] == pytest.approx(region_metrics(images, best)["roi"]["f1"])
    easy = [ScoredImage({"R1": 0.9, "R2": 0.1}, ["R1"], {}, {})]
    assert sweep(easy)[0] == 0.4
    with pytest.raises(ValueError, match="no positive region"):
        sweep([ScoredImage({"R1": 0.5}, [], {}, {})])


def test_types_and_confusion_by_hand() -> None:
    images = [
        ScoredImage(
            {"R1": 0.9, "R2": 0.8, "R3": 0.2, "R4": 0.7},
            ["R1", "R2", "R3"],
            {"R1": "crack", "R2": "crack", "R3": "spall"},
            {"R1": "crack", "R2": "spall", "R4": "crack"},
        ),
        ScoredImage({"R1": 0.6, "R2": 0.1}, ["R1"], {"R1": "crack"}, {}),
    ]
    found = region_metrics(images, 0.5)
    assert found["confusion"] == {
        "crack": {"abnormal": 1, "crack": 1, "spall": 1},
        "normal": {"crack": 1, "normal": 1},
        "spall": {"normal": 1},
    }
    assert found["types"] == {
        "crack": {"regions": 3, "recall": 1.0, "named": pytest.approx(1 / 3)},
        "spall": {"regions": 1, "recall": 0.0, "named": None},
    }


def test_a_positive_region_without_a_score_is_refused() -> None:
    with pytest.raises(ValueError, match="positive regions without a score"):
        ScoredImage({"R1": 0.5}, ["R2"], {}, {})
