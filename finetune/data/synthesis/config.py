"""Configuration of the tampering generator: one dataclass, checked when it is made. Every default is here or in
`operations.OperationSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from finetune.config import load_config
from finetune.data.synthesis.answers import EVIDENCE_DETAILS, LANGUAGES
from finetune.data.synthesis.conversations import COORDINATES, RECORD_KINDS
from finetune.data.synthesis.degradations import DEGRADATIONS
from finetune.data.synthesis.image_files import IMAGE_FORMATS, METADATA
from finetune.data.synthesis.operations import MASK_CONVENTIONS, OPERATIONS, OperationSettings
from finetune.data.synthesis.operations.diffusion import check_diffusion
from finetune.data.synthesis.regions import SHAPES
from finetune.errors import ConfigError


@dataclass
class SynthConfig:
    """What to make.

    Args:
        num_train, num_eval: number of images per split, >= 0, not both 0. `eval` has photographs of its own.
        num_val: further images of the training photographs, for choosing a checkpoint without looking at `eval`.
        seed: everything random follows from it.
        sizes_hw: output sizes (H, W), drawn uniformly; multiples of 28 pass Qwen2.5-VL's resizing unchanged, which
            keeps the noise traces.
        tampered_fraction: share of tampered images in [0, 1]; the count is exact, the order random.
        paired: the training split holds every picture twice, authentic and tampered, with the same camera, size and
            post-processing and the same `provenance.pair`, so that only the edit tells the classes apart. `val` and
            `eval` are never paired. Needs half the pictures, and trained slightly better on as many images.
        operations: relative weight of each tampering operation. By default splices lead, as in the public sets, and
            `remove`, the slowest and the hardest to see, is least; `inpaint_diffusion` needs a local pipeline
            (`operation_settings.diffusion_model`) and is 0.
        operation_settings: area ranges, shapes, edges and blending, donors, mask convention, diffusion pipeline.
        degradations: relative weight of each post-processing step, the same for both classes.
        no_degradation, two_degradations: chance of none; chance of two where there is any.
        grey_photo_weight: how often a grey photograph is the host, relative to a coloured scene.
        monochrome: chance that a coloured host is made grey.
        scene_variation: chance that a training picture shows a varied scene (`scenes`), for content that few
            photographs lack. `val` and `eval` never do.
        further_edits: chance that a tampered training picture has one or two more edits, of operations drawn for
            themselves (`provenance.further_operations`), which its mask, polygons and evidence hold too; the mask then
            numbers them (`image_files.encode_numbers`). One that would cover more than 0.3 of an earlier one, or 0.45
            of the picture with it, is left out. `val` and `eval` never have; only with `record_kinds` of `single`.
        language: of the evidence text and of conversations: `zh`, `en`, or `both` (drawn per record).
        evidence_detail: `short`: what was done, where, how hard to see; `full`: also how large, shape and origin.
        record_kinds: records of each kind (`conversations.RECORD_KINDS`) per image; `single` is 1 where not given, and
            at most 1. All other kinds are written to `{split}_instruct.jsonl`.
        mix_photos: conversations about several images may take them from different photographs.
        coordinates: in written conversations: `absolute` pixels, only for sizes that Qwen2.5-VL's resizing keeps;
            `relative` thousandths; `words`: none.
        max_points: point budget of the polygons of one image.
        image_format: container of the images, `png`, `jpeg` or `webp`; its parameters know no label.
        image_quality: (least, largest) quality of a `jpeg` or `webp` container.
        metadata: `strip` writes no EXIF; `carry` writes the host photograph's to both classes, without place,
            orientation, thumbnail and software.
        photos_dir: the user's photographs; None for the packaged ones.
        train_photos_dir: further photographs to train on; those held out stay as they are.
        held_out_fraction: share of a user's photographs held out for `eval`.
        workers: processes; 0 means one per core. Never changes the output.
    """

    num_train: int = 2000
    num_eval: int = 300
    num_val: int = 120
    seed: int = 0
    sizes_hw: tuple[tuple[int, int], ...] = ((224, 224), (196, 252), (252, 196))
    tampered_fraction: float = 0.5
    paired: bool = True
    operations: dict[str, float] = field(
        default_factory=lambda: {"splice": 0.35, "copy_move": 0.15, "erase": 0.15, "remove": 0.1, "retouch": 0.25}
    )
    operation_settings: OperationSettings = field(default_factory=OperationSettings)
    degradations: dict[str, float] = field(
        default_factory=lambda: {
            "jpeg": 0.4,
            "double_jpeg": 0.12,
            "webp": 0.08,
            "resize": 0.1,
            "resize_back": 0.05,
            "noise": 0.08,
            "blur": 0.05,
            "contrast": 0.12,
        }
    )
    no_degradation: float = 0.35
    two_degradations: float = 0.2
    grey_photo_weight: float = 0.4
    monochrome: float = 0.05
    scene_variation: float = 0.0
    further_edits: float = 0.0
    language: str = "zh"
    evidence_detail: str = "short"
    record_kinds: dict[str, float] = field(default_factory=lambda: {"single": 1.0})
    mix_photos: bool = False
    coordinates: str = "absolute"
    max_points: int = 24
    image_format: str = "png"
    image_quality: tuple[int, int] = (80, 97)
    metadata: str = "strip"
    photos_dir: str | None = None
    train_photos_dir: str | None = None
    held_out_fraction: float = 0.25
    workers: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.operation_settings, Mapping):  # from YAML
            self.operation_settings = make_settings(self.operation_settings)
        given = self.operation_settings.area_ranges
        self.operation_settings = replace(
            self.operation_settings, area_ranges={**OperationSettings().area_ranges, **given}
        )
        self.sizes_hw = tuple((int(height), int(width)) for height, width in self.sizes_hw)
        _require(
            min(self.num_train, self.num_eval, self.num_val) >= 0 and self.num_train + self.num_eval > 0,
            "num_train, num_eval",
            (self.num_train, self.num_eval),
            "counts >= 0, not both 0",
        )
        _require(
            bool(self.sizes_hw) and all(32 <= side <= 2048 for size in self.sizes_hw for side in size),
            "sizes_hw",
            self.sizes_hw,
            "(height, width) pairs of 32..2048 px",
        )
        _require(self.seed >= 0, "seed", self.seed, ">= 0")
        _require(self.workers >= 0, "workers", self.workers, ">= 0")
        _require(self.max_points >= 4, "max_points", self.max_points, ">= 4")
        _require(self.language in (*LANGUAGES, "both"), "language", self.language, "zh, en or both")
        _check_settings(self.operation_settings)
        self._check_records_and_files()
        fractions = "tampered_fraction no_degradation two_degradations monochrome scene_variation held_out_fraction"
        fractions += " further_edits"
        for name in fractions.split():
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a fraction in [0, 1]")
        for name, known in (("operations", OPERATIONS), ("degradations", DEGRADATIONS)):
            weights = getattr(self, name)
            unknown = sorted(set(weights) - set(known))
            _require(not unknown, name, unknown, f"names of {', '.join(known)}")
            _require(all(weight >= 0 for weight in weights.values()), name, weights, "weights >= 0")
        _require(sum(self.operations.values()) > 0, "operations", self.operations, "at least one weight above 0")
        _require(
            not (self.further_edits and self.has_conversations),
            "further_edits",
            self.further_edits,
            "0 with record_kinds of conversations, which speak of one edit",
        )
        if self.operations.get("inpaint_diffusion", 0) > 0:
            check_diffusion(self.operation_settings)

    @property
    def has_conversations(self) -> bool:
        """Whether records of any kind but `single` are asked for."""
        return any(share > 0 for kind, share in self.record_kinds.items() if kind != "single")

    def _check_records_and_files(self) -> None:
        kinds = self.record_kinds = {"single": 1.0, **self.record_kinds}
        unknown = sorted(set(kinds) - set(RECORD_KINDS))
        _require(not unknown, "record_kinds", unknown, f"names of {', '.join(RECORD_KINDS)}")
        _require(
            min(kinds.values()) >= 0 and max(kinds.values()) > 0 and kinds["single"] <= 1,
            "record_kinds",
            kinds,
            "records per image >= 0, not all 0, single at most 1",
        )
        for name, known in (
            ("evidence_detail", EVIDENCE_DETAILS),
            ("coordinates", COORDINATES),
            ("image_format", tuple(IMAGE_FORMATS)),
            ("metadata", METADATA),
        ):
            _require(getattr(self, name) in known, name, getattr(self, name), " or ".join(known))
        least, largest = self.image_quality = (int(self.image_quality[0]), int(self.image_quality[1]))
        _require(1 <= least <= largest <= 100, "image_quality", self.image_quality, "1 <= least <= largest <= 100")


def load_synth_config(
    path: str | Path | None, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> SynthConfig:
    """A configuration from a YAML file whose top-level keys are the fields of `SynthConfig`.

    Args:
        path: e.g. configs/data/synth_default.yaml; None for the defaults.
        overrides: `key.sub=value`, values in YAML syntax.
        options: fields by name, which win over both.

    Raises:
        ConfigError: file missing or not YAML, unknown key (with the nearest known one), value that cannot be used.
    """
    return replace(load_config(path, overrides, SynthConfig), **(options or {}))


def _require(good: bool, name: str, found: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"synth: {name} is {found!r}, expected {expected}")


def make_settings(values: Mapping[str, Any]) -> OperationSettings:
    """`OperationSettings` from plain values; area ranges that are not given keep their defaults."""
    known = {item.name for item in fields(OperationSettings)}
    unknown = sorted(set(values) - known)
    _require(not unknown, "operation_settings", unknown, f"names of {', '.join(sorted(known))}")
    merged = dict(values)
    if "area_ranges" in merged:
        given = {name: (float(low), float(high)) for name, (low, high) in merged["area_ranges"].items()}
        merged["area_ranges"] = {**OperationSettings().area_ranges, **given}
    return OperationSettings(**merged)


def _check_settings(settings: OperationSettings) -> None:
    _require(
        settings.mask_convention in MASK_CONVENTIONS,
        "mask_convention",
        settings.mask_convention,
        " or ".join(MASK_CONVENTIONS),
    )
    for name, (low, high) in settings.area_ranges.items():
        _require(
            name in OPERATIONS and 0.01 <= low < high <= 0.5,
            f"area_ranges.{name}",
            (low, high),
            "an operation with shares 0.01 <= least < largest <= 0.5 of the image",
        )
    shapes = settings.shape_weights
    _require(
        set(shapes) <= set(SHAPES) and min(shapes.values()) >= 0 and sum(shapes.values()) > 0,
        "shape_weights",
        dict(shapes),
        f"weights >= 0 of {', '.join(SHAPES)}, at least one above 0",
    )
    _require(0 <= settings.max_feather <= 20, "max_feather", settings.max_feather, "0..20 px")
    for name in ("poisson", "donor_match", "min_visible_share"):
        _require(0 <= getattr(settings, name) <= 1, name, getattr(settings, name), "a fraction in [0, 1]")
    _require(1 <= settings.diffusion_steps <= 1000, "diffusion_steps", settings.diffusion_steps, "1..1000")
    _require(settings.diffusion_guidance >= 0, "diffusion_guidance", settings.diffusion_guidance, ">= 0")
    _require(0 <= settings.min_change < 30, "min_change", settings.min_change, "0..30 levels")
