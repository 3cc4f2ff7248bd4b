"""Reading pictures of every common kind as RGB uint8, the way a viewer would show them."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

from utils.command import Problem
from utils.files import naming, whole

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm .pbm .pnm".split()
)
WRITABLE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"))
WHITE = 255
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (TURNS[5], TURNS[6], TURNS[7], TURNS[8])  # these swap width and height


class ImageReadError(Problem, RuntimeError):
    """A picture cannot be read; its text is one line naming the file."""


def read_image(source: str | Path | bytes | BinaryIO, name: str = "") -> np.ndarray:
    """Read a picture from a path, bytes or a binary stream.

    The EXIF orientation is applied, grey and palette images become RGB, transparency is laid on white, 16-bit and
    float samples are scaled to 0..255, and only the first frame of an animation is taken.

    Args:
        name: what to call the picture in errors when ``source`` is not a path.

    Returns:
        ``[H, W, 3]`` RGB uint8.

    Raises:
        ImageReadError: missing, truncated, not a picture, or of more than 178 megapixels, Pillow's limit against
            files that would fill the memory.
    """
    if isinstance(source, (str, Path)):
        name = name or str(source)
    elif isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)
    name = name or "image"
    try:
        with warnings.catch_warnings():
            # Metadata complaints and the softer of Pillow's two size warnings are of no use to a user.
            warnings.simplefilter("ignore")
            with Image.open(source) as image:
                return pil_to_rgb(image)
    except UnidentifiedImageError:
        raise ImageReadError(f"{name}: not a picture, or of an unknown kind") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise ImageReadError(f"{name}: too large, more than {limit} megapixels; shrink it first") from None
    except OSError as e:
        raise ImageReadError(f"{name}: cannot read the picture ({e.strerror or ' '.join(str(e).split())})") from None
    except MemoryError:
        raise ImageReadError(f"{name}: too large for the memory of this machine") from None
    except Exception as e:  # damaged files make Pillow's decoders raise almost anything
        why = " ".join(str(e).split()) or type(e).__name__
        raise ImageReadError(f"{name}: damaged picture ({why})") from None


def further_frames(path: str | Path) -> int:
    """How many frames or pages an animation or a file of several pages has beside the first, which alone is read."""
    if not os.path.isfile(path):  # a pipe gives what it holds once
        return 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:  # phones' MPO files hold the same picture again
                return 0 if image.format == "MPO" else getattr(image, "n_frames", 1) - 1
    except Exception:  # read_image says what is wrong with it
        return 0


def pil_to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode -> ``[H, W, 3]`` sRGB uint8 in displayed orientation."""
    image.load()  # some formats tell of their EXIF data only then
    turn = turn_of(image)
    if turn is not None:  # not ImageOps.exif_transpose: it writes all EXIF data anew, and fails where a tag is odd
        image = image.transpose(turn)
    image = _to_srgb(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _to_rgb_array(np.asarray(image))
    if image.mode == "La":  # Pillow has one way out of it
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        return _to_rgb_array(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))  # a copy: arrays that view a Pillow image are read-only


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What brings a Pillow image into displayed orientation, by its EXIF or XMP data; None = nothing."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # unreadable EXIF data must not cost the user the picture: show it as stored
        return None


def _to_srgb(image: Image.Image) -> Image.Image:
    """The image in the colours that its profile means: arrays have none, and phones take photos in Display P3."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
    except Exception:  # an unreadable profile must not cost the user the picture
        return image


def as_rgb(image: Any) -> np.ndarray:
    """What users hand to a detector -> ``[H, W, 3]`` RGB uint8.

    Args:
        image: a path; a Pillow image; a NumPy array ``[H, W]``, ``[H, W, 1 | 3 | 4]`` of uint8 or uint16 in RGB(A)
            order; or a torch uint8 tensor ``[H, W]`` or ``[1 | 3 | 4, H, W]``.

    Raises:
        ImageReadError: a path, or what a Pillow image was opened from, that cannot be read.
        TypeError, ValueError: another type, sample type or shape.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError("expected a picture with pixels, got one of {}x{}".format(*image.size))
        try:
            return pil_to_rgb(image)
        except (OSError, SyntaxError) as e:  # Pillow decodes a file only now; the latter of damaged PNGs
            name = getattr(image, "filename", "") or "image"
            raise ImageReadError(f"{name}: cannot read the picture ({' '.join(str(e).split())})") from None
    if isinstance(image, torch.Tensor):
        if image.dim() == 3 and image.shape[0] in (1, 3, 4):
            image = image.permute(1, 2, 0)
        elif image.dim() != 2:
            raise ValueError(f"expected a tensor [H, W] or [1 | 3 | 4, H, W], got {list(image.shape)}")
        image = image.cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected a path, Pillow image, NumPy array or torch tensor, got {type(image).__name__}")
    if image.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise ValueError(f"expected samples of type uint8 (0..255) or uint16, got {image.dtype}")
    image = np.asarray(image)  # not a matrix, which is no array once it has three axes
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))) or 0 in image.shape:
        raise ValueError(f"expected a non-empty array [H, W] or [H, W, 1 | 3 | 4], got {list(image.shape)}")
    return _to_rgb_array(image)


def sample_photo() -> str:
    """The file of a public-domain portrait that comes with matplotlib."""
    from matplotlib.cbook import get_sample_data  # of no use to detection, and slow to import

    return str(get_sample_data("grace_hopper.jpg", asfileobj=False))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """``[H, W, 3]`` uint8 -> ``[height, width, 3]``: averaged when shrunk (no aliasing), bilinear when enlarged."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write ``[H, W, 3]`` RGB uint8, wholly or not at all; the suffix of ``path`` decides the format. Raises OSError as
    any writing does."""
    suffix = path.suffix.lower()
    options = {"quality": 95} if suffix in (".jpg", ".jpeg", ".webp") else {}
    try:
        with naming(path), whole(os.path.realpath(path)) as part:  # a link stays one
            Image.fromarray(image).save(part, format=Image.registered_extensions().get(suffix), **options)
    except (OSError, ValueError) as e:  # WebP refuses sides above 16,383 pixels so, JPEG those above 65,500
        if getattr(e, "strerror", None):  # the system's, which name the file
            raise
        raise OSError(f"{path}: cannot write the picture ({' '.join(str(e).split())})") from None


def _to_rgb_array(image: np.ndarray) -> np.ndarray:
    """``[H, W]`` or ``[H, W, 1 | 3 | 4]`` of any sample type -> ``[H, W, 3]`` uint8, alpha laid on white."""
    image = _to_uint8(image)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 3:
        return np.require(image, requirements=["C", "W"])  # PyTorch warns of arrays it may not write to
    alpha = image[:, :, 3:].astype(np.float32) / 255
    return np.rint(image[:, :, :3] * alpha + WHITE * (1 - alpha)).astype(np.uint8)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    """Samples to 0..255. Integers wider than 8 bit are taken as 16-bit unless they exceed it; floats as 0..1 or 0..255,
    whichever holds them; anything beyond is divided by its maximum."""
    if image.dtype == np.uint8:
        return image
    samples = np.nan_to_num(image.astype(np.float32), posinf=0.0, neginf=0.0)
    top = float(samples.max())
    steps = (1.0, 255.0) if np.issubdtype(image.dtype, np.floating) else (65535.0,)
    full = next((s for s in steps if top <= s), top)
    return np.rint((samples / full).clip(0, 1) * 255).astype(np.uint8)
