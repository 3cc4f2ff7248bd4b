"""Who takes part in benchmark.py: our models on each runtime, and the peers; how to load them and how good they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from data.preprocess import normalise, pad_to_stride
from layers.anchors import AnchorCache
from models.detector import FaceDetector, Network
from models.featherface import build_model
from models.fuse import fuse_for_inference
from models.image_pyramid import Factors, ImagePyramid, network_anchors
from models.summary import count_macs
from utils.benchmark import Row, one_line
from utils.checkpoint import load_model
from utils.config import ConfigError, ModelConfig, load_config
from utils.onnx_backend import OnnxNetwork, fingerprint
from utils.onnx_export import OUTPUTS, ExportError, describe, export_raw, write
from utils.peers import PEERS, OnnxPeer, OpenCVYuNet, find_peers, load_peer, onnx_counts
from utils.weights import find_weights
from widerface_evaluate import GroundTruth, evaluate, image_key, write_predictions
from widerface_evaluate.images import detect_images
from widerface_evaluate.predictions import take_over, to_xywh

BACKENDS = ("torch", "onnx", "opencv")
RUNTIMES = {"torch": "PyTorch", "onnx": "onnxruntime", "opencv": "OpenCV"}  # names in the table
RANDOM = "config:"  # prefix of a model without weights, for speed only
SCORE, NMS = 0.02, 0.4  # the evaluation's thresholds
TOLERANCE = 0.01  # of scores between runtimes
PYRAMID = re.compile(r"(.+)@([\d.+]+)")  # a model that looks twice: v2_ultra@1.5


class OurRunner:
    """One of our networks, to be timed alone and as a :class:`models.FaceDetector`."""

    def __init__(self, network: Network):
        self.detector = FaceDetector(network, "cpu", batch_size=256)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """RGB uint8 ``[H, W, 3]`` of one size -> network input ``[B, 3, H', W']``, padded to the stride."""
        x = normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        return pad_to_stride(x).contiguous()

    def network(self, x: Tensor) -> dict[str, Tensor]:
        """Raw outputs of a prepared batch."""
        with torch.inference_mode():
            return self.detector.network(x)

    def __call__(
        self, image: Any, score: float = 0.5, nms: float = 0.4, scale: str = "original", **options: Any
    ) -> Any:
        """As :meth:`models.FaceDetector.__call__`."""
        return self.detector(image, score, nms, scale, **options)


class OpenCVNetwork:
    """One of our exported networks (raw form) in OpenCV's DNN module, as :class:`FaceDetector` takes it."""

    def __init__(self, path: str | Path, cfg: ModelConfig, pyramid: Factors | None = None):
        self.cfg = cfg
        try:
            self.net = cv2.dnn.readNetFromONNX(str(path))
        except cv2.error as e:
            why = "no DeformConv, V1's deformable convolutions" if has_operator(path, "DeformConv") else one_line(e)
            raise RuntimeError(f"OpenCV {cv2.__version__} cannot load it: {why}") from None
        self.anchors = AnchorCache(partial(network_anchors, cfg, pyramid))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images ``[B, 3, H, W]`` -> ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``."""
        self.net.setInput(images.numpy())
        return {k: torch.from_numpy(v) for k, v in zip(OUTPUTS, self.net.forward(list(OUTPUTS)))}


@dataclass(frozen=True)
class OurLoader:
    """Loads one of our models; ``weights`` None = random ones, ``onnx`` = its export, for the other runtimes."""

    cfg: ModelConfig
    weights: Path | None
    backend: str
    onnx: Path | None
    pyramid: Factors | None = None

    @property
    def source(self) -> Path:
        """The file that decides what it predicts."""
        return self.weights or self.onnx

    def __call__(self, threads: int) -> OurRunner:
        set_threads(threads)
        if self.backend == "torch":
            model = load_model(self.weights)[0] if self.weights else random_model(self.cfg)
            network = fuse_for_inference(model).to(memory_format=torch.channels_last)
            return OurRunner(ImagePyramid(network, self.pyramid, always=True) if self.pyramid else network)
        if self.backend == "onnx":
            return OurRunner(OnnxNetwork(self.onnx, threads))
        return OurRunner(OpenCVNetwork(self.onnx, self.cfg, self.pyramid))


@dataclass(frozen=True)
class PeerLoader:
    """Loads a peer of :data:`utils.peers.PEERS`."""

    name: str
    folder: Path

    @property
    def source(self) -> Path:
        """Its file."""
        return self.folder / PEERS[self.name].file

    def __call__(self, threads: int) -> OnnxPeer | OpenCVYuNet:
        set_threads(threads)
        return load_peer(self.name, self.folder, threads)


def set_threads(threads: int) -> None:
    """Set the threads of this process's PyTorch and OpenCV (onnxruntime's are set per session); quiet OpenCV."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # failures raise anyway


def has_operator(path: str | Path, name: str) -> bool:
    """Whether an ONNX file uses an operator."""
    import onnx

    return any(node.op_type == name for node in onnx.load(path, load_external_data=False).graph.node)


