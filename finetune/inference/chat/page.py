"""The page of `forensics chat --script --html`: every dialogue, each model's answer, verdict and overlay in a column.

One self-contained file in the frame of all pages; everything from data is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.images import load_image
from finetune.inference.chat.summary import number, percent
from finetune.inference.pages.frame import page_html, section_html
from finetune.inference.pages.markup import DASH, bilingual, data_uri, esc, format_number
from finetune.inference.visualization import overlay_mask
from finetune.schema import ImageInput

TOTAL_PICTURE_BYTES = 8_000_000
"""Goal for all pictures of a page together."""

_LARGEST_SIDE, _SMALLEST_SIDE, _QUALITY = 360, 96, 80
_CSS = """
#cards{grid-template-columns:minmax(0,1fr)}
.question{margin:10px 0 6px;padding:7px 12px;background:var(--tile);border-radius:10px;white-space:pre-wrap;
overflow-wrap:anywhere}
.shown{grid-template-columns:repeat(auto-fill,minmax(150px,220px))}
.side{display:grid;gap:12px;grid-auto-flow:column;grid-auto-columns:minmax(230px,1fr);overflow-x:auto}
.side>div{border:1px solid var(--line);border-radius:10px;padding:8px 10px;min-width:0}
.side h4{margin:0 0 4px;font-size:.9rem;overflow-wrap:anywhere}
.side .pictures{grid-template-columns:repeat(auto-fill,minmax(min(100%,180px),1fr))}
.side pre{max-height:220px}.side p{margin:3px 0;font-variant-numeric:tabular-nums}
details{margin-top:6px;font-size:.87rem;color:var(--soft)}
"""


def write_chat_report(
    path: str | Path,
    lines: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    summary: Mapping[str, Any],
    *,
    pictures: Sequence[Sequence[ImageInput]],
    masks_root: Path,
    mask_threshold: float,
    facts: Mapping[str, str],
) -> Path:
    """Write the page and make its folder; returns the path.

    Args:
        lines: objects of answers.jsonl.
        names: of the models, in column order.
        summary: of `summary.summarize`.
        pictures: the images of each dialogue.
        masks_root: folder that the mask paths are relative to.
        facts: shown in the heading.
    """
    count = sum(len(images) for images in pictures) + sum(_num_masks(line, names) for line in lines)
    side = int((TOTAL_PICTURE_BYTES / max(1, count) / 0.35) ** 0.5)  # a JPEG in base64 takes about 0.35 bytes a pixel
    show = _Pictures(masks_root, mask_threshold, min(_LARGEST_SIDE, max(_SMALLEST_SIDE, side)))
    cards = "".join(
        _card(i, line, names, images, show) for i, (line, images) in enumerate(zip(lines, pictures, strict=True))
    )
    body = (
        section_html("metrics", ("汇总", "Summary"), _tables(summary))
        + f'<section id="samples"><h2>{bilingual("对话", "Dialogues")}</h2>{_controls(lines, names)}'
        f'<div id="cards">{cards}</div>'
        f'<p class="empty" id="none" hidden>{bilingual("没有符合条件的对话", "No dialogue matches")}</p></section>\n'
    )
    page = page_html("模型对话对比 · answers side by side", (), facts, body, _CSS)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def spread(line: Mapping[str, Any], names: Sequence[str]) -> float:
    """Largest difference between the models' scores of one image of a dialogue; 0 with fewer than two scores."""
    scores: dict[int, list[float]] = {}
    for verdict in _verdicts(line, names):
        if verdict["score"] is not None:
            scores.setdefault(verdict["image"], []).append(verdict["score"])
    return max((max(values) - min(values) for values in scores.values()), default=0.0)


