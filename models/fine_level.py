"""P2: the smallest faces, predicted every four pixels from features of the picture at twice its size.

A face of 8 to 16 px covers one or two cells of P3. Denser anchors on the same features help it little; what it lacks
are the features that a face of twice its size gets (docs/experiments.md, row 25). Those cost little where they are
made, in the backbone's thin first stage, which therefore runs a second time, on the enlarged picture and with the same
weights. What lies around a face comes from P3, as in a feature pyramid (Lin et al. 2017).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.bifpn import upsample
from models.blocks import ConvBN, DepthwiseSeparable
from models.heads import Heads

ENLARGED = 2  # P2's stride is P3's, of the enlarged picture


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

    def forward(self, stage1: nn.Module, images: Tensor, context: Tensor) -> dict[str, Tensor]:
        """The backbone's first stage, ``images [B, 3, H, W]`` and P3's ``context [B, C, h, w]`` -> ``logits [B, N]``,
        ``boxes [B, N, 4]`` and ``landmarks [B, N, 10]`` of ``ceil(H / 4) * ceil(W / 4)`` cells."""
        lateral = self.lateral(stage1(enlarge(images)))
        around = upsample(self.reduce(context.detach()), lateral)
        levels = [self.merge(F.leaky_relu(lateral + around, 0.1))]
        return self.heads(levels, levels, levels)


def enlarge(images: Tensor) -> Tensor:
    """``[B, 3, H, W]`` -> ``[B, 3, 2H, 2W]``, bilinear."""
    return F.interpolate(images, scale_factor=float(ENLARGED), mode="bilinear", align_corners=False)
