"""Two looks at one picture: small faces in an enlarged copy, large ones in the picture itself.

A network knows faces of some sizes better than others, whatever it was trained on. SNIP (Singh & Davis, 2018) therefore
lets each scale of an image pyramid answer for its own range of sizes only, while common multi-scale testing lets every
scale answer for all. Here the ranges are anchor sizes, and the pyramid is part of the network: the same weights run
twice, and what comes out is one set of anchors, so thresholds, NMS and export stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.anchors import cells, make_anchors
from utils.config import ModelConfig

if TYPE_CHECKING:
    from models.detector import Network

SMALL, LARGE = 128, 64  # anchors up to 128 px count in the enlarged picture, from 64 px on in the picture itself
LEAST = 8  # px of the picture: smaller anchors would find what is hardly a face
LARGEST = 4  # factor


class ImagePyramid(nn.Module):
    """A network together with an enlarged second look; takes and returns what a network does, for inference.

    The anchors of the enlarged picture come first, by level, row, column and size: those of up to 128 px there and at
    least 8 px in the picture; then those of 64 px and more of the picture itself. Which share gave the best AP on
    ``train_select`` is in docs/experiments.md, row 24.

    Args:
        network: our model, or any other :class:`models.detector.Network`.
        factor: how much larger the second look is, above 1 and up to 4.

    Raises:
        ValueError: ``factor`` is out of range, or the network (an exported file) has a second look already.
    """

    def __init__(self, network: Network | nn.Module, factor: float):
        super().__init__()
        if getattr(network, "pyramid", 0):
            raise ValueError("this network has a pyramid inside already")
        self.network = network
        self.looks = looks_of(network.cfg, factor)

    @property
    def cfg(self) -> ModelConfig:
        """The network's."""
        return self.network.cfg

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised ``[B, 3, H, W]`` -> ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``, encoded
        against :meth:`anchors`."""
        parts = []
        for look in self.looks:
            size = look.size(*images.shape[-2:])
            seen = images if look.factor == 1 else F.interpolate(images, size, mode="bilinear", align_corners=False)
            out = self.network(seen)
            parts.append({key: look.choose(out[key], self.cfg, *size) for key in ("logits", "boxes", "landmarks")})
        return {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """``[N, 4]`` cxcywh in pixels of the picture."""
        return pyramid_anchors(self.looks, self.cfg, height, width, device)


class Look:
    """The picture at one size, and the anchors that count there.

    Args:
        factor: of the picture's size.
        places: per level, the places of its anchor sizes that count.
    """

    def __init__(self, factor: Fraction, places: Sequence[list[int]]):
        self.factor, self.places = factor, tuple(places)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the network sees; whole numbers all along, so that an exported graph can do it."""
        up, down = self.factor.numerator, self.factor.denominator
        return height * up // down, width * up // down

    def choose(self, values: Tensor, cfg: ModelConfig, height: int, width: int) -> Tensor:
        """Of all anchors' values ``[B, N, ...]`` of a picture of that size, those that count."""
        kept, start = [], 0
        for stride, sizes, places in zip(cfg.strides, cfg.anchors, self.places):
            end = start + cells(height, stride) * cells(width, stride) * len(sizes)
            if places:
                level = values[:, start:end].unflatten(1, (-1, len(sizes)))
                kept.append(level[:, :, places].flatten(1, 2))
            start = end
        return torch.cat(kept, 1)


def looks_of(cfg: ModelConfig, factor: float) -> tuple[Look, ...]:
    """The enlarged look and the plain one of a network; none for ``factor`` 0.

    Raises:
        ValueError: ``factor`` is neither 0 nor above 1 and up to :data:`LARGEST`.
    """
    if factor == 0:
        return ()
    if not 1 < factor <= LARGEST:
        raise ValueError(f"pyramid must be above 1 and at most {LARGEST}, or 0 for none, got {factor:g}")
    exact = Fraction(factor).limit_denominator(100)

    def places(least: float, most: float) -> list[list[int]]:
        return [[i for i, size in enumerate(sizes) if least <= size <= most] for sizes in cfg.anchors]

    return Look(exact, places(LEAST * factor, SMALL)), Look(Fraction(1), places(LARGE, math.inf))


def pyramid_anchors(
    looks: Sequence[Look], cfg: ModelConfig, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Anchors ``[N, 4]`` (cxcywh, pixels of the picture) of all looks at a picture, or without any of the network."""
    if not looks:
        return make_anchors(height, width, cfg.strides, cfg.anchors, device)
    parts = []
    for look in looks:
        tall, wide = look.size(height, width)
        anchors = make_anchors(tall, wide, cfg.strides, cfg.anchors, device)[None]
        anchors = look.choose(anchors, cfg, tall, wide)[0]
        back = torch.stack([torch.as_tensor(width) / wide, torch.as_tensor(height) / tall] * 2)
        parts.append(anchors * back.to(anchors))
    return torch.cat(parts)
