"""Random decisions of the augmentations that know about faces: colour, AutoAugment, MixUp, CutMix, Mosaic, RandomErase.

Everything here draws numbers and rectangles (NumPy); ``pixels.py`` carries them out on the images.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from data.geometry import Rect, finish_faces
from data.labels import Faces

GREY = (0.299, 0.587, 0.114)  # luma of RGB, ITU-R BT.601
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
IDENTITY = np.eye(3, 4)

# AutoAugment-style sub-policies (Cubuk et al., 2019) for faces: pairs of (operation, probability, low, high).
# Geometry is mild, and no operation hides or mirrors parts of a face.
POLICIES: list[list[tuple[str, float, float, float]]] = [
    [("gamma", 0.8, 0.6, 1.7), ("rotate", 0.4, 4, 15)],
    [("equalize", 0.5, 0, 0), ("sharpness", 0.5, 0.3, 2.5)],
    [("low_resolution", 0.6, 1.5, 3.0), ("noise", 0.3, 2, 10)],
    [("grey", 0.6, 0, 0), ("gamma", 0.6, 0.7, 1.5)],
    [("autocontrast", 0.6, 0, 0), ("shear", 0.4, 0.03, 0.12)],
    [("posterize", 0.4, 4, 6), ("rotate", 0.5, 4, 15)],
    [("blur", 0.6, 0.4, 1.4), ("noise", 0.4, 2, 10)],
    [("solarize", 0.2, 200, 250), ("shear", 0.5, 0.03, 0.12)],
    [("noise", 0.6, 2, 12), ("rotate", 0.3, 4, 10)],
]
GEOMETRIC = ("rotate", "shear")
SIGNED = ("rotate", "shear")  # magnitudes of either sign


@dataclass
class Erase:
    """A rectangle of the square to be painted over."""

    rect: Rect
    colour: tuple[int, int, int]  # RGB


@dataclass
class Mix:
    """How a partner's square joins: blended with weight ``1 - keep`` (mixup), or a patch of it pasted (the others)."""

    keep: float  # weight of the first image; 1 where a patch is pasted
    source: Rect | None = None  # patch of the partner
    target: Rect | None = None  # where it goes


