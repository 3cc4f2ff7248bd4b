"""The one place that turns pixels into network input: RGB 0..255 -> BGR minus the training mean."""

import torch
from torch import Tensor

MEAN_BGR = (104.0, 117.0, 123.0)  # as the published V1 was trained; no division by a standard deviation


def normalise(images: Tensor) -> Tensor:
    """RGB ``[..., 3, H, W]`` in 0..255 (uint8 or float) -> float BGR minus :data:`MEAN_BGR`, same shape."""
    mean = _mean(images.device)
    return images.flip(-3).float() - mean


def denormalise(images: Tensor) -> Tensor:
    """Inverse of :func:`normalise`: network input ``[..., 3, H, W]`` -> RGB uint8."""
    mean = _mean(images.device)
    return (images.float() + mean).round().clamp(0, 255).to(torch.uint8).flip(-3)


def _mean(device: torch.device) -> Tensor:
    return torch.tensor(MEAN_BGR).view(3, 1, 1).to(device, non_blocking=True)  # no wait for the GPU's queue
