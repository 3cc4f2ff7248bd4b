"""Past predictions of each training image, kept in original-image pixels for the temporal-consistency term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.teachers import MATCH_IOU, Prediction, best_overlap, rows, suppress

KEEP_SCORE = 0.3  # weaker predictions are not remembered
CANDIDATES = 128  # per image, before non-maximum suppression
INSIDE = 0.9  # share of a box that must lie in the crop for the crop to have a say about it
MIN_SIDE = 4.0  # px in the crop; smaller boxes cannot be judged there


class PredictionMemory(nn.Module):
    """A bounded table of the best boxes per image. Its two buffers travel in the state dict, so that a resumed run
    remembers the same.

    Args:
        images: rows of the table; an image uses row ``index % images`` and evicts another one there.
        boxes: boxes kept per image.
    """

    def __init__(self, images: int, boxes: int) -> None:
        super().__init__()
        self.register_buffer("owner", torch.full((images,), -1, dtype=torch.int64))  # image index, -1 = empty
        self.register_buffer("table", torch.zeros(images, boxes, 5))  # xyxy px of the original image, score (0 = none)

    def recall(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Remembered boxes ``[B, K, 4]`` in batch pixels and their scores ``[B, K]``.

        The score is 0 where nothing is remembered and where the crop does not show the box.
        """
        boxes, scores = self._entries(batch)
        boxes = to_batch(boxes, batch["transform"], batch["images"].shape[-1])
        return boxes, scores * shown(boxes, batch["images"].shape[-1])

    @torch.no_grad()
    def remember(self, batch: dict, student: Prediction) -> None:
        """Store the current predictions; what this crop does not show keeps its older entry.

        Images that ``transform`` cannot map back (rotated, blended: its last entry is not 0) are skipped.
        """
        size, capacity = batch["images"].shape[-1], self.table.shape[1]
        boxes, scores, _, alone = _surest(student, size)
        survived = alone & (scores >= KEEP_SCORE)

        old_boxes, old_scores = self._entries(batch)
        old_scores = old_scores * ~shown(to_batch(old_boxes, batch["transform"], size), size)
        boxes = torch.cat([to_original(boxes, batch["transform"], size), old_boxes], 1)
        scores, index = torch.cat([scores * survived, old_scores], 1).topk(capacity, 1)
        entries = torch.cat([rows(boxes, index), scores[..., None]], 2) * (scores > 0)[..., None]
        slot = batch["index"] % len(self.owner)
        # Of two entries for one row the later one counts: a GPU would write them in any order, numbers mixed.
        clean = batch["transform"][:, 5] == 0
        keep = clean & ~((slot[:, None] == slot) & clean).triu(1).any(1)
        self.owner[slot[keep]] = batch["index"][keep]
        self.table[slot[keep]] = entries[keep]

    def _entries(self, batch: dict) -> tuple[Tensor, Tensor]:
        slot = batch["index"] % len(self.owner)
        known = (self.owner[slot] == batch["index"]) & (batch["transform"][:, 5] == 0)
        entries = self.table[slot] * known[:, None, None]
        return entries[..., :4], entries[..., 4]


def to_batch(boxes: Tensor, transform: Tensor, size: int) -> Tensor:
    """Original-image xyxy ``[B, K, 4]`` -> batch pixels, ``transform [B, 6]`` being (ax, bx, ay, by, flipped, _)."""
    scale, shift, flipped = _affine(transform)
    boxes = boxes * scale + shift
    return torch.where(flipped, _flip(boxes, size), boxes)


def to_original(boxes: Tensor, transform: Tensor, size: int) -> Tensor:
    """Inverse of :func:`to_batch`."""
    scale, shift, flipped = _affine(transform)
    return (torch.where(flipped, _flip(boxes, size), boxes) - shift) / scale


def shown(boxes: Tensor, size: int) -> Tensor:
    """``[B, K, 4]`` -> bool ``[B, K]``: the crop of ``size`` px shows at least 90 % of the box, and large enough."""
    side = boxes[..., 2:] - boxes[..., :2]
    visible = boxes.clamp(0, size)
    visible = (visible[..., 2:] - visible[..., :2]).prod(-1)
    return (visible >= INSIDE * side.prod(-1)) & (side >= MIN_SIDE).all(-1)


def find_again(boxes: Tensor, scores: Tensor, student: Prediction, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's anchors that speak for the remembered boxes now, of those that no surer one overlaps. The labels
    call the others background, however well they are placed: to pull them up would teach duplicates.

    Args:
        boxes, scores: ``[B, K, 4]`` batch px and ``[B, K]``.
        student: ``[B, N]``.
        size: of the batch's images, px.

    Returns:
        image, anchor, remembered column, each ``[E]``, and IoU ``[E]``; pairs below IoU 0.5 are left out.
    """
    now, _, index, alone = _surest(student, size)
    overlap, place = best_overlap(boxes, now, alone)
    image, column = ((overlap >= MATCH_IOU) & (scores > 0)).nonzero(as_tuple=True)
    return image, index[image, place[image, column]], column, overlap[image, column]


@torch.no_grad()
def _surest(student: Prediction, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The surest boxes ``[B, C, 4]``, their scores and anchors ``[B, C]``, and which of them the image shows and
    non-maximum suppression leaves."""
    scores, index = student.logits.sigmoid().topk(min(CANDIDATES, student.logits.shape[1]), 1)
    boxes = rows(student.boxes, index)
    return boxes, scores, index, suppress(boxes, scores, shown(boxes, size))


def _affine(transform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = transform[:, None, [0, 2, 0, 2]].float()
    shift = transform[:, None, [1, 3, 1, 3]].float()
    return scale, shift, transform[:, 4, None, None] > 0.5


def _flip(boxes: Tensor, size: int) -> Tensor:
    return torch.stack([size - boxes[..., 2], boxes[..., 1], size - boxes[..., 0], boxes[..., 3]], -1)
