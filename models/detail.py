"""Detail: a path from the pixels to P3 of its own, for its small faces (docs/experiments.md, row 39)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.blocks import ConvBN, DepthwiseSeparable, leaky
from models.mobilenet import MobileNetV1


class Detail(nn.Module):
    """Image ``[B, 3, H, W]``, sides multiples of 8 -> ``[B, C, H / 8, W / 8]``, added to what P3's SSH block gets.

    A module that starts at zero learns next to nothing (row 39), so the last batch norm starts small instead.

    Args:
        channels: C.
        widths: channels at strides 2 (twice), 4 and 8; or ``[0]``, the backbone's first stage on the picture enlarged
            twice, whose weights it starts with, and two blocks of stride 8.
    """

    def __init__(self, channels: int, widths: Sequence[int]):
        super().__init__()
        if len(widths) == 1:
            last, start = 64, 0.05
            self.path = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear"),
                MobileNetV1().stage1,
                DepthwiseSeparable(64, last, 2),
                DepthwiseSeparable(last, last),
            )
        else:
            (first, second, third, last), start = widths, 0.2
            self.path = nn.Sequential(
                ConvBN(3, first, 3, 2, act=leaky()),
                DepthwiseSeparable(first, second),
                DepthwiseSeparable(second, third, 2),
                *(DepthwiseSeparable(third, third) for _ in range(2)),
                DepthwiseSeparable(third, last, 2),
                *(DepthwiseSeparable(last, last) for _ in range(2)),
            )
        self.out = ConvBN(last, channels, 1)
        nn.init.constant_(self.out.bn.weight, start)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.out(self.path(x))
