"""How fast a training step is and what memory it takes, without the data pipeline (that is data/benchmark.py).

    python -m utils.step_benchmark --config v2_ultra --sizes 320 640 --batches 8 32 --threads 1 --json

Every row runs in a process of its own, so that its peak memory is its own: allocated CUDA memory, or on a CPU the
resident memory above that of the loaded program.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from layers.losses import MultiBoxLoss
from models.detector import pick_device
from models.featherface import build_model
from utils.arguments import positive
from utils.benchmark import memory_of, wait_for
from utils.command import FINISHED, command
from utils.config import Config, add_opts, load_config
from utils.engine import mixed_precision
from utils.optim import EMA, build_optimizer

FACES = 20  # per image, about the mean of WIDERFace


def measure(cfg: Config, size: int, batch_size: int, steps: int, device_name: str, threads: int) -> dict:
    """Time ``steps`` training steps (forward, loss, backward, clip, optimiser, EMA) on made-up images."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    cuda = device.type == "cuda"
    model = build_model(cfg.model).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(cfg.train, model, ())
    ema = EMA(model, cfg.train.ema_decay)
    criterion = MultiBoxLoss(cfg.loss, cfg.model.variances).to(device)
    batch = made_up_batch(batch_size, size, device)
    base = 0 if cuda else memory_of("VmRSS")
    amp = mixed_precision(cfg.train.amp, device)
    started = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first step warms up
            wait_for(device)
            started = time.perf_counter()
        with amp:
            out = model(batch["images"])
        anchors = model.anchors(size, size, device)
        total = criterion(out, batch, anchors, criterion.assign(out, batch, anchors))["total"]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()
        ema.update_parameters(model)
    wait_for(device)
    seconds = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated(device) if cuda else memory_of("VmHWM") - base
    return {
        "size": size,
        "batch": batch_size,
        "ms": round(1000 * seconds, 1),
        "images_per_second": round(batch_size / seconds, 1),
        "peak_mib": round(peak / 2**20),
    }


def made_up_batch(batch_size: int, size: int, device: torch.device) -> dict:
    """Noise with :data:`FACES` boxes of 8 to 64 pixels per image, in the form of ``Pipeline.batches``."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(batch_size, FACES, 2, generator=generator) * size
    half = 4 + 28 * torch.rand(batch_size, FACES, 1, generator=generator)
    landmarks = centre[:, :, None] + (torch.rand(batch_size, FACES, 5, 2, generator=generator) - 0.5) * half[..., None]
    images = torch.randn(batch_size, 3, size, size, generator=generator) * 60
    known = torch.ones(batch_size, FACES, dtype=torch.bool)
    batch = {
        "images": images.contiguous(memory_format=torch.channels_last),
        "boxes": torch.cat([centre - half, centre + half], -1),
        "landmarks": landmarks,
        "has_landmarks": known,
        "valid": known,
        "ignore": ~known,
    }
    return {k: v.to(device) for k, v in batch.items()}


@command("utils.step_benchmark")
def main(argv: list[str] | None = None) -> int:
    """Command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m utils.step_benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file or a name in configs/")
    add_opts(parser)
    parser.add_argument("--sizes", nargs="+", type=positive, default=[320, 640])
    parser.add_argument("--batches", nargs="+", type=positive, default=[8, 32])
    parser.add_argument("--steps", type=positive, default=5, help="timed steps per row (default 5)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="also print a JSON object on the last line")
    args = parser.parse_args(argv)
    cfg = load_config(args.config, args.opts)
    device = str(pick_device(args.device))
    rows = []
    print("| size | batch | ms / step | images/s | peak MiB |\n|---|---|---|---|---|")
    for size in args.sizes:
        for batch in args.batches:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row = pool.submit(measure, cfg, size, batch, args.steps, device, args.threads).result()
            rows.append(row)
            print("| " + " | ".join(str(v) for v in row.values()) + " |", flush=True)
    if args.json:
        print(json.dumps({"device": device, "threads": args.threads, "rows": rows}))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
