"""A batch's plan (data/plan.py) carried out on pixels, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data import pixels
from data.augmentations_smart import IDENTITY
from data.cache import DecodeStore, FlatStore
from data.plan import BatchPlan, SamplePlan
from data.preprocess import normalise

DRAWN_AT_ONCE = 64  # squares; bounds the memory of the matrices that resize them


def render_batch(plan: BatchPlan, store: DecodeStore | FlatStore, device: torch.device) -> dict:
    """Carry out a plan on ``device``: the batch dict with ``images`` float ``[B, 3, S, S]``, ready for the network."""
    draw = _draw_at_once if device.type == "cuda" else _draw_one_by_one
    images = draw(plan, store, device)
    for slot, partner, mix in plan.mixes:
        pixels.mix_images(images[slot], images[partner], mix)
    if len(images) > len(plan.erases):
        images = images[: len(plan.erases)].clone()  # a view would keep the partners in memory as long as the batch
    for image, patches in zip(images, plan.erases):
        pixels.erase(image, patches)
    chunk = len(images) if device.type == "cuda" else 1
    for part in range(0, len(images), chunk):
        images[part : part + chunk] = normalise(images[part : part + chunk])
    return {
        "images": images,
        **{k: pixels.upload(v, device) if isinstance(v, Tensor) else v for k, v in plan.batch.items()},
    }


def _draw_one_by_one(plan: BatchPlan, store: DecodeStore | FlatStore, device: torch.device) -> Tensor:
    """The plan's squares before mixing, float RGB ``[B + P, 3, S, S]`` in 0..255. One at a time each stays in a CPU's
    cache, which is 8 times as fast there."""
    squares = pixels.blank_squares(len(plan.samples), plan.size, device)
    images = torch.empty(squares.shape, device=device)
    for sample, square, image, colour in zip(plan.samples, squares, images, _colours(plan.samples)):
        pixels.cut_and_resize(store.get(sample.index), sample.crop, square)
        image.copy_(pixels.recolour(square[None], colour[None])[0])
        _render_operations(sample, image)
    return images


def _draw_at_once(plan: BatchPlan, store: DecodeStore | FlatStore, device: torch.device) -> Tensor:
    """As :func:`_draw_one_by_one`, with few launches for all of them."""
    colours = pixels.upload(_colours(plan.samples), device)
    simple = torch.tensor([s.warp is None and not s.operations for s in plan.samples])
    padded = pixels.upload(simple, device).view(-1, 1, 1, 1)
    padding = pixels.padding(device)
    images = torch.empty(len(plan.samples), 3, plan.size, plan.size, device=device)
    for start in range(0, len(images), DRAWN_AT_ONCE):
        some = slice(start, start + DRAWN_AT_ONCE)
        parts = []
        for sample in plan.samples[some]:
            x0, y0, x1, y1 = sample.crop.source
            part = store.get(sample.index)[y0:y1, x0:x1]
            parts.append(part if part.device.type == device.type else part.contiguous().to(device, non_blocking=True))
        squares, shown = pixels.cut_and_resize_all(parts, [s.crop for s in plan.samples[some]], plan.size)
        squares = pixels.recolour(squares, colours[some])
        images[some] = torch.where(shown | ~padded[some], squares, padding)
    for sample, image, done in zip(plan.samples, images, simple.tolist()):
        if not done:
            _render_operations(sample, image)
    return images


def _colours(samples: list[SamplePlan]) -> Tensor:
    """``[B, 3, 4]``."""
    return torch.from_numpy(np.stack([IDENTITY if s.colour is None else s.colour for s in samples]).astype(np.float32))


def _render_operations(sample: SamplePlan, image: Tensor) -> None:
    """Warp and AutoAugment operations on one square, in place; padding stays padding under colour changes."""
    changed = image
    if sample.warp is not None:
        changed = pixels.warp(changed, sample.warp)
    for name, magnitude in sample.operations:
        changed = pixels.apply_operation(changed, name, magnitude, sample.noise_seed)
    if changed is not image:
        image.copy_(changed)
    if sample.warp is None and (sample.colour is not None or sample.operations):
        pixels.repad(image, sample.crop.placed(image.shape[-1]))
