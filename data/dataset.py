"""Which images and labels a run trains on and validates on."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from data.images import image_size, stored_size
from data.labels import (
    DataError,
    ImageError,
    LabelError,
    LabelSet,
    join_labels,
    merge_machine_labels,
    read_labels,
)
from data.select import select_names
from utils.config import DataConfig

log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 10


@dataclass
class FaceDataset:
    """Images of one split with their faces, in pixels of the (upright) image files."""

    labels: LabelSet
    paths: list[Path]  # [I]
    sizes: np.ndarray  # [I, 2] int64 (width, height) of the files; 0 where unreadable
    stored: np.ndarray  # [I, 2] int64 (width, height) after shrinking to cache_side

    @property
    def names(self) -> list[str]:
        """Image names such as ``train/0--Parade/a.jpg``: the label file's folder, then the name in the file."""
        return self.labels.names

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property  # every checkpoint holds it
    def fingerprint(self) -> str:
        """The same for the same names, sizes and labels, wherever the photos lie."""
        labels, digest = self.labels, hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))
        for values in (labels.offsets, labels.boxes, labels.landmarks, labels.has_landmarks, labels.ignore, self.sizes):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def shared_with(self, other: FaceDataset) -> int:
        """How many photos are also in the other set, as the same files."""
        files = {path.resolve() for path in other.paths}
        return sum(path.resolve() in files for path in self.paths)

    def take_images(self, indices: np.ndarray) -> FaceDataset:
        """The images at ``indices [K]`` int64, in that order."""
        labels = self.labels.take_images(indices)
        return FaceDataset(labels, [self.paths[i] for i in indices], self.sizes[indices], self.stored[indices])


def load_dataset(cfg: DataConfig) -> FaceDataset:
    """All images of ``cfg.labels`` except ``train_select``.

    Raises:
        DataError: a label file or image is unreadable (images: with ``on_bad_image: fail``), a line is bad (with
            ``on_bad_label: fail``), or nothing is left to train on.
    """
    held_out = set(_full_names(cfg, cfg.select_labels, _selected(cfg)))
    parts, paths = [], []
    for file in cfg.labels:
        labels, files = _read_split(cfg, file)
        keep = np.array([i for i, name in enumerate(labels.names) if name not in held_out], dtype=np.int64)
        parts.append(labels.take_images(keep))
        paths += [files[i] for i in keep]
    labels = join_labels(parts)
    if len(set(labels.names)) < len(labels):
        raise LabelError(f"{', '.join(cfg.labels)}: the same image is listed in two label files of one folder")
    if not len(labels):
        raise DataError(
            f"{Path(cfg.root) / cfg.select_labels}: data.select_images={cfg.select_images} holds out all "
            f"{len(held_out)} images; nothing is left to train on"
        )
    return _with_sizes(cfg, labels, paths)


def select_dataset(cfg: DataConfig) -> FaceDataset:
    """The images to validate on: ``train_select``, or all of ``cfg.val_labels`` when that is set.

    Raises:
        DataError: as :func:`load_dataset`; also when neither names any image.
    """
    if cfg.val_labels:
        labels, paths = _read_split(cfg, cfg.val_labels)
    else:
        chosen = set(_full_names(cfg, cfg.select_labels, _selected(cfg)))
        if not chosen:
            raise DataError("nothing to validate on: data.select_images is 0 and data.val_labels is empty")
        labels, paths = _read_split(cfg, cfg.select_labels)
        keep = np.array([i for i, name in enumerate(labels.names) if name in chosen], dtype=np.int64)
        labels, paths = labels.take_images(keep), [paths[i] for i in keep]
    dataset = _with_sizes(cfg, labels, paths, machine=False)
    return dataset.take_images(np.flatnonzero(dataset.sizes.all(axis=1)))


