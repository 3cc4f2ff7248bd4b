"""The command line that the training scripts share."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from contextlib import nullcontext

import torch

from models.detector import pick_device
from utils.arguments import above_zero, positive
from utils.command import FINISHED, Problem, command
from utils.config import add_opts, load_config
from utils.distributed import own_gpu, start_world
from utils.trainer import BEST, TIME_UP, Trainer

WARM_UP = 10  # steps before --profile looks: a GPU's libraries first try out how to compute each layer


def main(prog: str, description: str, config: str, argv: list[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code.

    0 finished or time limit reached, 1 data or files at fault or a non-finite loss, 2 command line or config at fault,
    130 / 143 stopped by Ctrl-C / SIGTERM with everything saved.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", default=config, help=f"YAML file or its bare name (default: {config})")
    add_opts(parser, "overrides, e.g. train.epochs=10")
    parser.add_argument("--out", required=True, help="folder of the run: checkpoints and logs")
    parser.add_argument("--weights", help="start from the weights of this checkpoint (train.init_weights)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--threads", type=positive, help="CPU threads of the training process")
    parser.add_argument(
        "--max-minutes", type=above_zero, help="stop with a checkpoint after so long; --resume continues"
    )
    parser.add_argument(
        "--profile", type=positive, metavar="STEPS", help="time the operations of so many steps, then stop"
    )
    parser.add_argument("--json", action="store_true", help="when finished, print one JSON object on the last line")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return command(prog)(train)(prog, args)


def train(prog: str, args: argparse.Namespace) -> int:
    """Train as the command line says; returns the exit code."""
    cfg = load_config(args.config, args.opts)
    if args.weights:  # as it is: in an override a path would be read as YAML
        cfg.train.init_weights = args.weights
    world = start_world(pick_device(own_gpu(args.device or str(pick_device()))))
    try:
        trainer = Trainer(cfg, args.out, world, args.resume, args.max_minutes)
        with _profiler(trainer, args.profile) if args.profile else nullcontext() as profile:
            code = trainer.fit()
    except torch.OutOfMemoryError as e:
        raise Problem(f"{str(e).split('. ')[0]}; use a smaller batch_size in train.stages") from None
    world.close()  # not after an error: the others may be waiting for this process, and closing would wait for them
    if profile and profile.step_num <= WARM_UP and world.main:
        print(f"{prog}: the run ended before --profile looked, at its step {WARM_UP}", file=sys.stderr)
    if world.main and code == FINISHED:
        best, file = trainer.best, trainer.out / BEST
        if best["epoch"]:
            print(f"finished: best AP {best['ap']:.4f} after epoch {best['epoch']}: {file}")
        else:  # nothing is held out
            print(f"finished: {file}")
        if args.json:
            print(json.dumps({"file": str(file), **(best if best["epoch"] else {})}))
    return FINISHED if code == TIME_UP else code


def _profiler(trainer: Trainer, steps: int) -> torch.profiler.profile:
    """Prints which operations took the time of ``steps`` steps, after the ones that warm up, and ends the run."""

    def report(profile: torch.profiler.profile) -> None:
        times = "self_cuda_time_total" if trainer.world.device.type == "cuda" else "self_cpu_time_total"
        if trainer.world.main:
            print(profile.key_averages().table(sort_by=times, row_limit=40, max_name_column_width=80))
        trainer.deadline = 0.0

    schedule = torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
    profile = torch.profiler.profile(schedule=schedule, on_trace_ready=report, acc_events=True)
    trainer.on_step = profile.step
    return profile
