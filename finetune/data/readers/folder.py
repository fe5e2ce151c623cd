"""Format `folder`: images and masks in folders that belong together by their names, e.g. authentic/ tampered/ masks/.

Nothing is guessed: an image that fits no pattern, a tampered image without its mask, a mask without its image and
anything that fits twice are errors that name the pattern. Memory holds the names of the files, nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from finetune.data.readers.file_tree import IMAGE_SUFFIXES, iter_files
from finetune.data.readers.folder_layout import LAYOUTS, Layout, Role
from finetune.data.readers.options import Options
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record

ROLES = ("authentic", "tampered", "masks")
FOLDER_OPTIONS = (
    "preset", *ROLES, *(f"{role}_name" for role in ROLES), "mask_name", "group", "ignore", "mask_shared"
)  # fmt: skip


class _File(NamedTuple):
    """One classified image file: its path below the data set, below its role's folder, and what its name says."""

    path: str
    sub_folder: str
    fields: dict[str, str]


def read_layout(path: Path, options: Options) -> Layout:
    """The layout a preset and the options describe.

    Raises:
        DataFormatError: unknown preset, an option that cannot be used, no preset that the folder fits.
    """
    preset = options.choice("preset", tuple(LAYOUTS), "") if "preset" in options.values else ""
    has_own = any(role in options.values for role in ROLES)
    name_of_layout = preset or ("generic" if has_own else _recognise(path))
    layout = replace(LAYOUTS[name_of_layout], preset="" if name_of_layout == "generic" else name_of_layout)
    if has_own and not preset:
        layout = Layout(authentic=Role(), tampered=Role(), masks=Role())
    roles: dict[str, Role] = {}
    for role in ROLES:
        old: Role = getattr(layout, role)
        name = options.pattern(f"{role}_name", old.name).pattern
        roles[role] = Role(options.texts(role, old.dirs), name, options.texts("group", old.groups))
    layout = replace(layout, authentic=roles["authentic"], tampered=roles["tampered"], masks=roles["masks"])
    return replace(
        layout,
        mask_name=options.text("mask_name", layout.mask_name),
        ignore=options.pattern("ignore", layout.ignore).pattern,
        is_mask_shared=options.flag("mask_shared", layout.is_mask_shared),
    )


def _recognise(path: Path) -> str:
    """The one preset whose folders are all there; those that only look at names (CoMoFoD, IMD2020) must be named."""
    fitting = []
    for name, layout in LAYOUTS.items():
        dirs = {entry for role in ROLES for entry in getattr(layout, role).dirs}
        if "." not in dirs and all(len(_existing(path, entry)) == 1 for entry in dirs):
            fitting.append(name)
    if len(fitting) != 1:
        raise DataFormatError(
            "folder fits several known layouts" if fitting else "folder fits no known layout",
            source=path.name,
            found=fitting or sorted(os.listdir(path))[:8],
            expected="authentic/ tampered/ masks/, or a preset",
            fix=f"set options.preset to one of {', '.join(LAYOUTS)}, or options.authentic, tampered, masks",
        )
    return fitting[0]


def _existing(path: Path, entry: str) -> list[str]:
    return [name for name in entry.split("|") if "\0" not in name and (path / name).is_dir()]


def read_folder(path: Path, layout: Layout) -> Iterator[tuple[str, str, Record | DataFormatError]]:
    """(path, source, record or error): authentic images, tampered images, then masks and files that fit nowhere.

    Raises:
        DataFormatError: a listed folder is missing, or a template names an unknown field.
    """
    files, problems = _classify(path, layout)
    groups = _groups(layout, files)
    masks: dict[str, list[_File]] = {}
    for mask in files["masks"]:
        masks.setdefault(mask.fields["stem"], []).append(mask)
    users: dict[str, list[str]] = {}
    paired: dict[str, str | DataFormatError | None] = {}
    for file in files["tampered"]:
        paired[file.path] = found = _mask_of(file, masks, layout)
        if isinstance(found, str):
            users.setdefault(found, []).append(file.path)
    for file in files["authentic"]:
        yield file.path, file.path, _record(path, file, ImageTarget(label=0), groups)
    for file in files["tampered"]:
        found = paired[file.path]
        if isinstance(found, str) and len(users[found]) > 1 and not layout.is_mask_shared:
            found = DataFormatError(
                "one mask for several images",
                record=file.path,
                source=file.path,
                field="mask_path",
                found=f"{found} also for {next(other for other in users[found] if other != file.path)}",
                fix="give each image its own mask, or set options.mask_shared: true",
            )
        if isinstance(found, DataFormatError):
            yield file.path, file.path, found
            continue
        mask_path = None if found is None else str(path / found)
        yield file.path, file.path, _record(path, file, ImageTarget(label=1, mask_path=mask_path), groups)
    for mask in files["masks"]:
        if mask.path not in users:
            problems[mask.path] = DataFormatError(
                "mask without an image",
                source=mask.path,
                expected=f"a tampered image for which {layout.mask_name!r} is {mask.fields['stem']!r}",
                fix="correct the name or options.mask_name, or leave it out with options.ignore",
            )
    yield from ((name, name, problems[name]) for name in sorted(problems))


