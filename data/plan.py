"""What a batch will show, decided before a pixel is touched: every random choice, and where the faces end up (NumPy,
cheap). A sample depends only on (seed, epoch, position in the epoch), so a resumed epoch continues exactly.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch

from data.augmentations_smart import (
    GEOMETRIC,
    Erase,
    Mix,
    draw_colour,
    draw_cutmix,
    draw_erase,
    draw_mixup,
    draw_mosaic,
    draw_policy,
    mix_faces,
    mosaic_faces,
)
from data.cache import DecodeStore, FlatStore
from data.dataset import FaceDataset
from data.geometry import Crop, affine_matrix, draw_crop, finish_faces, move_faces, warp_faces
from data.labels import DataError, Faces, ImageError
from utils.config import AugmentConfig

log = logging.getLogger(__name__)

SAMPLE_TAG, PARTNER_TAG, SIZE_TAG = 0, 1, 2  # separate random streams


@dataclass
class SamplePlan:
    """All decisions about one square and its faces after them."""

    index: int
    crop: Crop
    transform: np.ndarray  # [6], see Crop.transform; the last entry is 1 when the square was also warped or mixed
    faces: Faces  # finished: clipped to the square, the small ones ignored
    moved: Faces  # before that
    colour: np.ndarray | None = None  # [3, 4]
    warp: np.ndarray | None = None  # [2, 2]
    operations: list[tuple[str, float]] = field(default_factory=list)
    noise_seed: int = 0

    def __getstate__(self) -> dict:
        """Without the faces, which serve planning only: unpacking them would hold up a GPU's process."""
        return {**vars(self), "faces": None, "moved": None}


@dataclass
class BatchPlan:
    """Squares to render: the batch's own, then the partners that are mixed into some of them."""

    size: int
    samples: list[SamplePlan]  # [B + P]
    mixes: list[tuple[int, int, Mix]]  # (square, partner's square, how)
    erases: list[list[Erase]]  # [B], rectangles painted over after mixing
    batch: dict  # the finished batch without its images


def plan_sample(
    data: FaceDataset, augment: AugmentConfig, index: int, size: int, rng: np.random.Generator
) -> SamplePlan:
    """Draw the decisions for image ``index`` in an ``S x S`` square (all but mixing)."""
    stored = tuple(data.stored[index].tolist())
    scale = tuple((data.stored[index] / data.sizes[index]).tolist())
    faces = data.labels.faces(index)
    crop = draw_crop(rng, stored, faces.boxes[~faces.ignore] * np.tile(scale, 2), augment, size)
    transform = crop.transform(scale)
    moved = move_faces(faces, transform, size)
    plan = SamplePlan(index, crop, transform, moved, moved)
    if rng.random() < augment.photometric_prob:
        plan.colour = draw_colour(rng)
    if rng.random() < augment.auto_augment_prob:
        chosen = dict(draw_policy(rng))
        if any(name in chosen for name in GEOMETRIC):
            plan.warp = affine_matrix(chosen.pop("rotate", 0.0), chosen.pop("shear", 0.0))
            # what the crop cut off stays cut off: turning brings in padding from beyond its edge, no more of a face
            plan.moved = warp_faces(finish_faces(moved, size, augment.min_face, learn_from=0.5), plan.warp, size)
            transform[5] = 1.0
        plan.operations = list(chosen.items())
        plan.noise_seed = int(rng.integers(2**31))
    plan.faces = finish_faces(plan.moved, size, augment.min_face)
    return plan


