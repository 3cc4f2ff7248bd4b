"""Face detection in pictures of any size: the Python API that ``detect.py``, evaluation and the web page share.

from models import FaceDetector
boxes, scores, landmarks = FaceDetector.from_pretrained("v2_ultra")("photo.jpg")
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data.labels import FLIP_ORDER
from data.preprocess import normalise, padded_size
from layers.postprocess import box_voting, postprocess
from models.fuse import fuse_for_inference
from models.heads import OUTPUTS
from models.image_pyramid import ImagePyramid, parse_pyramid
from utils.checkpoint import load_model
from utils.command import UsageError
from utils.config import Config, ModelConfig, load_config
from utils.image import as_rgb, resize
from utils.scale import Scale, check_scale
from utils.weights import DEFAULT, WEIGHTS, find_weights

VGA_SIDE = 640
THIN_SHORT = 240  # px: a longer picture than 8:3 keeps a short side of so much in the second look, as faces may fill it
LARGEST_FACE = 320  # px of a view: larger ones are left to the second look, where there is one
# px: up to this long side of a picture the second look is for its larger faces alone, and not for their smaller ones
USUAL_SIDE, SMALLEST_FACE = 1024, 200
LARGE_SHORT, LARGE_LONG = 1600, 2150
BATCH_PIXELS = 4096 * 4096  # network input of one forward pass; keeps memory bounded whatever the caller hands over

log = logging.getLogger("featherface")


class Detections(NamedTuple):
    """Faces of one picture, best first, in pixels of the picture as displayed. NumPy float32."""

    boxes: np.ndarray  # [N, 4] x1 y1 x2 y2, inside the picture
    scores: np.ndarray  # [N] in (0, 1)
    landmarks: np.ndarray  # [N, 5, 2]: left eye, right eye, nose, left and right mouth corner, as seen in the picture

    def as_dicts(self) -> list[dict]:
        """The faces as plain numbers for JSON: ``box`` [4], ``score``, ``landmarks`` [5][2]."""
        return [
            {
                "box": [round(v, 2) for v in box.tolist()],
                "score": round(float(score), 4),
                "landmarks": [[round(v, 2) for v in point] for point in points.tolist()],
            }
            for box, score, points in zip(self.boxes, self.scores, self.landmarks)
        ]


class Network(Protocol):
    """What a detector needs of a network: our model, or any other way to compute the same raw outputs."""

    cfg: ModelConfig

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[B, 3, H, W]`` (see data/preprocess.py) -> ``logits [B, N]``, ``boxes [B, N, 4]`` and
        ``landmarks [B, N, 10]``, encoded against the anchors."""

    def anchors(self, height: int, width: int, device: torch.device) -> Tensor:
        """``[N, 4]`` cxcywh in pixels."""


class DeviceError(UsageError, ValueError):
    """A device that does not exist, or not on this machine; its text is one line."""


class _View(NamedTuple):
    """One look at one picture: resized to ``height x width``, perhaps mirrored."""

    index: int
    height: int
    width: int
    flip: bool
    faces: tuple[float, float]  # px of the view: boxes whose longer side is below the first or above the second go


