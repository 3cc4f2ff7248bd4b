"""What the words of a command line mean: pictures, folders, patterns, videos, a webcam, stdin."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

from models.image_pyramid import Factors, parse_pyramid
from utils.arguments import number
from utils.command import UsageError
from utils.config import ConfigError
from utils.image import IMAGE_SUFFIXES
from utils.scale import NamedScale, Scale, check_scale
from utils.video import VIDEO_SUFFIXES, is_webcam

STDIN = "-"
# Kinds of pictures that Pillow alone cannot read.
OTHER_SUFFIXES = frozenset(
    (".heic", ".heif", ".jxl", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
)


@dataclass
class Inputs:
    """Pictures (paths or "-"), videos (paths or "webcam:N"), one line about each folder that cannot be read, and one
    about each of which something was left out.

    ``root`` is the folder that all inputs lie in; results keep their paths relative to it.
    """

    pictures: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    root: str = ""


def find_inputs(names: Iterable[str], skip: Collection[str] = ()) -> Inputs:
    """Sort command-line words into pictures and videos.

    Folders are searched for pictures at every depth (not for videos), leaving out the folders in ``skip`` (earlier
    results). A pattern such as ``photos/**/*.jpg`` is expanded, without these if it matches others as well. A file
    that does not exist is kept: reading it fails with a clear line.

    Raises:
        UsageError: a folder or pattern without pictures.
    """
    inputs = Inputs()
    earlier = {os.path.abspath(s) for s in skip}
    roots = []
    for name in names:
        if name == STDIN:
            inputs.pictures.append(name)
        elif is_webcam(name):
            inputs.videos.append(name)
        elif os.path.isdir(name):
            problems: list[str] = []
            found, left_out = _pictures_below(name, earlier, problems)
            if not found and not problems:
                raise UsageError(f"{name}: no pictures in this folder{f' ({left_out})' if left_out else ''}")
            inputs.pictures += found
            inputs.problems += problems
            inputs.notes += [f"{name}: {left_out}"] if left_out else []
            roots.append(os.path.abspath(name))
        else:
            files = [name]
            if glob.has_magic(name) and not os.path.lexists(name):
                files = sorted(f for f in glob.glob(name, recursive=True) if os.path.isfile(f))
                if not files:
                    raise UsageError(f"{name}: no file matches")
                fresh = [f for f in files if earlier.isdisjoint(map(str, Path(os.path.abspath(f)).parents))]
                if 0 < len(fresh) < len(files):
                    inputs.notes.append(f"{name}: not searched: {len(files) - len(fresh)} file(s) of earlier results")
                    files = fresh
            for file in files:
                (inputs.videos if Path(file).suffix.lower() in VIDEO_SUFFIXES else inputs.pictures).append(file)
                roots.append(os.path.dirname(os.path.abspath(file)))
    inputs.pictures = list(dict.fromkeys(inputs.pictures))
    inputs.videos = list(dict.fromkeys(inputs.videos))
    inputs.root = os.path.commonpath(roots) if roots else os.getcwd()
    return inputs


def _pictures_below(folder: str, skip: Collection[str], problems: list[str]) -> tuple[list[str], str]:
    """-> the pictures, and what was left out that a user may have expected to be searched."""

    def note(error: OSError) -> None:
        problems.append(f"{error.filename or folder}: cannot read the folder ({error.strerror})")

    found: list[str] = []
    videos = unknown = links = 0
    for here, folders, files in os.walk(folder, onerror=note):
        folders[:] = sorted(f for f in folders if os.path.abspath(os.path.join(here, f)) not in skip)
        suffixes = {f: Path(f).suffix.lower() for f in sorted(files)}
        found += [os.path.join(here, f) for f, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES]
        videos += sum(suffix in VIDEO_SUFFIXES for suffix in suffixes.values())
        unknown += sum(suffix in OTHER_SUFFIXES for suffix in suffixes.values())
        links += sum(os.path.islink(os.path.join(here, f)) for f in folders)
    left_out = [
        text
        for count, text in (
            (videos, f"{videos} video(s): name them"),
            (unknown, f"{unknown} picture(s) of a kind that cannot be read"),
            (links, f"{links} linked folder(s): name them"),
        )
        if count
    ]
    return found, f"not searched: {', '.join(left_out)}" if left_out else ""


def add_scale(parser: argparse.ArgumentParser, default: NamedScale = "original") -> None:
    """The option ``--scale``."""
    parser.add_argument(
        "--scale",
        type=partial(scale_argument, words=get_args(NamedScale)),
        default=default,
        metavar="SCALE",
        help="original = not resized; vga = long side 640; 1600 = short side 1600; 1.4 or another number = so many "
        "times the original size, which finds smaller faces for the square of it in computation; auto = original, and "
        f"pictures above 640 px at vga too, for faces that fill them (default: {default})",
    )


def scale_argument(text: str, words: Collection[str] = ()) -> Scale:
    """One of the words, or a size relative to the original one."""
    if text in words:
        return text
    scale = number(text, float, " or ".join((*words, "a number")))
    try:
        return check_scale(scale)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def add_pyramid(parser: argparse.ArgumentParser) -> None:
    """The option ``--pyramid``."""
    parser.add_argument(
        "--pyramid",
        type=_factors,
        metavar="FACTORS",
        help="where small faces are seen, look for them again, enlarged: 1.5 finds more, for up to 3.3 times the "
        "computation; 0.75+1.2, a first look at three quarters of the size and a second enlarged by 1.2, for up to 2.0 "
        "times (but what is too small for that first look is not looked for again)",
    )


def _factors(text: str) -> Factors | None:
    try:
        return parse_pyramid(text)
    except ConfigError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
