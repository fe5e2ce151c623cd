"""Format `reports`: rows of an inspection table become records of one photograph, a question and the written report.

Every problem of a row is told at once, by line and column; images are looked for, not opened. The fields stay in
`provenance.report`, as the truth that a model's reports are compared with.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.readers.common import Item
from finetune.data.readers.options import Options
from finetune.data.readers.table import check_width, iter_rows
from finetune.data.reports.settings import ReportSettings, report_settings
from finetune.data.reports.template import ReportTemplate, load_report_template
from finetune.errors import ConfigError, DataFormatError, shorten
from finetune.schema import ImageInput, ImageTarget, Record, Turn

PROVENANCE = "report"
"""Key of `Record.provenance` that holds the fields of the report, without those that are unknown."""


@dataclass(frozen=True)
class _Table:
    """How one file is read: settings, template, the header and the place of each column that is used."""

    settings: ReportSettings
    template: ReportTemplate
    header: Sequence[str]
    places: Mapping[str, int]

    def cell(self, row: Sequence[str], column: str | None) -> str:
        """The stripped cell, "" where the table has no such column."""
        return "" if column is None or column not in self.places else row[self.places[column]].strip()


def read_reports(path: Path, root: str, options: Options) -> Iterator[tuple[str, str, Record | DataFormatError]]:
    """(line, source, record or everything that is wrong with the row) of every row that is not blank.

    Args:
        root: image paths are relative to it, or, where they begin with its name, to its parent.
        options: those of `ReportSettings`.

    Raises:
        DataFormatError: no file, unknown encoding, a column that is not there, settings or template of no use.
    """
    try:
        settings = report_settings(options.values, path.name)
        template = load_report_template(settings.template, list(settings.fields))
    except ConfigError as error:
        raise DataFormatError(f"settings of the reports cannot be used ({error})", source=path.name) from error
    rows = iter_rows(path, options, [settings.image_column])
    first = next(rows, None)
    if first is None:
        return
    assert not isinstance(first[2], DataFormatError)
    header = [cell.strip() for cell in first[2]]
    table = _Table(settings, template, header, _places(header, settings, path.name))
    for line, source, row in rows:
        if isinstance(row, DataFormatError):
            yield line, source, row
            continue
        try:
            yield line, source, _read_row(row, table, Item({}, f"{path.stem}:{line}", source, root))
        except DataFormatError as error:
            yield line, source, error


def report_values(record: Record) -> dict[str, str] | None:
    """The true fields of a record that was read from a table of reports; None for any other record."""
    values = record.provenance.get(PROVENANCE)
    return {str(name): str(value) for name, value in values.items()} if isinstance(values, Mapping) else None


def _places(header: Sequence[str], settings: ReportSettings, name: str) -> dict[str, int]:
    wanted = {"image_column": settings.image_column}
    wanted |= {
        key: column
        for key, column in (("id_column", settings.id_column), ("group_column", settings.group_column))
        if column is not None
    }
    wanted |= {f"fields.{field}": column for field, column in settings.fields.items()}
    places = {}
    for key, column in wanted.items():
        if header.count(column) == 1:
            places[column] = header.index(column)
        elif column in header or key.removeprefix("fields.") not in settings.optional:
            near = _nearest(column, [each for each in header if each not in wanted.values()])
            raise DataFormatError(
                "column stands twice" if column in header else "column not in the table",
                source=name,
                field=column,
                found=list(header),
                expected=f"the column of table.{key}",
                fix=f"set table.{key}: {near or 'NAME'}, or rename the column",
            )
    return places


def _nearest(column: str, header: Sequence[str]) -> str:
    """The column of a table that may be meant, one of the same letters first; "" where none is near."""
    plain = {unicodedata.normalize("NFKC", each).casefold(): each for each in reversed(header)}
    near = difflib.get_close_matches(unicodedata.normalize("NFKC", column).casefold(), plain, n=1)
    return plain[near[0]] if near else ""


def _read_row(row: list[str], table: _Table, item: Item) -> Record:
    settings = table.settings
    check_width(row, table.header, item.record_id, item.source)
    record_id = table.cell(row, settings.id_column) or item.record_id
    item = Item({}, record_id, item.source, item.root)
    problems: list[DataFormatError] = []
    values = _values(row, table, item, problems)
    image = _image_path(table.cell(row, settings.image_column), settings.image_column, item, problems)
    if not problems and table.template.parse(table.template.render(values)).fields != _written(values, table.template):
        problems.append(
            item.error(
                "report could not be read back: a cell holds the words before another field",
                found=values,
                fix="change the cell or the template",
            )
        )
    if problems:
        raise _joined(problems, item)
    return Record(
        id=record_id,
        images=(ImageInput(path=image),),
        targets=(ImageTarget(),),
        turns=(Turn("user", table.template.question(record_id)), Turn("assistant", table.template.render(values))),
        group=table.cell(row, settings.group_column) or _own_group(table.cell(row, settings.image_column)),
        source=item.source,
        provenance={PROVENANCE: values},
    )


def _own_group(cell: str) -> str:
    """Rows of one picture belong together, and splits do not depend on where the folder lies."""
    return "image:" + cell.replace("\\", "/") if cell else ""


def _values(row: list[str], table: _Table, item: Item, problems: list[DataFormatError]) -> dict[str, str]:
    """Field -> text of the fields that are known; what is wrong with the others goes to `problems`."""
    settings = table.settings
    values: dict[str, str] = {}
    for name, column in settings.fields.items():
        text = table.cell(row, column)
        if not text:
            if name not in settings.optional:
                problems.append(item.error("empty cell", field=column, fix=f"fill it in, or add '{name}' to optional"))
            continue
        if name == settings.level_field:
            text, given = canonical_level(text, settings), text
            if text not in settings.levels:
                near = difflib.get_close_matches(given, settings.levels, n=1, cutoff=0.4)
                problems.append(
                    item.error(
                        "unknown risk level",
                        field=column,
                        found=given,
                        expected=", ".join(settings.levels),
                        fix=f"correct it, or set table.level_map: {{{given}: {near[0] if near else 'LEVEL'}}}",
                    )
                )
                continue
        values[name] = text
    return values


def canonical_level(text: str, settings: ReportSettings) -> str:
    """A level as `levels` spells it, through `level_map` and with full-width forms made plain; other words stay."""
    text = settings.level_map.get(text, text)
    plain = unicodedata.normalize("NFKC", text).strip()
    return settings.level_map.get(plain, plain)


def _image_path(text: str, column: str, item: Item, problems: list[DataFormatError]) -> str:
    """The image file that a cell names."""
    if not text:
        problems.append(item.error("row without an image", field=column, fix="name the image, or remove the row"))
        return ""
    text = text.replace("\\", "/")  # paths written on Windows
    try:
        path = item.path(text, column)
    except DataFormatError as error:
        problems.append(error)
        return ""
    if os.path.isfile(path):
        return path
    folder = os.path.abspath(item.root)
    if text.removeprefix("./").startswith(os.path.basename(folder) + "/"):  # --images names the folder of the paths
        beside = os.path.join(os.path.dirname(folder), os.path.normpath(text))
        if os.path.isfile(beside):
            return beside
    problems.append(
        item.error(
            "image file does not exist",
            field=column,
            found=text,
            expected=f"a file below {item.root}",
            fix="correct the path, or give the folder that paths are relative to",
        )
    )
    return ""


def _written(values: Mapping[str, str], template: ReportTemplate) -> dict[str, str]:
    return {name: values.get(name, template.unknown) for name in template.fields}


def _joined(problems: list[DataFormatError], item: Item) -> DataFormatError:
    """One error for all problems of a row."""
    if len(problems) == 1:
        return problems[0]
    told = []
    for each in problems:
        found = "" if each.found is None else f" {shorten(each.found)}"
        told.append(f"{each.problem}{found} in column '{each.field}'" if each.field else f"{each.problem}{found}")
    fixes = dict.fromkeys(each.fix for each in problems if each.fix)
    return item.error(f"{len(problems)} problems: {'; '.join(told)}", fix="; ".join(fixes))
