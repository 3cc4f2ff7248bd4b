"""Context modules: SSH (Najibi et al. 2017) in plain, grouped, separable or deformable form, and the shuffle block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import ConvBN, DeformableConv2d, SeparableConv, channel_shuffle, largest_groups, leaky


class SSH(nn.Module):
    """Receptive fields 3x3, 5x5 and 7x7 side by side; ``[B, C, h, w] -> [B, C, h, w]``.

    Args:
        channels: C, a multiple of 4: C/2 for the 3x3 branch, C/4 for each of the others.
        kind: of its five convolutions; "separable" = depthwise 3x3, then pointwise 1x1.
        groups: "grouped" only: the upper limit; each convolution takes the largest divisor of its channels.
    """

    def __init__(
        self,
        channels: int,
        kind: Literal["plain", "grouped", "separable", "deformable"] = "plain",
        groups: int = 1,
    ):
        super().__init__()

        def conv(c_in: int, c_out: int, act: nn.Module | None = None) -> nn.Module:
            if kind == "separable":
                return SeparableConv(c_in, c_out, act)
            g = largest_groups(c_in, c_out, groups) if kind == "grouped" else 1
            return ConvBN(
                c_in, c_out, 3, groups=g, act=act, conv=DeformableConv2d if kind == "deformable" else nn.Conv2d
            )

        half, quarter = channels // 2, channels // 4
        self.conv3 = conv(channels, half)
        self.conv5_1 = conv(channels, quarter, leaky())
        self.conv5_2 = conv(quarter, quarter)
        self.conv7_2 = conv(quarter, quarter, leaky())
        self.conv7_3 = conv(quarter, quarter)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.conv5_1(x)
        return F.relu(torch.cat([self.conv3(x), self.conv5_2(shared), self.conv7_3(self.conv7_2(shared))], 1))


class ShuffleBlock(nn.Module):
    """Channel shuffle, then a 1x1 - depthwise 3x3 - 1x1 bottleneck of half width and ReLU; shape is kept."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.reduce = ConvBN(channels, half, 1)
        self.depthwise = ConvBN(half, half, 3, groups=half)
        self.expand = ConvBN(half, channels, 1, act=nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        # the published order: neighbouring channels are split into two halves (C/2 groups of 2)
        x = channel_shuffle(x, x.shape[1] // 2)
        return self.expand(self.depthwise(self.reduce(x)))
