"""From data set to training batches, by two paths of the same meaning.

``plan_batch`` draws every random decision of a batch and moves the faces (NumPy, cheap); ``render_batch`` carries the
plan out on pixels, on any device. The *loader* path does both in DataLoader workers on the CPU; the *device* path keeps
all images decoded as uint8 and renders on the training device, a few batches ahead of the training step. A sample
depends only on (seed, epoch, position in the epoch), so a resumed epoch continues exactly.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import pixels
from data.augmentations_smart import (
    GEOMETRIC,
    IDENTITY,
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
from data.cache import DecodeStore, FlatStore, build_store
from data.dataset import FaceDataset, load_dataset
from data.geometry import Crop, affine_matrix, draw_crop, finish_faces, move_faces, warp_faces
from data.labels import DataError, Faces, ImageError
from data.preprocess import normalise
from data.samplers import difficulty, epoch_order, event_weights
from utils.config import AugmentConfig, Config

log = logging.getLogger(__name__)

PREFETCH = 2  # batches rendered ahead on the device path
DRAWN_AT_ONCE = 64  # squares; bounds the memory of the matrices that resize them
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


def render_batch(plan: BatchPlan, store: DecodeStore | FlatStore, device: torch.device) -> dict:
    """Carry out a plan on ``device``: the batch dict with ``images`` float ``[B, 3, S, S]``, ready for the network."""
    draw = _draw_at_once if device.type == "cuda" else _draw_one_by_one
    images = draw(plan, store, device)
    for slot, partner, mix in plan.mixes:
        pixels.mix_images(images[slot], images[partner], mix)
    if len(images) > len(plan.erases):
        images = images[: len(plan.erases)].clone()  # a view would keep the partners in memory as long as the batch
    for image, patches in zip(images, plan.erases):
        pixels.erase(image, patches)
    chunk = len(images) if device.type == "cuda" else 1
    for part in range(0, len(images), chunk):
        images[part : part + chunk] = normalise(images[part : part + chunk])
    return {
        "images": images,
        **{k: pixels.upload(v, device) if isinstance(v, Tensor) else v for k, v in plan.batch.items()},
    }


def _draw_one_by_one(plan: BatchPlan, store: DecodeStore | FlatStore, device: torch.device) -> Tensor:
    """The plan's squares before mixing, float RGB ``[B + P, 3, S, S]`` in 0..255. One at a time each stays in a CPU's
    cache, which is 8 times as fast there."""
    squares = pixels.blank_squares(len(plan.samples), plan.size, device)
    images = torch.empty(squares.shape, device=device)
    for sample, square, image, colour in zip(plan.samples, squares, images, _colours(plan.samples)):
        pixels.cut_and_resize(store.get(sample.index), sample.crop, square)
        image.copy_(pixels.recolour(square[None], colour[None])[0])
        _render_operations(sample, image)
    return images


def _draw_at_once(plan: BatchPlan, store: DecodeStore | FlatStore, device: torch.device) -> Tensor:
    """As :func:`_draw_one_by_one`, with few launches for all of them."""
    colours = pixels.upload(_colours(plan.samples), device)
    simple = torch.tensor([s.warp is None and not s.operations for s in plan.samples])
    padded = pixels.upload(simple, device).view(-1, 1, 1, 1)
    padding = pixels.padding(device)
    images = torch.empty(len(plan.samples), 3, plan.size, plan.size, device=device)
    for start in range(0, len(images), DRAWN_AT_ONCE):
        some = slice(start, start + DRAWN_AT_ONCE)
        parts = []
        for sample in plan.samples[some]:
            x0, y0, x1, y1 = sample.crop.source
            part = store.get(sample.index)[y0:y1, x0:x1]
            parts.append(part if part.device.type == device.type else part.contiguous().to(device, non_blocking=True))
        squares, shown = pixels.cut_and_resize_all(parts, [s.crop for s in plan.samples[some]], plan.size)
        squares = pixels.recolour(squares, colours[some])
        images[some] = torch.where(shown | ~padded[some], squares, padding)
    for sample, image, done in zip(plan.samples, images, simple.tolist()):
        if not done:
            _render_operations(sample, image)
    return images


def _colours(samples: list[SamplePlan]) -> Tensor:
    """``[B, 3, 4]``."""
    return torch.from_numpy(np.stack([IDENTITY if s.colour is None else s.colour for s in samples]).astype(np.float32))


def _render_operations(sample: SamplePlan, image: Tensor) -> None:
    """Warp and AutoAugment operations on one square, in place; padding stays padding under colour changes."""
    changed = image
    if sample.warp is not None:
        changed = pixels.warp(changed, sample.warp)
    for name, magnitude in sample.operations:
        changed = pixels.apply_operation(changed, name, magnitude, sample.noise_seed)
    if changed is not image:
        image.copy_(changed)
    if sample.warp is None and (sample.colour is not None or sample.operations):
        pixels.repad(image, sample.crop.placed(image.shape[-1]))


class _Steps(Dataset):
    """The steps of one epoch, for DataLoader workers: step -> batch dict, plan, or the DataError that stopped it."""

    def __init__(
        self,
        planner: Planner,
        epoch: int,
        order: np.ndarray,
        partners_from: np.ndarray | None,
        positions: np.ndarray,
        sizes: list[int],
        render: bool,
    ):
        self.planner, self.epoch, self.order, self.partners_from = planner, epoch, order, partners_from
        self.positions, self.sizes, self.render = positions, sizes, render

    def __getitem__(self, step: int):
        try:
            positions = self.positions[step]
            indices = self.order[positions]
            plan = self.planner.plan(self.epoch, positions, indices, self.sizes[step], self.partners_from)
            if not self.render:
                return plan
            return render_batch(plan, self.planner.store, torch.device("cpu"))
        except DataError as e:  # raised in the parent instead, as one line without the worker's traceback
            return e
        finally:
            if self.render:
                self.planner.store.release()

    def __len__(self) -> int:
        return len(self.positions)


class Pipeline:
    """Training batches of one process (see the contract of ``batches``). Made by :func:`build_pipeline`."""

    def __init__(self, cfg: Config, device: torch.device, rank: int = 0, world: int = 1):
        data = cfg.data
        self.cfg, self.device, self.rank, self.world = cfg, device, rank, world
        self.dataset = load_dataset(data)
        if data.pipeline == "device" or data.cache:
            store = build_store(self.dataset.paths, self.dataset.stored, data.cache_side, data.cache)
        else:
            store = DecodeStore(self.dataset.paths, data.cache_side)
        self.on_device = data.pipeline == "device"
        if self.on_device:
            self.pixels = store.to(device)
        known = store.without_pixels() if self.on_device else store
        self.planner = Planner(self.dataset, known, data.augment, cfg.train.seed, data.on_bad_image)
        self.weights = event_weights(self.dataset.names) if data.balanced_events else None
        self.hardness = difficulty(self.dataset.labels, self.dataset.sizes) if data.curriculum else None
        self.set_stage(cfg.train.stages[0].size, cfg.train.stages[0].batch_size)

    def set_stage(self, size: int, batch_size: int) -> None:
        """Square side and batch size (of this process) from now on (progressive resizing)."""
        self.size, self.batch_size = size, batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch: an incomplete last batch is dropped; a tiny data set is repeated to fill one."""
        return max(1, self.cfg.data.repeat * len(self.dataset) // (self.batch_size * self.world))

    def batches(self, epoch: int, start_step: int = 0, total_epochs: int | None = None) -> Iterator[dict]:
        """The batches of an epoch from ``start_step`` on, on ``device``.

        Each is a dict: ``images [B, 3, S, S]`` (BGR minus mean), ``boxes [B, M, 4]`` xyxy px,
        ``landmarks [B, M, 5, 2]``, ``has_landmarks``, ``valid``, ``ignore`` ``[B, M]`` bool, ``index [B]``, ``names``
        (with those mixed in) and ``transform [B, 6]`` (see ``Crop.transform``; its last entry is 1 where the square was
        also warped or mixed).

        Args:
            epoch: counted from 0.
            start_step: batches to leave out, for resuming: the rest is exactly what it would have been.
            total_epochs: length of the run, for the curriculum (default ``train.epochs``).

        Raises:
            DataError: an image cannot be read and ``data.on_bad_image`` is ``fail``.
        """
        steps, per_step = self.steps_per_epoch, self.batch_size * self.world
        progress = epoch / max(total_epochs or self.cfg.train.epochs, 1)
        order = epoch_order(
            len(self.dataset), steps * per_step, self.cfg.train.seed, epoch, self.weights, self.hardness, progress
        )
        first = np.arange(steps) * per_step + self.rank * self.batch_size
        positions = first[:, None] + np.arange(self.batch_size)
        sizes = [self._step_size(epoch, step) for step in range(steps)]
        # where the order prefers some images, those mixed in are drawn from it as well
        partners_from = None if self.weights is None and self.hardness is None else order
        source = _Steps(self.planner, epoch, order, partners_from, positions, sizes, render=not self.on_device)
        cuda = self.device.type == "cuda"
        loader = DataLoader(
            source,
            batch_size=None,
            sampler=range(start_step, steps),
            num_workers=self.cfg.data.workers if cuda or not self.on_device else 0,
            pin_memory=cuda and not self.on_device,
            generator=torch.Generator(),  # the global one would be drawn from once per (re)start of an epoch
            worker_init_fn=_leave_signals_to_parent,
        )
        items = iter(loader)  # workers start here, in the main thread
        if not self.on_device:
            for item in items:
                if isinstance(item, DataError):
                    break
                yield {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in item.items()}
            else:
                return
            del items  # stops the workers now, not when the last reference to the error's traceback goes
            _raise(item)
        yield from _ahead(lambda: (render_batch(_raise(p), self.pixels, self.device) for p in items), self.device)

    def _step_size(self, epoch: int, step: int) -> int:
        factors = self.cfg.train.multiscale
        if factors == [1.0]:
            return self.size
        rng = np.random.default_rng([self.cfg.train.seed, epoch, step, SIZE_TAG])
        return max(64, round(self.size * float(rng.choice(factors)) / 32) * 32)


def build_pipeline(cfg: Config, device: torch.device | str, rank: int = 0, world: int = 1) -> Pipeline:
    """The training pipeline of ``cfg`` for one process of ``world``.

    Raises:
        DataError: labels or images cannot be used, or the image cache cannot be written.
    """
    return Pipeline(cfg, torch.device(device), rank, world)


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and a group's SIGTERM reach the workers too; the trainer finishes its step first and then stops them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _raise(item):
    """``item``, unless it is an error that a worker returned. A new one is raised: the old one, still a local of the
    loop that calls this, would keep itself, that loop and its workers alive."""
    if isinstance(item, DataError):
        raise type(item)(str(item))
    return item


def _ahead(make, device: torch.device) -> Iterator[dict]:
    """Run the iterator of ``make()`` in a thread, :data:`PREFETCH` items ahead, and hand its items (or error) over.

    On a GPU the thread uses the same (default) stream as the training step, so no batch is read before it is drawn.
    """
    ready: queue.Queue = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)  # a new thread starts on GPU 0
            for item in make():
                if not put((item, None)):
                    return
            put((None, None))
        except BaseException as e:  # handed to the consumer, which raises it
            put((None, e))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()
