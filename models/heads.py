"""Prediction heads: one 1x1 convolution per level for the class, the box and the landmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.config import ModelConfig

OUTPUTS = ("logits", "boxes", "landmarks")  # of every network, for each of its anchors
PRIOR = 0.01  # face probability every anchor starts from (Lin et al. 2017, focal loss), so that background is calm


class Heads(nn.Module):
    """Predictions of every anchor, ordered by level, row, column, anchor size.

    Args:
        channels: of the features on every level.
        anchors_per_level: anchors per cell of each level.
        class_outputs: 1, or 2 = the published softmax pair (background, face), returned as their difference.
    """

    def __init__(self, channels: int, anchors_per_level: Sequence[int], class_outputs: int = 1):
        super().__init__()
        self.class_outputs = class_outputs

        def convs(outputs: int) -> nn.ModuleList:
            made = nn.ModuleList(nn.Conv2d(channels, n * outputs, 1) for n in anchors_per_level)
            for conv in made:
                nn.init.normal_(conv.weight, std=0.01)
                nn.init.zeros_(conv.bias)
            return made

        self.classes, self.boxes, self.landmarks = convs(class_outputs), convs(4), convs(10)
        face = -math.log(1 / PRIOR - 1)
        for conv in self.classes:
            conv.bias.data.view(-1, class_outputs)[:] = torch.tensor([face] if class_outputs == 1 else [0.0, face])

    def forward(
        self, class_levels: Sequence[Tensor], box_levels: Sequence[Tensor], landmark_levels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Features ``[B, C, h, w]`` per level and task -> ``logits [B, N]``, ``boxes [B, N, 4]``,
        ``landmarks [B, N, 10]``, the last two encoded against the anchors; a score is ``sigmoid(logit)``.
        """
        logits = _predict(self.classes, class_levels, self.class_outputs)
        return {
            "logits": logits[..., 0] if self.class_outputs == 1 else logits[..., 1] - logits[..., 0],
            "boxes": _predict(self.boxes, box_levels, 4),
            "landmarks": _predict(self.landmarks, landmark_levels, 10),
        }


@torch.no_grad()
def merge_heads(
    state: dict[str, Tensor],
    anchors: Sequence[Sequence[int]],
    others: Sequence[tuple[Sequence[Sequence[int]], dict[str, Tensor]]],
    share: float,
    box_share: float,
) -> int:
    """Mix other heads on the same features into those of a state dict, in place.

    An anchor takes part where another network has the same size on the same level; several such count equally.

    Args:
        state: of :class:`Heads`, ``anchors`` their sizes per level.
        others: anchors and state dict of each of the others, which have one class output.
        share: of the others in the face logits, 0..1; ``box_share``: in boxes and landmarks.

    Returns:
        How many of the anchor sizes had a counterpart.
    """
    met = 0
    for level, sizes in enumerate(anchors):
        for place, size in enumerate(sizes):
            known = [
                (theirs[level].index(size), len(theirs[level]), heads)
                for theirs, heads in others
                if size in theirs[level]
            ]
            met += bool(known)
            for kind in ("classes", "boxes", "landmarks") if known else ():
                part = share if kind == "classes" else box_share
                for leaf in ("weight", "bias"):
                    name = f"{kind}.{level}.{leaf}"
                    mine = state[name].unflatten(0, (len(sizes), -1))[place]
                    each = torch.stack([heads[name].unflatten(0, (count, -1))[i] for i, count, heads in known])
                    theirs = each.mean(0)
                    mine.mul_(1 - part)
                    mine[-len(theirs) :] += part * theirs.to(mine)  # of a (background, face) pair: the face
    return met


def before_heads(cfg: ModelConfig) -> str:
    """The switch of a network whose heads do not predict from its ``context`` features alone; "" = they do."""
    switches = ("smart_head", "cbam_cascade", "cascade_refinement", "multipath")
    return next((name for name in switches if getattr(cfg, name)), "")


def _predict(convs: nn.ModuleList, levels: Sequence[Tensor], outputs: int) -> Tensor:
    """``[B, N, outputs]`` over all levels."""
    flat = [conv(x).permute(0, 2, 3, 1).flatten(1) for conv, x in zip(convs, levels)]
    return torch.cat(flat, 1).unflatten(1, (-1, outputs))
