"""Two looks at one picture: small faces in an enlarged copy, large ones in the picture itself.

A network knows faces of some sizes better than others, whatever it was trained on. SNIP (Singh & Davis, 2018) therefore
lets each scale of an image pyramid answer for its own range of sizes only, while common multi-scale testing lets every
scale answer for all. Here the ranges are anchor sizes (they overlap a little), and the pyramid is part of the network:
the same weights run twice, and what comes out is one set of anchors, so thresholds, NMS and export stay as they are. A
picture in which the first look sees no small face is not looked at again.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.preprocess import pad_to_stride, padded_size
from layers.anchors import ANCHOR_CACHE, cells, choose_anchors, make_anchors
from models.heads import OUTPUTS
from utils.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from models.detector import Network

SMALL, LARGE = 128, 64  # anchors up to 128 px count in the enlarged picture, from 64 px on in the picture itself
LEAST = 8  # px of the picture: smaller anchors would find what is hardly a face
LEAST_FACTOR, LARGEST_FACTOR = 1.25, 4
SEEN = 0.1  # score above which the first look has seen a small face


class ImagePyramid(nn.Module):
    """A network together with an enlarged second look; takes and returns what a network does, for inference.

    In pictures where an anchor of less than 64 px scores above 0.1 at the first look, anchors of up to 128 px count in
    the enlarged picture, those of 64 px and more in the picture itself. All others have a logit of minus infinity.
    In other pictures the first look alone counts: faces so small that it has no idea of them are not looked for. How
    this was chosen: docs/experiments.md, row 24.

    Args:
        network: our model, or any other :class:`models.detector.Network`.
        factor: how much larger the second look is, 1.25 to 4.
        always: compute the second look even where it does not count, as an exported graph does; the same results.

    Raises:
        ConfigError: ``factor`` is out of range, the network (an exported file) has a second look already, or a level
            other than its finest ones has anchors below 64 px.
    """

    def __init__(self, network: Network | nn.Module, factor: float, always: bool = False):
        super().__init__()
        if getattr(network, "pyramid", 0):
            raise ConfigError("--pyramid: this network has a pyramid inside already")
        self.network, self.pyramid, self.always = network, factor, always
        self.look = EnlargedLook(network.cfg, factor)
        self._anchors = lru_cache(ANCHOR_CACHE)(self.look.anchors)

    @property
    def cfg(self) -> ModelConfig:
        """The network's."""
        return self.network.cfg

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised ``[B, 3, H, W]`` -> ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``, encoded
        against :meth:`anchors`."""
        height, width = images.shape[-2:]
        far = self.network(images)
        finest = self.look.finest(height, width)
        small, large = far["logits"][:, :finest], far["logits"][:, finest:]
        again = torch.sigmoid(small).amax(1, keepdim=True) > SEEN  # [B, 1]
        near = self._look_again(images, again[:, 0], far)
        out = {key: torch.cat([near[key], far[key]], 1) for key in ("boxes", "landmarks")}
        never = torch.full((), -math.inf, device=images.device, dtype=small.dtype)
        logits = torch.where(again, near["logits"], never), torch.where(again, never, small), large
        return {"logits": torch.cat(logits, 1), **out}

    def _look_again(self, images: Tensor, wanted: Tensor, far: dict[str, Tensor]) -> dict[str, Tensor]:
        """The anchors that count of enlarged pictures; zeros, shaped as those ``far``, for those not ``wanted [B]``."""
        if self.always or torch.jit.is_tracing():  # a graph cannot choose
            return self._enlarged(images)
        chosen = wanted.nonzero()[:, 0]
        if len(chosen) == len(images):
            return self._enlarged(images)
        count = len(self.anchors(*images.shape[-2:], images.device)) - far["logits"].shape[1]
        near = {key: far[key].new_zeros(len(images), count, *far[key].shape[2:]) for key in OUTPUTS}
        if len(chosen):
            found = self._enlarged(images[chosen])
            near = {key: near[key].index_copy(0, chosen, found[key]) for key in OUTPUTS}
        return near

    def _enlarged(self, images: Tensor) -> dict[str, Tensor]:
        """The anchors that count of enlarged pictures."""
        size = self.look.size(*images.shape[-2:])
        large = pad_to_stride(F.interpolate(images, size, mode="bilinear", align_corners=False))
        found = self.network(large)
        return {key: self.look.choose(found[key], *large.shape[-2:]) for key in OUTPUTS}

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """``[N, 4]`` cxcywh in pixels of the picture; those of the second look come first."""
        return self._anchors(height, width, str(device))


class EnlargedLook:
    """Sizes and anchors of a pyramid: arithmetic of whole numbers, so that an exported graph can do it for any size.

    Args:
        cfg: of the network.
        factor, errors: as of :class:`ImagePyramid`.
    """

    def __init__(self, cfg: ModelConfig, factor: float):
        check_factor(factor)
        self.cfg = cfg
        self.fine = sum(max(sizes) < LARGE for sizes in cfg.anchors)  # levels
        finer, coarser = cfg.anchors[: self.fine], cfg.anchors[self.fine :]
        if not finer or any(max(sizes) >= LARGE for sizes in finer) or any(min(sizes) < LARGE for sizes in coarser):
            raise ConfigError(
                f"--pyramid: needs a network whose anchors below {LARGE} px are those of its finest levels"
            )
        self.factor = Fraction(factor).limit_denominator(100)
        least = LEAST * self.factor
        # per level, the places of the anchor sizes that count
        self.places = [[i for i, side in enumerate(sizes) if least <= side <= SMALL] for sizes in cfg.anchors]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the enlarged picture."""
        up, down = self.factor.numerator, self.factor.denominator
        return height * up // down, width * up // down

    def finest(self, height: int, width: int) -> int:
        """How many anchors the finest levels of a picture, those with anchors below 64 px, have."""
        levels = zip(self.cfg.strides[: self.fine], self.cfg.anchors)
        return sum(cells(height, stride) * cells(width, stride) * len(sizes) for stride, sizes in levels)

    def choose(self, values: Tensor, height: int, width: int) -> Tensor:
        """Of all anchors' values ``[B, N, ...]`` of an enlarged, padded picture of that size, those that count."""
        return choose_anchors(values, height, width, self.cfg.strides, self.cfg.anchors, self.places)

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """``[N, 4]`` cxcywh in pixels of the picture: those that count of the enlarged one, then all of its own."""
        tall, wide = self.size(height, width)
        padded = padded_size(tall, wide)
        near = make_anchors(*padded, self.cfg.strides, self.cfg.anchors, device)
        back = torch.stack([torch.as_tensor(width) / wide, torch.as_tensor(height) / tall] * 2)
        near = self.choose(near[None], *padded)[0] * back.to(near)
        return torch.cat([near, make_anchors(height, width, self.cfg.strides, self.cfg.anchors, device)])


def check_factor(factor: float) -> None:
    """Raises ConfigError unless a picture can be enlarged by ``factor``."""
    if not LEAST_FACTOR <= factor <= LARGEST_FACTOR:
        raise ConfigError(
            f"a pyramid's factor must be {LEAST_FACTOR} to {LARGEST_FACTOR}, or 0 for none, got {factor:g}"
        )


def network_anchors(
    cfg: ModelConfig, pyramid: float, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Anchors ``[N, 4]`` (cxcywh, pixels) of a network inside a pyramid of that factor, or for 0 of a network alone."""
    if pyramid:
        return EnlargedLook(cfg, pyramid).anchors(height, width, device)
    return make_anchors(height, width, cfg.strides, cfg.anchors, device)
