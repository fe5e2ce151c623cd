"""The report's section about thresholds: what each would give, as curves and as tables, for images and for pixels.

Draws the rows of `finetune.metrics.thresholds`; computes nothing but the row whose value is best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.inference.pages.charts import Points, Series, line_chart
from finetune.inference.pages.markup import as_number, bilingual, format_number

Rows = Sequence[dict[str, float | None]]

IMAGE_COLUMNS: dict[str, tuple[str, str]] = {
    "balanced_accuracy": ("平衡准确率", "balanced accuracy"),
    "f1": ("F1", "F1"),
    "precision": ("精确率", "precision"),
    "recall": ("召回率", "recall"),
    "false_alarm_rate": ("误报率", "false-alarm rate"),
    "accuracy": ("准确率", "accuracy"),
}
PIXEL_COLUMNS: dict[str, tuple[str, str]] = {
    "f1": ("像素 F1", "pixel F1"),
    "iou": ("IoU", "IoU"),
    "false_alarm_rate": ("真实图误报率", "false-alarm rate, authentic"),
    "false_positive_area": ("真实图误报面积", "false-positive area, authentic"),
}
_LESS_IS_BETTER = ("false_alarm_rate", "false_positive_area")


def thresholds_html(
    image_rows: Rows, pixel_rows: Rows, threshold: float, mask_threshold: float, beside: str = ""
) -> str:
    """Two charts and two tables; the rows nearest to the thresholds in use are marked.

    Args:
        image_rows, pixel_rows: see `image_table` and `PixelTable.rows`; one without any value is left out.
        beside: a further chart, before the two.
    """
    parts = (
        (("整图阈值", "Image threshold"), image_rows, IMAGE_COLUMNS, ("balanced_accuracy", "f1"), threshold),
        (("像素阈值", "Pixel threshold"), pixel_rows, PIXEL_COLUMNS, ("f1", "iou"), mask_threshold),
    )
    known = [part for part in parts if any(as_number(row[name]) is not None for row in part[1] for name in part[2])]
    if not known:
        return f'<div class="charts">{beside}</div>' if beside else ""
    charts = beside + "".join(threshold_chart(title, rows, columns) for title, rows, columns, _, _ in known)
    tables = "".join(threshold_table(title, rows, columns, used) for title, rows, columns, _, used in known)
    note = bilingual(
        "加粗：该列最佳；高亮：当前阈值。在同一批图像上挑选阈值并报告结果会过于乐观，请在验证集上选择。",
        "Bold: best of the column; shaded: the threshold in use. Choosing a threshold on the images that are then "
        "reported is optimistic: choose it on validation images.",
    )
    return f'<div class="charts">{charts}</div><p class="note">{note}</p><div class="tables">{tables}</div>'


def threshold_chart(
    title: tuple[str, str], rows: Rows, columns: dict[str, tuple[str, str]], marker: float | None = None
) -> str:
    """A chart with up to four columns of rows over their `threshold`; `marker` is the one in use."""
    lines = []
    for color, (name, (zh, en)) in zip(("c1", "c3", "c4", "c2"), columns.items(), strict=False):
        points: Points = [
            (float(row["threshold"] or 0.0), number) for row in rows if (number := as_number(row[name])) is not None
        ]
        if points:
            lines.append(Series(zh, en, color, points, has_markers=False, is_noisy=False))
    return line_chart(title, lines, x_label=("阈值", "threshold"), y_range=(0.0, 1.0), marker=marker)


def threshold_table(title: tuple[str, str], rows: Rows, columns: dict[str, tuple[str, str]], used: float) -> str:
    """The same as numbers; the best of each column in bold, the row nearest to the threshold `used` shaded."""
    best: dict[str, float] = {}
    for name in columns:
        values = [number for row in rows if (number := as_number(row[name])) is not None]
        if values:
            best[name] = min(values) if name in _LESS_IS_BETTER else max(values)
    nearest = min(range(len(rows)), key=lambda k: abs(float(rows[k]["threshold"] or 0.0) - used))
    head = "".join(f'<th scope="col">{bilingual(zh, en)}</th>' for zh, en in columns.values())
    body = "".join(
        f'<tr{_marked(index == nearest)}><th scope="row">{row["threshold"]:.2f}</th>'
        + "".join(_cell(row[name], best.get(name)) for name in columns)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return (
        f'<div class="scroll"><table class="metrics"><caption>{bilingual(*title)}</caption>'
        f'<thead><tr><th scope="col">{bilingual("阈值", "threshold")}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _marked(is_used: bool) -> str:
    return ' class="used"' if is_used else ""


def _cell(value: Any, best: float | None) -> str:
    css = ' class="best"' if best is not None and as_number(value) == best else ""
    return f"<td{css}>{format_number(value)}</td>"
