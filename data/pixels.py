"""Carrying out drawn samples on pixels, on any device: crop, antialiased resize, flip, colour, mixing.

Sizes and places are known on the host, so a GPU is never waited for.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data.augmentations_smart import GREY, Erase, Mix
from data.geometry import Crop, Rect
from data.preprocess import MEAN_BGR

PAD_RGB = MEAN_BGR[::-1]  # padding becomes zero in the network's input


def cut_and_resize(image: Tensor, crop: Crop, out: Tensor) -> None:
    """Fill one square on a CPU: ``image`` uint8 ``[H, W, 3]`` -> ``out`` uint8 ``[3, S, S]``, all padding."""
    size = out.shape[-1]
    x0, y0, x1, y1 = crop.source
    px0, py0, px1, py1 = crop.placed(size)
    part = image[y0:y1, x0:x1].permute(2, 0, 1)[None]
    if (x1 - x0, y1 - y0) != (px1 - px0, py1 - py0):
        part = part.contiguous(memory_format=torch.channels_last)  # the fast uint8 kernel wants whole pixels
        part = F.interpolate(part, (py1 - py0, px1 - px0), mode="bilinear", antialias=True)
    part = part[0].flip(-1) if crop.flip else part[0]
    out[:, py0:py1, px0:px1].copy_(part)


def cut_and_resize_all(parts: list[Tensor], crops: list[Crop], size: int) -> tuple[Tensor, Tensor]:
    """Many squares at once, by two batched matrix products: on a GPU launching a resize per photo takes longer than
    resizing. The same as :func:`cut_and_resize` to a grey level.

    Args:
        parts: the source rectangles of the crops, uint8 ``[h, w, 3]`` on one device.
        crops: one per part.
        size: side S of the squares.

    Returns:
        Whole numbers in 0..255, float32 ``[P, 3, S, S]`` RGB with padding, and where the photo is, bool
        ``[P, 1, S, S]``.
    """
    device = parts[0].device
    height, width = (max(part.shape[axis] for part in parts) for axis in (0, 1))
    photos = torch.zeros(len(parts), height, width, 3, dtype=torch.uint8, device=device)
    for slot, part in zip(photos, parts):
        slot[: part.shape[0], : part.shape[1]].copy_(part)
    numbers = [[*part.shape[:2], *crop.target, crop.flip] for part, crop in zip(parts, crops)]
    h, w, x0, y0, x1, y1, flip = upload(torch.tensor(numbers, dtype=torch.float32), device)[..., None].unbind(1)
    rows, in_rows = _resampling(h, y0, y1, torch.zeros_like(flip), size, height)
    columns, in_columns = _resampling(w, x0, x1, flip, size, width)
    kind = torch.float16 if device.type == "cuda" else torch.float32  # half is exact to a quarter of a grey level
    squares = rows.to(kind) @ photos.flatten(2).to(kind)
    squares = squares.unflatten(2, (width, 3)).permute(0, 3, 1, 2).flatten(1, 2) @ columns.to(kind).mT
    squares = squares.unflatten(1, (3, size)).float().round_()
    shown = (in_rows[:, :, None] & in_columns[:, None])[:, None]
    return torch.where(shown, squares, padding(device)), shown


def _resampling(
    length: Tensor, start: Tensor, end: Tensor, flip: Tensor, size: int, most: int
) -> tuple[Tensor, Tensor]:
    """Antialiased bilinear weights along one axis: ``[P, S, most]``, and which of the S places the photo reaches.

    Args:
        length, start, end, flip: ``[P, 1]``; source pixels 0..length go to start..end, then perhaps mirrored.
        size, most: S, and source pixels of the longest.
    """
    place = torch.arange(size, device=length.device) + 0.5
    place = torch.where(flip > 0, size - place, place)
    scale = length / (end - start)
    source = torch.arange(most, device=length.device) + 0.5
    distance = (source - ((place - start) * scale)[..., None]).abs() / scale.clamp(min=1)[..., None]
    weights = (1 - distance).clamp(min=0) * (source < length)[:, None]
    reached = (place > start) & (place < end)
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-6) * reached[..., None], reached


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for a GPU's queue."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def padding(device: torch.device) -> Tensor:
    """The colour of padding, float32 ``[3, 1, 1]`` RGB in 0..255."""
    return upload(torch.tensor(PAD_RGB), device).view(3, 1, 1)


def blank_squares(count: int, size: int, device: torch.device) -> Tensor:
    """uint8 ``[count, 3, S, S]`` RGB, all padding."""
    out = torch.empty(count, 3, size, size, dtype=torch.uint8, device=device)
    for channel, value in enumerate(PAD_RGB):
        out[:, channel] = round(value)
    return out


def repad(image: Tensor, rect: Rect) -> None:
    """Make everything outside ``rect`` of ``image`` ``[3, S, S]`` padding again, in place."""
    x0, y0, x1, y1 = rect
    for outside in (image[:, :y0], image[:, y1:], image[:, :, :x0], image[:, :, x1:]):
        if outside.numel():
            for channel, value in zip(outside, PAD_RGB):
                channel.fill_(value)


def recolour(images: Tensor, colours: Tensor) -> Tensor:
    """Affine colour maps, one per image.

    Args:
        images: uint8 or float ``[B, 3, S, S]`` RGB in 0..255.
        colours: float ``[B, 3, 4]``.

    Returns:
        float ``[B, 3, S, S]`` in 0..255.
    """
    flat = images.flatten(2).float()
    changed = torch.baddbmm(colours[:, :, 3:], colours[:, :, :3], flat)
    return changed.clamp_(0, 255).view(images.shape)


def warp(image: Tensor, matrix: np.ndarray) -> Tensor:
    """Apply a forward 2x2 matrix about the centre: float ``[3, S, S]`` RGB in 0..255 -> the same; what comes in is
    padding."""
    theta = torch.zeros(1, 2, 3, dtype=image.dtype)
    theta[0, :, :2] = torch.from_numpy(np.linalg.inv(matrix))
    grid = F.affine_grid(theta.to(image.device, non_blocking=True), [1, *image.shape], align_corners=False)
    mean = padding(image.device)
    turned = F.grid_sample((image - mean)[None], grid, align_corners=False)[0] + mean
    return turned.clamp_(0, 255)  # rounding leaves -1e-6, whose power (gamma) is NaN


def apply_operation(image: Tensor, name: str, magnitude: float, seed: int) -> Tensor:
    """One colour operation of an AutoAugment sub-policy: float ``[3, S, S]`` RGB in 0..255 -> the same."""
    if name == "gamma":
        return (image / 255).pow(magnitude) * 255
    if name == "grey":
        red, green, blue = image.unbind()
        return (GREY[0] * red + GREY[1] * green + GREY[2] * blue).expand_as(image).clone()
    if name == "equalize":
        return TF.equalize(image.to(torch.uint8)).float()
    if name == "autocontrast":
        return TF.autocontrast(image / 255) * 255
    if name == "posterize":
        step = 2 ** (8 - round(magnitude))
        return (image / step).floor() * step
    if name == "solarize":
        return torch.where(image >= magnitude, 255 - image, image)
    if name == "sharpness":
        return TF.adjust_sharpness(image / 255, magnitude) * 255
    if name == "blur":
        return TF.gaussian_blur(image, [2 * round(2 * magnitude) + 1] * 2, [magnitude] * 2)
    if name == "noise":
        generator = torch.Generator(image.device).manual_seed(seed)
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        return (image + magnitude * noise).clamp(0, 255)
    if name == "low_resolution":
        side = max(1, round(image.shape[-1] / magnitude))
        small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)
        return F.interpolate(small, image.shape[-2:], mode="bilinear", align_corners=False)[0]
    raise ValueError(f"unknown operation {name}")


def erase(image: Tensor, patches: list[Erase]) -> None:
    """Paint rectangles of ``image`` ``[3, S, S]``, in place."""
    for patch in patches:
        x0, y0, x1, y1 = patch.rect
        for channel, value in enumerate(patch.colour):
            image[channel, y0:y1, x0:x1] = value


def mix_images(first: Tensor, second: Tensor, mix: Mix) -> None:
    """Blend or paste ``second`` ``[3, S, S]`` into ``first``, in place."""
    if mix.source is None:
        first.mul_(mix.keep).add_(second, alpha=1 - mix.keep)
        return
    (sx0, sy0, sx1, sy1), (tx0, ty0, tx1, ty1) = mix.source, mix.target
    first[:, ty0:ty1, tx0:tx1] = second[:, sy0:sy1, sx0:sx1]
