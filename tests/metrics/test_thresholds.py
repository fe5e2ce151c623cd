"""Tables over thresholds and curves against scikit-learn and against the metrics at one threshold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn

from finetune.metrics.classification import image_metrics
from finetune.metrics.localization import authentic_metrics, localization_metrics
from finetune.metrics.thresholds import STEPS, PixelTable, image_table, precision_recall_curve, roc_curve

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 200)
SCORES = np.round(np.clip(0.3 * LABELS + RNG.uniform(0, 0.7, 200), 0, 1), 2)  # rounded: ties, some at thresholds


def test_rows_of_images_are_the_metrics_at_their_threshold() -> None:
    for row in image_table(SCORES, LABELS):
        expected = image_metrics(SCORES, LABELS, row["threshold"])
        for name in ("accuracy", "balanced_accuracy", "f1"):
            assert row[name] == pytest.approx(expected[name], abs=1e-12)
        assert row["recall"] == expected["recall_fake"]
        assert row["false_alarm_rate"] == pytest.approx(1 - expected["recall_real"])
        called = row["threshold"] <= SCORES
        if called.any():
            assert row["precision"] == pytest.approx(sklearn.precision_score(LABELS, called))


def test_rows_of_pixels_are_the_metrics_at_their_threshold() -> None:
    table, pairs = PixelTable(), []
    for index in range(9):
        mask = np.zeros((13, 17), np.uint8)
        if index % 3:
            mask[2 : 5 + index, 3:9] = 1
        scores = np.round(np.clip(0.4 * mask + RNG.uniform(0, 0.6, mask.shape), 0, 1), 2).astype(np.float32)
        given = None if index == 4 else scores
        table.add(given, mask)
        pairs.append((given, mask))
    rows = table.rows()
    assert [row["threshold"] for row in rows] == list(STEPS)
    for row in rows:
        overlap = localization_metrics(pairs, row["threshold"])
        alarms = authentic_metrics(pairs, row["threshold"])
        assert row["f1"] == pytest.approx(overlap["f1"], abs=1e-9)
        assert row["iou"] == pytest.approx(overlap["iou"], abs=1e-9)
        assert row["false_alarm_rate"] == pytest.approx(alarms["false_alarm_rate"])
        assert row["false_positive_area"] == pytest.approx(alarms["false_positive_area"])


def test_curves_against_scikit_learn() -> None:
    thresholds, false, true = zip(*roc_curve(SCORES, LABELS), strict=True)
    expected = sklearn.roc_curve(LABELS, SCORES, drop_intermediate=False)
    np.testing.assert_allclose(false, expected[0])
    np.testing.assert_allclose(true, expected[1])
    np.testing.assert_allclose(thresholds, expected[2])
    found = precision_recall_curve(SCORES, LABELS)[::-1]
    precision, recall, steps = sklearn.precision_recall_curve(LABELS, SCORES)
    np.testing.assert_allclose([row[0] for row in found], steps)
    np.testing.assert_allclose([row[1] for row in found], recall[:-1])
    np.testing.assert_allclose([row[2] for row in found], precision[:-1])


def test_one_class_and_nothing_called() -> None:
    assert roc_curve([0.2, 0.4], [1, 1]) == precision_recall_curve([0.2], [0]) == []
    (row,) = image_table([0.1, 0.2], [0, 0], [0.5])
    assert row == {
        "threshold": 0.5,
        "accuracy": 1.0,
        "balanced_accuracy": None,
        "precision": None,
        "recall": None,
        "f1": None,
        "false_alarm_rate": 0.0,
    }
    assert PixelTable([0.5]).rows() == [
        {"threshold": 0.5, "f1": None, "iou": None, "false_alarm_rate": None, "false_positive_area": None}
    ]
    assert image_table([], [], [0.5])[0]["accuracy"] is None
