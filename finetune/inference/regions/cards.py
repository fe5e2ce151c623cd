"""Cards of an evaluation of candidate regions: the picture with boxes, what was said of each, buttons that filter.

The page's script makes the buttons work; it is that of `finetune.inference.pages`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from finetune.inference.pages.cards import controls_bar, filter_button
from finetune.inference.pages.markup import bilingual, data_uri, esc, format_number
from finetune.inference.regions.pictures import LOOKS, DrawnRegion, Outcome, draw_regions

OUTCOME_NAMES: dict[Outcome, tuple[str, str]] = {
    "tp": ("找到的异常", "abnormal, found"),
    "fp": ("误报", "false alarm"),
    "fn": ("漏检", "abnormal, missed"),
    "tn": ("正确：正常", "rightly normal"),
}
_SIDE, _MANY, _QUALITY = 540, 60, 82
CARDS_CSS = """
.regions{display:grid;grid-template-columns:minmax(140px,230px) minmax(0,1fr);gap:12px;align-items:start}
.regions>div{min-width:0;overflow-x:auto}
.regions .pictures{grid-template-columns:1fr}.regions .pictures img{aspect-ratio:auto}
table.said{border-collapse:collapse;width:100%;font-size:.84rem;font-variant-numeric:tabular-nums}
.said th,.said td{padding:4px;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
.said thead th{border-top:0;color:var(--soft);font-weight:500;font-size:.76rem}
.said tbody th{font-weight:600;white-space:nowrap}.said td.reason{overflow-wrap:anywhere}
.said td.number{white-space:nowrap}.said tr.why td{border-top:0;padding-top:0;color:var(--soft)}
.said .ok{color:var(--ok)}.said .bad{color:var(--bad)}
.boxes{display:flex;flex-wrap:wrap;gap:6px 20px;align-items:center;margin:0 2px 12px;font-size:.87rem}
.boxes>span{display:inline-flex;align-items:center;gap:7px}
.boxes i.look{width:26px;height:18px;background:#555;display:inline-block}
details{margin-top:8px;font-size:.87rem;color:var(--soft)}
.problem{color:var(--bad);overflow-wrap:anywhere;margin:0}
@media (max-width:760px){.regions{grid-template-columns:1fr}}
"""


@dataclass(frozen=True)
class RegionCard:
    """One record as the page shows it.

    Args:
        id: of the record.
        image: None where it could not be opened.
        rows: of its regions, as in predictions.jsonl.
        outcomes: id -> what became of the region; {} where there is no verdict.
        answers: as written, one per question.
        error: why there is no verdict.
    """

    id: str
    image: Image.Image | None = field(repr=False)
    rows: Sequence[Mapping[str, Any]]
    outcomes: Mapping[str, Outcome]
    answers: Sequence[str] = ()
    error: str = ""


def cards_html(cards: Sequence[RegionCard], num_images: int) -> str:
    """Buttons, legend and all cards; pictures shrink with their number to keep the file small.

    Args:
        num_images: of the whole file; the cards may be fewer.
    """
    if not cards:
        return ""
    side = _SIDE if len(cards) <= _MANY else max(270, round(_SIDE * (_MANY / len(cards)) ** 0.5))
    shown = bilingual(f"显示 {len(cards)} / {num_images}", f"{len(cards)} of {num_images} shown")
    legend = "".join(
        f'<span><i class="look" style="border:{_border(outcome)}"></i>{_mark(outcome)}{bilingual(*names)}</span>'
        for outcome, names in OUTCOME_NAMES.items()
    )
    grid = "".join(_card(card, index, side) for index, card in enumerate(cards))
    nothing = f'<p class="empty" id="none" hidden>{bilingual("没有符合条件的图像", "No image matches")}</p>'
    return (
        f'{_controls(cards)}<p class="note">{shown}</p><div class="boxes">{legend}</div>'
        f'<div id="cards">{grid}</div>{nothing}'
    )


def _border(outcome: Outcome) -> str:
    color, line, width, _ = LOOKS[outcome]
    return f"{max(2, 3 * width if line == 'double' else width)}px {line} rgb{color}"


def _mark(outcome: Outcome) -> str:
    mark = LOOKS[outcome].mark
    return f"<b>{mark}</b> " if mark else ""


def _controls(cards: Sequence[RegionCard]) -> str:
    """The page's script filters by `data-outcome` and `data-op`, so that an image may be of both wrong kinds."""
    kinds = [_kinds(card) for card in cards]
    counts = {"all": len(cards), "wrong": sum("fp" in found or "fn" in found for found in kinds)}
    counts |= {name: sum(name in found for found in kinds) for name in ("fn", "fp", "error")}
    names = {
        "all": ("全部", "All"),
        "wrong": ("有错", "With mistakes"),
        "fn": ("有漏检", "With missed regions"),
        "fp": ("有误报", "With false alarms"),
        "error": ("无法使用", "Not usable"),
    }
    buttons = [
        filter_button(key, *names[key], count, is_pressed=key == "all")
        for key, count in counts.items()
        if count or key != "error"
    ]
    orders = (
        ("index", "原顺序 original order"),
        ("score-down", "最高概率 ↓ highest probability first"),
        ("score-up", "最高概率 ↑ lowest probability first"),
    )
    return controls_bar(buttons, orders)


def _kinds(card: RegionCard) -> list[str]:
    """What the buttons know the card by: the mistakes on it, else `error` or `right`."""
    wrong = [outcome for outcome in ("fp", "fn") if outcome in card.outcomes.values()]
    return wrong or ["error" if card.error else "right"]


def _card(card: RegionCard, index: int, side: int) -> str:
    kinds = _kinds(card)
    probabilities = [row["probability"] for row in card.rows if row["probability"] is not None]
    look = "ok" if kinds == ["right"] else "bad"
    data = (
        f'data-index="{index}" data-outcome="{kinds[0]}" data-op="{kinds[-1]}" '
        f'data-score="{max(probabilities, default="")}"'
    )
    header = f"<header><h3>{esc(card.id)}</h3>{_badges(card)}</header>"
    if card.error:
        body = f'<p class="problem">{esc(card.error)}</p>'
        return f'<article class="card bad" {data}>{header}{body}</article>\n'
    rows = "".join(_row(row, card.outcomes[row["id"]]) for row in card.rows)
    heads = (
        ("区域", "Region"),
        ("真实", "Truth"),
        ("判定", "Verdict"),
        ("概率", "Probability"),
        ("所写数字", "Written"),
    )
    table = (
        '<table class="said"><thead><tr>'
        + "".join(f'<th scope="col">{bilingual(*names)}</th>' for names in heads)
        + f"</tr></thead><tbody>{rows}</tbody></table>"
    )
    texts = "".join(f"<pre>{esc(text)}</pre>" for text in card.answers)
    written = f"<details><summary>{bilingual('回答原文', 'Answer as written')}</summary>{texts}</details>"
    return (
        f'<article class="card {look}" {data}>{header}<div class="regions">'
        f'<div class="pictures">{_picture(card, side)}</div><div>{table}{written if texts else ""}</div></div>'
        "</article>\n"
    )


def _badges(card: RegionCard) -> str:
    if card.error:
        return f'<span class="badge bad">{bilingual("无法使用", "not usable")}</span>'
    shown = []
    for outcome, look in (("fn", "bad"), ("fp", "bad"), ("tp", "ok")):
        count = sum(found == outcome for found in card.outcomes.values())
        if count:
            zh, en = OUTCOME_NAMES[outcome]  # type: ignore[index]
            shown.append(f'<span class="badge {look}">{count} {bilingual(zh, en)}</span>')
    return "".join(shown) or f'<span class="badge ok">{bilingual("均正常", "all normal")}</span>'


def _row(row: Mapping[str, Any], outcome: Outcome) -> str:
    is_wrong = outcome in ("fp", "fn")
    truth = esc(row["true_type"]) if row["label"] else bilingual("正常", "normal")
    is_called = row["verdict"] == "abnormal"
    verdict = bilingual("异常", "abnormal") if is_called else bilingual("正常", "normal")
    mark = f" ({LOOKS[outcome].mark})" if is_wrong else ""
    shown = (
        f'<tr><th scope="row">{esc(row["id"])}</th><td>{truth}</td>'
        f'<td class="{"bad" if is_wrong else "ok"}">{verdict}{mark}</td>'
        f'<td class="number">{format_number(row["probability"])}</td>'
        f'<td class="number">{format_number(row["confidence"], 2)}</td></tr>'
    )
    if row["type"] is None:
        return shown
    said = f"<b>{esc(row['type'])}</b>" + (f" · {esc(row['reason'])}" if row["reason"] else "")
    return f'{shown}<tr class="why"><td></td><td class="reason" colspan="4">{said}</td></tr>'


def _picture(card: RegionCard, side: int) -> str:
    if card.image is None:
        return f'<div class="missing">{bilingual("没有图像", "no image")}</div>'
    drawn = [DrawnRegion(row["id"], tuple(row["box_xyxy"]), card.outcomes[row["id"]]) for row in card.rows]
    picture = draw_regions(card.image, drawn, side)
    return (
        f'<figure><img src="{data_uri(picture, _QUALITY)}" alt="{esc(card.id)}" loading="lazy" tabindex="0" '
        'role="button"></figure>'
    )
