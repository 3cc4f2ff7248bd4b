"""What a run tells: JSON lines, TensorBoard and a progress bar. Only the main process writes."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.command import Problem
from utils.files import whole


class LogError(Problem, RuntimeError):
    """The log cannot be written; one line naming the file."""


class RunLogger:
    """Writes ``log.jsonl`` (one object per line, each with ``kind`` and ``step``) and TensorBoard events.

    Args:
        out: folder of the run.
        step: where the run (re)starts; later lines of an earlier attempt are cut off, so that none appears twice.
        validated: whether the validation after that step, if there is one, is done.
        total: steps of the whole run, for the progress bar.
        enabled: False on all but the main process.
    """

    def __init__(self, out: Path, step: int, total: int, enabled: bool = True, validated: bool = True):
        self.enabled = enabled
        self.path = out / "log.jsonl"
        self.bar = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second of import that only the main process needs

        try:
            kept = truncate(self.path, step, validated)
            self.file = open(self.path, "a", encoding="utf-8")
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if kept else None)
        except OSError as e:
            raise self._error(e) from None
        self.bar = tqdm(total=total, initial=step, unit="step", disable=None, dynamic_ncols=True, smoothing=0.1)

    def write(self, kind: str, values: dict) -> None:
        """Add a line; every number but ``step`` also becomes a TensorBoard scalar under ``kind``."""
        if not self.enabled:
            return
        try:
            self.file.write(json.dumps({"kind": kind, **values}) + "\n")
            self.file.flush()
            for key, value in values.items():
                if key != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{key}", value, values["step"])
        except OSError as e:
            raise self._error(e) from None

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """RGB uint8 ``[H, W, 3]`` to TensorBoard."""
        if self.enabled:
            self.board.add_image(name, image, step, dataformats="HWC")

    def advance(self, **shown: str) -> None:
        """Move the progress bar by one step."""
        if self.bar is not None:
            self.bar.update()
            if shown:
                self.bar.set_postfix(shown, refresh=False)

    def say(self, text: str) -> None:
        """One line for the person at the terminal."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close files; safe to call twice."""
        if self.enabled:
            self.bar.close()
            with contextlib.suppress(OSError):  # a full disk has been reported by then
                self.file.close()
                self.board.close()

    def _error(self, e: OSError) -> LogError:
        return LogError(f"{self.path}: cannot write the log ({e.strerror or e})")


def truncate(path: Path, step: int, validated: bool = True) -> int:
    """Drop the lines of a log after ``step`` (unless ``validated`` also that of the validation then) and any
    half-written one; returns how many remain."""
    if not path.exists():
        return 0
    kept = [line for line in read_lines(path) if line["step"] <= step - (not validated and line["kind"] == "val")]
    with whole(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return len(kept)


def read_lines(path: str | Path) -> list[dict]:
    """The objects of a log; what a kill left half-written is skipped."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
