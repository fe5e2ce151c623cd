"""Types of command-line values, the parser of a verb, and arguments that several verbs share. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class VerbParser(argparse.ArgumentParser):
    """A parser whose positional values (`KEY=VALUE`, files) may stand before, between and after the options.

    argparse alone fills a positional list from the first place it finds values and refuses those behind an option.
    """

    _is_inside = False

    def parse_known_args(  # type: ignore[override]  # the overloads of typeshed cannot be met by one signature
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As the base class, which the intermixed parsing itself calls for each of its two passes."""
        if self._is_inside or self._subparsers is not None:  # a verb that only leads to further verbs
            return super().parse_known_args(args, namespace)
        self._is_inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


def reader_arguments(parser: argparse._ActionsContainer) -> None:
    """How the data file of a verb is read: `--data-root`, `--format`, `--option`."""
    parser.add_argument(
        "--data-root", metavar="DIR", help="image paths are relative to it (default: the data file's folder)"
    )
    parser.add_argument("--format", default="auto", help="reader to use (default: recognised from the records)")
    parser.add_argument(
        "--option",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="of the reader, as `options` of a source; data/README.md",
    )


def override_arguments(parser: argparse._ActionsContainer, help: str) -> None:
    """`--set KEY=VALUE ...`, which may be repeated; `overrides` of the parsed arguments."""
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help
    )


def non_negative_int(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def hash_distance(text: str) -> int:
    if not text.isdecimal() or int(text) > 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of bits from 0 to 16")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 up")
    return value


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value
