"""Face labels in compact arrays, read from RetinaFace ``label.txt`` files.

A file is a sequence of images; each starts with ``# event/name.jpg`` and is followed by one line per face::

    x y w h  [x1 y1 flag1 ... x5 y5 flag5]  [quality]  [ignore]

``-1`` in a landmark means that the face has none. ``quality`` is a number in [0, 1] (0 or less = unknown) and
``ignore`` (1 or 0) is this project's extension: a face that is neither to be learnt nor background. Detections of
another model (``x y w h``, five times ``x y``, score) are read by the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from utils.command import Problem

FLIP_ORDER = [1, 0, 2, 4, 3]  # landmarks after mirroring: eyes and mouth corners change sides


class DataError(Problem, RuntimeError):
    """Data that cannot be used; its text is one line naming the file (and line)."""


class LabelError(DataError):
    """A label file that cannot be read or holds a bad line."""


class ImageError(DataError):
    """An image that cannot be read."""


@dataclass
class Faces:
    """The faces of one image: pixels of whatever image they go with."""

    boxes: np.ndarray  # [M, 4] xyxy float32
    landmarks: np.ndarray  # [M, 5, 2] float32
    has_landmarks: np.ndarray  # [M] bool
    ignore: np.ndarray  # [M] bool

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, keep: np.ndarray) -> Faces:
        """The faces where ``keep`` (mask or indices) says so."""
        return Faces(self.boxes[keep], self.landmarks[keep], self.has_landmarks[keep], self.ignore[keep])

    def join(self, other: Faces) -> Faces:
        """Both sets of faces, this one first."""
        pairs = ((getattr(self, k), getattr(other, k)) for k in ("boxes", "landmarks", "has_landmarks", "ignore"))
        return Faces(*(np.concatenate(p) for p in pairs))


@dataclass
class LabelSet:
    """All labels of a data set; the faces of image ``i`` are rows ``offsets[i]:offsets[i + 1]``."""

    names: list[str]  # [I]
    offsets: np.ndarray  # [I + 1] int64
    boxes: np.ndarray  # [F, 4] xyxy float32, pixels of the stored file
    landmarks: np.ndarray  # [F, 5, 2] float32
    has_landmarks: np.ndarray  # [F] bool
    ignore: np.ndarray  # [F] bool
    quality: np.ndarray  # [F] float32, last column of the file: 0 = unknown
    lines: np.ndarray  # [F] int32, line number in its file; 0 = not from a label file
    problems: list[str] = field(default_factory=list)  # "file:line: what", what was skipped

    def __len__(self) -> int:
        return len(self.names)

    def faces(self, index: int) -> Faces:
        """The faces of image ``index`` (views, not copies)."""
        s = slice(self.offsets[index], self.offsets[index + 1])
        return Faces(self.boxes[s], self.landmarks[s], self.has_landmarks[s], self.ignore[s])

    def owners(self) -> np.ndarray:
        """``[F]`` index of the image that each face belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def take_images(self, indices: np.ndarray) -> LabelSet:
        """The labels of the given images, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]
        counts = np.array([len(r) for r in rows], dtype=np.int64)
        return self._rows(
            np.concatenate(rows) if rows else np.zeros(0, np.int64), [self.names[i] for i in indices], counts
        )

    def take_faces(self, keep: np.ndarray) -> LabelSet:
        """Only the faces where the mask ``keep [F]`` is true; every image stays."""
        counts = np.bincount(self.owners()[keep], minlength=len(self))
        return self._rows(np.flatnonzero(keep), self.names, counts)

    def add_faces(self, owners: np.ndarray, boxes: np.ndarray, ignore: bool) -> LabelSet:
        """With more faces (``owners [K]`` image index, ``boxes [K, 4]``), without landmarks."""
        k = len(boxes)
        order = np.argsort(np.concatenate([self.owners(), owners]), kind="stable")
        counts = np.diff(self.offsets) + np.bincount(owners, minlength=len(self))
        grown = LabelSet(
            self.names,
            self.offsets,
            np.concatenate([self.boxes, boxes.astype(np.float32)]),
            np.concatenate([self.landmarks, np.zeros((k, 5, 2), np.float32)]),
            np.concatenate([self.has_landmarks, np.zeros(k, bool)]),
            np.concatenate([self.ignore, np.full(k, ignore)]),
            np.concatenate([self.quality, np.zeros(k, np.float32)]),
            np.concatenate([self.lines, np.zeros(k, np.int32)]),
            self.problems,
        )
        return grown._rows(order, self.names, counts)

    def _rows(self, rows: np.ndarray, names: list[str], counts: np.ndarray) -> LabelSet:
        return LabelSet(
            list(names),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            self.boxes[rows],
            self.landmarks[rows],
            self.has_landmarks[rows],
            self.ignore[rows],
            self.quality[rows],
            self.lines[rows],
            self.problems,
        )


def join_labels(parts: list[LabelSet]) -> LabelSet:
    """One LabelSet of several, images in order."""
    counts = np.concatenate([np.diff(p.offsets) for p in parts])
    keys = ("boxes", "landmarks", "has_landmarks", "ignore", "quality", "lines")
    return LabelSet(
        [n for p in parts for n in p.names],
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        **{k: np.concatenate([getattr(p, k) for p in parts]) for k in keys},
        problems=[text for p in parts for text in p.problems],
    )


def read_text(path: Path) -> str:
    """The text of a file of labels. Raises LabelError."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows tools put first
    except OSError as e:
        raise LabelError(f"{path}: cannot read the labels ({e.strerror})") from None
    except UnicodeDecodeError:
        raise LabelError(f"{path}: not a text file") from None


