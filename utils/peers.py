"""Other people's face detectors, run from their ONNX files and called as :class:`models.FaceDetector` is.

YuNet (Wu et al., 2023), SCRFD (Guo et al., ICLR 2022), RetinaFace-MobileNet0.25 (Deng et al., CVPR 2020) and EResFD
(Jeong et al., WACV 2024) through onnxruntime, with our decoding of their outputs; YuNet also as OpenCV ships it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms as suppress

from layers.anchors import AnchorCache, decode_boxes, decode_landmarks, make_anchors
from models.detector import Detections
from utils.checkpoint import CheckpointError
from utils.image import as_rgb
from utils.onnx_backend import open_session

if TYPE_CHECKING:
    import onnx
    import onnxruntime

TOP_K, KEEP_K = 5000, 750  # candidates before, faces after NMS: as our own detector
VARIANCES = (0.1, 0.2)


class Raw(NamedTuple):
    """Outputs of a network for B images and N priors, before thresholding and decoding."""

    scores: Tensor  # [B, N] in 0..1
    boxes: Tensor  # [B, N, 4] encoded
    landmarks: Tensor  # [B, N, 10] encoded; [B, N, 0] where the network has none


class OnnxPeer:
    """A detector that onnxruntime runs; subclasses say what its inputs and outputs mean.

    Args:
        path: the ONNX file.
        threads: for onnxruntime.
    """

    backend = "onnx"
    multiple = 32  # height and width are padded to it, right and bottom, with what the network sees as zero
    swap_rgb = True  # BGR input
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # in the network's channel order
    scale = 1.0  # of the pixels after subtracting the mean

    def __init__(self, path: str | Path, threads: int = 1):
        self.path = Path(path)
        self.threads = threads
        self.session = open_session(self.path, threads)
        self.known_priors = AnchorCache(lambda height, width, device: self.priors(height, width).to(device))

    def prepare(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """RGB uint8 images ``[H, W, 3]`` of one size -> network input ``[B, 3, H', W']`` float32, padded."""
        height, width = images[0].shape[:2]
        size = (-(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple)
        x = np.zeros((len(images), 3, *size), np.float32)
        for out, image in zip(x, images):
            pixels = image[..., ::-1] if self.swap_rgb else image
            for channel, mean in enumerate(self.mean):
                out[channel, :height, :width] = (pixels[..., channel].astype(np.float32) - mean) * self.scale
        return x

    def network(self, x: np.ndarray) -> list[np.ndarray]:
        """Raw outputs of a prepared batch, in the order of the file."""
        return self.session.run(None, {self.session.get_inputs()[0].name: x})

    def __call__(
        self,
        image: Any,
        score: float = 0.5,
        nms: float = 0.4,
        scale: str = "original",
        tta: bool = False,
        pad: bool = True,
    ) -> Detections | list[Detections]:
        """Faces of one picture, or of each of a list, as :meth:`models.FaceDetector.__call__` returns them.

        Pictures of a list that are all of one size share a forward pass. Peers run at their original scale, once, and
        always padded.

        Raises:
            ValueError: another scale, or test-time augmentation.
        """
        if scale != "original" or tta or not pad:
            raise ValueError("peers are run at scale 'original', padded, without test-time augmentation")
        several = isinstance(image, (list, tuple))
        pictures = [as_rgb(i) for i in (image if several else [image])]
        one_size = len({p.shape for p in pictures}) == 1
        groups = [pictures] if one_size else [[p] for p in pictures]
        results = [faces for group in groups for faces in self._detect(group, score, nms)]
        return results if several else results[0]

    def _detect(self, pictures: list[np.ndarray], score: float, nms: float) -> list[Detections]:
        x = self.prepare(pictures)
        with torch.inference_mode():
            raw, priors = self.split(self.network(x), len(x)), self.known_priors(*x.shape[2:])
            return [self._faces(raw, priors, i, p.shape[:2], score, nms) for i, p in enumerate(pictures)]

    def _faces(self, raw: Raw, priors: Tensor, i: int, size: tuple[int, int], score: float, nms: float) -> Detections:
        which = (raw.scores[i] > score).nonzero().flatten()
        scores = raw.scores[i][which]
        if len(which) > TOP_K:
            scores, best = scores.topk(TOP_K)
            which = which[best]
        boxes, landmarks = self.decode(raw.boxes[i][which], raw.landmarks[i][which], priors[which])
        keep = suppress(boxes, scores, nms)
        limit = torch.tensor([size[1], size[0]] * 2)
        boxes, scores, landmarks = torch.minimum(boxes[keep].clamp(min=0), limit), scores[keep], landmarks[keep]
        inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)  # not those found in the padding
        return Detections(*(t[inside][:KEEP_K].numpy() for t in (boxes, scores, landmarks)))

    def split(self, outputs: list[np.ndarray], batch: int) -> Raw:
        """The outputs as tensors over all priors."""
        raise NotImplementedError

    def priors(self, height: int, width: int) -> Tensor:
        """What boxes are encoded against, for an input of that size ``[N, K]``."""
        raise NotImplementedError

    def decode(self, boxes: Tensor, landmarks: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded ``[..., n, 4]`` and ``[..., n, 10]`` with their n priors -> xyxy ``[..., n, 4]`` and
        ``[..., n, 5, 2]`` in pixels."""
        raise NotImplementedError


