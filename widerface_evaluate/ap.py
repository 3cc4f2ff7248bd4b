"""WIDERFace average precision, vectorised.

Semantics of the official evaluation (Yang et al., WIDER FACE, CVPR 2016): inclusive pixel boxes (the "+1" IoU), scores
min-max normalised over the whole prediction set, 1,000 score thresholds, every detection assigned to the face it
overlaps most; if that face is outside the subset the detection is neither true nor false. Matching does not depend
on the subset, so it is done once and every subset, bin and bootstrap sample is counted from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.labels import box_overlap

from .errors import EvaluationError, image_key
from .ground_truth import GroundTruth

IGNORE_SHARE = 0.5  # of a detection inside an ignored face: it then counts nowhere, as in training
BELOW = 5e-4  # how far a recommended threshold lies below the score of the last detection to keep, at most
THRESHOLDS = 1 - np.arange(1, 1001) / 1000  # falling, on normalised scores


class Curve(NamedTuple):
    """One precision-recall curve, each ``[1000]``; ``threshold`` is on the raw score scale."""

    precision: np.ndarray
    recall: np.ndarray
    threshold: np.ndarray


@dataclass
class Matches:
    """All detections of a set, flat, sorted by image and then by falling score.

    Attributes:
        image: ``[D]`` image index.
        boxes: ``[D, 4]`` x y w h pixels.
        score: ``[D]`` raw scores.
        bin: ``[D]`` index of the first (highest) of the 1,000 thresholds that admits the detection.
        face: ``[D]`` flat index of the face it overlaps most, -1 if that IoU is below the threshold; then of an ignored
            face of a label file that holds half of it, such as one box around a crowd.
        iou: ``[D]`` that IoU.
        row: ``[D]`` the detection's row in the array given for its image.
        low, high: the score range that was normalised.
    """

    image: np.ndarray
    boxes: np.ndarray
    score: np.ndarray
    bin: np.ndarray
    face: np.ndarray
    iou: np.ndarray
    row: np.ndarray
    low: float
    high: float

    def count(self, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(counted, hit)`` masks ``[D]`` for the faces in ``valid`` ``[G]``.

        A detection counts unless its face is ignored; it is a hit if it is the best-scored one of a valid face.
        """
        matched = self.face >= 0
        on_valid = np.zeros(len(self.face), bool)
        on_valid[matched] = valid[self.face[matched]]
        hit = np.zeros(len(self.face), bool)
        rows = np.flatnonzero(on_valid)
        hit[rows[np.unique(self.face[rows], return_index=True)[1]]] = True
        return on_valid | ~matched, hit

    def raw_thresholds(self) -> np.ndarray:
        """The 1,000 thresholds on the raw score scale, ``[1000]``."""
        return self.low + THRESHOLDS * (self.high - self.low)


def box_iou(boxes: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """IoU ``[n, m]`` of x y w h boxes ``[n, 4]`` and ``[m, 4]``, pixels inclusive (+1), as the benchmark defines it."""
    a0, b0 = boxes[:, None, :2], faces[None, :, :2]
    a1, b1 = a0 + boxes[:, None, 2:], b0 + faces[None, :, 2:]
    width, height = (np.minimum(a1[..., i], b1[..., i]) - np.maximum(a0[..., i], b0[..., i]) + 1 for i in (0, 1))
    inter = np.maximum(width, 0) * np.maximum(height, 0)
    area_a, area_b = ((p[..., 0] - q[..., 0] + 1) * (p[..., 1] - q[..., 1] + 1) for p, q in ((a1, a0), (b1, b0)))
    union = area_a + area_b - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=(inter > 0) & (union > 0))


