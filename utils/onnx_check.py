"""Does an exported network compute what PyTorch computes? Errors in pixels and scores on real pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.images import stored_size
from data.preprocess import normalise, pad_to_stride
from layers.anchors import decode_boxes, decode_landmarks
from models.detector import FaceDetector
from models.featherface import FeatherFace
from models.image_pyramid import ImagePyramid
from utils.image import resize
from utils.onnx_export import OUTPUTS

LONGEST = 960  # a picture's own size is checked up to this long side
SIZES = ((317, 203), (97, 401), (256, 320))  # portrait and odd, flat, and the size of the batch of two
CANDIDATE_SCORE = 0.02  # raw predictions below can never become a detection; their boxes do not matter
MARGIN = 1e-4  # of a score around the threshold
FACES_PER_TIE = 200
LEAST_CANDIDATES = 100  # compared in any case

Run = Callable[[Tensor], Sequence[Any]]  # network input -> outputs in the order of OUTPUTS


@dataclass
class Parity:
    """Largest differences between an export and PyTorch over all pictures and sizes."""

    box_px: float = 0.0
    landmark_px: float = 0.0
    score: float = 0.0
    feature: float = 0.0  # relative to the largest value of the level
    mean_score: float = 0.0  # mean score difference of the predictions that PyTorch scores above 0.5
    compared: int = 0  # predictions (raw) or faces (end-to-end)
    unmatched: int = 0  # faces that only one of the two found (end-to-end)
    inputs: int = 0  # network inputs tried

    def within(self, pixels: float, score: float) -> bool:
        """No difference above the tolerances (NaN never passes), faces found by both, something compared.

        Rounding can turn a tie in NMS (two neighbours of equal score, an IoU at the threshold), so one face in 200 may
        be unmatched: none in an ordinary picture.
        """
        fits = self.box_px <= pixels and self.landmark_px <= pixels and self.score <= score and self.feature <= score
        return fits and self.compared > 0 and self.unmatched * FACES_PER_TIE <= self.compared

    def as_dict(self) -> dict[str, float]:
        return {k: round(v, 7) if isinstance(v, float) else v for k, v in asdict(self).items()}


def check_raw(
    run: Run, model: FeatherFace | ImagePyramid, pictures: Sequence[np.ndarray], any_size: bool = True
) -> Parity:
    """Compare raw outputs, decoded, with those of a model in eval mode.

    Args:
        run: the export; features after its outputs are compared too.
        pictures: ``[H, W, 3]`` RGB uint8.
        any_size: also feed sizes that are no multiples of 32.
    """
    result, sure = Parity(), []
    for batch in views(pictures):
        image = normalise(torch.from_numpy(batch).permute(0, 3, 1, 2))
        fitted = pad_to_stride(image)
        for x in (fitted, image) if any_size and image.shape != fitted.shape else (fitted,):
            with torch.inference_mode():
                raw = [torch.as_tensor(v) for v in run(x)]
                features = len(raw) > len(OUTPUTS)
                out = model(x, features=True) if features else model(x)
                expected, found = {k: out[k].cpu() for k in OUTPUTS}, dict(zip(OUTPUTS, raw))
            if any(found[k].shape != expected[k].shape for k in OUTPUTS):
                result.box_px = float("inf")
                continue
            anchors = model.anchors(*x.shape[-2:])
            (b0, p0, s0), (b1, p1, s1) = (_decoded(out, anchors, model.cfg.variances) for out in (expected, found))
            least = min(CANDIDATE_SCORE, float(s0.flatten().topk(min(LEAST_CANDIDATES, s0.numel())).values[-1]))
            chosen = s0 >= least
            result.box_px = _worst(result.box_px, b0[chosen], b1[chosen])
            result.landmark_px = _worst(result.landmark_px, p0[chosen], p1[chosen])
            result.score = _worst(result.score, s0, s1)
            for theirs, ours in zip(raw[len(OUTPUTS) :], out["neck"] if features else ()):
                scale = ours.abs().max().cpu().clamp(min=torch.finfo(torch.float32).tiny)
                result.feature = _worst(result.feature, ours.cpu() / scale, theirs / scale)
            sure.append((s0 - s1).abs()[s0 > 0.5])
            result.compared += int(chosen.sum())
            result.inputs += 1
    sure = torch.cat(sure) if sure else torch.zeros(0)
    result.mean_score = float(sure.mean()) if len(sure) else 0.0
    return result


def check_end_to_end(
    run: Callable[[np.ndarray, float], Sequence[np.ndarray]],
    detector: FaceDetector,
    pictures: Sequence[np.ndarray],
    score: float = 0.2,
) -> Parity:
    """Compare an end-to-end export with a detector at original scale, face by face.

    Args:
        run: images ``[B, H, W, 3]`` uint8 and a score threshold -> ``boxes``, ``scores``, ``landmarks``,
            ``batch_index`` as of utils/onnx_export.py.
        score: faces above it are compared.
    """
    result = Parity()
    for batch in views(pictures):
        boxes, scores, points, index = run(batch, score)
        for i, expected in enumerate(detector(list(batch), score=score, scale="original")):
            mine = index == i
            pairs = _pair(expected.boxes, boxes[mine])
            # a score within rounding of the threshold may fall on either side of it
            clear = sum(int((s > score + MARGIN).sum()) for s in (expected.scores, scores[mine]))
            clear -= sum(int(s > score + MARGIN) for a, b in pairs for s in (expected.scores[a], scores[mine][b]))
            result.unmatched += clear
            for a, b in pairs:
                result.box_px = _worst(result.box_px, expected.boxes[a], boxes[mine][b])
                result.landmark_px = _worst(result.landmark_px, expected.landmarks[a], points[mine][b])
                result.score = _worst(result.score, expected.scores[a], scores[mine][b])
            result.compared += len(pairs)
        result.inputs += 1
    return result


def views(pictures: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Each picture at its own size and at :data:`SIZES`, the last as a batch of two with its mirror image.

    Yields ``[B, H, W, 3]`` uint8.
    """
    for picture in pictures:
        width, height = stored_size(picture.shape[1], picture.shape[0], LONGEST)
        for size in ((height, width), *SIZES):
            image = np.ascontiguousarray(resize(picture, *size))
            yield np.stack([image, image[:, ::-1]] if size == SIZES[-1] else [image])


def _decoded(out: dict[str, Tensor], anchors: Tensor, variances: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    boxes = decode_boxes(out["boxes"], anchors, variances)
    return boxes, decode_landmarks(out["landmarks"], anchors, variances), out["logits"].sigmoid()


def _pair(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int]]:
    """Boxes ``[n, 4]`` and ``[m, 4]`` that are nearest to each other, corners at most two pixels apart."""
    if not len(first) or not len(second):
        return []
    apart = np.abs(first[:, None] - second[None]).max(2)
    nearest = apart.argmin(1)
    return [(i, j) for i, j in enumerate(nearest) if apart[:, j].argmin() == i and apart[i, j] <= 2]


def _worst(so_far: float, a: Any, b: Any) -> float:
    """The larger of ``so_far`` and the greatest difference; NaN stays."""
    difference = np.abs(np.asarray(a) - np.asarray(b))
    return float(np.max([so_far, difference.max()])) if difference.size else so_far
