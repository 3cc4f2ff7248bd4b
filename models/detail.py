"""Detail: what the backbone's first stage sees of the picture enlarged twice, for P3's small faces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import ConvBN, leaky


class Detail(nn.Module):
    """The backbone's first stage and ``images [B, 3, H, W]`` -> ``[B, C, ceil(H / 8), ceil(W / 8)]``, added to what
    P3's SSH block gets. The stage learns nothing from it."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.around = ConvBN(in_channels, in_channels, 3, 2, groups=in_channels, act=leaky())
        self.out = ConvBN(in_channels, channels, 1)
        nn.init.constant_(self.out.bn.weight, 0.1)

    def forward(self, stage1: nn.Sequential, images: Tensor) -> Tensor:
        """See the class."""
        x = stage1[1:](stage1[0].act(_first(stage1[0], images))).detach()
        return self.out(self.around(x))


def _first(stem: ConvBN, images: Tensor) -> Tensor:
    scale = stem.bn.weight * torch.rsqrt(stem.bn.running_var + stem.bn.eps) if hasattr(stem.bn, "running_var") else None
    weight, bias = _doubling(stem.conv.weight), stem.conv.bias
    if scale is not None:
        weight, bias = weight * scale.view(-1, 1, 1, 1), stem.bn.bias - stem.bn.running_mean * scale
    return F.conv2d(images, weight, bias, padding=1)


def _doubling(kernel: Tensor) -> Tensor:
    """``[C, 3, 3, 3]`` for a picture enlarged twice, its middle on sample 2i -> the same for the picture itself, on i.

    Of the samples 2i - 1, 2i and 2i + 1 three quarters are the original's i - 1, i and i, the rest i, i - 1 and i + 1.
    """
    for dim in (2, 3):
        before, middle, after = kernel.unbind(dim)
        sides = 0.75 * before + 0.25 * middle, 0.25 * before + 0.75 * (middle + after), 0.25 * after
        kernel = torch.stack(sides, dim)
    return kernel
