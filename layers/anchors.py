"""Anchors (priors) and the SSD box coding around them (Liu et al. 2016, with RetinaFace's landmark extension)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from utils.config import ModelConfig

ANCHOR_CACHE = 16  # image sizes whose anchors a network keeps


def make_anchors(
    height: int,
    width: int,
    strides: Sequence[int],
    sizes: Sequence[Sequence[float]],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Square anchors of every feature-map cell.

    Args:
        height, width: network input size in pixels; the map of a level has ``ceil(size / stride)`` cells.
        strides: pixels per cell of each level.
        sizes: anchor side lengths in pixels, one list per level.

    Returns:
        ``[N, 4]`` cxcywh in pixels, ordered by level, row, column, size.
    """
    levels = []
    for stride, level_sizes in zip(strides, sizes):
        rows, cols = cells(height, stride), cells(width, stride)
        y = (torch.arange(rows, dtype=torch.float32, device=device) + 0.5) * stride
        x = (torch.arange(cols, dtype=torch.float32, device=device) + 0.5) * stride
        side = torch.tensor(level_sizes, dtype=torch.float32, device=device)
        cy, cx, s = torch.meshgrid(y, x, side, indexing="ij")
        levels.append(torch.stack([cx, cy, s, s], -1).view(-1, 4))
    return torch.cat(levels)


class AnchorCache:
    """The anchors of the latest input sizes, made once; threads may share it, and copies of it start empty.

    Args:
        make: ``make(height, width, device=...)`` -> ``[N, 4]``.
    """

    def __init__(self, make: Callable[..., Tensor]):
        self.make = make
        self._kept: dict[tuple, Tensor] = {}

    def __call__(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """``[N, 4]`` cxcywh in pixels; do not modify them."""
        key = (height, width, str(device))
        anchors = self._kept.get(key)
        if anchors is None:
            with torch.inference_mode(False):  # a tensor made under inference_mode could never serve training
                anchors = self._kept[key] = self.make(height, width, device=device)
            for oldest in list(self._kept)[:-ANCHOR_CACHE]:
                self._kept.pop(oldest, None)  # another thread may have been faster
        return anchors

    def __reduce__(self) -> tuple:
        return AnchorCache, (self.make,)


def anchors_of(cfg: ModelConfig) -> AnchorCache:
    """The anchors of a network with this architecture, by image height, width and device."""
    return AnchorCache(partial(make_anchors, strides=cfg.strides, sizes=cfg.anchors))


def cells(pixels: int, stride: int) -> int:
    """Cells along a side of a feature map: ``ceil(pixels / stride)``.

    Not written as ``-(-pixels // stride)``: in an exported graph division rounds towards zero.
    """
    return (pixels + stride - 1) // stride


def to_xyxy(boxes: Tensor) -> Tensor:
    """cxcywh ``[..., 4]`` -> xyxy ``[..., 4]``."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def encode_boxes(boxes: Tensor, anchors: Tensor, variances: Sequence[float]) -> Tensor:
    """xyxy pixels ``[..., N, 4]`` -> regression targets ``[..., N, 4]`` against anchors ``[N, 4]``.

    Sides below a thousandth of a pixel are treated as that, so that no box gives an infinite logarithm.
    """
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    offset = (centre - anchors[..., :2]) / (variances[0] * anchors[..., 2:])
    scale = torch.log(side / anchors[..., 2:]) / variances[1]
    return torch.cat([offset, scale], -1)


def decode_boxes(deltas: Tensor, anchors: Tensor, variances: Sequence[float]) -> Tensor:
    """Inverse of :func:`encode_boxes`: ``[..., N, 4]`` deltas -> xyxy pixels. Growth is limited to exp(4)."""
    centre = anchors[..., :2] + deltas[..., :2] * variances[0] * anchors[..., 2:]
    half = anchors[..., 2:] * torch.exp((deltas[..., 2:] * variances[1]).clamp(max=4.0)) / 2
    return torch.cat([centre - half, centre + half], -1)


def encode_landmarks(landmarks: Tensor, anchors: Tensor, variances: Sequence[float]) -> Tensor:
    """Points ``[..., N, 5, 2]`` in pixels -> targets ``[..., N, 10]``."""
    return ((landmarks - anchors[..., None, :2]) / (variances[0] * anchors[..., None, 2:])).flatten(-2)


def decode_landmarks(deltas: Tensor, anchors: Tensor, variances: Sequence[float]) -> Tensor:
    """Inverse of :func:`encode_landmarks`: ``[..., N, 10]`` -> points ``[..., N, 5, 2]`` in pixels."""
    points = deltas.unflatten(-1, (5, 2))
    return anchors[..., None, :2] + points * variances[0] * anchors[..., None, 2:]
