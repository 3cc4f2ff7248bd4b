"""Terms of the distillation sum. Every term is a scalar in float32, finite without faces, and gives gradient to the
student's tensors only (callers pass teachers' tensors without gradient)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import distance_box_iou_loss

from layers.losses_advanced import quality_focal_loss

CONFIDENT = 0.3  # teacher score from which its box is worth copying
HARD_PER_POSITIVE = 2  # hard negatives per masked face anchor ...
HARD_MIN = 32  # ... and at least so many per image, so that images without faces teach too
WEIGHTS = (1.0, 0.5, 0.5)  # positives, their neighbourhood, hard negatives
NOISE = 0.05  # teacher score below which an anchor is not counted as face-like
DENSE_BOX_WEIGHT = 0.5  # the box term inside the dense term


@dataclass
class Mask:
    """The P anchors, of a whole batch, that scores and boxes are distilled on."""

    image: Tensor  # [P] int64
    anchor: Tensor  # [P] int64
    weight: Tensor  # [P] float
    positive: Tensor  # [P] bool: assigned to a labelled face

    def pick(self, dense: Tensor) -> Tensor:
        """``[B, N, ...]`` -> ``[P, ...]``."""
        return dense[self.image, self.anchor]


def build_mask(
    student_logits: Tensor, teacher_logits: Tensor, positive: Tensor, cells: Sequence[tuple[int, int, int]]
) -> Mask:
    """Positives, the cells around them, and the negatives that student or teacher score highest.

    Args:
        student_logits, teacher_logits: ``[B, N]``.
        positive: ``[B, N]`` bool, anchors assigned to a face.
        cells: rows, columns and anchors per cell of each level; their products add up to N.
    """
    near = dilate(positive, cells) & ~positive
    score = torch.maximum(student_logits.detach(), teacher_logits)
    score = score.masked_fill(positive | near, -torch.inf)
    wanted = (HARD_PER_POSITIVE * (positive | near).sum(1)).clamp(min=HARD_MIN)
    most = min(int(wanted.max()), score.shape[1])
    top, index = score.topk(most, 1)
    chosen = (torch.arange(most, device=score.device) < wanted[:, None]) & (top > -torch.inf)
    hard = torch.zeros_like(positive).scatter_(1, index, chosen)
    image, anchor = (positive | near | hard).nonzero(as_tuple=True)
    is_positive = positive[image, anchor]
    is_near = near[image, anchor]
    weight = torch.full(is_positive.shape, WEIGHTS[2], device=score.device)
    weight = weight.masked_fill(is_near, WEIGHTS[1]).masked_fill(is_positive, WEIGHTS[0])
    return Mask(image, anchor, weight, is_positive)


def dilate(mask: Tensor, cells: Sequence[tuple[int, int, int]]) -> Tensor:
    """Grow a mask ``[B, N]`` to the 3x3 cells around, all anchor sizes of a cell, level by level."""
    grown = []
    for part, (rows, cols, sizes) in zip(mask.split([r * c * a for r, c, a in cells], 1), cells):
        any_size = part.view(-1, rows, cols, sizes).any(-1).float()
        around = F.max_pool2d(any_size[:, None], 3, 1, 1)[:, 0] > 0
        grown.append(around[..., None].expand(-1, -1, -1, sizes).flatten(1))
    return torch.cat(grown, 1)


def score_term(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of softened face scores (Hinton et al. 2015), the weighted mean over anchors.

    Args:
        student, teacher: face logits ``[P]``.
        weight: ``[P]``.
    """
    target = (teacher / temperature).sigmoid()
    own = F.binary_cross_entropy_with_logits(teacher / temperature, target, reduction="none")  # the teacher's entropy
    cross = F.binary_cross_entropy_with_logits(student / temperature, target, reduction="none")
    return temperature**2 * weighted_mean(cross - own, weight)


