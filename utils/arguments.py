"""What the scripts' command lines share: types, whose misfits are one line of argparse's (exit code 2); defaults."""

from __future__ import annotations

import argparse


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    value = number(text, float, "a number between 0 and 1")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def above_zero(text: str) -> float:
    """A number > 0."""
    value = number(text, float, "a number")
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def positive(text: str) -> int:
    """An integer >= 1."""
    value = number(text, int, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def natural(text: str) -> int:
    """An integer >= 0."""
    value = number(text, int, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def given(args: argparse.Namespace, **defaults: object) -> list[str]:
    """Those of some options that were given (are not None), as ``--name``; the others get their defaults."""
    there = [name for name in defaults if getattr(args, name) is not None]
    vars(args).update({name: value for name, value in defaults.items() if name not in there})
    return [f"--{name.replace('_', '-')}" for name in there]


def number(text: str, kind: type, wanted: str) -> float:
    """A number of a kind, ``wanted`` in words."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {wanted}, got '{text}'") from None
