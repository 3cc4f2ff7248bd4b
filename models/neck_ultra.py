"""Plan A of V2 Ultra in the neck: AdaptiveContextFusion, DynamicChannelAllocation, ProgressiveFeatureRefinement.

Levels are lists ``[P3, P4, P5]`` of ``[B, C, h, w]``. Convolutions are shared by the levels (and stages), batch norms
never. Every module starts as, or close to, the identity, with a gradient for each of its parameters from the start.
"""

from __future__ import annotations

from math import exp

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bifpn import BiFPN, upsample
from models.modules_v2_ultra import Monitored, area_downsample, level_norms, small_init

LEVELS = 3
NEUTRAL = 0.1  # scale of a residual branch at the start


class AdaptiveContextFusion(Monitored):
    """ACF: each level gets a context mixed from all three, with weights that depend on the scene's complexity.

    ``w_i = softmax_j(a_ij + b_ij (complexity - 0.5)); P_i' = P_i + BN_i(depthwise(sum_j w_ij resize_i(P_j)))``.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(LEVELS, LEVELS))
        self.slope = nn.Parameter(NEUTRAL * torch.eye(LEVELS))  # not 0: complexity needs a gradient
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norms = level_norms(channels, LEVELS, NEUTRAL)

    def forward(self, levels: list[Tensor], complexity: Tensor) -> list[Tensor]:
        """Three ``[B, C, h, w]`` and ``[B]`` -> three of the same shapes."""
        p3, p4, p5 = levels
        weights = self.weights(complexity)
        self.remember(weights=weights)
        w = weights[..., None, None, None]  # [B, 3, 3, 1, 1, 1]: w[:, i, j] scales a level
        p3_down, p5_up = area_downsample(p3), upsample(p5, p4)
        # resizing is linear, so what comes from two levels away is added to the level between first and resized once
        mixed = [
            w[:, 0, 0] * p3 + upsample(w[:, 0, 1] * p4 + w[:, 0, 2] * p5_up, p3),
            w[:, 1, 0] * p3_down + w[:, 1, 1] * p4 + w[:, 1, 2] * p5_up,
            area_downsample(w[:, 2, 0] * p3_down + w[:, 2, 1] * p4) + w[:, 2, 2] * p5,
        ]
        return [x + norm(self.depthwise(context)) for x, norm, context in zip(levels, self.norms, mixed)]

    def weights(self, complexity: Tensor) -> Tensor:
        """``[B]`` -> fusion weights ``[B, 3 targets, 3 sources]``; each row sums to 1."""
        return torch.softmax(self.base + self.slope * (complexity[:, None, None] - 0.5), 2)

    def monitor(self) -> dict[str, float]:
        """Mean weight of each source level in each target level."""
        if "weights" not in self._seen:
            return {}
        table = self._seen["weights"].float().mean(0).tolist()
        return {f"p{i + 3}_from_p{j + 3}": w for i, row in enumerate(table) for j, w in enumerate(row)}


class DynamicChannelAllocation(Monitored):
    """DCA: a soft choice, per image and level, of the channels that stay live; complex scenes keep more of them.

    ``gate = sigmoid(open + b_level + V silu(U mean|x|) + softplus(s_level) (complexity - 0.5))``, divided by its
    starting value so that the module starts as the identity. The slope on complexity cannot become negative.

    Args:
        channels: C.
        rank: width of the bottleneck between U and V, which the levels share.
    """

    OPEN = 2.0  # logit of a gate at the start: 0.88, where sigmoid still has a useful slope
    LIVE = 0.5  # a channel counts as live above this gate

    def __init__(self, channels: int, rank: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, rank)
        self.excite = small_init(nn.Linear(rank, channels, bias=False))
        self.bias = nn.Parameter(torch.zeros(LEVELS, channels))
        self.slope = nn.Parameter(torch.zeros(LEVELS))

    def forward(self, levels: list[Tensor], complexity: Tensor) -> list[Tensor]:
        """Three ``[B, C, h, w]`` and ``[B]`` -> three of the same shapes."""
        pooled = torch.stack([x.abs().mean((2, 3)) for x in levels], 1)  # [B, 3, C]
        need = F.softplus(self.slope) * (complexity[:, None] - 0.5)  # [B, 3]
        gates = torch.sigmoid(self.OPEN + self.bias + self.excite(F.silu(self.squeeze(pooled))) + need[..., None])
        self.remember(gates=gates)
        scale = gates * (1 + exp(-self.OPEN))
        return [x * scale[:, i, :, None, None] for i, x in enumerate(levels)]

    def utilisation(self) -> Tensor | None:
        """Share of live channels of the last batch, ``[B, 3]`` in [0, 1]; None before the first forward."""
        gates = self._seen.get("gates")
        return None if gates is None else (gates > self.LIVE).float().mean(2)

    def monitor(self) -> dict[str, float]:
        """Utilisation and mean gate of each level."""
        live = self.utilisation()
        if live is None:
            return {}
        gate = self._seen["gates"].float().mean((0, 2)).tolist()
        values = {f"utilisation_p{i + 3}": v for i, v in enumerate(live.mean(0).tolist())}
        return values | {f"gate_p{i + 3}": v for i, v in enumerate(gate)}


class ProgressiveFeatureRefinement(Monitored):
    """PFR: ``stages`` residual refinements, applied where features are good and to channels that discriminate.

    ``x <- x + quality(x) * amplify(x) * BN(depthwise(silu(x)))`` with a quality score in (0, 1) per position (1x1
    convolution, sigmoid) and an amplification in (0, 2) per channel from its contrast, peak minus mean of ``|x|``
    relative to the other channels. Convolutions are shared by stages and levels.

    Args:
        channels: C.
        stages: number of refinements.
    """

    def __init__(self, channels: int, stages: int = 2) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norms = nn.ModuleList(level_norms(channels, LEVELS, NEUTRAL) for _ in range(stages))
        self.quality = small_init(nn.Conv2d(channels, 1, 1))
        self.gain = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Three ``[B, C, h, w]`` -> three of the same shapes."""
        refined = []
        for i, x in enumerate(levels):
            for norms in self.norms:
                quality = torch.sigmoid(self.quality(x))
                amplify = 2 * torch.sigmoid(self.gain * contrast(x) + self.bias)
                x = x + quality * amplify[..., None, None] * norms[i](self.depthwise(F.silu(x)))
            self.remember(**{f"quality_p{i + 3}": quality.mean(), f"amplify_p{i + 3}": amplify.mean()})
            refined.append(x)
        return refined


