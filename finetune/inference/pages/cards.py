"""The sample cards of the report: four pictures, verdict against truth, generated text; and the buttons that filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.inference.pages.markup import DASH, as_number, bilingual, data_uri, esc, format_number
from finetune.inference.pages.table import by_operation_html
from finetune.inference.visualization import evidence_tiles, heat_map
from finetune.schema import is_kind_of

Outcome = Literal["tp", "tn", "fp", "fn", "unknown"]

TOTAL_IMAGE_BYTES = 6_000_000
"""All pictures of one report together stay below this, in characters of base64."""

_LARGEST_SIDE, _SMALLEST_SIDE = 320, 48
_QUALITY = 80

_OUTCOMES: dict[Outcome, tuple[str, str]] = {
    "tp": ("命中", "tampering found"),
    "tn": ("正确：真实", "correct: real"),
    "fp": ("误报", "false alarm"),
    "fn": ("漏检", "missed tampering"),
    "unknown": ("无标注", "no truth"),
}


@dataclass(frozen=True)
class ReportSample:
    """One evaluated image as the report shows it.

    Args:
        id: the record's id.
        image: RGB picture, PIL or (H, W, 3) uint8.
        true_mask: (H, W) bool or 0/1, or None where it is unknown.
        mask_scores: (H, W) in [0, 1], or None when no mask head ran.
        label_true: 0 real, 1 tampered, None unknown.
        label_pred: the verdict, 0 or 1; None where there is none.
        score: probability that the image is tampered, in [0, 1]; None where there is no verdict.
        f1: pixel F1 at the threshold, None on authentic images.
        text: generated answer.
        parse_ok: whether `text` is the JSON asked for; None when no text was generated.
        operation: how the image was tampered, from the record's provenance; "" when unknown.
        told_operation: how the model says it was, if it was; "" where it cannot tell.
    """

    id: str
    image: Image.Image | NDArray[np.uint8] = field(repr=False)
    true_mask: NDArray[np.generic] | None = field(repr=False)
    mask_scores: NDArray[np.generic] | None = field(repr=False)
    label_true: int | None
    label_pred: int | None
    score: float | None
    f1: float | None = None
    text: str = ""
    parse_ok: bool | None = None
    operation: str = ""
    told_operation: str = ""

    @property
    def outcome(self) -> Outcome:
        """Verdict against truth: tp, tn, fp, fn, or unknown where one of them is."""
        if self.label_true is None or self.label_pred is None:
            return "unknown"
        if self.label_true == 1:
            return "tp" if self.label_pred == 1 else "fn"
        return "fp" if self.label_pred == 1 else "tn"


def controls_html(samples: Sequence[ReportSample]) -> str:
    """Filter buttons with their counts and the sort menu; the page's script makes them work."""
    count = {outcome: sum(sample.outcome == outcome for sample in samples) for outcome in _OUTCOMES}
    buttons = [
        filter_button("all", "全部", "All", len(samples), is_pressed=True),
        filter_button("wrong", "判错", "Wrong verdicts", count["fp"] + count["fn"]),
        filter_button("fn", "漏检", "Missed tampering", count["fn"]),
        filter_button("fp", "误报", "False alarms", count["fp"]),
    ]
    for index, name in enumerate(operations(samples)):
        n = sum(sample.operation == name for sample in samples)
        buttons.append(filter_button(f"op{index}", name, name, n))
    orders = (
        ("index", "原顺序 original order"),
        ("score-down", "分数 ↓ score, high first"),
        ("score-up", "分数 ↑ score, low first"),
        ("f1-up", "F1 ↑ worst first"),
        ("f1-down", "F1 ↓ best first"),
    )
    return controls_bar(buttons, orders)


def controls_bar(buttons: Sequence[str], orders: Sequence[tuple[str, str]]) -> str:
    """The bar above the cards.

    Args:
        buttons: each a `filter_button`. orders: `KEY-up` or `KEY-down` of the cards' `data-KEY`, and what it is called.
    """
    options = "".join(f'<option value="{value}">{text}</option>' for value, text in orders)
    return (
        f'<div class="controls"><div class="filters" role="group" aria-label="filter">{"".join(buttons)}</div>'
        f'<label>{bilingual("排序", "Sort")} <select id="sort">{options}</select></label>'
        f'<output id="shown" aria-live="polite"></output></div>'
    )


