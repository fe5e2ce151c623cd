"""Self-similarity maps of pictures that were searched before: a picture costs its search once, whatever else trains.

The search sees pixels only, no weight, so its maps stay valid where those of the tower do not (`feature_cache`), for
every run and stage with the same pixel limits. One file per picture, named by the SHA-256 of its pixels.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from torch import Tensor, nn

from finetune.config import RunConfig
from finetune.models.noise_residual import NoiseResidualStream, search_picture
from finetune.models.self_similarity import SEARCH_VERSION
from finetune.training.feature_cache import FeatureStore

logger = logging.getLogger(__name__)

_FIRST = 500
"""Pictures after which a store that holds none of them is no coincidence."""


class SearchCache:
    """Stands in for `search_picture`: the same maps to the bit, read where they are stored.

    Args:
        folder: the user's; a subfolder per version of the search is made in it.
    """

    def __init__(self, folder: Path) -> None:
        self.store = FeatureStore(folder / f"self_similarity_{SEARCH_VERSION}", needs_pixels=True)
        self.num_searched = 0
        self._asked = self._recalled = 0

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) RGB in [0, 255] -> (SIMILARITY_CHANNELS, H/4, W/4) float32."""
        key = _key(image)
        maps = self._load(key, image)
        if maps is None:
            maps = search_picture(image)
            self.store.save(key, [maps.half()], (image.shape[-2], image.shape[-1]))
            self.num_searched += 1
        return maps

    def recall(self, image: Tensor) -> Tensor | None:
        """The maps if they are stored; said once where none of the first pictures is."""
        maps = self._load(_key(image), image)
        self._asked += 1
        self._recalled += maps is not None
        if self._asked == _FIRST and not self._recalled:
            logger.warning(
                "none of the first %d training pictures that are not searched is stored in %s: its maps are of other "
                "pictures, or of other pixel limits; run `forensics precompute` with this configuration",
                _FIRST, self.store.folder,
            )  # fmt: skip
        return maps

    def _load(self, key: str, image: Tensor) -> Tensor | None:
        found = self.store.load(key)
        return None if found is None else found[0][0].to(image.device).float()


def _key(image: Tensor) -> str:
    pixels = image.detach().float().cpu().contiguous()
    return hashlib.sha256(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes()).hexdigest()


def search_cache_problems(config: RunConfig, will_be_filled: bool = False) -> list[str]:
    """Why a run has no use for stored searches, one line each; [] where it has.

    Args:
        will_be_filled: searches are about to be stored, so that an empty folder is no problem.
    """
    name = f"train.search_cache is '{config.train.search_cache}'"
    noise = config.heads.noise_residual
    if not (config.heads.enabled and noise.enabled and noise.self_similarity):
        return [f"{name}, but nothing is searched; it needs heads.noise_residual.self_similarity: true"]
    problems = []
    needs_stored = noise.similarity_share == 0 and not will_be_filled
    if needs_stored and SearchCache(Path(str(config.train.search_cache))).store.is_empty():
        problems.append(
            f"{name}, which holds no searches, and heads.noise_residual.similarity_share is 0: no picture would be "
            "searched in training; run `forensics precompute --share S` first, or raise the share"
        )
    if config.region_masking.enabled:
        problems.append(f"{name}: region_masking changes the pixels at every draw; switch one of them off")
    if config.adversarial.share and config.adversarial.target == "pixels":
        problems.append(f"{name}: adversarial training changes the pixels; switch one of them off")
    return problems


def use_search_cache(model: nn.Module, config: RunConfig) -> SearchCache | None:
    """Let every noise-residual stream of a model remember its searches, where the run asks for it."""
    if not config.train.search_cache:
        return None
    cache = SearchCache(Path(config.train.search_cache))
    for module in model.modules():
        if isinstance(module, NoiseResidualStream):
            module.search, module.recall = cache, cache.recall
    return cache
