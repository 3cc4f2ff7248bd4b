"""The detector's public names, imported when first used so that ``import models`` stays cheap."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.detector import FaceDetector as FaceDetector
    from models.featherface import build_model as build_model

__all__ = ["FaceDetector", "build_model"]

_HOMES = {"FaceDetector": "models.detector", "build_model": "models.featherface"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
