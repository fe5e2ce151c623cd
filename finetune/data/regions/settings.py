"""The YAML of region data (`configs/data/regions.yaml`): where images are, how labels are written, how many candidates.

Its keys are those of the users' own files. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from finetune.config import load_config
from finetune.errors import ConfigError

SPLITS = ("train", "val", "test")
WIDE_TO_ASCII: Mapping[int, int | str] = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full-width digits, letters and punctuation
    0x3000: " ",
    0x00A0: " ",
    0x2212: "-",
}
"""For `str.translate`: one character each, so that places in a text stay the same."""


@dataclass
class RegionsConfig:
    """Region data from raw files to conversations.

    Raises:
        ConfigError: values that cannot be used.
    """

    abnormal_dir: str = ""  # images, each beside a .txt of the same name
    normal_dir: str = ""  # images without labels; "": none
    out_dir: str = ""
    seed: int = 0
    train_ratio: float = 0.8
    val_ratio: float = 0.1
    test_ratio: float = 0.1
    split_by_parent: bool = True  # images of one folder never fall on both sides of a split
    holdout_list: str | None = None  # file with one image, folder or pattern per line, all of them forced into test
    min_box_size: float = 8  # pixels of the original image; a box with a shorter side is left out and reported
    max_boxes_per_image: int = 12  # candidates of one image, positive and negative together
    abnormal_neg_per_pos: float = 1.0  # boxes without a defect per labelled box, on images with a defect
    normal_decoys_per_image: int | Literal["match"] = "match"  # on normal images; match: as many as others have
    column_delim: str = ";；"  # each character separates columns
    inner_coord_delims: list[str] | str = field(default_factory=lambda: ["；", ";", "，", ",", "、", " ", "\t"])
    coords_are_xyxy: bool = True  # false: cx, cy, w, h
    label_map: dict[str, str] = field(default_factory=dict)  # type as labelled -> type as taught; {}: as labelled

    def __post_init__(self) -> None:
        if not self.column_delim.strip(" "):
            raise ConfigError("column_delim is empty; expected one or more characters, e.g. ';'")
        if any(each in "0123456789.+-" for each in self.inner_delims + self.column_delim):
            raise ConfigError("column_delim and inner_coord_delims may not hold digits, '.', '+' or '-'")
        total = self.train_ratio + self.val_ratio + self.test_ratio
        if min(self.ratios.values()) < 0 or abs(total - 1) > 1e-6:
            raise ConfigError(
                f"train_ratio + val_ratio + test_ratio is {total:g}; expected shares from 0 on that add up to 1"
            )
        for name, least in (("min_box_size", 1), ("max_boxes_per_image", 1), ("abnormal_neg_per_pos", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if isinstance(self.normal_decoys_per_image, int) and self.normal_decoys_per_image < 0:
            raise ConfigError(
                f"normal_decoys_per_image is {self.normal_decoys_per_image}; expected 0 or more, or match"
            )

        for raw, kind in self.label_map.items():
            if kind.strip() in ("", "normal", "abnormal"):
                raise ConfigError(f"label_map sends '{raw}' to '{kind}'; expected a type of defect, no verdict")

    @property
    def ratios(self) -> dict[str, float]:
        """Share of each split."""
        return dict(zip(SPLITS, (self.train_ratio, self.val_ratio, self.test_ratio), strict=True))

    @property
    def inner_delims(self) -> str:
        """Characters that separate coordinates, full-width ones as ASCII."""
        return "".join(self.inner_coord_delims).translate(WIDE_TO_ASCII)

    @property
    def column_delims(self) -> str:
        """Characters that separate columns, full-width ones as ASCII."""
        return self.column_delim.translate(WIDE_TO_ASCII)


def load_regions_config(path: str | None, overrides: list[str]) -> RegionsConfig:
    """The configuration of a YAML, or the defaults (None), with `key=value` overrides.

    Raises:
        ConfigError: as `finetune.config.load_config`, or no folder of abnormal images, or no `out_dir`.
    """
    config = load_config(path, overrides, RegionsConfig)
    for name, example in (("abnormal_dir", "data/raw/abnormal"), ("out_dir", "data/processed/regions")):
        if not getattr(config, name):
            raise ConfigError(f"{path or 'defaults'}: {name} is empty; set it, e.g. {name}={example}")
    return config
