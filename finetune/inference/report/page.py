"""One self-contained HTML file about a run: facts, metrics beside the baselines, curves, and every sample to look at.

No file beside it, no network, no library: pictures are data URIs, charts inline SVG. Chinese and English. What the
parts look like stands in `table`, `charts`, `cards` and `assets`; here they are joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.inference.report.assets import CSS, SCRIPT
from finetune.inference.report.cards import ReportSample, cards_html, color_bar, controls_html, operation_table
from finetune.inference.report.charts import histogram, roc_chart, training_charts
from finetune.inference.report.markup import DASH, as_number, bilingual, esc, format_number, format_seconds
from finetune.inference.report.table import BASELINE_NAMES, format_table, table_html, tiles_html

__all__ = [
    "ReportSample",
    "ScoreSets",
    "Section",
    "format_table",
    "page_html",
    "render_report",
    "section_html",
]

ScoreSets = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Name (`model`, `ela`, `noise_variance`) to (labels (N,) 0/1, image scores (N,) in [0, 1])."""

Section = tuple[str, tuple[str, str], str]
"""Anchor, (Chinese, English) heading and HTML of a section."""

_FACTS: dict[str, tuple[str, str]] = {
    "model": ("模型", "Model"),
    "adapter": ("适配器", "Adapter"),
    "data": ("数据", "Data"),
    "validation": ("验证数据", "Validation data"),
    "config": ("配置", "Configuration"),
    "config_hash": ("配置哈希", "Config hash"),
    "seed": ("随机种子", "Seed"),
    "commit": ("代码提交", "Commit"),
    "date": ("日期", "Date"),
    "device": ("设备", "Device"),
    "seconds": ("用时", "Time"),
    "versions": ("版本", "Versions"),
}

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


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
        section_html("metrics", ("结果", "Results"), tiles_html(metrics) + table_html(metrics) + _reading_note()),
        section_html("scores", ("分数", "Scores"), _score_charts(scored, threshold)),
        *(section_html(*section) for section in more),
        section_html("training", ("训练过程", "Training"), f'<div class="charts">{training_charts(history)}</div>'),
        section_html("samples", ("样本", "Samples"), _samples_html(samples, mask_threshold)),
    )
    links = (
        ("metrics", "结果", "Results"),
        ("scores", "分数", "Scores"),
        *((anchor, *names) for anchor, names, _ in more),
        ("training", "训练", "Training"),
        ("samples", "样本", "Samples"),
    )
    return page_html(title, links, facts, "".join(sections))


def page_html(
    title: str, links: Sequence[tuple[str, str, str]], facts: Mapping[str, Any], body: str, css: str = ""
) -> str:
    """A whole page of the report's style: heading, links, facts of the run, and what stands below them.

    Args:
        links: anchor, Chinese and English name of the sections.
        facts: name to value; see `_FACTS` for those that have names in both languages.
        body: HTML of the sections.
        css: rules put behind the report's own.
    """
    return (
        '<!DOCTYPE html>\n<html lang="zh">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{esc(title)}</title>\n<style>{CSS}{css}</style>\n'
        f"</head>\n<body>\n{_header(title, facts, links)}\n<main>\n{body}</main>\n"
        f'<dialog id="zoom"><img alt=""><p></p></dialog>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _header(title: str, facts: Mapping[str, Any], links: Sequence[tuple[str, str, str]]) -> str:
    nav = "".join(f'<a href="#{anchor}">{bilingual(zh, en)}</a>' for anchor, zh, en in links)
    ordered = [key for key in _FACTS if key in facts] + [key for key in facts if key not in _FACTS]
    rows = "".join(
        f"<div{_wide(facts[key])}><dt>{bilingual(*_FACTS.get(key, (key, key)))}</dt>"
        f"<dd>{_fact(key, facts[key])}</dd></div>"
        for key in ordered
    )
    return (
        f'<header class="page"><div class="bar"><h1>{esc(title)}</h1><nav>{nav}</nav>'
        '<div class="languages" role="group" aria-label="language">'
        '<button type="button" data-lang="zh" lang="zh">中文</button>'
        '<button type="button" data-lang="en" lang="en">EN</button></div></div>'
        f'<dl class="run">{rows}</dl></header>'
    )


def _fact(key: str, value: Any) -> str:
    number = as_number(value)
    if value is None or (isinstance(value, float) and number is None):
        return DASH
    if key == "seconds" and number is not None:
        return esc(format_seconds(number))
    if isinstance(value, Mapping):
        return " · ".join(f"{esc(name)} <b>{esc(_plain(part))}</b>" for name, part in value.items()) or DASH
    if isinstance(value, list | tuple):
        return esc(", ".join(_plain(part) for part in value)) or DASH
    return esc(_plain(value))


def _plain(value: Any) -> str:
    if value is None:
        return DASH
    return format_number(value) if isinstance(value, float) else str(value)


def _wide(value: Any) -> str:
    return ' class="wide"' if isinstance(value, Mapping) or len(str(value)) > 48 else ""


def section_html(anchor: str, title: tuple[str, str], body: str) -> str:
    """A section with its heading; an empty body says that nothing was recorded."""
    is_empty = body in ("", '<div class="charts"></div>')
    content = f'<p class="empty">{bilingual("没有记录", "Nothing recorded")}</p>' if is_empty else body
    return f'<section id="{anchor}"><h2>{bilingual(*title)}</h2>{content}</section>\n'


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
        (sample.label_true, float(sample.score))
        for sample in samples
        if sample.label_true is not None and as_number(sample.score) is not None
    ]
    return [label for label, _ in known], [score for _, score in known]


def _samples_html(samples: Sequence[ReportSample], mask_threshold: float) -> str:
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
    return operation_table(samples) + controls_html(samples) + legend + cards + nothing


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
