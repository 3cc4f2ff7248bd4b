"""The core of benchmark.py: timing several detectors fairly, their peak memory, the table and the plot.

Contenders are timed in turns, so that whatever else the machine does hits all alike, and ratios compare times of the
same turn only.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from utils.figures import save_figure
from utils.onnx_backend import import_onnxruntime
from widerface_evaluate.ground_truth import SUBSETS

MIB = 2**20
LEAST_RUNS = 5


class Runner(Protocol):
    """A loaded detector. ``prepare`` and ``network`` may be absent where it runs as a whole only."""

    def prepare(self, images: Sequence[np.ndarray]) -> Any:
        """RGB uint8 images ``[H, W, 3]`` of one size -> the network's input."""

    def network(self, x: Any) -> Any:
        """The network alone."""

    def __call__(self, image: Sequence[np.ndarray], score: float, nms: float) -> Any:
        """Images to faces, with pre- and post-processing."""


class Loader(Protocol):
    """How to load a contender; picklable, because its memory is measured in a process of its own."""

    source: Path  # the file that decides what it predicts

    def __call__(self, threads: int) -> Runner:
        """The detector, set to so many threads."""


@dataclass(frozen=True)
class Timing:
    """Times of one contender under one condition, in milliseconds per batch; network times are None if unknown."""

    threads: int
    batch: int
    runs: int
    ms: float  # median, images in, faces out
    p95_ms: float
    images_per_second: float
    ratio: float  # to the reference contender, median over turns
    best_ms: float
    network_ms: float | None = None
    network_p95_ms: float | None = None
    network_best_ms: float | None = None
    network_ratio: float | None = None


@dataclass
class Row:
    """A contender and all that is known of it."""

    model: str
    backend: str
    ours: bool
    load: Loader | None  # None: cannot run, see problems
    parameters: int | None = None
    macs: int | None = None
    ap: dict[str, float] = field(default_factory=dict)  # easy, medium, hard
    peak_mib: float | None = None  # of a process that loads and runs it, libraries included
    own_mib: float | None = None  # of that, what came on top of the loaded libraries
    timings: list[Timing] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.backend}"

    def timing(self, threads: int, batch: int) -> Timing | None:
        return next((t for t in self.timings if (t.threads, t.batch) == (threads, batch)), None)

    def as_dict(self) -> dict:
        """For JSON."""
        values = {
            k: getattr(self, k) for k in ("model", "backend", "ours", "parameters", "macs", "peak_mib", "own_mib")
        }
        return {**values, **self.ap, "timings": [vars(t) for t in self.timings], "problems": self.problems}


