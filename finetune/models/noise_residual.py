"""The noise-residual expert: a small U-Net over fixed statistics of the pixels, features beside the vision tower's.

Splices, clones and inpainting disturb the noise a camera and its JPEG left behind; patch embeddings trained on
semantics ignore it. "Tampered" is relative to the rest of the same picture, so every statistic comes twice, as it is
and normalised over its own image, and attention at the coarsest level compares all places of an image. On request there
are maps of what the content of the picture does not explain (`content_residuals`) and of the places that it holds
twice, to the last bit (`exact_repeats`) or nearly (`self_similarity`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import NoiseResidualConfig
from finetune.models.box_means import block_mean, window_mean
from finetune.models.content_residuals import RESIDUAL_CHANNELS, content_residuals
from finetune.models.exact_repeats import REPEAT_CHANNELS, exact_repeats
from finetune.models.features import by_shape
from finetune.models.forensic_statistics import (
    BLOCK_CHANNELS,
    CELL_CHANNELS,
    CHROMA_CHANNELS,
    STRIDE,
    Statistics,
    forensic_statistics,
    pad_to,
)
from finetune.models.resizing import resize_bilinear
from finetune.models.self_similarity import SIMILARITY_CHANNELS, self_similarity


class NoiseResidualStream(nn.Module):
    """RGB images (3, H, W) in [0, 255] -> features (channels, H/4, W/4)."""

    stride = STRIDE

    def __init__(self, config: NoiseResidualConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.widths
        hidden = config.stem_width
        self.cell_stem = RelativeStem(CELL_CHANNELS, fine, hidden)
        self.block_stem = RelativeStem(BLOCK_CHANNELS, middle, 2 * hidden)
        self.chroma_stem = RelativeStem(CHROMA_CHANNELS, coarse, 2 * hidden)
        self.fine_in, self.fine_out = ResidualBlock(fine), ResidualBlock(fine)
        self.middle_in, self.middle_out = ResidualBlock(middle), ResidualBlock(middle)
        self.to_middle, self.to_coarse = nn.Conv2d(fine, middle, 2, stride=2), nn.Conv2d(middle, coarse, 2, stride=2)
        pairs = [(ResidualBlock(coarse), GlobalBlock(coarse)) for _ in range(config.global_blocks)]
        self.coarse = nn.Sequential(*(block for pair in pairs for block in pair))
        self.up_middle, self.up_fine = nn.Conv2d(coarse, middle, 1), nn.Conv2d(middle, fine, 1)
        self.out = nn.Conv2d(fine, config.channels, 1)
        self.content = MapStem(RESIDUAL_CHANNELS, fine, coarse, hidden=64) if config.content_residuals else None
        self.repeats = MapStem(REPEAT_CHANNELS, fine, coarse, hidden=32) if config.exact_repeats else None
        self.similarity = MapStem(SIMILARITY_CHANNELS, fine, coarse, hidden=32) if config.self_similarity else None
        self.similarity_share = config.similarity_share
        self.search: Callable[[Tensor], Tensor] = search_picture  # training may put a memory in its place
        self.recall: Callable[[Tensor], Tensor | None] = _recall_nothing

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """N images of any sizes (multiples of 4) -> N feature maps."""
        return by_shape(images, lambda batch, _: self.forward_batch(batch).unbind())

    def forward_batch(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) RGB in [0, 255] -> (n, channels, H/4, W/4)."""
        height, width = images.shape[-2] // STRIDE, images.shape[-1] // STRIDE
        repeats = None if self.repeats is None else exact_repeats(images)
        similar = None if self.similarity is None else torch.stack([self._search(image) for image in images])
        return self.decode(forensic_statistics(images), repeats, similar)[..., :height, :width]

    def decode(self, statistics: Statistics, repeats: Tensor | None = None, similar: Tensor | None = None) -> Tensor:
        """Statistics of n images -> (n, channels, H'/4, W'/4); each level joins statistics of its own grain.

        Args:
            repeats: (n, REPEAT_CHANNELS, H/4, W/4) of `exact_repeats`, where the stream was made with it.
            similar: (n, SIMILARITY_CHANNELS, H/4, W/4) of `self_similarity`, likewise.
        """
        cells, chroma = self.cell_stem(statistics.cells), self.chroma_stem(statistics.chroma)
        sides = []
        if self.content is not None:
            sides.append(self.content(content_residuals(statistics.cells)))
        if self.repeats is not None and repeats is not None:
            sides.append(self.repeats(pad_to(repeats, 4)))
        if self.similarity is not None and similar is not None:
            sides.append(self.similarity(pad_to(similar, 4)))
        for fine_side, coarse_side in sides:
            cells, chroma = cells + fine_side, chroma + coarse_side
        fine = self.fine_in(cells)  # (n, fine, H/4, W/4)
        middle = self.middle_in(self.to_middle(fine) + self.block_stem(statistics.blocks))  # (n, middle, H/8, W/8)
        coarse = self.coarse(self.to_coarse(middle) + chroma)  # (n, coarse, H/16, W/16)
        middle = self.middle_out(middle + _enlarge(self.up_middle(coarse)))
        return self.out(self.fine_out(fine + _enlarge(self.up_fine(middle))))

    def _search(self, image: Tensor) -> Tensor:
        """`self_similarity`; in training, of a picture that is left out, what is remembered of it, or zeros."""
        if not self.training or is_chosen(image, self.similarity_share):
            return self.search(image)
        maps = self.recall(image)
        if maps is None:
            maps = torch.zeros(SIMILARITY_CHANNELS, *(side // STRIDE for side in image.shape[-2:]), device=image.device)
        return maps


def is_chosen(image: Tensor, share: float) -> bool:
    """Whether a picture (3, H, W) is one of the share that is searched in training. Its pixels decide, not chance: so
    it is the same with any batch size, number of ranks, and after a resume."""
    return share >= 1 or int(image.detach().double().sum().round().item()) % 997 < 997 * share


def search_picture(image: Tensor) -> Tensor:
    """`self_similarity` of a picture (3, H, W), rounded to half precision, in which it can be stored."""
    return self_similarity(image).half().float()


def _recall_nothing(_: Tensor) -> None:
    return None


class MapStem(nn.Module):
    """Maps that mean something as they are -> features at 1/4 and at 1/16.

    Not normalised over the image: nothing found and everything found are different things. A summary of the whole
    picture beside them was worse on photographs not trained on (docs/experiments.md, round 4).

    Args:
        num_maps: of the input. fine, coarse: channels of the two outputs. hidden: width between the two convolutions of
            the fine one.
    """

    def __init__(self, num_maps: int, fine: int, coarse: int, hidden: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(2 * num_maps, hidden, 1), nn.GELU(), nn.Conv2d(hidden, fine, 1))
        self.coarse = nn.Conv2d(num_maps, coarse, 1)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(n, num_maps, h, w), sides multiples of 4 -> (n, fine, h, w), (n, coarse, h/4, w/4)."""
        maps = maps.to(self.coarse.weight.dtype)
        fine = self.fine(torch.cat([maps, window_mean(maps, 5)], dim=1))
        return fine, self.coarse(block_mean(maps, 4))


class RelativeStem(nn.Module):
    """Statistics as they are and normalised over their own image -> features, by one or two 1x1 convolutions.

    Args:
        num_statistics, channels: of the input and of the output. hidden: width between two convolutions with a GELU,
            which can compare one statistic with another; 0 for a single convolution.
    """

    def __init__(self, num_statistics: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(2 * num_statistics, hidden or channels, 1)
        self.mix = nn.Conv2d(hidden, channels, 1) if hidden else None

    def forward(self, statistics: Tensor) -> Tensor:
        """(n, num_statistics, h, w) -> (n, channels, h, w)."""
        both = torch.cat([statistics, F.instance_norm(statistics)], dim=1)
        features = self.project(both.to(self.project.weight.dtype))
        return features if self.mix is None else self.mix(F.gelu(features))


class ZeroConv2d(nn.Conv2d):
    """Convolution that starts at zero: the residual branch behind it starts as the identity."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ResidualBlock(nn.Module):
    """x + 1x1(GELU(3x3(group norm of one image))), the last convolution starting at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(max(1, channels // 16), channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = ZeroConv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> same shape."""
        return x + self.mix(F.gelu(self.conv(self.norm(x))))


class GlobalBlock(nn.Module):
    """Pre-norm attention between all cells of one image, then a feed-forward layer; no position codes."""

    def __init__(self, channels: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.GroupNorm(1, channels) for _ in range(2))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.merge = ZeroConv2d(channels, channels, 1)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = ZeroConv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> same shape."""
        n, c, h, w = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, 3, self.num_heads, c // self.num_heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(dim=1)  # (n, heads, h*w, C/heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, c, h, w)
        x = x + self.merge(mixed)
        return x + self.narrow(F.gelu(self.widen(self.norms[1](x))))


def _enlarge(maps: Tensor) -> Tensor:
    return resize_bilinear(maps, (2 * maps.shape[-2], 2 * maps.shape[-1]))
