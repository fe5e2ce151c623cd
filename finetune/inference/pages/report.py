"""The page about a run: facts, metrics beside the baselines, curves, and every sample to look at.

What the parts look like stands in `table`, `charts` and `cards`; here they are joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.inference.pages.cards import ReportSample, cards_html, color_bar, controls_html, operation_table
from finetune.inference.pages.charts import histogram, roc_chart, training_charts
from finetune.inference.pages.frame import page_html, section_html
from finetune.inference.pages.markup import as_number, bilingual
from finetune.inference.pages.table import (
    BASELINE_NAMES,
    format_table,
    group_intervals_html,
    operations_html,
    table_html,
    tiles_html,
)

__all__ = [
    "ReportSample",
    "ScoreSets",
    "Section",
    "format_table",
    "render_report",
]

ScoreSets = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Name (`model`, `ela`, `noise_variance`) to (labels (N,) 0/1, image scores (N,) in [0, 1])."""

Section = tuple[str, tuple[str, str], str]
"""Anchor, (Chinese, English) heading and HTML of a section."""


def render_report(
    *,
    title: str,
    metrics: Mapping[str, Any],
    samples: Sequence[ReportSample],
    history: Sequence[Mapping[str, Any]] = (),
    run: Mapping[str, Any] | None = None,
    score_sets: ScoreSets | None = None,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    more: Sequence[Section] = (),
) -> str:
    """The report as the text of one HTML file, to be written as UTF-8.

    Args:
        title: heading and window title.
        metrics: content of metrics.json: `image`, `localization`, `authentic`, `text`, `baselines`, `intervals`, `run`;
            whatever is missing, None or NaN shows as a dash.
        samples: the images to show, in their first order; pictures shrink with their number (all below 6 MB).
        history: `Trainer.state.log_history`.
        run: facts for the heading, added to `metrics["run"]`; nested dicts are written as `name value · …`.
        score_sets: labels and scores of *all* evaluated images for histogram and ROC; by default those of `samples`.
        threshold: decision threshold of the image score.
        mask_threshold: decision threshold of a pixel.
        more: further sections, between the scores and the training.
    """
    facts = {**_as_mapping(metrics.get("run")), **(run or {})}
    scored = score_sets or {"model": _scores_of(samples)}
    sections = (
        section_html("metrics", ("结果", "Results"), _results_html(metrics)),
        section_html("scores", ("分数", "Scores"), _score_charts(scored, threshold)),
        *(section_html(*section) for section in more),
        section_html("training", ("训练过程", "Training"), f'<div class="charts">{training_charts(history)}</div>'),
        section_html("samples", ("样本", "Samples"), _samples_html(samples, mask_threshold, metrics)),
    )
    links = (
        ("metrics", "结果", "Results"),
        ("scores", "分数", "Scores"),
        *((anchor, *names) for anchor, names, _ in more),
        ("training", "训练", "Training"),
        ("samples", "样本", "Samples"),
    )
    return page_html(title, links, facts, "".join(sections))


def _results_html(metrics: Mapping[str, Any]) -> str:
    tables = tiles_html(metrics) + table_html(metrics)
    return tables + _reading_note() + group_intervals_html(metrics) + operations_html(metrics)


def _reading_note() -> str:
    zh = "加粗为该行最佳；↑ 越大越好，↓ 越小越好。右侧：实心点为本模型及其区间，空心点为基线。"
    en = (
        "Bold: best of the row; ↑ more is better, ↓ less is better. "
        "Right: the filled dot is this model with its interval, hollow dots are the baselines."
    )
    return f'<p class="note">{bilingual(zh, en)}</p>'


def _score_charts(scored: ScoreSets, threshold: float) -> str:
    names = {"model": ("本模型", "this model"), **BASELINE_NAMES}
    charts = ""
    if "model" in scored and len(scored["model"][0]):
        labels, scores = scored["model"]
        charts += histogram(labels, scores, threshold)
    charts += roc_chart(scored, names)
    return f'<div class="charts">{charts}</div>'


def _scores_of(samples: Sequence[ReportSample]) -> tuple[list[int], list[float]]:
    known = [
        (sample.label_true, score)
        for sample in samples
        if sample.label_true is not None and (score := as_number(sample.score)) is not None
    ]
    return [label for label, _ in known], [score for _, score in known]


def _samples_html(samples: Sequence[ReportSample], mask_threshold: float, metrics: Mapping[str, Any]) -> str:
    if not samples:
        return ""
    shown_at = f"{mask_threshold:g}"
    legend = (
        f'<p class="note legend">{bilingual("热图", "Heat map")} 0 <img src="{color_bar()}" alt="0…1" class="scale"> 1'
        f'<span class="swatch pred"></span>{bilingual(f"预测 ≥ {shown_at}", f"predicted ≥ {shown_at}")}'
        f'<span class="swatch true"></span>{bilingual("真实轮廓", "true outline")}</p>'
    )
    cards = f'<div id="cards">{cards_html(samples, mask_threshold)}</div>'
    nothing = f'<p class="empty" id="none" hidden>{bilingual("没有符合条件的样本", "No sample matches")}</p>'
    by_operation = "" if metrics.get("operations") else operation_table(samples)  # of a few images, where all are known
    return by_operation + controls_html(samples) + legend + cards + nothing


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
