"""Where the AP is lost: by face height, by event, and the single worst detections and faces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from data.select import event_of

from .ap import Matches, best_threshold, curve_of
from .errors import EvaluationError
from .ground_truth import GroundTruth

HEIGHT_BINS = (10, 16, 24, 48, 96, 300, np.inf)  # pixels


def breakdown(matches: Matches, gt: GroundTruth, subset: str = "hard") -> dict:
    """AP and recall by face height and by event.

    Within a height bin the other faces are ignored; every false positive counts in every bin, so a bin with few
    faces has a low AP: compare a bin between models, not bins with each other. Recall is over all detections.

    Returns:
        ``{"by_height": {"10-16": {"faces", "recall", "ap"}, ..., ">300"}, "by_event": {event: {"images", "faces",
        "recall", "ap"}}}``, of faces in ``subset``; events ordered by AP, worst first. Without faces recall and AP are
        None, and such events last.
    """
    valid = _subset(gt, subset)
    height = gt.boxes[:, 3]
    by_height = {key: _row(matches, valid & inside) for key, inside in _height_bins(height)}
    events = np.array([event_of(name) for name in gt.names])
    by_event = {}
    for event in np.unique(events):
        images = events == event
        by_event[str(event)] = {"images": int(images.sum()), **_row(matches, valid & images[gt.image], images)}
    return {
        "by_height": by_height,
        "by_event": dict(sorted(by_event.items(), key=lambda e: (e[1]["ap"] is None, e[1]["ap"]))),
    }


def _height_bins(height: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Name of each bin and which of the faces are in it."""
    for low, high in itertools.pairwise(HEIGHT_BINS):
        yield f"{low}-{high}" if high < np.inf else f">{low}", (height >= low) & (height < high)


def _row(matches: Matches, valid: np.ndarray, images: np.ndarray | None = None) -> dict:
    ap, curve = curve_of(matches, valid, images)
    faces = int(valid.sum())
    return {"faces": faces, "recall": float(curve.recall[-1]) if faces else None, "ap": ap if faces else None}


def _subset(gt: GroundTruth, subset: str) -> np.ndarray:
    if subset not in gt.valid:
        raise EvaluationError(f"unknown subset '{subset}' (known: {', '.join(gt.valid)})")
    return gt.valid[subset]


def worst_cases(matches: Matches, gt: GroundTruth, subset: str = "hard", top: int = 100) -> dict:
    """The most confident false positives and the largest missed faces.

    A face is missed if nothing hits it at the score of highest F1 (given as ``threshold``); its ``score`` is that
    of the hit below that threshold, or None. A false positive is ``duplicate`` if it overlaps a face already found.

    Returns:
        ``{"threshold", "false_positives": [{"name", "box", "score", "iou", "duplicate"}], "misses": [{"name", "box",
        "score"}]}``; boxes x y w h pixels; at most ``top`` each.
    """
    valid = _subset(gt, subset)
    counted, hit = matches.count(valid)
    threshold = best_threshold(matches, valid)["threshold"]
    wrong = np.flatnonzero(counted & ~hit)
    wrong = wrong[np.argsort(-matches.score[wrong], kind="stable")][:top]
    found = np.full(len(gt.boxes), np.nan)
    found[matches.face[hit]] = matches.score[hit]
    missed = np.flatnonzero(valid & ~(found >= threshold))
    missed = missed[np.argsort(-gt.boxes[missed, 3], kind="stable")][:top]
    image = gt.image
    return {
        "threshold": threshold,
        "false_positives": [
            {
                "name": gt.names[matches.image[i]],
                "box": matches.boxes[i].tolist(),
                "score": float(matches.score[i]),
                "iou": float(matches.iou[i]),
                "duplicate": bool(matches.face[i] >= 0),
            }
            for i in wrong
        ],
        "misses": [
            {
                "name": gt.names[image[g]],
                "box": gt.boxes[g].tolist(),
                "score": None if np.isnan(found[g]) else float(found[g]),
            }
            for g in missed
        ],
    }


def landmark_error(matches: Matches, gt: GroundTruth, landmarks: Mapping[str, np.ndarray]) -> dict:
    """Normalised mean error (NME) of the landmarks of hit faces: mean point distance over inter-ocular distance.

    Args:
        matches: of the predictions whose row order ``landmarks`` shares.
        landmarks: image key -> ``[n, 5, 2]`` pixels, rows as in the predictions given to :func:`match`.

    Returns:
        ``{"nme": float or None, "landmark_faces": int, "landmarks_by_height": {"10-16": {"faces", "nme", "median"},
        ..., ">300"}}``, empty bins left out. Faces with eyes closer than 2 px (profiles) are left out: there the
        denominator says nothing. Where it is small the error is large, so profiles weigh much in a mean, not in a
        median.
    """
    _, hit = matches.count(~np.isnan(gt.landmarks).any((1, 2)) & ~gt.ignored)
    rows = np.flatnonzero(hit)
    if not len(rows):
        return {"nme": None, "landmark_faces": 0, "landmarks_by_height": {}}
    truth = gt.landmarks[matches.face[rows]]
    found = np.stack([landmarks[gt.names[matches.image[r]]][matches.row[r]] for r in rows])
    eyes = np.linalg.norm(truth[:, 0] - truth[:, 1], axis=1)
    kept = eyes >= 2
    error = np.linalg.norm(found - truth, axis=2).mean(1)[kept] / eyes[kept]
    by_height = {
        key: {"faces": int(inside.sum()), "nme": float(error[inside].mean()), "median": float(np.median(error[inside]))}
        for key, inside in _height_bins(gt.boxes[matches.face[rows][kept], 3])
        if inside.any()
    }
    return {
        "nme": float(error.mean()) if len(error) else None,
        "landmark_faces": len(error),
        "landmarks_by_height": by_height,
    }
