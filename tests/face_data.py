"""A small data set on disk whose faces are painted: every box and landmark can be found again in the pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.config import Config, from_dict

BACKGROUND = (30, 40, 50)
FACE = (250, 240, 20)
POINT_COLOURS = np.array([(255, 0, 0), (0, 0, 255), (0, 160, 0), (255, 0, 255), (0, 255, 255)])
POINTS = np.array([[0.3, 0.3], [0.7, 0.3], [0.5, 0.5], [0.3, 0.75], [0.7, 0.75]])  # of the box


def paint(width: int, height: int, boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """RGB picture with a yellow square per face (xywh) and a coloured dot, a sixth of it wide, per landmark."""
    image = np.full((height, width, 3), BACKGROUND, np.uint8)
    for x, y, w, h in boxes:
        image[y : y + h, x : x + w] = FACE
        for (px, py), colour in zip(POINTS, POINT_COLOURS):
            cx, cy, r = x + px * w, y + py * h, max(1, w // 12)
            image[round(cy) - r : round(cy) + r, round(cx) - r : round(cx) + r] = colour
    return image


def line(box: tuple[float, float, float, float], landmarks: bool = True) -> str:
    """The label line of a face (xywh)."""
    x, y, w, h = box
    points = POINTS * (w, h) + (x, y)
    tail = " ".join(f"{px} {py} 0" for px, py in points) if landmarks else " ".join(["-1 -1 -1"] * 5)
    return f"{x} {y} {w} {h} {tail} 0.5"


FACES = {
    "0--Park/a.png": (320, 240, [(40, 50, 60, 60), (200, 120, 48, 48)]),
    "0--Park/b.jpg": (200, 300, [(60, 100, 90, 90)]),
    "1--Street/c.png": (400, 200, [(30, 30, 24, 24), (100, 90, 24, 24), (300, 60, 36, 36)]),
    "1--Street/d.png": (180, 180, []),
    "1--Street/e.png": (256, 256, [(8, 8, 72, 72)]),
    "2--Hall/f.png": (300, 220, [(150, 100, 60, 60)]),
}


def make_folder(root: Path, pictures: dict | None = None, landmarks: bool = True) -> Path:
    """Write ``root/train/images`` and ``root/train/label.txt``; -> root."""
    lines = []
    for name, (width, height, boxes) in (FACES if pictures is None else pictures).items():
        path = root / "train" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(paint(width, height, boxes)).save(path, quality=95, subsampling=0)
        lines += [f"# {name}", *(line(b, landmarks) for b in boxes)]
    (root / "train" / "label.txt").write_text("\n".join(lines) + "\n")
    return root


def make_config(root: Path, augment: dict | None = None, train: dict | None = None, **data) -> Config:
    """A config that trains on that folder: 64 px, batches of 3, nothing held out."""
    return from_dict(
        Config,
        {
            "data": {"root": str(root), "select_images": 0, "workers": 0, "augment": augment or {}, **data},
            "train": {"epochs": 10, "stages": [{"size": 64, "batch_size": 3}], **(train or {})},
        },
        "test",
    )
