"""Teachers that onnxruntime runs, on the CPU: exported networks of ours, and other people's detectors.

On a CPU V1 answers several times as fast this way as in PyTorch, whose deformable convolution is slow there. They give
predictions, and exports made with ``--features`` the neck's features too, for the terms ``feature`` and ``attention``;
no attention maps, so ``feature_attention`` is without effect and ``attention`` is about the features alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.preprocess import denormalise
from layers.anchors import encode_boxes, encode_landmarks, make_anchors
from utils.checkpoint import CheckpointError
from utils.config import ModelConfig
from utils.onnx_backend import OnnxNetwork, open_session, run
from utils.onnx_export import FEATURES
from utils.peers import PEERS, OnnxPeer, PeerError

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

    Errors are those of :class:`utils.onnx_backend.OnnxNetwork`.
    """

    per_size = True

    def __init__(self, path: str | Path):
        super().__init__()
        self.network = OnnxNetwork(path)
        self.cfg, self.name, self.has_features = self.network.cfg, self.network.name, self.network.has_features
        self.neck = open_session(path, outputs=FEATURES) if self.has_features else None

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

    Raises:
        PeerError: it cannot be loaded.
    """

    has_features = False

    def __init__(self, name: str, path: str | Path):
        super().__init__()
        self.peer: OnnxPeer = PEERS[name].build(path, torch.get_num_threads())
        self.cfg, self.name = ModelConfig(anchors=ANCHORS[name]), name
        self.per_size = not name.startswith("yunet")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """As :meth:`OnnxTeacher.forward`; images are those that our networks take."""
        peer, size = self.peer, images.shape[-2:]
        pixels = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()  # RGB uint8, what peers prepare themselves
        raw = peer.split(peer.network(peer.prepare(pixels)), len(images))
        priors, anchors = peer.priors(*size), make_anchors(*size, self.cfg.strides, self.cfg.anchors)
        boxes, landmarks = zip(*(peer.decode(b, p, priors) for b, p in zip(raw.boxes, raw.landmarks)))
        out = {
            "logits": torch.logit(raw.scores, eps=1e-6),
            "boxes": encode_boxes(torch.stack(boxes), anchors, self.cfg.variances),
            "landmarks": encode_landmarks(torch.stack(landmarks), anchors, self.cfg.variances),
        }
        return _to_device(out, images)


def _to_device(out: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    return {name: value.to(images.device) for name, value in out.items()}


def load_onnx(path: Path) -> OnnxTeacher | PeerTeacher:
    """The teacher of an ``.onnx`` file: a peer by its file name, anything else must be an export of ours.

    Raises:
        CheckpointError: it cannot be loaded, or onnxruntime is not installed.
    """
    name = PEER_OF_FILE.get(path.name)
    try:
        return OnnxTeacher(path) if name is None else PeerTeacher(name, path)
    except (PeerError, ImportError) as e:
        raise CheckpointError(str(e) if str(path) in str(e) else f"{path}: {e}") from None
