"""Small pieces of HTML that every page of the project uses: escaping, bilingual labels, numbers, pictures as data URIs.

Everything that comes from data goes through `esc`; only the modules that build pages write tags. `BASE_CSS` follows the
system's light or dark scheme; `LANGUAGE_SCRIPT` switches between Chinese and English. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import base64
import html
import io
import math
from numbers import Real
from typing import Any

from PIL import Image

DASH = "–"
"""Stands for a value that is missing or not a number."""


def esc(value: object) -> str:
    """HTML-escape the text of any value, quotes included, so it may stand in an attribute."""
    return html.escape(str(value), quote=True)


def bilingual(zh: str, en: str) -> str:
    """Both wordings of one label; the page's language switch hides one of them, without JavaScript both show."""
    if zh == en:
        return esc(zh)
    return f'<span class="zh" lang="zh">{esc(zh)}</span><i class="sep"> </i><span class="en" lang="en">{esc(en)}</span>'


def svg_bilingual(zh: str, en: str) -> str:
    """`bilingual` for the inside of an SVG <text>."""
    return f'<tspan class="zh">{esc(zh)}</tspan> <tspan class="en">{esc(en)}</tspan>'


def as_number(value: Any) -> float | None:
    """A finite float, or None for everything that is not one (None, NaN, text, bool)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def format_number(value: Any, digits: int = 3) -> str:
    """Fixed digits for measures, no digits for counts, a dash for what is missing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    number = as_number(value)
    return DASH if number is None else f"{number:.{digits}f}"


def format_seconds(seconds: float) -> str:
    """`48.2 s`, `12 min 05 s` or `3 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def data_uri(image: Image.Image, quality: int | None) -> str:
    """A picture as `data:` URI: JPEG at `quality`, or PNG where quality is None (masks of few colours).

    JPEG keeps full colour resolution, for the thin outlines. No `optimize` with it: Pillow then reserves a byte a pixel
    and fails on noise with "broken data stream".
    """
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.convert("RGB").save(buffer, format="JPEG", quality=quality, subsampling=0)
    kind = "png" if quality is None else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


BASE_CSS = """
:root{--bg:#f4f6f8;--card:#fff;--ink:#1b2430;--soft:#566273;--line:#dfe4ea;--accent:#1f63d0;--ok:#17703f;--okbg:#e2f4e9;
--bad:#b3261e;--badbg:#fce8e6;--warn:#8a5200;--c1:#1f63d0;--c2:#d2481c;--c3:#7a3fc4;--c4:#14866d;--tile:#f8fafc}
@media (prefers-color-scheme:dark){:root{--bg:#0f1319;--card:#181e27;--ink:#e7ecf2;--soft:#a2aebd;--line:#2b3442;
--accent:#7db0ff;--ok:#7fd8a4;--okbg:#123524;--bad:#ff9d94;--badbg:#43191a;--warn:#f0b860;--c1:#7db0ff;--c2:#ff9466;
--c3:#c39bff;--c4:#5fd3b8;--tile:#1d2530}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:64px;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"PingFang SC","Hiragino Sans GB","Microsoft YaHei","Noto Sans CJK SC","WenQuanYi Zen Hei",sans-serif}
i{font-style:normal}
.lang-zh .en,.lang-en .zh,.lang-zh .sep,.lang-en .sep{display:none}
header.page{background:var(--card);border-bottom:1px solid var(--line)}
.bar{max-width:1240px;margin:auto;padding:14px 20px 6px;display:flex;flex-wrap:wrap;gap:8px 22px;align-items:center}
h1{font-size:1.4rem;line-height:1.25;margin:0;flex:1 1 280px;overflow-wrap:anywhere}
nav{display:flex;gap:14px}nav a{color:var(--accent);text-decoration:none}nav a:hover{text-decoration:underline}
button,select{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:5px 11px;cursor:pointer}
button:hover,select:hover{border-color:var(--accent)}
button[aria-pressed=true]{background:var(--accent);border-color:var(--accent);color:var(--card)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.languages{display:flex}.languages button{padding:3px 10px;border-radius:0}
.languages button:first-child{border-radius:8px 0 0 8px}
.languages button:last-child{border-radius:0 8px 8px 0;border-left:0}
dl{margin:0}
dl.run{max-width:1240px;margin:auto;padding:4px 20px 16px;display:grid;gap:8px 26px;
grid-template-columns:repeat(auto-fill,minmax(190px,1fr))}
dl.run .wide{grid-column:1/-1}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;overflow-wrap:anywhere}dl.run b{font-weight:600}
main{max-width:1240px;margin:auto;padding:6px 20px 60px}
section{margin-top:26px}h2{font-size:1.12rem;margin:0 0 12px}
.note,.empty{color:var(--soft);font-size:.87rem;margin:8px 2px}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));margin-bottom:14px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px}
.tile>span{color:var(--soft);font-size:.87rem}
.tile b{display:block;font-size:2rem;line-height:1.2;font-weight:650;letter-spacing:-.01em;
font-variant-numeric:tabular-nums}
.tile small{display:block;color:var(--soft);font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:12px}
"""
"""Colours, headings, language switch, tiles and scrolling tables of a page; put first, more rules may follow."""

LANGUAGE_SCRIPT = """
var root=document.documentElement,all=function(q){return Array.prototype.slice.call(document.querySelectorAll(q))};
function speak(lang){root.className='lang-'+lang;root.lang=lang;
 all('[data-lang]').forEach(function(b){b.setAttribute('aria-pressed',b.dataset.lang===lang)})}
all('[data-lang]').forEach(function(b){b.onclick=function(){speak(b.dataset.lang)}});
speak(/^zh/i.test(navigator.language||'zh')?'zh':'en');
"""
"""Inside a function: `all(selector)`, and the buttons with `data-lang` made to work."""
