"""How large the network sees a photo: one of a few named sizes, or so many times its original size."""

from __future__ import annotations

from typing import Literal

NamedScale = Literal["original", "vga", "1600"]
Scale = Literal["auto"] | NamedScale | float
LEAST, LARGEST = 0.1, 8.0  # as a number


def check_scale(scale: float) -> float:
    """``scale`` as a number, if it is one that a detector takes; ValueError (one line) otherwise."""
    if not LEAST <= scale <= LARGEST:  # NaN is not, either
        raise ValueError(f"scale must be between {LEAST:g} and {LARGEST:g}, got {scale:g}")
    return float(scale)
