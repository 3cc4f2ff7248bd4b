"""Two looks at one picture with the same weights: small faces in a larger copy than large ones.

A network knows faces of some sizes better than others, whatever it was trained on. SNIP (Singh & Davis, 2018) therefore
lets each scale of an image pyramid answer for its own range of sizes only, while common multi-scale testing lets every
scale answer for all. Here the ranges are anchor sizes (while the second look is at most twice the first they meet or
overlap), and the pyramid is part of the network: the same weights run twice, and what comes out is one set of anchors,
so thresholds, NMS and export stay as they are. A picture in which the first look sees no small face is not looked at
again.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.preprocess import pad_to_stride, padded_size
from layers.anchors import AnchorCache, cells, make_anchors
from models.heads import OUTPUTS
from utils.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from models.detector import Network

SMALL, LARGE = 128, 64  # anchors up to 128 px count in the second look, from 64 px on in the first
LEAST = 8  # px of the picture: smaller anchors would find what is hardly a face
LEAST_FIRST, LEAST_SECOND, LARGEST_SECOND = 0.5, 1.2, 4
SEEN = 0.1  # score above which the first look has seen a small face


class Factors(NamedTuple):
    """How large the two looks are, relative to the picture; as text ``0.75+1.2``, or ``1.5`` if the first is 1."""

    first: float
    second: float

    @classmethod
    def parse(cls, value: str | float | tuple[float, float]) -> Factors:
        """From text, the second look's as a number, or both. Hundredths count, so that text says all there is.

        Raises:
            ConfigError: they are not in range.
        """
        try:
            numbers = value if isinstance(value, tuple) else str(value).split("+")
            *first, second = [round(float(v), 2) for v in numbers]
        except (TypeError, ValueError):
            first, second = [], math.nan
        first = first or [1.0]
        if len(first) > 1 or not (LEAST_FIRST <= first[0] <= 1 and LEAST_SECOND <= second <= LARGEST_SECOND):
            raise ConfigError(
                f"a pyramid must be a factor of {LEAST_SECOND} to {LARGEST_SECOND}, as 1.5, or two, the first of "
                f"{LEAST_FIRST} to 1, as 0.75+1.2, got '{value}'"
            )
        return cls(*first, second)

    def __str__(self) -> str:
        return f"{self.second:g}" if self.first == 1 else f"{self.first:g}+{self.second:g}"


def parse_pyramid(value: str | float | tuple[float, float] | None) -> Factors | None:
    """:meth:`Factors.parse`, or None for nothing or zero, however it is written."""
    try:
        if not value or float(value) == 0:
            return None
    except (TypeError, ValueError):  # no number alone
        pass
    return Factors.parse(value)


class ImagePyramid(nn.Module):
    """A network together with a larger second look; takes and returns what a network does, for inference.

    In pictures where an anchor of less than 64 px scores above 0.1 at the first look, anchors of up to 128 px count in
    the second look, those of 64 px and more in the first. All others have a logit of minus infinity. In other pictures
    the first look alone counts: faces so small that it has no idea of them are not looked for, the more of them the
    smaller it is. How this was chosen: docs/experiments.md, rows 24 and 26.

    Args:
        network: our model, or any other :class:`models.detector.Network`.
        pyramid: what :meth:`Factors.parse` takes.
        always: compute the second look even where it does not count, as an exported graph does; the same results.

    Raises:
        ConfigError: ``pyramid`` is out of range, the network (an exported file) has a second look already, or a level
            other than its finest ones has anchors below 64 px.
    """

    def __init__(self, network: Network | nn.Module, pyramid: str | float | tuple[float, float], always: bool = False):
        super().__init__()
        if getattr(network, "pyramid", None):
            raise ConfigError("--pyramid: this network has a pyramid inside already")
        self.network, self.pyramid, self.always = network, Factors.parse(pyramid), always
        self.looks = Looks(network.cfg, self.pyramid)
        self._anchors = AnchorCache(self.looks.anchors)

    @property
    def cfg(self) -> ModelConfig:
        """The network's."""
        return self.network.cfg

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised ``[B, 3, H, W]`` -> ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``, encoded
        against :meth:`anchors`."""
        view = self.looks.first.view(images)
        far = self.network(view)
        finest = self.looks.finest(*view.shape[-2:])
        small, large = far["logits"][:, :finest], far["logits"][:, finest:]
        again = torch.sigmoid(small).amax(1, keepdim=True) > SEEN  # [B, 1]
        near = self._look_again(images, again[:, 0], far)
        out = {key: torch.cat([near[key], far[key]], 1) for key in ("boxes", "landmarks")}
        never = torch.full((), -math.inf, device=images.device, dtype=small.dtype)
        logits = torch.where(again, near["logits"], never), torch.where(again, never, small), large
        return {"logits": torch.cat(logits, 1), **out}

    def _look_again(self, images: Tensor, wanted: Tensor, far: dict[str, Tensor]) -> dict[str, Tensor]:
        """The anchors that count of the second look; zeros, shaped as those ``far``, for those not ``wanted [B]``."""
        if self.always or torch.jit.is_tracing():  # a graph cannot choose
            return self._second(images)
        chosen = wanted.nonzero()[:, 0]
        if len(chosen) == len(images):
            return self._second(images)
        count = len(self.anchors(*images.shape[-2:], images.device)) - far["logits"].shape[1]
        near = {key: far[key].new_zeros(len(images), count, *far[key].shape[2:]) for key in OUTPUTS}
        if len(chosen):
            found = self._second(images[chosen])
            near = {key: near[key].index_copy(0, chosen, found[key]) for key in OUTPUTS}
        return near

    def _second(self, images: Tensor) -> dict[str, Tensor]:
        """The anchors that count of the second look."""
        view = self.looks.second.view(images)
        found = self.network(view)
        return {key: self.looks.second.choose(found[key], *view.shape[-2:]) for key in OUTPUTS}

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """``[N, 4]`` cxcywh in pixels of the picture; those of the second look come first."""
        return self._anchors(height, width, device)


class Looks:
    """The two looks of a pyramid at pictures of any size.

    Args:
        cfg: of the network.
        factors, errors: as of :class:`ImagePyramid`.
    """

    def __init__(self, cfg: ModelConfig, factors: Factors):
        self.cfg = cfg
        self.fine = sum(max(sizes) < LARGE for sizes in cfg.anchors)  # levels
        finer, coarser = cfg.anchors[: self.fine], cfg.anchors[self.fine :]
        if not finer or any(max(sizes) >= LARGE for sizes in finer) or any(min(sizes) < LARGE for sizes in coarser):
            raise ConfigError(
                f"--pyramid: needs a network whose anchors below {LARGE} px are those of its finest levels"
            )
        self.first = Look(cfg, factors.first)
        self.second = Look(cfg, factors.second, (LEAST * factors.second, SMALL))

    def finest(self, height: int, width: int) -> int:
        """How many anchors the finest levels of a view, those with anchors below 64 px, have."""
        levels = zip(self.cfg.strides[: self.fine], self.cfg.anchors)
        return sum(cells(height, stride) * cells(width, stride) * len(sizes) for stride, sizes in levels)

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """``[N, 4]`` cxcywh in pixels of the picture: those that count of the second look, then all of the first."""
        return torch.cat([look.anchors(height, width, device) for look in (self.second, self.first)])


class Look:
    """One look: arithmetic of whole numbers, so that an exported graph can do it for any size.

    Args:
        cfg: of the network.
        factor: how large, relative to the picture.
        counts: the smallest and the largest anchor that counts, px of the view; None = all count.
    """

    def __init__(self, cfg: ModelConfig, factor: float, counts: tuple[float, float] | None = None):
        self.cfg = cfg
        self.factor = Fraction(factor).limit_denominator(100)
        # per level, the places of the anchor sizes that count
        self.places = counts and [
            [i for i, side in enumerate(sizes) if counts[0] <= side <= counts[1]] for sizes in cfg.anchors
        ]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture as it is seen, without padding; never 0."""
        up, down = self.factor.numerator, self.factor.denominator
        more = down - 1 if up < down else 0
        return (height * up + more) // down, (width * up + more) // down

    def view(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` as they are seen: resized and padded, or at factor 1 themselves."""
        if self.factor == 1:
            return images
        return pad_to_stride(F.interpolate(images, self.size(*images.shape[-2:]), mode="bilinear", align_corners=False))

    def choose(self, values: Tensor, height: int, width: int) -> Tensor:
        """Of all anchors' values ``[B, N, ...]`` of a view of that size, those that count."""
        if self.places is None:
            return values
        kept, start = [], 0
        for stride, sizes, places in zip(self.cfg.strides, self.cfg.anchors, self.places):
            end = start + cells(height, stride) * cells(width, stride) * len(sizes)
            if places:
                level = values[:, start:end].unflatten(1, (-1, len(sizes)))
                kept.append(torch.stack([level[:, :, i] for i in places], 2).flatten(1, 2))
            start = end
        return torch.cat(kept, 1)

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """``[N, 4]`` cxcywh in pixels of the picture: those that count."""
        tall, wide = self.size(height, width)
        view = padded_size(tall, wide) if self.factor != 1 else (height, width)
        anchors = make_anchors(*view, self.cfg.strides, self.cfg.anchors, device)
        back = [torch.as_tensor(n, dtype=torch.float32) / seen for n, seen in ((width, wide), (height, tall))]
        return self.choose(anchors[None], *view)[0] * torch.stack(back * 2).to(anchors)


def network_anchors(
    cfg: ModelConfig, pyramid: Factors | None, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Anchors ``[N, 4]`` (cxcywh, pixels) of a network inside a pyramid, or for None of a network alone."""
    if pyramid:
        return Looks(cfg, pyramid).anchors(height, width, device)
    return make_anchors(height, width, cfg.strides, cfg.anchors, device)
