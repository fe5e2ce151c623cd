"""What operations share: their settings, what they propose (`Edit`) and what comes of it (`Tampering`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MASK_CONVENTIONS = ("target", "source_and_target")
BLENDS = ("alpha", "poisson")


class NoVisibleEditError(Exception):
    """An operation finds nothing in this picture that it could visibly alter."""


Donor = tuple[np.ndarray, dict[str, Any]]
"""(H, W, 3) uint8 RGB picture of the host's size and the parameters of the camera that took it."""
DrawDonor = Callable[[np.random.Generator], Donor]


@dataclass(frozen=True)
class OperationSettings:
    """What the operations may draw.

    Args:
        area_ranges: operation → (least, largest) share of the image a region covers.
        shape_weights: relative weight of each name of `regions.SHAPES`. Half the default regions are segments of the
            picture, since people cut out and remove things; `text` counts only where the picture holds lines of text.
        max_feather: widest soft edge in pixels; a third of the edges are hard.
        poisson: chance in [0, 1] that a splice or copy-move is blended in the gradient domain, not by a soft edge.
        donor_match: chance in [0, 1] that a splice is chosen and adjusted to fit: the nearer in colour of two donors,
            the place of nearest colour, colour and noise moved towards the host's.
        min_change: least mean absolute difference inside the mask, in levels 0..255; below it the edit is drawn again.
        min_visible_share: least share in [0, 1] of the mask where the finished picture differs from the same picture
            without the edit, in colour or in grain, by one level or more (`visibility`); below it the edit is drawn
            again. With half, most of what is marked can be seen in the pixels at all; 0 takes everything.
        mask_convention: whether the mask of a copy-move marks the pasted `target` only, or `source_and_target`.
        diffusion_model: folder of a diffusers inpainting pipeline, for `inpaint_diffusion` only.
        diffusion_steps: denoising steps.
        diffusion_guidance: weight of the prompt, classifier-free guidance.
        diffusion_device: where the pipeline runs, `cpu`, `cuda` or `cuda:N`. Its starting noise is always drawn on the
            CPU; results are reproducible on one device, not between devices.
    """

    area_ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {
            "splice": (0.04, 0.30),
            "copy_move": (0.04, 0.18),
            "erase": (0.04, 0.18),
            "remove": (0.04, 0.18),
            "retouch": (0.05, 0.30),
            "inpaint_diffusion": (0.04, 0.30),
        }
    )
    shape_weights: Mapping[str, float] = field(
        default_factory=lambda: {
            "blob": 0.2,
            "polygon": 0.15,
            "ellipse": 0.1,
            "segment": 0.05,
            "superpixels": 0.2,
            "felzenszwalb": 0.2,
            "text": 0.3,
        }
    )
    max_feather: float = 3.0
    poisson: float = 0.12
    donor_match: float = 0.15
    min_change: float = 3.0
    min_visible_share: float = 0.5
    mask_convention: str = "target"
    diffusion_model: str | None = None
    diffusion_steps: int = 20
    diffusion_guidance: float = 7.5
    diffusion_device: str = "cpu"


@dataclass(frozen=True)
class Edit:
    """What one operation proposes, before it is blended into the host.

    Args:
        content: (H, W, 3) uint8 or float32 RGB, what stands inside `region` after the edit.
        region: (H, W) bool, where.
        feather: width of the soft edge in pixels.
        parameters: JSON values for the provenance.
        source: (H, W) bool, where a copied piece came from, else None.
        blend: a name of `BLENDS`.
    """

    content: np.ndarray
    region: np.ndarray
    feather: float
    parameters: dict[str, Any]
    source: np.ndarray | None = None
    blend: str = "alpha"


Operation = Callable[[np.ndarray, np.random.Generator, OperationSettings, DrawDonor], Edit]


@dataclass(frozen=True)
class Tampering:
    """Result of `tamper`.

    Args:
        image, mask: (H, W, 3) uint8 RGB and (H, W) bool, before post-processing.
        finished, finished_mask: the same after it, of the final size.
        parameters: for the provenance.
    """

    image: np.ndarray
    mask: np.ndarray
    finished: np.ndarray
    finished_mask: np.ndarray
    parameters: dict[str, Any]


def draw_feather(rng: np.random.Generator, settings: OperationSettings) -> float:
    """Width of a soft edge in pixels; 0, a hard edge, for a third."""
    return 0.0 if rng.random() < 1 / 3 else round(float(rng.uniform(0, settings.max_feather)), 2)


def draw_blend(rng: np.random.Generator, settings: OperationSettings) -> tuple[str, float]:
    """How a pasted piece meets the host: name of `BLENDS` and width of the soft edge (0 with `poisson`)."""
    is_poisson = bool(rng.random() < settings.poisson)
    feather = draw_feather(rng, settings)
    return ("poisson", 0.0) if is_poisson else ("alpha", feather)
