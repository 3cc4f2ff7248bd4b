"""Which file holds the weights of a name, and what the default is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from utils.checkpoint import CheckpointError
from utils.config import ROOT

WEIGHTS_DIR = ROOT / "weights"
WEIGHTS = {
    name: f"featherface_{name}.pth"
    for name in ("v2_ultra", "v2_ultra_full", "v2", "v1", "v1_compact", "retinaface_mnet025")
}
DEFAULT = "v2_ultra"
PUBLISHED_DIR = ROOT.parent / "shared" / "weights"
PUBLISHED = {"v1": "featherface_v1_published.pth", "retinaface_mnet025": "retinaface_mnet025_published.pth"}
IMAGENET, IMAGENET_FILE = "imagenet", "mobilenetV1X0.25_pretrain.tar"  # of the backbone alone


def find_weights(name_or_path: str | Path) -> Path:
    """The checkpoint file of a name of :data:`WEIGHTS`, or of a path.

    A name is looked up in ``weights/``; the published third-party V1 and RetinaFace files, where this machine has
    them, are converted into a cache file. ``"imagenet"`` is the backbone's published start.

    Raises:
        CheckpointError: no such file; the text says how to get one.
    """
    if name_or_path == IMAGENET:
        for folder in (WEIGHTS_DIR, PUBLISHED_DIR):
            if (folder / IMAGENET_FILE).is_file():
                return folder / IMAGENET_FILE
        raise CheckpointError(
            f"{WEIGHTS_DIR / IMAGENET_FILE}: not there; it is linked from the README of biubug6/Pytorch_Retinaface on "
            "GitHub. Or start from random weights: --opts train.backbone_weights="
        )
    if str(name_or_path) not in WEIGHTS:
        path = Path(name_or_path)
        if not path.suffix and not path.exists():
            raise CheckpointError(f"{name_or_path}: neither a checkpoint file nor one of {', '.join(WEIGHTS)}")
        return path
    name = str(name_or_path)
    path = WEIGHTS_DIR / WEIGHTS[name]
    if path.is_file():
        return path
    published = PUBLISHED_DIR / PUBLISHED.get(name, "")
    if published.is_file():
        return _converted(published, WEIGHTS[name])
    convert = " or convert the published ones (`python -m utils.convert FILE OUT.pth`)" if name in PUBLISHED else ""
    raise CheckpointError(f"{path}: no weights of '{name}' here; train them with configs/{name}.yaml{convert}")


def write_cached(file_name: str, write: Callable[[Path], None]) -> Path:
    """A file in the user's cache folder, or a temporary one if that cannot be written; ``write`` makes it.

    Raises:
        CheckpointError: as raised by ``write`` for both folders.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "featherface" / file_name
    try:
        write(path)
    except CheckpointError:  # a home that cannot be written
        path = Path(tempfile.gettempdir()) / "featherface" / file_name
        write(path)
    return path


def _converted(published: Path, file_name: str) -> Path:
    """Converted each time (a fraction of a second), so that the cache can never be stale."""
    from utils.convert import convert  # needed only on machines with the published files

    return write_cached(file_name, lambda path: convert(published, path))