def read_labels(path: str | Path, on_bad: str = "skip") -> LabelSet:
    """Read a label file into arrays.

    Args:
        path: RetinaFace ``label.txt`` or detections in the same layout (see the module's text).
        on_bad: ``"skip"`` leaves bad lines out and lists them in ``problems``; ``"fail"`` raises on the first. An image
            with a face that cannot be read is left out as a whole: the face would count as background.

    Raises:
        LabelError: the file cannot be read or holds no usable image, or a line is bad and ``on_bad`` is ``"fail"``.
    """
    path = Path(path)
    text = read_text(path)
    names: list[str] = []
    seen: dict[str, int] = {}
    counts: list[int] = []
    rows: list[list[float]] = []
    lines: list[int] = []
    problems: list[str] = []
    incomplete: set[str] = set()

    def bad(number: int, why: str) -> None:
        message = f"{path}:{number}: {why}"
        if on_bad == "fail":
            raise LabelError(message)
        problems.append(message)

    open_image = False
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line:
            continue
        if line.startswith("#"):
            name = line[1:].strip()
            open_image = bool(name) and name not in seen
            if not name:
                bad(number, "'#' without an image name")
            elif name in seen:
                bad(number, f"image {name} was already listed in line {seen[name]} and is left out")
                incomplete.add(name)  # the faces of one list would count as background
            else:
                seen[name] = number
                names.append(name)
                counts.append(0)
            continue
        if not open_image:
            if not names:
                bad(number, "face before the first '# image' line")
            continue
        row, why = _parse_face(line)
        if row is None:
            bad(number, f"{why}; image {names[-1]} is left out")
            incomplete.add(names[-1])
            continue
        if 0 in row[2:4]:  # WIDERFace has some; there is nothing to see of these faces
            bad(number, "box of size {2} x {3} has no area".format(*line.split()))
            continue
        rows.append(row)
        lines.append(number)
        counts[-1] += 1
    if not names:
        raise LabelError(f"{path}: no '# image' line found, so not a label file")
    if len(incomplete) == len(names):
        raise LabelError(f"{path}: every image has a line that cannot be read; the first: {problems[0]}")
    labels = _from_rows(names, counts, rows, lines, problems)
    return labels.take_images([i for i, name in enumerate(names) if name not in incomplete]) if incomplete else labels


def _parse_face(line: str) -> tuple[list[float] | None, str]:
    """-> 17 numbers (box xywh, 10 landmark coordinates, has_landmarks, quality, ignore), or None and the reason."""
    fields = line.split()
    try:
        v = [float(f) for f in fields]
    except ValueError:
        wrong = next(f for f in fields if not _is_number(f))
        return None, f"'{wrong}' is not a number"
    if not np.isfinite(v).all():
        return None, "a number is not finite"
    n = len(v)
    if n in (4, 5):  # box, quality
        points, rest = None, v[4:]
    elif n == 15:  # detections: five times x y, score
        points, rest = v[4:14], v[14:]
    elif n in (19, 20, 21):  # five times x y flag, quality, ignore
        points, rest = [v[4 + 3 * i + j] for i in range(5) for j in (0, 1)], v[19:]
    else:
        return None, f"{n} numbers, expected 4, 5, 15, 19, 20 or 21"
    if min(v[2:4]) < 0:
        return None, f"box of size {fields[2]} x {fields[3]}: corners exchanged?"
    known = (points is not None and min(points[0::2] + points[1::2]) > -1 + 1e-6) or _inside(points, v)
    quality = rest[0] if rest else 0.0
    ignore = float(len(rest) > 1 and rest[1] != 0)
    return [*v[:4], *(points if known else [0.0] * 10), float(known), quality, ignore], ""


