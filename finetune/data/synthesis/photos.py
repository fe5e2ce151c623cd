"""Authentic photographs, and their split into train and held-out.

The default photographs are those inside the installed scikit-image, scikit-learn and matplotlib packages, read from the
packages' folders (never through a downloader). Decoded photographs are cached per process. No tampering here.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from finetune.data.duplicates import ImageIndex
from finetune.data.fingerprints import Fingerprint, fingerprint
from finetune.data.parallel import num_workers, ordered_map
from finetune.data.readers.file_tree import IMAGE_SUFFIXES, iter_files
from finetune.data.synthesis.degradations import resize, to_uint8
from finetune.errors import ForensicsError
from finetune.progress import progress_bar
from finetune.schema import ImageInput

SPLITS = ("train", "eval", "val")
"""`eval` is made from photographs of its own; `val`, for choosing checkpoints, from the training photographs."""
MIN_PHOTO_SIDE = 128
"""Photographs with a shorter side are refused: they would have to be enlarged beyond recognition."""
MAX_PHOTO_SIDE = 2048
"""Larger photographs are shrunk to this longer side when opened, to bound the memory of the cache."""
MANY_PHOTOS = 32
"""From twice this number on photographs are checked by several processes, each given at least this many."""

_SKIMAGE, _SKLEARN, _MATPLOTLIB = ("skimage", "data"), ("sklearn", "datasets", "images"), ("matplotlib", "mpl-data")
DEFAULT_PHOTOS: tuple[tuple[tuple[str, ...], str, str, str], ...] = (
    # folder, file, split, scene. Both sides hold a portrait, an object, an outdoor scene and a grey texture.
    (_SKIMAGE, "astronaut.png", "train", "astronaut"),
    (_SKIMAGE, "chelsea.png", "train", "chelsea"),
    (_SKIMAGE, "motorcycle_left.png", "train", "motorcycle"),
    (_SKIMAGE, "motorcycle_right.png", "train", "motorcycle"),
    (_SKIMAGE, "rocket.jpg", "train", "rocket"),
    (_SKLEARN, "flower.jpg", "train", "flower"),
    (_SKIMAGE, "ihc.png", "train", "ihc"),  # a micrograph, but a camera picture with rich colour texture
    (_SKIMAGE, "camera.png", "train", "camera"),
    (_SKIMAGE, "brick.png", "train", "brick"),
    (_SKIMAGE, "grass.png", "train", "grass"),
    (_SKIMAGE, "coins.png", "train", "coins"),
    (_SKIMAGE, "retina.jpg", "train", "retina"),  # of a fundus camera, 1411 px
    (_SKIMAGE, "moon.png", "train", "moon"),
    (_SKIMAGE, "page.png", "train", "page"),  # a printed page: lines of text
    (_SKIMAGE, "text.png", "train", "text"),  # handwriting
    (_SKIMAGE, "coffee.png", "eval", "coffee"),
    (_SKLEARN, "china.jpg", "eval", "china"),
    (_MATPLOTLIB, "sample_data/grace_hopper.jpg", "eval", "grace_hopper"),
    (_SKIMAGE, "gravel.png", "eval", "gravel"),
)
"""Fixed assignment of the packaged photographs; the stereo pair `motorcycle` is one scene. Left out, from the same
folders: drawings (horse, phantom, color, logo, chessboards), a motion-blurred clock without detail, and a cell and a
deep field that are mostly empty, where an edit of nothing by nothing would have to be drawn again and again."""


@dataclass(frozen=True)
class Photo:
    """One authentic photograph.

    Args:
        name: unique short name for records and provenance, never an absolute path.
        path: file on this machine; not written to any output.
        group: scene; photographs of one scene stay on one side of the split and never splice into each other.
        split: `train` or `eval`.
        is_grey: whether it holds no colour.
        sha256: of the file.
    """

    name: str
    path: str
    group: str
    split: str
    is_grey: bool
    sha256: str


@dataclass(frozen=True)
class PhotoSet:
    """Usable photographs of both splits and the files that were refused, as `{"name", "reason"}`."""

    photos: tuple[Photo, ...]
    rejected: tuple[dict[str, str], ...] = ()

    def of(self, split: str) -> tuple[Photo, ...]:
        """The photographs of one split, in a fixed order; `val` shares those of `train`."""
        side = "train" if split == "val" else split
        return tuple(photo for photo in self.photos if photo.split == side)


def find_photos(
    photos_dir: str | Path | None = None,
    held_out_fraction: float = 0.25,
    workers: int = 1,
    progress: bool = False,
    train_photos_dir: str | Path | None = None,
) -> PhotoSet:
    """Find the photographs to work from, and decide which are held out.

    Args:
        photos_dir: folder searched recursively, or None for the packaged photographs.
        held_out_fraction: share of a user's scenes for `eval`, at least one and not all. The choice follows the
            hash of each file's content, not names or order; files that show the same picture stay on one side. The
            packaged ones have a fixed assignment.
        workers: processes that decode a user's photographs to check them; 0 means one per core.
        progress: show a bar on stderr where there are many.
        train_photos_dir: folder of further photographs, for training alone: what is held out stays as it is. One that
            is a held-out photograph, or looks the same, is refused.

    Raises:
        ForensicsError: no such folder, or too few usable photographs; names the refused files.
    """
    photos = (
        _default_photos()
        if photos_dir is None
        else _split_photos(Path(photos_dir), held_out_fraction, workers, progress)
    )
    return photos if train_photos_dir is None else _add_photos(photos, Path(train_photos_dir), workers, progress)


def _split_photos(root: Path, held_out_fraction: float, workers: int, progress: bool) -> PhotoSet:
    """The photographs of a user's folder, some of them held out."""
    found, rejected = _photos_below(root, "--photos", workers, progress)
    if len(found) < 2:
        raise ForensicsError(
            f"photos folder {str(root)!r} holds {len(found)} usable photographs, need at least 2 (one to train on, one"
            f" held out); {_refused(rejected)}"
        )
    for numbers in _index_of(found, workers).alike():  # the same picture saved twice: one scene
        for number in numbers:
            found[number] = replace(found[number], group=found[numbers[0]].group)
    digests: dict[str, list[str]] = {}
    for photo in found:
        digests.setdefault(photo.group, []).append(photo.sha256)
    if len(digests) < 2:
        raise ForensicsError(
            f"photos folder {str(root)!r} holds one picture {len(found)} times, need at least 2 that differ (one to "
            f"train on, one held out); {_refused(rejected)}"
        )
    held_out = min(len(digests) - 1, max(1, round(held_out_fraction * len(digests))))
    chosen = set(sorted(digests, key=lambda group: _joint_digest(digests[group]))[:held_out])
    photos = tuple(replace(photo, split="eval") if photo.group in chosen else photo for photo in found)
    return PhotoSet(photos, tuple(rejected))


