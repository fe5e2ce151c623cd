"""The wording of reports: a template file with one placeholder per field, filled in for training and read back later.

A field is found by the words before its placeholder (its mark), in any order, so that a report that lacks one still
gives the others. Nothing is repaired: a mark that is not there is a missing field.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from finetune.data.template_files import read_template_file
from finetune.errors import ConfigError, shorten
from finetune.special_tokens import IMAGE_PLACEHOLDER

_PLACEHOLDER = re.compile(r"\{([^{}\n]*)\}")
_KEYS = {"questions", "unknown", "answer"}


@dataclass(frozen=True)
class ParsedReport:
    """A report that was read back.

    Args:
        fields: those whose mark was found, stripped.
        missing: those whose mark was not, in the template's order.
        is_exact: the text is what the template makes of these fields, to the character.
    """

    fields: dict[str, str]
    missing: tuple[str, ...]
    is_exact: bool


@dataclass(frozen=True)
class ReportTemplate:
    """Questions and the answer with its placeholders; `load_report_template` checks them."""

    name: str
    questions: tuple[str, ...]
    unknown: str
    answer: str

    @cached_property
    def _pieces(self) -> tuple[str, ...]:
        """text, field, text, ..., text"""
        return tuple(_PLACEHOLDER.split(self.answer))

    @property
    def fields(self) -> tuple[str, ...]:
        """The placeholders in the order of the answer."""
        return self._pieces[1::2]

    def question(self, key: str = "") -> str:
        """A question with its `<image>`; `key` picks the phrasing ("" the first), the same one for the same key."""
        return self.questions[zlib.crc32(key.encode()) % len(self.questions) if key else 0]

    def render(self, values: Mapping[str, str]) -> str:
        """The report of these values; a field that is absent or empty is written as unknown."""
        texts = list(self._pieces)
        texts[1::2] = [values.get(name) or self.unknown for name in self.fields]
        return "".join(texts)

    def parse(self, text: str) -> ParsedReport:
        """The fields of a written report; whatever is not found is listed as missing.

        Where a mark stands several times the first one counts.
        """
        text = text.strip()
        found = sorted((match.start(), match.end(), name) for name, match in self._marks_in(text))
        fields: dict[str, str] = {}
        tail = self._pieces[-1].strip()
        for index, (_, start, name) in enumerate(found):
            end = found[index + 1][0] if index + 1 < len(found) else len(text)
            value = text[start:end].strip()
            if name == self.fields[-1] and tail:
                value = value.removesuffix(tail).rstrip()
            fields.setdefault(name, value)
        missing = tuple(name for name in self.fields if name not in fields)
        return ParsedReport(fields, missing, not missing and self.render(fields) == text)

    @cached_property
    def marks(self) -> dict[str, str]:
        """Field -> the words before its placeholder, stripped."""
        return {name: before.strip() for before, name in zip(self._pieces[::2], self.fields, strict=False)}

    def _marks_in(self, text: str) -> list[tuple[str, re.Match[str]]]:
        return [(name, match) for name, mark in self.marks.items() for match in _mark_pattern(mark).finditer(text)]


def load_report_template(name: str, fields: Sequence[str]) -> ReportTemplate:
    """A built-in template or one from a YAML file with `questions`, `unknown` and `answer`.

    Args:
        fields: of the reports; the answer must hold each of them once and nothing else.

    Raises:
        ConfigError: no such file, another structure, an unknown, missing or repeated placeholder, or marks that could
            not be told apart when a report is read back.
    """
    built_in = f"{name}.yaml" if name.startswith("report") else None
    tree = read_template_file(name, "report template", built_in, "write report_zh or give the path of a YAML file")
    if not isinstance(tree, dict) or set(tree) != _KEYS:
        found = sorted(map(str, tree)) if isinstance(tree, dict) else shorten(tree)
        raise ConfigError(f"report template {name}: found {found}, expected the keys {sorted(_KEYS)}")
    questions, unknown, answer = tree["questions"], tree["unknown"], tree["answer"]
    if not isinstance(questions, list) or not questions or not all(isinstance(text, str) for text in questions):
        raise ConfigError(f"report template {name}: questions is {shorten(questions)}; expected a list of texts")
    for text in questions:
        if text.count(IMAGE_PLACEHOLDER) != 1:
            raise ConfigError(f"report template {name}: question {shorten(text)} needs {IMAGE_PLACEHOLDER} once")
    for key in ("unknown", "answer"):
        if not isinstance(tree[key], str) or not tree[key].strip():
            raise ConfigError(f"report template {name}: {key} is {shorten(tree[key])}; expected a text")
    template = ReportTemplate(name, tuple(questions), unknown.strip(), answer.strip())
    for problem in (*_placeholder_problems(template, fields), *_mark_problems(template)):
        raise ConfigError(f"report template {name}: {problem}")
    return template


def _placeholder_problems(template: ReportTemplate, fields: Sequence[str]) -> list[str]:
    problems = []
    for name in template.fields:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            advice = f"did you mean {{{near[0]}}}?" if near else f"the fields are {', '.join(fields)}"
            problems.append(f"unknown placeholder {{{name}}}; {advice}")
        elif template.fields.count(name) > 1:
            problems.append(f"{{{name}}} stands twice; a report could not be read back")
    problems += [
        f"{{{name}}} is missing, so the field '{name}' would not be taught; add it to answer, or take it out of fields"
        for name in fields
        if name not in template.fields
    ]
    braces = "".join(_PLACEHOLDER.sub("", template.answer))
    if "{" in braces or "}" in braces:
        problems.append("a single brace in answer; write placeholders as {FIELD}")
    return problems


def _mark_problems(template: ReportTemplate) -> list[str]:
    problems = []
    marks = {name: _plain(mark) for name, mark in template.marks.items()}
    for name, mark in marks.items():
        if not re.search(r"\w", mark):
            problems.append(f"no words before {{{name}}}, so its value could not be found again")
        for other, others_mark in marks.items():
            if other != name and mark and mark in others_mark:
                problems.append(f"the words before {{{name}}} also stand before {{{other}}}; make them differ")
    return problems


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _mark_pattern(mark: str) -> re.Pattern[str]:
    """A mark with either colon, and any white space where it has some."""
    words = [re.sub("[:：]", "[:：]", re.escape(word)) for word in mark.split()]
    return re.compile(r"\s*".join(words))
