"""Authentic photographs, their split into train and held-out, and the virtual camera that turns a few into many.

The default photographs are those inside the installed scikit-image, scikit-learn and matplotlib packages, read from the
packages' folders (never through a downloader). Decoded photographs are cached per process. No tampering here.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from finetune.data.parallel import num_workers, ordered_map
from finetune.data.synthesis.degradations import jpeg_round_trip, resize, to_uint8
from finetune.data.synthesis.scenes import vary_scene
from finetune.errors import ForensicsError

SPLITS = ("train", "eval", "val")
"""`eval` is made from photographs of its own; `val`, for choosing checkpoints, from the training photographs."""
PHOTO_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
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
    photos_dir: str | Path | None = None, held_out_fraction: float = 0.25, workers: int = 1, progress: bool = False
) -> PhotoSet:
    """Find the photographs to work from, and decide which are held out.

    Args:
        photos_dir: folder searched recursively, or None for the packaged photographs.
        held_out_fraction: share of a user's photographs for `eval`, at least one and not all. The choice follows the
            hash of each file's content, not names or order. The packaged ones have a fixed assignment.
        workers: processes that decode a user's photographs to check them; 0 means one per core.
        progress: show a bar on stderr where there are many.

    Raises:
        ForensicsError: no such folder, or fewer than two usable photographs; names the refused files.
    """
    if photos_dir is None:
        return _default_photos()
    root = Path(photos_dir)
    if not root.is_dir():
        raise ForensicsError(f"photos folder {str(root)!r} does not exist; give a folder of photographs with --photos")
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in PHOTO_EXTENSIONS)
    found: list[tuple[str, str, str, bool]] = []
    rejected: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    processes = max(1, min(num_workers(workers), len(paths) // MANY_PHOTOS))
    outcomes = ordered_map(_inspect_or_refuse, paths, processes)
    bar = tqdm(outcomes, total=len(paths), desc="photos", unit="file", disable=not progress or processes == 1)
    for path, (digest, is_grey, reason) in zip(paths, bar, strict=True):
        name = path.relative_to(root).as_posix()
        if reason:
            rejected.append({"name": name, "reason": reason.replace(str(root), "").strip()})
            continue
        if digest in seen:
            rejected.append({"name": name, "reason": f"same content as {seen[digest]}"})
            continue
        seen[digest] = name
        found.append((name, str(path), digest, is_grey))
    if len(found) < 2:
        detail = "; ".join(f"{item['name']}: {item['reason']}" for item in rejected) or "no image file"
        raise ForensicsError(
            f"photos folder {str(root)!r} holds {len(found)} usable photographs, need at least 2 (one to train on, one"
            f" held out); refused: {detail}; add photographs ({' '.join(sorted(PHOTO_EXTENSIONS))})"
        )
    held_out = min(len(found) - 1, max(1, round(held_out_fraction * len(found))))
    eval_digests = set(sorted(digest for _, _, digest, _ in found)[:held_out])
    photos = tuple(
        Photo(name, path, name, "eval" if digest in eval_digests else "train", is_grey, digest)
        for name, path, digest, is_grey in found
    )
    return PhotoSet(photos, tuple(rejected))


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
    """sha256 of the file and whether it is grey; ValueError when it is too small to use."""
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


def develop(
    photo: Photo,
    size_hw: tuple[int, int],
    rng: np.random.Generator,
    monochrome: bool = False,
    others: Sequence[Photo] = (),
    variation: float = 0.0,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Take an authentic picture of a photograph with a virtual camera drawn at random.

    Crop, resample, flip and rotate by right angles, exposure, white balance, gamma, saturation, signal-dependent sensor
    noise (variance a·x + b, as in Foi et al. 2008), sharpening or softening, and in half the cases the camera's JPEG.
    Hosts of both classes and donors of splices go through this same function.

    Args:
        photo: what is photographed.
        size_hw: size of the picture.
        rng: the sample's own generator.
        monochrome: drop the colour, so that a grey photograph and a coloured one can be combined without a giveaway.
        others: photographs that a varied scene may borrow from.
        variation: chance that the scene itself is varied (`scenes.vary_scene`) before the camera takes it. Its
            randomness is a child of `rng`: at 0 every picture is what it was without this argument.

    Returns:
        (*size_hw, 3) uint8 RGB and the camera's parameters.
    """
    source = open_photo(photo.path)
    turns = int(rng.integers(4)) if rng.random() < 0.35 else 0
    crop_hw = size_hw if turns % 2 == 0 else (size_hw[1], size_hw[0])
    window, view = _draw_crop(source, crop_hw, rng)
    image = resize(window.astype(np.float32), crop_hw, view["interpolation"])
    if variation > 0:
        child = rng.spawn(1)[0]
        if child.random() < variation:
            image, view["scene"] = vary_scene(image, child, lambda rng: _draw_scene(others or (photo,), crop_hw, rng))
    if flip := bool(rng.random() < 0.5):
        image = image[:, ::-1]
    image = np.rot90(image, turns)
    camera = _draw_camera(rng)
    is_grey = monochrome or photo.is_grey
    image = _tone(np.ascontiguousarray(image), camera, is_grey)
    noise = rng.standard_normal((*size_hw, 1 if is_grey else 3), dtype=np.float32)
    image = image + noise * np.sqrt(camera["noise_a"] * np.clip(image, 0, 255) + camera["noise_b"])
    if camera["sharpen"] != 0:
        soft = cv2.GaussianBlur(image, (0, 0), 0.8)
        image = image + camera["sharpen"] * (image - soft)
    picture = to_uint8(image)
    if camera["jpeg_quality"] is not None:
        picture = jpeg_round_trip(picture, camera["jpeg_quality"])
    return picture, {"photo": photo.name, **view, "flip": flip, "rot90": turns, "monochrome": is_grey, **camera}


