"""All records of a configuration's sources in order, each with its number, a unique id, its group and its split.

`survey` reads them all once before anything is written. No image is decoded here; a record that cannot be read comes as
its error, in its place.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config import build, to_dict
from finetune.data.preparation.config import PrepareConfig, PrepareSource
from finetune.data.preparation.work import Item
from finetune.data.readers import data_root, iter_records
from finetune.data.readers.file_tree import iter_files
from finetune.data.splits import GroupBy, HoldOut, SplitReport, Splitter, rules_of
from finetune.data.storage import SetInfo, is_stored
from finetune.data.storage.atomic import file_sha256
from finetune.data.storage.reading import stored_hash
from finetune.errors import ConfigError, DataFormatError
from finetune.progress import progress_bar
from finetune.schema import Record


@dataclass(frozen=True)
class Survey:
    """What all sources hold, before anything is decoded.

    Args:
        num_items: records, and rows that could not be read.
        num_errors, first_error: of those rows.
        splitter: knows the groups that are held out, has counted nothing.
        report: the division that will be made.
        info: for the manifest; its hash changes with any record and any setting that the output depends on.
    """

    num_items: int
    num_errors: int
    first_error: DataFormatError | None
    splitter: Splitter
    report: SplitReport
    info: SetInfo


def with_synthesis(config: PrepareConfig, progress: bool) -> list[PrepareSource]:
    """The configured sources and, where there is a `synth` section, the generated ones, made now if they are not there.

    They are kept in `<out_dir>.synth` (a folder of `forensics synth`). Its `eval` images, of photographs of their own,
    become the hold-out split; the others are divided by photograph like any source.

    Raises:
        ForensicsError: see `synthesize`; a folder made with another configuration or from other photographs.
    """
    if config.synth is None:
        return list(config.sources)
    from finetune.data.synthesis import SynthConfig, synthesize
    from finetune.data.synthesis.photos import find_photos

    folder = Path(f"{config.out_dir.rstrip('/')}.synth")
    settings = build(SynthConfig, config.synth, where="prepare: synth")
    if not (folder / "manifest.json").is_file():
        synthesize(settings, folder, progress)
    else:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        made = manifest.get("config", {})
        wanted = json.loads(json.dumps(asdict(replace(settings, photos_dir=None))))
        differing = sorted(
            key for key in wanted if key not in ("workers", "photos_dir") and made.get(key) != wanted[key]
        )
        if differing:
            raise ConfigError(
                f"{folder} was made with another '{differing[0]}' ({made.get(differing[0])!r}); remove it, or prepare "
                "to another out_dir"
            )
        photos = find_photos(settings.photos_dir, settings.held_out_fraction, settings.workers, progress).photos
        if {photo.sha256 for photo in photos} != {photo["sha256"] for photo in manifest.get("photos", [])}:
            raise ConfigError(
                f"{folder} was made from other photographs than {settings.photos_dir or 'the packaged ones'}; remove "
                "it, or prepare to another out_dir"
            )
    generated = [PrepareSource(str(file)) for file in sorted(folder.glob("*.jsonl")) if file.stat().st_size]
    for source in generated:
        if Path(source.path).name.startswith("eval"):
            source.split = config.splits.holdout_split
    return [*config.sources, *generated]


def survey(config: PrepareConfig, sources: Sequence[PrepareSource], progress: bool) -> Survey:
    """Read every record once, without its pixels: how many there are, where they go, what cannot be read.

    Raises:
        ConfigError: two sources of one name, a hold-out list that cannot be read, records that are all of one group.
        DataFormatError: no record at all.
    """
    splits = config.splits
    group_by = GroupBy(splits.group_by)
    hold_out = HoldOut.read(splits.holdout_list, group_by) if splits.holdout_list else None
    splitter = Splitter(splits.ratios, config.seed, group_by, hold_out, splits.holdout_split)
    if hold_out is not None:
        rules = source_rules(sources, splits.group_by)
        for number, record in iter_records_of(sources):
            if isinstance(record, Record):
                splitter.scan([record], rules[number])
    fresh = copy.deepcopy(splitter)
    digest = hashlib.blake2b(config_digest(config).encode(), digest_size=8)
    num_errors, first_error, total = 0, None, 0
    formats: list[set[str]] = [set() for _ in sources]
    items = iter_items(sources, splitter, formats)
    for item in progress_bar(items, total=None, desc="reading", unit="rec", disable=not progress, leave=False):
        total += 1
        if isinstance(item.record, DataFormatError):
            num_errors += 1
            first_error = first_error or item.record
        digest.update(_identity(item).encode("utf-8", "surrogatepass"))
    if not total:
        raise DataFormatError("no records", found=[source.path for source in sources], fix="check the sources' paths")
    names = source_names(sources)
    described = tuple(_described(*each) for each in zip(sources, names, formats, strict=True))
    info = SetInfo(config.seed, digest.hexdigest(), described)
    return Survey(total, num_errors, first_error, fresh, splitter.report(), info)


def config_digest(config: PrepareConfig) -> str:
    """JSON of the settings that decide what a record becomes; how many workers make it is not among them."""
    fields = to_dict(config)
    for name in ("out_dir", "workers", "on_error", "audit"):
        del fields[name]
    del fields["splits"]["on_overlap"]
    return json.dumps(fields, sort_keys=True)


def _described(source: PrepareSource, name: str, formats: set[str]) -> dict[str, Any]:
    """For the manifest: what was read and a hash of it; no path, which would say where the set was made.

    A data file and a stored set are hashed by their bytes. A folder of images is hashed by the names and sizes of its
    files (`listing_sha256`): the bytes that were used are in the prepared set and hashed there.
    """
    path = Path(source.path)
    fixed = {"split": source.split} if source.split else {}
    if path.is_file():
        known = {"sha256": file_sha256(path)}
    elif is_stored(path):
        known = {"sha256": stored_hash(path)}
    else:
        known = {"listing_sha256": listing_sha256(path)}
    return {"name": name, "format": ", ".join(sorted(formats)) or source.format, **known, **fixed}


def listing_sha256(folder: Path) -> str:
    """SHA-256 of a line `relative/path size` for every file below a folder, sorted; hidden ones are left out.

    Raises:
        DataFormatError: a folder cannot be read.
    """
    digest = hashlib.sha256()
    for name in iter_files(folder, ("",)):
        digest.update(f"{name} {(folder / name).stat().st_size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _identity(item: Item) -> str:
    """Everything about an item but the bytes of its files."""
    return f"{item.index} {item.split} {item.record!r}"


def source_names(sources: Sequence[PrepareSource]) -> list[str]:
    """One name per source, which begins its records' ids where there are several.

    Raises:
        ConfigError: two sources of the same name.
    """
    names = [source.name or Path(source.path.rstrip("/")).stem for source in sources]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(
                f"prepare: sources[{names.index(name)}] and sources[{index}] are both called '{name}'; "
                "give each a 'name'"
            )
    return names


def source_rules(sources: Sequence[PrepareSource], rule: str) -> list[GroupBy]:
    """Where the groups of each source come from, relative to its data root."""
    roots = [data_root(source.path, source.root) for source in sources]
    return rules_of(rule, list(zip(source_names(sources), roots, strict=True)))


def iter_records_of(
    sources: Sequence[PrepareSource], formats: Sequence[set[str]] | None = None
) -> Iterator[tuple[int, Record | DataFormatError]]:
    """Every record with the number of its source and its final id, in order.

    They are the same at every call while the files are the same.

    Args:
        formats: one set per source, which receives the formats met in it (`iter_records`).
    """
    names = source_names(sources)
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        found = None if formats is None else formats[number]
        for record in iter_records(source.path, source.format, source.root, source.options, found):
            if len(sources) > 1 and isinstance(record, Record):
                group = f"{name}/{record.group}" if source.own_groups and record.group else record.group
                record = replace(record, id=f"{name}/{record.id}", group=group)
            yield number, record


def iter_items(
    sources: Sequence[PrepareSource], splitter: Splitter, formats: Sequence[set[str]] | None = None
) -> Iterator[Item]:
    """The items in order; every record is counted by the splitter. `formats` as of `iter_records_of`."""
    rules = source_rules(sources, splitter.group_by.rule)
    for index, (number, record) in enumerate(iter_records_of(sources, formats)):
        if isinstance(record, DataFormatError):
            yield Item(index, "", record)
        else:
            rule = rules[number]
            split = splitter.split_of(record, sources[number].split, rule)
            yield Item(index, split, replace(record, group=rule.key(record)))
