"""An evaluation of candidate regions as one HTML file: numbers of both files, the sweep, and every picture with boxes.

The style, the frame and the script of the page are those of `finetune.inference.pages`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.inference.pages.charts import histogram, precision_recall_chart, roc_chart
from finetune.inference.pages.frame import page_html, section_html
from finetune.inference.pages.markup import DASH, bilingual, esc, format_number
from finetune.inference.pages.table import confusion_html
from finetune.inference.pages.thresholds import threshold_chart, threshold_table
from finetune.inference.regions.cards import CARDS_CSS, RegionCard, cards_html

SWEEP_COLUMNS: dict[str, tuple[str, str]] = {
    "f1": ("区域 F1", "region F1"),
    "precision": ("区域精确率", "region precision"),
    "recall": ("区域召回率", "region recall"),
    "image_f1": ("整图 F1", "image F1"),
}
_ROWS: tuple[tuple[str, str, tuple[str, str]], ...] = (
    ("roi", "f1", ("F1", "F1")),
    ("roi", "precision", ("精确率", "Precision")),
    ("roi", "recall", ("召回率", "Recall")),
    ("roi", "auroc", ("AUROC", "AUROC")),
    ("roi", "average_precision", ("平均精确率 AP", "Average precision")),
    ("roi", "all_positive_f1", ("全判异常的 F1", "F1 of calling all abnormal")),
    ("roi", "n", ("区域数", "Regions")),
    ("roi", "n_positive", ("异常区域数", "Abnormal regions")),
    ("image", "f1", ("F1", "F1")),
    ("image", "precision", ("精确率", "Precision")),
    ("image", "recall", ("召回率", "Recall")),
    ("image", "auroc", ("AUROC", "AUROC")),
    ("image", "all_positive_f1", ("全判异常的 F1", "F1 of calling all abnormal")),
    ("image", "n", ("图像数", "Images")),
    ("image", "n_positive", ("有异常的图像数", "Images with an abnormal region")),
    ("calibration.token", "ece", ("判定词概率的 ECE", "ECE of the words' probability")),
    ("calibration.written", "ece", ("所写数字的 ECE", "ECE of the written number")),
    ("calibration.written", "token_ece", ("同一批区域：判定词概率的 ECE", "The same regions: ECE of the probability")),
    ("calibration.written", "n", ("写了数字的区域数", "Regions with a written number")),
    ("answers", "exact", ("格式完全正确", "Exact form")),
    ("answers", "parsed", ("可解析", "Readable JSON")),
    ("answers", "finished", ("未被长度上限截断", "Not cut off by the limit")),
    ("answers", "n", ("回答数", "Answers")),
)
_GROUPS: dict[str, tuple[str, str]] = {
    "roi": ("候选区域", "Candidate regions"),
    "image": ("整图（任一区域异常）", "Images (any region abnormal)"),
    "calibration.token": ("置信度校准", "Calibration of the confidences"),
    "answers": ("回答", "Answers"),
}
_FACTS = (
    "model",
    "adapter",
    "data",
    "validation",
    "config_hash",
    "seed",
    "commit",
    "date",
    "device",
    "seconds",
    "versions",
)
"""Of the run, shown in the heading."""


def regions_page(
    title: str,
    metrics: Mapping[str, Any],
    sweep: Sequence[dict[str, Any]],
    cards: Sequence[RegionCard],
    scored: tuple[Sequence[int], Sequence[float]],
) -> str:
    """The whole page.

    Args:
        metrics: of metrics.json: `threshold`, `val` (None without a validation file), `test`, `run`.
        sweep: rows of sweep.csv, none where the threshold was given.
        cards: of the test file; may be fewer than its records.
        scored: label and probability of every region of the test file.
    """
    threshold, test = metrics["threshold"]["value"], metrics["test"]
    sections = [
        ("metrics", ("结果", "Results"), _tiles(metrics) + _table(metrics) + _note(metrics)),
        ("types", ("按缺陷类型", "By defect type"), _types(test) + _confusion(test["confusion"])),
        ("threshold", ("阈值与分数", "Threshold and scores"), _charts(sweep, threshold, scored)),
        ("samples", ("测试图像", "Test images"), cards_html(cards, test["num_images"])),
    ]
    links = [(anchor, *names) for anchor, names, _ in sections]
    body = "".join(section_html(*section) for section in sections)
    facts = {key: metrics["run"][key] for key in _FACTS if metrics["run"][key] is not None}
    return page_html(title, links, facts, body, CARDS_CSS)


def _tiles(metrics: Mapping[str, Any]) -> str:
    test, chosen = metrics["test"], metrics["threshold"]
    roi, image, calibration = test["roi"], test["image"], test["calibration"]
    at = format_number(chosen["value"], 2)
    source = ("在验证集上选定", "chosen on validation") if chosen["swept"] else ("预先给定", "given")
    tiles = (
        (
            ("区域 F1（测试）", "Region F1 (test)"),
            format_number(roi["f1"]),
            (
                f"全判异常 {format_number(roi['all_positive_f1'])}",
                f"all abnormal {format_number(roi['all_positive_f1'])}",
            ),
        ),
        (("区域 AUROC", "Region AUROC"), format_number(roi["auroc"]), _ends(test, "roi.auroc")),
        (
            ("整图 F1", "Image F1"),
            format_number(image["f1"]),
            (f"AUROC {format_number(image['auroc'])}", f"AUROC {format_number(image['auroc'])}"),
        ),
        (("阈值", "Threshold"), at, source),
        (
            ("概率的 ECE", "ECE of the probability"),
            format_number(calibration["token"]["ece"]),
            (
                f"所写数字 {format_number(calibration['written']['ece'])}",
                f"written number {format_number(calibration['written']['ece'])}",
            ),
        ),
    )
    shown = "".join(
        f'<div class="tile"><span>{bilingual(*name)}</span><b>{value}</b><small>{bilingual(*note)}</small></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _ends(part: Mapping[str, Any], name: str) -> tuple[str, str]:
    ends = _interval(part, name)
    return (f"95% 区间 {ends}", f"95% interval {ends}")


def _interval(part: Mapping[str, Any], name: str) -> str:
    low, high = part["intervals"].get(name, (None, None))
    return DASH if low is None else f"{low:.3f}…{high:.3f}"


def _table(metrics: Mapping[str, Any]) -> str:
    """Both files beside each other, the test file with its intervals."""
    parts = {name: metrics[name] for name in ("val", "test") if metrics.get(name) is not None}
    names = {"val": ("验证集", "Validation"), "test": ("测试集", "Test")}
    head = "".join(f'<th scope="col">{bilingual(*names[name])}</th>' for name in parts)
    rows, columns = [], len(parts) + 2
    for group, key, label in _ROWS:
        if (heading := _GROUPS.get(group)) is not None and (group, key) in _FIRST:
            rows.append(f'<tr class="group"><th colspan="{columns}" scope="colgroup">{bilingual(*heading)}</th></tr>')
        cells = "".join(f"<td>{format_number(_value(part, group, key))}</td>" for part in parts.values())
        ends = _interval(metrics["test"], f"{group}.{key}").replace(DASH, "")
        rows.append(f'<tr><th scope="row">{bilingual(*label)}</th>{cells}<td class="ci">{ends}</td></tr>')
    return (
        f'<div class="scroll ops"><table class="metrics"><thead><tr><th scope="col">{bilingual("指标", "Metric")}</th>'
        f'{head}<th scope="col">{bilingual("测试：95% 自助区间", "Test: 95% bootstrap")}</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_FIRST = {next((group, key) for group, key, _ in _ROWS if group == name) for name in _GROUPS}
"""The first row of each group of rows, which its heading stands above."""


def _value(part: Mapping[str, Any], group: str, key: str) -> Any:
    found: Any = part
    for name in group.split("."):
        found = found[name]
    return found[key]


def _note(metrics: Mapping[str, Any]) -> str:
    test = metrics["test"]
    zh = (
        "概率取自每个区域判定词的记号概率；所写数字是模型在回答中写下的置信度。验证集的数字取自选定阈值的同一批图像，偏乐观。"
        "自助法按图像重抽样。"
    )
    en = (
        "The probability is that of each verdict's tokens; the written number is the confidence in the answer's text. "
        "Figures of the validation file are those of the images the threshold was chosen on, so optimistic. Intervals "
        "draw whole images."
    )
    failed, rejected = test["num_failed"], test["num_rejected"]
    if failed or rejected:
        zh += f"{failed} 张图像无法使用，其异常区域按漏检计；{rejected} 行记录无法读取，未计入。"
        en += (
            f" {failed} images could not be used: their abnormal regions count as missed; {rejected} lines could not "
            "be read and are not counted."
        )
    return f'<p class="note">{bilingual(zh, en)}</p>'


def _types(test: Mapping[str, Any]) -> str:
    if not test["types"]:
        return ""
    columns = (("区域数", "Regions"), ("判为异常", "Called abnormal"), ("其中类型写对", "Type named rightly"))
    head = "".join(f'<th scope="col">{bilingual(*names)}</th>' for names in columns)
    rows = "".join(
        f'<tr><th scope="row">{esc(kind)}</th>'
        + "".join(f"<td>{format_number(found[key])}</td>" for key in ("regions", "recall", "named"))
        + "</tr>"
        for kind, found in test["types"].items()
    )
    return (
        f'<div class="scroll ops"><table class="metrics"><thead><tr><th scope="col">{bilingual("类型", "Type")}</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _confusion(confusion: Mapping[str, Mapping[str, int]]) -> str:
    called = sorted({name for row in confusion.values() for name in row}, key=lambda name: (name != "normal", name))
    names = {"normal": ("正常", "normal"), "abnormal": ("异常（未写类型）", "abnormal, no type")}
    return confusion_html(
        confusion, called, ("行为真实，列为模型所判", "Truth down, verdict and written type across"), names
    )


def _charts(sweep: Sequence[dict[str, Any]], threshold: float, scored: tuple[Sequence[int], Sequence[float]]) -> str:
    labels, scores = scored
    charts, table = "", ""
    if sweep:
        title = ("验证集：阈值", "Validation: threshold")
        charts += threshold_chart(title, sweep, SWEEP_COLUMNS, marker=threshold)
        rows = threshold_table(title, sweep, SWEEP_COLUMNS, threshold)
        table = f'<div class="tables" style="margin-top:14px">{rows}</div>'
    if labels:
        charts += histogram(labels, scores, threshold, names=(("正常", "normal"), ("异常", "abnormal")))
    charts += roc_chart({"model": scored}, {"model": ("测试区域", "test regions")})
    charts += precision_recall_chart(labels, scores)
    return f'<div class="charts">{charts}</div>{table}'
