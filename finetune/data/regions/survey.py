"""The folders of region data as they are: images, their sizes, groups and labelled boxes, and all that is wrong.

`survey` reads the label files and only headers of images, `decode_images` the rest. An image with a problem keeps it:
what becomes of such images is the caller's decision, never a box less in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from finetune.data.images import image_size_hw, load_image
from finetune.data.readers.file_tree import IMAGE_SUFFIXES, iter_files
from finetune.data.regions.labels import Box, LabelledBox, read_labels
from finetune.data.regions.settings import WIDE_TO_ASCII, RegionsConfig
from finetune.errors import ConfigError, DataFormatError
from finetune.progress import progress_bar
from finetune.schema import ImageInput

ABNORMAL, NORMAL = "abnormal", "normal"


@dataclass
class RegionImage:
    """One image, or one label file without an image.

    Args:
        id: `abnormal/` or `normal/` and the path below that folder, without ending.
        path: the image; "" where there is none.
        group: folder below `abnormal_dir` or `normal_dir`, "" directly in it.
        size_hw: of the upright image; (0, 0) where it cannot be read.
        boxes: labelled boxes with their type by `label_map`.
        types: of each box, the type as labelled.
        avoid: boxes left out as too small: no defect-free candidate may lie there.
        num_lines: of the label file.
        problems, notes: see `labels.Labels`; an image with a problem must not be used.
    """

    id: str
    path: str
    group: str
    size_hw: tuple[int, int] = (0, 0)
    boxes: list[LabelledBox] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    avoid: list[Box] = field(default_factory=list)
    num_lines: int = 0
    problems: list[DataFormatError] = field(default_factory=list)
    notes: list[DataFormatError] = field(default_factory=list)

    @property
    def is_abnormal(self) -> bool:
        """Whether it comes from `abnormal_dir`."""
        return self.id.startswith(f"{ABNORMAL}/")


def survey(config: RegionsConfig) -> Iterator[RegionImage]:
    """Every image of both folders, and every label file without image, in a fixed order.

    Raises:
        ConfigError: a folder is not there, or the two are the same.
        DataFormatError: a folder cannot be read.
    """
    for name in ("abnormal_dir", "normal_dir"):
        folder = getattr(config, name)
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"{name}: no folder '{folder}'; give a path that exists")
    if config.normal_dir:
        abnormal, normal = Path(config.abnormal_dir).resolve(), Path(config.normal_dir).resolve()
        if abnormal == normal or abnormal in normal.parents or normal in abnormal.parents:
            raise ConfigError(f"abnormal_dir '{abnormal.name}' and normal_dir '{normal.name}' lie in one another")
    yield from _abnormal(config)
    if config.normal_dir:
        yield from _normal(config)


def decode_images(images: Sequence[RegionImage]) -> None:
    """Decode every image without a problem, in threads; one that is truncated or damaged gets its problem here.

    Else it would be found in the middle of a training run.
    """

    def problem(image: RegionImage) -> DataFormatError | None:
        try:
            load_image(ImageInput(path=image.path), image.id, image.id)
        except DataFormatError as error:
            return error
        return None

    whole = [image for image in images if not image.problems]
    with ThreadPoolExecutor() as pool:
        found = pool.map(problem, whole)
        shown = progress_bar(found, total=len(whole), desc="decoding images", unit="image", leave=False)
        for image, error in zip(whole, shown, strict=True):
            if error is not None:
                image.problems = [error]


def _abnormal(config: RegionsConfig) -> Iterator[RegionImage]:
    root = Path(config.abnormal_dir)
    stems: dict[str, list[str]] = {}
    for name in iter_files(root, (*IMAGE_SUFFIXES, ".txt")):
        stems.setdefault(name.rpartition(".")[0], []).append(name)
    for stem, names in stems.items():
        labels = [name for name in names if name.lower().endswith(".txt")]
        images = [name for name in names if name not in labels]
        image = _image(root, images[0] if images else stem, ABNORMAL, stem, has_file=bool(images))
        if len(images) != 1 or len(labels) != 1:
            image.problems = [_pairing_problem(stem, images, labels)]
        elif not image.problems:
            _label(image, root, labels[0], config)
        yield image


def _normal(config: RegionsConfig) -> Iterator[RegionImage]:
    root = Path(config.normal_dir)
    seen: dict[str, str] = {}
    for name in iter_files(root, (*IMAGE_SUFFIXES, ".txt")):
        stem = name.rpartition(".")[0]
        image = _image(root, name, NORMAL, stem, has_file=not name.lower().endswith(".txt"))
        if name.lower().endswith(".txt"):
            image.id += ".txt"
            problem, fix = "label file in normal_dir", "move it and its image to abnormal_dir, or delete it"
            image.problems = [DataFormatError(problem, source=name, fix=fix)]
        elif stem in seen:
            image.id += f".{name.rpartition('.')[2]}"
            image.problems = [
                DataFormatError("two images of one name", source=name, found=seen[stem], fix="rename one")
            ]
        else:
            seen[stem] = name
        yield image


def _image(root: Path, name: str, kind: str, stem: str, *, has_file: bool) -> RegionImage:
    group = str(PurePosixPath(name).parent)
    image = RegionImage(f"{kind}/{stem}", str(root / name) if has_file else "", "" if group == "." else group)
    if has_file:
        try:
            image.size_hw = image_size_hw(ImageInput(path=image.path), image.id, name)
        except DataFormatError as error:
            image.problems = [error]
    return image


def _label(image: RegionImage, root: Path, name: str, config: RegionsConfig) -> None:
    try:
        found = read_labels(root / name, image.size_hw, config, name)
    except DataFormatError as error:
        image.problems = [error]
        return
    image.notes, image.problems, image.num_lines = found.notes, found.problems, found.num_lines
    image.avoid, image.types = found.too_small, [box.defect_type for box in found.boxes]
    label_map = {plain(raw): kind for raw, kind in config.label_map.items()}
    for box in found.boxes:
        kind = label_map.get(plain(box.defect_type), "") if label_map else box.defect_type
        image.boxes.append(LabelledBox(box.box_xyxy, kind, box.source))
        if not kind:
            image.problems.append(
                DataFormatError(
                    "defect type not in label_map",
                    source=box.source,
                    field="defect_type",
                    found=box.defect_type,
                    expected=f"one of {', '.join(config.label_map)}",
                    fix=f"add '{box.defect_type}: NAME' to label_map",
                )
            )
    if not image.boxes and not image.problems:
        problem, fix = "no box large enough is left", "lower min_box_size, or take the image out"
        image.problems = [DataFormatError(problem, source=name, fix=fix)]


def plain(text: str) -> str:
    """A type for comparison: full-width characters as ASCII, white space left out."""
    return "".join(text.translate(WIDE_TO_ASCII).split())


def _pairing_problem(stem: str, images: list[str], labels: list[str]) -> DataFormatError:
    if len(images) > 1 or len(labels) > 1:
        return DataFormatError("several files of one name", source=stem, found=[*images, *labels], fix="rename one")
    if images:
        fix = "write it, or move the image to normal_dir"
        return DataFormatError("image without a label file", source=images[0], expected=f"{stem}.txt", fix=fix)
    return DataFormatError(
        "label file without an image", source=labels[0], expected=f"{stem}.jpg or .png", fix="add it"
    )
