"""Inline SVG charts of the report: training curves, score histogram, ROC. No JavaScript, colours from the page's CSS.

Curves are drawn from the numbers given; the area under the ROC is not computed here, metrics.json has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.inference.pages.markup import as_number, bilingual, esc, format_number, svg_bilingual
from finetune.metrics.thresholds import precision_recall_curve, roc_curve

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34
MAX_POINTS = 300

TERM_NAMES: dict[str, tuple[str, str]] = {
    "loss": ("总损失", "Total loss"),
    "loss_text": ("文本交叉熵", "Text cross-entropy"),
    "loss_dice": ("掩膜 Dice 损失", "Mask Dice loss"),
    "loss_boundary": ("掩膜边界损失", "Mask boundary loss"),
    "loss_bce": ("掩膜 BCE", "Mask BCE"),
    "loss_focal": ("分类 focal 损失", "Classification focal loss"),
    "loss_authentic": ("真实图像素损失", "Authentic-pixel loss"),
    "loss_contrast_region": ("区域对比损失 InfoNCE", "Region contrast (InfoNCE)"),
    "loss_operation": ("操作种类交叉熵", "Kind of edit, cross-entropy"),
    "loss_contrast_image": ("整图对比损失 InfoNCE", "Image contrast (InfoNCE)"),
    "learning_rate": ("学习率", "Learning rate"),
    "grad_norm": ("梯度范数", "Gradient norm"),
}

_NOT_CURVES = ("epoch", "step", "total_flos", "num_input_tokens_seen")
_TIMING = ("_runtime", "_per_second", "_time", "_model_preparation_time")


@dataclass(frozen=True)
class Series:
    """One line of a chart: its name, CSS class of its colour (`c1`…`c4`), finite points by x, whether to smooth."""

    zh: str
    en: str
    color: str
    points: Points
    has_markers: bool = False
    is_noisy: bool = True


def training_charts(history: Sequence[Mapping[str, Any]]) -> str:
    """One chart per logged quantity over the steps, training and evaluation together: total loss, terms, metrics, rate.

    Args:
        history: `Trainer.state.log_history`: dicts with `step` and numbers; `eval_` marks evaluation.

    Returns:
        HTML of <figure>s; "" when nothing was logged.
    """
    curves = _curves(history)
    losses = sorted({key.removeprefix("eval_") for key in curves if key.removeprefix("eval_").startswith("loss")})
    figures = []
    for key in losses:
        train = Series("训练", "train", "c1", curves.get(key, []))
        evaluated = Series("验证", "eval", "c2", curves.get(f"eval_{key}", []), has_markers=True)
        figures.append(line_chart(_name(key), [line for line in (train, evaluated) if line.points]))
    rest = [key for key in curves if key.removeprefix("eval_") not in losses]
    evaluated_at = {step for key in rest if key.startswith("eval_") for step, _ in curves[key]}
    if len(evaluated_at) == 1:  # a single evaluation, at the end of the schedule, is no curve
        once = sorted(key for key in rest if key.startswith("eval_"))
        figures.append(_values_figure(int(evaluated_at.pop()), {key: curves[key][0][1] for key in once}))
        rest = [key for key in rest if key not in once]
    for key in sorted(rest, key=lambda key: (not key.startswith("eval_"), key)):
        is_eval = key.startswith("eval_")
        series = Series(*_name(key), "c2" if is_eval else "c3", curves[key], is_eval, key != "learning_rate")
        in_unit = is_eval and all(0 <= y <= 1 for _, y in curves[key])
        figures.append(line_chart(_name(key), [series], y_range=(0.0, 1.0) if in_unit else None, has_legend=False))
    return "".join(figures)


def _values_figure(step: int, values: Mapping[str, float]) -> str:
    """A <figure> with a table of what was evaluated once, at this step."""
    rows = "".join(
        f'<tr><th scope="row">{bilingual(*_name(key))}</th><td>{format_number(value)}</td></tr>'
        for key, value in values.items()
    )
    title = bilingual(f"验证，只在第 {step} 步评测一次", f"Validation, evaluated once, at step {step}")
    return (
        f'<figure class="chart"><figcaption><b>{title}</b></figcaption><table class="metrics">{rows}</table></figure>'
    )


def line_chart(
    title: tuple[str, str],
    series: Sequence[Series],
    *,
    x_label: tuple[str, str] = ("步", "step"),
    y_range: tuple[float, float] | None = None,
    has_legend: bool = True,
    marker: float | None = None,
) -> str:
    """A <figure> with lines over a common axis. Long curves get a running mean over a pale raw line.

    Args:
        marker: x of a vertical line, such as a threshold.
    """
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    axes = _Axes(_padded(min(xs), max(xs), 0.0), y_range or _padded(min(ys), max(ys), 0.06))
    body = [axes.grid(x_label)]
    for line in series:
        shown = thin(line.points)
        is_long = len(shown) > 40 and line.is_noisy and not line.has_markers
        body.append(axes.path(shown, f"line {line.color}{' raw' if is_long else ''}"))
        if is_long:
            body.append(axes.path(_running_mean(shown), f"line {line.color}"))
        if line.has_markers:
            body += [axes.dot(x, y, line.color) for x, y in shown]
    if marker is not None:
        body.append(axes.vertical(marker))
    return _figure(title, body, series if has_legend else (), _spoken(title, series))


def histogram(
    labels: Sequence[int],
    scores: Sequence[float],
    threshold: float = 0.5,
    bins: int = 20,
    names: tuple[tuple[str, str], tuple[str, str]] = (("真实", "real"), ("篡改", "tampered")),
) -> str:
    """Scores of real and tampered images, each as a share of its class, with the decision threshold.

    Args:
        labels: (N,) 0 real, 1 tampered.
        scores: (N,) in [0, 1].
        names: of the classes 0 and 1, in Chinese and English.
    """
    truth, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    edges = np.linspace(0, 1, bins + 1)
    shares = []
    for label in (0, 1):
        counts, _ = np.histogram(values[truth == label], bins=edges)
        shares.append(counts / max(1, counts.sum()))
    top = max(0.05, float(max(shares[0].max(), shares[1].max()))) * 1.08
    axes = _Axes((0.0, 1.0), (0.0, top))
    body = [axes.grid(("分数", "score"))]
    half = 0.45 / bins
    for share, color, shift in ((shares[0], "c4", 0.05 / bins), (shares[1], "c2", 0.05 / bins + half)):
        body += [axes.bar(edges[i] + shift, half, float(share[i]), color) for i in range(bins) if share[i] > 0]
    body.append(axes.vertical(threshold))
    title = ("分数分布（各类占比）", "Scores, share of each class")
    legend = [
        Series(f"{zh} {int((truth == label).sum())}", f"{en} {int((truth == label).sum())}", color, [])
        for label, (zh, en), color in zip((0, 1), names, ("c4", "c2"), strict=True)
    ]
    return _figure(title, body, legend, f"{title[1]}; threshold {threshold:g}")


def roc_chart(sets: Mapping[str, tuple[Sequence[int], Sequence[float]]], names: Mapping[str, tuple[str, str]]) -> str:
    """ROC curves of the model and, where given, of the baselines.

    Args:
        sets: name to (labels (N,), scores (N,)); one without both classes is left out.
        names: name to (Chinese, English) legend.
    """
    colors = ("c1", "c3", "c4", "c2")
    lines = []
    for index, (name, (labels, scores)) in enumerate(sets.items()):
        points = roc_points(labels, scores)
        if points:
            lines.append(Series(*names.get(name, (name, name)), colors[index % len(colors)], points))
    if not lines:
        return ""
    axes = _Axes((0.0, 1.0), (0.0, 1.0))
    body = [axes.grid(("误报率", "false-alarm rate")), axes.path([(0, 0), (1, 1)], "line chance")]
    body += [axes.path(line.points, f"line {line.color}") for line in reversed(lines)]
    return _figure(("ROC 曲线", "ROC curve"), body, lines, "ROC curve: detection rate over false-alarm rate")


def roc_points(labels: Sequence[int], scores: Sequence[float]) -> Points:
    """(false-alarm rate, detection rate) at every distinct score, (0, 0) to (1, 1); [] where a class is missing."""
    return [(false, hit) for _, false, hit in roc_curve(scores, labels)]


def precision_recall_chart(labels: Sequence[int], scores: Sequence[float]) -> str:
    """Precision over recall of the model, with the share of tampered images, which guessing reaches; "" with one class.

    Args:
        labels: (N,) 0 real, 1 tampered.
        scores: (N,) in [0, 1].
    """
    points = [(recall, precision) for _, recall, precision in precision_recall_curve(scores, labels)]
    if not points:
        return ""
    share = float(np.mean(np.asarray(labels) == 1))
    axes = _Axes((0.0, 1.0), (0.0, 1.0))
    body = [axes.grid(("召回率", "recall")), axes.path([(0, share), (1, share)], "line chance")]
    body.append(axes.path([(0.0, points[0][1]), *points], "line c1"))
    legend = [Series("本模型", "this model", "c1", points)]
    return _figure(("精确率-召回率曲线", "Precision-recall curve"), body, legend, "precision over recall")


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most about `limit` points: means of consecutive runs, so that no spike is picked by chance."""
    if len(points) <= limit:
        return points
    groups = np.array_split(np.asarray(points, dtype=np.float64), limit)
    return [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]


