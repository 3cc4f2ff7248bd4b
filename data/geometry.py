"""Where each training sample is cut from, and what happens to its faces: NumPy only, no pixels.

A crop is a rectangle of whole pixels of the stored image (``source``) that is resized onto a rectangle of whole pixels
of the ``S x S`` square (``target``); outside of it the square is padding. The same numbers move pixels (``pixels.py``)
and faces (here), so that the two cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data.labels import FLIP_ORDER, Faces
from utils.config import AugmentConfig

TRIES = 12  # crops drawn before one is aimed at a face
LANDMARK_MARGIN = 0.25  # of the box side: landmarks further out of the square than this are dropped

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels


@dataclass
class Crop:
    """The ``source`` rectangle of the stored image goes to the ``target`` rectangle, then perhaps mirrored."""

    source: Rect
    target: Rect  # before flipping
    flip: bool

    def placed(self, size: int) -> Rect:
        """Where the (flipped) source lies in the finished square."""
        x0, y0, x1, y1 = self.target
        return (size - x1, y0, size - x0, y1) if self.flip else self.target

    def transform(self, scale: tuple[float, float]) -> np.ndarray:
        """(ax, bx, ay, by, flip, 0): ``x_square = ax * x_file + bx`` before flipping.

        Args:
            scale: stored pixels per pixel of the image file, along x and y.
        """
        ax = (self.target[2] - self.target[0]) / (self.source[2] - self.source[0])
        ay = (self.target[3] - self.target[1]) / (self.source[3] - self.source[1])
        bx, by = self.target[0] - ax * self.source[0], self.target[1] - ay * self.source[1]
        return np.array([ax * scale[0], bx, ay * scale[1], by, float(self.flip), 0.0])


def draw_crop(
    rng: np.random.Generator, stored: tuple[int, int], boxes: np.ndarray, cfg: AugmentConfig, size: int
) -> Crop:
    """Draw a random square crop, one with a learnable face in it whenever the image has one.

    Args:
        rng: source of randomness.
        stored: (width, height) of the stored image.
        boxes: ``[M, 4]`` xyxy, stored pixels, faces worth seeing.
        cfg: ``crop_scales`` (side as a factor on the short side; above 1 the image is padded and shrunk),
            ``whole_image_prob``, ``flip_prob``.
        size: side S of the square.
    """
    w, h = stored
    flip = bool(rng.random() < cfg.flip_prob)
    if rng.random() < cfg.whole_image_prob:
        side = max(w, h)
        return _cut(*(rng.random(2) * (np.array([w, h]) - side)).round().astype(int), side, stored, size, flip)
    sides = np.maximum(1, np.round(rng.choice(cfg.crop_scales, TRIES) * min(w, h))).astype(int)
    room = np.array([[w, h]]) - sides[:, None]  # negative where the crop is larger than the image
    corners = np.round(rng.random((TRIES, 2)) * room).astype(int)
    pick = 0
    if len(boxes):
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        face = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
        inside = ((centres >= corners[:, None]) & (centres < (corners + sides[:, None])[:, None])).all(axis=2)
        inside &= face * (size / sides[:, None]) >= cfg.min_face
        good = inside.any(axis=1)
        if good.any():
            pick = int(good.argmax())
        else:  # aim the first crop at one of the larger faces, somewhere in its inner part
            target = int(rng.choice(np.flatnonzero(face >= np.median(face))))
            low = np.minimum(0, room[0])
            wanted = centres[target] - sides[0] * rng.uniform(0.2, 0.8, 2)
            corners[0] = np.clip(np.round(wanted), low, np.maximum(0, room[0])).astype(int)
    return _cut(*corners[pick], int(sides[pick]), stored, size, flip)


def _cut(x0: int, y0: int, side: int, stored: tuple[int, int], size: int, flip: bool) -> Crop:
    """The crop of the given corner and side; whatever lies outside the image becomes padding."""
    source, target = [], []
    for corner, limit in ((int(x0), stored[0]), (int(y0), stored[1])):
        low, high = max(0, corner), min(limit, corner + side)
        t0, t1 = round((low - corner) * size / side), round((high - corner) * size / side)
        t0 = min(t0, size - 1)
        source.append((low, high))
        target.append((t0, max(t0 + 1, t1)))
    (sx0, sx1), (sy0, sy1) = source
    (tx0, tx1), (ty0, ty1) = target
    return Crop((sx0, sy0, sx1, sy1), (tx0, ty0, tx1, ty1), flip)


def move_faces(faces: Faces, transform: np.ndarray, size: int) -> Faces:
    """Faces in pixels of the image file -> pixels of the (flipped) square, not yet clipped.

    Args:
        faces: boxes and landmarks in pixels of the image file.
        transform: ``[6]`` from :meth:`Crop.transform`.
        size: side of the square.
    """
    ax, bx, ay, by, flip, _ = transform
    a, b = np.array([ax, ay]), np.array([bx, by])
    boxes = faces.boxes * np.tile(a, 2) + np.tile(b, 2)
    landmarks = faces.landmarks * a + b
    if flip:
        boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], axis=1)
        landmarks = landmarks[:, FLIP_ORDER]
        landmarks[..., 0] = size - landmarks[..., 0]
    return Faces(boxes, landmarks, faces.has_landmarks.copy(), faces.ignore.copy())


def affine_matrix(degrees: float, shear: float) -> np.ndarray:
    """``[2, 2]`` forward matrix of a rotation (clockwise on the screen, y down) after a horizontal shear."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s], [s, c]]) @ np.array([[1.0, shear], [0.0, 1.0]])


