"""Types of command-line values, and arguments that several verbs share. Imports nothing heavy."""

from __future__ import annotations

import argparse


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
