"""Ground truth as flat arrays: WIDERFace's official ``.mat`` files, RetinaFace label files, and list files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from data.labels import DataError, LabelSet, read_labels

from .errors import EvaluationError, image_key, read_text

SUBSETS = ("easy", "medium", "hard")
MIN_HEIGHTS = (50, 30, 10)  # pixels; the official subsets' approximate face heights


@dataclass
class GroundTruth:
    """Faces of many images, stored flat: image ``i`` owns rows ``offsets[i]:offsets[i + 1]``.

    Attributes:
        names: image keys ``event/name`` (no suffix), length I.
        boxes: ``[G, 4]`` float64, x y w h in pixels.
        offsets: ``[I + 1]`` int64.
        valid: subset name -> ``[G]`` bool; a face outside a subset is ignored there (neither hit nor miss).
        landmarks: ``[G, 5, 2]`` float64 pixels, NaN where unlabelled (always NaN from ``.mat`` files).
        problems: ``file:line: what`` for every label line that was left out.
    """

    names: list[str]
    boxes: np.ndarray
    offsets: np.ndarray
    valid: dict[str, np.ndarray]
    landmarks: np.ndarray = field(default_factory=lambda: np.zeros((0, 5, 2)))
    problems: list[str] = field(default_factory=list)

    def __post_init__(self):
        if len(self.landmarks) != len(self.boxes):
            self.landmarks = np.full((len(self.boxes), 5, 2), np.nan)
        if len(set(self.names)) < len(self.names):
            twice = next(n for n, k in Counter(self.names).items() if k > 1)
            raise EvaluationError(f"image {twice} is there twice (suffixes do not tell images apart)")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def image(self) -> np.ndarray:
        """``[G]`` int64: the image of every face."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def ignored(self) -> np.ndarray:
        """``[G]`` bool: the faces that a label file marks as ignored; ``.mat`` files mark none."""
        return ~self.valid["all"] if "all" in self.valid else np.zeros(len(self.boxes), bool)

    def take(self, names: Sequence[str]) -> GroundTruth:
        """The given images only, in the given order (duplicates dropped).

        Raises:
            EvaluationError: a name that is not in this ground truth, or no name at all.
        """
        keys = list(dict.fromkeys(image_key(n) for n in names))
        where = {n: i for i, n in enumerate(self.names)}
        unknown = [k for k in keys if k not in where]
        if unknown:
            raise EvaluationError(f"{len(unknown)} of {len(keys)} listed images have no ground truth: {unknown[0]}")
        if not keys:
            raise EvaluationError("the list of images is empty")
        index = np.array([where[k] for k in keys])
        counts = np.diff(self.offsets)[index]
        rows = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in index])
        return GroundTruth(
            keys,
            self.boxes[rows],
            np.concatenate([[0], np.cumsum(counts)]),
            {k: v[rows] for k, v in self.valid.items()},
            self.landmarks[rows],
            self.problems,
        )


def load_ground_truth(gt_dir: str | Path, names: Sequence[str] | None = None) -> GroundTruth:
    """Read WIDERFace's ``wider_face_val.mat`` and ``wider_{easy,medium,hard}_val.mat``.

    Args:
        gt_dir: the folder with the four files.
        names: keep only these images (``event/name.jpg``); ``None`` keeps all 3,226.

    Raises:
        EvaluationError: a file is missing or not such a ``.mat`` file, or a name is not in it.
    """
    folder = Path(gt_dir)
    face = _read_mat(folder / "wider_face_val.mat", ("event_list", "file_list", "face_bbx_list"))
    keys, boxes, subsets = [], [], {s: [] for s in SUBSETS}
    for event, files in zip(face["event_list"][:, 0], face["file_list"][:, 0]):
        keys += [f"{event[0]}/{f[0]}" for f in files[:, 0]]
    for images in face["face_bbx_list"][:, 0]:
        boxes += [np.asarray(b, np.float64).reshape(-1, 4) for b in images[:, 0]]
    counts = np.array([len(b) for b in boxes])
    for subset in SUBSETS:
        path = folder / f"wider_{subset}_val.mat"
        kept = [k.ravel() for images in _read_mat(path, ("gt_list",))["gt_list"][:, 0] for k in images[:, 0]]
        if len(kept) != len(keys):
            raise EvaluationError(f"{path}: lists {len(kept)} images, wider_face_val.mat has {len(keys)}")
        for index, n in zip(kept, counts):
            mask = np.zeros(n, bool)
            if index.size and not 1 <= index.min() <= index.max() <= n:
                raise EvaluationError(f"{path}: names a face that wider_face_val.mat does not have")
            mask[index.astype(np.int64) - 1] = True  # the files count from 1, some in uint8
            subsets[subset].append(mask)
    gt = GroundTruth(
        keys,
        np.concatenate(boxes),
        np.concatenate([[0], np.cumsum(counts)]),
        {s: np.concatenate(masks) for s, masks in subsets.items()},
    )
    return gt if names is None else gt.take(names)


def _read_mat(path: Path, needed: tuple[str, ...]) -> dict:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file (expected WIDERFace's evaluation ground truth)")
    try:
        content = loadmat(path, variable_names=list(needed))
    except Exception as e:  # scipy raises many types on a damaged file
        raise EvaluationError(f"{path}: not a readable .mat file ({' '.join(str(e).split())})") from None
    for key in needed:
        if key not in content:
            raise EvaluationError(f"{path}: has no '{key}'")
    return content


def load_labels(path: str | Path, names: Sequence[str] | None = None) -> GroundTruth:
    """Read a RetinaFace ``label.txt`` (format: data/labels.py). Subsets: see :func:`subsets_by_height`.

    Bad lines are left out and listed in ``problems``. An image without faces stays: detections on it are false
    positives.

    Raises:
        EvaluationError: the file cannot be read or holds no image, or a name is not in it.
    """
    try:
        labels = read_labels(path)
    except DataError as e:
        raise EvaluationError(str(e)) from None
    gt = from_label_set(labels)
    return gt if names is None else gt.take(names)


def from_label_set(labels: LabelSet) -> GroundTruth:
    """Ground truth of labels in memory (a training set's held-out part); its ``ignore`` faces are valid nowhere."""
    boxes = labels.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    landmarks = labels.landmarks.astype(np.float64)
    landmarks[~labels.has_landmarks] = np.nan
    subsets = {key: mask & ~labels.ignore for key, mask in subsets_by_height(boxes).items()}
    names = [image_key(n) for n in labels.names]
    return GroundTruth(names, boxes, labels.offsets, subsets, landmarks, list(labels.problems))


def subsets_by_height(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Masks ``[G]`` of faces at least 50, 30 and 10 px high, which stand in for Easy, Medium and Hard where no official
    split exists (lower ones are then ignored, as faces outside an official subset are), and of ``all``."""
    masks = {key: boxes[:, 3] >= height for key, height in zip(SUBSETS, MIN_HEIGHTS)}
    return {**masks, "all": np.ones(len(boxes), bool)}


def load_list(path: str | Path) -> list[str]:
    """Image names of a list file: one ``event/name.jpg`` per line; blank lines and ``#`` comments are skipped.

    Raises:
        EvaluationError: unreadable or empty file.
    """
    lines = (line.strip() for line in read_text(path).splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise EvaluationError(f"{path}: lists no image")
    return names
