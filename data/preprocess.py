"""The one place that turns pixels into network input: RGB 0..255 -> BGR minus the training mean, padded."""

import torch
from torch import Tensor
from torch.nn import functional as F

from layers.anchors import cells

STRIDE = 32  # of the coarsest level: sides that are no multiples of it cost accuracy
MEAN_BGR = (104.0, 117.0, 123.0)  # as the published V1 was trained; no division by a standard deviation


def normalise(images: Tensor) -> Tensor:
    """RGB ``[..., 3, H, W]`` in 0..255 (uint8 or float) -> float BGR minus :data:`MEAN_BGR`, same shape."""
    # in order before in float: strided bytes are slow to convert
    return images.contiguous().flip(-3).float().sub_(_mean(images.device))


def denormalise(images: Tensor) -> Tensor:
    """Inverse of :func:`normalise`: network input ``[..., 3, H, W]`` -> RGB uint8."""
    mean = _mean(images.device)
    return (images.float() + mean).round().clamp(0, 255).to(torch.uint8).flip(-3)


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width rounded up to multiples of :data:`STRIDE`."""
    return cells(height, STRIDE) * STRIDE, cells(width, STRIDE) * STRIDE


def pad_to_stride(images: Tensor) -> Tensor:
    """Network input ``[B, 3, H, W]`` -> the same with zeros right and below, of :func:`padded_size`."""
    height, width = images.shape[-2:]
    rows, columns = padded_size(height, width)
    return F.pad(images, (0, columns - width, 0, rows - height))


def _mean(device: torch.device) -> Tensor:
    return torch.tensor(MEAN_BGR).view(3, 1, 1).to(device, non_blocking=True)  # no wait for the GPU's queue