@dataclass(frozen=True)
class _Axes:
    """Maps data to the plotting area of the WIDTH × HEIGHT viewBox."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: tuple[str, str]) -> str:
        parts = []
        for tick in ticks(*self.y_range):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(tick)}</text>')
        for tick in ticks(*self.x_range):
            x = self.x(tick)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_tick(tick)}</text>')
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{svg_bilingual(*x_label)}</text>')
        return "".join(parts)

    def path(self, points: Points, css: str) -> str:
        steps = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{css}" points="{steps}"/>'

    def dot(self, x: float, y: float, color: str) -> str:
        title = f"<title>{_tick(x)}: {y:.4g}</title>"
        return f'<circle class="dot {color}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3">{title}</circle>'

    def bar(self, x: float, width: float, value: float, color: str) -> str:
        left, right, top = self.x(x), self.x(x + width), self.y(value)
        shape = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{HEIGHT - BOTTOM - top:.1f}"'
        return f'<rect class="bar {color}" {shape}><title>{value:.0%}</title></rect>'

    def vertical(self, value: float) -> str:
        x = self.x(value)
        return f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Every logged number over `step`, without counters, timings and the summary of the end of training."""
    curves: dict[str, Points] = {}
    for index, entry in enumerate(history):
        step = as_number(entry.get("step"))
        if "train_runtime" in entry:
            continue
        for key, value in entry.items():
            number = as_number(value)
            if number is None or key in _NOT_CURVES or key.endswith(_TIMING):
                continue
            curves.setdefault(key, []).append((float(index) if step is None else step, number))
    # A resumed run may log a step twice: the later value counts.
    return {key: sorted(dict(points).items()) for key, points in curves.items()}


