"""Loss functions and sample weights beyond the plain multibox loss. All work elementwise in float32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.matching import aligned_iou


def iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - IoU of xyxy boxes ``[P, 4]``, ``[P, 4]`` -> ``[P]``."""
    return 1 - aligned_iou(predicted, target)


def eiou_loss(predicted: Tensor, target: Tensor, eps: float = 1e-7) -> Tensor:
    """Efficient IoU loss (Zhang et al. 2021): 1 - IoU + centre, width and height distances.

    Each squared distance is relative to the smallest box around both: the centres' to its diagonal, the widths' to
    its width, the heights' to its height.

    Args:
        predicted, target: xyxy ``[P, 4]``.

    Returns:
        ``[P]``, each in [0, 4).
    """
    around = torch.maximum(predicted[:, 2:], target[:, 2:]) - torch.minimum(predicted[:, :2], target[:, :2])
    centres = (predicted[:, :2] + predicted[:, 2:] - target[:, :2] - target[:, 2:]) / 2
    sides = (predicted[:, 2:] - predicted[:, :2]) - (target[:, 2:] - target[:, :2])
    distance = centres.square().sum(-1) / (around.square().sum(-1) + eps)
    shape = (sides.square() / (around.square() + eps)).sum(-1)
    return iou_loss(predicted, target) + distance + shape


def wing_loss(error: Tensor, width: float = 1.0, curvature: float = 0.2) -> Tensor:
    """Wing loss (Feng et al. 2018): logarithmic for small errors, linear beyond ``width``.

    The paper's width 10 and curvature 2 are pixels of a face crop; here errors are encoded landmarks (one unit = a
    tenth of the anchor), so the same ratio at width 1.

    Args:
        error: any shape. Returns the same shape.
    """
    size = error.abs()
    offset = width - width * math.log1p(width / curvature)
    return torch.where(size < width, width * torch.log1p(size / curvature), size - offset)


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss (Li et al., GFL, 2020): ``|sigmoid - quality| ** beta`` * cross-entropy.

    Args:
        logits: face logits, any shape.
        quality: soft target in [0, 1] of the same shape: the predicted box's IoU on positives, 0 on background.
    """
    distance = (logits.sigmoid() - quality).abs()
    return distance.pow(beta) * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def normalised_weights(raw: Tensor, low: float = 0.5, high: float = 2.0) -> Tensor:
    """Turn positive numbers ``[P]`` into sample weights of mean 1 that differ by at most ``high / low``."""
    if not raw.numel():
        return raw
    clipped = (raw / raw.mean().clamp(min=1e-6)).clamp(low, high)
    return clipped / clipped.mean()


def scale_weights(boxes: Tensor, power: float = 0.5) -> Tensor:
    """Weights ``[P]`` by face size: a face of half the side counts ``2 ** power`` times as much, clipped, mean 1.

    Args:
        boxes: faces, xyxy px ``[P, 4]``.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1.0).prod(-1).sqrt()
    return normalised_weights(side.pow(-power))


class AdaptiveLossWeighting(nn.Module):
    """Weights by sample difficulty, for positives and hard negatives only, so that easy background stays at 1.

    A positive is as hard as 1 - sqrt(score * IoU of its predicted box); a negative as its score. The weight grows
    linearly with the difficulty, has mean 1 within its group and is clipped: no group gains or loses as a whole.

    Args:
        floor: difficulty added to all; larger means more even weights.
        hard: score from which a negative is hard.
    """

    def __init__(self, floor: float = 0.5, hard: float = 0.1) -> None:
        super().__init__()
        self.floor, self.hard = floor, hard

    @torch.no_grad()
    def positives(self, scores: Tensor, ious: Tensor) -> Tensor:
        """Weights ``[P]`` from scores ``[P]`` and IoUs ``[P]``."""
        return normalised_weights(self.floor + 1 - (scores * ious).clamp(0, 1).sqrt())

    @torch.no_grad()
    def negatives(self, scores: Tensor) -> Tensor:
        """Weights of the same shape as the background anchors' scores; 1 below ``hard``."""
        weights, is_hard = torch.ones_like(scores), scores >= self.hard
        weights[is_hard] = normalised_weights(self.floor + scores[is_hard])
        return weights
