"""audit.html: one self-contained page with findings, thumbnails, the leak table and counts; Chinese and English.

Pictures are data URIs and nothing is fetched. Readable without JavaScript, in light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.data.audit.findings import Audit, Example, Finding, Leak
from finetune.data.audit.texts import advice, feature_name, title
from finetune.data.audit.thumbnails import Thumbnail, thumbnails
from finetune.markup import BASE_CSS, DASH, LANGUAGE_SCRIPT, bilingual, esc, format_number, format_seconds
from finetune.schema import Record

_SEVERITY = {"error": ("错误", "error"), "warning": ("警告", "warning"), "info": ("信息", "info")}
_FAMILIES = {
    "container": ("文件", "container"),
    "prompt": ("提示词", "prompt"),
    "name": ("文件名", "name"),
    "content": ("内容", "content"),
}
_CSS = (
    BASE_CSS
    + """
.finding{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--soft);border-radius:12px;
padding:12px 16px;margin-bottom:12px}
.finding.error{border-left-color:var(--bad)}.finding.warning{border-left-color:var(--warn)}
.finding h3{font-size:1rem;margin:0;display:flex;gap:10px;align-items:baseline;overflow-wrap:anywhere}
.tag{flex:none;font-size:.78rem;font-weight:600;border-radius:999px;padding:1px 10px;border:1px solid var(--line);
color:var(--soft)}
.error .tag{color:var(--bad);background:var(--badbg);border-color:transparent}
.warning .tag{color:var(--warn);border-color:var(--warn)}
.finding p{margin:4px 0 0;color:var(--soft);font-size:.87rem}.finding p.clue{color:var(--ink);overflow-wrap:anywhere}
.examples{display:flex;flex-wrap:wrap;gap:12px;margin-top:10px}
.example{margin:0;max-width:100%}.example.wide{flex:1 1 100%}
.pictures{display:flex;gap:6px}
.pictures span{display:block;position:relative}
.pictures img,.none{display:block;height:130px;width:auto;max-width:200px;border-radius:6px;background:var(--tile)}
.none{width:130px;display:grid;place-items:center;color:var(--soft);font-size:.8rem;text-align:center;padding:8px;
background:repeating-linear-gradient(135deg,var(--line) 0 2px,var(--tile) 2px 12px)}
.mark{position:absolute;left:5px;bottom:5px;font-size:.72rem;padding:0 6px;border-radius:4px;background:#000b;
color:#fff}
.example figcaption{font-size:.78rem;color:var(--soft);max-width:230px;overflow-wrap:anywhere;margin-top:3px}
.example.wide figcaption{max-width:none}
.example b{font:600 .78rem ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:var(--ink)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 14px;text-align:right;white-space:nowrap;border-top:1px solid var(--line);font-weight:400}
thead th{border-top:0;color:var(--soft);font-size:.85rem}
th:first-child,th:last-child:nth-child(7),td.text{text-align:left}td.text{white-space:normal;color:var(--soft);font-size:.85rem;
min-width:220px;overflow-wrap:anywhere}
tr.error th:first-child{color:var(--bad);font-weight:600}tr.warning th:first-child{color:var(--warn);font-weight:600}
.plot{width:170px}.plot svg{display:block;width:160px;height:18px}
.axis{stroke:var(--line);stroke-width:1.5}.limit{stroke:var(--bad);stroke-dasharray:3 2}
.chance{stroke:var(--soft)}.range{stroke:var(--c1);stroke-width:5;opacity:.35;stroke-linecap:round}.point{fill:var(--c1)}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:3px 12px;align-items:center;
background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px;max-width:640px}
.bars i{display:block;height:12px;border-radius:3px;background:var(--c1);min-width:1px}
.bars span{font-size:.85rem;font-variant-numeric:tabular-nums}
@media print{nav,.languages{display:none}.finding,tr{break-inside:avoid}}
"""
)


def audit_page(audit: Audit, records: Mapping[int, Record]) -> str:
    """The page as text.

    Args:
        records: those that examples name, by their number; others are named without a picture.
    """
    sections = [
        _tiles(audit),
        _section("findings", "发现", "Findings", _findings(audit, records)),
        _section("leaks", "标签线索", "Clues to the label", _leaks(audit)),
        _section("splits", "划分", "Splits", _splits(audit.counts)),
        _section("masks", "伪造区域面积", "Area of tampered regions", _masks(audit.counts["mask_area"])),
    ]
    links = "".join(
        f'<a href="#{anchor}">{bilingual(zh, en)}</a>'
        for anchor, zh, en in (
            ("findings", "发现", "findings"),
            ("leaks", "线索", "clues"),
            ("splits", "划分", "splits"),
        )
    )
    languages = (
        '<div class="languages"><button type="button" data-lang="zh">中文</button>'
        '<button type="button" data-lang="en">English</button></div>'
    )
    return (
        '<!DOCTYPE html>\n<html lang="zh"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Data audit · 数据审计</title><style>{_CSS}</style></head><body>"
        f'<header class="page"><div class="bar"><h1>{bilingual("数据审计", "Data audit")}</h1>'
        f"<nav>{links}</nav>{languages}</div>{_facts(audit)}</header>"
        f"<main>{''.join(sections)}</main><script>(function(){{{LANGUAGE_SCRIPT}}})();</script></body></html>\n"
    )


def _facts(audit: Audit) -> str:
    sources = "; ".join(f"{source['split']}: {source['path']}" for source in audit.sources)
    facts = [("数据", "data", sources, True), ("耗时", "time", format_seconds(audit.seconds), False)]
    facts.append(("分组依据", "groups by", audit.settings["group_by"], False))
    facts.append(("泄漏阈值", "leak threshold", f"AUROC {audit.settings['leak_threshold']}", False))
    if tokens := audit.counts["tokens"]:
        limit = f" / {tokens['limit']}" if "limit" in tokens else ""
        facts.append(
            (
                "词元（中位/最长/上限）",
                "tokens (median/longest/limit)",
                f"{tokens['median']:.0f} / {tokens['max']}{limit}",
                False,
            )
        )
    return (
        '<dl class="run">'
        + "".join(
            f"<div{' class=wide' if is_wide else ''}><dt>{bilingual(zh, en)}</dt><dd>{esc(value)}</dd></div>"
            for zh, en, value, is_wide in facts
        )
        + "</dl>"
    )


def _tiles(audit: Audit) -> str:
    counts = audit.counts
    splits = counts["splits"].values()
    labels = {name: sum(split[name] for split in splits) for name in ("real", "tampered", "unlabelled")}
    both = counts["groups"]["both_classes"]
    tiles = [
        ("错误", "errors", audit.num_errors, f"{audit.num_warnings} {'warnings'}"),
        ("记录", "records", counts["records"], f"{counts['unreadable_records']} unreadable"),
        (
            "图像",
            "images",
            counts["images"],
            f"{labels['real']} real · {labels['tampered']} tampered · {labels['unlabelled']} without label",
        ),
        ("分组", "groups", counts["groups"]["all"], f"{both} with both classes"),
    ]
    zh_small = [
        f"{audit.num_warnings} 个警告",
        f"{counts['unreadable_records']} 条不可读",
        f"{labels['real']} 真实 · {labels['tampered']} 伪造 · {labels['unlabelled']} 无标签",
        f"{both} 组含两类",
    ]
    return (
        '<section class="tiles">'
        + "".join(
            f'<div class="tile"><span>{bilingual(zh, en)}</span><b>{value}</b>'
            f"<small>{bilingual(small_zh, small)}</small></div>"
            for (zh, en, value, small), small_zh in zip(tiles, zh_small, strict=True)
        )
        + "</section>"
    )


def _section(anchor: str, zh: str, en: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{bilingual(zh, en)}</h2>{body}</section>' if body else ""


def _findings(audit: Audit, records: Mapping[int, Record]) -> str:
    if not audit.findings:
        return f'<p class="empty">{bilingual("没有发现问题。", "Nothing was found.")}</p>'
    return "".join(_finding(finding, records) for finding in audit.findings)


def _finding(finding: Finding, records: Mapping[int, Record]) -> str:
    clue = finding.details.get("note")
    return (
        f'<article class="finding {finding.severity}"><h3><span class="tag">{bilingual(*_SEVERITY[finding.severity])}'
        f"</span><span>{bilingual(title(finding, 'zh'), title(finding))}</span></h3>"
        f"{f'<p class=clue>{esc(clue)}</p>' if clue else ''}"
        f"<p>{bilingual(advice(finding, 'zh'), advice(finding))}</p>"
        f'<div class="examples">{"".join(_example(example, records) for example in finding.examples)}</div></article>'
    )


def _example(example: Example, records: Mapping[int, Record]) -> str:
    record = records.get(example.number)
    pictures = "".join(_picture(example.record, shown) for shown in thumbnails(record, example.image)) if record else ""
    place = f" #{example.image}" if example.image else ""
    note = f"<br>{esc(example.note)}" if example.note else ""
    wide = " wide" if len(example.note) > 90 else ""
    return (
        f'<figure class="example{wide}">{f"<div class=pictures>{pictures}</div>" if pictures else ""}'
        f"<figcaption><b>{esc(example.record or DASH)}{place}</b>{note}</figcaption></figure>"
    )


def _picture(name: str, shown: Thumbnail) -> str:
    if shown.kind == "mask":
        mark = bilingual("掩膜", "mask")
    else:
        mark = {0: bilingual("真实", "real"), 1: bilingual("伪造", "tampered")}.get(shown.label, "")  # type: ignore[arg-type]
    inside = (
        f'<img src="{shown.uri}" alt="{esc(name)}" loading="lazy">'
        if shown.uri
        else f'<div class="none">{bilingual("无法打开", "cannot be opened")}</div>'
    )
    return f"<span>{inside}{f'<em class=mark>{mark}</em>' if mark else ''}</span>"


def _leaks(audit: Audit) -> str:
    judged = sorted((leak for leak in audit.leaks if leak.auroc is not None), key=lambda leak: -(leak.auroc or 0))
    if not judged:
        return ""
    severities = {finding.subject: finding.severity for finding in audit.findings if finding.check.startswith("leak_")}
    threshold = float(audit.settings["leak_threshold"])
    rows = "".join(_leak_row(leak, severities.get(leak.feature, ""), threshold) for leak in judged)
    names = (
        ("线索", "clue"),
        ("类别", "kind"),
        ("AUROC", "AUROC"),
        ("95 % 区间", "95 % interval"),
        ("", ""),
        ("图像", "images"),
        ("说明", "seen"),
    )
    head = "".join(f"<th>{bilingual(*name)}</th>" for name in names)
    note = bilingual(
        "单一特征分类器在未见过的组上的 AUROC；区间下限超过红线即报告。0.5 为随机。",
        "AUROC of a classifier that sees this one feature, on groups it has not seen; reported when the lower bound is "
        "right of the red line. 0.5 is chance.",
    )
    return _table(head, rows) + f'<p class="note">{note}</p>'


def _leak_row(leak: Leak, severity: str, threshold: float) -> str:
    low = 0.0 if leak.low is None else leak.low
    high = 1.0 if leak.high is None else leak.high

    def x(value: float) -> float:
        return round(5 + 150 * value, 1)

    plot = (
        '<svg viewBox="0 0 160 18" aria-hidden="true"><path class="axis" d="M5 9H155"/>'
        f'<path class="chance" d="M{x(0.5)} 4V14"/><path class="limit" d="M{x(threshold)} 1V17"/>'
        f'<path class="range" d="M{x(low)} 9H{x(high)}"/>'
        f'<circle class="point" cx="{x(leak.auroc or 0)}" cy="9" r="4"/></svg>'
    )
    interval = f"{format_number(leak.low)} – {format_number(leak.high)}"
    return (
        f'<tr class="{severity}"><th>{bilingual(feature_name(leak, "zh"), feature_name(leak))}</th>'
        f"<td>{bilingual(*_FAMILIES[leak.family])}</td><td>{format_number(leak.auroc)}</td><td>{interval}</td>"
        f'<td class="plot">{plot}</td><td>{leak.num_images}</td><td class="text">{esc(leak.note)}</td></tr>'
    )


def _splits(counts: Mapping[str, Any]) -> str:
    names = (
        ("划分", "split"),
        ("记录", "records"),
        ("组", "groups"),
        ("真实图像", "real images"),
        ("伪造图像", "tampered images"),
        ("无标签图像", "images without label"),
    )
    head = "".join(f"<th>{bilingual(*name)}</th>" for name in names)
    keys = ("records", "groups", "real", "tampered", "unlabelled")
    rows = "".join(
        f"<tr><th>{esc(name)}</th>{''.join(f'<td>{split[key]}</td>' for key in keys)}</tr>"
        for name, split in counts["splits"].items()
    )
    return _table(head, rows)


def _table(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _masks(area: Mapping[str, Any]) -> str:
    images, edges = area["images"], area["edges"]
    if not any(images):
        return ""
    largest = max(images)
    rows = "".join(
        f"<span>{_percent(low)} – {_percent(high)}</span>"
        f'<i style="width:{100 * count / largest:.1f}%"></i><span>{count}</span>'
        for low, high, count in zip(edges[:-1], edges[1:], images, strict=True)
    )
    return f'<div class="bars">{rows}</div>'


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
