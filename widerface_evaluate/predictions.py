"""Prediction folders in WIDERFace's text format: ``<event>/<name>.txt`` = name, count, then ``x y w h score`` lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.files import whole

from .errors import EvaluationError, OtherSettings, image_key, read_text

if TYPE_CHECKING:
    from models.detector import Detections

SETTINGS = "settings.json"  # beside the predictions: what made them


def load_predictions(folder: str | Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read a prediction folder.

    Args:
        folder: contains ``<event>/<name>.txt``.
        names: of the images to read (with or without suffix), every one of which must have a file.

    Returns:
        image key ``event/name`` -> ``[n, 5]`` float64 (x, y, w, h in pixels, score).

    Raises:
        EvaluationError: a missing file (the first is named, and how many), or a malformed one with its line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder of predictions")
    keys, found, missing = [image_key(n) for n in names], {}, []
    for key in keys:
        path = f"{folder}/{key}.txt"
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            missing.append(path)
            continue
        except (OSError, UnicodeDecodeError):
            text = read_text(path)  # raises the error that names the file
        found[key] = parse_predictions(text, path)
    if missing:
        raise EvaluationError(
            f"{missing[0]}: missing prediction file ({len(missing)} of {len(keys)} images have none; "
            "--list FILE evaluates a subset)"
        )
    return found


def take_over(
    folder: str | Path, keys: Sequence[str], settings: Mapping[str, Any], resume: bool
) -> dict[str, np.ndarray]:
    """Predictions that an interrupted run left in a folder; {} without ``resume``, which begins anew there.

    Args:
        settings: what decides the predictions; kept in ``folder/settings.json``. Older predictions are not taken over.

    Raises:
        OtherSettings: they were made with other settings, or it is not known with which.
        EvaluationError: one is malformed, or the folder cannot be written.
    """
    folder, file = Path(folder), Path(folder, SETTINGS)
    there = [k for k in keys if resume and (folder / f"{k}.txt").is_file()]
    if not there:
        try:
            with whole(file) as part:
                part.write_text(json.dumps(settings), encoding="utf-8")
        except OSError as e:
            raise EvaluationError(f"{file}: cannot write ({e.strerror})") from None
        return {}
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        since = file.stat().st_mtime_ns
        other = [k for k in settings if before[k] != settings[k]]
    except (OSError, ValueError, KeyError, TypeError):
        raise OtherSettings(f"{file}: does not tell what made the predictions there; leave out --resume") from None
    if other:
        old, new = before[other[0]], settings[other[0]]
        raise OtherSettings(f"{folder}: was made with {other[0]}={old!r}, now it is {new!r}; leave out --resume")
    return load_predictions(folder, [k for k in there if (folder / f"{k}.txt").stat().st_mtime_ns >= since])


def parse_predictions(text: str, path: str | Path) -> np.ndarray:
    """Detections ``[n, 5]`` of one file's text; an entirely empty text means none. ``path`` is for messages."""
    lines = text.split("\n")
    if not text.strip():
        return np.zeros((0, 5))
    try:
        count = int(lines[1])
    except (IndexError, ValueError):
        raise EvaluationError(f"{path}:2: expected the number of detections") from None
    rows = [row for row in map(str.split, lines[2:]) if row]
    try:
        found = np.array(rows, dtype=np.float64).reshape(-1, 5) if set(map(len, rows)) <= {5} else None
    except ValueError:
        found = None
    if found is None or not np.isfinite(found).all():
        raise EvaluationError(f"{path}:{_bad_line(lines)}: expected 'x y w h score', five finite numbers")
    if count != len(rows):
        raise EvaluationError(f"{path}:2: says {count} detections, {len(rows)} follow (a truncated file?)")
    return found


def _bad_line(lines: list[str]) -> int:
    """1-based number of the first line after the header that is not five finite numbers."""
    for number, line in enumerate(lines[2:], 3):
        values = line.split()
        try:
            if values and (len(values) != 5 or not np.isfinite([float(v) for v in values]).all()):
                return number
        except ValueError:
            return number
    return len(lines)


def to_xywh(faces: Detections) -> np.ndarray:
    """Detections as ``[N, 5]`` x y w h score, the benchmark's format."""
    size = faces.boxes[:, 2:] - faces.boxes[:, :2]
    return np.column_stack([faces.boxes[:, :2], size, faces.scores]).astype(np.float64)


def write_predictions(folder: str | Path, name: str, boxes: np.ndarray, scores: np.ndarray) -> Path:
    """Write one image's detections, best first, as floats (truncating boxes to integers costs AP on small faces).

    Args:
        folder: the prediction folder; ``<event>`` below it is made as needed.
        name: ``event/name.jpg``.
        boxes: ``[n, 4]`` xyxy pixels; written as x y w h.
        scores: ``[n]``.

    Returns:
        the written file. It appears whole or not at all, so an interrupted run leaves no half file.

    Raises:
        EvaluationError: it cannot be written, or the name leads out of the folder.
    """
    key = image_key(name)
    if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
        raise EvaluationError(f"{name}: leads out of the folder of predictions; list names below the image folder")
    path = Path(folder) / f"{key}.txt"
    boxes, scores = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64).reshape(-1)
    order = np.argsort(-scores, kind="stable")
    rows = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores])[order].tolist()
    body = "".join(f"{x:.3f} {y:.3f} {w:.3f} {h:.3f} {s:.9g}\n" for x, y, w, h, s in rows)
    try:
        with whole(path) as part:
            part.write_text(f"{key.rsplit('/', 1)[-1]}\n{len(rows)}\n{body}", encoding="utf-8")
    except OSError as e:
        raise EvaluationError(f"{path}: cannot write ({e.strerror})") from None
    return path
