"""Written inspection reports as one HTML file: the comparison with the true ones, and every picture beside its fields.

The style and the frame of the page are those of `finetune.inference.pages`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from finetune.inference.pages.frame import page_html, section_html
from finetune.inference.pages.markup import DASH, bilingual, data_uri, esc, format_number
from finetune.inference.pages.table import confusion_html
from finetune.metrics.reports import MISSING, is_same

_SIDE = 360
_QUALITY = 82
_CSS = """
.inspected{display:grid;grid-template-columns:minmax(120px,200px) 1fr;gap:14px;align-items:start}
.inspected .pictures{grid-template-columns:1fr}
table.fields{border-collapse:collapse;width:100%;font-size:.9rem}
.fields th,.fields td{padding:4px 8px;text-align:left;vertical-align:top;border-top:1px solid var(--line);
overflow-wrap:anywhere}
.fields thead th{border-top:0;color:var(--soft);font-weight:500;font-size:.82rem}
.fields tbody th{font-weight:500;white-space:nowrap}
.fields td.ok{color:var(--ok)}.fields td.bad{color:var(--bad)}.fields .none{color:var(--soft)}
.reports{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}
details{margin-top:8px;font-size:.87rem;color:var(--soft)}
.problem{color:var(--bad);overflow-wrap:anywhere;margin:0}
@media (max-width:600px){.inspected{grid-template-columns:1fr}.fields tbody th{white-space:normal}}
"""


@dataclass(frozen=True)
class ReportCard:
    """One report as the page shows it.

    Args:
        id: of the record, or the image's path.
        image: None where it could not be opened.
        text: as written.
        fields: read back from it. missing: not found in it.
        truth: true fields, None where there are none.
        error: why there is no report.
    """

    id: str
    image: Image.Image | None = field(repr=False)
    text: str
    fields: Mapping[str, str]
    missing: Sequence[str]
    truth: Mapping[str, str] | None = None
    error: str = ""


def reports_page(
    title: str,
    cards: Sequence[ReportCard],
    names: Sequence[str],
    metrics: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    num_reports: int,
) -> str:
    """The whole page.

    Args:
        names: the fields in the template's order.
        metrics: `level`, `fields`, `form` of results.json; None where nothing was compared.
        facts: of the run, for the heading.
        num_reports: of the whole run; the cards may be fewer.
    """
    sections, links = [], []
    if metrics is not None:
        links.append(("metrics", "结果", "Results"))
        body = _tiles(metrics) + _confusion(metrics.get("level")) + _fields_table(metrics["fields"])
        sections.append(section_html("metrics", ("结果", "Results"), body))
    links.append(("samples", "报告", "Reports"))
    shown = (
        f'<p class="note">{bilingual(f"显示 {len(cards)} / {num_reports}", f"{len(cards)} of {num_reports} shown")}</p>'
    )
    grid = f'<div class="reports">{"".join(_card(card, names) for card in cards)}</div>'
    sections.append(section_html("samples", ("报告", "Reports"), shown + grid if cards else ""))
    return page_html(title, links, facts, "".join(sections), _CSS)


def _tiles(metrics: Mapping[str, Any]) -> str:
    level, form = metrics.get("level") or {}, metrics["form"]
    constant = f"{format_number(level.get('majority'))}"
    tiles = [
        (
            ("风险等级准确率", "Risk-level accuracy"),
            level.get("accuracy"),
            (f"总答同一级：{constant}", f"a constant answer: {constant}"),
        ),
        (("宏平均 F1", "Macro F1"), level.get("macro_f1"), ("", "")),
        (("二次加权 kappa", "Quadratic kappa"), level.get("quadratic_kappa"), ("", "")),
        (
            ("格式完全正确", "Exact form"),
            form["exact_form"],
            (f"字段齐全 {format_number(form['complete'])}", f"all fields there {format_number(form['complete'])}"),
        ),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{bilingual(*name)}</span><b>{format_number(value)}</b>'
            f"<small>{bilingual(*note) if note[0] else '&nbsp;'}</small></div>"
            for name, value, note in tiles
        )
        + "</div>"
    )


def _confusion(level: Mapping[str, Any] | None) -> str:
    if not level or not level["n"]:
        return ""
    answers = list(next(iter(level["confusion"].values())))
    caption = ("风险等级：行为真实，列为模型所写", "Risk level: truth down, written across")
    return confusion_html(level["confusion"], answers, caption, {MISSING: ("未写出", "not written")})


def _fields_table(fields: Mapping[str, Mapping[str, Any]]) -> str:
    columns = (("完全一致", "Exact"), ("ROUGE-L（字）", "ROUGE-L (characters)"), ("chrF", "chrF"), ("份数", "Reports"))
    head = "".join(f'<th scope="col">{bilingual(*names)}</th>' for names in columns)
    rows = "".join(
        f'<tr><th scope="row">{esc(name)}</th>'
        + "".join(f"<td>{format_number(found[key])}</td>" for key in ("exact", "rouge_l", "chrf", "n"))
        + "</tr>"
        for name, found in fields.items()
    )
    note = bilingual(
        "未写出的字段算错；真实报告中没有的字段不比较。",
        "A field that was not written counts as wrong; one that the true report lacks is not compared.",
    )
    return (
        f'<div class="scroll" style="margin-top:14px"><table class="metrics"><thead><tr>'
        f'<th scope="col">{bilingual("字段", "Field")}</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{note}</p>'
    )


def _card(card: ReportCard, names: Sequence[str]) -> str:
    if card.error:
        body = f'<p class="problem">{esc(card.error)}</p>'
        return f'<article class="card bad"><header><h3>{esc(card.id)}</h3></header>{body}</article>\n'
    compared = [name for name in names if card.truth is not None and name in card.truth]
    right = sum(is_same(card.fields.get(name, ""), (card.truth or {})[name]) for name in compared)
    look = "" if not compared else " ok" if right == len(compared) else " bad"
    badge = f'<span class="badge{look}">{right} / {len(compared)}</span>' if compared else ""
    head = [
        ("字段", "Field"),
        ("模型所写", "Written"),
        *([("真实报告", "True report")] if card.truth is not None else []),
    ]
    rows = "".join(_row(name, card) for name in names)
    return (
        f'<article class="card{look}"><header><h3>{esc(card.id)}</h3>{badge}</header><div class="inspected">'
        f'<div class="pictures">{_picture(card)}</div><div><table class="fields"><thead><tr>'
        + "".join(f'<th scope="col">{bilingual(*each)}</th>' for each in head)
        + f"</tr></thead><tbody>{rows}</tbody></table>"
        f"<details><summary>{bilingual('原文', 'As written')}</summary><pre>{esc(card.text)}</pre></details>"
        "</div></div>"
        "</article>\n"
    )


def _row(name: str, card: ReportCard) -> str:
    missing = f'<span class="none">{bilingual("未写出", "not written")}</span>'
    written = missing if name in card.missing else esc(card.fields.get(name, ""))
    if card.truth is None:
        return f'<tr><th scope="row">{esc(name)}</th><td>{written}</td></tr>'
    truth = card.truth.get(name)
    look = "" if truth is None else ' class="ok"' if is_same(card.fields.get(name, ""), truth) else ' class="bad"'
    shown = DASH if truth is None else esc(truth)
    return f'<tr><th scope="row">{esc(name)}</th><td{look}>{written}</td><td>{shown}</td></tr>'


def _picture(card: ReportCard) -> str:
    if card.image is None:
        return f'<div class="missing">{bilingual("没有图像", "no image")}</div>'
    picture = card.image.copy()
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return f'<figure><img src="{data_uri(picture, _QUALITY)}" alt="{esc(card.id)}" tabindex="0"></figure>'
