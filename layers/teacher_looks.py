"""A teacher that looks twice: what it says of small faces is the mean of a look at the picture and at an enlarged copy.

On the enlarged copy a teacher sees small faces better than its student ever will, and what it says there fits the
anchors it has at the original size: an anchor of 64 px there is one of 32 px here. So students, mimics and all terms of
distillation stay as they are (multi-scale testing as the teacher's answer: data distillation, Radosavovic et al. 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers.anchors import cells
from utils.config import ConfigError, ModelConfig

FACTOR = 2  # of the copy; others would put its cells beside those of the picture
LARGEST = 64  # px: larger faces are not seen better enlarged


class TwoLooks(nn.Module):
    """A teacher's network, called like that network; anchors up to 64 px get the mean logit of two looks, and boxes and
    landmarks weighted by the two scores. Features are those of the first look.

    Where the copy has four cells for one of the picture, the surest of them speaks, so background is a little louder.

    Args:
        model: images -> raw outputs on the anchors of ``config``.
        name: what an error calls it.

    Raises:
        ConfigError: no anchor of at most 64 px has one of twice its size, on its own level or the next.
    """

    def __init__(self, model: nn.Module, config: ModelConfig, name: str = "teacher"):
        super().__init__()
        self.model, self.config = model, config
        self.sources = enlarged_anchors(config)
        if not self.sources:
            raise ConfigError(f"'distill.look_twice': {name} has no anchors of twice the size of others")

    def forward(self, images: Tensor, features: bool = False) -> dict[str, Any]:
        """Normalised images ``[B, 3, H, W]``, sides divisible by the largest stride -> outputs of the network."""
        out = self.model(images, features=True) if features else self.model(images)
        enlarged = self.model(F.interpolate(images, scale_factor=FACTOR, mode="bilinear", align_corners=False))
        height, width = images.shape[-2:]
        first = split_levels(out, self.config, height, width)
        second = split_levels(enlarged, self.config, FACTOR * height, FACTOR * width)
        for (level, place), (their_level, their_place) in self.sources.items():
            theirs = {name: x[..., their_place, :] for name, x in second[their_level].items()}
            if their_level == level:
                size = self.config.anchors[level][place]
                shift = self.config.strides[level] / (2 * FACTOR) / (size * self.config.variances[0])
                theirs = best_of_four(theirs, shift)
            ours = {name: x[..., place, :] for name, x in first[level].items()}
            for name, mean in mean_of(ours, theirs).items():
                first[level][name][..., place, :] = mean
        joined = {name: torch.cat([x[name].flatten(1, 3) for x in first], 1) for name in first[0]}
        return out | joined | {"logits": joined["logits"].squeeze(-1)}

    def neck_features(self, images: Tensor) -> dict[str, Any]:
        """Those of the first look."""
        return self.model.neck_features(images)


def enlarged_anchors(config: ModelConfig) -> dict[tuple[int, int], tuple[int, int]]:
    """For each anchor of at most 64 px, as (level, place in it), the one that stands for the same face when enlarged:
    on the same level, whose cells are then half as far apart, or on the next, whose cells are then the same."""
    found = {}
    for level, sizes in enumerate(config.anchors):
        for place, size in enumerate(sizes):
            for other in (level, level + 1)[: len(config.anchors) - level]:
                if size <= LARGEST and FACTOR * size in config.anchors[other]:
                    found[level, place] = other, config.anchors[other].index(FACTOR * size)
    return found


def split_levels(out: dict[str, Any], config: ModelConfig, height: int, width: int) -> list[dict[str, Tensor]]:
    """Raw outputs ``[B, N, ...]`` -> per level ``[B, rows, columns, sizes, values]``, copies in float32."""
    grids = [(cells(height, s), cells(width, s), len(a)) for s, a in zip(config.strides, config.anchors)]
    counts = [rows * columns * sizes for rows, columns, sizes in grids]
    levels: list[dict[str, Tensor]] = [{} for _ in grids]
    for name in ("logits", "boxes", "landmarks"):
        for level, grid, part in zip(levels, grids, out[name].float().split(counts, 1)):
            level[name] = part.reshape(len(part), *grid, -1).clone()
    return levels


def best_of_four(maps: dict[str, Tensor], shift: float) -> dict[str, Tensor]:
    """The surest of each 2x2 cells, encoded against the anchor in their middle.

    Args:
        maps: ``[B, 2 rows, 2 columns, values]`` of one anchor size.
        shift: from a cell's centre to their middle, along each axis, in the units of encoded offsets.
    """
    fours = {
        name: x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3, 4) for name, x in maps.items()
    }  # [B, rows, columns, 4, values]
    best = fours["logits"].argmax(3, keepdim=True)
    chosen = {name: x.gather(3, best.expand(*best.shape[:-1], x.shape[-1])).squeeze(3) for name, x in fours.items()}
    corner = best[..., 0, 0]  # [B, rows, columns], row by row
    offset = torch.stack([corner % 2, corner // 2], -1).float().sub(0.5).mul(2 * shift)
    chosen["boxes"][..., :2] += offset
    chosen["landmarks"] += offset.repeat(*[1] * (offset.dim() - 1), chosen["landmarks"].shape[-1] // 2)
    return chosen


def mean_of(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean logit of two opinions ``[..., values]``; boxes and landmarks weighted by their scores."""
    scores = one["logits"].sigmoid(), other["logits"].sigmoid()
    share = scores[0] / (scores[0] + scores[1]).clamp(min=1e-12)
    places = {name: share * one[name] + (1 - share) * other[name] for name in ("boxes", "landmarks")}
    return {"logits": (one["logits"] + other["logits"]) / 2, **places}
