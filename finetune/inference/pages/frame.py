"""The frame of every page: one self-contained HTML file with heading, links, facts, and the style and script of all.

No file beside it, no network, no library: pictures are data URIs, charts inline SVG. Chinese and English.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.inference.pages.assets import CSS, SCRIPT
from finetune.inference.pages.markup import DASH, as_number, bilingual, esc, format_number, format_seconds

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
    "seconds": ("评测用时", "Evaluated in"),
    "versions": ("版本", "Versions"),
    "trained_commit": ("训练代码提交", "Commit of the training"),
    "data_hash": ("数据哈希", "Data hash"),
    "seen_in_training": ("训练时见过这些数据", "Data seen in training"),
    "layout": ("回答布局", "Answer layout"),
    "tta": ("测试时增强", "Test-time augmentation"),
    "thresholds": ("阈值", "Thresholds"),
    "calibration": ("分数校准", "Calibration of scores"),
    "script": ("对话脚本", "Script"),
}

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page_html(
    title: str, links: Sequence[tuple[str, str, str]], facts: Mapping[str, Any], body: str, css: str = ""
) -> str:
    """A whole page: heading, links, facts, and what stands below them.

    Args:
        links: anchor, Chinese and English name of the sections; none for a page without.
        facts: name to value; see `_FACTS` for those that have names in both languages.
        body: HTML of the sections.
        css: rules put behind those of all pages.
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
    shown_nav = f"<nav>{nav}</nav>" if nav else ""
    ordered = [key for key in _FACTS if key in facts] + [key for key in facts if key not in _FACTS]
    rows = "".join(
        f"<div{_wide(facts[key])}><dt>{bilingual(*_FACTS.get(key, (key, key)))}</dt>"
        f"<dd>{_fact(key, facts[key])}</dd></div>"
        for key in ordered
    )
    return (
        f'<header class="page"><div class="bar"><h1>{esc(title)}</h1>{shown_nav}'
        '<div class="languages" role="group" aria-label="language">'
        '<button type="button" data-lang="zh" lang="zh">中文</button>'
        '<button type="button" data-lang="en" lang="en">EN</button></div></div>'
        + (f'<dl class="run">{rows}</dl>' if rows else "")
        + "</header>"
    )


def _fact(key: str, value: Any) -> str:
    number = as_number(value)
    if value is None or (isinstance(value, float) and number is None):
        return DASH
    if key == "seconds" and number is not None:
        return esc(format_seconds(number))
    if isinstance(value, bool):
        return bilingual("是", "yes") if value else bilingual("否", "no")
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
