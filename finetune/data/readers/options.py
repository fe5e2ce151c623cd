"""Options of a reader (`SourceConfig.options`): a checked mapping, and those that every format takes.

An unknown option or an unusable value is a `DataFormatError`, as a damaged record is, so that all of them are listed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from finetune.errors import ConfigError, DataFormatError

COMMON_OPTIONS = ("mask_convention", "mask_pixels")
MASK_CONVENTIONS = ("target", "source_and_target")
MASK_PIXELS = ("bright", "dark", "red", "green", "blue")
UNANNOTATED = ("authentic", "unknown")
FRAMES = ("upright", "stored")


def options_from(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` of a command line (values in YAML syntax) as the options of a reader.

    Raises:
        ConfigError: not of that form.
    """
    options = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"--option {pair!r} is not of the form KEY=VALUE, e.g. encoding=gb18030")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--option {pair!r}: the value is not YAML; put it in quotes") from error
    return options


@dataclass(frozen=True)
class Options:
    """The options of one source.

    Args:
        values: as given by the user.
        source: the data file's name, for errors.
    """

    values: Mapping[str, Any]
    source: str

    def error(self, name: str, expected: str) -> DataFormatError:
        """An option whose value cannot be used."""
        return DataFormatError(
            f"option '{name}' cannot be used",
            source=self.source,
            field=f"options.{name}",
            found=self.values.get(name),
            expected=expected,
        )

    def check_names(self, known: Sequence[str], format: str) -> None:
        """Refuse an option that the format does not know."""
        for name in self.values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise DataFormatError(
                    f"unknown option of format '{format}'",
                    source=self.source,
                    field=f"options.{name}",
                    expected=", ".join(known),
                    fix=f"write '{near[0]}'" if near else "remove it",
                )

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """One of a few words."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(name, " or ".join(choices))
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """Any text."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a text")
        return value

    def texts(self, name: str, default: Sequence[str]) -> tuple[str, ...]:
        """A text, or a list of texts."""
        value = self.values.get(name, default)
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
            raise self.error(name, "a text or a list of texts")
        return tuple(value)

    def pattern(self, name: str, default: str) -> re.Pattern[str]:
        """A regular expression."""
        try:
            return re.compile(self.text(name, default))
        except (re.error, RecursionError, OverflowError) as error:
            raise self.error(name, f"a regular expression ({error})") from error

    def mapping(self, name: str) -> dict[str, Any]:
        """A mapping with text keys, {} if absent."""
        value = self.values.get(name, {})
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.error(name, "a mapping")
        return dict(value)
