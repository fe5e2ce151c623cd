"""A model's inspection reports for images: what is asked, the written text, and its fields read back.

Inputs are images, folders, lists of images, and tables or stored sets, whose true reports are kept apart from what the
model is asked. No forensic token and no head has a part in it. An image that cannot be used becomes an answer that
holds its error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from finetune.data.chat import question_turns
from finetune.data.dataset import processed_sizes
from finetune.data.images import load_image
from finetune.data.readers import iter_records
from finetune.data.reports.settings import ReportSettings
from finetune.data.reports.table import canonical_level, report_values
from finetune.data.reports.template import ParsedReport, ReportTemplate
from finetune.data.storage import is_stored
from finetune.data.template import Template
from finetune.errors import DataFormatError
from finetune.inference.commands import find_images
from finetune.inference.evidence.prefetch import prefetch
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query, batched
from finetune.schema import ImageInput, Record, Turn

_TABLES = (".csv", ".tsv")
_DATA = (*_TABLES, ".json", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class ReportQuery:
    """One image to write a report for.

    Args:
        query: what the model gets.
        source: `file:line` it came from, "" for an image given by itself.
        truth: fields of the true report, None where there is none.
        error: why there is nothing to ask: a row that cannot be used.
    """

    query: Query
    source: str = ""
    truth: dict[str, str] | None = None
    error: DataFormatError | None = None


@dataclass(frozen=True)
class WrittenReport:
    """What the model wrote about one image.

    Args:
        asked: the query it answers.
        text: as written, "" where there is an `error`.
        parsed: its fields.
        error: why the image could not be used.
    """

    asked: ReportQuery
    text: str
    parsed: ParsedReport
    error: DataFormatError | None = None


def report_queries(
    inputs: Sequence[str], images_dir: str | None, settings: ReportSettings, template: ReportTemplate, chat: Template
) -> list[ReportQuery]:
    """Everything the inputs name, in order; nothing is decoded.

    Args:
        inputs: images, folders, `.txt` lists (a path per line, relative to the list), tables and stored sets.
        images_dir: root of a table's image paths; default: its folder.
        template: its first question is asked about images; records keep their own.
        chat: of the model, for records whose conversation has no question.

    Raises:
        DataFormatError: an input that is not there, or without anything in it.
    """
    found: list[ReportQuery] = []
    for text in inputs:
        path = Path(text)
        if path.suffix.lower() in _DATA or is_stored(path):
            found += _from_data(path, images_dir, settings, template, chat)
        elif path.suffix.lower() == ".txt":
            found += _from_list(path, template)
        else:
            found += [_about(image, template) for image in find_images([text])]
    return found


def write_reports(
    predictor: Predictor, template: ReportTemplate, queries: Sequence[ReportQuery]
) -> Iterator[WrittenReport]:
    """One report for each query, in order; images are opened ahead by two threads.

    Decoding is as `predictor.generation` says; greedy by default, so the same images give the same reports.
    """

    def opened(asked: ReportQuery) -> Image.Image:
        if asked.error is not None:
            raise asked.error
        picture = load_image(asked.query.images[0], asked.query.id, asked.source or None)
        processor = predictor.bundle.processor.image_processor
        processed_sizes([(picture.height, picture.width)], processor, asked.query.id, asked.source or None)
        return picture

    nothing = template.parse("")
    for batch in batched(prefetch(queries, opened, workers=2), predictor.generation.batch_size):
        usable = [(asked.query, [found]) for asked, found in batch if not isinstance(found, DataFormatError)]
        texts = iter(predictor.write([query for query, _ in usable], [found for _, found in usable]) if usable else [])
        for asked, found in batch:
            if isinstance(found, DataFormatError):
                yield WrittenReport(asked, "", nothing, found)
            else:
                text = next(texts).strip()
                yield WrittenReport(asked, text, template.parse(text))


def _from_data(
    path: Path, images_dir: str | None, settings: ReportSettings, template: ReportTemplate, chat: Template
) -> Iterator[ReportQuery]:
    is_table = path.suffix.lower() in _TABLES
    entries = (
        iter_records(path, "reports", images_dir, asdict(settings))
        if is_table
        else iter_records(path, "auto", images_dir)
    )
    for number, entry in enumerate(entries):
        if isinstance(entry, DataFormatError):
            if number == 0 and entry.record is None and entry.source == path.name:
                raise entry  # the file as a whole, not one of its rows
            nobody = Query(entry.record or f"{path.name}:{number}", (), ())
            yield ReportQuery(nobody, entry.source or path.name, error=entry)
            continue
        if len(entry.images) != 1:
            problem = DataFormatError(
                f"a report is about one image, this record has {len(entry.images)}",
                record=entry.id,
                source=entry.source,
            )
            yield ReportQuery(Query(entry.id, (), ()), entry.source, error=problem)
            continue
        turns = question_turns(entry, chat) if entry.turns else (Turn("user", template.question()),)
        yield ReportQuery(Query(entry.id, entry.images, turns), entry.source, _truth(entry, settings, template))


def _truth(record: Record, settings: ReportSettings, template: ReportTemplate) -> dict[str, str] | None:
    """The true fields: those of the table, or those read back from the record's own answer.

    Raises:
        DataFormatError: a level that is none of `levels`.
    """
    values = report_values(record)
    if values is None:
        answer = next((turn.content for turn in reversed(record.turns) if turn.role == "assistant"), "")
        fields = template.parse(answer).fields
        values = {name: text for name, text in fields.items() if text and text != template.unknown}
    level = values.get(settings.level_field or "")
    if level is not None:
        values[settings.level_field or ""] = level = canonical_level(level, settings)
        if level not in settings.levels:
            raise DataFormatError(
                "unknown risk level in the true report",
                record=record.id,
                source=record.source,
                field=settings.level_field,
                found=level,
                expected=", ".join(settings.levels),
                fix=f"set table.level_map: {{{level}: LEVEL}}",
            )
    return values or None


def _from_list(path: Path, template: ReportTemplate) -> Iterator[ReportQuery]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataFormatError("list of images not found", found=str(path), fix="check the path") from error
    except UnicodeDecodeError as error:
        raise DataFormatError("list of images is not UTF-8", source=path.name, fix="save it as UTF-8") from error
    named = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
    if not named:
        raise DataFormatError("list names no image", source=path.name, expected="one path per line")
    for number, line in named:
        yield _about(str(path.parent / line), template, f"{path.name}:{number}")


def _about(path: str, template: ReportTemplate, source: str = "") -> ReportQuery:
    return ReportQuery(Query(path, (ImageInput(path=path),), (Turn("user", template.question()),)), source)
