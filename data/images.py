"""Training photos: sizes from headers, decoding with errors that name the file, shrinking to the stored size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data.labels import ImageError
from utils.image import SIDEWAYS, ImageReadError, read_image, resize, turn_of


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright image in pixels, from the header alone.

    Raises:
        ImageError: missing, unreadable or not an image.
    """
    try:
        with Image.open(path) as image:
            w, h = image.size
            if image.format == "TIFF":  # some versions of Pillow have turned this size already
                w, h = image.tag_v2[256], image.tag_v2[257]
            turned = turn_of(image) in SIDEWAYS
    except OSError as e:  # also Pillow's UnidentifiedImageError
        raise ImageError(f"{path}: cannot read the image ({e.strerror or 'not an image'})") from None
    except Exception as e:  # Pillow raises many types on broken files
        raise ImageError(f"{path}: cannot read the image ({' '.join(str(e).split()) or type(e).__name__})") from None
    return (h, w) if turned else (w, h)


def read_photo(path: str | Path) -> np.ndarray:
    """The upright image as RGB uint8 ``[H, W, 3]``.

    Raises:
        ImageError: missing, unreadable, truncated or not an image.
    """
    try:
        return read_image(path)
    except ImageReadError as e:
        raise ImageError(str(e)) from None


def stored_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) after shrinking so that the long side is at most ``longest`` px."""
    scale = min(1.0, longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """RGB uint8 ``[H, W, 3]`` shrunk (antialiased) so that the long side is at most ``longest`` px; else unchanged."""
    width, height = stored_size(image.shape[1], image.shape[0], longest)
    return resize(image, height, width)