def _inside(points: list[float] | None, v: list[float]) -> bool:
    """Whether slightly negative landmarks are real ones of a face cut off by the border, not the -1 marks of 'none'."""
    if points is None or all(abs(p + 1) < 1e-6 for p in points):
        return False
    if any(abs(x + 1) < 1e-6 and abs(y + 1) < 1e-6 for x, y in zip(points[0::2], points[1::2])):
        return False
    return all(v[0] - v[2] <= x <= v[0] + 2 * v[2] for x in points[0::2]) and all(
        v[1] - v[3] <= y <= v[1] + 2 * v[3] for y in points[1::2]
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_rows(names: list[str], counts: list[int], rows: list, lines: list[int], problems: list[str]) -> LabelSet:
    table = np.array(rows, dtype=np.float64).reshape(-1, 17)
    boxes = table[:, :4].copy()
    boxes[:, 2:] += boxes[:, :2]
    return LabelSet(
        names,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes.astype(np.float32),
        table[:, 4:14].reshape(-1, 5, 2).astype(np.float32),
        table[:, 14] > 0,
        table[:, 16] > 0,
        table[:, 15].astype(np.float32),
        np.array(lines, dtype=np.int32),
        problems,
    )


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of xyxy boxes ``a [N, 4]`` and ``b [M, 4]`` -> ``[N, M]``."""
    inter = box_overlap(a, b)
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    return inter / np.maximum(area_a[:, None] + area_b[None] - inter, 1e-9)


def box_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area shared by xyxy boxes ``a [N, 4]`` and ``b [M, 4]`` -> ``[N, M]`` px^2."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def merge_machine_labels(
    labels: LabelSet, machine: LabelSet, ignore_score: float = 0.0, tighten: Sequence[str] = ()
) -> tuple[LabelSet, int, int]:
    """Use another model's detections without taking them for truth.

    Labelled faces without landmarks get those of the best machine box with IoU >= 0.5. With ``ignore_score`` > 0,
    detections at least that sure which overlap no labelled face join as ``ignore`` faces: photos have unlabelled
    faces, and those should not be taught as background. No box to learn is ever added. Images whose top folder is in
    ``tighten`` have loose boxes (FDDB's come from head-like ellipses): theirs are replaced by the best machine box with
    IoU >= 0.4.

    Returns:
        the new labels, the number of faces that got landmarks, the number of ignore faces added.
    """
    where = {name: i for i, name in enumerate(machine.names)}
    landmarks, has, tight = labels.landmarks.copy(), labels.has_landmarks.copy(), labels.boxes.copy()
    owners: list[int] = []
    extra: list[np.ndarray] = []
    for i, name in enumerate(labels.names):
        j = where.get(name)
        if j is None:
            continue
        start, end = labels.offsets[i], labels.offsets[i + 1]
        seen = slice(machine.offsets[j], machine.offsets[j + 1])
        boxes, score = machine.boxes[seen], machine.quality[seen]
        iou = box_iou(labels.boxes[start:end], boxes)
        if iou.size:
            best = iou.argmax(axis=1)
            fill = (iou.max(axis=1) >= 0.5) & ~has[start:end] & machine.has_landmarks[seen][best]
            landmarks[start:end][fill] = machine.landmarks[seen][best[fill]]
            has[start:end][fill] = True
            if name.split("/")[0] in tighten:
                close = iou.max(axis=1) >= 0.4
                tight[start:end][close] = boxes[best[close]]
        if ignore_score > 0:
            area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            covered = box_overlap(labels.boxes[start:end], boxes).max(axis=0, initial=0) / np.maximum(area, 1e-9)
            new = (score >= ignore_score) & (iou.max(axis=0, initial=0) < 0.3) & (covered < 0.5)
            owners += [i] * int(new.sum())
            extra += list(boxes[new])
    filled = int(has.sum() - labels.has_landmarks.sum())
    merged = replace(labels, boxes=tight, landmarks=landmarks, has_landmarks=has)
    if owners:
        merged = merged.add_faces(np.array(owners), np.stack(extra), ignore=True)
    return merged, filled, len(owners)