class YuNet(OnnxPeer):
    """YuNet-n or -s: anchor-free, input BGR 0..255, outputs cls, obj, bbox and kps for strides 8, 16 and 32."""

    strides = (8, 16, 32)

    def split(self, outputs: list[np.ndarray], batch: int) -> Raw:
        cls, obj, boxes, landmarks = (_join(outputs[i : i + 3], batch) for i in (0, 3, 6, 9))
        return Raw((cls * obj).clamp(min=0).sqrt().squeeze(-1), boxes, landmarks)

    def priors(self, height: int, width: int) -> Tensor:
        return corners(height, width, self.strides, 1)

    def decode(self, boxes: Tensor, landmarks: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        corner, stride = priors[:, :2], priors[:, 2:]
        centre, half = corner + boxes[..., :2] * stride, boxes[..., 2:].exp() * stride / 2
        points = corner[:, None] + landmarks.unflatten(-1, (5, 2)) * stride[:, None]
        return torch.cat([centre - half, centre + half], -1), points


class SCRFD(OnnxPeer):
    """SCRFD with key points: distances to the four sides, two anchors per cell, input (RGB - 127.5) / 128."""

    swap_rgb = False
    mean = (127.5, 127.5, 127.5)
    scale = 1 / 128
    strides = (8, 16, 32)

    def split(self, outputs: list[np.ndarray], batch: int) -> Raw:
        scores, boxes, landmarks = (_join(outputs[i : i + 3], batch) for i in (0, 3, 6))
        return Raw(scores.squeeze(-1), boxes, landmarks)

    def priors(self, height: int, width: int) -> Tensor:
        return corners(height, width, self.strides, 2)

    def decode(self, boxes: Tensor, landmarks: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        corner, stride = priors[:, :2], priors[:, 2:]
        sides = boxes * stride
        points = corner[:, None] + landmarks.unflatten(-1, (5, 2)) * stride[:, None]
        return torch.cat([corner - sides[..., :2], corner + sides[..., 2:]], -1), points


class RetinaFace(OnnxPeer):
    """RetinaFace-MobileNet0.25: SSD anchors, input BGR minus mean, class scores already through softmax."""

    mean = (104.0, 117.0, 123.0)
    strides = (8, 16, 32)
    sizes = ((16, 32), (64, 128), (256, 512))

    def split(self, outputs: list[np.ndarray], batch: int) -> Raw:
        boxes, scores, landmarks = map(torch.from_numpy, outputs)  # the file calls the last one "iou"
        return Raw(scores[..., 1], boxes, landmarks)

    def priors(self, height: int, width: int) -> Tensor:
        return make_anchors(height, width, self.strides, self.sizes)

    def decode(self, boxes: Tensor, landmarks: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        return decode_boxes(boxes, priors, VARIANCES), decode_landmarks(landmarks, priors, VARIANCES)


class EResFD(OnnxPeer):
    """EResFD: one SSD anchor per cell of six levels, 1.25 times as tall as wide, no landmarks (NaN); RGB minus mean.

    The file has the map sizes of a 640x480 input built in; for any other input its nearest-neighbour upsamplings are
    replaced by the same with a factor of 2, exact where height and width are multiples of 128.
    """

    swap_rgb = False
    mean = (123.0, 117.0, 104.0)
    strides = (4, 8, 16, 32, 64, 128)
    sizes = ((16,), (32,), (64,), (128,), (256,), (512,))
    aspect = 1.25
    built_in = (480, 640)

    def __init__(self, path: str | Path, threads: int = 1):
        super().__init__(path, threads)
        self.session = None  # of the file as it is: it takes no other batch size either
        self.sessions: dict[bool, onnxruntime.InferenceSession] = {}

    def prepare(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.multiple = 1 if images[0].shape[:2] == self.built_in else 128
        return super().prepare(images)

    def network(self, x: np.ndarray) -> list[np.ndarray]:
        built_in = x.shape[2:] == self.built_in
        if built_in not in self.sessions:
            self.sessions[built_in] = open_session(self.path, self.threads, any_size(self.path, rescale=not built_in))
        return self.sessions[built_in].run(None, {"input.1": x})

    def split(self, outputs: list[np.ndarray], batch: int) -> Raw:
        logits, boxes = _join(outputs[:6], batch), _join(outputs[6:], batch)
        return Raw((logits[..., 1] - logits[..., 0]).sigmoid(), boxes, boxes[..., :0])

    def priors(self, height: int, width: int) -> Tensor:
        return make_anchors(height, width, self.strides, self.sizes) * torch.tensor([1, 1, 1, self.aspect])

    def decode(self, boxes: Tensor, landmarks: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        return decode_boxes(boxes, priors, VARIANCES), torch.full((*boxes.shape[:-1], 5, 2), float("nan"))


class OpenCVYuNet:
    """YuNet as OpenCV ships it, ``cv2.FaceDetectorYN``: one picture at a time, its own decoding and NMS."""

    backend = "opencv"

    def __init__(self, path: str | Path, threads: int = 1):
        self.path = Path(path)
        cv2.setNumThreads(threads)
        try:
            self.detector = cv2.FaceDetectorYN.create(str(_existing(self.path)), "", (320, 320), top_k=TOP_K)
        except cv2.error as e:
            raise CheckpointError(f"{path}: OpenCV cannot load it ({_first_line(e)})") from None

    def __call__(
        self,
        image: Any,
        score: float = 0.5,
        nms: float = 0.4,
        scale: str = "original",
        tta: bool = False,
        pad: bool = True,
    ) -> Detections | list[Detections]:
        """As :meth:`OnnxPeer.__call__`; a list is worked off picture by picture."""
        if scale != "original" or tta or not pad:
            raise ValueError("peers are run at scale 'original', padded, without test-time augmentation")
        several = isinstance(image, (list, tuple))
        self.detector.setScoreThreshold(score)
        self.detector.setNMSThreshold(nms)
        results = [self._detect(as_rgb(i)) for i in (image if several else [image])]
        return results if several else results[0]

    def _detect(self, picture: np.ndarray) -> Detections:
        height, width = picture.shape[:2]
        self.detector.setInputSize((width, height))
        _, found = self.detector.detect(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        found = np.zeros((0, 15), np.float32) if found is None else found[np.argsort(-found[:, 14], kind="stable")]
        boxes = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4]], 1)
        boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return Detections(*(a[inside][:KEEP_K] for a in (boxes, found[:, 14], found[:, 4:14].reshape(-1, 5, 2))))


class PeerFile(NamedTuple):
    """A peer that can be benchmarked."""

    title: str
    file: str
    build: type


PEERS = {
    "yunet_n": PeerFile("YuNet-n", "yunet_n_dynamic.onnx", YuNet),
    "yunet_n_opencv": PeerFile("YuNet-n", "yunet_n_640_640.onnx", OpenCVYuNet),
    "yunet_s": PeerFile("YuNet-s", "yunet_s_dynamic.onnx", YuNet),
    "scrfd_2.5g": PeerFile("SCRFD-2.5G (kps)", "scrfd_2.5g_kps.onnx", SCRFD),
    "retinaface_mbnet0.25": PeerFile("RetinaFace-mnet0.25 (peer's file)", "retinaface_mbnet0.25.onnx", RetinaFace),
    "eresfd": PeerFile("EResFD", "eresfd_vga.onnx", EResFD),
}


def find_peers(folder: str | Path) -> list[str]:
    """Names of :data:`PEERS` whose file is in the folder.

    Raises:
        CheckpointError: none is.
    """
    found = [name for name, peer in PEERS.items() if (Path(folder) / peer.file).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: none of {', '.join(sorted({p.file for p in PEERS.values()}))} is in it")
    return found


def load_peer(name: str, folder: str | Path, threads: int = 1) -> OnnxPeer | OpenCVYuNet:
    """A peer of :data:`PEERS` from the folder of its file.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    peer = PEERS[name]
    return peer.build(Path(folder) / peer.file, threads)


def any_size(path: Path, rescale: bool) -> bytes:
    """EResFD's file with free batch size and, with ``rescale``, free height and width; serialised."""

    model = _graph(path)
    graph = model.graph
    for value in (*graph.input, *graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis == 0 or (rescale and dim.dim_value > 4):  # not the channels
                dim.dim_param = f"{value.name}_{axis}"
    if rescale:
        del graph.value_info[:]
        double_resizes(graph)
    return model.SerializeToString()


def double_resizes(graph) -> None:
    """Every resize of an ONNX graph doubles height and width, whatever sizes the file computes for it."""
    from onnx import numpy_helper

    double = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "double_scale")
    graph.initializer.append(double)
    for node in graph.node:
        if node.op_type == "Resize":
            del node.input[1:]
            node.input.extend(["", double.name])


def corners(height: int, width: int, strides: Sequence[int], per_cell: int) -> Tensor:
    """Top left corner of every cell of every level and its stride, ``[N, 3]`` pixels; height, width divisible."""
    levels = []
    for stride in strides:
        y, x = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
        cells = torch.stack([x * stride, y * stride, torch.full_like(x, stride)], -1).view(-1, 3)
        levels.append(cells.repeat_interleave(per_cell, 0))
    return torch.cat(levels).float()


def onnx_counts(path: str | Path, size: tuple[int, int]) -> tuple[int, int]:
    """Parameters and multiply-adds of a network in an ONNX file.

    Parameters are the floating-point weights stored in it (norms are usually folded away, so a little below the
    published number). Multiply-adds are those of its convolutions for one ``(width, height)`` image, from the shapes
    of a run.

    Raises:
        CheckpointError: the file cannot be read or run.
    """
    import onnx

    model = _graph(Path(path))
    graph = model.graph
    weights = {i.name: i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    convs = [n for n in graph.node if n.op_type == "Conv"]
    del graph.output[:]
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(n.output[0]) for n in convs)
    session = open_session(path, 1, model.SerializeToString())
    node = session.get_inputs()[0]
    height, width = (d if isinstance(d, int) else v for d, v in zip(node.shape[2:], (size[1], size[0])))
    height, width = (-(-v // 32) * 32 for v in (height, width))
    shapes = [o.shape for o in session.run(None, {node.name: np.zeros((1, 3, height, width), np.float32)})]
    macs = sum(int(np.prod(shape)) * int(np.prod(weights[n.input[1]].dims[1:])) for shape, n in zip(shapes, convs))
    macs = round(macs * size[0] * size[1] / (height * width))  # a file of fixed size: in proportion to the pixels
    return sum(int(np.prod(w.dims)) for w in weights.values()), macs


def _join(levels: Sequence[np.ndarray], batch: int) -> Tensor:
    """Outputs of several levels, each ``[B, ..., K]`` -> ``[B, N, K]``."""
    return torch.cat([torch.from_numpy(a).reshape(batch, -1, a.shape[-1]) for a in levels], 1)


def _graph(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(_existing(path))
    except DecodeError as e:
        raise CheckpointError(f"{path}: not an ONNX file ({_first_line(e)})") from None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