class FaceDetector:
    """Finds faces with a network.

    Args:
        network: a :class:`Network`; a module is moved to ``device`` and kept in eval mode.
        device: where to compute; None = :func:`pick_device`.
        score_threshold: faces below are dropped.
        nms_threshold: overlap (IoU) above which the weaker of two boxes is dropped.
        top_k: candidates per view before NMS; twice that where the network looks twice.
        keep_k: faces per picture at most.
        max_side: pictures of more pixels than a square of this side are shrunk to as many before the network sees them
            (memory), at every scale.
        batch_size: pictures per forward pass at most.
        tta_factors: sizes of the views of test-time augmentation, relative to ``scale``.
        second_look: at scale "auto", pictures with a longer side than this are also searched at VGA size: at full size
            faces above about 700 px are placed badly, those above 1,100 px not seen, and parts of them are taken for
            faces. So boxes longer than 320 px count at VGA size alone, and in pictures up to 1,024 px those up to 200
            px at full size alone. (Pictures longer than 8:3 are seen with a short side of up to 240 px instead of at
            VGA size.) The two are merged by box voting; boxes down to the score threshold have a vote.
        pyramid: 1.2 to 4: pictures with small faces are looked at twice, for these faces enlarged by this factor (see
            :class:`models.image_pyramid.ImagePyramid`). 1.5 takes up to 3.3 times the computation. "0.75+1.2": the
            first look is at the picture shrunk to 0.75, which together takes up to 2.0 times. Pictures that would then
            be larger than ``max_side`` allows are looked at once (an exported pyramid always looks twice, so it is
            shown them shrunk to ``max_side`` over the factor). None or 0 = off, or what an exported file has inside.

    Raises:
        ConfigError: ``pyramid`` is out of range, or the network cannot have one.
        ValueError: a threshold is not between 0 and 1, or a count, side or factor is not above 0.
    """

    path: Path | None = None  # of the weights, where :meth:`from_pretrained` read some

    def __init__(
        self,
        network: Network,
        device: torch.device | str | None = None,
        score_threshold: float = 0.5,
        nms_threshold: float = 0.4,
        top_k: int = 5000,
        keep_k: int = 750,
        max_side: int = 4096,
        batch_size: int = 16,
        tta_factors: Sequence[float] = (0.5, 1.0, 1.5),
        second_look: int = VGA_SIDE,
        pyramid: str | float | tuple[float, float] | None = None,
    ):
        self.device = pick_device(device)
        factors = parse_pyramid(pyramid)
        network = ImagePyramid(network, factors) if factors else network
        self.network = network.to(self.device).eval() if isinstance(network, nn.Module) else network
        self.score_threshold = _threshold("score_threshold", score_threshold)
        self.nms_threshold = _threshold("nms_threshold", nms_threshold)
        self.tta_factors = tuple(tta_factors)
        if not self.tta_factors or not all(0 < factor < math.inf for factor in self.tta_factors):
            raise ValueError(f"tta_factors must be numbers above 0, at least one, got {self.tta_factors}")
        self.pyramid = getattr(self.network, "pyramid", None)
        self.top_k = _at_least_1("top_k", top_k) * (2 if self.pyramid else 1)
        self.keep_k = _at_least_1("keep_k", keep_k)
        self.max_side = _at_least_1("max_side", max_side)
        self.batch_size = _at_least_1("batch_size", batch_size)
        self.second_look = _at_least_1("second_look", second_look)
        self._told = False  # that a picture was too large for two looks

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        device: torch.device | str | None = None,
        config: str | Path | Config | ModelConfig | None = None,
        backend: Literal["torch", "onnx"] = "torch",
        **options: Any,
    ) -> FaceDetector:
        """A detector with trained weights.

        Args:
            name_or_path: a name of ``utils.weights.WEIGHTS`` ("v2_ultra", "v1", ...), a checkpoint file, or a raw-form
                ``.onnx`` file of export.py; None = the weights of ``config`` where they have its name, else V2 Ultra.
            config: the architecture that the checkpoint must hold (YAML name or path, or a dataclass); None = any.
            backend: what computes the raw outputs: "torch", or "onnx" for onnxruntime (CPU; a checkpoint is exported on
                first use). An ``.onnx`` file always means the latter.
            options: further arguments of :class:`FaceDetector`.

        Raises:
            CheckpointError: no such weights, unreadable, refused (code inside), or of another architecture.
            ConfigError: ``config`` cannot be read.
            DeviceError: no such device.
            ImportError: onnxruntime is needed but not installed.
        """
        if backend not in ("torch", "onnx"):
            raise ValueError(f"backend must be 'torch' or 'onnx', got {backend!r}")
        expect, expect_name = _expected(config)
        if name_or_path is None:  # `--config v1` alone means V1's weights
            name_or_path = expect_name if expect_name in WEIGHTS else DEFAULT
        path = find_weights(name_or_path)
        if backend == "onnx" or path.suffix == ".onnx":
            from utils.onnx_backend import load_network  # onnxruntime is loaded only where it computes

            if device is not None and pick_device(device).type != "cpu":
                log.warning("onnxruntime computes on the CPU, not on %s", device)
            detector = cls(load_network(path, expect, expect_name), "cpu", **options)
        else:
            device = pick_device(device)
            model, _ = load_model(path, device, expect, expect_name)
            # as exact, a third faster on a CPU; float32 even where the program's default is another
            fast = fuse_for_inference(model).to(dtype=torch.float32, memory_format=torch.channels_last)
            detector = cls(fast, device, **options)
        detector.path = path
        return detector

    def __call__(
        self,
        image: Any,
        score: float | None = None,
        nms: float | None = None,
        scale: Scale = "auto",
        tta: bool = False,
        pad: bool = True,
    ) -> Detections | list[Detections]:
        """Detect the faces of one picture, or of each picture of a list.

        Pictures of equal (padded) size share a forward pass; the result of a picture never depends on the others.

        Args:
            image: anything :func:`utils.image.as_rgb` takes (path, Pillow, NumPy RGB, torch uint8), or a list of such.
            score, nms: thresholds, instead of the detector's own.
            scale: "original" = no resizing; "vga" = long side 640; "1600" = short side 1600 but long side at most
                2150; "auto" = original, and for the large faces of pictures longer than ``second_look`` VGA as well; a
                number from 0.1 to 8 = so many times the original size.
            tta: test-time augmentation: several sizes, each also mirrored, merged by box voting.
            pad: pad right and bottom to a multiple of 32 with zeros (after mean subtraction); False for exact parity
                with the published V1 figures.

        Returns:
            :class:`Detections`, or a list of them for a list.

        Raises:
            ImageReadError: a path that cannot be read.
            TypeError, ValueError: no picture, no such scale, or a threshold that is not between 0 and 1.
        """
        several = isinstance(image, (list, tuple))
        pictures = [as_rgb(i) for i in (image if several else [image])]
        score = self.score_threshold if score is None else _threshold("score", score)
        nms = self.nms_threshold if nms is None else _threshold("nms", nms)
        groups = defaultdict(list)
        for index, picture in enumerate(pictures):
            for view in self._views(index, picture, scale, tta):
                groups[padded_size(view.height, view.width) if pad else (view.height, view.width)].append(view)
        found: list[list[dict[str, Tensor]]] = [[] for _ in pictures]
        with torch.inference_mode():
            for size, views in groups.items():
                for part in self._parts(views, size):
                    for view, faces in zip(part, self._detect(pictures, part, size, score, nms)):
                        found[view.index].append(_to_picture(faces, view, pictures[view.index]))
            results = [self._finish(f, p, nms) for f, p in zip(found, pictures)]
        return results if several else results[0]

    def _views(self, index: int, picture: np.ndarray, scale: Scale, tta: bool) -> list[_View]:
        height, width = picture.shape[:2]
        long, short = max(height, width), min(height, width)
        if isinstance(scale, Real):
            factors = [check_scale(scale)]
        elif scale in ("auto", "original"):
            factors = [1.0]
        elif scale == "vga":
            factors = [VGA_SIDE / long]
        elif scale == "1600":
            factors = [min(LARGE_SHORT / short, LARGE_LONG / long)]
        else:
            raise ValueError(f"scale must be 'auto', 'original', 'vga', '1600' or a number, got {scale!r}")
        if tta:
            factors = [factors[0] * f for f in self.tta_factors]
        limit = self.max_side / math.sqrt(height * width)
        if self.pyramid and not isinstance(self.network, ImagePyramid):  # in an exported file
            limit /= self.pyramid.second

        def size(factor: float) -> tuple[int, int]:
            factor = min(factor, limit)
            return max(round(height * factor), 1), max(round(width * factor), 1)

        looks = dict.fromkeys(map(size, factors), (0.0, math.inf))
        if scale == "auto" and long > self.second_look:
            factor = max(VGA_SIDE / long, min(THIN_SHORT / short, 1.0))
            small = size(factor)
            looks = {s: (0.0, LARGEST_FACE if max(s) > max(small) else math.inf) for s in looks}
            looks.setdefault(small, (SMALLEST_FACE * factor if long <= USUAL_SIDE else 0.0, math.inf))
        flips = (False, True) if tta else (False,)
        return [_View(index, *s, flip, faces) for s, faces in looks.items() for flip in flips]

    def _parts(self, views: list[_View], size: tuple[int, int]) -> Iterator[list[_View]]:
        """Split views of one padded size into forward passes."""
        pixels = size[0] * size[1] * (self.pyramid.second**2 if self.pyramid else 1)
        step = max(1, min(self.batch_size, int(BATCH_PIXELS / pixels)))
        for start in range(0, len(views), step):
            yield views[start : start + step]

    def _detect(
        self, pictures: list[np.ndarray], views: list[_View], size: tuple[int, int], score: float, nms: float
    ) -> list[dict[str, Tensor]]:
        """One forward pass -> faces of each view in pixels of that view."""
        network = self.network
        single = network.network if isinstance(network, ImagePyramid) else network
        if isinstance(single, nn.Module) and single.training:  # a trainer may have switched it since
            single.eval()
        limit = self.max_side / self.pyramid.second if self.pyramid else math.inf
        if math.prod(size) > limit**2 and network is not single:
            network = single  # one look, for memory's sake
            if not self._told:
                log.warning("views of more than %d x %d px are looked at once, not twice", limit, limit)
                self._told = True
        images = torch.zeros(len(views), 3, *size, dtype=torch.float32, device=self.device)
        for image, view in zip(images, views):
            pixels = torch.from_numpy(resize(pictures[view.index], view.height, view.width)).to(self.device)
            pixels = pixels.flip(1) if view.flip else pixels
            image[:, : view.height, : view.width] = normalise(pixels.permute(2, 0, 1))
        raw = {k: v.float() for k, v in network(images).items() if k in OUTPUTS}
        anchors = network.anchors(*size, self.device)
        found = postprocess(raw, anchors, network.cfg.variances, score, nms, self.top_k, self.keep_k)
        return [_of_size(*view.faces, faces) for view, faces in zip(views, found)]

    def _finish(self, views: list[dict[str, Tensor]], picture: np.ndarray, nms: float) -> Detections:
        """Merge the views of one picture, clip its boxes and drop those outside it (found in the padding)."""
        faces = views[0]
        if len(views) > 1:
            faces = box_voting(*(torch.cat([v[key] for v in views]) for key in ("boxes", "scores", "landmarks")), nms)
        height, width = picture.shape[:2]
        limit = torch.tensor([width, height, width, height], device=faces["boxes"].device)
        boxes = torch.minimum(faces["boxes"].clamp(min=0), limit)
        inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
        return Detections(
            *(t[inside][: self.keep_k].cpu().numpy() for t in (boxes, faces["scores"], faces["landmarks"]))
        )


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """``device``, or the GPU if there is one, or the CPU.

    Raises:
        DeviceError: unknown device, or one that this machine lacks.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type == "meta" or (device.type == "cpu" and device.index):  # PyTorch would take them
            raise RuntimeError("nothing can be computed there")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        raise DeviceError(f"device '{device}' cannot be used: {str(e).splitlines()[0]}") from None
    return device


def _threshold(name: str, value: float) -> float:
    if not isinstance(value, Real) or not 0 <= value <= 1:  # NaN is not, either
        raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")
    return value


def _at_least_1(name: str, value: int) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
    return value


def _expected(config: str | Path | Config | ModelConfig | None) -> tuple[ModelConfig | None, str]:
    """The architecture asked for and what to call it in an error."""
    if config is None or isinstance(config, ModelConfig):
        return config, "config"
    if not isinstance(config, Config):
        config = load_config(config)
    return config.model, config.name


def _of_size(least: float, largest: float, faces: dict[str, Tensor]) -> dict[str, Tensor]:
    """The faces whose boxes' longer side is from ``least`` to ``largest`` px long."""
    if least == 0 and math.isinf(largest):  # nearly always: spare a GPU the wait for how many remain
        return faces
    side = (faces["boxes"][:, 2:] - faces["boxes"][:, :2]).amax(1)
    fits = (side >= least) & (side <= largest)
    return {key: value[fits] for key, value in faces.items()}


def _to_picture(faces: dict[str, Tensor], view: _View, picture: np.ndarray) -> dict[str, Tensor]:
    """Faces in pixels of a view -> in pixels of its picture."""
    boxes, landmarks = faces["boxes"], faces["landmarks"]
    if view.flip:
        boxes = torch.stack([view.width - boxes[:, 2], boxes[:, 1], view.width - boxes[:, 0], boxes[:, 3]], 1)
        landmarks = torch.stack([view.width - landmarks[..., 0], landmarks[..., 1]], -1)[:, FLIP_ORDER]
    height, width = picture.shape[:2]
    factor = boxes.new_tensor([width / view.width, height / view.height])
    return {"boxes": boxes * factor.repeat(2), "scores": faces["scores"], "landmarks": landmarks * factor}