def report_problems(problems: list[str], what: str) -> None:
    """Log the first few problems and how many more there are."""
    for text in problems[:SHOWN_PROBLEMS]:
        log.warning("%s", text)
    if len(problems) > SHOWN_PROBLEMS:
        log.warning("... and %d more %s", len(problems) - SHOWN_PROBLEMS, what)


def _selected(cfg: DataConfig) -> set[str]:
    if not cfg.select_images:
        return set()
    return select_names(read_labels(Path(cfg.root) / cfg.select_labels).names, cfg.select_images)


def _full_names(cfg: DataConfig, file: str, names: Iterable[str]) -> list[str]:
    """Images' names with the folder of their label file (from the root on) before them: ``train/0--Parade/a.jpg``."""
    folder = PurePosixPath(Path(os.path.relpath(Path(cfg.root, file).parent, cfg.root)).as_posix())
    return [str(folder / name) for name in names]


def _read_split(cfg: DataConfig, file: str) -> tuple[LabelSet, list[Path]]:
    path = Path(cfg.root) / file
    labels = read_labels(path, cfg.on_bad_label)
    report_problems(labels.problems, "bad label lines left out")
    paths = [path.parent / "images" / name for name in labels.names]
    labels.names = _full_names(cfg, file, labels.names)
    labels.problems = []
    return labels, paths


def _with_sizes(cfg: DataConfig, labels: LabelSet, paths: list[Path], machine: bool = True) -> FaceDataset:
    sizes = np.zeros((len(paths), 2), dtype=np.int64)
    problems = []
    for i, path in enumerate(paths):
        try:
            sizes[i] = image_size(path)
        except ImageError as e:
            if cfg.on_bad_image == "fail":
                raise
            problems.append(str(e))
    report_problems(problems, "unreadable images left out")
    if paths and not sizes.any():
        raise DataError(f"{paths[0].parent}: none of the {len(paths)} images of the label file can be read")
    labels = _clip(labels, sizes, paths, cfg.on_bad_label)
    if machine and cfg.machine_labels:
        other = read_labels(Path(cfg.root) / cfg.machine_labels, cfg.on_bad_label)
        labels, filled, added = merge_machine_labels(labels, other, cfg.machine_ignore, cfg.machine_boxes)
        labels = _clip(labels, sizes, paths, "skip")
        log.info("%s: landmarks for %d faces, %d ignore faces", cfg.machine_labels, filled, added)
    stored = np.array([stored_size(w, h, cfg.cache_side) if w else (0, 0) for w, h in sizes.tolist()], dtype=np.int64)
    return FaceDataset(labels, paths, sizes, stored.reshape(-1, 2))


def _clip(labels: LabelSet, sizes: np.ndarray, paths: list[Path], on_bad: str) -> LabelSet:
    """Clip boxes to their image; drop and report those that keep less than one pixel of width or height."""
    owners = labels.owners()
    limit = np.tile(sizes[owners], 2).astype(np.float32)
    known = limit[:, 0] > 0
    boxes = np.where(known[:, None], np.clip(labels.boxes, 0, limit), labels.boxes)
    kept_size = boxes[:, 2:] - boxes[:, :2]
    full_size = labels.boxes[:, 2:] - labels.boxes[:, :2]
    good = (kept_size >= np.minimum(1.0, full_size)).all(axis=1) & (kept_size > 0).all(axis=1)
    problems = [
        f"{paths[owners[f]]}: label line {labels.lines[f]}: box {np.round(labels.boxes[f], 1).tolist()} (xyxy) lies "
        f"outside the {sizes[owners[f], 0]}x{sizes[owners[f], 1]} image"
        for f in np.flatnonzero(~good)
        if labels.lines[f] > 0
    ]
    if problems and on_bad == "fail":
        raise LabelError(problems[0])
    report_problems(problems, "boxes outside their image left out")
    clipped = replace(labels, boxes=boxes.astype(np.float32))
    return clipped if good.all() else clipped.take_faces(good)
