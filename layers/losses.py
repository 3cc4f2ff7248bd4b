"""The detector's task loss: classification, boxes and landmarks over assigned anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss, sigmoid_focal_loss

from layers.anchors import decode_boxes, encode_boxes, encode_landmarks
from layers.losses_advanced import (
    AdaptiveLossWeighting,
    eiou_loss,
    iou_loss,
    quality_focal_loss,
    scale_weights,
    wing_loss,
)
from layers.matching import BACKGROUND, aligned_iou, assign
from utils.config import LossConfig

BOX_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iou": iou_loss,
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
    "eiou": eiou_loss,
}
PORTRAIT_POSITIVES = 9.0  # anchors that one face usually gets
MIN_LOG_SIDE = -6.0  # a predicted side is at least exp(-6) of the anchor's, so that ratios and gradients stay finite


class _Positives:
    """The batch's matched anchors as flat lists of length P, shared by all outputs of a step."""

    def __init__(self, matched: Tensor, batch: dict, anchors: Tensor, image_balance: float) -> None:
        self.image, self.anchor = (matched >= 0).nonzero(as_tuple=True)
        face = matched[self.image, self.anchor]
        self.anchors = anchors[self.anchor]
        self.boxes = batch["boxes"][self.image, face].float()
        self.landmarks = batch["landmarks"][self.image, face].float()
        self.has_landmarks = batch["has_landmarks"][self.image, face]
        self.share = _image_shares(matched, image_balance) if image_balance else None  # [B]


