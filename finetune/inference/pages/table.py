"""The metrics of one run beside the baselines: as a console table and as the table of the HTML report.

Reads the structure of `metrics.json`; computes nothing. A row that no column has a value for is left out of the console
table and shown with dashes in the report only when it is a known metric.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.inference.pages.markup import DASH, as_number, bilingual, esc, format_number

Direction = Literal["up", "down", "count"]


@dataclass(frozen=True)
class MetricRow:
    """One row: where the value stands in metrics.json, its names, and whether more or less is better."""

    group: str
    key: str
    zh: str
    en: str
    direction: Direction

    @property
    def path(self) -> str:
        """`group.key`, as the keys of `intervals` are written."""
        return f"{self.group}.{self.key}"


GROUPS: dict[str, tuple[str, str]] = {
    "image": ("整图判别", "Image verdict"),
    "image_uncalibrated": ("整图判别，校准之前的分数", "Image verdict, scores before calibration"),
    "localization": ("篡改定位（仅篡改图）", "Localisation (tampered images)"),
    "authentic": ("真实图像", "Authentic images"),
    "text": ("文本", "Text"),
}

ROWS: tuple[MetricRow, ...] = (
    MetricRow("image", "auroc", "AUROC", "AUROC", "up"),
    MetricRow("image", "average_precision", "平均精度", "Average precision", "up"),
    MetricRow("image", "balanced_accuracy", "平衡准确率", "Balanced accuracy", "up"),
    MetricRow("image", "accuracy", "准确率", "Accuracy", "up"),
    MetricRow("image", "f1", "F1", "F1", "up"),
    MetricRow("image", "ece", "校准误差 ECE", "Calibration error", "down"),
    MetricRow("image", "recall_real", "真实图召回", "Recall, authentic", "up"),
    MetricRow("image", "recall_fake", "篡改图召回", "Recall, tampered", "up"),
    MetricRow("image", "n_real", "真实图数量", "Authentic images", "count"),
    MetricRow("image", "n_fake", "篡改图数量", "Tampered images", "count"),
    MetricRow("image", "n_without_verdict", "无判定图像", "Images without a verdict", "count"),
    MetricRow("image_uncalibrated", "auroc", "AUROC", "AUROC", "up"),
    MetricRow("image_uncalibrated", "average_precision", "平均精度", "Average precision", "up"),
    MetricRow("image_uncalibrated", "balanced_accuracy", "平衡准确率", "Balanced accuracy", "up"),
    MetricRow("image_uncalibrated", "accuracy", "准确率", "Accuracy", "up"),
    MetricRow("image_uncalibrated", "ece", "校准误差 ECE", "Calibration error", "down"),
    MetricRow("localization", "f1", "像素 F1", "Pixel F1", "up"),
    MetricRow("localization", "iou", "IoU", "IoU", "up"),
    MetricRow("localization", "dice", "Dice", "Dice", "up"),
    MetricRow("localization", "auc", "像素 AUC", "Pixel AUC", "up"),
    MetricRow("localization", "f1_best_threshold", "最佳阈值 F1", "F1 at best threshold", "up"),
    MetricRow("localization", "n", "图像数量", "Images", "count"),
    MetricRow("authentic", "false_alarm_rate", "误报率（任一像素）", "False-alarm rate (any pixel)", "down"),
    MetricRow("authentic", "false_positive_area", "误报面积", "False-positive area", "down"),
    MetricRow("authentic", "n", "图像数量", "Images", "count"),
    MetricRow("text", "parse_rate", "JSON 可解析率", "Parse rate", "up"),
    MetricRow("text", "label_agreement", "文本与判定一致率", "Text agrees with verdict", "up"),
    MetricRow("text", "label_accuracy", "文本结论准确率", "Text agrees with truth", "up"),
    MetricRow("text", "polygon_iou", "文字区域 IoU", "IoU of written regions", "up"),
    MetricRow("text", "n_distinct", "不同的回答", "Different answers", "count"),
    MetricRow("text", "n", "回答数量", "Answers", "count"),
    MetricRow("text", "n_parsed", "可解析数量", "Answers parsed", "count"),
)

ONLY_WHERE_PRESENT = frozenset(
    {"image.n_without_verdict", *(row.path for row in ROWS if row.group == "image_uncalibrated")}
)
"""Rows of what most runs do not have: no row of dashes stands for them."""

BASELINE_NAMES: dict[str, tuple[str, str]] = {
    "ela": ("误差水平 ELA", "error levels (ELA)"),
    "noise_variance": ("局部噪声", "noise variance"),
}


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """The known rows, then every other number that stands in one of the groups, under its own key."""
    rows = [row for row in ROWS if row.path not in ONLY_WHERE_PRESENT or as_number(value_of(metrics, row)) is not None]
    known = {row.path for row in rows}
    for group in GROUPS:
        for key, value in _mapping(metrics.get(group)).items():
            if f"{group}.{key}" not in known and as_number(value) is not None:
                rows.append(MetricRow(group, key, key, key, "count" if isinstance(value, int) else "up"))
    order = list(GROUPS)
    return sorted(rows, key=lambda row: order.index(row.group))


def shown_groups(metrics: Mapping[str, Any]) -> list[str]:
    """All groups with rows but those a run leaves out on purpose: it has image metrics, and no such group."""
    with_rows = {row.group for row in metric_rows(metrics)}
    return [group for group in GROUPS if group in with_rows and (group in metrics or "image" not in metrics)]


def baseline_keys(metrics: Mapping[str, Any]) -> list[str]:
    """The baselines of metrics.json: the known ones first, in fixed order."""
    found = _mapping(metrics.get("baselines"))
    return [name for name in BASELINE_NAMES if name in found] + [name for name in found if name not in BASELINE_NAMES]


def baseline_label(name: str) -> tuple[str, str]:
    """Chinese and English name of a baseline."""
    return BASELINE_NAMES.get(name, (name, name))


def value_of(metrics: Mapping[str, Any], row: MetricRow, baseline: str | None = None) -> Any:
    """The row's value for the model, or for one baseline; None where it is missing."""
    source = metrics if baseline is None else _mapping(_mapping(metrics.get("baselines")).get(baseline))
    return _mapping(source.get(row.group)).get(row.key)