def _to_xyxy(boxes: np.ndarray) -> np.ndarray:
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def match(preds: Mapping[str, np.ndarray], gt: GroundTruth, iou: float = 0.5) -> Matches:
    """Assign every detection to the face of its image that it overlaps most.

    What overlaps none enough, and lies by half in an ignored face of a label file, belongs to that: it may be a crowd's
    box. (WIDERFace's own protocol, for ``.mat`` files, knows no such thing.)

    Args:
        preds: image name (with or without suffix) -> ``[n, 5]`` x y w h score; images outside ``gt`` are left out
            (also of the score normalisation), every image of ``gt`` must be there.
        gt: the faces.
        iou: least overlap of a match.

    Raises:
        EvaluationError: an image without predictions, or an array of another shape or with non-finite values.
    """
    by_key = {image_key(name): boxes for name, boxes in preds.items()}
    missing = [n for n in gt.names if n not in by_key]
    if missing:
        raise EvaluationError(f"no predictions for {len(missing)} of {len(gt)} images, first: {missing[0]}")
    arrays = []
    for name in gt.names:
        array = np.asarray(by_key[name], np.float64)
        if array.size == 0:
            array = np.zeros((0, 5))
        if array.ndim != 2 or array.shape[1] != 5:
            raise EvaluationError(f"predictions of {name}: expected [n, 5] x y w h score, got {list(array.shape)}")
        arrays.append(array)
    flat = np.concatenate(arrays) if arrays else np.zeros((0, 5))
    counts = np.array([len(a) for a in arrays], np.int64)
    image = np.repeat(np.arange(len(gt)), counts)
    if not np.isfinite(flat).all():
        raise EvaluationError(f"predictions of {gt.names[image[~np.isfinite(flat).all(1)][0]]}: non-finite values")
    row = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.lexsort((-flat[:, 4], image))  # stable: ties keep their order in the file
    flat, row = flat[order], row[order]
    bins, low, high = _bins(flat[:, 4])
    face, best = np.full(len(flat), -1), np.zeros(len(flat))
    starts = np.concatenate([[0], np.cumsum(counts)])
    ignored = gt.ignored
    for i in np.flatnonzero((counts > 0) & (np.diff(gt.offsets) > 0)):
        dets, faces = slice(starts[i], starts[i + 1]), slice(gt.offsets[i], gt.offsets[i + 1])
        overlaps = box_iou(flat[dets, :4], gt.boxes[faces])
        nearest = overlaps.argmax(1)
        best[dets] = overlaps[np.arange(len(nearest)), nearest]
        face[dets] = np.where(best[dets] >= iou, nearest + faces.start, -1)
        regions = faces.start + np.flatnonzero(ignored[faces])
        alone = starts[i] + np.flatnonzero(face[dets] < 0)
        if len(regions) and len(alone):
            inside = box_overlap(_to_xyxy(flat[alone, :4]), _to_xyxy(gt.boxes[regions]))
            most = inside.max(1)
            enough = (most > 0) & (most >= IGNORE_SHARE * flat[alone, 2:4].prod(1))
            face[alone] = np.where(enough, regions[inside.argmax(1)], -1)
    return Matches(image, flat[:, :4], flat[:, 4], bins, face, best, row, low, high)


def rescore(matches: Matches, score: np.ndarray, floor: float = -np.inf) -> Matches:
    """The same detections, and so the same faces, with other raw scores ``[D]``, those above ``floor`` only."""
    order = np.lexsort((-score, matches.image))
    order = order[score[order] > floor]
    bins, low, high = _bins(score[order])
    image, boxes, face, iou, row = (
        x[order] for x in (matches.image, matches.boxes, matches.face, matches.iou, matches.row)
    )
    return Matches(image, boxes, score[order], bins, face, iou, row, low, high)


