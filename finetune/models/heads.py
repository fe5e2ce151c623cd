"""Heads on token states: image classification, and two mask heads behind one interface (`HEADS`).

A mask head sees token states, the tower's patches in raster order and, where the expert is on, the noise-residual
features; it never sees text. Masks come out in the frame of the processed image, one map per image of any aspect ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import HeadsConfig
from finetune.models.features import by_shape
from finetune.models.resizing import resize_bilinear


class MaskHeadOutput(NamedTuple):
    """logits: M maps (h, w) at the head's own stride. features: M maps (C, h, w) that the logits were made from."""

    logits: list[Tensor]
    features: list[Tensor]


class ClsHead(nn.Module):
    """`<cls>` state (and evidence of the mask branch) -> tampering logit.

    logit = MLP(norm(state)) + MLP(norm(evidence)); two summands, so that either source can carry the verdict alone.
    """

    def __init__(self, config: HeadsConfig, text_hidden_size: int, num_cls: int, evidence_size: int) -> None:
        super().__init__()
        width = text_hidden_size * num_cls
        self.norm = nn.LayerNorm(width)
        self.embed = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.hidden_size, 1)
        self.evidence = (
            nn.Sequential(
                nn.LayerNorm(evidence_size), nn.Linear(evidence_size, 64), nn.GELU(), nn.Linear(64, 1, bias=False)
            )
            if evidence_size
            else None
        )

    def forward(self, states: Tensor, evidence: Tensor | None) -> tuple[Tensor, Tensor]:
        """(M, num_cls, D) and (M, E) -> logits (M,), embedding of the image (M, hidden_size)."""
        embedding = F.gelu(self.embed(self.norm(states.flatten(1))))  # (M, hidden)
        logits = self.out(self.dropout(embedding)).squeeze(-1)  # (M,)
        if self.evidence is not None and evidence is not None:
            logits = logits + self.evidence(evidence).squeeze(-1)
        return logits, embedding