def interleave(
    calls: Mapping[str, Callable[[], Any]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds ``[runs]`` of every call, taken in turns.

    Each turn times every call once, right after an untimed call of the same kind (whoever ran before has left caches
    and thread pools in its own state); each turn starts one further in the circle, so that none always follows the
    same neighbour's heat.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(runs):
            first = turn % max(len(names), 1)
            for name in names[first:] + names[:first]:
                calls[name]()
                start = clock()
                calls[name]()
                seconds[name].append(clock() - start)
    finally:
        if enabled:
            gc.enable()
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """How many times longer than the reference: the median of the turns' own ratios."""
    return float(np.median(np.divide(seconds, reference)))


def runs_of(runs: int, batch: int) -> int:
    """Turns for a batch size: fewer for large batches, which average within themselves."""
    return max(min(runs, LEAST_RUNS), runs // batch)


def time_rows(
    rows: Sequence[Row],
    image: np.ndarray,
    threads: int,
    batch: int,
    runs: int,
    score: float = 0.5,
    nms: float = 0.4,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time all rows under one condition and add a :class:`Timing` to each; the first that runs is the reference.

    A row that cannot run gets a problem instead.

    Args:
        image: ``[H, W, 3]`` RGB uint8; a batch repeats it.
        score, nms: thresholds of post-processing.
    """
    images = [image] * batch
    calls: dict[str, Callable[[], Any]] = {}
    for number, row in enumerate(rows):
        if row.load is None:
            continue
        try:
            calls.update(_calls(row.load(threads), images, score, nms, str(number)))
        except Exception as e:  # whatever goes wrong in one contender, the others are still of interest
            row.problems.append(f"{condition(threads, batch)}: {one_line(e)}")
    turns = runs_of(runs, batch)
    seconds = interleave(calls, turns, clock)
    reference = next((str(n) for n in range(len(rows)) if f"{n} whole" in seconds), None)
    for number, row in enumerate(rows):
        whole, network = seconds.get(f"{number} whole"), seconds.get(f"{number} network")
        if whole is None:
            continue
        base = seconds.get(f"{reference} network")
        row.timings.append(
            Timing(
                threads,
                batch,
                turns,
                ms=1e3 * float(np.median(whole)),
                p95_ms=1e3 * float(np.percentile(whole, 95)),
                images_per_second=batch / float(np.median(whole)),
                best_ms=1e3 * min(whole),
                ratio=ratio(whole, seconds[f"{reference} whole"]),
                network_ms=1e3 * float(np.median(network)) if network else None,
                network_p95_ms=1e3 * float(np.percentile(network, 95)) if network else None,
                network_best_ms=1e3 * min(network) if network else None,
                network_ratio=ratio(network, base) if network and base else None,
            )
        )


def _calls(
    runner: Runner, images: list[np.ndarray], score: float, nms: float, prefix: str
) -> dict[str, Callable[[], Any]]:
    """What to time of a runner; each has run once, so that a runner that fails does so here."""

    def whole() -> Any:
        return runner(images, score=score, nms=nms)

    calls = {f"{prefix} whole": whole}
    if hasattr(runner, "network"):
        x = runner.prepare(images)
        calls[f"{prefix} network"] = lambda: runner.network(x)
    for call in calls.values():
        call()
    return calls


def measure_memory(row: Row, image: np.ndarray, threads: int, batch: int, score: float = 0.5, nms: float = 0.4) -> None:
    """Fill in the row's memory figures, measured in a fresh process (Linux only; elsewhere they stay None)."""
    if not Path("/proc/self/status").is_file():
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            peak, before = pool.submit(_memory_of, row.load, image, threads, batch, score, nms).result()
        except Exception as e:  # it was fine in this process: killed for memory, or out of it
            row.problems.append(f"memory unknown ({one_line(e)})")
            return
    row.peak_mib, row.own_mib = peak / MIB, (peak - before) / MIB


def _memory_of(load: Loader, image: np.ndarray, threads: int, batch: int, score: float, nms: float) -> tuple[int, int]:
    """Peak resident bytes of this process, and what was resident before the contender was loaded (the libraries)."""
    import_onnxruntime()  # so that no contender has to pay for it

    gc.collect()
    before = memory_of("VmRSS")
    images = [image] * batch
    runner = load(threads)
    for _ in range(2):
        runner(images, score=score, nms=nms)
    return memory_of("VmHWM"), before


def memory_of(key: str) -> int:
    """The memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak.

    (``ru_maxrss`` would include what the parent had before exec.)
    """
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def condition(threads: int, batch: int) -> str:
    """What to call a condition."""
    return f"{threads} thread{'s' * (threads > 1)}, batch {batch}"


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def table(rows: Sequence[Row], conditions: Sequence[tuple[int, int]]) -> str:
    """The Markdown table: ratios to the reference first, then absolute times; below it what could not run and why.

    Args:
        conditions: (threads, batch) pairs.
    """
    heads = ["model", "runtime", "parameters", "MMACs", "AP easy / medium / hard"]
    heads += [f"× ours: {condition(*c)}" for c in conditions]
    heads += [f"ms: {condition(*c)}" for c in conditions]
    heads += ["peak MiB (without libraries)"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * 2 + "|---:" * (len(heads) - 2) + "|"]
    for row in rows:
        timings = [row.timing(*c) for c in conditions]
        ap = " / ".join(f"{row.ap[s]:.4f}" for s in SUBSETS) if row.ap else ""
        cells = [
            f"**{row.model}**" if row.ours else row.model,
            row.backend,
            f"{row.parameters:,}" if row.parameters else "",
            f"{row.macs / 1e6:,.0f}" if row.macs else "",
            ap,
            *(_ratio_cell(t) for t in timings),
            *(_time_cell(t) for t in timings),
            f"{row.peak_mib:,.0f} ({row.own_mib:,.0f})" if row.peak_mib else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {row.name}: {problem}" for row in rows for problem in row.problems]
    if notes:
        lines += ["", "Not all could be measured:", "", *notes]
    return "\n".join(lines)


def _ratio_cell(t: Timing | None) -> str:
    if t is None:
        return "-"
    return f"{t.ratio:.2f} ({t.network_ratio:.2f})" if t.network_ratio else f"{t.ratio:.2f}"


def _time_cell(t: Timing | None) -> str:
    if t is None:
        return "cannot run, see below"
    network = f"; network {t.network_ms:.1f}, {t.network_p95_ms:.1f}" if t.network_ms else ""
    return f"{t.ms:.1f}, {t.p95_ms:.1f}{network}; {t.images_per_second:.1f}/s"


def legend(rows: Sequence[Row]) -> str:
    """How to read the table."""
    reference = next((row.name for row in rows if row.timings), "none ran")
    return (
        f"× ours = time relative to {reference}, images in to faces out (in brackets: the networks alone). "
        "ms = median, 95th percentile per batch, images in to faces out; the network alone; images per second. "
        "Peak MiB is of a process at the first condition, in brackets without what the imported libraries take."
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points ``(cost, gain)`` that no other beats in both, by rising cost."""
    best, front = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            front.append(i)
    return front


def plot(rows: Sequence[Row], threads: int, batch: int, out: str | Path) -> int:
    """Draw Hard AP over latency and over parameters, with the Pareto fronts; a model on its fastest runtime.

    Returns:
        how many models are in it: those with an AP and a time.

    Raises:
        UsageError, OSError: as :func:`~utils.figures.save_figure`.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    fastest: dict[str, tuple[Row, float]] = {}
    for row in rows:
        timing = row.timing(threads, batch)
        if row.ap and row.parameters and timing and timing.ms < fastest.get(row.model, (row, math.inf))[1]:
            fastest[row.model] = row, timing.ms
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    by_time, by_size = figure.subplots(1, 2)
    _draw_front(by_time, [(row.name, ms, row) for row, ms in fastest.values()])
    by_time.set_xlabel(f"ms per batch, images in to faces out ({condition(threads, batch)})")
    _draw_front(by_size, [(row.model, row.parameters, row) for row, _ in fastest.values()])
    by_size.set_xlabel("parameters")
    save_figure(figure, out, dpi=120)
    return len(fastest)


def _draw_front(ax: Any, items: Sequence[tuple[str, float, Row]]) -> None:
    """Points (label, cost, row) and the Pareto front on one matplotlib axis; our labels stand above, others below."""
    points = [(cost, row.ap["hard"]) for _, cost, row in items]
    front = [points[i] for i in pareto_front(points)]
    ax.plot([cost for cost, _ in front], [hard for _, hard in front], color="0.7", zorder=1)
    for point, (label, _, row) in zip(points, items):
        ax.scatter(*point, color="C3" if row.ours else "C0", zorder=2)
        offset = (4, 5) if row.ours else (4, -12)
        ax.annotate(label, point, xytext=offset, textcoords="offset points", fontsize="small")
    ax.set_xscale("log")
    ax.set_ylabel("AP, Hard")
    ax.margins(x=0.25, y=0.1)
    ax.grid(alpha=0.3)
