"""Decoded photos for the pipeline: one flat uint8 array that processes (or the GPU) share, or decoding on demand."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.images import read_photo, shrink
from data.labels import DataError, ImageError
from utils.files import whole

log = logging.getLogger(__name__)


class DecodeStore:
    """Decodes an image each time it is asked for (the loader path without a cache).

    Args:
        sizes: ``[I, 2]`` (width, height) that each decoded, shrunk image has; 0 for unreadable ones.
        longest: side in px to which larger images are shrunk.
    """

    def __init__(self, paths: list[Path], sizes: np.ndarray, longest: int):
        self.paths = paths
        self.sizes = sizes
        self.longest = longest
        self._held: dict[int, Tensor] = {}

    def check(self, index: int) -> str:
        """Decode image ``index`` and hold it for the :meth:`get` that follows; -> "" or why it is unreadable."""
        if index not in self._held:
            try:
                image = _decode(self.paths[index], self.sizes[index], self.longest)
            except ImageError as e:
                return str(e)
            self._held[index] = torch.from_numpy(image.copy())
        return ""

    def get(self, index: int) -> Tensor:
        """RGB uint8 ``[H, W, 3]``."""
        if error := self.check(index):
            raise ImageError(error)
        return self._held[index]

    def release(self) -> None:
        """Forget the images held since the last call (a batch is done)."""
        self._held.clear()


class FlatStore:
    """All images, decoded, in one flat uint8 tensor: a memory-mapped file, memory, or a GPU.

    Args:
        flat: ``[bytes]`` uint8.
        offsets: ``[I]`` int64, first byte of each image.
        sizes: ``[I, 2]`` (width, height) of the stored images.
        errors: why an image is unreadable, by index.
        file: the mapped file, if it is one: other processes then map it too instead of getting a copy.
    """

    def __init__(
        self, flat: Tensor, offsets: np.ndarray, sizes: np.ndarray, errors: dict[int, str], file: Path | None = None
    ):
        self.flat = flat
        self.offsets = offsets.tolist()
        self.sizes = sizes.tolist()
        self.errors = errors
        self.file = file

    def __getstate__(self) -> dict:
        return {**vars(self), "flat": self.flat.numel() if self.file else self.flat}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.file:
            self.flat = _map(self.file, state["flat"])

    def check(self, index: int) -> str:
        """-> "" or why image ``index`` is unreadable."""
        return self.errors.get(index, "")

    def get(self, index: int) -> Tensor:
        """RGB uint8 ``[H, W, 3]``, a view."""
        (w, h), start = self.sizes[index], self.offsets[index]
        return self.flat[start : start + w * h * 3].view(h, w, 3)

    def release(self) -> None:
        """Nothing to forget; see :class:`DecodeStore`."""

    def to(self, device: torch.device) -> FlatStore:
        """A copy in the memory of ``device``; itself when it does not fit into 60% of what is free there."""
        if device.type != "cuda":
            return self
        free, _ = torch.cuda.mem_get_info(device)
        if self.flat.numel() > 0.6 * free:
            log.warning(
                "the decoded images (%.1f GB) stay in host memory: too big for %s", self.flat.numel() / 1e9, device
            )
            return self
        on_device = torch.empty(self.flat.numel(), dtype=torch.uint8, device=device)
        for start in range(0, self.flat.numel(), 1 << 28):  # in pieces, so that a mapped file never needs a second copy
            on_device[start : start + (1 << 28)] = self.flat[start : start + (1 << 28)].to(device)
        return FlatStore(on_device, np.array(self.offsets), np.array(self.sizes), self.errors)

    def without_pixels(self) -> FlatStore:
        """Only what :meth:`check` needs, for processes that plan batches."""
        empty = torch.empty(0, dtype=torch.uint8)  # a slice of the pixels would take them all along
        return FlatStore(empty, np.zeros(0), np.zeros(0), self.errors)


def _map(file: Path, size: int) -> Tensor:
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)


def build_store(
    paths: list[Path], sizes: np.ndarray, longest: int, file: str | Path = "", workers: int | None = None
) -> FlatStore:
    """Decode every image once.

    Args:
        paths: ``I`` image files.
        sizes: ``[I, 2]`` (width, height) that each decoded, shrunk image has; 0 for unreadable ones.
        longest: longer images are shrunk to this long side, px.
        file: where the decoded bytes are kept (with ``file.json`` beside it); ``""`` = in memory. An existing file is
            used when it was made from the same files, and built anew otherwise.
        workers: decoding threads; None = one per core.

    Raises:
        DataError: the cache file cannot be written, or there is not enough room for it.
    """
    counts = sizes.astype(np.int64).prod(axis=1) * 3
    offsets = np.concatenate([[0], np.cumsum(counts)])
    total = int(offsets[-1])
    if not file:
        flat = np.empty(max(total, 1), dtype=np.uint8)

        def put(start: int, pixels: np.ndarray) -> None:
            flat[start : start + pixels.size] = pixels.reshape(-1)

        errors = _decode_all(paths, sizes, offsets, longest, workers, put)
        return FlatStore(torch.from_numpy(flat), offsets[:-1], sizes, errors)
    file = Path(file)
    key = _fingerprint(paths, sizes, longest)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{file}.lock", "w") as lock:  # the ranks of one machine build it once: the first builds, others wait
            fcntl.flock(lock, fcntl.LOCK_EX)
            errors = _stored_errors(file, key, total)
            if errors is None:
                errors = _build_file(file, key, total, paths, sizes, offsets, longest, workers)
    except OSError as e:
        raise DataError(f"{file}: cannot write the image cache ({e.strerror or e})") from None
    return FlatStore(_map(file, max(total, 1)), offsets[:-1], sizes, errors, file)


def _fingerprint(paths: list[Path], sizes: np.ndarray, longest: int) -> dict:
    files = []
    for path, (w, h) in zip(paths, sizes.tolist()):
        try:
            stat = path.stat()
            files.append([str(path), stat.st_size, stat.st_mtime_ns, w, h])
        except OSError:
            files.append([str(path), -1, -1, w, h])
    return {"format": 1, "longest": longest, "files": files}


def _stored_errors(file: Path, key: dict, total: int) -> dict[int, str] | None:
    """The unreadable images noted beside a cache file that is still valid, else None."""
    try:
        index = json.loads(Path(f"{file}.json").read_text())
        valid = index["key"] == key and file.stat().st_size == max(total, 1)
        return {int(i): why for i, why in index["errors"].items()} if valid else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build_file(
    file: Path,
    key: dict,
    total: int,
    paths: list[Path],
    sizes: np.ndarray,
    offsets: np.ndarray,
    longest: int,
    workers: int | None,
) -> dict[int, str]:
    index, temp = Path(f"{file}.json"), Path(f"{file}.tmp")
    old = file.stat().st_size if file.exists() else 0
    if old and file.is_file() and not index.exists():
        raise DataError(f"{file}: exists and is no image cache; delete it or name another file (data.cache)")
    temp.unlink(missing_ok=True)
    free = shutil.disk_usage(file.parent).free + old
    if total > free:
        raise DataError(f"{file}: the image cache needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    file.unlink(missing_ok=True)  # from here until the end there is no valid cache
    index.unlink(missing_ok=True)
    try:
        descriptor = os.open(temp, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, max(total, 1))  # a full disk shows here, not as a crash in a mapped page

            def put(start: int, pixels: np.ndarray) -> None:
                view = memoryview(np.ascontiguousarray(pixels)).cast("B")
                while len(view):
                    done = os.pwrite(descriptor, view, start)
                    view, start = view[done:], start + done

            errors = _decode_all(paths, sizes, offsets, longest, workers, put)
        finally:
            os.close(descriptor)
        with whole(index) as part:  # first: a cache without it is taken for a file of the user's
            part.write_text(json.dumps({"key": key, "errors": errors}))
        os.replace(temp, file)
    finally:
        temp.unlink(missing_ok=True)
    return errors


def _decode(path: Path, size: np.ndarray, longest: int) -> np.ndarray:
    """The shrunk image, RGB uint8 ``[H, W, 3]``, for which labels were made fit by its (width, height) ``size``."""
    if not size.all():
        raise ImageError(f"{path}: cannot read the image")
    image = shrink(read_photo(path), longest)
    if image.shape[1::-1] != tuple(size):
        raise ImageError(f"{path}: its size differs from its header's")
    return image


def _decode_all(paths, sizes, offsets, longest: int, workers: int | None, put) -> dict[int, str]:
    def decode(i: int) -> str:
        try:
            put(int(offsets[i]), _decode(paths[i], sizes[i], longest))
        except ImageError as e:
            return str(e)
        return ""

    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        results = pool.map(decode, range(len(paths)))
        progress = tqdm(results, total=len(paths), desc="decoding images", unit="img", disable=None, leave=False)
        return {i: why for i, why in enumerate(progress) if why}
    finally:
        pool.shutdown(cancel_futures=True)
