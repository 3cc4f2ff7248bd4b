"""From data set to training batches, by two paths of the same meaning.

:mod:`data.plan` draws every random decision of a batch and moves the faces; :mod:`data.render` carries the plan out on
pixels. The *loader* path does both in DataLoader workers on the CPU; the *device* path keeps all images decoded as
uint8 and renders on the training device, a few batches ahead of the training step.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.cache import DecodeStore, build_store
from data.dataset import load_dataset
from data.labels import DataError
from data.plan import SIZE_TAG, Planner
from data.render import render_batch
from data.samplers import difficulty, epoch_order, event_weights
from utils.config import Config

PREFETCH = 2  # batches rendered ahead on the device path


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
            store = DecodeStore(self.dataset.paths, self.dataset.stored, data.cache_side)
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
