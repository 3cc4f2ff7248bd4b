"""Training and evaluating the runs of an ablation; what is finished is not done again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.dataset import select_dataset
from models.detector import FaceDetector
from utils.ablation import Row, Study
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.config import ROOT, Config, ConfigError, DataConfig, from_dict, to_dict
from utils.files import whole
from utils.onnx_backend import fingerprint
from utils.resume import first_difference
from utils.trainer import LAST
from utils.validation import ground_truth, readable
from widerface_evaluate import GroundTruth, image_key, load_ground_truth, load_list
from widerface_evaluate.images import KEEP_ALL, detect_images, find_images
from widerface_evaluate.predictions import to_xywh

SCRIPT = "train_v2_progressive.py"
CONSOLE = "console.log"
SHOWN_ERROR = 300  # characters
# What a run began from. An ordinary one may be resumed without it; a row of the table is not the same row then.
START_KEYS = {*(f"train.{k}_weights" for k in ("init", "inherit", "backbone")), "distill.init_mimics"}


class RunError(RuntimeError):
    """One run cannot be trained or evaluated; one line. The others go on."""


class Stopped(BaseException):
    """A signal asked the ablation to stop; the run in progress has saved its state. ``code`` is the exit code."""

    def __init__(self, number: int):
        self.code = 128 + number


@dataclass(frozen=True)
class Launch:
    """How training processes are started."""

    device: str | None = None
    threads: int | None = None
    processes: int = 1

    def command(self, study: Study, row: Row, seed: int, out: Path) -> list[str]:
        """The command that trains (or continues) one run; it can be repeated by hand."""
        launcher = (
            ["-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)] if self.processes > 1 else []
        )
        more = ["--device", self.device] if self.device else []
        more += ["--threads", str(self.threads)] if self.threads else []
        options = ["--config", row.config, "--opts", *study.overrides(row, seed), "--out", str(out), "--resume", *more]
        return [sys.executable, *launcher, os.path.relpath(ROOT / SCRIPT), *options]


@dataclass
class EvalSet:
    """Images with ground truth; ``names`` lie in ``folder``, ``keys`` are their names in ``truth``."""

    name: str
    folder: Path
    names: list[str]
    keys: list[str]
    truth: GroundTruth


def run_folder(out: Path, row: Row, seed: int) -> Path:
    """Where a run lives: ``out/<name>-s<seed>``."""
    return out / f"{row.run}-s{seed}"


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["python", *command[1:]])


def select_set(cfg: DataConfig) -> EvalSet:
    """``train_select`` (or what ``data.val_labels`` names). Raises DataError."""
    dataset = readable(select_dataset(cfg), cfg.on_bad_image)
    labels = cfg.val_labels or cfg.select_labels
    folder = Path(cfg.root) / Path(labels).parent / "images"
    truth = ground_truth(dataset, list(range(len(dataset))))
    names = [str(p.relative_to(folder)) for p in dataset.paths]
    return EvalSet(cfg.val_labels or "train_select", folder, names, truth.names, truth)


def official_set(images: str, gt: str, listed: str, look: bool = True) -> EvalSet:
    """WIDERFace val images with the official Easy, Medium and Hard. Raises EvaluationError.

    ``look`` for the images at once: a mistake in the folder's name is found before the first row trains.
    """
    names = load_list(listed)
    if look:
        find_images(images, names)
    truth = load_ground_truth(gt, names)
    return EvalSet("val_dev", Path(images), names, [image_key(n) for n in names], truth)


def finished_step(folder: Path, cfg: Config) -> int | None:
    """Steps of a finished run; None = not begun or not finished.

    Raises:
        RunError: it was made with another config or from other weights, or its checkpoint cannot be read.
    """
    path = folder / LAST
    if not path.exists():
        return None
    try:
        training = load_checkpoint(path)["training"]
        saved = to_dict(from_dict(Config, training["config"], str(path)))
        difference = first_difference(saved, to_dict(cfg), fixed=START_KEYS)
        epoch, step = int(training["epoch"]), int(training["step"])
    except (CheckpointError, ConfigError) as e:
        raise RunError(str(e)) from None
    except KeyError as e:
        raise RunError(f"{path}: not a training checkpoint (no {e})") from None
    if difference:
        key, old, new = difference
        raise RunError(f"{path}: was made with {key}={old!r}, now it is {new!r}; choose another --out")
    return step if epoch >= cfg.train.epochs else None


def train(command: Sequence[str], folder: Path) -> None:
    """Run a training command to its end; what it prints goes to ``folder/console.log``.

    Raises:
        RunError: it failed; the text is the last thing it said.
        Stopped: this process was told to stop. The training was told so too, and has saved its state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    console = folder / CONSOLE
    received: list[int] = []
    child: subprocess.Popen | None = None

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(signal.SIGTERM)

    # Ctrl-C and SIGTERM tell the child, which has a session of its own and so hears them once, to save and end.
    old = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(console, "ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            if received:  # just before the child was there
                child.send_signal(signal.SIGTERM)
            code = child.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if received:
        raise Stopped(received[0])
    if code:
        raise RunError(f"exit code {code}: {_last_words(console)}")


def _last_words(console: Path) -> str:
    """The error of a failed run: what the script said, or else the last line."""
    lines = [line.strip() for line in console.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(f"{SCRIPT}: ")]
    return (said or lines or ["it said nothing"])[-1][-SHOWN_ERROR:].removeprefix(f"{SCRIPT}: ")


def predictions(
    folder: Path, tests: Sequence[EvalSet], tta: bool, scale: str, device: str | None
) -> dict[str, dict[str, np.ndarray]]:
    """Predictions of a finished run's final EMA weights on each set, kept in its folder.

    The final weights, not ``best.pth``: the best of many validations on train_select would flatter there.

    Returns:
        set name -> image key -> ``[n, 5]`` x y w h score, pixels.

    Raises:
        CheckpointError, EvaluationError: one line.
    """
    found, detector, source = {}, None, fingerprint(folder / LAST)
    for test in tests:
        suffix = ("_tta" if tta else "") + ("" if scale == "original" else f"_{scale}")
        path = folder / f"preds_{test.name.replace('/', '_')}{suffix}.npz"
        preds = load_kept(path, source, test.keys)
        if preds is None:
            if detector is None:
                detector = FaceDetector.from_pretrained(folder / LAST, device=device, keep_k=KEEP_ALL)
            key_of = dict(zip(test.names, test.keys))
            seen = detect_images(detector, test.folder, test.names, scale=scale, tta=tta)
            preds = {key_of[name]: to_xywh(faces) for name, faces in seen}
            keep(path, source, preds)
        found[test.name] = preds
    return found


def keep(path: Path, source: str, preds: dict[str, np.ndarray]) -> None:
    """Write predictions, all or nothing; ``source`` is the fingerprint of the checkpoint that made them."""
    with whole(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            source=source,
            limit=KEEP_ALL,  # faces per image
            keys=np.array(list(preds), dtype=np.str_),
            counts=np.array([len(p) for p in preds.values()], dtype=np.int64),
            boxes=np.concatenate([np.zeros((0, 5)), *preds.values()]).astype(np.float32),
        )


def load_kept(path: Path, source: str, keys: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Predictions written by :func:`keep`; None unless they are of this checkpoint and exactly these images."""
    try:
        with np.load(path) as content:
            names = content["keys"].tolist()
            if str(content["source"]) != source or int(content["limit"]) != KEEP_ALL or set(names) != set(keys):
                return None
            parts = np.split(content["boxes"].astype(np.float64), np.cumsum(content["counts"])[:-1])
            return dict(zip(names, parts))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):  # a damaged file
        return None
