"""Asserts that splits are disjoint: by group, by file bytes and by perceptual hash; finds copies inside a split too.

Holds numbers only, about 200 bytes an image; the small pictures, looked at where hashes agree, wait in a temporary
file. Tampered and authentic twins of one photograph may stand in one split as often as they like: what counts is that
nothing is on both sides.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from finetune.data.fingerprints import MAX_DISTANCE, Fingerprint, are_alike, near_pairs
from finetune.errors import DataFormatError

Kind = Literal["group", "bytes", "picture"]
WHAT = {"group": "records of one group", "bytes": "the same image file", "picture": "pictures that look the same"}
"""Kind of overlap in words."""
_PICTURE = 256
_TOLD = 3
"""Overlaps of each kind that an error names."""


@dataclass(frozen=True)
class Overlap:
    """One thing that is in several splits.

    Args:
        kind: the same group, the same file content, or pictures that look the same though the files differ.
        numbers: its images of all splits, as numbered by `ImageIndex.add`, ascending.
    """

    kind: Kind
    numbers: np.ndarray


class ImageIndex:
    """Fingerprints of many images with their split and group, in columns."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.split_names: list[str] = []
        self.group_names: list[str] = []
        self._number: dict[tuple[str, str], int] = {}
        self._split, self._group = array("q"), array("q")
        self._phash, self._has_phash = array("Q"), array("b")
        self._sha256 = bytearray()
        self._thumbnails = tempfile.TemporaryFile()  # noqa: SIM115 - closed, and gone, with this object

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, split: str, group: str, fingerprint: Fingerprint) -> int:
        """One image: its record's name for messages, its split, its group ("" for none); returns its number."""
        self.names.append(name)
        self._split.append(self._intern("split", split, self.split_names))
        self._group.append(self._intern("group", group, self.group_names) if group else -1)
        self._phash.append(fingerprint.phash or 0)
        self._has_phash.append(fingerprint.phash is not None)
        self._sha256 += fingerprint.sha256
        self._thumbnails.write(fingerprint.thumbnail)
        return len(self) - 1

    def split_of(self, number: int) -> str:
        """Name of an image's split."""
        return self.split_names[self._split[number]]

    def group_of(self, number: int) -> str:
        """Name of an image's group, "" where it has none."""
        return self.group_names[self._group[number]] if self._group[number] >= 0 else ""

    @property
    def splits(self) -> np.ndarray:
        """(N,) int64, place of each image's split in `split_names`."""
        return np.array(self._split, dtype=np.int64)

    @property
    def num_flat(self) -> int:
        """Images without a perceptual hash."""
        return len(self) - sum(self._has_phash)

    def same_bytes(self) -> list[np.ndarray]:
        """Numbers of the images of each file content that occurs more than once, ascending."""
        content = np.frombuffer(self._sha256, dtype="V32")  # (N,)
        return _classes(np.unique(content, return_inverse=True)[1]) if len(self) else []

    def alike(self, max_distance: int = MAX_DISTANCE) -> list[np.ndarray]:
        """Numbers of the images of each set of pictures that look the same, directly or over others of the set."""
        if not len(self):
            return []
        pairs = [np.stack([same[:-1], same[1:]], axis=1) for same in self.same_bytes()]
        pairs += self._alike_pairs(max_distance)
        if not pairs:
            return []
        edges = np.concatenate(pairs)  # (M, 2)
        graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(len(self), len(self)))
        return _classes(connected_components(graph, directed=False)[1])

    def overlaps(self, max_distance: int = MAX_DISTANCE) -> list[Overlap]:
        """Everything that is in several splits: groups first, then bytes, then pictures."""
        splits = self.splits
        found: list[Overlap] = []
        groups = np.array(self._group, dtype=np.int64)
        named = np.flatnonzero(groups >= 0)
        of_group, of_split = groups[named], splits[named]
        pairs = np.unique(of_group * (len(self.split_names) + 1) + of_split) // (len(self.split_names) + 1)
        named = named[np.isin(of_group, pairs[1:][pairs[1:] == pairs[:-1]])]  # those of groups in several splits
        kinds: list[tuple[Kind, list[np.ndarray]]] = [
            ("group", [named[same] for same in _classes(groups[named])]),
            ("bytes", self.same_bytes()),
            ("picture", self.alike(max_distance)),
        ]
        in_bytes: set[int] = set()
        for kind, classes in kinds:
            for numbers in classes:
                if len(np.unique(splits[numbers])) < 2 or (kind == "picture" and in_bytes.issuperset(numbers.tolist())):
                    continue
                found.append(Overlap(kind, numbers))
                if kind == "bytes":
                    in_bytes.update(numbers.tolist())
        return found

    def _alike_pairs(self, max_distance: int) -> Iterator[np.ndarray]:
        """(M, 2) pairs of like pictures, confirmed by their thumbnails.

        One image stands for all of the same hash in comparisons with other hashes; those of one hash are compared in a
        row (1st with 2nd, 2nd with 3rd ...), so that a thousand copies are not a million pairs.
        """
        numbers = np.flatnonzero(np.array(self._has_phash, dtype=bool))
        hashes = np.array(self._phash, dtype=np.uint64)[numbers]
        distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        self._thumbnails.flush()
        pictures = np.memmap(self._thumbnails, np.uint8, "r", shape=(len(self), _PICTURE))
        order = np.argsort(inverse, kind="stable")
        is_same = inverse[order][1:] == inverse[order][:-1]
        rows = numbers[order]
        yield self._confirmed(np.stack([rows[:-1][is_same], rows[1:][is_same]], axis=1), pictures)
        for pairs in near_pairs(distinct, max_distance):
            yield self._confirmed(numbers[first[pairs]], pictures)

    @staticmethod
    def _confirmed(pairs: np.ndarray, pictures: np.ndarray, block: int = 100_000) -> np.ndarray:
        pieces = [pairs[start : start + block] for start in range(0, len(pairs), block)]
        kept = [piece[are_alike(pictures[piece[:, 0]], pictures[piece[:, 1]])] for piece in pieces]
        return np.concatenate(kept) if kept else pairs

    def _intern(self, kind: str, name: str, names: list[str]) -> int:
        number = self._number.setdefault((kind, name), len(names))
        if number == len(names):
            names.append(name)
        return number


