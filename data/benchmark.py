"""How fast the training pipeline alone delivers: crops per second by path, square size and batch size.

    python -m data.benchmark --config v2_ultra --sizes 320 640 --batches 16 64 --seconds 5 --json

The first epoch of the device path is slower on a CPU: pages of the cache are mapped as they are first touched. The
warm-up batches are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from data.pipeline import Pipeline, build_pipeline
from models.detector import pick_device
from utils.arguments import above_zero, positive
from utils.benchmark import wait_for
from utils.command import FINISHED, command
from utils.config import add_opts, load_config


def measure(pipeline: Pipeline, size: int, batch_size: int, seconds: float, warmup: int = 2) -> float:
    """Crops per second over about ``seconds`` of delivering batches (at least one), after ``warmup`` batches."""
    pipeline.set_stage(size, batch_size)
    done, epoch, start = -warmup, 0, 0.0
    while True:
        for _ in pipeline.batches(epoch):
            done += 1
            if done <= 0:
                continue
            if done == 1:  # the first counted batch only starts the clock
                wait_for(pipeline.device)
                start = time.perf_counter()
            elif time.perf_counter() - start >= seconds:
                wait_for(pipeline.device)
                return (done - 1) * batch_size / (time.perf_counter() - start)
        epoch += 1


@command("data.benchmark")
def main(argv: list[str] | None = None) -> int:
    """Command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file or a name in configs/")
    add_opts(parser)
    parser.add_argument("--paths", nargs="+", choices=("loader", "device"), default=["loader", "device"])
    parser.add_argument("--sizes", nargs="+", type=positive, default=[320, 640])
    parser.add_argument("--batches", nargs="+", type=positive, default=[16, 64])
    parser.add_argument("--seconds", type=above_zero, default=5.0, help="per measurement (default 5)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of this process")
    parser.add_argument("--json", action="store_true", help="also print a JSON object on the last line")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    device = pick_device(args.device)
    print("| path | size | batch | crops/s |\n|---|---|---|---|")
    for path in args.paths:
        cfg = load_config(args.config, [*args.opts, f"data.pipeline={path}"])
        pipeline = build_pipeline(cfg, device)
        for size in args.sizes:
            for batch in args.batches:
                rate = measure(pipeline, size, batch, args.seconds)
                rows.append({"path": path, "size": size, "batch": batch, "crops_per_second": round(rate, 1)})
                print(f"| {path} | {size} | {batch} | {rate:.0f} |", flush=True)
    if args.json:
        print(json.dumps({"device": str(device), "threads": args.threads, "rows": rows}))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
