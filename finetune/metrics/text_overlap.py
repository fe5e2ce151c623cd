"""How much of a written text is that of its reference: character-level ROUGE-L and chrF, made for Chinese.

Characters other than white space are the units, so no word segmentation has a say. Sources: Lin 2004
(ROUGE-L, F with equal weights, as the package rouge-score); Popović 2015 (chrF, beta 2, orders 1 to 6, as sacrebleu).
Both are in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

CHRF_ORDER, CHRF_BETA = 6, 2.0


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of characters; 1 for two empty texts, 0 where one is empty."""
    ours, theirs = _characters(text), _characters(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = _common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


def chrf(texts: Sequence[str], references: Sequence[str]) -> float | None:
    """chrF of a set: counts of character n-grams are summed over all texts before they are compared.

    Returns:
        In [0, 1]; None for no text. An order of which either side has no n-gram at all is left out.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(texts) != len(references):
        raise ValueError(f"one reference per text: {len(texts)} texts, {len(references)} references")
    if not texts:
        return None
    precisions, recalls = [], []
    for order in range(1, CHRF_ORDER + 1):
        num_ours = num_theirs = num_common = 0
        for text, reference in zip(texts, references, strict=True):
            ours, theirs = _ngrams(text, order), _ngrams(reference, order)
            num_ours += ours.total() if theirs else 0  # a reference too short for this order says nothing about it
            num_theirs += theirs.total()
            num_common += (ours & theirs).total()
        if num_ours and num_theirs:
            precisions.append(num_common / num_ours)
            recalls.append(num_common / num_theirs)
    if not precisions:
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)


def _characters(text: str) -> str:
    return "".join(text.split())


def _ngrams(text: str, order: int) -> Counter[str]:
    text = _characters(text)
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def _common_subsequence(one: str, other: str) -> int:
    """Length of the longest common subsequence, a row at a time."""
    row = [0] * (len(other) + 1)
    for mine in one:
        diagonal = 0
        for index, theirs in enumerate(other, start=1):
            above = row[index]
            row[index] = diagonal + 1 if mine == theirs else max(above, row[index - 1])
            diagonal = above
    return row[-1]
