"""Reading a template by name: a built-in one, or a YAML file of the user's own. What is in it is checked elsewhere."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import yaml

from finetune.errors import ConfigError


def read_template_file(name: str, what: str, built_in: str | None, choices: str) -> object:
    """The parsed YAML of a template.

    Args:
        name: a word for a built-in template, anything else is the path of a file (UTF-8, with or without BOM).
        what: what errors call it, e.g. `data.template`.
        built_in: file below `finetune/data/templates` for this name; None where no built-in one is meant.
        choices: what to write instead of an unknown name.

    Raises:
        ConfigError: unknown name, unreadable file, or no valid YAML.
    """
    try:
        if re.fullmatch(r"\w+", name):
            file = None if built_in is None else resources.files("finetune.data") / "templates" / built_in
            if file is None or not file.is_file():
                raise ConfigError(f"{what} '{name}' is not built in; {choices}")
            text = file.read_text(encoding="utf-8")
        else:
            text = Path(name).read_text(encoding="utf-8-sig")
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {name} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} {name} is not valid YAML: {' '.join(str(error).split())}") from error
