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

LEAST = 64.0  # px; landmarks of smaller anchors, most of all, stay as they are: they gain little and would cost most
GROWTH = 2.0  # a box counts as at most exp(2) times larger or smaller than its anchor
POINTS, NUMBERS = 5, 10


class LandmarkRefinement(nn.Module):
    """Corrects the landmarks of all anchors from 64 px on; everything else of the predictions stays as it is.

    For a face of level ``i`` the features are those of level ``i - 1`` (of P3 for P3 itself),
    ``relu(reduce(around(lateral)))`` with a depthwise 3x3 and a 1x1 convolution, read between cells at the five
    predicted points. ``correct`` maps them to the correction, in units of the predicted box's width and height. It
    starts so small that a new module changes next to nothing. Boxes and the layers below learn nothing from it.

    As reading between cells is linear too, ``correct`` runs first, on whole maps: every cell holds what it would say at
    each of the five points.

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
        self.correct = small_init(nn.Conv2d(hidden, POINTS * NUMBERS, 1), 1e-3)

    def forward(self, boxes: Tensor, landmarks: Tensor, laterals: Sequence[Tensor]) -> Tensor:
        """Encoded ``boxes [B, N, 4]`` and ``landmarks [B, N, 10]``, three ``[B, C, h, w]`` -> ``landmarks [B, N, 10]``,
        float32 whatever autocast says: a pixel of a large picture is more than bfloat16 can tell."""
        maps = [self.correct(F.relu(self.reduce(self.around(x.detach())))).float() for x in laterals[:-1]]
        boxes, landmarks = boxes.detach().float(), landmarks.float()
        refined, start = [], 0
        for level, (lateral, stride, sizes) in enumerate(zip(laterals, self.strides, self.anchors)):
            rows, columns = lateral.shape[-2:]
            end = start + rows * columns * len(sizes)
            if max(sizes) < LEAST:
                refined.append(landmarks[:, start:end])
                start = end
                continue
            growth = boxes[:, start:end, 2:].unflatten(1, (-1, len(sizes)))
            points = landmarks[:, start:end].unflatten(1, (-1, len(sizes)))
            y, x = torch.meshgrid(_places(rows, stride, lateral), _places(columns, stride, lateral), indexing="ij")
            centres = torch.stack([x, y], -1).reshape(-1, 1, 2)
            below = max(level - 1, 0)
            each = [
                points[:, :, i]
                if size < LEAST
                else self._refine(points[:, :, i], growth[:, :, i], centres, size, maps[below], self.strides[below])
                for i, size in enumerate(sizes)
            ]
            refined.append(torch.stack(each, 2).flatten(1, 2))
            start = end
        return torch.cat(refined, 1)

    def _refine(
        self, points: Tensor, growth: Tensor, centres: Tensor, size: float, corrections: Tensor, stride: int
    ) -> Tensor:
        """One anchor size: encoded points ``[B, n, 10]`` and log box sides ``[B, n, 2]``; ``centres [n, 1, 2]`` px;
        ``corrections [B, 50, h, w]`` with ``stride``."""
        places = centres + points.detach().unflatten(2, (POINTS, 2)) * (size * self.variances[0])
        correction = read(corrections, places / stride - 0.5)
        side = torch.exp((growth * self.variances[1]).clamp(-GROWTH, GROWTH)) / self.variances[0]
        return points + correction * torch.cat([side] * POINTS, 2)  # x and y in turn


def read(maps: Tensor, places: Tensor) -> Tensor:
    """Read each point's own maps at its place, between cells (bilinear, beyond the edge as at the edge), and add up.

    Rows are gathered, as onnxruntime's GridSample alone would take longer than the rest of the network.

    Args:
        maps: ``[B, 5 * K, h, w]``, K for each point.
        places: ``[B, n, 5, 2]`` x and y in cells; (0, 0) is the middle of the first.

    Returns:
        ``[B, n, K]``.
    """
    batch, _, height, width = maps.shape
    rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1] // POINTS)  # image, y, x, point
    x, y = places.unbind(-1)  # [B, n, 5]
    x, y = x.clamp(min=0).clamp(max=width - 1), y.clamp(min=0).clamp(max=height - 1)
    left, top = x.floor(), y.floor()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    image = torch.arange(batch, device=maps.device)[:, None, None] * height
    point = torch.arange(POINTS, device=maps.device)
    total = 0
    for column, across in ((left, 1 - (x - left)), (right, x - left)):
        for row, down in ((top, 1 - (y - top)), (bottom, y - top)):
            index = ((image + row.long()) * width + column.long()) * POINTS + point
            total = total + rows[index] * (across * down)[..., None]
    return total.sum(2)


def _places(cells: int, stride: int, like: Tensor) -> Tensor:
    """Centres of a row of cells in px, ``[cells]``."""
    return (torch.arange(cells, device=like.device) + 0.5) * stride
