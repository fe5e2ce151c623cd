"""Previewed records as one HTML file without any network: pictures with their masks, the conversation token by token.

Supervised text is green, forensic tokens are magenta; pointing at a piece shows its ids. The outline of the regions
that the answer writes, read back as the model's own answers are, lies over the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from finetune.data.masks import rasterize_polygons
from finetune.data.preview import ImageView, Piece, RecordView
from finetune.data.regions.text import REGIONS, record_regions
from finetune.errors import DataFormatError
from finetune.inference.pages.frame import page_html
from finetune.inference.pages.markup import bilingual, data_uri, esc
from finetune.inference.regions.pictures import DrawnRegion, draw_regions
from finetune.inference.visualization import TRUE_COLOR, draw_outline, overlay_mask
from finetune.schema import Polygon

_SIDE = 480
_LABELS = {0: ("真实", "real"), 1: ("伪造", "tampered"), None: ("未知", "unknown")}
_PAGE_CSS = """
.views{display:flex;flex-wrap:wrap;gap:14px;margin-bottom:8px}.views figure{margin:0;max-width:100%}
.views img{display:block;max-width:100%;border-radius:6px}.views .pair{display:flex;flex-wrap:wrap;gap:8px}
.views figcaption{color:var(--soft);font-size:.85rem;margin-top:3px;font-variant-numeric:tabular-nums}
.talk{max-height:none}.talk span{border-radius:3px}.talk span[title]:hover{outline:2px solid var(--accent)}
.s{background:#bdf0c6;color:#0b2e14}.f{background:#ffc6f3;color:#4a0840}.u{color:#b0259a;text-decoration:underline}
.i{color:var(--accent);font-weight:650}.legend .s,.legend .f,.legend .i{padding:0 7px;margin-right:8px}
.budget{display:flex;height:8px;border-radius:4px;overflow:hidden;background:var(--line);margin:4px 0 10px;
max-width:480px}
.budget b{display:block;height:100%}.budget .bi{background:var(--c1)}.budget .bs{background:#3fae5a}
.budget .bo{background:var(--soft)}
.problem{margin:6px 0 0;overflow-wrap:anywhere}.problem.error{color:var(--bad)}.problem.warning{color:var(--warn)}
main>.card{margin-top:14px}
"""


@dataclass(frozen=True)
class PreviewCard:
    """A record and, for each of its images, the regions its answer writes (pixels of the original image) or None."""

    view: RecordView
    written: Sequence[Sequence[Polygon] | None]


def preview_page(title: str, cards: Sequence[str]) -> str:
    """The whole page around what `card_html` gave."""
    legend = (
        '<p class="note legend">'
        f'<span class="s">{bilingual("参与训练的文字", "supervised")}</span>'
        f'<span class="f">{bilingual("取证标记", "forensic token")}</span>'
        f'<span class="i">{bilingual("图像标记", "image tokens")}</span>'
        f'<span class="swatch pred"></span>{bilingual("掩膜", "mask")}'
        f'<span class="swatch true"></span>{bilingual("回答中写出的区域", "regions the answer writes")}</p>'
    )
    return page_html(title, (), {}, legend + "".join(cards), _PAGE_CSS)


def card_html(card: PreviewCard, number: int, total: int) -> str:
    """One record; the `number`-th of `total`."""
    view = card.view
    record = view.record
    facts = [record.source, f"group {record.group}" if record.group else ""]
    facts += [f"{key} {value}" for key, value in record.provenance.items() if isinstance(value, (str, int, float))]
    figures = "".join(_figure(image, written) for image, written in zip(view.images, card.written, strict=True))
    figures += _candidates(view)
    talk = "".join(map(_span, view.pieces))
    problems = "".join(
        f'<p class="problem {problem.severity}">{esc(problem.severity)}: {esc(problem.message)}</p>'
        for problem in view.problems
    )
    return (
        f'<article class="card{" bad" if view.has_errors else ""}"><header><h3>{esc(record.id)}</h3>'
        f'<span class="badge">{number} / {total}</span></header>'
        f'<p class="note">{esc(" · ".join(fact for fact in facts if fact))}</p>{problems}{_counts(view)}'
        f'<div class="views">{figures}</div>{f"<pre class=talk>{talk}</pre>" if talk else ""}</article>\n'
    )


def _counts(view: RecordView) -> str:
    if not view.pieces:
        return ""
    images = view.num_image_tokens
    if not view.has_ids:
        return f'<p class="note">{bilingual(f"图像标记 {images}", f"{images} image tokens")}</p>'
    total, taught, limit = view.num_tokens, view.num_supervised, view.max_length
    zh = f"{total} / {limit} 个标记：参与训练 {taught}，图像 {images}"
    en = f"{total} of {limit} tokens: {taught} supervised, {images} image"
    whole = max(limit, total)
    bars = "".join(
        f'<b class="{name}" style="width:{100 * part / whole:.2f}%"></b>'
        for name, part in (("bi", images), ("bs", taught), ("bo", total - images - taught))
    )
    return f'<p class="note">{bilingual(zh, en)}</p><div class="budget">{bars}</div>'


def _figure(image: ImageView, written: Sequence[Polygon] | None) -> str:
    pictures = [_picture(image, None)]
    if (image.mask is not None and image.mask.any()) or written:
        pictures.append(_picture(image, written or ()))
    own = image.frame.original_hw
    zh, en = _LABELS[image.label]
    share = image.tampered_share
    mask_zh, mask_en = ("无掩膜", "no mask") if share is None or image.mask is None else (
        f"掩膜 {100 * share:.2f} %（{image.mask.shape[0]}x{image.mask.shape[1]}）",
        f"mask {100 * share:.2f} % of {image.mask.shape[0]}x{image.mask.shape[1]}",
    )  # fmt: skip
    caption = bilingual(
        f"{own[0]}x{own[1]} → {image.seen}（高x宽），{image.num_tokens} 个标记；标签：{zh}；{mask_zh}",
        f"{own[0]}x{own[1]} → {image.seen} (HxW), {image.num_tokens} tokens; label: {en}; {mask_en}",
    )
    return f'<figure><div class="pair">{"".join(pictures)}</div><figcaption>{caption}</figcaption></figure>'


def _candidates(view: RecordView) -> str:
    """The image with its candidate regions as they are labelled: id, and type of an abnormal one; "" without any."""
    try:
        regions = record_regions(view.record)
    except DataFormatError:
        return ""  # one of the problems above
    if regions is None or not view.images:
        return ""
    types = [entry.get("type") for entry in view.record.provenance[REGIONS]]
    drawn = [
        DrawnRegion(name if kind is None else f"{name} {kind}", box, "tn" if kind is None else "tp")
        for (name, box), kind in zip(regions, types, strict=True)
    ]
    picture = draw_regions(view.images[0].image, drawn, _SIDE, with_marks=False)
    caption = bilingual("候选区域：实线有缺陷，点线没有", "candidate regions: solid with a defect, dotted without")
    source = data_uri(picture, 88)
    return (
        f'<figure><div class="pair"><img src="{source}" width="{picture.width}" alt="candidate regions"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _picture(image: ImageView, written: Sequence[Polygon] | None) -> str:
    """The image at display size; with `written`, the mask in red and those regions' outline in cyan."""
    height, width = image.frame.original_hw
    scale = min(_SIDE / max(height, width), 4.0)
    size_wh = max(1, round(width * scale)), max(1, round(height * scale))
    kind = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    shown = np.asarray(image.image.resize(size_wh, kind))  # (h, w, 3)
    if written is not None:
        if image.mask is not None:
            marked = cv2.resize(image.mask, size_wh, interpolation=cv2.INTER_NEAREST).astype(bool)
            shown = overlay_mask(shown, marked)
        scaled = [tuple((x * size_wh[0] / width, y * size_wh[1] / height) for x, y in region) for region in written]
        outline = rasterize_polygons(scaled, size_wh[::-1]).astype(bool)
        shown = draw_outline(shown, outline, TRUE_COLOR)
    alt = "image" if written is None else "image with mask"
    return f'<img src="{data_uri(Image.fromarray(shown), 88)}" width="{size_wh[0]}" alt="{alt}">'


def _span(piece: Piece) -> str:
    look = "i" if piece.kind == "image" else "s" if piece.is_supervised else ""
    if piece.kind == "forensic":
        look = "f" if piece.is_supervised else "u"
    if piece.kind == "image" and piece.ids:
        title = f"{piece.ids[0]} x {len(piece.ids)}"
    else:
        title = " + ".join(map(str, piece.ids))
    attributes = (f' class="{look}"' if look else "") + (f' title="{title}"' if title else "")
    text = esc(piece.text).replace("\n", "⏎\n" if piece.is_supervised else "\n")
    return f"<span{attributes}>{text}</span>"
