"""torch.hub entry points.

detector = torch.hub.load("OWNER/featherface", "detector")                # boxes, scores, landmarks of a picture
network = torch.hub.load("OWNER/featherface", "featherface", "v2_ultra")  # the bare nn.Module
"""

import sys as _sys
from typing import Any

try:
    from models.detector import FaceDetector as _FaceDetector
    from models.detector import pick_device as _pick_device
    from models.featherface import FeatherFace as _FeatherFace
    from models.featherface import build_model as _build_model
    from utils.checkpoint import load_model as _load_model
    from utils.config import load_config as _load_config
    from utils.weights import find_weights as _find_weights
except ImportError as e:
    _package = str(e.name).partition(".")[0]
    if _package not in ("data", "layers", "models", "utils", "widerface_evaluate") or _package not in _sys.modules:
        raise
    _other = getattr(_sys.modules[_package], "__file__", None) or _package
    raise ImportError(
        f"FeatherFace has a package '{_package}' too, and {_other} hides it: use another process"
    ) from None

dependencies = ["torch", "torchvision", "numpy", "PIL", "cv2", "yaml"]


def featherface(name: str = "v2_ultra", pretrained: bool = True, device: str = "cpu") -> _FeatherFace:
    """The network of ``configs/<name>.yaml`` in eval mode, with its trained weights unless ``pretrained`` is False."""
    place = _pick_device(device)
    if pretrained:
        return _load_model(_find_weights(name), place)[0]
    return _build_model(_load_config(name).model).to(place).eval()


def detector(name: str | None = None, **options: Any) -> _FaceDetector:
    """A ready face detector; ``options`` as of ``FaceDetector.from_pretrained`` (device, score_threshold, ...)."""
    return _FaceDetector.from_pretrained(name, **options)