def cards_html(samples: Sequence[ReportSample], mask_threshold: float) -> str:
    """All cards; pictures shrink with the number of samples to keep the file small."""
    budget = TOTAL_IMAGE_BYTES // max(1, len(samples))
    names = {name: index for index, name in enumerate(operations(samples))}
    return "".join(
        _card(sample, index, names.get(sample.operation), mask_threshold, budget)
        for index, sample in enumerate(samples)
    )


def operations(samples: Sequence[ReportSample]) -> list[str]:
    """The distinct operations in alphabetical order, without the empty one."""
    return sorted({sample.operation for sample in samples} - {""})


def operation_table(samples: Sequence[ReportSample]) -> str:
    """Per operation: how many of the samples shown, how many were found, their mean pixel F1, and of how many the model
    names the operation, where it does that. "" without operations."""
    rows = []
    tells = any(sample.told_operation for sample in samples)
    for name in operations(samples):
        chosen = [sample for sample in samples if sample.operation == name and sample.label_true == 1]
        if not chosen:
            continue
        found = sum(sample.label_pred == 1 for sample in chosen) / len(chosen)
        known = [f1 for sample in chosen if (f1 := as_number(sample.f1)) is not None]
        mean_f1 = float(np.mean(known)) if known else None
        cells = [_bar_cell(found), _bar_cell(mean_f1)]
        if tells:
            cells.append(_bar_cell(float(np.mean([is_kind_of(sample.told_operation, name) for sample in chosen]))))
        rows.append((name, len(chosen), cells))
    if not rows:
        return ""
    columns = [("检出率", "Detected"), ("平均像素 F1", "Mean pixel F1")]
    columns += [("操作判断正确率", "Operation told right")] if tells else []
    return by_operation_html(("按篡改方式（下列样本）", "By operation (samples below)"), columns, rows)


def _card(sample: ReportSample, index: int, op_index: int | None, threshold: float, budget: int) -> str:
    outcome = sample.outcome
    f1 = as_number(sample.f1)
    score = as_number(sample.score)
    data = (
        f'data-index="{index}" data-outcome="{outcome}" data-op="{"" if op_index is None else f"op{op_index}"}" '
        f'data-score="{-1 if score is None else round(score, 6)}" data-f1="{"" if f1 is None else round(f1, 6)}"'
    )
    state = "ok" if outcome in ("tp", "tn") else "unknown" if outcome == "unknown" else "bad"
    badge = f'<span class="badge {state}">{bilingual(*_OUTCOMES[outcome])}</span>'
    return (
        f'<article class="card {state}" {data}><header><h3>{esc(sample.id)}</h3>{badge}</header>'
        f'<div class="pictures">{_pictures(sample, threshold, budget)}</div>'
        f'<div class="facts">{_facts(sample, score, f1)}{_text_block(sample)}</div></article>'
    )


def _facts(sample: ReportSample, score: float | None, f1: float | None) -> str:
    width = 0.0 if score is None else 100 * min(1.0, max(0.0, score))
    meter = f'<span class="meter"><i style="width:{width:.1f}%"></i></span>'
    facts = [
        (bilingual("判定", "Verdict"), _label(sample.label_pred)),
        (bilingual("真值", "Truth"), _label(sample.label_true)),
        (bilingual("篡改分数", "Score"), f"{format_number(score)} {meter}"),
        (bilingual("像素 F1", "Pixel F1"), format_number(f1)),
        (bilingual("操作", "Operation"), esc(sample.operation or DASH)),
    ]
    if sample.told_operation:
        told = sample.told_operation if sample.label_pred == 1 else DASH
        facts.append((bilingual("模型所说的操作", "Operation, as told"), esc(told)))
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in facts)}</dl>"


