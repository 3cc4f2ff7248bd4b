"""Exported networks through onnxruntime, as :class:`models.detector.FaceDetector` takes them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layers.anchors import AnchorCache
from models.image_pyramid import network_anchors, parse_pyramid
from utils.checkpoint import CheckpointError, check_architecture, load_model
from utils.command import NotInstalled
from utils.config import ConfigError, ModelConfig, from_dict
from utils.onnx_export import FEATURES, FORMAT, METADATA, OUTPUTS, ExportError, describe, export_raw, write
from utils.weights import write_cached

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

log = logging.getLogger("featherface")

EXPORTING = threading.Lock()  # torch.onnx.export keeps its state in the module
CACHE_VERSION = 3  # raise it when exported graphs change: files in users' caches are then made anew


class OnnxNetwork:
    """A raw-form file of ``export.py``, computing on the CPU.

    Args:
        path: the ``.onnx`` file.
        threads: of onnxruntime; 0 = as many as PyTorch uses (``torch.set_num_threads``, ``OMP_NUM_THREADS``).

    Raises:
        CheckpointError: unreadable, not ours, of the end-to-end form, or beyond this onnxruntime.
        NotInstalled: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, threads: int = 0):
        self.path, self.threads = path, threads
        self.session = open_session(path, threads)
        self.info = read_info(self.session, path)
        if self.info["form"] != "raw":
            raise CheckpointError(f"{path}: has NMS inside; detection here needs the raw form (export.py --form raw)")
        try:
            self.cfg = from_dict(ModelConfig, self.info["model"], str(path), "model.")
            self.pyramid = parse_pyramid(self.info.get("pyramid"))
        except (KeyError, ConfigError) as e:
            raise CheckpointError(f"{path}: its architecture cannot be read: {e}") from None
        self.name = self.info["name"]
        self.anchors = AnchorCache(partial(network_anchors, self.cfg, self.pyramid))

    def __reduce__(self) -> tuple:
        """A copy (for another process) opens the file anew: sessions of onnxruntime cannot be copied."""
        return type(self), (self.path, self.threads)

    @property
    def has_features(self) -> bool:
        """Whether it was exported with its neck's features (``export.py --features``)."""
        return {o.name for o in self.session.get_outputs()} >= set(FEATURES)

    def __call__(self, images: Tensor, features: bool = False) -> dict[str, Tensor]:
        """Normalised images ``[B, 3, H, W]`` -> ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``; with
        ``features`` also the three ``[B, C, h, w]`` of :data:`~utils.onnx_export.FEATURES`."""
        return run(self.session, images, (*OUTPUTS, *FEATURES) if features else OUTPUTS)


def load_network(path: Path, expect: ModelConfig | None = None, expect_name: str = "config") -> OnnxNetwork:
    """The network of an ``.onnx`` file, or of a checkpoint, which is then exported.

    The export of a checkpoint is the ``.onnx`` file of the same name beside it if that was made from it, else a file
    in the user's cache, made on first use.

    Args:
        expect, expect_name: the architecture asked for, and what to call it in an error; None = any.

    Raises:
        CheckpointError: as :class:`OnnxNetwork` and :func:`utils.checkpoint.load_model`, or another architecture.
        NotInstalled: onnxruntime or onnx is not installed.
    """
    network = OnnxNetwork(path) if path.suffix == ".onnx" else _exported(path)
    check_architecture(path, network.name, network.cfg, expect, expect_name)
    return network


def open_session(path: str | Path, threads: int = 0, content: bytes | None = None) -> InferenceSession:
    """An onnxruntime CPU session of an ONNX file, or of ``content`` made from it; errors and ``threads`` as of
    :class:`OnnxNetwork`."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: its warnings are about its own optimiser
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return ort.InferenceSession(content or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has no common base class of its errors
        text = " ".join(str(e).split())
        if "DeformConv" in text:
            text = "no CPU kernel for DeformConv, V1's deformable convolutions; update onnxruntime or use PyTorch"
        raise CheckpointError(f"{path}: onnxruntime {ort.__version__} cannot run it: {text}") from None


def run(session: InferenceSession, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """The named outputs of a raw-form session for normalised images ``[B, 3, H, W]``."""
    values = session.run(list(outputs), {"images": images.cpu().contiguous().numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(outputs, values)}


def part_of_graph(path: str | Path, outputs: Sequence[str]) -> bytes:
    """The part of an ONNX file between its images and ``outputs``: onnxruntime runs a graph always as a whole.

    Raises:
        NotInstalled: onnx is not installed.
    """
    try:
        import onnx
        from onnx.utils import Extractor
    except ImportError:
        raise NotInstalled("onnx is not installed: `pip install onnx`") from None
    return Extractor(onnx.load(path)).extract_model(["images"], list(outputs)).SerializeToString()


def read_info(session: InferenceSession, path: str | Path) -> dict[str, Any]:
    """What ``export.py`` stored in a file: ``name``, ``model``, ``form``, ``precision``, ... Raises CheckpointError."""
    try:
        info = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
        if info["format"] != FORMAT:
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(f"{path}: not made by export.py, so its anchors are unknown") from None
    return info


def import_onnxruntime() -> Any:
    """The module, without its usage statistics. Raises NotInstalled."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import; else it looks for Microsoft's servers
    try:
        import onnxruntime
    except ImportError:
        raise NotInstalled("onnxruntime is not installed: `pip install onnx onnxruntime`") from None
    return onnxruntime


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a checkpoint file. Raises CheckpointError."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot read the checkpoint ({e.strerror or e})") from None


def _exported(path: Path) -> OnnxNetwork:
    import_onnxruntime()  # before the work of exporting
    source = fingerprint(path)
    beside = path.with_suffix(".onnx")
    if beside.is_file():
        try:
            network = OnnxNetwork(beside)
        except CheckpointError as e:
            log.warning("%s; exporting %s anew", e, path)
        else:
            if network.info.get("source") == source and not network.pyramid:
                return network

    def make(target: Path) -> None:
        if target.is_file():
            return
        model, info = load_model(path)
        try:
            proto = export_raw(model)
            describe(proto, model.cfg, info["name"], form="raw", precision="fp32", source=source)
            write(target, proto.SerializeToString())
        except ExportError as e:
            raise CheckpointError(f"{path}: cannot be exported: {e}") from None

    with EXPORTING:
        target = write_cached(f"{path.stem}-{source[:12]}-{CACHE_VERSION}.onnx", make)
    return OnnxNetwork(target)
