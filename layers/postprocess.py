"""From raw network outputs to final detections: threshold, decoding, NMS; and box voting to merge several runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from layers.anchors import decode_boxes, decode_landmarks


def postprocess(
    out: dict[str, Tensor],
    anchors: Tensor,
    variances: Sequence[float],
    score_threshold: float = 0.5,
    nms_threshold: float = 0.4,
    top_k: int = 5000,
    keep_k: int = 750,
) -> list[dict[str, Tensor]]:
    """Decode the network's outputs and suppress duplicates, image by image, on the outputs' device.

    Args:
        out: ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]`` (encoded).
        anchors: ``[N, 4]`` cxcywh pixels of the network input.
        score_threshold: only scores above it count.
        nms_threshold: a box overlapping a better one by more than this IoU is dropped.
        top_k, keep_k: at most this many candidates per image before, and detections after NMS.

    Returns:
        Per image ``boxes [n, 4]`` (xyxy pixels of the network input, not clipped), ``scores [n]`` falling,
        ``landmarks [n, 5, 2]`` and ``anchor [n]``, the index of the anchor behind each; n may be 0.
    """
    scores = out["logits"].float().sigmoid()
    passes = scores > score_threshold
    if (passes.sum(1) > top_k).any():  # seldom, and sorting all takes longer than the rest
        passes &= torch.zeros_like(passes).scatter(1, scores.topk(top_k, 1).indices, True)
    # only what passes is decoded: a crowd has hundreds of candidates, the anchors are tens of thousands
    image, anchor = passes.nonzero(as_tuple=True)
    score = scores[image, anchor]
    boxes = decode_boxes(out["boxes"][image, anchor].float(), anchors[anchor], variances)
    landmarks = decode_landmarks(out["landmarks"][image, anchor].float(), anchors[anchor], variances)
    results = []
    for i in range(len(scores)):
        # not batched_nms: it shifts images apart by their largest coordinate, which boxes left of or above 0 undo
        mine = (image == i).nonzero().squeeze(1)
        mine = mine[nms(boxes[mine], score[mine], nms_threshold)[:keep_k]]  # by falling score
        found = {"boxes": boxes, "scores": score, "landmarks": landmarks, "anchor": anchor}
        results.append({key: value[mine] for key, value in found.items()})
    return results


def box_voting(
    boxes: Tensor,
    scores: Tensor,
    landmarks: Tensor,
    nms_threshold: float = 0.4,
    vote_iou: float = 0.5,
) -> dict[str, Tensor]:
    """Merge the detections of one image from several runs (scales, flip), all in the same pixel frame.

    Greedy NMS over the union; every survivor becomes the score-weighted mean of the boxes and landmarks that overlap
    it by at least ``vote_iou`` (box voting, Gidaris & Komodakis 2015) and keeps its own score.

    Args:
        boxes: ``[n, 4]`` xyxy pixels of all runs together.
        scores: ``[n]``.
        landmarks: ``[n, 5, 2]``.

    Returns:
        ``boxes [k, 4]``, ``scores [k]`` falling and ``landmarks [k, 5, 2]``.
    """
    keep = nms(boxes, scores, nms_threshold)
    votes = torch.where(box_iou(boxes[keep], boxes) >= vote_iou, scores, 0.0)
    # a degenerate box has no overlap even with itself: it then stands alone
    votes[torch.arange(len(keep), device=keep.device), keep] = scores[keep].clamp(min=1e-6)
    votes = votes / votes.sum(1, keepdim=True)
    points = (votes @ landmarks.flatten(1)).unflatten(1, landmarks.shape[1:])
    return {"boxes": votes @ boxes, "scores": scores[keep], "landmarks": points}
