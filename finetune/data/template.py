"""How questions and answers are worded: a template, built in or of a YAML file, with its checks."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from finetune.data.template_files import read_template_file
from finetune.data.token_checks import reserved
from finetune.errors import ConfigError, shorten
from finetune.schema import RESULT_WORDS, Record
from finetune.special_tokens import IMAGE_PLACEHOLDER

Layout = Literal["tokens_first", "text_first"]
LAYOUTS: tuple[Layout, ...] = ("tokens_first", "text_first")
BUILT_IN = ("zh", "en")
_ANSWER_FIELDS = {"tokens", "cls", "mask_tokens", "result", "mask", "evidence"}


@dataclass(frozen=True)
class Template:
    """Wording of questions and answers; see finetune/data/templates/zh.yaml for the placeholders."""

    name: str
    system: str
    prompts: tuple[str, ...]
    prompts_multi: tuple[str, ...]
    result: dict[int, str]
    evidence: dict[int, str]
    answers: dict[str, str]

    @property
    def result_words(self) -> dict[str, int]:
        """Label of each word that may stand under `"result"`: `real`, `fake` and the template's own."""
        return RESULT_WORDS | {word: label for label, word in self.result.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, to be saved beside a model."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Template:
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises:
            ConfigError: as `load_template`.
        """
        fields = dict(tree)
        name = fields.pop("name", "saved")
        for key in ("result", "evidence"):
            fields[key] = {int(label): text for label, text in fields[key].items()}
        return _check_template(name, fields)


def load_template(name: str) -> Template:
    """A built-in template (`zh`, `en`) or one from a YAML file.

    Raises:
        ConfigError: unknown name, missing or unknown key, unknown placeholder.
    """
    choices = "choose zh, en or give the path of a YAML file"
    tree = read_template_file(name, "data.template", f"{name}.yaml", choices)
    return _check_template(name, tree)


def template_of(record: Record, template: Template) -> Template:
    """The built-in template of a record's own language (`provenance.language`), where `template` is one of another.

    So a set in two languages is asked in the language it answers in. A template of the user's own holds for all.
    """
    language = record.provenance.get("language")
    is_other = language in BUILT_IN and template.name in BUILT_IN and language != template.name
    return _built_in(str(language)) if is_other else template


@cache
def _built_in(name: str) -> Template:
    return load_template(name)


def template_problem(template: Template, layout: Layout) -> str | None:
    """Why the heads cannot be trained on answers of this template: a layout whose answer lacks their tokens, or has
    them twice; None where all is well.

    Not asked of a model without heads, whose answers are text only.
    """
    expected = {"tokens_first": ("tokens",), "text_first": ("cls", "mask_tokens")}[layout]
    fields = [part[1] for part in string.Formatter().parse(template.answers[layout])]
    found = [field for field in fields if field in ("tokens", "cls", "mask_tokens")]
    if sorted(found) == sorted(expected):
        return None
    return (
        f"data.template {template.name}: answers.{layout} holds {_braced(found) or 'no forensic token'}; expected "
        f"{_braced(expected)}, once, where the heads read the image; or set heads.enabled: false to train text only"
    )


def _braced(fields: Sequence[str]) -> str:
    return " ".join(f"{{{field}}}" for field in fields)


def _check_template(name: str, tree: Any) -> Template:
    keys = {"system", "prompts", "prompts_multi", "result", "evidence", "answers"}
    if not isinstance(tree, dict) or set(tree) != keys:
        found = sorted(tree) if isinstance(tree, dict) else shorten(tree)
        raise ConfigError(f"data.template {name}: found {found}, expected the keys {sorted(keys)}")
    for field in ("result", "evidence"):
        if not isinstance(tree[field], dict) or set(tree[field]) != {0, 1}:
            raise ConfigError(f"data.template {name}: '{field}' needs one entry for 0 (real) and one for 1 (tampered)")
    _check_texts(name, tree)
    words = {label: word.strip() for label, word in tree["result"].items()}
    if not all(words.values()) or words[0] == words[1]:
        raise ConfigError(f"data.template {name}: result is {words}; expected two different words")
    if not isinstance(tree["answers"], dict) or set(tree["answers"]) != set(LAYOUTS):
        raise ConfigError(f"data.template {name}: 'answers' needs the layouts {', '.join(LAYOUTS)}")
    for layout, answer in tree["answers"].items():
        try:
            fields = {part[1] for part in string.Formatter().parse(answer) if part[1] is not None}
            if fields <= _ANSWER_FIELDS:
                answer.format_map(dict.fromkeys(fields, ""))
        except ValueError as error:
            reason = f"{error}; a literal brace is {{{{ or }}}}"
            raise ConfigError(f"data.template {name}: answers.{layout}: {reason}") from error
        if unknown := fields - _ANSWER_FIELDS:
            raise ConfigError(
                f"data.template {name}: answers.{layout} has the unknown placeholder '{min(unknown)}'; "
                f"known: {', '.join(sorted(_ANSWER_FIELDS))}"
            )
    for field, placeholder in (("prompts", IMAGE_PLACEHOLDER), ("prompts_multi", "{images}")):
        for prompt in tree[field]:
            num_images = prompt.replace("{images}", IMAGE_PLACEHOLDER).count(IMAGE_PLACEHOLDER)
            if prompt.count(placeholder) != 1 or num_images != 1:
                raise ConfigError(f"data.template {name}: {field} {prompt!r} needs exactly one {placeholder}")
    return Template(
        name=name,
        system=tree["system"],
        prompts=tuple(tree["prompts"]),
        prompts_multi=tuple(tree["prompts_multi"]),
        result=dict(tree["result"]),
        evidence=dict(tree["evidence"]),
        answers=dict(tree["answers"]),
    )


def _check_texts(name: str, tree: dict[str, Any]) -> None:
    """Every text of a template is one, and holds no token: those are put in by placeholders."""
    for field, value in tree.items():
        is_list = field in ("prompts", "prompts_multi")
        if is_list and (not isinstance(value, list) or not value):
            raise ConfigError(f"data.template {name}: '{field}' is {shorten(value)}; expected a list of texts")
        texts = enumerate(value) if is_list else value.items() if isinstance(value, dict) else [(None, value)]
        for key, text in texts:
            where = field if key is None else f"{field}.{key}"
            if not isinstance(text, str):
                raise ConfigError(f"data.template {name}: {where} is {shorten(text)}; expected a text, in quotes")
            if found := reserved(text.replace(IMAGE_PLACEHOLDER, "") if is_list else text):
                raise ConfigError(f"data.template {name}: {where} holds {found}; tokens are put in by the placeholders")
