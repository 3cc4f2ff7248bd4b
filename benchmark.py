#!/usr/bin/env python3
"""Latency, throughput, memory and accuracy of our models and of peers, side by side.

    python benchmark.py --models v2_ultra v1 retinaface_mnet025 --peers ../shared/peers
    python benchmark.py --peers ../shared/peers --images data/widerface/val/images \
        --gt data/widerface/val/ground_truth --list widerface_evaluate/val_dev.txt --plot pareto.png --out table.md
    python benchmark.py --models config:v2 --threads 1 --batch 1      # random weights: speed only

All contenders are timed in turns on the same picture; close other programs all the same.
Exit code: 0 = fine, 1 = something could not be read or written, 2 = mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from models.summary import parse_size
from utils.arguments import fraction, positive
from utils.benchmark import Row, condition, legend, measure_memory, plot, table, time_rows
from utils.checkpoint import CheckpointError
from utils.command import FINISHED, command
from utils.contenders import BACKENDS, RANDOM, average_precision, our_rows, peer_rows, verify
from utils.files import whole
from utils.image import read_image, resize, sample_photo
from utils.onnx_backend import import_onnxruntime
from utils.weights import DEFAULT, PUBLISHED, find_weights
from widerface_evaluate import EvaluationError, GroundTruth, load_ground_truth, load_list
from widerface_evaluate.images import find_images

OURS = (DEFAULT, *PUBLISHED)


def default_models() -> list[str]:
    """:data:`OURS`, with random weights where this machine has none."""
    found = []
    for name in OURS:
        try:
            find_weights(name)
            found.append(name)
        except CheckpointError:
            found.append(f"{RANDOM}{name}")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    title, _, usage = __doc__.partition("\n")
    p = argparse.ArgumentParser(
        description=title, epilog=usage.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--models",
        nargs="*",
        metavar="MODEL",
        help="names (v2_ultra, v1, ...), checkpoints, files of export.py, config:NAME for random weights, NAME@1.5 or "
        "NAME@0.75+1.2 for a pyramid (see detect.py); the first is what the others are compared with "
        f"(default: {' '.join(OURS)})",
    )
    p.add_argument("--backends", nargs="+", choices=BACKENDS, default=["onnx", "torch", "opencv"])
    p.add_argument("--peers", metavar="DIR", help="folder of the peers' ONNX files")
    p.add_argument("--size", type=parse_size, default=(640, 480), metavar="WIDTHxHEIGHT", help="default: 640x480")
    p.add_argument("--threads", type=positive, nargs="+", default=[1, 4], help="default: 1 4")
    p.add_argument("--batch", type=positive, nargs="+", default=[1, 16], help="default: 1 16")
    p.add_argument("--runs", type=positive, default=50, help="timed turns (fewer for large batches; default: 50)")
    p.add_argument("--score", type=fraction, default=0.5, help="threshold while timing (default: 0.5)")
    p.add_argument("--picture", metavar="FILE", help="what to time on (default: a portrait that comes with matplotlib)")
    p.add_argument("--images", metavar="DIR", help="for AP: folder of <event>/<name>.jpg")
    p.add_argument("--gt", metavar="DIR", help="for AP: folder of WIDERFace's wider_*_val.mat")
    p.add_argument("--list", metavar="FILE", help="for AP: only these images, 'event/name.jpg' lines")
    p.add_argument("--ap-limit", type=positive, metavar="N", help="for AP: only N images, evenly spread over the list")
    p.add_argument("--out-preds", metavar="DIR", help="write predictions, a folder per contender (for the bootstrap)")
    p.add_argument("--resume", action="store_true", help="take over the predictions already in --out-preds")
    p.add_argument("--plot", metavar="PNG", help="draw Hard AP over latency and parameters")
    p.add_argument("--out", metavar="FILE.md", help="write the table")
    p.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return p


def sample_picture(path: str | None, width: int, height: int) -> np.ndarray:
    """A picture ``[height, width, 3]``: scaled to cover that size and cut out of the middle."""
    image = read_image(path or sample_photo())
    factor = max(height / image.shape[0], width / image.shape[1])
    image = resize(image, max(round(image.shape[0] * factor), height), max(round(image.shape[1] * factor), width))
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def read_truth(args: argparse.Namespace) -> GroundTruth:
    """The images for AP, all of which are there, and their faces. Raises EvaluationError."""
    names = load_list(args.list) if args.list else None
    truth = load_ground_truth(args.gt, names)
    if args.ap_limit and args.ap_limit < len(truth):
        chosen = np.linspace(0, len(truth) - 1, args.ap_limit).round().astype(int)
        truth = truth.take([truth.names[i] for i in chosen])
    find_images(args.images, truth.names)
    return truth


def add_ap(rows: list[Row], args: argparse.Namespace, truth: GroundTruth) -> None:
    """AP of every contender; of our models once, on the first runtime that works: the others compute the same."""
    torch.set_num_threads(max(args.threads))
    known: dict[str, dict[str, float]] = {}
    for row in tqdm(rows, desc="AP", unit="contender", disable=None, file=sys.stderr):
        if not row.timings or (row.ours and "(random)" in row.model):
            continue
        if not row.ours or row.model not in known:
            folder = Path(args.out_preds) / slug(row) if args.out_preds else None
            known[row.model] = average_precision(row, args.images, truth, folder, args.resume)
        row.ap = known[row.model]


def slug(row: Row) -> str:
    """A folder name for a contender; our models have one whatever the runtime."""
    name = row.model if row.ours else f"{row.model}-{row.backend}"
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name.lower()).strip("-")


def machine() -> dict:
    """What the figures were taken on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": import_onnxruntime().__version__,
        "opencv": cv2.__version__,
    }