def box_term(
    boxes: Tensor,
    landmarks: Tensor,
    teacher_boxes: Tensor,
    teacher_landmarks: Tensor,
    weight: Tensor,
    scores: Tensor,
    landmark_weight: float,
) -> Tensor:
    """DIoU loss (Zheng et al. 2020) to the teacher's boxes plus smooth L1 on landmarks in units of the box side.

    Counts only where the teacher is confident (score >= 0.3), weighted by its score.

    Args:
        boxes, teacher_boxes: ``[P, 4]`` xyxy px.
        landmarks, teacher_landmarks: ``[P, 5, 2]`` px.
        weight, scores: ``[P]``; ``scores`` are the teacher's.
        landmark_weight: of the landmarks beside the box.
    """
    keep = (scores >= CONFIDENT) & (weight > 0)
    weight = (weight * scores)[keep]
    overlap = distance_box_iou_loss(boxes[keep], teacher_boxes[keep], reduction="none")
    side = (teacher_boxes[keep][:, 2:] - teacher_boxes[keep][:, :2]).clamp(min=1)[:, None]
    # beta 0.1: quadratic for errors up to a tenth of the face
    points = F.smooth_l1_loss(landmarks[keep] / side, teacher_landmarks[keep] / side, reduction="none", beta=0.1)
    return weighted_mean(overlap + landmark_weight * points.sum((1, 2)), weight)


def dense_score_term(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Quality focal loss (Li et al. 2020) with the teacher's score as the quality, on every anchor ``[B, N]``, per
    face-like anchor: the sum of the teacher's scores above the noise, at least 1 per image."""
    scores = teacher_logits.sigmoid()
    # Some teachers give every background anchor about 0.01, which on 10,000 anchors would outweigh the faces.
    faces = scores.where(scores >= NOISE, 0).sum(1).clamp(min=1).sum()
    return quality_focal_loss(logits, scores).sum() / faces


def feature_term(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention: Sequence[Tensor] | None = None
) -> Tensor:
    """PKD (Cao et al. 2022): half the mean squared difference of channel-normalised maps, i.e. 1 - Pearson correlation.

    Args:
        student, teacher: neck outputs per level, ``[B, C, h, w]`` with equal C (the student's after its adapter).
        attention: ``[B, 1, h, w]`` per level; places weigh in proportion, each image's mean being 1.
    """
    terms = []
    for level, (s, t) in enumerate(zip(student, teacher)):
        error = (_standardise(s) - _standardise(t)).square()
        if attention is not None:
            a = attention[level].float()
            error = error * (a / a.mean((1, 2, 3), keepdim=True).clamp(min=1e-6))
        terms.append(error.mean() / 2)
    return torch.stack(terms).mean()


def attention_term(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of L2-normalised maps ``[B, 1 or C, h, w]`` (Zagoruyko & Komodakis 2017), between 0 and 2."""
    return torch.stack([(_saliency(s) - _saliency(t)).square().sum(1).mean() for s, t in zip(student, teacher)]).mean()


def cross_scale_term(neck: Sequence[Tensor]) -> Tensor:
    """P3 attends where the coarser levels (as constants) do.

    P3's energy is averaged down to the coarser grid rather than theirs enlarged to P3's: what they cannot see, its
    fine detail and with it the smallest faces, stays free.

    Args:
        neck: ``[B, C, h, w]`` per level, finest first.
    """
    energy = neck[0].float().square().mean(1, keepdim=True)
    terms = []
    for coarse in neck[1:]:
        coarse = coarse.detach().float().square().mean(1, keepdim=True)
        pooled = F.interpolate(energy, coarse.shape[-2:], mode="area")
        terms.append((_unit(pooled) - _unit(coarse)).square().sum(1).mean())
    return torch.stack(terms).mean()


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean ``[P] -> []``; 0 (with gradient) for no or zero weights."""
    return (values * weight).sum() / weight.sum().clamp(min=1e-6)


def _standardise(x: Tensor) -> Tensor:
    x = x.float()
    x = x - x.mean((0, 2, 3), keepdim=True)
    return x * (x.square().mean((0, 2, 3), keepdim=True) + 1e-6).rsqrt()


def _saliency(x: Tensor) -> Tensor:
    x = x.float()
    return _unit(x.square().mean(1, keepdim=True) if x.shape[1] > 1 else x)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.flatten(1), dim=1, eps=1e-6)
