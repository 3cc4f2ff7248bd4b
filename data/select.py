"""``train_select``: the training photos held out for choosing checkpoints and recipes, never for reporting.

python -m data.select data/widerface/train/label.txt > select.txt     # a list for test_widerface.py --list
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import defaultdict

from utils.arguments import natural
from utils.command import FINISHED, command


def event_of(name: str) -> str:
    """The event (first folder) of an image name; ``""`` when it lies in no folder."""
    return name.rpartition("/")[0].partition("/")[0]


def select_names(names: list[str], count: int, seed: int = 0) -> set[str]:
    """Draw ``count`` names, stratified by event.

    A fixed function of the names: each event gives its share (largest remainders), and within an event the names with
    the lowest hashes are taken, so neither the order of the file nor any library's random generator matters.
    """
    events: dict[str, list[str]] = defaultdict(list)
    for name in names:
        events[event_of(name)].append(name)
    total = len(names)
    count = min(count, total)
    shares = {event: count * len(members) / max(total, 1) for event, members in events.items()}
    quota = {event: int(share) for event, share in shares.items()}
    by_remainder = sorted(shares, key=lambda e: (quota[e] - shares[e], _rank(e, seed)))
    for event in by_remainder[: count - sum(quota.values())]:
        quota[event] += 1
    chosen = (sorted(members, key=lambda n: _rank(n, seed))[: quota[event]] for event, members in events.items())
    return {name for group in chosen for name in group}


def _rank(text: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


@command("data.select")
def main(argv: list[str] | None = None) -> int:
    """Print the names, one a line."""
    from data.labels import read_labels

    parser = argparse.ArgumentParser(prog="python -m data.select", description="Print the names of train_select.")
    parser.add_argument("labels", help="RetinaFace label file of the training photos")
    parser.add_argument("--count", type=natural, default=300, help="data.select_images of the config (default 300)")
    args = parser.parse_args(argv)
    names = read_labels(args.labels).names
    print(*sorted(select_names(names, args.count)), sep="\n")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