def _classify(path: Path, layout: Layout) -> tuple[dict[str, list[_File]], dict[str, DataFormatError]]:
    """The image files below the listed folders by role, and those with no role or several."""
    dirs: dict[str, list[str]] = {}  # folder -> the roles it is listed for
    for role in ROLES:
        for entry in getattr(layout, role).dirs:
            found = _existing(path, entry)
            if len(found) != 1:
                raise DataFormatError(
                    f"{len(found)} of the folders '{entry}' exist",
                    source=path.name,
                    field=f"options.{role}",
                    found=sorted(os.listdir(path))[:8],
                    expected="one",
                    fix=f"correct options.{role}, or the path",
                )
            normal = os.path.normpath(found[0]).replace(os.sep, "/")
            if normal.split("/")[0] == ".." or os.path.isabs(normal):
                raise DataFormatError("folder lies outside the data set", source=path.name, found=entry)
            dirs.setdefault("" if normal == "." else normal + "/", []).append(role)
    patterns = {role: re.compile(getattr(layout, role).name) for role in ROLES}
    ignored = re.compile(layout.ignore) if layout.ignore else None
    files: dict[str, list[_File]] = {role: [] for role in ROLES}
    problems: dict[str, DataFormatError] = {}
    for name in iter_files(path, IMAGE_SUFFIXES):
        folder = max((each for each in dirs if name.startswith(each)), key=len, default=None)
        bare = os.path.splitext(name)[0]
        if folder is None or (ignored and ignored.fullmatch(bare)):
            continue
        stem, parent = os.path.basename(bare), os.path.basename(os.path.dirname(name))
        matches = {role: patterns[role].fullmatch(stem) for role in dict.fromkeys(dirs[folder])}
        fitting = {role: match for role, match in matches.items() if match}
        if len(fitting) != 1:
            wanted = ", ".join(f"{role}: {patterns[role].pattern}" for role in matches)
            problems[name] = DataFormatError(
                f"image name fits {' and '.join(fitting) or 'no pattern'}",
                source=name,
                expected=f"one of {wanted}",
                fix="rename it, correct the pattern, or leave it out with options.ignore",
            )
            continue
        ((role, match),) = fitting.items()
        sub_folder = os.path.dirname(name)[len(folder) :]
        files[role].append(_File(name, sub_folder, {**match.groupdict(""), "stem": stem, "parent": parent}))
    return files, problems


def _fill(template: str, fields: dict[str, str], what: str) -> str:
    """`{field}` replaced, by hand: `str.format` would also reach into attributes."""

    def one(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise DataFormatError(
                f"unknown field '{match[1]}' in a template",
                field=what,
                found=template,
                expected=", ".join(f"{{{name}}}" for name in fields),
            )
        return fields[match[1]]

    return re.sub(r"\{([^{}]*)\}", one, template)


def _mask_of(image: _File, masks: dict[str, list[_File]], layout: Layout) -> str | DataFormatError | None:
    """Path of a tampered image's mask; None in a data set without masks."""
    if not layout.masks.dirs:
        return None
    stem = _fill(layout.mask_name, image.fields, "options.mask_name")
    found = [mask for mask in masks.get(stem, []) if _may_belong(image.sub_folder, mask.sub_folder)]
    if len(found) > 1:
        found = [mask for mask in found if mask.sub_folder == image.sub_folder] or found
    if len(found) == 1:
        return found[0].path
    near = [name for name in masks if name.lower() == stem.lower()]
    return DataFormatError(
        f"{len(found)} masks for one image" if found else "tampered image without a mask",
        record=image.path,
        source=image.path,
        field="mask_path",
        found=[mask.path for mask in found] or near or None,
        expected=f"one file named {stem!r} ({layout.mask_name}) in {', '.join(layout.masks.dirs)}",
        fix="correct the name or options.mask_name" if not found else "remove all but one",
    )


def _may_belong(image_folder: str, mask_folder: str) -> bool:
    """Whether the sub-folders agree: one is empty or the end of the other."""
    longer, shorter = sorted((f"/{image_folder}", f"/{mask_folder}"), key=len, reverse=True)
    return shorter == "/" or longer.endswith(shorter)


def _groups(layout: Layout, files: dict[str, list[_File]]) -> dict[str, str]:
    """Group of every image: keys that one image has are joined, and a joined set is named by its first key."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    keys: dict[str, str] = {}
    for role in ("authentic", "tampered"):
        for file in files[role]:
            own = [_fill(template, file.fields, "options.group") for template in getattr(layout, role).groups] or [""]
            for other in own[1:]:
                first, second = sorted((root(own[0]), root(other)))
                parent[second] = first
            keys[file.path] = own[0]
    return {path: root(key) for path, key in keys.items()}


def _record(path: Path, file: _File, target: ImageTarget, groups: dict[str, str]) -> Record:
    return Record(
        file.path,
        (ImageInput(path=str(path / file.path)),),
        (target,),
        group=groups[file.path],
        source=file.path,
    )