def _text_block(sample: ReportSample) -> str:
    if not sample.text:
        return ""
    if sample.parse_ok is None:
        mark = ""
    elif sample.parse_ok:
        mark = f'<span class="badge ok">{bilingual("可解析", "parsed")}</span>'
    else:
        mark = f'<span class="badge bad">{bilingual("无法解析", "not parsable")}</span>'
    heading = f"<span>{bilingual('模型回答', 'Answer')}</span>{mark}"
    return f'<div class="answer">{heading}<pre tabindex="0">{esc(sample.text)}</pre></div>'


def _pictures(sample: ReportSample, threshold: float, budget: int) -> str:
    """Four figures, at the largest size at which all together fit into `budget` characters."""
    side = _LARGEST_SIDE
    while True:
        tiles = _encoded(sample, threshold, side)
        used = sum(len(uri) for _, uri in tiles if uri)
        if used <= budget or side <= _SMALLEST_SIDE:
            return "".join(_picture(sample.id, label, uri) for label, uri in tiles)
        # Bytes go with the area; a little less than that, so that one more try is usually enough.
        side = max(_SMALLEST_SIDE, int(side * min(0.9, 0.95 * (budget / used) ** 0.5)))


def _encoded(sample: ReportSample, threshold: float, side: int) -> list[tuple[tuple[str, str], str | None]]:
    size_hw = (
        (sample.image.height, sample.image.width) if isinstance(sample.image, Image.Image) else sample.image.shape[:2]
    )
    has_scores = sample.mask_scores is not None
    scores = sample.mask_scores if sample.mask_scores is not None else np.zeros(size_hw, dtype=np.float32)
    try:
        shown = evidence_tiles(sample.image, sample.true_mask, scores, threshold=threshold, side=side)
    except ValueError as error:
        raise ValueError(f"record {sample.id!r}: {error}") from error
    truth = None
    if shown.true_mask is not None:
        truth = data_uri(Image.fromarray(shown.true_mask).convert("1"), None)
    heat = data_uri(Image.fromarray(shown.heat), _QUALITY) if has_scores else None
    overlay = data_uri(Image.fromarray(shown.overlay), _QUALITY) if has_scores else None
    return [
        (("图像", "image"), data_uri(Image.fromarray(shown.image), _QUALITY)),
        (("真实掩膜", "true mask"), truth),
        (("预测热图", "heat map"), heat),
        (("叠加", "overlay"), overlay),
    ]


def _picture(record: str, label: tuple[str, str], uri: str | None) -> str:
    if uri is None:
        inside = f'<div class="missing">{bilingual("未知", "unknown")}</div>'
    else:
        alt = esc(f"{record}: {label[0]} {label[1]}")
        inside = f'<img src="{uri}" alt="{alt}" loading="lazy" decoding="async" tabindex="0" role="button">'
    return f"<figure>{inside}<figcaption>{bilingual(*label)}</figcaption></figure>"


def _label(label: int | None) -> str:
    names = {0: bilingual("真实", "real"), 1: bilingual("篡改", "tampered")}
    return DASH if label is None else f'<b class="label{label}">{names[1 if label else 0]}</b>'


def _bar_cell(value: float | None) -> str:
    if value is None:
        return f'<td class="none">{DASH}</td>'
    return f'<td>{value:.3f} <span class="meter"><i style="width:{100 * value:.0f}%"></i></span></td>'


def filter_button(value: str, zh: str, en: str, count: int, is_pressed: bool = False) -> str:
    """A button that shows the cards whose `data-outcome` or `data-op` is `value`, with their number."""
    pressed = "true" if is_pressed else "false"
    state = f'data-filter="{value}" aria-pressed="{pressed}"'
    return f'<button type="button" {state}>{bilingual(zh, en)} <b>{count}</b></button>'


def color_bar() -> str:
    """The heat map's colours from 0 to 1 as a data URI, 256×1 pixels."""
    return data_uri(Image.fromarray(heat_map(np.linspace(0, 1, 256, dtype=np.float32)[None, :])), None)
