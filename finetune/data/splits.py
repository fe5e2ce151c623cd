"""Divides records into splits by group: a stable hash of the group's name, a hold-out list, and what came of it.

A group always gets the same split for the same ratios and seed, whatever other data are added or removed, and in
whatever order they are read. Nothing is stored and no image is opened; duplicates.py checks the result.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from pathlib import Path

from finetune.data.containers import is_embedded
from finetune.data.readers.table import text_encoding
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import ImageInput, Record

_MAX_DEVIATION = 0.05


def assign_split(group_key: str, ratios: Mapping[str, float], seed: int) -> str:
    """The split of a group.

    Args:
        group_key: name of the group.
        ratios: share of each split, >= 0, adding up to 1; their order does not matter.
        seed: another seed gives another division.

    Raises:
        ConfigError: shares that are negative or do not add up to 1.
    """
    check_ratios(ratios)
    digest = hashlib.blake2b(f"{seed}\0{group_key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64  # uniform in [0, 1)
    names = sorted(name for name, share in ratios.items() if share > 0)
    upper = 0.0
    for name in names:
        upper += ratios[name]
        if position < upper:
            return name
    return names[-1]  # rounding of the sum


def check_ratios(ratios: Mapping[str, float]) -> None:
    """Shares are numbers from 0 on that add up to 1.

    Raises:
        ConfigError: they are not.
    """
    if not ratios or min(ratios.values()) < 0 or abs(sum(ratios.values()) - 1) > 1e-6:
        raise ConfigError(f"split ratios are {dict(ratios)}; expected shares from 0 on that add up to 1")


@dataclass(frozen=True)
class GroupBy:
    """Where the name of a record's group comes from.

    Args:
        rule: `group` (the record's field), `parent` (folder of the first image), `path:REGEX` (first capture, or the
            whole match, in the path of the first image), `provenance.KEY` (dots go deeper).
        root: paths are taken relative to it, so that neither moving a data set nor naming it otherwise (`data`,
            `./data`, another mount) changes its splits. A picture outside goes by its path as it is given.
        prefix: begins the names of folders, where those of several sources must be told apart (`rules_of`).

    Raises:
        ConfigError: unknown rule or broken expression.
    """

    rule: str = "group"
    root: str | None = None
    prefix: str = ""
    _pattern: re.Pattern[str] | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        if self.rule in ("group", "parent") or re.fullmatch(r"provenance(\.[^.]+)+", self.rule):
            return
        if not self.rule.startswith("path:"):
            raise ConfigError(
                f"group_by is '{self.rule}'; expected group, parent, path:REGEX or provenance.KEY, "
                "e.g. 'path:(scene_[0-9]+)'"
            )
        try:
            object.__setattr__(self, "_pattern", re.compile(self.rule[len("path:") :]))
        except re.error as error:
            raise ConfigError(f"group_by '{self.rule}' is no regular expression: {error}") from error

    def named(self, record: Record) -> str:
        """The group's name by the rule, "" where the record has none."""
        if self.rule == "group":
            return record.group
        if self.rule.startswith("provenance."):
            value: object = record.provenance
            for key in self.rule.split(".")[1:]:
                value = value.get(key) if isinstance(value, Mapping) else None
            return "" if value is None else str(value)
        path = self.path_of(record.images[0]) if record.images else ""
        if self._pattern is None:
            return posixpath.normpath(posixpath.join(self.prefix, posixpath.dirname(path))) if path else ""
        match = self._pattern.search(path)
        return "" if match is None else (match[1] or "") if match.re.groups else match[0]

    def key(self, record: Record) -> str:
        """`named`, or where that is "" a name of the record's own that does not depend on its place in the file.

        Records of one image then are one group. A record without an image file goes by its id.
        """
        name = self.named(record)
        if name:
            return name
        if record.images and (path := self.path_of(record.images[0])):
            return f"image:{path}"
        if record.images and record.images[0].data is not None:
            return "sha256:" + hashlib.sha256(record.images[0].data).hexdigest()
        return f"record:{record.id}"

    def path_of(self, image: ImageInput) -> str:
        """Path with `/`, relative to `root` where it lies below; "" for embedded bytes."""
        if image.path is None or is_embedded(image.path):
            return ""
        return (_below(image.path, self.root) or image.path).replace(os.sep, "/")


