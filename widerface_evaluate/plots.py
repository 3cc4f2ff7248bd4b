"""Pictures: precision-recall curves and sheets of single detections or faces. Matplotlib, no display needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from utils.figures import save_figure

from .ap import Curve
from .errors import EvaluationError


def pr_curve(curves: Mapping[str, tuple[float, Curve]], out: str | Path, title: str = "") -> None:
    """Draw named ``(ap, curve)`` pairs into the picture ``out``. Raises as :func:`~utils.figures.save_figure`."""
    figure = Figure(figsize=(6, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, (ap, curve) in curves.items():
        admitted = curve.precision > 0
        axes.plot(curve.recall[admitted], curve.precision[admitted], label=f"{name} (AP {ap:.3f})", linewidth=1.6)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    save_figure(figure, out)


def sheet(images_dir: str | Path, items: Sequence[Mapping], out: str | Path, columns: int = 8) -> None:
    """A grid of crops around boxes: the lists that :func:`breakdown.worst_cases` gives.

    Args:
        images_dir: holds ``<event>/<name>`` with an image suffix.
        items: each with ``name``, ``box`` (x y w h pixels) and optionally ``score``.
        out: picture to write.

    Raises:
        EvaluationError: nothing to draw, or an image that is missing or unreadable.
        UsageError, OSError: as :func:`~utils.figures.save_figure`.
    """
    from .images import load_image  # brings torch along, which curves do without

    if not items:
        raise EvaluationError(f"{out}: no items to draw")
    rows = math.ceil(len(items) / columns)
    figure = Figure(figsize=(1.6 * columns, 1.9 * rows), dpi=100, layout="constrained")
    for i, item in enumerate(items):
        crop, (x, y, w, h) = _crop(load_image(images_dir, item["name"]), item["box"])
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(crop)
        axes.plot([x, x + w, x + w, x, x], [y, y, y + h, y + h, y], color="red", linewidth=1)
        score = item.get("score")
        axes.set_title(f"{'-' if score is None else f'{score:.2f}'}  {item['box'][3]:.0f}px", fontsize=7)
        axes.axis("off")
    save_figure(figure, out)


def _crop(image: np.ndarray, box: Sequence[float]) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The surroundings of a box (three times its longer side, black beyond the border), and the box in them."""
    x, y, w, h = box
    reach = min(1.5 * max(w, h, 8), 2 * max(image.shape[:2]))  # of a box far larger than the image
    left, top = math.floor(x + w / 2 - reach), math.floor(y + h / 2 - reach)
    side = math.ceil(2 * reach)
    crop = Image.fromarray(image).crop((left, top, left + side, top + side))
    return np.asarray(crop), (x - left, y - top, w, h)
