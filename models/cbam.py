"""Convolutional block attention (CBAM, Woo et al. 2018): a channel gate, then a spatial gate."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import normalised


class CBAM(nn.Module):
    """The bare attention ``x * channel(x) * spatial(x * channel(x))`` of ``[B, C, h, w]``, without residual.

    Args:
        channels: C.
        reduction: the shared MLP has ``max(1, C // reduction)`` hidden units.
    """

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        for linear in (self.squeeze, self.excite):
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        if hidden == 1:  # a single unit that starts dead would leave the whole gate without gradient
            nn.init.constant_(self.squeeze.weight, 1 / channels)
            nn.init.constant_(self.squeeze.bias, 0.5)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channel gate ``[B, C, 1, 1]`` and the spatial gate ``[B, 1, h, w]``, both in (0, 1)."""
        # max, not amax: its backward scatters to remembered places, which is faster than comparing all of them again
        peak = x.max(3).values.max(2).values
        channel = torch.sigmoid(self._mlp(x.mean((2, 3))) + self._mlp(peak))[..., None, None]
        x = x * channel
        pooled = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return channel, torch.sigmoid(normalised(pooled, self.spatial, self.bn))

    def forward(self, x: Tensor) -> Tensor:
        channel, spatial = self.gates(x)
        return x * channel * spatial

    def _mlp(self, pooled: Tensor) -> Tensor:
        return self.excite(F.relu(self.squeeze(pooled)))


class ResidualCBAM(nn.Module):
    """V1's use of attention: ``ReLU(CBAM(x) + x)``, ``[B, C, h, w]`` -> the same shape."""

    def __init__(self, cbam: CBAM):
        super().__init__()
        self.cbam = cbam

    def forward(self, x: Tensor) -> Tensor:
        return self.with_map(x)[0]

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the spatial gate ``[B, 1, h, w]`` behind it."""
        channel, spatial = self.cbam.gates(x)
        return F.relu(x * channel * spatial + x), spatial