def rules_of(rule: str, sources: Sequence[tuple[str, str]]) -> list[GroupBy]:
    """One rule per source, each relative to the folder its paths start from.

    Records of one picture are of one group whichever source they come from, and pictures of the same relative path in
    two data roots are kept together too. Folders (`parent`) of several roots are told apart by the name of the first
    source there.

    Args:
        sources: name and data root of each.
    """
    names: dict[str, str] = {}
    for name, root in sources:
        names.setdefault(os.path.realpath(root), name)
    has_several = len(names) > 1
    return [GroupBy(rule, root, names[os.path.realpath(root)] if has_several else "") for _, root in sources]


def _below(path: str, root: str | None) -> str | None:
    """A path relative to a folder, None where it lies outside; links are followed where the names alone do not tell."""
    if root is None:
        return None
    for one, other in ((path, root), (os.path.realpath(path), os.path.realpath(root))):
        relative = os.path.relpath(one, other)
        if relative != ".." and not relative.startswith(".." + os.sep):
            return relative
    return None


class HoldOut:
    """Lines that name groups, images, folders of images (by path, or the end of one) or glob patterns, whose groups are
    kept for one split."""

    def __init__(self, lines: Iterable[str], group_by: GroupBy) -> None:
        cleaned = [line.strip() for line in lines]
        self.lines = list(dict.fromkeys(line for line in cleaned if line and not line.startswith("#")))
        self._literal = {line.replace("\\", "/").removeprefix("./").rstrip("/"): line for line in self.lines}
        self._globs = [(re.compile(translate(line)), line) for line in self.lines if re.search(r"[*?\[]", line)]
        self._group_by = group_by
        self._used: set[str] = set()

    @classmethod
    def read(cls, path: str | os.PathLike[str], group_by: GroupBy) -> HoldOut:
        """A text file with one entry per line; `#` starts a comment line.

        UTF-8 with or without BOM, GBK and UTF-16 with BOM are recognised.

        Raises:
            ConfigError: the file cannot be read.
        """
        try:
            return cls(Path(path).read_text(encoding=text_encoding(Path(path))).splitlines(), group_by)
        except (OSError, DataFormatError) as error:
            raise ConfigError(f"hold-out list {path} cannot be read: {error}") from error

    def matches(self, record: Record, group_by: GroupBy | None = None) -> bool:
        """Whether any line names the record's group or one of its images; every such line counts as used.

        Args:
            group_by: of the record's source, where sources differ.
        """
        found = set()
        for name in self._names(record, group_by or self._group_by):
            if name in self._literal:
                found.add(self._literal[name])
            found.update(line for pattern, line in self._globs if pattern.match(name))
        self._used |= found
        return bool(found)

    def unused(self) -> list[str]:
        """Lines that matched nothing so far, in file order."""
        return [line for line in self.lines if line not in self._used]

    def _names(self, record: Record, group_by: GroupBy) -> Iterator[str]:
        as_given = replace(group_by, root=None, prefix="")
        yield group_by.key(record)
        yield as_given.key(record)
        for image in record.images:
            if path := as_given.path_of(image):
                parts = path.split("/")
                for end in (len(parts), len(parts) - 1):  # the image, and the folder it lies in
                    yield from ("/".join(parts[start:end]) for start in range(end))


@dataclass
class SplitCounts:
    """What fell into one split; `labels` counts images by label, as the manifest and the audit do.

    `forced` records were put there by their source, not by the ratios.
    """

    records: int = 0
    forced: int = 0
    images: int = 0
    groups: int = 0
    labels: Counter[int | None] = field(default_factory=Counter)


@dataclass(frozen=True)
class SplitReport:
    """Realised division: counts per split in the order of the ratios, and what a user should know about it."""

    counts: dict[str, SplitCounts]
    ungrouped: int
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """One line per split, for the terminal."""
        total = sum(counts.records for counts in self.counts.values()) or 1
        return [
            f"{name}: {counts.records} records ({counts.records / total:.1%}) in {counts.groups} groups, "
            f"{counts.images} images: {counts.labels[0]} real, {counts.labels[1]} tampered, "
            f"{counts.labels[None]} without label"
            for name, counts in self.counts.items()
        ]


