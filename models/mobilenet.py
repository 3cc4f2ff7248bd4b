"""MobileNetV1 x0.25, the backbone of the whole family: 213,072 parameters, or less with a smaller last stage."""

from torch import Tensor, nn

from models.blocks import ConvBN, DepthwiseSeparable, leaky

CHANNELS = (64, 128, 256)  # of P3, P4, P5, as published


class MobileNetV1(nn.Module):
    """``[B, 3, H, W]`` -> P3, P4, P5: ``[B, 64 | 128 | last_channels, ceil(H / s), ceil(W / s)]``, s = 8, 16, 32.

    Args:
        last_blocks: blocks of the last stage: 2 as published, or 1, which frees 68,864 parameters for the neck.
        last_channels: of P5, 256 as published.
    """

    def __init__(self, last_blocks: int = 2, last_channels: int = CHANNELS[2]):
        super().__init__()
        self.channels = (*CHANNELS[:2], last_channels)
        self.stage1 = nn.Sequential(
            ConvBN(3, 8, 3, 2, act=leaky()),
            DepthwiseSeparable(8, 16),
            DepthwiseSeparable(16, 32, 2),
            DepthwiseSeparable(32, 32),
            DepthwiseSeparable(32, 64, 2),
            DepthwiseSeparable(64, 64),
        )
        self.stage2 = nn.Sequential(
            DepthwiseSeparable(64, 128, 2),
            *(DepthwiseSeparable(128, 128) for _ in range(5)),
        )
        self.stage3 = nn.Sequential(
            DepthwiseSeparable(128, last_channels, 2),
            *(DepthwiseSeparable(last_channels, last_channels) for _ in range(last_blocks - 1)),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        p3 = self.stage1(x)
        p4 = self.stage2(p3)
        return [p3, p4, self.stage3(p4)]
