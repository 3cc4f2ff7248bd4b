"""Prediction heads: one 1x1 convolution per level for the class, the box and the landmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


def _predict(convs: nn.ModuleList, levels: Sequence[Tensor], outputs: int) -> Tensor:
    """``[B, N, outputs]`` over all levels."""
    flat = [conv(x).permute(0, 2, 3, 1).flatten(1) for conv, x in zip(convs, levels)]
    return torch.cat(flat, 1).unflatten(1, (-1, outputs))
