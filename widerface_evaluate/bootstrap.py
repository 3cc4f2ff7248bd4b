"""Paired bootstrap over images: is one prediction set really better than another?"""

from __future__ import annotations

import numpy as np

from .ap import THRESHOLDS, Matches, average_precision, precision_recall
from .ground_truth import GroundTruth

CHUNK = 100  # resamples at a time: bounds the memory at 4 x 100 x 1000 floats


def paired_bootstrap(
    a: Matches, b: Matches, gt: GroundTruth, subset: str, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference AP(a) - AP(b) of two prediction sets with its 95% percentile interval (Efron & Tibshirani 1993).

    Images are drawn with replacement, the same ones for both sets, so what makes an image hard cancels out. Scores are
    normalised and faces matched once, on the full sets; a resample is then a weighted sum of per-image histograms.

    Args:
        a, b: see :func:`match`.
        subset: a key of ``gt.valid``, such as ``"hard"``.
        samples: number of resamples.
        seed: of the drawing.

    Returns:
        ``(delta, low, high)``; delta is on the images as they are.
    """
    delta, deltas = resampled_deltas(a, b, gt, subset, samples, seed)
    low, high = np.percentile(deltas, [2.5, 97.5])
    return delta, float(low), float(high)


def resampled_deltas(
    a: Matches, b: Matches, gt: GroundTruth, subset: str, samples: int = 1000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """AP(a) - AP(b) on the images as they are, and ``[samples]`` on resampled ones.

    The same ``gt``, ``samples`` and ``seed`` draw the same images, so results of several subsets or of several training
    seeds can be averaged element by element before a percentile is taken.
    """
    valid = gt.valid[subset]
    faces = np.bincount(gt.image[valid], minlength=len(gt)).astype(np.float32)
    tables = [_histograms(m, valid, len(gt)) for m in (a, b)]

    def aps(weights: np.ndarray) -> np.ndarray:
        """AP difference ``[S]`` for image weights ``[S, I]``; float32 sums of counts are exact below 2^24."""
        total = (weights @ faces)[:, None]
        ap_a, ap_b = (average_precision(*precision_recall(weights @ c, weights @ h, total)) for c, h in tables)
        return ap_a - ap_b

    rng = np.random.default_rng(seed)
    even = np.full(len(gt), 1 / len(gt))
    deltas = []
    for start in range(0, samples, CHUNK):
        weights = rng.multinomial(len(gt), even, size=min(CHUNK, samples - start))
        deltas.append(aps(weights.astype(np.float32)))
    delta = float(aps(np.ones((1, len(gt)), np.float32))[0])
    return delta, np.concatenate(deltas)


def _histograms(matches: Matches, valid: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Counted detections and hits per image and threshold bin, each ``[I, 1000]`` float32."""
    n = len(THRESHOLDS)
    cell = matches.image * n + matches.bin
    counted, hit = (np.bincount(cell[m], minlength=images * n) for m in matches.count(valid))
    return counted.reshape(images, n).astype(np.float32), hit.reshape(images, n).astype(np.float32)