class Planner:
    """Draws whole batches; picklable, so that workers can do it.

    Args:
        data: the images and faces.
        store: tells which images cannot be decoded; those are replaced by the next one that can.
        augment: what to do to them.
        seed: of the whole run.
        on_bad_image: ``"skip"`` or ``"fail"``.
    """

    def __init__(
        self, data: FaceDataset, store: DecodeStore | FlatStore, augment: AugmentConfig, seed: int, on_bad_image: str
    ):
        self.data, self.store, self.augment, self.seed, self.on_bad_image = data, store, augment, seed, on_bad_image
        self.reported: set[int] = set()

    def readable(self, index: int) -> int:
        """``index``, or the next image after it that can be decoded."""
        for step in range(len(self.data)):
            i = (index + step) % len(self.data)
            if not self.data.sizes[i].all():  # reported when the data set was read
                continue
            error = self.store.check(i)
            if not error:
                return i
            if self.on_bad_image == "fail":
                raise ImageError(error)
            if i not in self.reported:
                self.reported.add(i)
                log.warning("%s; another image takes its place", error)
        raise DataError(f"{self.data.paths[0].parent}: no image of the data set can be read")

    def plan(
        self, epoch: int, positions: np.ndarray, indices: np.ndarray, size: int, partners_from: np.ndarray | None = None
    ) -> BatchPlan:
        """Draw the batch of the images ``indices [B]`` at ``positions [B]`` of the epoch; those mixed in are drawn from
        ``partners_from``, or from all."""
        augment, count = self.augment, len(indices)
        samples: list[SamplePlan] = []
        partners: list[SamplePlan] = []
        names = []
        mixes, erases, faces = [], [], []
        pool = np.arange(len(self.data)) if partners_from is None else partners_from
        for position, index in zip(positions.tolist(), indices.tolist()):
            rng = np.random.default_rng([self.seed, epoch, position, SAMPLE_TAG])
            sample = plan_sample(self.data, augment, self.readable(index), size, rng)
            found, others = sample.faces, []
            mix_draw, erase_draw = rng.random(2)
            if mix_draw < augment.mixup_prob + augment.cutmix_prob + augment.mosaic_prob:
                partner_rng = np.random.default_rng([self.seed, epoch, position, PARTNER_TAG])
                others, drawn, found = self._mix(sample, mix_draw, size, pool, partner_rng)
                mixes += [(len(samples), count + len(partners) + i, mix) for i, mix in enumerate(drawn)]
                partners += others
                if others:
                    sample.transform[5] = 1.0  # the faces of another image are in it
            erases.append(draw_erase(rng, found.boxes, size) if erase_draw < augment.erase_prob else [])
            samples.append(sample)
            faces.append(found)
            names.append(" + ".join(self.data.names[s.index] for s in (sample, *others)))
        return BatchPlan(size, samples + partners, mixes, erases, self._collate(samples, faces, names))

    def _mix(
        self, sample: SamplePlan, draw: float, size: int, pool: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[SamplePlan], list[Mix], Faces]:
        """Partners to be mixed into a square, how each joins, and the faces of the whole; ``draw`` tells the kind.

        Without a place for a patch there are no partners, and the faces stay.
        """
        augment = self.augment
        count = 3 if draw >= augment.mixup_prob + augment.cutmix_prob else 1
        others = []
        for _ in range(count):
            index = self.readable(int(pool[rng.integers(len(pool))]))
            others.append(plan_sample(self.data, augment, index, size, rng))
        faces, theirs = sample.faces, [other.faces for other in others]
        if count == 3:
            stays, mixes = draw_mosaic(rng, theirs, size)
            windows = [(stays, stays), *((mix.source, mix.target) for mix in mixes)]
            cuts = [(s.moved, *window) for s, window in zip([sample, *others], windows)]
            return others, mixes, mosaic_faces(cuts, augment.min_face)
        kind = draw_mixup if draw < augment.mixup_prob else draw_cutmix
        mix = kind(rng, faces, *theirs, size)
        return ([], [], faces) if mix is None else (others, [mix], mix_faces(faces, *theirs, mix))

    def _collate(self, samples: list[SamplePlan], faces: list[Faces], names: list[str]) -> dict:
        b, m = len(faces), max((len(f) for f in faces), default=0)
        boxes, landmarks = np.zeros((b, m, 4), np.float32), np.zeros((b, m, 5, 2), np.float32)
        has, valid, ignore = np.zeros((b, m), bool), np.zeros((b, m), bool), np.zeros((b, m), bool)
        for i, f in enumerate(faces):
            n = len(f)
            boxes[i, :n], landmarks[i, :n] = f.boxes, f.landmarks
            has[i, :n] = f.has_landmarks & ~f.ignore
            valid[i, :n], ignore[i, :n] = ~f.ignore, f.ignore
        landmarks[~has] = 0
        arrays = {"boxes": boxes, "landmarks": landmarks, "has_landmarks": has, "valid": valid, "ignore": ignore}
        return {
            **{k: torch.from_numpy(v) for k, v in arrays.items()},
            "names": names,
            "index": torch.tensor([s.index for s in samples], dtype=torch.int64),
            "transform": torch.from_numpy(np.stack([s.transform for s in samples]).astype(np.float32)),
        }