class MultiBoxLoss(nn.Module):
    """Multibox loss (Liu et al. 2016; Deng et al. 2020) with exchangeable assignment and terms.

    Each term is a sum over anchors divided by the number of positives (landmarks: of positives that have them), under
    several processes by its mean over them. Everything is computed in float32, whatever autocast says.

    Args:
        cfg: assigner, terms and weights.
        variances: of the box coding.
    """

    def __init__(self, cfg: LossConfig, variances: Sequence[float] = (0.1, 0.2)) -> None:
        super().__init__()
        self.cfg = cfg
        self.variances = tuple(variances)
        self.adaptive = AdaptiveLossWeighting() if cfg.adaptive_weighting else None

    def assign(self, out: dict, batch: dict, anchors: Tensor) -> Tensor:
        """What each anchor has to predict ``[B, N]``, see :func:`layers.matching.assign`."""
        with torch.autocast(anchors.device.type, enabled=False):
            return assign(self.cfg, batch, anchors, out, self.variances)

    def forward(self, out: dict, batch: dict, anchors: Tensor, matched: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            out: ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``; optionally ``coarse`` (the same
                keys) and ``paths`` (a list of such), supervised with the same targets at ``refine_weight``.
            batch: ``boxes [B, M, 4]``, ``landmarks [B, M, 5, 2]``, ``has_landmarks``, ``valid``, ``ignore``
                ``[B, M]``; M may be 0.
            anchors: ``[N, 4]`` cxcywh px.
            matched: what :meth:`assign` says.

        Returns:
            Scalars ``total`` (differentiable), ``class``, ``box``, ``landmark`` (before their weights, detached),
            ``positives`` (matched anchors in the batch) and, where present, ``coarse`` and ``paths``.
        """
        with torch.autocast(anchors.device.type, enabled=False):
            positives = _Positives(matched, batch, anchors, self.cfg.image_balance)
            terms = self._terms(out, matched, positives)
            total = self._weighted(terms)
            logged = {key: value.detach() for key, value in terms.items()}
            for name, stage in earlier_stages(out, self.cfg).items():
                part = torch.stack([self._weighted(self._terms(o, matched, positives)) for o in stage]).mean()
                total = total + self.cfg.refine_weight * part
                logged[name] = part.detach()
        count = total.new_full((), len(positives.image))  # filled on the device: no copy to wait for
        return {"total": total, **logged, "positives": count}

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        cfg = self.cfg
        return (
            cfg.class_weight * terms["class"] + cfg.box_weight * terms["box"] + cfg.landmark_weight * terms["landmark"]
        )

    def _terms(self, out: dict, matched: Tensor, positives: _Positives) -> dict[str, Tensor]:
        """Unweighted ``class``, ``box`` and ``landmark`` of one set of predictions."""
        logits = out["logits"].float()
        where = (positives.image, positives.anchor)
        deltas, points = out["boxes"][where].float(), out["landmarks"][where].float()
        growth = deltas[:, 2:].clamp(min=MIN_LOG_SIDE / self.variances[1])
        predicted = decode_boxes(torch.cat([deltas[:, :2], growth], 1), positives.anchors, self.variances)
        quality = aligned_iou(predicted.detach(), positives.boxes).clamp(0, 1)
        weight = self._weights(logits[where], quality, positives)
        if positives.share is not None:
            weight = weight * positives.share[positives.image]
        count = _world_mean(weight.new_full((), len(weight)))
        return {
            "class": self._class(logits, matched, where, quality, weight, positives.share) / count,
            "box": (weight * self._box(deltas, predicted, positives)).sum() / count,
            "landmark": self._landmark(points, positives, weight),
        }

    @torch.no_grad()
    def _weights(self, logits: Tensor, quality: Tensor, positives: _Positives) -> Tensor:
        """Sample weights ``[P]`` of the positives, of mean 1."""
        weight = torch.ones_like(quality)
        if self.adaptive is not None:
            weight = weight * self.adaptive.positives(logits.sigmoid(), quality)
        if self.cfg.scale_weighting:
            weight = weight * scale_weights(positives.boxes)
        return weight / weight.mean() if len(weight) else weight

    def _class(
        self, logits: Tensor, matched: Tensor, where: tuple, quality: Tensor, weight: Tensor, share: Tensor | None
    ) -> Tensor:
        background = matched == BACKGROUND
        weights = background.to(logits.dtype)
        if self.adaptive is not None:
            weights = weights * self.adaptive.negatives(logits.sigmoid().masked_fill(~background, 0.0))
        if share is not None:
            weights = weights * share[:, None]
        weights[where] = weight
        target = torch.zeros_like(logits)
        if self.cfg.classification == "quality_focal":
            target[where] = quality
            return (weights * quality_focal_loss(logits, target)).sum()
        target[where] = 1.0
        if self.cfg.classification == "focal":
            return (weights * sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0)).sum()
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        mined = (matched >= 0) | _hard_negatives(loss, background, matched, self.cfg.negative_ratio)
        return (weights * loss * mined).sum()

    def _box(self, deltas: Tensor, predicted: Tensor, positives: _Positives) -> Tensor:
        """``[P]``."""
        if self.cfg.box == "smooth_l1":
            target = encode_boxes(positives.boxes, positives.anchors, self.variances)
            return F.smooth_l1_loss(deltas, target, reduction="none").sum(1)
        return BOX_LOSSES[self.cfg.box](predicted, positives.boxes)

    def _landmark(self, points: Tensor, positives: _Positives, weight: Tensor) -> Tensor:
        has, share = positives.has_landmarks, positives.share
        counted = has.to(points.dtype) if share is None else share[positives.image[has]]
        count = _world_mean(counted.sum(), least=1.0 if share is None else 1e-6)
        target = encode_landmarks(positives.landmarks, positives.anchors, self.variances)
        points, target = points[has], target[has]
        if self.cfg.landmark == "wing":
            each = wing_loss(points - target)
        else:
            each = F.smooth_l1_loss(points, target, reduction="none")
        return (weight[has] * each.sum(1)).sum() / count


def earlier_stages(out: dict, cfg: LossConfig) -> dict[str, list[dict]]:
    """The predictions before the last ones in a model's outputs, where they count: those of the ``coarse`` stage, and
    of several ``paths``. The mean of each kind joins a loss at ``refine_weight``."""
    stages = {"coarse": [out["coarse"]] if "coarse" in out else [], "paths": out.get("paths")}
    return {name: each for name, each in stages.items() if each and cfg.refine_weight}


@torch.no_grad()
def _image_shares(matched: Tensor, exponent: float) -> Tensor:
    """Weight ``[B]`` of each image's anchors: its P positives to the power of -``exponent``, scaled so that the mean
    over the positives of all processes is 1. Without it a crowd of 300 faces drowns the false alarms of portraits; an
    image without positives counts as a portrait."""
    positives = (matched >= 0).sum(1).float()
    share = torch.where(positives > 0, positives, PORTRAIT_POSITIVES) ** -exponent
    return share * _world_mean(positives.sum(), least=1e-6) / _world_mean((share * positives).sum(), least=1e-6)


@torch.no_grad()
def _hard_negatives(loss: Tensor, background: Tensor, matched: Tensor, ratio: int) -> Tensor:
    """Mask ``[B, N]`` of each image's ``ratio`` * positives worst background anchors.

    An image without positives counts as having one, so that it still teaches what no face looks like.
    """
    wanted = ratio * (matched >= 0).sum(1).clamp(min=1)
    k = min(int(wanted.max()) if len(wanted) else 0, loss.shape[1])
    order = loss.masked_fill(~background, -1.0).topk(k, dim=1).indices
    rank = torch.arange(k, device=loss.device)
    mask = torch.zeros_like(background).scatter_(1, order, rank < wanted[:, None])
    return mask & background


def _world_mean(count: Tensor, least: float = 1.0) -> Tensor:
    """Mean of a count over the processes (whose gradients are averaged), at least ``least``."""
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=least)
