"""Teachers from ONNX files: exported networks of ours, and other people's detectors.

onnxruntime runs them, on the CPU; where the student is on a GPU, SCRFD runs there too, in PyTorch. On a CPU V1 answers
several times as fast this way as in PyTorch, whose deformable convolution is slow there. They give predictions, and
exports made with ``--features`` the neck's features too, for the terms ``feature`` and ``attention``; no attention
maps, so ``feature_attention`` is without effect and ``attention`` is about the features alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.preprocess import MEAN_BGR, denormalise
from layers.anchors import anchors_of, encode_boxes, encode_landmarks
from utils.checkpoint import CheckpointError
from utils.config import ModelConfig
from utils.onnx_backend import OnnxNetwork, open_session, part_of_graph, run
from utils.onnx_export import FEATURES
from utils.peers import PEERS, SCRFD, OnnxPeer, Raw, double_resizes

# Anchors that a peer's predictions are encoded against: as many per cell as it has outputs there.
ANCHORS = {
    "scrfd_2.5g": [[16, 32], [64, 128], [256, 512]],
    "retinaface_mbnet0.25": [[16, 32], [64, 128], [256, 512]],
    "yunet_n": [[16], [64], [256]],
    "yunet_s": [[16], [64], [256]],
}
PEER_OF_FILE = {PEERS[name].file: name for name in ANCHORS}


class OnnxTeacher(nn.Module):
    """An exported network of ours (``export.py --form raw``) that is called like the network itself.

    Errors are those of :class:`utils.onnx_backend.OnnxNetwork`, and CheckpointError for a file with a pyramid.
    """

    per_size = True

    def __init__(self, path: str | Path):
        super().__init__()
        self.network = OnnxNetwork(path)
        if self.network.pyramid:
            raise CheckpointError(f"{path}: has a pyramid inside; a teacher is exported without --pyramid")
        self.cfg, self.name, self.has_features = self.network.cfg, self.network.name, self.network.has_features
        self.neck = open_session(path, content=part_of_graph(path, FEATURES)) if self.has_features else None

    def forward(self, images: Tensor, features: bool = False) -> dict[str, Any]:
        """Normalised images ``[B, 3, H, W]`` -> ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``; with
        ``features`` also ``neck``, a list of three ``[B, C, h, w]``."""
        out = _to_device(self.network(images.float(), features), images)
        return out | ({"neck": [out.pop(name) for name in FEATURES]} if features else {})

    def neck_features(self, images: Tensor) -> dict[str, Any]:
        """``neck`` alone, without computing what comes after it."""
        out = _to_device(run(self.neck, images.float(), FEATURES), images)
        return {"neck": [out[name] for name in FEATURES]}


class PeerTeacher(nn.Module):
    """Another detector with landmarks, whose predictions are encoded against anchors as those of our networks are.

    Args:
        name: a key of :data:`ANCHORS`.
        path: its ONNX file.
        device: of the student. On a GPU, SCRFD runs there too.

    Raises:
        CheckpointError: it cannot be loaded.
    """

    has_features = False

    def __init__(self, name: str, path: str | Path, device: torch.device):
        super().__init__()
        self.peer: OnnxPeer = PEERS[name].build(path, torch.get_num_threads())
        self.cfg, self.name = ModelConfig(anchors=ANCHORS[name]), name
        self.per_size = not name.startswith("yunet")
        self.on_gpu: nn.Module | None = None
        if device.type == "cuda" and isinstance(self.peer, SCRFD):
            self.on_gpu = scrfd_module(path).to(device, memory_format=torch.channels_last)
        self.anchors = anchors_of(self.cfg)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """As :meth:`OnnxTeacher.forward`; images are those that our networks take."""
        peer = self.peer
        if self.on_gpu is not None:
            raw = scrfd_raw(self.on_gpu, images)
        else:
            pixels = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()  # RGB uint8, what peers prepare themselves
            raw = peer.split(peer.network(peer.prepare(pixels)), len(images))
        place = (*images.shape[-2:], raw.boxes.device)
        boxes, landmarks = peer.decode(raw.boxes, raw.landmarks, peer.known_priors(*place))
        anchors = self.anchors(*place)
        out = {
            "logits": torch.logit(raw.scores, eps=1e-6),
            "boxes": encode_boxes(boxes, anchors, self.cfg.variances),
            "landmarks": encode_landmarks(landmarks, anchors, self.cfg.variances),
        }
        return _to_device(out, images)


def scrfd_module(path: str | Path) -> nn.Module:
    """SCRFD's ONNX file as a PyTorch network (by onnx2torch) that makes a GPU wait only before its two upsamplings.

    Input ``[B, 3, H, W]``, sides divisible by 32, to the nine maps ``[B, h, w, 2 k]`` before the file's own reshaping:
    face logits, boxes and landmarks of three levels. What the file computes from sizes is left out: its two nearest
    upsamplings double.

    Raises:
        CheckpointError: onnx or onnx2torch is not installed.
    """
    try:
        import onnx
        from onnx2torch import convert
    except ImportError as e:
        raise CheckpointError(f"{path}: as a teacher on a GPU it needs `pip install onnx onnx2torch` ({e})") from None
    model = onnx.load(path)
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    maps = []
    for output in graph.output:
        node = made_by[output.name]
        while node.op_type != "Reshape":
            node = made_by[node.input[0]]
        maps.append(node.input[0])
    double_resizes(graph)
    needed, nodes = set(maps), []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        needed.update(node.input)
        nodes.insert(0, node)
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in maps]
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    graph.output.extend(outputs)
    return convert(model).eval().requires_grad_(False)


def scrfd_raw(network: nn.Module, images: Tensor) -> Raw:
    """Normalised images ``[B, 3, H, W]`` through :func:`scrfd_module`, as the peer's own ``split`` gives them."""
    mean = torch.tensor(MEAN_BGR[::-1]).to(images.device, non_blocking=True).view(3, 1, 1)
    rgb = images.flip(1) + mean
    maps = network((rgb - SCRFD.mean[0]) * SCRFD.scale)
    levels = [x.float().flatten(1).unflatten(1, (-1, k)) for x, k in zip(maps, [1] * 3 + [4] * 3 + [10] * 3)]
    logits, boxes, landmarks = (torch.cat(levels[i : i + 3], 1) for i in (0, 3, 6))
    return Raw(logits.squeeze(-1).sigmoid(), boxes, landmarks)


def _to_device(out: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    return {name: value.to(images.device) for name, value in out.items()}


def load_onnx(path: Path, device: torch.device) -> OnnxTeacher | PeerTeacher:
    """The teacher of an ``.onnx`` file: a peer by its file name, anything else must be an export of ours.

    Raises:
        CheckpointError: it cannot be loaded, or what runs it on ``device`` is not installed.
    """
    name = PEER_OF_FILE.get(path.name)
    try:
        return OnnxTeacher(path) if name is None else PeerTeacher(name, path, device)
    except ImportError as e:
        raise CheckpointError(f"{path}: {e}") from None