class Splitter:
    """Gives every record its split and counts them.

    Args:
        ratios, seed: see `assign_split`.
        group_by: where groups come from.
        hold_out: its groups go to `hold_out_split`; `scan` must have seen every record before `split_of` then,
            since one line about one image holds out the whole group.
        class_names: what warnings call images of label 0 and 1.

    Raises:
        ConfigError: bad ratios, or a hold-out split that they do not name.
    """

    def __init__(
        self,
        ratios: Mapping[str, float],
        seed: int,
        group_by: GroupBy | None = None,
        hold_out: HoldOut | None = None,
        hold_out_split: str = "test",
        class_names: tuple[str, str] = ("real", "tampered"),
    ) -> None:
        check_ratios(ratios)
        if hold_out is not None and hold_out_split not in ratios:
            raise ConfigError(f"hold-out split is '{hold_out_split}'; the ratios name {', '.join(ratios)}")
        self.ratios, self.seed, self.group_by = dict(ratios), seed, group_by or GroupBy()
        self.hold_out, self.hold_out_split, self.class_names = hold_out, hold_out_split, class_names
        self._held: set[str] | None = None if hold_out is not None else set()
        self._counts = {name: SplitCounts() for name in ratios}
        self._seen: dict[str, set[int]] = defaultdict(set)
        self._num_ungrouped = 0

    def scan(self, records: Iterable[Record], group_by: GroupBy | None = None) -> None:
        """Find the groups that are held out; may be called once per source, with the rule of that source."""
        held, rule = self._held if self._held is not None else set(), group_by or self.group_by
        if self.hold_out is not None:
            held.update(rule.key(record) for record in records if self.hold_out.matches(record, rule))
        self._held = held

    def split_of(self, record: Record, forced: str | None = None, group_by: GroupBy | None = None) -> str:
        """The record's split, counted.

        Args:
            forced: put it there instead (a set that comes with its own division).
            group_by: of the record's source, where sources differ (`rules_of`).
        """
        if self._held is None:
            raise ValueError("a hold-out list needs scan() over all records first")
        rule = group_by or self.group_by
        key = rule.key(record)
        self._num_ungrouped += not rule.named(record)
        is_forced = forced is not None
        if forced is None:
            forced = self.hold_out_split if key in self._held else assign_split(key, self.ratios, self.seed)
        counts = self._counts[forced]
        counts.forced += is_forced
        counts.records += 1
        counts.images += len(record.images)
        counts.labels.update(target.label for target in record.targets)
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=7).digest()
        self._seen[forced].add(int.from_bytes(digest, "big"))  # a number each: memory stays small
        return forced

    def report(self) -> SplitReport:
        """What came of it.

        Raises:
            ConfigError: all records are of one group, so nothing can be divided.
        """
        for name, counts in self._counts.items():
            counts.groups = len(self._seen[name])
        all_groups = set().union(*self._seen.values())
        num_records = sum(counts.records for counts in self._counts.values())
        if len(all_groups) == 1 and num_records > 1 and sum(share > 0 for share in self.ratios.values()) > 1:
            raise ConfigError(
                f"group_by '{self.group_by.rule}' puts all {num_records} records into one group, so they cannot be "
                "divided; choose another rule (group, parent, path:REGEX, provenance.KEY)"
            )
        return SplitReport(self._counts, self._num_ungrouped, tuple(self._warnings(num_records)))

    def _warnings(self, num_records: int) -> Iterator[str]:
        if self._num_ungrouped:
            yield (
                f"{self._num_ungrouped} of {num_records} records have no group by '{self.group_by.rule}'; each image "
                "is its own group, so pictures of one scene may fall on both sides"
            )
        num_free = num_records - sum(counts.forced for counts in self._counts.values())
        present = {label for counts in self._counts.values() for label, n in counts.labels.items() if n} - {None}
        for name, share in self.ratios.items():
            counts = self._counts[name]
            if share > 0 and num_free and not counts.records:
                yield f"split '{name}' is empty; it was to have {share:.0%} (few groups, or large ones)"
            elif counts.records:
                for label in sorted(present - set(counts.labels), key=str):
                    yield f"split '{name}' has no {self.class_names[1 if label else 0]} image"
                realised = (counts.records - counts.forced) / max(num_free, 1)
                if num_free and abs(realised - share) > _MAX_DEVIATION:
                    yield (
                        f"split '{name}' got {realised:.1%} of the records to be divided, {share:.1%} were asked for "
                        "(groups differ in size)"
                    )
        for line in self.hold_out.unused() if self.hold_out is not None else ():
            yield f"hold-out line '{line}' matches no group and no image"
