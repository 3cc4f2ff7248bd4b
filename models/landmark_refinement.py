"""Landmarks that look again: each point is corrected by what the features at its own place say.

The heads predict five points from one cell, whose stride is a good part of the distance between two eyes; what the
level below knows about the places they point at is not asked. Supervised descent (Xiong & De la Torre, 2013) asks
there: one linear map takes the features at all five places to a correction. Here they are the neck's laterals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.modules_v2_ultra import small_init

LEAST = 32.0  # px; landmarks of smaller anchors stay as they are: a few pixels hold no more than their cell knows
GROWTH = 2.0  # a box counts as at most exp(2) times larger or smaller than its anchor


class LandmarkRefinement(nn.Module):
    """Corrects the landmarks of all anchors from 32 px on; everything else of the predictions stays as it is.

    For a face of level ``i`` the features are those of level ``i - 1`` (of P3 for P3 itself),
    ``relu(reduce(around(lateral)))`` with a depthwise 3x3 and a 1x1 convolution, read between cells at the five
    predicted points. ``correct`` maps them to the correction, in units of the predicted box's width and height. It
    starts so small that a new module changes next to nothing. Boxes and the layers below learn nothing from it.

    Args:
        channels: C of the laterals.
        strides, anchors: pixels per cell and anchor sizes of each level.
        variances: of the box coding.
        hidden: features per point.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        anchors: Sequence[Sequence[float]],
        variances: Sequence[float],
        hidden: int = 20,
    ) -> None:
        super().__init__()
        self.strides, self.anchors, self.variances = tuple(strides), [tuple(a) for a in anchors], tuple(variances)
        self.around = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        nn.init.dirac_(self.around.weight, groups=channels)
        nn.init.zeros_(self.around.bias)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.correct = small_init(nn.Linear(5 * hidden, 10), 1e-3)

    def forward(self, boxes: Tensor, landmarks: Tensor, laterals: Sequence[Tensor]) -> Tensor:
        """Encoded ``boxes [B, N, 4]`` and ``landmarks [B, N, 10]``, three ``[B, C, h, w]`` -> ``landmarks [B, N, 10]``,
        float32 whatever autocast says: a pixel of a large picture is more than bfloat16 can tell."""
        sources = [F.relu(self.reduce(self.around(x.detach()))).float() for x in laterals[:-1]]
        boxes, landmarks = boxes.detach().float(), landmarks.float()
        refined, start = [], 0
        for level, (x, stride, sizes) in enumerate(zip(laterals, self.strides, self.anchors)):
            rows, columns = x.shape[-2:]
            end = start + rows * columns * len(sizes)
            shape = (x.shape[0], -1, len(sizes))
            growth = boxes[:, start:end, 2:].reshape(*shape, 2)
            points = landmarks[:, start:end].reshape(*shape, 10)
            y, x = torch.meshgrid(_places(rows, stride, x), _places(columns, stride, x), indexing="ij")
            centres = x.reshape(-1, 1), y.reshape(-1, 1)
            below = max(level - 1, 0)
            each = [
                points[:, :, i]
                if size < LEAST
                else self._refine(points[:, :, i], growth[:, :, i], centres, size, sources[below], self.strides[below])
                for i, size in enumerate(sizes)
            ]
            refined.append(torch.stack(each, 2).reshape(shape[0], -1, 10))
            start = end
        return torch.cat(refined, 1)

    def _refine(
        self, points: Tensor, growth: Tensor, centres: tuple[Tensor, Tensor], size: float, source: Tensor, stride: int
    ) -> Tensor:
        """One anchor size: encoded points ``[B, n, 10]`` and log box sides ``[B, n, 2]``; ``centres`` x and y, each
        ``[n, 1]`` px; ``source [B, hidden, h, w]`` with ``stride``."""
        places = points.detach().reshape(points.shape[0], -1, 5, 2) * (size * self.variances[0])
        # Half the map in px; not from its shape, as OpenCV 5 ignores the cast of a traced size to float.
        half_height, half_width = ((_places(n, stride, source)[-1:] + stride / 2) / 2 for n in source.shape[-2:])
        across = (centres[0] + places[..., 0]) / half_width - 1  # -1 and 1 are the map's edges
        down = (centres[1] + places[..., 1]) / half_height - 1
        grid = torch.stack([across, down], -1)  # [B, n, 5, 2]
        seen = F.grid_sample(source, grid, padding_mode="border", align_corners=False)  # [B, hidden, n, 5]
        correction = self.correct(seen.permute(0, 2, 3, 1).flatten(2)).float()  # [B, n, 10]
        side = torch.exp((growth * self.variances[1]).clamp(-GROWTH, GROWTH)) / self.variances[0]
        return points + correction * torch.cat([side] * 5, 2)  # x and y in turn


def _places(cells: int, stride: int, like: Tensor) -> Tensor:
    """Centres of a row of cells in px, ``[cells]``."""
    return (torch.arange(cells, device=like.device) + 0.5) * stride
