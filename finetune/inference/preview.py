"""`forensics preview`: a few records as training sees them, on the terminal and as an HTML page.

Reads processor and settings of a configuration or of a trained folder, never weights; without either it shows text.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from finetune.config import DataConfig, RunConfig, load_config
from finetune.data.dataset import ForensicDataset
from finetune.data.image_frame import set_frame
from finetune.data.preview import RecordView, choose, view_record, without_tokenizer
from finetune.data.preview_text import Depth, Style, legend, record_text
from finetune.data.readers import iter_records
from finetune.data.readers.options import options_from
from finetune.data.regions.limit import limit_regions
from finetune.data.template import Template, template_problem
from finetune.errors import ConfigError
from finetune.inference.answers import read_answers
from finetune.inference.preview_page import PreviewCard, card_html, preview_page
from finetune.inference.replacing import is_page, refuse_foreign, refuse_inputs
from finetune.models.loading import load_vocabulary, saved_settings
from finetune.schema import Polygon
from finetune.special_tokens import SpecialTokens

_DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv")


def preview_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics preview`; exit status 1 where a shown record, or a row of the file, cannot be used."""
    logger = logging.getLogger("finetune")
    level = logger.level
    logger.setLevel(logging.ERROR)  # warnings stand below the records they are about
    try:
        return _preview(arguments)
    finally:
        logger.setLevel(level)


def _preview(arguments: argparse.Namespace) -> int:
    config, processor, tokens, template, notes = rendering(arguments)
    path = data_path(arguments.data, arguments.split)
    found = iter_records(path, arguments.format, arguments.data_root, options_from(arguments.option))
    records, errors, num_errors = choose(found, arguments.num, arguments.id or (), arguments.seed)
    if not records and num_errors == 1:  # no such file, not one of its formats, ...
        raise errors[0]
    records = limit_regions(records, config.max_regions).records
    dataset = ForensicDataset(records, processor, tokens, config)
    if template is not None:
        dataset.template = template
    if arguments.html:
        refuse_inputs(arguments.html, "--html", [arguments.data])
        refuse_foreign(arguments.html, "--html", is_page, "page")
    printer = Printer(arguments.width, arguments.no_color)
    printer.print("\n".join([*notes, legend(printer.style)]))
    cards: list[str] = []
    has_errors = num_errors > 0
    for number in range(1, len(records) + 1):  # one after the other: decoded images are large
        view = view_record(dataset, number - 1)
        has_errors |= view.has_errors
        printer.print("\n" + record_text(view, printer.style, f"{number}/{len(records)}  "))
        if arguments.html:
            cards.append(card_html(PreviewCard(view, written_regions(view, dataset)), number, len(records)))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if num_errors:
        print(f"rows that cannot be read: {num_errors}; forensics doctor --data lists them all", file=sys.stderr)
    if arguments.html:
        Path(arguments.html).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.html).write_text(preview_page(Path(arguments.data).name, cards), encoding="utf-8")
        print(f"wrote {arguments.html}", file=sys.stderr)
    return 1 if has_errors else 0


def rendering(
    arguments: argparse.Namespace,
) -> tuple[DataConfig, Any, SpecialTokens, Template | None, list[str]]:
    """How records become tokens under --config, --model or neither.

    Returns:
        Data settings, processor (without tokenizer where there is none), forensic tokens, the template that a trained
        folder brings along (None: the settings name it), and remarks for the reader.

    Raises:
        ConfigError: both given, or a configuration that cannot be read. ModelLoadError: no tokenizer in the folder.
    """
    if arguments.config and arguments.model:
        raise ConfigError("--config and --model both say how records are rendered; give one of them")
    config: RunConfig = load_config(arguments.config, arguments.overrides)
    tokens = SpecialTokens(config.tokens.num_cls, config.tokens.num_mask)
    data = config.data
    template = None
    if arguments.model:
        processor, tokens, _ = load_vocabulary(arguments.model, tokens)
        stored = saved_settings(arguments.model)
        known = {key: stored[key] for key in ("layout", "polygon_coordinates") if key in stored}
        data = dataclasses.replace(data, **known)
        template = Template.from_dict(stored["template"]) if "template" in stored else None
        notes = [f"as {arguments.model} was trained"]
    elif arguments.config:
        processor, tokens, _ = load_vocabulary(config.model.path, tokens, data.min_pixels, data.max_pixels)
        set_frame(processor.image_processor, data.image_short_side, data.image_padding)
        notes = [f"as {arguments.config} trains it"]
    else:
        processor = without_tokenizer(data)
        notes = ["no tokenizer: give --config YAML or --model DIR to see tokens and their number"]
    dataset = ForensicDataset([], processor, tokens, data)
    problem = template_problem(template or dataset.template, data.layout) if config.heads.enabled else None
    return data, processor, tokens, template, notes + ([f"error: {problem}"] if problem else [])


def data_path(path: str, split: str | None) -> str:
    """The data file, or with `split` that split of a folder: FOLDER/SPLIT.jsonl and the like, or of a stored set.

    Raises:
        ConfigError: a split of something that is no folder.
    """
    if split is None:
        return path
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"--split {split} needs a folder, found {path}; leave it out, or name the data file itself")
    files = [folder / f"{split}{suffix}" for suffix in _DATA_SUFFIXES]
    return str(next((file for file in files if file.is_file()), folder / split))


def written_regions(view: RecordView, dataset: ForensicDataset) -> list[tuple[Polygon, ...] | None]:
    """The regions a rendered answer writes, read back into each original image; None for a conversation of the user's.

    The reader is the one that a model's own answers go through.
    """
    nothing: list[tuple[Polygon, ...] | None] = [None] * len(view.images)
    if view.record.turns or not view.images:
        return nothing
    text = dataset.tokens.strip(view.supervised_text).removesuffix("<|im_end|>")
    answers = read_answers(text, dataset.template, len(view.images), [image.frame for image in view.images])
    return nothing if answers is None else [answer.polygons for answer in answers]


def style_of(stream: Any, width: int | None, no_color: bool) -> Style:
    """What a stream can show: colour on a terminal unless NO_COLOR, --no-color or TERM=dumb say otherwise."""
    columns = width or shutil.get_terminal_size((100, 24)).columns
    marks = ("⟦", "⟧") if _can_write(stream, "⟦⟧─⏎…") else ("[[", "]]")
    is_plain = no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if is_plain or not stream.isatty() or not _can_write(stream, "▀"):
        return Style(columns, "none", marks)
    depth: Depth = "truecolor" if os.environ.get("COLORTERM") in ("truecolor", "24bit") else "256"
    return Style(columns, depth, marks)


class Printer:
    """Standard output, in the style it can show; silent once nobody reads it any more (`| head`)."""

    def __init__(self, width: int | None, no_color: bool) -> None:
        self.style = style_of(sys.stdout, width, no_color)
        if not _can_write(sys.stdout, "▀中"):
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    def print(self, text: str) -> None:
        """Write text and a line break."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _can_write(stream: Any, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
