"""The pieces of HTML that the report is built from; they stand in `finetune.markup`, which every layer may use."""

from __future__ import annotations

from finetune.markup import (
    DASH,
    as_number,
    bilingual,
    data_uri,
    esc,
    format_number,
    format_seconds,
    svg_bilingual,
)

__all__ = [
    "DASH",
    "as_number",
    "bilingual",
    "data_uri",
    "esc",
    "format_number",
    "format_seconds",
    "svg_bilingual",
]