def _draw_scene(photos: Sequence[Photo], size_hw: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(*size_hw, 3) float32: a piece of one of the photographs."""
    photo = photos[int(rng.integers(len(photos)))]
    window, view = _draw_crop(open_photo(photo.path), size_hw, rng)
    return resize(window.astype(np.float32), size_hw, view["interpolation"])


def _draw_crop(
    source: np.ndarray, crop_hw: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Window of the source to be resampled to `crop_hw`; flat pieces (sky, wall) are drawn again, in both classes."""
    height, width = source.shape[:2]
    smallest = max(crop_hw[0] / height, crop_hw[1] / width)
    low, high = max(smallest, 0.45), max(1.15, smallest * 1.05)
    for _ in range(6):
        scale = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        size = min(height, round(crop_hw[0] / scale)), min(width, round(crop_hw[1] / scale))
        top, left = (int(rng.integers(0, full - part + 1)) for full, part in zip((height, width), size, strict=True))
        window = source[top : top + size[0], left : left + size[1]]
        if float(window[::4, ::4].std()) > 14:
            break
    interpolation = "area" if scale < 0.7 else ("linear", "cubic")[int(rng.integers(2))]
    box = [left, top, left + size[1], top + size[0]]
    return window, {"crop_xyxy": box, "scale": round(scale, 4), "interpolation": interpolation}


def _draw_camera(rng: np.random.Generator) -> dict[str, Any]:
    noise_sigma = float(np.exp(rng.uniform(np.log(0.5), np.log(6.0))))  # levels, at mid grey
    shot_share = float(rng.uniform(0.3, 0.9))
    sharpen = float(rng.choice([0.0, rng.uniform(0.2, 0.9), -rng.uniform(0.3, 0.9)], p=[0.4, 0.35, 0.25]))
    return {
        "exposure": round(float(rng.uniform(0.8, 1.2)), 3),
        "gamma": round(float(rng.uniform(0.85, 1.2)), 3),
        "white_balance": [round(float(gain), 3) for gain in rng.uniform(0.93, 1.07, size=3)],
        "saturation": round(float(rng.uniform(0.75, 1.2)), 3),
        "noise_a": round(noise_sigma**2 * shot_share / 128, 6),
        "noise_b": round(noise_sigma**2 * (1 - shot_share), 5),
        "sharpen": round(sharpen, 3),
        "jpeg_quality": int(rng.integers(75, 99)) if rng.random() < 0.5 else None,
    }


def _tone(image: np.ndarray, camera: dict[str, Any], is_grey: bool) -> np.ndarray:
    """Exposure, white balance, gamma and saturation on float levels 0..255; grey keeps three equal channels."""
    gains = np.array([1, 1, 1] if is_grey else camera["white_balance"], dtype=np.float32) * camera["exposure"]
    # Whole rows and merged channels, not broadcasting over a last axis of 3: the same numbers several times as fast.
    rows = image.reshape(image.shape[0], -1) * np.tile(gains, image.shape[1])
    image = np.clip(rows / 255, 0, 1).reshape(image.shape) ** np.float32(camera["gamma"]) * np.float32(255)
    luma = image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    luma = cv2.merge([luma, luma, luma])  # (H, W, 3)
    return luma if is_grey else luma + (image - luma) * np.float32(camera["saturation"])
