"""The convolution blocks every part of the network is built from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights
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
        conv, bn = self.conv, self.bn
        frozen = not bn.training and not conv.weight.requires_grad and torch.is_grad_enabled()
        if frozen and type(conv) is nn.Conv2d and isinstance(bn, nn.BatchNorm2d):  # an inference copy has no bn left
            # A frozen stage in training: its batch norm, part of the weights, costs no pass over memory.
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            return self.act(functional.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups))
        return self.act(bn(conv(x)))


class DepthwiseSeparable(nn.Sequential):
    """MobileNetV1's block: depthwise 3x3 and pointwise 1x1, each with BN and LeakyReLU 0.1 (Howard et al. 2017)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(
            ConvBN(in_channels, in_channels, 3, stride, groups=in_channels, act=leaky()),
            ConvBN(in_channels, out_channels, 1, act=leaky()),
        )


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
