"""The convolution blocks every part of the network is built from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import deform_conv2d


class ConvBN(nn.Module):
    """Convolution ("same" padding, odd kernel), batch norm, activation: ``[B, in, H, W] -> [B, out, H', W']``.

    Args:
        kernel, stride, groups: of the convolution; an output side is ``ceil(side / stride)``.
        act: module applied last; ``None`` = none.
        conv: class of the convolution, ``nn.Conv2d`` or one with its constructor (:class:`DeformableConv2d`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        conv: type[nn.Conv2d] = nn.Conv2d,
    ):
        super().__init__()
        self.conv = conv(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if bias:
            nn.init.zeros_(self.conv.bias)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(normalised(x, self.conv, self.bn))


def normalised(x: Tensor, conv: nn.Conv2d, bn: nn.Module) -> Tensor:
    """``bn(conv(x))``.

    Where gradients flow past frozen statistics, the batch norm becomes part of the weights and costs no pass over
    memory; its scale and shift still learn.
    """
    frozen = not bn.training and torch.is_grad_enabled()
    if not frozen or type(conv) is not nn.Conv2d or not isinstance(bn, nn.BatchNorm2d):  # an inference copy has no bn
        return bn(conv(x))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    bias = bn.bias + ((0 if conv.bias is None else conv.bias) - bn.running_mean) * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return functional.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)


class DepthwiseSeparable(nn.Sequential):
    """MobileNetV1's block: depthwise 3x3 and pointwise 1x1, each with BN and LeakyReLU 0.1 (Howard et al. 2017)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(
            ConvBN(in_channels, in_channels, 3, stride, groups=in_channels, act=leaky()),
            ConvBN(in_channels, out_channels, 1, act=leaky()),
        )


class SeparableConv(nn.Module):
    """Depthwise 3x3, pointwise 1x1, batch norm, activation: ``[B, in, h, w] -> [B, out, h, w]``; one linear map before
    the norm, unlike MobileNetV1's block."""

    def __init__(self, in_channels: int, out_channels: int, act: nn.Module | None = None, **kwargs):
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        nn.init.kaiming_normal_(self.depthwise.weight, nonlinearity="linear")
        self.pointwise = ConvBN(in_channels, out_channels, 1, act=act, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class DeformableConv2d(nn.Conv2d):
    """Modulated deformable convolution (DCNv2, Zhu et al. 2019) with the weights of an ordinary convolution.

    Offsets (torchvision's order: y, x per tap) and modulators (``2 * sigmoid``) come from zero-initialised
    convolutions, so that it starts as the plain convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, padding: int, **kwargs):
        super().__init__(in_channels, out_channels, kernel, stride, padding, **kwargs)
        taps = kernel * kernel
        self.offset = nn.Conv2d(in_channels, 2 * taps, kernel, stride, padding)
        self.modulator = nn.Conv2d(in_channels, taps, kernel, stride, padding)
        for branch in (self.offset, self.modulator):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x, self.offset(x), 2 * torch.sigmoid(self.modulator(x)))
        x, offset, mask = (t.to(self.weight.dtype) for t in inputs)  # on the CPU it has no bfloat16 (autocast) version
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, mask=mask)


def leaky() -> nn.LeakyReLU:
    """The LeakyReLU 0.1 of the RetinaFace family."""
    return nn.LeakyReLU(0.1, inplace=True)


def largest_groups(in_channels: int, out_channels: int, limit: int) -> int:
    """The largest divisor of both channel counts that is <= ``limit``: the groups a convolution can have."""
    common = math.gcd(in_channels, out_channels)
    return max(g for g in range(1, min(limit, common) + 1) if common % g == 0)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave ``groups`` blocks of channels of ``[B, C, H, W]`` (ShuffleNet, Zhang et al. 2018)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
