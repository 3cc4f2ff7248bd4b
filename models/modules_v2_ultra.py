"""Plan B of V2 Ultra: modules that cost (almost) no parameters, and the helpers plan A shares with them.

All modules work on lists of three levels ``[P3, P4, P5]`` (strides 8, 16, 32; each level half the one before, rounded
up) or on one level ``[B, C, h, w]``. None mixes the images of a batch in eval mode, none branches on data there (but
for the opt-in skip of :class:`ContextualSharing`), so each can be exported with dynamic batch, height and width.
"""

from __future__ import annotations

import copy
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bifpn import upsample
from models.blocks import channel_shuffle, largest_groups
from models.cbam import CBAM


def area_downsample(x: Tensor) -> Tensor:
    """Anti-aliased halving: the mean over the (up to) four pixels under each output pixel.

    Gives ``ceil(h / 2), ceil(w / 2)``, the exact size of the next level. For even sizes this equals adaptive average
    (area) pooling; for odd sizes it stays aligned with the stride, and unlike adaptive pooling it can be exported to
    ONNX with dynamic sizes.
    """
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


class Monitored(nn.Module):
    """Base of modules that report what their gates do: ``monitor()`` gives the last forward's values as floats.

    A trainer logs ``{f"{name}/{key}": v for name, m in model.named_modules() if hasattr(m, "monitor") ...}``.
    Nothing is remembered while the model is traced, exported or compiled: a stored tensor would become part of the
    graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, Tensor] = {}

    def remember(self, **values: Tensor) -> None:
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            self._seen.update((name, value.detach()) for name, value in values.items())

    def monitor(self) -> dict[str, float]:
        """Mean of each remembered value over the last batch; empty before the first forward."""
        return {name: float(value.float().mean()) for name, value in self._seen.items()}


class SceneComplexity(Monitored):
    """One score in (0, 1) per image, read by ACF, DCA and ContextualSharing: how much there is to see.

    The mean absolute activation of each channel of each level, projected to one number. Levels wider than ``bins``
    channels are first averaged over neighbouring channels, which keeps the projection tiny on backbone features.

    Args:
        channels: channels of each level.
        bins: most inputs one level may contribute.
    """

    def __init__(self, channels: list[int], bins: int = 64) -> None:
        super().__init__()
        self.bins = [largest_groups(c, c, bins) for c in channels]
        self.project = nn.Linear(sum(self.bins), 1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """``feats``: one ``[B, C_i, h, w]`` per level. Returns ``[B]``."""
        pooled = [f.abs().mean((2, 3)).unflatten(1, (n, -1)).mean(2) for f, n in zip(feats, self.bins)]
        complexity = self.project(torch.cat(pooled, 1)).squeeze(1).sigmoid()
        self.remember(complexity=complexity)
        return complexity

    def monitor(self) -> dict[str, float]:
        """Mean, spread and range of the last batch's scores."""
        if "complexity" not in self._seen:
            return {}
        c = self._seen["complexity"].float()
        return {
            "complexity_mean": float(c.mean()),
            "complexity_std": float(c.std(correction=0)),
            "complexity_min": float(c.min()),
            "complexity_max": float(c.max()),
        }


class FeatureRecycling(nn.Module):
    """Backbone features reused after the neck: ``P_i' = neck_i + lateral_i + up(neck_{i+1})``; no parameters."""

    def forward(self, neck: list[Tensor], laterals: list[Tensor]) -> list[Tensor]:
        """Two lists of ``[B, C, h, w]`` -> one of the same shapes; the coarsest level has no ``up`` term."""
        levels = [n + lateral for n, lateral in zip(neck, laterals)]
        return [x + upsample(up, x) for x, up in zip(levels, neck[1:])] + levels[-1:]