def interval_of(metrics: Mapping[str, Any], path: str) -> tuple[float, float] | None:
    """Bootstrap interval of the model's value: `intervals["image.auroc"]` -> (low, high), None where it is missing."""
    ends = _mapping(metrics.get("intervals")).get(path)
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = as_number(ends[0]), as_number(ends[1])
    return None if low is None or high is None else (low, high)


def operations_html(metrics: Mapping[str, Any]) -> str:
    """Each tampering operation over *all* evaluated images, as `operations` of metrics.json has it; "" without any."""
    found = {name: _mapping(row) for name, row in _mapping(metrics.get("operations")).items()}
    if not found:
        return ""
    columns = [("auroc", "AUROC", "AUROC"), ("recall", "检出率", "Detected"), ("f1", "像素 F1", "Pixel F1")]
    if any("recognized" in row for row in found.values()):
        columns.append(("recognized", "操作判断正确率", "Operation told right"))
    rows = [
        (name, row.get("n", DASH), [f"<td>{format_number(as_number(row.get(key)))}</td>" for key, _, _ in columns])
        for name, row in found.items()
    ]
    names = [(zh, en) for _, zh, en in columns]
    return by_operation_html(
        ("按篡改方式（全部图像）", "By operation (all images)"), names, rows, 'style="margin-top:14px"'
    )