def random_model(cfg: ModelConfig) -> torch.nn.Module:
    """An untrained network in eval mode, always the same: right for times, useless for faces.

    Its batch norms have seen noise, so that activations are of ordinary size.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(cfg)
        update_bn([torch.randint(-120, 130, (2, 3, 128, 128)).float()], model)
    return model.eval()


def verify(rows: Sequence[Row], image: np.ndarray) -> None:
    """Check that our models compute the same on every runtime; one that does not is not timed.

    Scores of all anchors on a picture ``[H, W, 3]`` are compared with those of the model's PyTorch row, or else with
    its first that runs.
    """
    expected: dict[str, tuple[str, Tensor]] = {}
    for row in sorted((r for r in rows if r.ours and r.load), key=lambda r: r.backend != RUNTIMES["torch"]):
        try:
            runner = row.load(1)
            scores = runner.network(runner.prepare([image]))["logits"].sigmoid()
        except Exception as e:  # whatever goes wrong in one contender, the others are still of interest
            row.problems.append(one_line(e))
            row.load = None
            continue
        backend, reference = expected.setdefault(row.model, (row.backend, scores))
        worst = float((scores - reference).abs().max())
        if not worst <= TOLERANCE:  # also when NaN
            row.problems.append(f"wrong results: scores differ from {backend}'s by up to {worst:.2g}")
            row.load = None


def our_rows(name: str, backends: Sequence[str], size: tuple[int, int], exports: str | Path) -> list[Row]:
    """The rows of one of our models, one per runtime.

    Args:
        name: of ``utils.weights.WEIGHTS``, a checkpoint, an ``.onnx`` file of export.py, or ``config:NAME`` for random
            weights; ``NAME@1.5`` or ``NAME@0.75+1.2`` = with that pyramid (not for ``.onnx`` files).
        size: (width, height) in pixels, for the multiply-adds.
        exports: folder for exported files, which must live as long as the rows.

    Raises:
        CheckpointError, ConfigError: no such model, or unreadable.
    """
    weights = onnx = None
    pyramid = None
    if match := PYRAMID.fullmatch(name):
        name, pyramid = match[1], Factors.parse(match[2])
    if name.startswith(RANDOM):
        config = load_config(name.removeprefix(RANDOM))
        cfg, title = config.model, f"{config.name} (random)"
        model = random_model(cfg)
    elif name.endswith(".onnx"):
        onnx = Path(name)
        if pyramid:
            raise ConfigError(f"{name}: is exported already; export it with --pyramid {pyramid} instead")
        network = OnnxNetwork(onnx)
        cfg, title, pyramid = network.cfg, name, network.pyramid
        model = random_model(cfg)
        backends = [b for b in backends if b != "torch"]
        if not backends:
            raise ConfigError(f"{name}: an exported file runs on onnx or opencv (--backends), not on torch")
    else:
        weights = find_weights(name)
        model, _ = load_model(weights)
        cfg, title = model.cfg, name.removesuffix(".pth")
    if pyramid:
        model, title = ImagePyramid(model, pyramid, always=True), f"{title}, pyramid {pyramid}"
    parameters, macs = sum(p.numel() for p in model.parameters()), sum(count_macs(model, size).values())
    problem = ""
    if onnx is None and set(backends) - {"torch"}:
        onnx = Path(exports) / f"{len(list(Path(exports).iterdir()))}.onnx"
        try:
            proto = export_raw(model)
            describe(proto, cfg, title, form="raw", precision="fp32", pyramid=str(pyramid or ""))
            write(onnx, proto.SerializeToString())
        except ExportError as e:
            problem = one_line(e)
    rows = [
        Row(title, RUNTIMES[b], True, OurLoader(cfg, weights, b, onnx, pyramid), parameters, macs) for b in backends
    ]
    for row in rows:
        if problem and row.backend != RUNTIMES["torch"]:
            row.problems.append(problem)
            row.load = None
    return rows


def peer_rows(folder: str | Path, size: tuple[int, int]) -> list[Row]:
    """The rows of all peers whose files are in the folder. Raises CheckpointError."""
    rows = []
    for name in find_peers(folder):
        peer = PEERS[name]
        parameters, macs = onnx_counts(Path(folder) / peer.file, size)
        loader = PeerLoader(name, Path(folder))
        rows.append(Row(peer.title, RUNTIMES[peer.build.backend], False, loader, parameters, macs))
    return rows


def average_precision(
    row: Row, folder: str | Path, truth: GroundTruth, out: str | Path | None = None, resume: bool = False
) -> dict[str, float]:
    """Easy, medium and hard AP of a contender at original scale, score 0.02, NMS 0.4.

    Args:
        folder: of ``<event>/<name>.jpg``.
        truth: the images to use and their faces.
        out: also write the predictions there, in WIDERFace's text format.
        resume: take over the predictions that are there already.

    Raises:
        EvaluationError: images missing or unreadable, or predictions that cannot be written, read or taken over.
    """
    preds = take_over(out, truth.names, {"weights": fingerprint(row.load.source)}, resume) if out else {}
    todo = [k for k in truth.names if k not in preds]
    runner = row.load(torch.get_num_threads()) if todo else None
    for name, faces in detect_images(runner, folder, todo, SCORE, NMS):
        preds[image_key(name)] = to_xywh(faces)
        if out:
            write_predictions(out, name, faces.boxes, faces.scores)
    result = evaluate(preds, truth)
    return {subset: result[subset] for subset in ("easy", "medium", "hard")}
