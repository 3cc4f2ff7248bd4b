"""P2: the smallest faces, predicted every four pixels from features of twice the usual resolution.

A face of 8 to 16 px covers one or two cells of P3. Denser anchors on the same features help it little; what it lacks
are the features that a face of twice its size gets (docs/experiments.md, row 25). They are made in the backbone's thin
first stage, which therefore runs a second time, with the same weights: its first convolution with stride 1 instead of
2, and a kernel that gives what the usual one would on the picture at twice its size. What lies around a face comes
from P3, as in a feature pyramid (Lin et al. 2017).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bifpn import upsample
from models.blocks import ConvBN, DepthwiseSeparable
from models.heads import Heads


class FineLevel(nn.Module):
    """Predictions of P2's anchors; the rest of the network learns nothing from it but the shared first stage.

    Args:
        in_channels: of P3 in the backbone.
        context_channels: of what P3's heads see.
        channels: width of P2.
        anchors: anchor sizes per cell, how many.
        class_outputs: as of :class:`models.heads.Heads`.
    """

    def __init__(self, in_channels: int, context_channels: int, channels: int, anchors: int, class_outputs: int = 1):
        super().__init__()
        self.lateral = DepthwiseSeparable(in_channels, channels)
        self.reduce = ConvBN(context_channels, channels, 1)
        self.merge = DepthwiseSeparable(channels, channels)
        self.heads = Heads(channels, [anchors], class_outputs)
        self.first: nn.Module | None = None

    def prepare(self, stage1: nn.Sequential) -> None:
        """For inference alone: keep the first convolution of a stage without batch norms, ready to run."""
        conv = stage1[0].conv
        ready = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).requires_grad_(False).to(conv.weight)
        ready.weight.copy_(_doubling(conv.weight))
        ready.bias.copy_(conv.bias)
        self.first = nn.Sequential(ready, stage1[0].act)

    def forward(self, stage1: nn.Sequential, images: Tensor, context: Tensor) -> dict[str, Tensor]:
        """The backbone's first stage, ``images [B, 3, H, W]`` and P3's ``context [B, C, h, w]`` -> ``logits [B, N]``,
        ``boxes [B, N, 4]`` and ``landmarks [B, N, 10]`` of ``ceil(H / 4) * ceil(W / 4)`` cells."""
        detail = self.first(images) if self.first else full_resolution(stage1[0], images)
        lateral = self.lateral(stage1[1:](detail))
        around = upsample(self.reduce(context.detach()), lateral)
        levels = [self.merge(F.leaky_relu(lateral + around, 0.1))]
        return self.heads(levels, levels, levels)


def full_resolution(first: ConvBN, images: Tensor) -> Tensor:
    """``first``, a 3x3 convolution of stride 2, on images enlarged twice, bilinearly: ``[B, 3, H, W] -> [B, C, H, W]``.

    As enlarging is linear, it is part of the kernel; results differ from those of :func:`enlarge` at the border alone,
    where there are zeros outside instead of the edge repeated.
    """
    return first.act(first.bn(F.conv2d(images, _doubling(first.conv.weight), first.conv.bias, padding=1)))


def enlarge(images: Tensor) -> Tensor:
    """``[B, 3, H, W]`` -> ``[B, 3, 2H, 2W]``, bilinear: the picture in which P3's anchors are as large as P2's here."""
    return F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)


def _doubling(kernel: Tensor) -> Tensor:
    """``[C, 3, 3, 3]`` for a picture enlarged twice, its middle on sample 2i -> the same for the picture itself, on i.

    Of the samples 2i - 1, 2i and 2i + 1 three quarters are the original's i - 1, i and i, the rest i, i - 1 and i + 1.
    """
    for dim in (2, 3):
        before, middle, after = kernel.unbind(dim)
        sides = 0.75 * before + 0.25 * middle, 0.25 * before + 0.75 * (middle + after), 0.25 * after
        kernel = torch.stack(sides, dim)
    return kernel