def _bins(score: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The threshold bin of each raw score, and the range that was normalised."""
    # As in the reference, the range never starts above 1 or ends below 0.
    low, high = (min(score.min(), 1.0), max(score.max(), 0.0)) if len(score) else (0.0, 1.0)
    normal = (score - low) / (high - low) if high > low else np.ones(len(score))
    return np.searchsorted(-THRESHOLDS, -normal, side="left").clip(max=len(THRESHOLDS) - 1), float(low), float(high)


def precision_recall(counted: np.ndarray, hits: np.ndarray, faces: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall ``[..., 1000]`` from detections and hits per threshold bin ``[..., 1000]``.

    ``faces`` (``[..., 1]`` or a number) is the count of valid faces. A threshold that admits nothing has precision 0,
    as has recall where there is no face.
    """
    hits, counted = np.cumsum(hits, -1, dtype=np.float64), np.cumsum(counted, -1, dtype=np.float64)
    precision = np.divide(hits, counted, out=np.zeros_like(hits), where=counted > 0)
    return precision, hits / np.maximum(faces, 1)


def average_precision(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Area under the monotone envelope of curves ``[..., T]``, recall rising along the last axis (VOC 2010 AP)."""
    envelope = np.maximum.accumulate(precision[..., ::-1], -1)[..., ::-1]
    return (np.diff(recall, axis=-1, prepend=0.0) * envelope).sum(-1)


def curve_of(matches: Matches, valid: np.ndarray, images: np.ndarray | None = None) -> tuple[float, Curve]:
    """AP and curve for the faces in ``valid`` ``[G]``, over the detections of ``images`` (mask ``[I]``) or of all."""
    counted, hit = matches.count(valid)
    if images is not None:
        counted, hit = counted & images[matches.image], hit & images[matches.image]
    n = len(THRESHOLDS)
    precision, recall = precision_recall(
        np.bincount(matches.bin[counted], minlength=n), np.bincount(matches.bin[hit], minlength=n), int(valid.sum())
    )
    return float(average_precision(precision, recall)), Curve(precision, recall, matches.raw_thresholds())


def evaluate(preds: Mapping[str, np.ndarray], gt: GroundTruth, iou: float = 0.5) -> dict:
    """AP for every subset of ``gt``.

    Args and errors: see :func:`match`.

    Returns:
        ``{"easy", "medium", "hard" (whatever subsets gt has): float, "images": int, "faces": {subset: int},
        "curves": {subset: Curve}}``. A subset without any face has AP 0.
    """
    return evaluate_matches(match(preds, gt, iou), gt)


def evaluate_matches(matches: Matches, gt: GroundTruth) -> dict:
    """:func:`evaluate` on finished matches; with the subset ``all`` (label files) also the best operating point."""
    pairs = {subset: curve_of(matches, valid) for subset, valid in gt.valid.items()}
    return {
        **{subset: ap for subset, (ap, _) in pairs.items()},
        "images": len(gt),
        "faces": {subset: int(valid.sum()) for subset, valid in gt.valid.items()},
        "curves": {subset: curve for subset, (_, curve) in pairs.items()},
        **(best_threshold(matches, gt.valid["all"]) if "all" in gt.valid else {}),
    }


def best_threshold(matches: Matches, valid: np.ndarray) -> dict[str, float]:
    """The threshold with the highest F1, and its precision, recall and F1. It lies a little below the raw score of the
    last detection to keep, since detectors keep what is above."""
    counted, hit = matches.count(valid)
    order = np.argsort(-matches.score, kind="stable")
    order = order[counted[order]]
    if not len(order):
        return {"threshold": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    hits, total, score = np.cumsum(hit[order]), np.arange(1, len(order) + 1), matches.score[order]
    f1 = 2 * hits / (total + max(int(valid.sum()), 1))
    f1[:-1][score[:-1] == score[1:]] = -1  # equal scores are admitted together
    best = int(f1.argmax())
    return {
        "threshold": float(max((score[best] + score[best + 1 :].max(initial=0)) / 2, score[best] - BELOW)),
        "precision": float(hits[best] / total[best]),
        "recall": float(hits[best] / max(int(valid.sum()), 1)),
        "f1": float(f1[best]),
    }