def contrast(x: Tensor) -> Tensor:
    """How much each channel of ``[B, C, h, w]`` stands out: peak minus mean of ``|x|``, relative to the channels' mean.

    Returns:
        ``[B, C]`` in [-1, C - 1]; 0 = average. A map of one pixel has no contrast: -1 everywhere.
    """
    size = x.abs()
    height = size.max(3).values.max(2).values - size.mean((2, 3))
    return height / (height.mean(1, keepdim=True) + 1e-4) - 1


class BiFPN_Ultra(nn.Module):
    """The BiFPN followed by ACF, DCA and PFR on its last repeat, each with its own switch.

    Args:
        bifpn: the neck, features -> (levels per repeat, laterals).
        channels: its width.
        acf, dca, pfr: which modules are there.
    """

    def __init__(self, bifpn: BiFPN, channels: int, acf: bool = True, dca: bool = True, pfr: bool = True) -> None:
        super().__init__()
        self.bifpn = bifpn
        self.acf = AdaptiveContextFusion(channels) if acf else None
        self.dca = DynamicChannelAllocation(channels) if dca else None
        self.pfr = ProgressiveFeatureRefinement(channels) if pfr else None

    def forward(self, feats: list[Tensor], complexity: Tensor | None = None) -> tuple[list[list[Tensor]], list[Tensor]]:
        """``feats`` as the BiFPN takes them, ``complexity [B]`` (needed by ACF and DCA) -> what the BiFPN returns."""
        per_repeat, laterals = self.bifpn(feats)
        levels = per_repeat[-1]
        if self.acf is not None:
            levels = self.acf(levels, complexity)
        if self.dca is not None:
            levels = self.dca(levels, complexity)
        if self.pfr is not None:
            levels = self.pfr(levels)
        return [*per_repeat[:-1], levels], laterals