def differs(line: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether two models judge an image of the dialogue differently, by score or, without one, by their words."""
    labels: dict[int, set[int]] = {}
    for verdict in _verdicts(line, names):
        label = verdict["label"] if verdict["label"] is not None else verdict["text_label"]
        if label is not None:
            labels.setdefault(verdict["image"], set()).add(label)
    return any(len(found) > 1 for found in labels.values())


class _Pictures:
    """Thumbnails as figures, all of the same longer side."""

    def __init__(self, masks_root: Path, threshold: float, side: int) -> None:
        self.masks_root, self.threshold, self.side = masks_root, threshold, side

    def image(self, image: ImageInput, caption: tuple[str, str]) -> str:
        return _figure(self._small(load_image(image)), caption[1], caption)

    def overlay(self, image: ImageInput, mask_path: str, label: str) -> str:
        small = self._small(load_image(image))
        mask = Image.open(self.masks_root / mask_path).resize(small.size, Image.Resampling.BOX)
        scores = np.asarray(mask, dtype=np.float32) / 255  # (h, w)
        shown = overlay_mask(np.asarray(small), scores, threshold=self.threshold)
        return _figure(Image.fromarray(shown), label, ("叠加", "overlay"))

    def _small(self, picture: Image.Image) -> Image.Image:
        scale = self.side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return picture.resize(size, Image.Resampling.LANCZOS)


def _figure(picture: Image.Image, alt: str, caption: tuple[str, str]) -> str:
    uri = data_uri(picture, _QUALITY)
    return (
        f'<figure><img src="{uri}" alt="{esc(alt)}" loading="lazy" decoding="async" tabindex="0" role="button">'
        f"<figcaption>{bilingual(*caption)}</figcaption></figure>"
    )


def _card(
    index: int, line: Mapping[str, Any], names: Sequence[str], images: Sequence[ImageInput], show: _Pictures
) -> str:
    outcome = "differ" if differs(line, names) else "agree"
    badge = bilingual("判定不同", "verdicts differ") if outcome == "differ" else bilingual("判定一致", "verdicts agree")
    state = "bad" if outcome == "differ" else "ok"
    failed = "unparsed" if _unparsed(line, names) else ""
    turns = "".join(_turn(line, turn, names, images, show) for turn in line["turns"])
    return (
        f'<article class="card {state}" data-index="{index}" data-outcome="{outcome}" data-op="{failed}" '
        f'data-score="{spread(line, names):.6f}"><header><h3>{esc(line["id"])}</h3>'
        f'<span class="badge {state}">{badge}</span></header>{turns}</article>'
    )


def _turn(
    line: Mapping[str, Any],
    turn: Mapping[str, Any],
    names: Sequence[str],
    images: Sequence[ImageInput],
    show: _Pictures,
) -> str:
    shown = "".join(show.image(images[i], _caption(i, line["labels"][i])) for i in turn["images"])
    pictures = f'<div class="pictures shown">{shown}</div>' if shown else ""
    columns = "".join(_column(name, turn["answers"][name], images, show) for name in names)
    reference = ""
    if turn["reference"] is not None:
        label = bilingual("数据中的回答（模型未见）", "answer in the data (not shown to the models)")
        reference = f"<details><summary>{label}</summary><pre>{esc(turn['reference'])}</pre></details>"
    return f'<div class="question">{esc(turn["question"])}</div>{pictures}<div class="side">{columns}</div>{reference}'


def _caption(image: int, label: int | None) -> tuple[str, str]:
    zh, en = {None: ("", ""), 0: (" 真值：真实", " truth: real"), 1: (" 真值：篡改", " truth: tampered")}[label]
    return f"[{image + 1}]{zh}", f"[{image + 1}]{en}"


def _column(name: str, answer: Mapping[str, Any], images: Sequence[ImageInput], show: _Pictures) -> str:
    facts = "".join(_verdict(verdict) for verdict in answer["verdicts"]) if answer["has_heads"] else ""
    if not answer["has_heads"]:
        facts = f'<p><span class="badge">{bilingual("无判定头", "no heads")}</span></p>'
    overlays = "".join(
        show.overlay(images[v["image"]], v["mask_path"], f"{name} [{v['image'] + 1}]")
        for v in answer["verdicts"]
        if v["mask_path"]
    )
    parsed = ""
    if answer["parse_ok"] is not None:
        words = ("可解析", "parsed") if answer["parse_ok"] else ("无法解析", "not parsable")
        parsed = f'<span class="badge {"ok" if answer["parse_ok"] else "bad"}">{bilingual(*words)}</span>'
    heading = f"<span>{bilingual('回答', 'Answer')}</span>{parsed}"
    text = f'<div class="answer">{heading}<pre tabindex="0">{esc(answer["text"])}</pre></div>'
    figures = f'<div class="pictures">{overlays}</div>' if overlays else ""
    return f"<div><h4>{esc(name)}</h4>{facts}{figures}{text}</div>"


def _verdict(verdict: Mapping[str, Any]) -> str:
    if verdict["score"] is None:
        return f"<p>[{verdict['image'] + 1}] {DASH}</p>"
    word = bilingual("篡改", "tampered") if verdict["label"] else bilingual("真实", "real")
    meter = f'<span class="meter"><i style="width:{100 * verdict["score"]:.1f}%"></i></span>'
    return (
        f'<p>[{verdict["image"] + 1}] <b class="label{verdict["label"]}">{word}</b> '
        f"{format_number(verdict['score'])} {meter}</p>"
    )


def _tables(summary: Mapping[str, Any]) -> str:
    models = [
        (
            name,
            str(n["answers"]),
            percent(n["parse_rate"]),
            f"{n['tampered']}/{n['scored']}" if n["has_heads"] else "无 no heads",
            number(n["mean_score"]),
            percent(n["accuracy"]),
            percent(n["written_accuracy"]),
            percent(n["self_agreement"]),
        )
        for name, n in summary["models"].items()
    ]
    heads = [
        ("模型", "Model"), ("回答", "Answers"), ("可解析", "Parsed"), ("判为篡改", "Tampered"),
        ("平均分数", "Mean score"), ("准确率", "Accuracy"), ("文字准确率", "Accuracy of text"),
        ("文字与分数一致", "Text = score"),
    ]  # fmt: skip
    result = _table(heads, models)
    if summary["pairs"]:
        pair_heads = [
            ("模型对", "Pair"), ("判定一致", "Same verdict"), ("文字结论一致", "Same written verdict"),
            ("平均分差", "Mean score difference"), ("最大分差", "Largest"), ("掩膜 IoU", "Mask IoU"),
            ("文字相同", "Same text"),
        ]  # fmt: skip
        keys = ("mean_score_difference", "max_score_difference", "mask_iou")
        pairs = [
            (
                f"{p['a']} / {p['b']}",
                percent(p["verdict_agreement"]),
                percent(p["written_agreement"]),
                *(number(p[key]) for key in keys),
                percent(p["same_text"]),
            )
            for p in summary["pairs"]
        ]
        result += f'<p class="note"></p>{_table(pair_heads, pairs)}'
    return result


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{bilingual(*head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{esc(row[0])}</th>{"".join(f"<td>{esc(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="metrics"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _controls(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    differ = sum(differs(line, names) for line in lines)
    unparsed = sum(_unparsed(line, names) for line in lines)
    filters = (
        ("all", "全部", "All", len(lines)),
        ("differ", "判定不同", "Verdicts differ", differ),
        ("agree", "判定一致", "Verdicts agree", len(lines) - differ),
        ("unparsed", "有无法解析的回答", "An answer not parsable", unparsed),
    )
    buttons = "".join(
        f'<button type="button" data-filter="{value}" aria-pressed="false">{bilingual(zh, en)} <b>{count}</b></button>'
        for value, zh, en, count in filters
    )
    orders = (("index", "原顺序 original order"), ("score-down", "分差 ↓ score difference"))
    options = "".join(f'<option value="{value}">{text}</option>' for value, text in orders)
    return (
        f'<div class="controls"><div class="filters" role="group" aria-label="filter">{buttons}</div>'
        f'<label>{bilingual("排序", "Sort")} <select id="sort">{options}</select></label>'
        '<output id="shown" aria-live="polite"></output></div>'
    )


def _unparsed(line: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(turn["answers"][name]["parse_ok"] is False for turn in line["turns"] for name in names)


def _verdicts(line: Mapping[str, Any], names: Sequence[str]) -> list[Mapping[str, Any]]:
    return [v for turn in line["turns"] for name in names for v in turn["answers"][name]["verdicts"]]


def _num_masks(line: Mapping[str, Any], names: Sequence[str]) -> int:
    return sum(verdict["mask_path"] is not None for verdict in _verdicts(line, names))