def assert_disjoint(index: ImageIndex, max_distance: int = MAX_DISTANCE) -> None:
    """No group, no file and no picture is in two splits.

    Raises:
        DataFormatError: one is; says how many of each kind, names the first few of each with their records and
            splits, and what can be done about it in the configuration of `forensics prepare`.
    """
    overlaps = index.overlaps(max_distance)
    if not overlaps:
        return
    told = []
    for kind in dict.fromkeys(overlap.kind for overlap in overlaps):
        own = [overlap for overlap in overlaps if overlap.kind == kind]
        cases = [describe(index, overlap) for overlap in own[:_TOLD]]
        if len(own) > _TOLD:
            cases.append(f"and {len(own) - _TOLD} more")
        told.append(f"{len(own)} x {WHAT[kind]} ({'; '.join(cases)})")
    raise DataFormatError(
        "splits are not disjoint: " + ", ".join(told),
        expected="each group and each picture in one split only",
        fix="group the records by what they share (splits.group_by), give copies a common group or remove them, then "
        "run again with --overwrite, since what is written so far was divided the old way; or accept them as they are "
        "with splits.on_overlap=warn",
    )


def describe(index: ImageIndex, overlap: Overlap) -> str:
    """`train: a, b | test: c` with the records of an overlap, at most two per split; a group by its name before."""
    by_split: dict[str, list[str]] = {}
    for number in overlap.numbers.tolist():
        by_split.setdefault(index.split_of(number), []).append(index.names[number])
    named = f"'{index.group_of(int(overlap.numbers[0]))}' " if overlap.kind == "group" else ""
    return named + " | ".join(
        f"{split}: {', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}"
        for split, names in by_split.items()
    )


def _classes(codes: np.ndarray) -> list[np.ndarray]:
    """Positions of every code that occurs more than once, ascending, by first position."""
    order = np.argsort(codes, kind="stable")
    edges = np.concatenate([[0], np.flatnonzero(np.diff(codes[order])) + 1, [len(order)]])
    several = np.flatnonzero(np.diff(edges) > 1)  # most stand alone: no array is made for those
    parts = [order[start:stop] for start, stop in zip(edges[several], edges[several + 1], strict=True)]
    return sorted(parts, key=lambda part: int(part[0]))
