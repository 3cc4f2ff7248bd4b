"""Ablation: train each innovation on and off at equal budget, and write a table that says what is noise.

    python ablate.py --config configs/v2_ultra_plan.yaml --seeds 0 1 --opts train.epochs=20 --out runs/ablation
    python ablate.py --study ladder --list
    python ablate.py --study family --only v1 v2 --out runs/family --resume
    python ablate.py --out runs/ablation --report-only --val-dev IMAGES GROUND_TRUTH LIST

Writes OUT/<study>.md and OUT/<study>.json; every run is an ordinary training run in OUT/<row>-s<seed>.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch

from models.detector import pick_device
from utils.ablation import MODES, STUDIES, Row, Study, build_study
from utils.ablation_report import build_report, markdown
from utils.ablation_runs import (
    EvalSet,
    Launch,
    RunError,
    Stopped,
    finished_step,
    official_set,
    predictions,
    run_folder,
    select_set,
    shown,
    train,
)
from utils.arguments import natural, positive
from utils.checkpoint import CheckpointError
from utils.command import FAILED, FINISHED, command
from utils.config import ConfigError, add_opts
from utils.files import whole
from utils.inputs import add_scale
from utils.trainer import LAST
from widerface_evaluate import EvaluationError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--config", default="configs/v2_ultra_plan.yaml", help="YAML file or its bare name")
    p.add_argument("--study", choices=STUDIES, default="innovations")
    p.add_argument("--mode", choices=MODES, default=MODES[0], help="innovations: on a bare base, or off a full network")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these rows, and the reference")
    p.add_argument("--seeds", nargs="+", type=natural, default=[0, 1], metavar="N", help="(default: 0 1)")
    add_opts(p, "for every row, e.g. train.epochs=4")
    p.add_argument("--out", default="runs/ablation", help="folder of runs and report (default: runs/ablation)")
    p.add_argument("--resume", action="store_true", help="skip finished runs of --out, continue half-finished ones")
    p.add_argument("--report-only", action="store_true", help="train nothing: evaluate and report what is finished")
    p.add_argument("--list", action="store_true", help="only show the rows and their commands")
    p.add_argument("--val-dev", nargs=3, metavar=("IMAGES", "GT", "LIST"), help="also report official E/M/H there")
    add_scale(p)
    p.add_argument("--samples", type=positive, default=1000, help="bootstrap resamples (default 1000)")
    p.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    p.add_argument("--threads", type=positive, help="CPU threads of each training process and of the evaluation")
    p.add_argument("--processes", type=positive, default=1, help="train each run on so many processes (torchrun)")
    p.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return p


def finish(study: Study, row: Row, seed: int, out: Path, launch: Launch, may_train: bool) -> int | None:
    """Bring one run to its end, however far it is; returns its steps, None where it is unfinished and may stay so.

    Raises:
        RunError: it cannot be finished.
    """
    folder, cfg = run_folder(out, row, seed), study.load(row, seed)
    step = finished_step(folder, cfg)
    if step is None and may_train:
        train(launch.command(study, row, seed, folder), folder)
        step = finished_step(folder, cfg)
        if step is None:
            raise RunError(f"{folder}: ended without finishing its training")
    return step


def run(args: argparse.Namespace, study: Study, tests: list[EvalSet], launch: Launch) -> tuple[dict, bool]:
    """Train, evaluate, compare; returns the report and whether every run came through."""
    out = Path(args.out)
    found, errors = {}, {}
    jobs = [(row, seed) for seed in args.seeds for row in study.rows]  # a whole table per seed, then the next
    for number, (row, seed) in enumerate(jobs, 1):
        started = time.perf_counter()
        try:
            if finish(study, row, seed, out, launch, not args.report_only) is None:
                errors[row.name, seed] = "not run" if not run_folder(out, row, seed).exists() else "not finished"
                continue
            folder = run_folder(out, row, seed)
            found[row.name, seed] = predictions(folder, tests, row.tta, args.scale, args.device)
            said = "done"
        except (RunError, CheckpointError, EvaluationError, OSError) as e:
            errors[row.name, seed] = f"failed: {e}"
            said = errors[row.name, seed]
        minutes = (time.perf_counter() - started) / 60
        print(f"[{number}/{len(jobs)}] {row.name} seed {seed}: {said} ({minutes:.1f} min)", file=sys.stderr, flush=True)
    report = build_report(study, args.seeds, out, tests, found, errors, launch, args.samples)
    if found:  # an earlier report is worth more than one of failures alone
        for suffix, text in ((".md", markdown(report)), (".json", json.dumps(report, indent=1) + "\n")):
            with whole(out / f"{study.stem}{suffix}") as part:
                part.write_text(text, encoding="utf-8")
    return report, not any(why.startswith("failed") for why in errors.values())


@command("ablate.py")
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 if a run failed, 2 for mistakes in the command or a config."""
    p = parser()
    args = p.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.threads:
        torch.set_num_threads(args.threads)
    out, launch = Path(args.out), Launch(args.device, args.threads, args.processes)
    pick_device(args.device)
    try:
        study = build_study(args.study, args.config, args.opts, args.mode, args.only)
        if not args.report_only and any(study.load(row, args.seeds[0]).train.patience for row in study.rows):
            raise ConfigError(f"{args.config}: 'train.patience' must be 0: rows are compared at equal budget")
        if args.list:
            for row in study.rows:
                print(f"{row.name}: {row.label}")
                for seed in args.seeds:
                    print(f"  {shown(launch.command(study, row, seed, run_folder(out, row, seed)))}")
            return FINISHED
        begun = [f for r in study.rows for s in args.seeds if (f := run_folder(out, r, s)).joinpath(LAST).exists()]
        if begun and not (args.resume or args.report_only):
            raise ConfigError(f"{begun[0]}: holds a run already; add --resume to continue, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        tests = [select_set(study.load(study.rows[0], args.seeds[0]).data)]
        if args.val_dev:
            tests.append(official_set(*args.val_dev, look=not args.report_only))
        report, complete = run(args, study, tests, launch)
    except Stopped as e:
        print("ablate.py: stopped; --resume continues", file=sys.stderr)
        return e.code
    print(markdown(report))
    if args.json:
        print(json.dumps(report))
    return FINISHED if complete else FAILED


if __name__ == "__main__":
    sys.exit(main())
