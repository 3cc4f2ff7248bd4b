"""Draw augmented training samples with their boxes and landmarks to a PNG grid.

    python -m data.visualize --config v2_ultra --out grid.png --opts data.augment.cutmix_prob=1

Green boxes are faces to learn, dashed yellow ones are ignored; landmarks are dots, the image-left eye in red.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.pipeline import build_pipeline
from data.preprocess import denormalise
from utils.arguments import natural, positive
from utils.command import FINISHED, command
from utils.config import add_opts, load_config
from utils.files import whole

LANDMARK_COLOURS = ((255, 60, 60), (80, 160, 255), (80, 255, 80), (255, 120, 255), (80, 255, 255))
LEARN, IGNORE = (0, 255, 0), (255, 220, 0)


def draw_batch(batch: dict, count: int) -> Image.Image:
    """The first ``count`` images of a batch dict, annotated, as one near-square grid (RGB)."""
    images = denormalise(batch["images"][:count]).permute(0, 2, 3, 1).cpu().numpy()
    count, size = len(images), images.shape[1]
    columns = int(np.ceil(np.sqrt(count)))
    grid = Image.new("RGB", (columns * size, -(-count // columns) * size))
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        draw = ImageDraw.Draw(image)
        for j in torch.nonzero(batch["valid"][i] | batch["ignore"][i]).flatten().tolist():
            box = batch["boxes"][i, j].tolist()
            if batch["ignore"][i, j]:
                _dashed(draw, box)
            else:
                draw.rectangle(box, outline=LEARN)
            if batch["has_landmarks"][i, j]:
                radius = max(1.0, (box[2] - box[0]) / 40)
                for (x, y), colour in zip(batch["landmarks"][i, j].tolist(), LANDMARK_COLOURS):
                    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        grid.paste(image, (i % columns * size, i // columns * size))
    return grid


def _dashed(draw: ImageDraw.ImageDraw, box: list[float]) -> None:
    (x0, y0, x1, y1), dash = box, 4
    for start in np.arange(x0, x1, 2 * dash):
        for y in (y0, y1):
            draw.line((start, y, min(start + dash, x1), y), fill=IGNORE)
    for start in np.arange(y0, y1, 2 * dash):
        for x in (x0, x1):
            draw.line((x, start, x, min(start + dash, y1)), fill=IGNORE)


@command("data.visualize")
def main(argv: list[str] | None = None) -> int:
    """Command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.visualize", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file or a name in configs/")
    add_opts(parser, "overrides such as data.root=...")
    parser.add_argument("--out", required=True, type=Path, help="PNG to write")
    parser.add_argument("--count", type=positive, default=16, help="samples to draw (default 16)")
    parser.add_argument("--epoch", type=natural, default=0, help="epoch to take them from (default 0)")
    args = parser.parse_args(argv)
    cfg = load_config(args.config, args.opts)
    cfg.data.pipeline, cfg.data.workers = "loader", 0  # a few samples: not worth decoding the whole data set
    pipeline = build_pipeline(cfg, "cpu")
    pipeline.set_stage(cfg.train.stages[0].size, args.count)
    batch = next(iter(pipeline.batches(args.epoch)))
    with whole(args.out) as part:
        draw_batch(batch, args.count).save(part, format="PNG")
    print(f"{len(batch['names'])} samples drawn to {args.out}")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