def by_operation_html(
    caption: tuple[str, str],
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Any, Sequence[str]]],
    attributes: str = "",
) -> str:
    """The table of tampering operations.

    Args:
        caption, columns: Chinese and English.
        rows: of each operation its name, its number of images and the HTML cells below `columns`.
    """
    names = [("操作", "Operation"), ("张数", "Images"), *columns]
    head = "".join(f'<th scope="col">{bilingual(zh, en)}</th>' for zh, en in names)
    body = "".join(
        f'<tr><th scope="row">{esc(name)}</th><td>{esc(count)}</td>{"".join(cells)}</tr>' for name, count, cells in rows
    )
    return (
        f'<div class="scroll ops"{attributes and " " + attributes}><table class="metrics">'
        f"<caption>{bilingual(*caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def group_intervals_html(metrics: Mapping[str, Any]) -> str:
    """What another choice of photographs might give, where groups are known; "" elsewhere."""
    wide = {"intervals": metrics.get("intervals_over_groups")}
    found = [
        f"{name} {format_number(ends[0])} – {format_number(ends[1])}"
        for name, path in (("AUROC", "image.auroc"), ("F1", "localization.f1"))
        if (ends := interval_of(wide, path)) is not None
    ]
    if not found:
        return ""
    zh = f"上表区间按图像抽样；改为按整组（照片、场景）抽样：{'，'.join(found)}。"
    en = f"Intervals above draw images; drawing whole groups (photographs, scenes): {', '.join(found)}."
    return f'<p class="note">{bilingual(zh, en)}</p>'


ABSENT: dict[str, tuple[str, str]] = {"no mask head": ("模型没有掩膜头，未评测", "no mask head, not measured")}
"""What `absent` in a group of metrics.json says, in both languages."""


def absent_text(metrics: Mapping[str, Any], group: str) -> tuple[str, str] | None:
    """Why the model has no value in a group, Chinese and English; None where it has."""
    reason = _mapping(metrics.get(group)).get("absent")
    return None if reason is None else ABSENT.get(str(reason), (str(reason), str(reason)))


def format_table(metrics: Mapping[str, Any]) -> str:
    """Plain-text table: metric, model with its 95 % interval, and both baselines, aligned also with Chinese in it.

    Args:
        metrics: the content of metrics.json; anything may be missing.

    Returns:
        Lines without a trailing newline. An arrow says which way is better, `*` marks the best of a row.
    """
    names = baseline_keys(metrics)
    head = ["", "模型 model", "95% 区间 CI", *(_short_baseline(name) for name in names)]
    lines: list[list[str] | str] = []
    for group, (zh, en) in GROUPS.items():
        rows = []
        for row in (row for row in metric_rows(metrics) if row.group == group):
            values = [value_of(metrics, row, name) for name in (None, *names)]
            if all(as_number(value) is None for value in values):
                continue
            if absent_text(metrics, group) is not None and not names:
                continue  # a count of 0 images
            interval = interval_of(metrics, row.path)
            best = best_columns(row, values)
            cells = [format_number(value) + ("*" if i in best else " ") for i, value in enumerate(values)]
            ends = DASH if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"
            name = row.en if row.zh == row.en else f"{row.en} {row.zh}"
            rows.append([f"  {name} {_ARROWS[row.direction]}".rstrip(), cells[0], ends, *cells[1:]])
        absent = absent_text(metrics, group)
        if absent is not None:
            lines.append(f"{zh} {en}: {absent[1]} {absent[0]}")
            lines += rows
        elif rows:
            lines += [f"{zh} {en}", *rows]
    table = [head, *(line for line in lines if isinstance(line, list))]
    widths = [max(display_width(line[i]) for line in table) for i in range(len(head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [_aligned(head, widths), rule]
    text += [line if isinstance(line, str) else _aligned(line, widths) for line in lines]
    return "\n".join([*text, rule])


def best_columns(row: MetricRow, values: list[Any]) -> set[int]:
    """Indices of the best values of a row (several when tied); empty for counts and where fewer than two are known."""
    known = {i: number for i, value in enumerate(values) if (number := as_number(value)) is not None}
    if row.direction == "count" or len(known) < 2:
        return set()
    best = max(known.values()) if row.direction == "up" else min(known.values())
    return {i for i, number in known.items() if number == best}


def display_width(text: str) -> int:
    """Columns a text takes in a terminal: two for each full-width character, none for combining marks."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def table_html(metrics: Mapping[str, Any]) -> str:
    """The same table for the report, with a bar for every value in [0, 1] and a dot-and-interval drawing per row."""
    names = baseline_keys(metrics)
    labels = "".join(f'<th scope="col">{bilingual(*baseline_label(name))}</th>' for name in names)
    head = (
        f'<tr><th scope="col">{bilingual("指标", "Metric")}</th>'
        f'<th scope="col">{bilingual("本模型", "This model")}</th>'
        f'<th scope="col">{bilingual("95% 自助区间", "95% bootstrap")}</th>{labels}'
        f'<th scope="col" class="plot">0<span class="right">1</span></th></tr>'
    )
    body = []
    columns = len(names) + 4
    rows = metric_rows(metrics)
    for group in shown_groups(metrics):
        zh, en = GROUPS[group]
        if (absent := absent_text(metrics, group)) is not None:
            zh, en = f"{zh}：{absent[0]}", f"{en}: {absent[1]}"
        body.append(f'<tr class="group"><th colspan="{columns}" scope="colgroup">{bilingual(zh, en)}</th></tr>')
        body += [_row_html(metrics, row, names) for row in rows if row.group == group]
    return (
        f'<div class="scroll"><table class="metrics"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def confusion_html(
    confusion: Mapping[str, Mapping[str, int]],
    answers: Sequence[str],
    caption: tuple[str, str],
    names: Mapping[str, tuple[str, str]],
) -> str:
    """A table of counts, truth down and answers across, with the agreeing ones marked.

    Args:
        confusion: truth -> answer -> count; a missing one is 0. answers: the columns.
        caption, names: Chinese and English; what `names` lacks is written as it is.
    """

    def name(text: str) -> str:
        return bilingual(*names[text]) if text in names else esc(text)

    def cell(truth: str, answer: str) -> str:
        hit = ' class="hit"' if truth == answer else ""
        return f"<td{hit}>{confusion[truth].get(answer, 0)}</td>"

    head = "".join(f'<th scope="col">{name(answer)}</th>' for answer in answers)
    rows = "".join(
        f'<tr><th scope="row">{name(truth)}</th>{"".join(cell(truth, answer) for answer in answers)}</tr>'
        for truth in confusion
    )
    return (
        '<div class="scroll ops" style="margin-top:14px"><table class="metrics confusion">'
        f'<caption>{bilingual(*caption)}</caption><thead><tr><th scope="col"></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def tiles_html(metrics: Mapping[str, Any]) -> str:
    """The up to four numbers one looks for first, large, each with its interval and the baselines' values."""
    by_path = {row.path: row for row in ROWS}
    shown = ("image.auroc", "localization.f1", "authentic.false_alarm_rate", "text.parse_rate")
    titles = {"image.auroc": ("整图 AUROC", "Image AUROC"), "text.parse_rate": ("文本可解析率", "Text parse rate")}
    tiles = []
    groups = shown_groups(metrics)
    for row in (by_path[path] for path in shown if by_path[path].group in groups):
        path = row.path
        zh, en = titles.get(path, (row.zh, row.en))
        interval = interval_of(metrics, path)
        absent = absent_text(metrics, row.group)
        notes = [] if absent is None else [bilingual(*absent)]
        notes += [] if interval is None else [f"95% {interval[0]:.3f} – {interval[1]:.3f}"]
        known = [(name, as_number(value_of(metrics, row, name))) for name in baseline_keys(metrics)]
        beside = " · ".join(f"{_short_html(name)} {value:.3f}" for name, value in known if value is not None)
        notes += [beside] if beside else []
        small = "".join(f"<small>{note}</small>" for note in notes)
        arrow = _ARROWS[row.direction]
        value = format_number(value_of(metrics, row))
        tiles.append(f'<div class="tile"><span>{bilingual(zh, en)} {arrow}</span><b>{esc(value)}</b>{small}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


_ARROWS: dict[Direction, str] = {"up": "↑", "down": "↓", "count": ""}


def _row_html(metrics: Mapping[str, Any], row: MetricRow, names: list[str]) -> str:
    values = [value_of(metrics, row, name) for name in (None, *names)]
    best = best_columns(row, values)
    interval = interval_of(metrics, row.path)
    cells = [_cell(value, i in best) for i, value in enumerate(values)]
    ends = DASH if interval is None else f"{interval[0]:.3f} – {interval[1]:.3f}"
    plot = "" if row.direction == "count" else _dot_plot(values, interval)
    name = f'<th scope="row">{bilingual(row.zh, row.en)} <i class="arrow">{_ARROWS[row.direction]}</i></th>'
    return f'<tr>{name}{cells[0]}<td class="ci">{ends}</td>{"".join(cells[1:])}<td class="plot">{plot}</td></tr>'


def _cell(value: Any, is_best: bool) -> str:
    text = format_number(value)
    if text == DASH:
        return f'<td class="none">{DASH}</td>'
    return f'<td class="best">{esc(text)}</td>' if is_best else f"<td>{esc(text)}</td>"


def _dot_plot(values: list[Any], interval: tuple[float, float] | None) -> str:
    """Filled dot: the model, with a bar for its interval. Hollow dots: the baselines. Axis 0 to 1."""

    def at(number: float) -> str:
        return f"{4 + 112 * min(1.0, max(0.0, number)):.1f}"

    parts = ['<line class="axis" x1="4" x2="116" y1="8" y2="8"/>']
    for value in values[1:]:
        if (number := as_number(value)) is not None:
            parts.append(f'<circle class="base" cx="{at(number)}" cy="8" r="3.2"/>')
    if interval is not None:
        parts.append(f'<line class="ci" x1="{at(interval[0])}" x2="{at(interval[1])}" y1="8" y2="8"/>')
    if (number := as_number(values[0])) is not None:
        parts.append(f'<circle class="model" cx="{at(number)}" cy="8" r="4"/>')
    return f'<svg class="dots" viewBox="0 0 120 16" aria-hidden="true">{"".join(parts)}</svg>'


def _short_baseline(name: str) -> str:
    return {"ela": "ELA", "noise_variance": "噪声 noise"}.get(name, name)


def _short_html(name: str) -> str:
    return {"ela": "ELA", "noise_variance": bilingual("噪声", "noise")}.get(name, esc(name))


def _aligned(cells: list[str], widths: list[int]) -> str:
    """First column to the left, the others to the right."""
    padded = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        space = " " * (width - display_width(cell))
        padded.append(cell + space if i == 0 else space + cell)
    return "  ".join(padded).rstrip()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
