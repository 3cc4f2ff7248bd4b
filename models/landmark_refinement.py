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

from layers.anchors import decode_landmarks, make_anchors
from models.modules_v2_ultra import small_init

GROWTH = 2.0  # a box counts as at most exp(2) times larger or smaller than its anchor
POINTS = 5


class LandmarkRefinement(nn.Module):
    """Corrects the landmarks of P4 and P5 by the level below; everything else of the predictions stays as it is.

    The features are ``relu(reduce(around(lateral)))`` with a depthwise 3x3 and a 1x1 convolution, read between cells at
    the five predicted points. ``correct`` maps them to the correction, in units of the predicted box's width and
    height. It starts so small that a new module changes next to nothing. Boxes and the layers below learn nothing from
    it. P3's small faces keep their landmarks: they gain little by P3's own features, and are most of the anchors.

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
        self.correct = small_init(nn.Conv2d(hidden, POINTS * 2 * POINTS, 1), 1e-3)

    def forward(self, boxes: Tensor, landmarks: Tensor, laterals: Sequence[Tensor]) -> Tensor:
        """Encoded ``boxes [B, N, 4]`` and ``landmarks [B, N, 10]``, three ``[B, C, h, w]`` -> ``landmarks [B, N, 10]``,
        float32 whatever autocast says: a pixel of a large picture is more than bfloat16 can tell."""
        boxes, landmarks = boxes.detach().float(), landmarks.float()
        rows, columns = laterals[0].shape[-2:]
        start = rows * columns * len(self.anchors[0])
        refined = [landmarks[:, :start]]
        for level in range(1, len(laterals)):
            rows, columns = laterals[level].shape[-2:]
            stride, below = self.strides[level], laterals[level - 1].detach()
            # made anew, not taken from the network's cache: an exported graph would keep those of one size
            anchors = make_anchors(rows * stride, columns * stride, [stride], [self.anchors[level]], below.device)
            end = start + anchors.shape[0]
            points = landmarks[:, start:end]
            anchors = anchors.type_as(points)  # a traced graph keeps the tracer's device but for this
            places = decode_landmarks(points.detach(), anchors, self.variances)  # [B, n, 5, 2] px
            if self.training:  # NaN shall reach the loss, whose guard names the files; as an index it would crash
                places = places.nan_to_num()
            maps = self.correct(F.relu(self.reduce(self.around(below)))).float()
            correction = read(maps, places / self.strides[level - 1] - 0.5)
            growth = (boxes[:, start:end, 2:] * self.variances[1]).clamp(-GROWTH, GROWTH)
            side = torch.exp(growth) / self.variances[0]  # encoded
            refined.append(points + correction * torch.cat([side] * POINTS, 2))  # x and y in turn
            start = end
        return torch.cat(refined, 1)


def read(maps: Tensor, places: Tensor) -> Tensor:
    """Read each point's own maps at its place, between cells (bilinear, beyond the edge as at the edge), and add up.

    Rows are gathered, as GridSample takes onnxruntime more than twice as long; all at once, as many small steps do too.

    Args:
        maps: ``[B, 5 * K, h, w]``, K for each point.
        places: ``[B, n, 5, 2]`` x and y in cells; (0, 0) is the middle of the first.

    Returns:
        ``[B, n, K]``.
    """
    maps = F.pad(maps, (0, 1, 0, 1), mode="replicate")  # every cell has a neighbour to the right and below
    batch, _, height, width = maps.shape
    table = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1] // POINTS)  # a row per image, y, x and point
    x, y = places.unbind(-1)  # [B, n, 5]
    # not clamp(max=...): in a traced graph a size is a tensor on the CPU, which that refuses where others are not
    right_most, lowest = (x.new_full((), side - 2) for side in (width, height))
    x, y = torch.minimum(x.clamp(min=0), right_most), torch.minimum(y.clamp(min=0), lowest)
    left, top = x.floor(), y.floor()
    left_cell, top_cell = left.long(), top.long()
    image, point = torch.arange(batch, device=maps.device), torch.arange(POINTS, device=maps.device)
    image, point = image.type_as(top_cell), point.type_as(top_cell)  # again for traced graphs
    cell = ((image[:, None, None] * height + top_cell) * width + left_cell) * POINTS + point
    index = torch.stack([cell, cell + POINTS, cell + width * POINTS, cell + (width + 1) * POINTS], -1)
    right, down = x - left, y - top
    share = torch.stack([(1 - right) * (1 - down), right * (1 - down), (1 - right) * down, right * down], -1)
    with torch.autocast(maps.device.type, enabled=False):  # would make bfloat16 of it
        return (share.flatten(2)[:, :, None] @ table[index].flatten(2, 3)).squeeze(2)
