"""Small pieces of HTML that every part of the report uses: escaping, bilingual labels, numbers, pictures as data URIs.

Everything that comes from data goes through `esc`; only the functions of the report modules write tags.
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
