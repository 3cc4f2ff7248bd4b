"""The order of images in an epoch: fixed functions of (seed, epoch), so that a resumed epoch continues exactly."""

from __future__ import annotations

import numpy as np

from data.labels import LabelSet
from data.select import event_of

ORDER_TAG = 7919  # keeps the order's random stream apart from those of the samples
CURRICULUM_PART = 1 / 3  # of all epochs
CURRICULUM_START = 0.3  # share of images, the easiest, in the first epoch


def difficulty(labels: LabelSet, sizes: np.ndarray) -> np.ndarray:
    """How hard each image is, ``[I]`` in [0, 1]: small faces, many faces, and blurred or occluded ones where known.

    Each of the three is turned into its rank among all images, so that none dominates by its unit.

    Args:
        labels: the faces; ``quality`` > 0 is taken as known.
        sizes: ``[I, 2]`` (width, height) of the images.
    """
    n = len(labels)
    owners = labels.owners()
    side = np.sqrt((labels.boxes[:, 2:] - labels.boxes[:, :2]).clip(0).prod(axis=1))
    share = side / np.maximum(np.sqrt(sizes.astype(np.float64).prod(axis=1))[owners], 1)
    size = np.ones(n)  # an image without faces is as easy as one with a single huge face
    for i in range(n):
        part = share[labels.offsets[i] : labels.offsets[i + 1]]
        if part.size:
            size[i] = np.median(part)
    count = np.diff(labels.offsets)
    known = labels.quality > 0
    total = np.bincount(owners[known], labels.quality[known], minlength=n)
    seen = np.bincount(owners[known], minlength=n)
    quality = np.where(seen > 0, total / np.maximum(seen, 1), 0.5)
    ranks = np.stack([_rank(-size), _rank(count), _rank(-quality)])
    return _rank(np.array([0.5, 0.3, 0.2]) @ ranks)


def _rank(values: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1], ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean = ends - (counts + 1) / 2
    return mean[inverse] / max(len(values) - 1, 1)


def event_weights(names: list[str]) -> np.ndarray:
    """Sampling probability of each image, ``[I]``: an event of ``n`` images weighs ``sqrt(n)`` instead of ``n``.

    Square-root sampling (Mahajan et al., 2018): rare events are seen more often, yet not until they are memorised.
    """
    _, inverse, counts = np.unique([event_of_full(n) for n in names], return_inverse=True, return_counts=True)
    weights = 1 / np.sqrt(counts[inverse])
    return weights / weights.sum()


def event_of_full(name: str) -> str:
    """The event of a full name such as ``train/0--Parade/a.jpg``."""
    folder, _, rest = name.partition("/")
    return f"{folder}/{event_of(rest)}"


def epoch_order(
    count: int,
    need: int,
    seed: int,
    epoch: int,
    weights: np.ndarray | None = None,
    hardness: np.ndarray | None = None,
    progress: float = 1.0,
) -> np.ndarray:
    """Indices of the images of one epoch, ``[need]``.

    Args:
        count: images in the data set.
        need: indices wanted; beyond one pass the images are shuffled again.
        seed, epoch: all that the order depends on, besides the arguments below.
        weights: ``[count]`` probabilities to draw by, with replacement (balanced events).
        hardness: ``[count]`` from :func:`difficulty`: the curriculum, easy images first.
        progress: fraction of training done, for the curriculum; from :data:`CURRICULUM_PART` on all images take part.
    """
    rng = np.random.default_rng([seed, epoch, ORDER_TAG])
    pool = np.arange(count)
    if hardness is not None and progress < CURRICULUM_PART:
        share = CURRICULUM_START + (1 - CURRICULUM_START) * progress / CURRICULUM_PART
        pool = np.sort(np.argsort(hardness, kind="stable")[: max(1, round(share * count))])
    if weights is not None:
        p = weights[pool] / weights[pool].sum()
        return rng.choice(pool, size=need, p=p)
    passes = -(-need // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(passes)])[:need]