def draw_colour(rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion as one affine map of RGB (0..255), ``[3, 4]``: ``rgb' = m[:, :3] @ rgb + m[:, 3]``.

    Brightness +-32, contrast and saturation 0.5..1.5, hue +-18 degrees, each with probability one half, as in SSD (Liu
    et al., 2016); hue turns in YIQ so that all four are linear and cost one small matrix product per image.
    """
    on = rng.random(4) < 0.5
    brightness, contrast, saturation, hue = rng.uniform([-32, 0.5, 0.5, -18], [32, 1.5, 1.5, 18])
    m = np.eye(3)
    if on[3]:
        c, s = math.cos(math.radians(hue)), math.sin(math.radians(hue))
        m = _FROM_YIQ @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ _TO_YIQ @ m
    if on[2]:
        m = (saturation * np.eye(3) + (1 - saturation) * np.tile(GREY, (3, 1))) @ m
    bias = np.zeros(3)
    if on[1]:
        m, bias = contrast * m, bias + (1 - contrast) * 114.0
    if on[0]:
        bias = bias + brightness
    return np.concatenate([m, bias[:, None]], axis=1)


def draw_policy(rng: np.random.Generator) -> list[tuple[str, float]]:
    """One AutoAugment sub-policy as (operation, magnitude) pairs, geometric ones first."""
    policy = POLICIES[rng.integers(len(POLICIES))]
    chosen = []
    for name, probability, low, high in policy:
        draw, magnitude, sign = rng.random(), rng.uniform(low, high), rng.choice([-1.0, 1.0])
        if draw < probability:
            chosen.append((name, float(magnitude * sign) if name in SIGNED else float(magnitude)))
    return sorted(chosen, key=lambda op: op[0] not in GEOMETRIC)


def draw_erase(rng: np.random.Generator, boxes: np.ndarray, size: int, tries: int = 10) -> list[Erase]:
    """One to three rectangles (RandomErase, Zhong et al., 2020), 0.5% to 6% of the square each, that touch no face."""
    wanted = int(rng.integers(1, 4))
    side = np.sqrt(rng.uniform(0.005, 0.06, tries)) * size
    aspect = np.sqrt(np.exp(rng.uniform(-1, 1, tries)))
    wh = np.clip(np.stack([side * aspect, side / aspect], axis=1).astype(int), 2, size)
    corner = (rng.random((tries, 2)) * (size - wh + 1)).astype(int)
    colours = rng.integers(0, 256, (tries, 3))
    rects = np.concatenate([corner, corner + wh], axis=1)
    free = ~_touches(rects, boxes).any(axis=1)
    return [Erase(tuple(rects[i].tolist()), tuple(colours[i].tolist())) for i in np.flatnonzero(free)[:wanted]]


def draw_mixup(rng: np.random.Generator, first: Faces, second: Faces, size: int) -> Mix:
    """MixUp (Zhang et al., 2018) that keeps the faces of both images visible: a weight near one half.

    An image without faces only has to be seen as clutter: the other one then keeps the larger weight.
    """
    keep = float(np.clip(rng.beta(8, 8), 0.35, 0.65))
    if len(first) and not len(second):
        keep = max(keep, 1 - keep)
    elif len(second) and not len(first):
        keep = min(keep, 1 - keep)
    return Mix(keep)


def draw_cutmix(rng: np.random.Generator, first: Faces, second: Faces, size: int, tries: int = 24) -> Mix | None:
    """CutMix (Yun et al., 2019) that knows where faces are.

    A patch of the second square around one of its faces, 1.5 to 5 times as large as that face, is pasted into the
    first. No border of the patch crosses a face, neither where it is cut out nor where it is pasted, and no face that
    the second square's own border cuts comes along; of the places tried, one that covers the fewest faces is taken.

    Returns:
        the patch, or None when no place was found (or the second image has no face).
    """
    cut_off = (second.boxes[:, :2] <= 0).any(axis=1) | (second.boxes[:, 2:] >= size).any(axis=1)
    learnable = np.flatnonzero(~second.ignore & ~cut_off)
    if not len(learnable):
        return None
    face = second.boxes[rng.choice(learnable, tries)]
    wh = face[:, 2:] - face[:, :2]
    patch = np.ceil(wh * rng.uniform(1.5, 5.0, (tries, 2))) + 2
    patch = np.clip(patch, 16, 0.75 * size).astype(int)
    slack = np.maximum(patch - wh, 0)
    start = np.floor(face[:, :2] - slack * rng.random((tries, 2))).astype(int)
    start = np.clip(start, 0, size - patch)
    cut = np.concatenate([start, start + patch], axis=1)
    goal = (rng.random((tries, 2)) * (size - patch + 1)).astype(int)
    paste = np.concatenate([goal, goal + patch], axis=1)
    holds_face = _holds(cut, face[:, None])[:, 0]
    clear = ~_crosses(cut, second.boxes[~cut_off]).any(axis=1) & ~_touches(cut, second.boxes[cut_off]).any(axis=1)
    good = holds_face & clear & ~_crosses(paste, first.boxes).any(axis=1)
    if not good.any():
        return None
    covered = _holds(paste, first.boxes[None]).sum(axis=1)
    best = int(np.where(good, covered, np.iinfo(np.int64).max).argmin())
    return Mix(1.0, tuple(cut[best].tolist()), tuple(paste[best].tolist()))


def draw_mosaic(rng: np.random.Generator, others: list[Faces], size: int, tries: int = 12) -> tuple[Rect, list[Mix]]:
    """Mosaic (Bochkovskiy et al., 2020) without shrinking: the square is cut in four at a point of its inner part; one
    part stays, the others show windows of three other squares, with a face in them where one of the windows tried has.

    Args:
        rng: source of randomness.
        others: the faces of the three other squares.
        size: side S of all four squares.
        tries: windows tried per square.

    Returns:
        The part that stays, and one patch per other square; together they cover the square once.
    """
    x, y = rng.integers(round(0.3 * size), round(0.7 * size) + 1, 2).tolist()
    parts = [(0, 0, x, y), (x, 0, size, y), (0, y, x, size), (x, y, size, size)]
    stays, *pasted = (parts[i] for i in rng.permutation(4))
    mixes = []
    for faces, target in zip(others, pasted):
        wh = np.array([target[2] - target[0], target[3] - target[1]])
        start = (rng.random((tries, 2)) * (size - wh + 1)).astype(int)
        windows = np.concatenate([start, start + wh], axis=1)
        shows_face = _holds(windows, faces.boxes[None, ~faces.ignore]).any(axis=1)
        mixes.append(Mix(1.0, tuple(windows[shows_face.argmax()].tolist()), target))
    return stays, mixes


def mosaic_faces(cuts: list[tuple[Faces, Rect, Rect]], min_face: float) -> Faces:
    """The faces of a mosaic.

    A part's border cuts faces as the square's own does, but a face that keeps less than half of its box is ignored:
    there are four times as many borders, and an eye should not often have to count as a face.

    Args:
        cuts: of each of the four squares its faces, not yet clipped (else what its own border cuts would count as
            shown), the window of it that shows, and where that goes.
        min_face: faces whose box has a smaller root of its area (px) are ignored.
    """
    return functools.reduce(Faces.join, [_move_window(*cut, min_face) for cut in cuts])


def _move_window(faces: Faces, source: Rect, target: Rect, min_face: float) -> Faces:
    """The faces of the window ``source``, finished there and moved to ``target``."""
    x0, y0, x1, y1 = source
    corner, goal = np.array([x0, y0], np.float32), np.array(target[:2], np.float32)
    moved = replace(faces, boxes=faces.boxes - np.tile(corner, 2), landmarks=faces.landmarks - corner)
    moved = finish_faces(moved, (x1 - x0, y1 - y0), min_face, learn_from=0.5)
    return replace(moved, boxes=moved.boxes + np.tile(goal, 2), landmarks=moved.landmarks + goal)


def mix_faces(first: Faces, second: Faces, mix: Mix) -> Faces:
    """The faces of the mixed square: all of both (mixup), or those that the patch leaves and brings (cutmix)."""
    if mix.source is None:
        return first.join(second)
    source, target = np.array(mix.source), np.array(mix.target)
    left = first.select(~_holds(target[None], first.boxes[None])[0])
    brought = second.select(_holds(source[None], second.boxes[None])[0])
    shift = (target - source)[:2].astype(np.float64)
    brought.boxes = brought.boxes + np.tile(shift, 2)
    brought.landmarks = brought.landmarks + shift
    return left.join(brought)


def _touches(rects: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """``[R, M]``: whether rectangle and box share any area."""
    low = np.maximum(rects[:, None, :2], boxes[None, :, :2])
    high = np.minimum(rects[:, None, 2:], boxes[None, :, 2:])
    return (high > low).all(axis=2)


def _holds(rects: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """``[R, M]``: whether the box lies in the rectangle; ``boxes`` is ``[1, M, 4]`` or ``[R, M, 4]``."""
    return (boxes[..., :2] >= rects[:, None, :2]).all(axis=2) & (boxes[..., 2:] <= rects[:, None, 2:]).all(axis=2)


def _crosses(rects: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """``[R, M]``: whether the border of the rectangle runs through the box."""
    return _touches(rects, boxes) & ~_holds(rects, boxes[None])
