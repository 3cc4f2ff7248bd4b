"""How large the network sees a photo: one of a few named sizes, or so many times its original size."""

from __future__ import annotations

from typing import Literal

NamedScale = Literal["auto", "original", "vga", "1600"]
Scale = NamedScale | float
LEAST, LARGEST = 0.1, 8.0  # as a number
RANGE = f"must be between {LEAST:g} and {LARGEST:g}"


def in_range(scale: float) -> bool:
    """Whether a detector takes this number."""
    return LEAST <= scale <= LARGEST  # NaN is not, either


def check_scale(scale: float) -> float:
    """``scale`` as a number, if it is one that a detector takes; ValueError (one line) otherwise."""
    if not in_range(scale):
        raise ValueError(f"scale {RANGE}, got {scale:g}")
    return float(scale)