def _joint_digest(digests: Sequence[str]) -> str:
    """What a scene is sorted by: its only file's digest, or one of them all, so that many files are one ticket."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _add_photos(known: PhotoSet, root: Path, workers: int, progress: bool) -> PhotoSet:
    """`known` and the photographs of a folder to train on, without those that are there already, on either side."""
    found, rejected = _photos_below(root, "--train-photos", workers, progress)
    index = _index_of([*known.photos, *found], workers)
    same_as: dict[int, str] = {}
    for numbers in index.alike():
        there = [number for number in numbers if number < len(known.photos)]
        for number in numbers:
            if number >= len(known.photos) and there:
                same_as[int(number)] = index.names[min(there, key=lambda each: index.split_of(each) != "eval")]
    photos = list(known.photos)
    for number, photo in enumerate(found, start=len(known.photos)):
        if number in same_as:
            rejected.append({"name": photo.name, "reason": f"the same picture as {same_as[number]}"})
        else:
            name = f"train_photos/{photo.name}"  # apart from the others, whatever those are called
            photos.append(replace(photo, name=name, group=name))
    if len(photos) == len(known.photos):
        raise ForensicsError(f"photos folder {str(root)!r} holds no photograph to add; {_refused(rejected)}")
    return PhotoSet(tuple(photos), (*known.rejected, *rejected))


def _index_of(photos: Sequence[Photo], workers: int) -> ImageIndex:
    """What the photographs look like, numbered in their order."""
    index, paths = ImageIndex(), [photo.path for photo in photos]
    for photo, looks in zip(photos, ordered_map(_looks, paths, _processes(workers, len(paths))), strict=True):
        index.add(photo.name, photo.split, "", looks)
    return index


def _refused(rejected: Sequence[dict[str, str]]) -> str:
    detail = "; ".join(f"{item['name']}: {item['reason']}" for item in rejected) or "no image file"
    return f"refused: {detail}; add photographs ({' '.join(IMAGE_SUFFIXES)})"


def _photos_below(root: Path, option: str, workers: int, progress: bool) -> tuple[list[Photo], list[dict[str, str]]]:
    """The usable photographs of a folder and its subfolders, all of them in `train`, and the refused files."""
    if not root.is_dir():
        raise ForensicsError(f"photos folder {str(root)!r} does not exist; give a folder of photographs with {option}")
    names = list(iter_files(root, IMAGE_SUFFIXES))
    paths = [root / name for name in names]
    found: list[Photo] = []
    rejected: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    processes = _processes(workers, len(paths))
    outcomes = ordered_map(_inspect_or_refuse, paths, processes)
    bar = progress_bar(outcomes, total=len(paths), desc="photos", unit="file", disable=not progress or processes == 1)
    for name, path, (digest, is_grey, reason) in zip(names, paths, bar, strict=True):
        if reason:
            rejected.append({"name": name, "reason": reason.replace(str(root), "").strip()})
        elif digest in seen:
            rejected.append({"name": name, "reason": f"same content as {seen[digest]}"})
        else:
            seen[digest] = name
            found.append(Photo(name, str(path), name, "train", is_grey, digest))
    return found, rejected


def _processes(workers: int, num_photos: int) -> int:
    return max(1, min(num_workers(workers), num_photos // MANY_PHOTOS))


def _looks(path: str) -> Fingerprint:
    return fingerprint(ImageInput(path=path), Image.fromarray(load_rgb(path)))


def _default_photos() -> PhotoSet:
    photos, missing = [], []
    for folder, file, split, group in DEFAULT_PHOTOS:
        spec = importlib.util.find_spec(folder[0])
        locations = list(spec.submodule_search_locations or ()) if spec else []
        path = Path(locations[0], *folder[1:], file) if locations else Path(folder[0], file)
        if not path.is_file():
            missing.append({"name": f"{folder[0]}/{file}", "reason": "not in the installed package"})
            continue
        digest, is_grey = _inspect(path)
        photos.append(Photo(f"{folder[0]}/{Path(file).name}", str(path), group, split, is_grey, digest))
    found = PhotoSet(tuple(photos), tuple(missing))
    if any(len(found.of(split)) < 1 for split in SPLITS):
        names = ", ".join(item["name"] for item in missing)
        raise ForensicsError(
            f"packaged photographs are missing: {names}; install scikit-image, scikit-learn and"
            " matplotlib, or give your own folder with --photos"
        )
    return found


def _inspect_or_refuse(path: Path) -> tuple[str, bool, str]:
    """`_inspect`, and "" or the reason why the photograph cannot be used."""
    try:
        return *_inspect(path), ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "", False, str(error) or type(error).__name__


def _inspect(path: Path) -> tuple[str, bool]:
    """sha256 of the file and whether it is grey; ValueError when it is no file or too small to use."""
    if not path.is_file():
        raise ValueError("no file, or a link to none")
    image = load_rgb(path)
    if min(image.shape[:2]) < MIN_PHOTO_SIDE:
        raise ValueError(f"{image.shape[1]}x{image.shape[0]} px, need at least {MIN_PHOTO_SIDE} px on the shorter side")
    if float(image.std()) < 2.0:
        raise ValueError("one flat colour")
    small = image[::4, ::4].astype(np.int16)
    is_grey = float((small.max(axis=2) - small.min(axis=2)).mean()) < 2.0
    return hashlib.sha256(path.read_bytes()).hexdigest(), is_grey


def load_rgb(path: str | Path) -> np.ndarray:
    """Decode a photograph to (H, W, 3) uint8 RGB, EXIF rotation applied, metadata dropped, at most `MAX_PHOTO_SIDE`.

    Raises:
        OSError, ValueError, SyntaxError: Pillow cannot read the file (truncated ones included).
    """
    with Image.open(path) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it to white
            levels = np.asarray(image, dtype=np.float32)
            image = Image.fromarray(to_uint8(levels * (255 / max(float(levels.max()), 1.0))))
        array = np.asarray(image.convert("RGB"))
    shrink = MAX_PHOTO_SIDE / max(array.shape[:2])
    if shrink < 1:
        array = resize(array, (round(array.shape[0] * shrink), round(array.shape[1] * shrink)), "area")
    return array


@lru_cache(maxsize=48)
def open_photo(path: str) -> np.ndarray:
    """`load_rgb`, decoded once per process and kept (read-only array)."""
    array = load_rgb(path)
    array.flags.writeable = False
    return array


def open_photos(photos: Sequence[Photo]) -> dict[str, np.ndarray]:
    """Decode photographs through the cache: name → (H, W, 3) uint8 RGB, read-only."""
    return {photo.name: open_photo(photo.path) for photo in photos}
