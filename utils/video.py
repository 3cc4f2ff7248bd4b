"""Reading and writing videos, and reading a webcam, through OpenCV. Frames are RGB uint8 ``[H, W, 3]``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.command import Problem

VIDEO_SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"))
WEBCAM_PREFIX = "webcam:"
DEFAULT_FPS = 25.0  # for cameras and files that do not state one, or one of 1000 as Matroska does for unsteady ones
CODECS = {".avi": "MJPG"}  # everything else: mp4v


class VideoError(Problem, RuntimeError):
    """A video or webcam cannot be opened, read or written; its text is one line naming it."""


class VideoReader:
    """Frames of a video file or of ``webcam:INDEX``, one at a time; a context manager and an iterator.

    Attributes:
        fps: frames per second; of an unsteady video, as screens are recorded, some mean.
        count: number of frames as the file states it, which may be an estimate; 0 = unknown (webcam).
        read: frames read so far.
        times: when each of them is to be shown, in seconds; NaN = unknown (webcam), or not within the file's stated
            length.

    Raises:
        VideoError: it cannot be opened, or not one frame can be read.
    """

    def __init__(self, source: str | Path):
        self.name = str(source)
        if is_webcam(self.name):
            index = self.name[len(WEBCAM_PREFIX) :]
            self._capture = cv2.VideoCapture(int(index)) if index.isdecimal() else cv2.VideoCapture()
        else:
            self._capture = cv2.VideoCapture(_file(self.name) if os.path.exists(self.name) else self.name)
        if not self._capture.isOpened():
            raise VideoError(f"{self.name}: cannot open the {'webcam' if is_webcam(self.name) else 'video'}")
        fps, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = fps if 0.001 <= fps < 1000 else DEFAULT_FPS
        self.count = max(int(count), 0) if count == count else 0
        self._seconds = self.count / fps if fps > 0 else 0.0  # as stated
        self.read, self.times = 0, []

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            there, frame = self._capture.read()
            if not there:
                break
            self.read += 1
            time = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            self.times.append(time if self.count and 0 <= time <= 1.1 * self._seconds + 1 else math.nan)
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not self.read:
            raise VideoError(f"{self.name}: no frame can be read")

    def check_end(self) -> None:
        """After the last frame: raises VideoError where clearly fewer came than the file says it has, and the last one
        is not from its end (Matroska states a length, from which the number of frames is an estimate)."""
        if _fewer(self.read, self.count) and not self.times[-1] >= 0.9 * self._seconds:
            raise VideoError(f"{self.name}: breaks off: {self.read} frames can be read, it states {self.count}")

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        self._capture.release()


class VideoWriter:
    """Writes frames of one size to an .mp4 (or .avi) file of steady speed, without sound; a context manager.

    The file is opened with the first frame, whose size it takes; odd sides, which the codecs would cut, become even by
    repeating the last row or column. Leaving it without an error raises VideoError where frames did not reach the file
    (OpenCV does not tell when the disk is full).
    """

    def __init__(self, path: Path, fps: float):
        self.path = path
        # MPEG-4 holds a speed as a fraction of 16-bit numbers, for which OpenCV takes decimals as they are
        self.fps = fps if fps <= 65 else round(fps, 2 if fps < 655 else 1)
        self.size, self.written = (0, 0, 0), 0
        self._start = math.nan
        self._last: np.ndarray | None = None
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray, time: float = math.nan) -> None:
        """Append ``[H, W, 3]`` RGB uint8, to be shown ``time`` seconds (NaN = unknown) after the video's beginning.

        Where the frames come unsteadily, some are shown longer or left out, so that the video lasts as long as they do.

        Raises:
            VideoError: the file cannot be written, or the size changes.
        """
        if self._writer is not None and frame.shape != self.size:
            sizes = " and ".join(f"{w}x{h}" for h, w, _ in (self.size, frame.shape))
            raise VideoError(f"{self.path}: cannot hold frames of {sizes}")
        self.size = frame.shape
        height, width, _ = frame.shape
        frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            code = cv2.VideoWriter_fourcc(*CODECS.get(self.path.suffix.lower(), "mp4v"))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = cv2.VideoWriter(_file(self.path), code, self.fps, frame.shape[1::-1])
            if not self._writer.isOpened():
                raise VideoError(f"{self.path}: cannot write the video (folder, disk space, or codec missing)")
        if math.isnan(self._start):  # of the first frame whose time is known, perhaps not the first of all
            self._start = time - self.written / self.fps
        due = (time - self._start) * self.fps  # in frames; no comparison with NaN is true
        while due > self.written + 1:
            self._append(self._last)
        self._last = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        if not due < self.written - 1:
            self._append(self._last)

    def _append(self, frame: np.ndarray) -> None:
        self._writer.write(frame)
        self.written += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if kind is None:
            there = cv2.VideoCapture(_file(self.path))
            count = max(int(there.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
            there.release()
            if _fewer(count, self.written):
                raise VideoError(f"{self.path}: {count} of {self.written} frames were written; is the disk full?")


def _file(path: str | Path) -> str:
    """For OpenCV, whose FFmpeg takes what stands before a colon for a protocol, as in ``12:30.mp4``."""
    return os.path.abspath(path)


def _fewer(frames: int, stated: int) -> bool:
    """Whether clearly fewer than stated; what a container states may be an estimate."""
    return frames < 0.9 * stated - 2


def is_webcam(source: str) -> bool:
    """Whether ``source`` names a webcam (``webcam:0``)."""
    return source.startswith(WEBCAM_PREFIX)
