"""Running a detector over the images of a set, with reading in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils.image import IMAGE_SUFFIXES, ImageReadError, read_image

from .errors import EvaluationError, image_key

if TYPE_CHECKING:
    from models.detector import Detections, FaceDetector
    from utils.scale import Scale

READERS = 4  # threads; Pillow releases the GIL while it decodes
AHEAD = 4  # batches read ahead of the detector
KEEP_ALL = 100_000  # faces per image: the reference evaluation has no limit; one of 750 adds 0.001 to V1's Hard AP


def find_image(folder: str | Path, name: str) -> Path:
    """The file of an image name that may lack its suffix.

    Raises:
        EvaluationError: none of the known suffixes exists.
    """
    key = image_key(name)
    suffixes = [".jpg", *sorted(IMAGE_SUFFIXES)]
    for candidate in (name, *(f"{key}{s}" for s in suffixes), *(f"{key}{s.upper()}" for s in suffixes)):
        path = Path(folder) / candidate
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            return path
    raise EvaluationError(f"{Path(folder) / key}.jpg: no such image")


def find_images(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """:func:`find_image` for a whole set; the error counts what is missing and names the first."""
    found, missing = [], []
    for name in names:
        try:
            found.append(find_image(folder, name))
        except EvaluationError as e:
            missing.append(str(e))
    if missing:
        raise EvaluationError(
            f"{missing[0]} ({len(missing)} of {len(names)} images are missing; --list FILE evaluates a subset)"
        )
    return found


def load_image(folder: str | Path, name: str) -> np.ndarray:
    """Pixels ``[H, W, 3]`` RGB uint8 of an image of the set.

    Raises:
        EvaluationError: missing or unreadable.
    """
    return _read(find_image(folder, name))


def _read(path: Path) -> np.ndarray:
    try:
        return read_image(path)
    except ImageReadError as e:
        raise EvaluationError(str(e)) from None


def by_size(paths: Sequence[Path]) -> list[int]:
    """An order of the images in which neighbours are of one size, so that they can share a forward pass."""

    def size(path: Path) -> tuple[int, int]:
        try:
            with Image.open(path) as image:
                return image.size
        except (OSError, ValueError):
            return 0, 0  # reading it will say what is wrong

    sizes = [size(p) for p in paths]
    return sorted(range(len(paths)), key=sizes.__getitem__)


def detect_images(
    detector: FaceDetector,
    folder: str | Path,
    names: Sequence[str],
    score: float = 0.02,
    nms: float = 0.4,
    scale: Scale = "original",
    tta: bool = False,
    pad: bool = True,
    batch_size: int = 1,
) -> Iterator[tuple[str, Detections]]:
    """Detect the faces of every named image, yielding ``(name, Detections)`` as they come (not in the given order).

    Args:
        detector: a :class:`models.FaceDetector`, or anything called the same way.
        folder: holds ``<event>/<name>`` with an image suffix.
        score, nms, scale, tta, pad: of :meth:`FaceDetector.__call__`; the defaults are the benchmark's.
        batch_size: images per call; they share forward passes where their sizes agree.

    Raises:
        EvaluationError: an image is missing (said before the first is read) or unreadable.
    """
    paths = find_images(folder, names)
    order = by_size(paths) if batch_size > 1 else range(len(paths))
    batches = deque(order[i : i + batch_size] for i in range(0, len(paths), batch_size))
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque = deque()
        try:
            while batches or waiting:
                while batches and len(waiting) < AHEAD:
                    batch = batches.popleft()
                    waiting.append((batch, [pool.submit(_read, paths[i]) for i in batch]))
                batch, futures = waiting.popleft()
                images = [f.result() for f in futures]
                found = detector(images, score=score, nms=nms, scale=scale, tta=tta, pad=pad)
                yield from zip((names[i] for i in batch), found)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