class AttentionAmplification(nn.Module):
    """One bare CBAM ``C`` applied ``times`` times to a growing sum, then ReLU.

    ``a_1 = C(x); a_k = C(a_{k-1} + ... + a_1 + x); y = ReLU(a_n + x)``; ``times=1`` is the plain ReLU(CBAM(x) + x).

    The uses share every parameter but see inputs of growing size, so each keeps its own BatchNorm running statistics:
    one set would be a mixture that fits none of them, and eval would not compute what training learned. (The state
    dict therefore names the shared parameters once per use.)

    Args:
        cbam: a bare CBAM.
        times: number of applications.
    """

    def __init__(self, cbam: CBAM, times: int = 3) -> None:
        super().__init__()
        # deepcopy with the parameters already "copied": new modules and buffers around the same Parameter objects
        twins = [copy.deepcopy(cbam, {id(p): p for p in cbam.parameters()}) for _ in range(times - 1)]
        self.uses = nn.ModuleList([cbam, *twins])

    def forward(self, x: Tensor) -> Tensor:
        return self.with_map(x)[0]

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C, h, w]`` -> the amplified feature and the mean of its spatial gates ``[B, 1, h, w]``."""
        total, maps = x, []
        for use in self.uses:
            channel, spatial = use.gates(total)
            attended = total * channel * spatial
            total = total + attended
            maps.append(spatial)
        return F.relu(attended + x), torch.stack(maps).mean(0)


class ProgressiveEnhancement(nn.Module):
    """``steps`` times: ``x + 0.1 tanh(x)``, then a channel shuffle; no parameters.

    tanh works on each value alone, so all shuffles are done at once at the end, as one permutation.

    Args:
        channels: C; the shuffle has ``groups`` groups, or the largest divisor of C below.
    """

    def __init__(self, channels: int, steps: int = 3, groups: int = 8) -> None:
        super().__init__()
        self.steps = steps
        order = torch.arange(channels).view(1, -1, 1, 1)
        for _ in range(steps):
            order = channel_shuffle(order, largest_groups(channels, channels, groups))
        self.register_buffer("order", order.flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> the same shape."""
        if not self.steps:
            return x  # not even the copy that an identity shuffle would make
        for _ in range(self.steps):
            x = x + 0.1 * torch.tanh(x)
        return x.index_select(1, self.order)


class SmartMultiscaleFusion(nn.Module):
    """Each level takes a fixed share of its neighbours; no parameters.

    ``small = P3 + 0.3 up(P4); medium = P4 + 0.2 down(P3) + 0.2 up(P5); large = P5 + 0.3 down(P4)``, all from the
    inputs; ``down`` averages (area), ``up`` is nearest.
    """

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Three ``[B, C, h, w]`` -> three of the same shapes."""
        p3, p4, p5 = levels
        return [
            p3 + 0.3 * upsample(p4, p3),
            p4 + 0.2 * area_downsample(p3) + 0.2 * upsample(p5, p4),
            p5 + 0.3 * area_downsample(p4),
        ]


class ContextualSharing(Monitored):
    """Wraps a block and uses it as much as the scene needs: ``y = x + g * (block(x) - x)``, ``g = gate(complexity)``.

    The gate is one sigmoid per image, starts open (0.95 at complexity 0.5) and costs two parameters.

    Args:
        block: any module that keeps the shape ``[B, C, h, w]``.
        skip_below: at inference, do not run the block on images whose gate is below this value (they pass through
            unchanged). None, the default, runs it always. Never active in training, tracing, export or compilation.
    """

    def __init__(self, block: nn.Module, skip_below: float | None = None) -> None:
        super().__init__()
        self.block = block
        self.skip_below = skip_below
        self.slope = nn.Parameter(torch.tensor([1.0]))
        self.bias = nn.Parameter(torch.tensor([3.0]))

    def gate(self, complexity: Tensor) -> Tensor:
        """``[B]`` -> ``[B]`` in (0, 1)."""
        return torch.sigmoid(self.bias + self.slope * (complexity - 0.5))

    def forward(self, x: Tensor, complexity: Tensor) -> Tensor:
        """``x [B, C, h, w]``, ``complexity [B]`` -> ``[B, C, h, w]``."""
        g = self.gate(complexity)
        self.remember(gate=g)
        weight = g.view(-1, 1, 1, 1)
        skipping = self.skip_below is not None and not self.training
        if skipping and not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            needed = (g >= self.skip_below).nonzero().squeeze(1)
            if len(needed) < len(x):
                return self._run_on(needed, x, weight)
        return x + weight * (self.block(x) - x)

    def _run_on(self, needed: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if not len(needed):
            return x
        part = x[needed]
        part = part + weight[needed] * (self.block(part) - part)
        return x.to(part.dtype).index_copy(0, needed, part)


def stop_skipping(model: nn.Module) -> nn.Module:
    """Switch the skipping of :class:`ContextualSharing` off, in place: what is exported or counted is all of it."""
    for module in model.modules():
        if isinstance(module, ContextualSharing):
            module.skip_below = None
    return model


def small_init(layer: nn.Module, gain: float = 0.1) -> nn.Module:
    """Start a residual branch small but not at zero: near identity, with a gradient for every layer before it."""
    fan_in = layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=gain / sqrt(fan_in))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def level_norms(channels: int, levels: int = 3, gamma: float = 1.0) -> nn.ModuleList:
    """One BatchNorm per level, for a convolution that the levels share: their statistics differ."""
    norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(levels))
    for norm in norms:
        nn.init.constant_(norm.weight, gamma)
    return norms