def warp_faces(faces: Faces, matrix: np.ndarray, size: int) -> Faces:
    """Apply a 2x2 matrix about the centre of the square.

    A face is nearer an ellipse than a rectangle: the new box is the tight box of the warped ellipse inscribed in the
    old one, which does not grow as the box of the warped corners would.
    """
    centre = size / 2
    middle = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2 - centre
    half = (faces.boxes[:, 2:] - faces.boxes[:, :2]) / 2
    middle = middle @ matrix.T + centre
    half = np.sqrt((half**2) @ (matrix**2).T)
    landmarks = (faces.landmarks - centre) @ matrix.T + centre
    return Faces(np.concatenate([middle - half, middle + half], axis=1), landmarks, faces.has_landmarks, faces.ignore)


def finish_faces(faces: Faces, size: int | tuple[int, int], min_face: float, learn_from: float = 0.0) -> Faces:
    """Decide what each moved face is: to learn, to ignore, or gone; clip the boxes to the square, or to a rectangle of
    ``size`` (width, height).

    Faces whose centre is inside are learnt (clipped), unless the root of the whole box's area is below ``min_face`` px
    or less than ``learn_from`` of it shows: then they are ignored. Faces whose centre is outside but of which at least
    a tenth shows are ignored too; the rest is dropped.
    """
    if not len(faces):
        return faces
    size, full = np.broadcast_to(size, 2), faces.boxes
    clipped = np.clip(full, 0, np.tile(size, 2))
    area = (full[:, 2:] - full[:, :2]).prod(axis=1)
    shown = (clipped[:, 2:] - clipped[:, :2]).prod(axis=1) / np.maximum(area, 1e-9)
    centre = (full[:, :2] + full[:, 2:]) / 2
    inside = ((centre >= 0) & (centre < size)).all(axis=1)
    kept_side = (clipped[:, 2:] - clipped[:, :2]).min(axis=1)
    margin = LANDMARK_MARGIN * np.sqrt(np.maximum(area, 0))[:, None, None]
    near = ((faces.landmarks >= -margin) & (faces.landmarks <= size + margin)).all(axis=(1, 2))
    finished = Faces(
        clipped,
        faces.landmarks,
        faces.has_landmarks & near,
        faces.ignore | ~inside | (shown < learn_from) | (np.sqrt(area) < min_face) | (kept_side < 1),
    )
    return finished.select((inside | (shown >= 0.1)) & (kept_side > 0))
