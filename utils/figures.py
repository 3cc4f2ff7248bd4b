"""Matplotlib's figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.command import UsageError
from utils.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, out: str | Path, **options: Any) -> None:
    """Write a figure, wholly or not at all; the suffix of ``out`` says as what, none means PNG.

    Args:
        options: of ``Figure.savefig``.

    Raises:
        UsageError: a suffix that matplotlib does not know.
        OSError: it cannot be written.
    """
    kind = Path(out).suffix[1:].lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise UsageError(f"{out}: '.{kind}' is none of the kinds that can be drawn ({', '.join(sorted(known))})")
    with whole(out) as part:
        figure.savefig(part, format=kind, **options)
