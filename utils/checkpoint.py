"""Checkpoints: written atomically, read without running any code in them."""

from __future__ import annotations

import math
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.command import Problem
from utils.config import ConfigError, ModelConfig, from_dict, to_dict
from utils.files import whole

if TYPE_CHECKING:
    from models.featherface import FeatherFace

FORMAT = "featherface-1"
EXPORTED = (".onnx", ".torchscript.pt", ".pt2")  # what export.py writes


class CheckpointError(Problem, RuntimeError):
    """A checkpoint cannot be read, written or used; its text is one line naming the file."""


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write ``content`` so that ``path`` always holds either the old or the new file, never half of one.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; an existing file stays as it was.
    """
    try:
        with whole(path) as part, open(part, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"{path}: cannot write the checkpoint: {' '.join(str(e).split())}") from e


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of ours (``format`` is :data:`FORMAT`) with ``weights_only=True``.

    Raises:
        CheckpointError: missing, damaged, holding code, or of another program.
    """
    if str(path).endswith(EXPORTED) and Path(path).is_file():
        raise CheckpointError(f"{path}: an exported network; give the checkpoint (.pth) that it was made from")
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a FeatherFace checkpoint; convert published weights with "
            f"`python -m utils.convert {path} OUT.pth`"
        )
    return content


def load_tensors(path: str | Path) -> Any:
    """Read any ``torch.save`` file that holds plain data only; same errors as :func:`load_checkpoint`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot read the checkpoint ({e.strerror or e})") from None
    except pickle.UnpicklingError as e:
        if "Weights only" in str(e) and "Unsupported operand" not in str(e):  # the latter: no pickle at all
            raise CheckpointError(f"{path}: refused: it holds code or objects, not only weights") from None
        raise CheckpointError(f"{path}: damaged or not a checkpoint") from None
    except (RuntimeError, EOFError, ValueError, LookupError, struct.error):
        raise CheckpointError(f"{path}: damaged or not a checkpoint") from None


def inference_content(name: str, model_config: ModelConfig, state_dict: dict, meta: dict | None = None) -> dict:
    """The content of an inference checkpoint: architecture, weights and free-form ``meta`` (plain values only)."""
    return {
        "format": FORMAT,
        "name": name,
        "model": to_dict(model_config),
        "state_dict": {k: v.detach().cpu().contiguous() for k, v in state_dict.items()},
        "meta": meta or {},
    }


def take_training(content: dict, path: str | Path, out: str | Path) -> dict:
    """Take what only ``--resume`` needs out of a checkpoint's content, which is then to be written to ``out``; {} where
    there is none.

    Raises:
        CheckpointError: ``out`` is that very file: its run could not be resumed any more.
    """
    training = content.pop("training", None)
    if training and Path(out).resolve() == Path(path).resolve():
        raise CheckpointError(f"{out}: would overwrite the run's state; choose another --out")
    return training or {}


def last_progress(training: dict, epochs: int) -> float:
    """The share of training that a run had done when its last step began. Runs of earlier versions kept none: of those,
    when the epoch in progress began, or just before where nothing of it was done."""
    begun = training["epoch"] / epochs
    return training.get("progress", begun if training["done"] else math.nextafter(begun, -1))


def part_of(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a state dict that begin with ``prefix``, without it: the state dict of that part."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def check_architecture(
    path: str | Path, name: str, config: ModelConfig, expect: ModelConfig | None, expect_name: str
) -> None:
    """Raises CheckpointError where a file holds (``name``, ``config``) another architecture than the caller asked for
    (None = any)."""
    if expect is None or replace(expect, dropblock=config.dropblock) == config:  # DropBlock has no weights
        return
    ours, theirs = to_dict(expect), to_dict(config)
    key = next(k for k in ours if ours[k] != theirs[k] and k != "dropblock")
    raise CheckpointError(
        f"{path}: holds '{name}' (model.{key}={theirs[key]!r}) but '{expect_name}' was asked for "
        f"(model.{key}={ours[key]!r})"
    )


def load_model(
    path: str | Path, device: torch.device | str = "cpu", expect: ModelConfig | None = None, expect_name: str = "config"
) -> tuple[FeatherFace, dict]:
    """Rebuild the network a checkpoint describes and load its weights strictly.

    Args:
        expect: when given, the architecture the caller asked for; another one in the file is an error naming both.

    Returns:
        The model in eval mode on ``device``, and the checkpoint without its tensors (``name``, ``model``, ``meta``).

    Raises:
        CheckpointError: unreadable file, other architecture, or weights that do not fit it.
    """
    from models.featherface import build_model  # the model file imports layers; keep this module light

    content = load_checkpoint(path)
    name = content.get("name", "")
    try:
        config = from_dict(ModelConfig, content["model"], str(path), "model.")
    except (KeyError, ConfigError) as e:
        raise CheckpointError(f"{path}: its architecture cannot be read: {e}") from None
    check_architecture(path, name, config, expect, expect_name)
    model = build_model(config).float()  # whatever the program's default is: weights are not to be rounded
    try:
        model.load_state_dict(content["state_dict"])
    except (KeyError, RuntimeError, TypeError) as e:
        first = str(e).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{path}: weights do not fit '{name}': {first}") from None
    return model.to(device).eval(), {"name": name, "model": content["model"], "meta": content.get("meta", {})}