def processor() -> str:
    """The processor's name where the system tells, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run(args: argparse.Namespace) -> dict:
    """Measure, print and write; returns the JSON object."""
    image = sample_picture(args.picture, *args.size)
    conditions = list(product(args.threads, args.batch))
    truth = read_truth(args) if args.images else None  # what cannot be read is told before the long work
    for file in filter(None, (args.out, args.plot)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    problem = None
    with tempfile.TemporaryDirectory() as exports:
        rows = [row for name in args.models for row in our_rows(name, args.backends, args.size, exports)]
        if args.peers:
            rows += peer_rows(args.peers, args.size)
        about = machine()  # before our own work raises the load
        verify(rows, image)
        for threads, batch in conditions:
            print(condition(threads, batch), file=sys.stderr)
            time_rows(rows, image, threads, batch, args.runs, args.score)
        for row in rows:
            if row.timings:
                measure_memory(row, image, *conditions[0], args.score)
        if truth:
            try:
                add_ap(rows, args, truth)
            except EvaluationError as e:  # the times are told all the same
                problem = e
    text = table(rows, conditions)
    title = f"{args.size[0]}x{args.size[1]}, {about['processor']}, {about['cores']} cores, load {about['load_average']}"
    versions = ", ".join(f"{k} {about[k]}" for k in ("torch", "onnxruntime", "opencv"))
    text = f"{title}; {versions}\n\n{text}\n\n{legend(rows)}"
    print(text)
    if args.out:
        with whole(args.out) as part:
            part.write_text(text + "\n", encoding="utf-8")
    if problem:
        raise problem
    if not any(row.timings for row in rows):
        raise EvaluationError("nothing could be measured; the table says why")
    if args.plot:
        print(f"{args.plot}: {plot(rows, *conditions[0], args.plot)} models")
    return {"size": list(args.size), "machine": about, "rows": [row.as_dict() for row in rows]}


@command("benchmark.py")
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    args.models = default_models() if args.models is None else args.models
    for option in ("models", "backends", "threads", "batch"):  # each once
        setattr(args, option, list(dict.fromkeys(getattr(args, option))))
    if bool(args.images) != bool(args.gt):
        p.error("AP needs both --images and --gt")
    for option in ("plot", "list", "ap_limit", "out_preds"):
        if getattr(args, option) and not args.images:
            p.error(f"--{option.replace('_', '-')} is about AP: give --images and --gt")
    if args.resume and not args.out_preds:
        p.error("--resume needs --out-preds")
    if not args.models and not args.peers:
        p.error("nothing to measure: give --models or --peers")
    output = run(args)
    if args.json:
        print(json.dumps(output))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
