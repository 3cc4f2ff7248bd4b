"""What a run must share with its checkpoint to continue exactly: its settings and the random generators' states."""

from __future__ import annotations

import random
from collections.abc import Set
from typing import Any

import numpy as np
import torch

from utils.command import UsageError

AP_KEYS = ("data.val_labels", "train.val_scale", "train.val_images")  # where they differ, APs cannot be compared
VALIDATION_KEYS = {*AP_KEYS, "train.val_every"}
# Keys a resumed run may change: they say where things are and what is told, not what is learnt. (But where the
# student's own best teaches, the validations that find it decide what is learnt.)
FREE_KEYS = VALIDATION_KEYS | {
    *(f"data.{k}" for k in ("root", "workers", "cache")),
    *(f"train.{k}" for k in ("patience", "save_every", "log_every", "pictures")),
    *(f"train.{k}_weights" for k in ("init", "inherit", "backbone")),  # read only at the start of a run
    "distill.init_mimics",
}


class ResumeError(UsageError, RuntimeError):
    """A run cannot be continued as asked; one line."""


def first_difference(saved: dict, now: dict, fixed: Set[str] = frozenset()) -> tuple[str, Any, Any] | None:
    """The first key whose value differs, with both values; those of :data:`FREE_KEYS` may, but for ``fixed``."""
    return _difference(saved, now, FREE_KEYS - fixed - (VALIDATION_KEYS if now["distill"]["self_best"] else set()))


def _difference(saved: dict, now: dict, free: Set[str], prefix: str = "") -> tuple[str, Any, Any] | None:
    for key, old in saved.items():
        name, new = prefix + key, now[key]
        if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
            found = _difference(old, new, free, f"{name}.")
            if found:
                return found
        elif old != new and name not in free:
            return name, old, new
    return None


def rng_state(device: torch.device) -> dict:
    """States of Python's, NumPy's and torch's generators as plain values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: dict, device: torch.device) -> None:
    """Inverse of :func:`rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
