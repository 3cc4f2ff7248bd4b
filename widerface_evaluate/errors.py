"""The one error of this package, and the naming of images that all its parts share."""

from pathlib import Path

from utils.command import Problem, UsageError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".avif", ".tif", ".tiff", ".txt"))


class EvaluationError(Problem, ValueError):
    """Ground truth or predictions cannot be used; the message is one line naming the file (and the line in it)."""


class OtherSettings(UsageError, EvaluationError):
    """Predictions that are to be taken over were made otherwise than asked for now: a mistake on the command line."""


def image_key(name: str) -> str:
    """``event/name`` without the image suffix: WIDERFace's ground truth and prediction files carry none.

    Names with and without suffix therefore mean the same image everywhere in this package.
    """
    name = name.strip().replace("\\", "/").removeprefix("./")
    path = Path(name)
    return name[: -len(path.suffix)] if path.suffix.lower() in SUFFIXES else name


def read_text(path: str | Path) -> str:
    """The text of a file, or an :class:`EvaluationError` that names it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise EvaluationError(f"{path}: cannot read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise EvaluationError(f"{path}: not a text file") from None
