"""Curves of one or several runs from their JSON-lines logs.

python -m utils.plot runs/a/log.jsonl [runs/b/log.jsonl ...] --out curves.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils.command import FINISHED, Problem, command
from utils.figures import save_figure
from utils.logger import read_lines

LOSSES = ("total", "class", "box", "landmark")
POINTS = 200  # per curve: more are averaged in groups, so that the trend shows
APS = ("ap_easy", "ap_medium", "ap_hard")


@command("utils.plot")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.plot", description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="+", help="log.jsonl files")
    parser.add_argument("--out", default="curves.png", help="picture to write (default: curves.png)")
    args = parser.parse_args(argv)
    runs = {}
    for log in args.logs:
        try:
            runs[log] = read_lines(log)
        except UnicodeDecodeError:
            raise Problem(f"{log}: cannot read the log (not text)") from None
        if not any(line.get("kind") == "train" for line in runs[log]):
            raise Problem(f"{log}: holds no training lines")
    draw({names_of(list(runs))[log]: lines for log, lines in runs.items()}, args.out)
    print(args.out)
    return FINISHED


def names_of(logs: list[str]) -> dict[str, str]:
    """Short, distinct names of log files: their folder's, or the whole path where that is not distinct."""
    short = [Path(log).resolve().parent.name for log in logs]
    return {log: name if short.count(name) == 1 else log for log, name in zip(logs, short)}


def draw(runs: dict[str, list[dict]], out: str | Path) -> None:
    """Losses, learning rate and validation AP over steps; one line style per run.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = dict(zip((*LOSSES, "lr", "AP on the held-out images"), figure.subplots(2, 3).flat))
    for number, (name, lines) in enumerate(runs.items()):
        train = [line for line in lines if line.get("kind") == "train"]
        for key in (*LOSSES, "lr"):
            steps, values = smooth([(line["step"], line[key]) for line in train if key in line])
            axes[key].plot(steps, values, color=f"C{number}", label=name)
        val = [line for line in lines if line.get("kind") == "val"]
        for key, style in zip(APS, ("-", "--", ":")):
            label = f"{name} {key.removeprefix('ap_')}"
            steps, values = [line["step"] for line in val], [line[key] for line in val]
            axes["AP on the held-out images"].plot(
                steps, values, style, color=f"C{number}", marker="." if len(val) < 50 else None, label=label
            )
    for title, ax in axes.items():
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    axes["lr"].legend()
    axes["AP on the held-out images"].legend(fontsize="small")
    save_figure(figure, out)


def smooth(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, averaged in groups so that at most about :data:`POINTS` remain."""
    group = -(-len(points) // POINTS) or 1
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return [sum(s for s, _ in p) / len(p) for p in parts], [sum(v for _, v in p) / len(p) for p in parts]


if __name__ == "__main__":
    sys.exit(main())
