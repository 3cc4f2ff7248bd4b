"""AP of a network on the held-out images (``train_select``), by the project's own detector and evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data.dataset import FaceDataset, report_problems
from data.images import read_photo, shrink
from data.labels import ImageError
from models.detector import Detections, FaceDetector
from utils.distributed import World
from utils.draw import draw_detections
from utils.scale import Scale
from widerface_evaluate import GroundTruth, evaluate
from widerface_evaluate.ground_truth import SUBSETS, from_label_set
from widerface_evaluate.predictions import to_xywh

SCORE, NMS = 0.02, 0.4  # the benchmark's convention
CHUNK = 8  # pictures decoded at once
PICTURE_SIDE = 480  # px, long side of sample pictures
PICTURE_SCORE = 0.3


@dataclass
class Validator:
    """Finds the faces of the held-out images and compares them with their labels.

    Args:
        dataset: the images and their faces.
        images: use only so many, spread evenly over the data set; 0 = all.
        scale: as ``FaceDetector``: auto, original, vga, 1600 or a number.
        pictures: how many to return with detections drawn in.
        on_bad_image: ``"skip"`` leaves out images that cannot be decoded, and names them once; ``"fail"`` raises.
    """

    dataset: FaceDataset
    images: int = 0
    scale: Scale = "original"
    pictures: int = 0
    on_bad_image: str = "skip"

    def __post_init__(self) -> None:
        n = len(self.dataset)
        count = min(self.images or n, n)
        self.indices = np.unique(np.linspace(0, n - 1, count).round().astype(int)).tolist()
        self.truth = ground_truth(self.dataset, self.indices)

    @property
    def faces(self) -> int:
        """How many faces count in all."""
        return int(self.truth.valid["all"].sum())

    def __call__(
        self, model: nn.Module, world: World, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], list[np.ndarray]] | None:
        """AP per subset, ``ap`` (mean of those of :data:`SUBSETS` that have faces; of all faces where none has) and the
        sample pictures (rank 0 has them).

        The images are shared out among the processes of ``world``; all of them get the figures. ``stopped`` is
        asked between chunks, on every process: True gives up and returns None.

        Raises:
            ImageError: an image cannot be decoded and ``on_bad_image`` is ``fail``, or none can.
        """
        detector = FaceDetector(model, world.device, score_threshold=SCORE, nms_threshold=NMS, batch_size=CHUNK)
        mine = self.indices[world.rank :: world.size]
        longest = -(-len(self.indices) // world.size)  # all processes ask `stopped` equally often
        found: dict[str, np.ndarray] = {}
        bad: dict[int, str] = {}
        drawn: list[np.ndarray] = []
        with ThreadPoolExecutor(4) as pool, _no_algorithm_search():
            for start in range(0, longest, CHUNK):
                if stopped():
                    return None
                part = mine[start : start + CHUNK]
                read = dict(zip(part, pool.map(self._read, part)))
                bad.update((i, image) for i, image in read.items() if isinstance(image, str))
                part, images = [i for i in part if i not in bad], [read[i] for i in part if i not in bad]
                for i, image, faces in zip(part, images, detector(images, scale=self.scale) if images else []):
                    found[self.dataset.names[i]] = to_xywh(faces)
                    if world.main and len(drawn) < self.pictures:
                        drawn.append(draw(image, faces))
        self._leave_out({i: why for part in world.gather(bad) for i, why in part.items()}, world.main)
        merged = {name: boxes for part in world.gather(found) for name, boxes in part.items()}
        result = evaluate(merged, self.truth)
        aps = {f"ap_{k}": round(result[k], 6) for k in (*SUBSETS, "all")}
        counted = [result[k] for k in SUBSETS if result["faces"][k]]
        ap = float(np.mean(counted or [result["all"]]))
        return {"ap": round(ap, 6), **aps, "images": len(merged)}, drawn

    def _read(self, index: int) -> np.ndarray | str:
        """The picture, or why it cannot be read. (What names no size at all is not in the data set.)"""
        try:
            return read_photo(self.dataset.paths[index])
        except ImageError as e:
            if self.on_bad_image == "fail":
                raise
            return str(e)

    def _leave_out(self, bad: dict[int, str], tell: bool) -> None:
        if not bad:
            return
        if tell:
            report_problems(list(bad.values()), "unreadable images left out of validation")
        self.indices = [i for i in self.indices if i not in bad]
        if not self.indices:
            raise ImageError(f"{next(iter(bad.values()))}; and none of the other images to validate on can be read")
        self.truth = ground_truth(self.dataset, self.indices)


@contextmanager
def _no_algorithm_search() -> Iterator[None]:
    """cuDNN's search for the fastest algorithm pays for the one size of training, not for a picture of every size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def readable(dataset: FaceDataset, on_bad_image: str) -> FaceDataset:
    """Without the photos that break off behind their header: training's validation leaves them out, too.

    Raises:
        ImageError: there is one and ``on_bad_image`` is ``fail``, or none can be read.
    """
    good, bad = [], []
    for i, path in enumerate(dataset.paths):
        try:
            read_photo(path)
            good.append(i)
        except ImageError as e:
            if on_bad_image == "fail":
                raise
            bad.append(str(e))
    report_problems(bad, "unreadable held-out images left out")
    if bad and not good:
        raise ImageError(f"{bad[0]}; and none of the other held-out images can be read")
    return dataset.take_images(np.array(good, dtype=np.int64))


def ground_truth(dataset: FaceDataset, indices: list[int]) -> GroundTruth:
    """The faces of some images as the evaluator wants them; faces marked ``ignore`` count in no subset."""
    return from_label_set(dataset.labels.take_images(np.array(indices, dtype=np.int64)))


def draw(image: np.ndarray, faces: Detections) -> np.ndarray:
    """A small copy of an RGB picture with the surer faces drawn in."""
    small = shrink(image, PICTURE_SIDE)
    ratio = small.shape[1] / image.shape[1]
    sure = faces.scores >= PICTURE_SCORE
    return draw_detections(small, faces.boxes[sure] * ratio, faces.scores[sure], faces.landmarks[sure] * ratio)
