"""Questions and answers about candidate regions: a template file to edit, the strict JSON of an answer, and back again.

The answer gives a verdict for every region first, each after its id, so that the probability of the verdict can be read
at a known place; what is said of abnormal regions follows.
"""

from __future__ import annotations

import json
import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.regions.text import REGIONS_PLACEHOLDER
from finetune.data.template_files import read_template_file
from finetune.errors import ConfigError, shorten
from finetune.special_tokens import IMAGE_PLACEHOLDER

ABNORMAL, NORMAL = "abnormal", "normal"
"""The two words of a verdict, in either language."""
BUILT_IN = ("zh", "en")
_KEYS = {"questions", "reason", "reasons", "confidence"}


@dataclass(frozen=True)
class RegionTemplate:
    """Wording of one language; `load_region_template` checks it.

    Args:
        name: `zh`, `en` or a path.
        questions: each with `<image>` and `<regions>` once.
        reason: for types that `reasons` does not name; `{type}` stands for the type.
        reasons: type -> reason.
        confidence: the number written for every abnormal region in training answers, in (0, 1].
    """

    name: str
    questions: tuple[str, ...]
    reason: str
    reasons: Mapping[str, str]
    confidence: float

    def question(self, key: str = "") -> str:
        """A question; `key` picks the phrasing ("" the first), the same one for the same key."""
        return self.questions[zlib.crc32(key.encode()) % len(self.questions) if key else 0]

    def answer(self, types: Mapping[str, str | None]) -> str:
        """The JSON about regions id -> type, None without a defect, in the order given."""
        return write_answer(
            {name: kind is not None for name, kind in types.items()},
            [
                RegionFinding(name, kind, self.confidence, self.reasons.get(kind, self.reason).format(type=kind))
                for name, kind in types.items()
                if kind is not None
            ],
        )


@dataclass(frozen=True)
class RegionFinding:
    """What an answer says of one abnormal region: its id, type, confidence in [0, 1] as written, and reason."""

    id: str
    type: str
    confidence: float | None
    reason: str


@dataclass(frozen=True)
class ParsedRegions:
    """An answer that was read back.

    Args:
        verdicts: id -> whether the answer calls it abnormal; ids that were asked about only.
        findings: of abnormal regions.
        is_exact: it is strict JSON of the expected structure, with a verdict for each region and a finding for just the
            abnormal ones.
    """

    verdicts: dict[str, bool]
    findings: tuple[RegionFinding, ...]
    is_exact: bool


def write_answer(verdicts: Mapping[str, bool], findings: Sequence[RegionFinding]) -> str:
    """`{"verdicts": {"R1": "abnormal", ...}, "abnormal": [{"id", "type", "confidence", "reason"}, ...]}`, one line."""
    entries = [
        {"id": each.id, "type": each.type, "confidence": each.confidence, "reason": each.reason} for each in findings
    ]
    words = {name: ABNORMAL if is_abnormal else NORMAL for name, is_abnormal in verdicts.items()}
    return json.dumps({"verdicts": words, "abnormal": entries}, ensure_ascii=False)


def answer_start(ids: Sequence[str], verdicts: Sequence[bool]) -> str:
    """The answer about the regions `ids` as far as the first verdicts decide it.

    Up to the place of the next region's word, its opening quote written; behind the last verdict up to where the list
    of abnormal regions begins.
    """
    words = dict(zip(ids, verdicts, strict=False))
    if len(verdicts) == len(ids):
        return write_answer(words, ()).removesuffix(" []}")
    next_place = write_answer({**words, ids[len(verdicts)]: False}, ())
    return next_place.removesuffix(f'{NORMAL}"}}, "abnormal": []}}')


def parse_answer(text: str, ids: Sequence[str]) -> ParsedRegions:
    """Read an answer about the regions `ids`; what cannot be read is missing, nothing is guessed."""
    try:
        tree = json.loads(text)
    except ValueError:
        return ParsedRegions({}, (), False)
    if not isinstance(tree, dict):
        return ParsedRegions({}, (), False)
    words, entries = tree.get("verdicts"), tree.get("abnormal")
    known = {name: word for name, word in words.items() if name in ids} if isinstance(words, dict) else {}
    verdicts = {name: word == ABNORMAL for name, word in known.items() if word in (ABNORMAL, NORMAL)}
    findings = [_finding(entry, ids) for entry in entries] if isinstance(entries, list) else []
    read = tuple(each for each in findings if each is not None)
    is_exact = (
        set(tree) == {"verdicts", "abnormal"}
        and isinstance(words, dict)
        and isinstance(entries, list)
        and list(words) == list(ids)
        and len(verdicts) == len(ids)
        and len(read) == len(findings)
        and [each.id for each in read] == [name for name in ids if verdicts[name]]
    )
    return ParsedRegions(verdicts, read, is_exact)


def _finding(entry: Any, ids: Sequence[str]) -> RegionFinding | None:
    if not isinstance(entry, dict) or entry.get("id") not in ids or not isinstance(entry.get("type"), str):
        return None
    number = entry.get("confidence")
    share = float(number) if isinstance(number, int | float) and not isinstance(number, bool) else -1.0
    reason = entry.get("reason")
    written = reason if isinstance(reason, str) else ""
    return RegionFinding(entry["id"], entry["type"], share if 0 <= share <= 1 else None, written)


def load_region_template(name: str) -> RegionTemplate:
    """A built-in template (`zh`, `en`) or one from a YAML file like finetune/data/templates/regions_zh.yaml.

    Raises:
        ConfigError: no such file, other keys, a question without its places, an unknown placeholder.
    """
    choices = f"write {' or '.join(BUILT_IN)}, or a YAML file's path"
    tree = read_template_file(name, "region template", f"regions_{name}.yaml", choices)
    where = f"region template {name}"
    if not isinstance(tree, dict) or set(tree) != _KEYS:
        found = sorted(map(str, tree)) if isinstance(tree, dict) else shorten(tree)
        raise ConfigError(f"{where}: found {found}, expected the keys {sorted(_KEYS)}")
    questions, reasons, confidence = tree["questions"], tree["reasons"] or {}, tree["confidence"]
    if not isinstance(questions, list) or not questions or not all(isinstance(text, str) for text in questions):
        raise ConfigError(f"{where}: questions is {shorten(questions)}; expected a list of texts")
    for text in questions:
        for place in (IMAGE_PLACEHOLDER, REGIONS_PLACEHOLDER):
            if text.count(place) != 1:
                raise ConfigError(f"{where}: question {shorten(text)} needs {place} once")
    if not isinstance(reasons, dict):
        raise ConfigError(f"{where}: reasons is {shorten(reasons)}; expected a mapping of type to text")
    for text in (tree["reason"], *reasons.values()):
        _check_reason(text, where)
    if not isinstance(confidence, int | float) or isinstance(confidence, bool) or not 0 < confidence <= 1:
        raise ConfigError(f"{where}: confidence is {shorten(confidence)}; expected a number above 0, at most 1")
    named = {str(kind): text for kind, text in reasons.items()}
    return RegionTemplate(name, tuple(questions), tree["reason"], named, float(confidence))


def _check_reason(text: object, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: reason is {shorten(text)}; expected a text")
    try:
        fields = {part[1] for part in string.Formatter().parse(text)} - {None, "type"}
    except ValueError as error:
        raise ConfigError(f"{where}: reason {shorten(text)}: {error}; write a brace as {{{{ or }}}}") from error
    if fields:
        raise ConfigError(f"{where}: reason {shorten(text)} holds {{{min(map(str, fields))}}}; expected {{type}} only")