class RareLogit(nn.Conv2d):
    """Convolution to one logit that starts where few pixels are tampered: sigmoid(-1.5) = 0.18."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.constant_(self.bias, -1.5)


class QueryMaskHead(nn.Module):
    """Mask tokens query the tower's patches, then score every pixel feature (default head).

    The design of MaskFormer (Cheng et al. 2021) with the LLM's mask tokens as queries:
    1. token states -> queries; cross- and self-attention over patches (with 2-D position codes);
    2. patches (and noise-residual features) -> pixel features at the head's stride;
    3. logit(x) = sum_i softmax(w)_i <k_i, pixel(x)> / sqrt(d) + direct(pixel(x)).
    """

    def __init__(
        self, config: HeadsConfig, text_hidden_size: int, vision_hidden_size: int, num_mask: int, stream_channels: int
    ) -> None:
        super().__init__()
        d = config.hidden_size
        self.has_stream = stream_channels > 0
        self.state_proj = nn.Sequential(nn.LayerNorm(text_hidden_size), nn.Linear(text_hidden_size, d))
        self.patch_norms = nn.ModuleList(nn.LayerNorm(vision_hidden_size) for _ in config.vision_layers)
        self.patch_projs = nn.ModuleList(nn.Linear(vision_hidden_size, d) for _ in config.vision_layers)
        self.layers = nn.ModuleList(QueryLayer(d, config.num_heads, config.dropout) for _ in range(config.num_layers))
        self.stream_proj = nn.Conv2d(stream_channels, d, 1) if self.has_stream else None
        side = 1 if self.has_stream else 3  # the stream knows its surroundings, and 3x3 at its size is slow
        self.pixel = nn.Sequential(nn.GroupNorm(1, d), nn.Conv2d(d, d, side, padding=side // 2), nn.GELU())
        self.kernel = nn.Linear(d, d)
        self.weight = nn.Linear(d, 1)
        self.direct = RareLogit(d, 1, 1)
        self.num_features = d

    def forward(
        self, states: Tensor, patches: Sequence[Sequence[Tensor]], stream: Sequence[Tensor] | None
    ) -> MaskHeadOutput:
        """States (M, num_mask, D), per tower layer M patch maps (C, h, w), M stream maps (S, H, W) -> M logit maps."""
        queries = self.state_proj(states)  # (M, n, d)
        embedded = [self._embed([layer[m] for layer in patches]) for m in range(len(states))]  # (d, h, w) each
        if self.has_stream:
            assert stream is not None
        features: list[Tensor] = []

        def run(batch: Tensor, indices: list[int]) -> Sequence[Tensor]:
            memory = batch.flatten(2).transpose(1, 2)  # (k, h*w, d)
            memory = memory + position_code(batch.shape[-2], batch.shape[-1], batch.shape[1], batch)
            q = queries[indices]
            for layer in self.layers:
                q = layer(q, memory)
            pixel = self._pixels(batch, [stream[i] for i in indices] if stream is not None else None)  # (k, d, H, W)
            kernel = torch.einsum("knd,kn->kd", self.kernel(q), self.weight(q).squeeze(-1).softmax(dim=-1))
            logits = torch.einsum("kd,kdhw->khw", kernel, pixel) / math.sqrt(pixel.shape[1])
            logits = logits + self.direct(pixel).squeeze(1)
            return torch.cat([logits.unsqueeze(1), pixel], dim=1).unbind()  # (1 + d, H, W) each

        for packed in by_shape(embedded, run):
            features.append(packed)
        return MaskHeadOutput([packed[0] for packed in features], [packed[1:] for packed in features])

    def _embed(self, layers: Sequence[Tensor]) -> Tensor:
        """Maps (C, h, w) of one image from each tower layer -> (d, h, w)."""
        summed = torch.zeros((), device=layers[0].device)
        for norm, proj, patches in zip(self.patch_norms, self.patch_projs, layers, strict=True):
            summed = summed + proj(norm(patches.permute(1, 2, 0).to(proj.weight.dtype)))
        return summed.permute(2, 0, 1)

    def _pixels(self, patches: Tensor, stream: Sequence[Tensor] | None) -> Tensor:
        if stream is None or self.stream_proj is None:
            fine = resize_bilinear(patches, (2 * patches.shape[-2], 2 * patches.shape[-1]))
        else:
            residual = torch.stack(list(stream))  # (k, S, H, W)
            fine = resize_bilinear(patches, residual.shape[-2:])
            fine = fine + self.stream_proj(residual.to(fine.dtype))
        return self.pixel(fine)


class OperationHead(nn.Conv2d):
    """Features behind the mask -> at every place a logit for "authentic" and for each kind of edit.

    Kinds are finer labels than tampered or not: what tells a splice from a smoothed place has to be seen before the two
    can be told apart, so the features learn it sooner (docs/experiments.md, round 10).

    Source: classes of edits as the training task of ManTra-Net (Wu et al. 2019).
    """

    def __init__(self, num_features: int, num_operations: int) -> None:
        super().__init__(num_features, 1 + num_operations, 1)

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """M maps (C, h, w) of any sizes -> M maps (1 + K, h, w)."""
        return by_shape(features, lambda batch, _: self(batch.to(self.weight.dtype)).unbind())


class GridMaskHead(nn.Module):
    """Token states -> coarse grid -> upsampled map, no look at patches: earlier toolkits' plain head, to compare."""

    def __init__(
        self, config: HeadsConfig, text_hidden_size: int, vision_hidden_size: int, num_mask: int, stream_channels: int
    ) -> None:
        super().__init__()
        self.side, self.width = config.grid_size, 16
        self.state_proj = nn.Sequential(nn.LayerNorm(text_hidden_size), nn.Linear(text_hidden_size, self.width))
        self.to_grid = nn.Linear(self.width * num_mask, self.width * self.side**2)
        self.stream_proj = nn.Conv2d(stream_channels, self.width, 1) if stream_channels else None
        self.refine = nn.Sequential(
            nn.Conv2d(self.width, self.width, 3, padding=1), nn.GELU(), nn.Conv2d(self.width, self.width, 3, padding=1)
        )
        self.out = nn.Conv2d(self.width, 1, 1)
        self.num_features = self.width

    def forward(
        self, states: Tensor, patches: Sequence[Sequence[Tensor]], stream: Sequence[Tensor] | None
    ) -> MaskHeadOutput:
        """See `QueryMaskHead.forward`; of `patches` only the map sizes are read."""
        grids = self.to_grid(F.gelu(self.state_proj(states)).flatten(1)).view(-1, self.width, self.side, self.side)
        logits, features = [], []
        for m, grid in enumerate(grids):
            height, width = patches[0][m].shape[-2:]
            size = (2 * height, 2 * width) if stream is None else tuple(stream[m].shape[-2:])
            fine = resize_bilinear(grid.unsqueeze(0), size)  # (1, c, H, W)
            if self.stream_proj is not None and stream is not None:
                fine = fine + self.stream_proj(stream[m].unsqueeze(0).to(fine.dtype))
            fine = fine + self.refine(fine)
            logits.append(self.out(fine)[0, 0])
            features.append(fine[0])
        return MaskHeadOutput(logits, features)


