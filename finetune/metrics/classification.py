"""Image-level metrics of the verdict real / tampered. scikit-learn computes what it has; undefined values are None.

A metric that needs both classes is None, never NaN or a filler, when one is missing: its value would say something
about the data set, not about the model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, roc_auc_score

from finetune.metrics.calibration import ece


def image_metrics(
    scores: ArrayLike, labels: ArrayLike, threshold: float = 0.5, judged: ArrayLike | None = None
) -> dict[str, float | int | None]:
    """Detection metrics over images; label 1 (tampered) is the positive class.

    Args:
        scores: (N,) float in [0, 1].
        labels: (N,) in {0, 1}; leave unlabelled images out.
        threshold: an image is called tampered when score >= threshold.
        judged: (N,) bool, False for an image without a verdict (an answer that cannot be read): of whichever class it
            is, it counts as called wrongly, and takes no part in `ece`. Its score, 0.5, says nothing to `auroc`. None:
            all of them have one.

    Returns:
        `auroc` (ties count half), `average_precision`, `balanced_accuracy` (mean of the two recalls): None when a
        class is missing. `f1` of the tampered class, `recall_fake`: None without a tampered image. `recall_real`: None
        without a real one. `accuracy`, `ece` (15 bins): None for no image. `n_real`, `n_fake`: int.

    Raises:
        ValueError: for shapes that differ, a score outside [0, 1] or NaN, a label other than 0 and 1.
    """
    values, truth = check_scores(scores, labels)
    answered = np.ones(len(truth), dtype=bool) if judged is None else np.asarray(judged, dtype=bool)
    is_fake = truth == 1
    called_fake = np.where(answered, values >= threshold, ~is_fake)
    n_fake, n_real = int(is_fake.sum()), int((~is_fake).sum())
    hits, false_alarms = int((is_fake & called_fake).sum()), int((~is_fake & called_fake).sum())
    recall_fake = hits / n_fake if n_fake else None
    recall_real = (n_real - false_alarms) / n_real if n_real else None
    has_both = n_fake > 0 and n_real > 0
    return {
        "auroc": float(roc_auc_score(truth, values)) if has_both else None,
        "average_precision": float(average_precision_score(truth, values)) if has_both else None,
        "balanced_accuracy": None if recall_fake is None or recall_real is None else (recall_fake + recall_real) / 2,
        "accuracy": (hits + n_real - false_alarms) / len(truth) if len(truth) else None,
        "f1": 2 * hits / (n_fake + hits + false_alarms) if n_fake else None,
        "ece": ece(values[answered], truth[answered]),
        "n_real": n_real,
        "n_fake": n_fake,
        "recall_real": recall_real,
        "recall_fake": recall_fake,
    }


def check_scores(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 (N,) and labels as int64 (N,), or a ValueError that says what is wrong with them."""
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or truth.shape != values.shape:
        raise ValueError(f"scores and labels are (N,), found {values.shape} and {truth.shape}")
    if not ((values >= 0) & (values <= 1)).all():  # NaN fails both comparisons
        raise ValueError("scores lie in [0, 1]; found NaN or a value outside")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"labels are 0 or 1, found {sorted(set(truth.tolist()) - {0, 1})}; drop unlabelled images")
    return values, truth.astype(np.int64)