def _name(key: str) -> tuple[str, str]:
    if key in TERM_NAMES:
        return TERM_NAMES[key]
    if key.startswith("eval_"):
        plain = key.removeprefix("eval_").replace("_", " ")
        return f"验证 {plain}", f"Eval {plain}"
    return key, key


def _figure(title: tuple[str, str], body: Sequence[str], legend: Sequence[Series], spoken: str) -> str:
    keys = "".join(f'<span class="key {line.color}">{bilingual(line.zh, line.en)}</span>' for line in legend)
    return (
        f'<figure class="chart"><figcaption><b>{bilingual(*title)}</b>{keys}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(spoken)}">{"".join(body)}</svg></figure>'
    )


def _spoken(title: tuple[str, str], series: Sequence[Series]) -> str:
    ends = ", ".join(f"{line.en} {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in series if line.points)
    return f"{title[1]}: {ends}"


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = abs(high) * 0.5 or 0.5
        return low - margin, high + margin
    extra = (high - low) * share
    return low - extra, high + extra


def _running_mean(points: Points) -> Points:
    values: NDArray[np.float64] = np.asarray([y for _, y in points])
    radius = max(2, len(points) // 30)
    smooth = [float(values[max(0, i - radius) : i + radius + 1].mean()) for i in range(len(points))]
    return [(x, y) for (x, _), y in zip(points, smooth, strict=True)]


def _tick(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"