HEADS: dict[str, type[QueryMaskHead] | type[GridMaskHead]] = {"query": QueryMaskHead, "grid": GridMaskHead}


class QueryLayer(nn.Module):
    """Pre-norm transformer layer: self-attention of the queries, cross-attention to the patches, feed-forward."""

    def __init__(self, d: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(d, num_heads, dropout=dropout, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(d, num_heads, dropout=dropout, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Queries (k, n, d), memory (k, h*w, d) -> (k, n, d)."""
        x = self.norms[0](queries)
        queries = queries + self.self_attention(x, x, x, need_weights=False)[0]
        queries = queries + self.cross_attention(self.norms[1](queries), memory, memory, need_weights=False)[0]
        return queries + self.feed_forward(self.norms[2](queries))


def position_code(height: int, width: int, d: int, like: Tensor) -> Tensor:
    """2-D sine position code (h*w, d), half the channels for y and half for x (Carion et al. 2020)."""
    quarter = d // 4
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(quarter, device=like.device) / max(quarter, 1))
    ys = torch.arange(height, device=like.device)[:, None] * frequencies  # (h, d/4)
    xs = torch.arange(width, device=like.device)[:, None] * frequencies  # (w, d/4)
    y_code = torch.cat([ys.sin(), ys.cos()], dim=1)[:, None].expand(height, width, -1)
    x_code = torch.cat([xs.sin(), xs.cos()], dim=1)[None].expand(height, width, -1)
    code = torch.cat([y_code, x_code], dim=-1).reshape(height * width, -1)
    return F.pad(code, (0, d - code.shape[1])).to(like.dtype)


EVIDENCE_QUANTILES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of an image's pixels whose highest mask logits are averaged into the image score's evidence."""


def pool_evidence(mask_logits: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """What the mask branch tells the image score: top-k means of the logits, features where they are high.

    Args:
        mask_logits: M maps (h, w). features: M maps (C, h, w).

    Returns:
        (M, len(EVIDENCE_QUANTILES) + 3 + 2 * C).
    """
    rows = []
    for logits, feature in zip(mask_logits, features, strict=True):
        ranked = logits.flatten().sort(descending=True).values
        tops = [ranked[: max(1, int(share * len(ranked)))].mean() for share in EVIDENCE_QUANTILES]
        scores = logits.sigmoid()
        weight = (scores / scores.sum().clamp_min(1e-6)).to(feature.dtype)
        inside = (feature * weight).sum(dim=(1, 2))  # (C,)
        statistics = torch.stack([*tops, logits.mean(), logits.std(unbiased=False), scores.mean()])
        rows.append(torch.cat([statistics, inside, feature.mean(dim=(1, 2))]))
    return torch.stack(rows)


def evidence_size(num_features: int) -> int:
    """Width of `pool_evidence`'s rows for C = `num_features`."""
    return len(EVIDENCE_QUANTILES) + 3 + 2 * num_features
