"""Feature pyramids: BiFPN (Tan et al. 2020) on P3-P5, and the plain FPN of RetinaFace.

Both map backbone features to ``(per_repeat, laterals)``: the three levels after each repeat, and the three lateral
features the first repeat started from; every tensor is ``[B, channels, h, w]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import ConvBN, SeparableConv, leaky

Pyramid = tuple[list[list[Tensor]], list[Tensor]]
BN = {"eps": 1e-3, "momentum": 0.01}  # EfficientDet's batch norm


class BiFPN(nn.Module):
    """Weighted bi-directional pyramid.

    Args:
        in_channels: of P3, P4, P5.
        channels: width of the neck.
        repeats: how many top-down and bottom-up rounds.
        extra_laterals: V1: P4 and P5 have a second lateral for the bottom-up path of the first repeat.
        lateral_attention: three modules applied to the laterals of the top-down path, or ``None``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        repeats: int,
        extra_laterals: bool = False,
        lateral_attention: Sequence[nn.Module] | None = None,
    ):
        super().__init__()
        self.laterals = nn.ModuleList(ConvBN(c, channels, 1, bias=True, **BN) for c in in_channels)
        again = in_channels[1:] if extra_laterals else ()
        self.extra_laterals = nn.ModuleList(ConvBN(c, channels, 1, bias=True, **BN) for c in again)
        self.lateral_attention = nn.ModuleList(lateral_attention or [nn.Identity() for _ in in_channels])
        # published checkpoints carry a third weight for the last node: unused, but part of the normalisation
        last = 3 if extra_laterals else 2
        self.repeats = nn.ModuleList(BiFPNRepeat(channels, last) for _ in range(repeats))

    def forward(self, feats: Sequence[Tensor]) -> Pyramid:
        laterals = [attend(conv(f)) for attend, conv, f in zip(self.lateral_attention, self.laterals, feats)]
        second = [conv(f) for conv, f in zip(self.extra_laterals, feats[1:])] or laterals[1:]
        levels, per_repeat = laterals, []
        for i, repeat in enumerate(self.repeats):
            levels = repeat(levels, second if i == 0 else levels[1:])
            per_repeat.append(levels)
        return per_repeat, laterals


class BiFPNRepeat(nn.Module):
    """One top-down and bottom-up round over ``[P3, P4, P5]``, all of ``channels``.

    Args:
        last_weights: entries of the last node's fusion weight (2 are used, all normalise).
    """

    def __init__(self, channels: int, last_weights: int = 2):
        super().__init__()
        self.fuse_p4_up, self.fuse_p3 = Fusion(2), Fusion(2)
        self.fuse_p4, self.fuse_p5 = Fusion(3), Fusion(last_weights)
        self.conv_p4_up, self.conv_p3, self.conv_p4, self.conv_p5 = (
            SeparableConv(channels, channels, bias=True, **BN) for _ in range(4)
        )

    def forward(self, levels: Sequence[Tensor], bottom_up: Sequence[Tensor]) -> list[Tensor]:
        """``bottom_up``: P4 and P5 as the bottom-up path sees them (V1's first repeat: their second laterals)."""
        p3, p4, p5 = levels
        p4_up = self.conv_p4_up(F.silu(self.fuse_p4_up(p4, upsample(p5, p4))))
        p3_out = self.conv_p3(F.silu(self.fuse_p3(p3, upsample(p4_up, p3))))
        p4_out = self.conv_p4(F.silu(self.fuse_p4(bottom_up[0], p4_up, downsample(p3_out))))
        p5_out = self.conv_p5(F.silu(self.fuse_p5(bottom_up[1], downsample(p4_out))))
        return [p3_out, p4_out, p5_out]


class Fusion(nn.Module):
    """Fast normalised fusion: ``sum relu(w_i) x_i / (sum relu(w) + 1e-4)`` of equally shaped tensors."""

    def __init__(self, weights: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(weights))

    def forward(self, *inputs: Tensor) -> Tensor:
        weight = F.relu(self.weight)
        weight = weight / (weight.sum() + 1e-4)
        fused = inputs[0] * weight[0]
        for i, x in enumerate(inputs[1:], 1):
            fused = fused + x * weight[i]
        return fused


class FPN(nn.Module):
    """RetinaFace's top-down pyramid: 1x1 laterals, 3x3 merges, LeakyReLU 0.1; P5 is its lateral."""

    def __init__(self, in_channels: Sequence[int], channels: int):
        super().__init__()
        self.laterals = nn.ModuleList(ConvBN(c, channels, 1, act=leaky()) for c in in_channels)
        self.merge_p3 = ConvBN(channels, channels, 3, act=leaky())
        self.merge_p4 = ConvBN(channels, channels, 3, act=leaky())

    def forward(self, feats: Sequence[Tensor]) -> Pyramid:
        laterals = [conv(f) for conv, f in zip(self.laterals, feats)]
        p3, p4, p5 = laterals
        p4 = self.merge_p4(p4 + upsample(p5, p4))
        p3 = self.merge_p3(p3 + upsample(p4, p3))
        return [[p3, p4, p5]], laterals


def upsample(x: Tensor, target: Tensor) -> Tensor:
    """Nearest-neighbour resize of ``x`` to the exact height and width of ``target`` (any size is possible)."""
    return F.interpolate(x, size=target.shape[-2:], mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """Max-pool 3/2 with TensorFlow's zero "same" padding: ``[B, C, h, w] -> [B, C, ceil(h / 2), ceil(w / 2)]``."""
    height, width = x.shape[-2:]
    return F.max_pool2d(F.pad(x, (width % 2, 1, height % 2, 1)), 3, 2)
