"""From the predictions of an ablation's runs to its table: gains, their noise, and what each row costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t

from models.featherface import build_model
from models.fuse import fuse_for_inference
from models.summary import summarize
from utils.ablation import BUDGET, Study
from utils.ablation_runs import EvalSet, Launch, run_folder, shown
from utils.config import ModelConfig
from utils.logger import read_lines
from utils.trainer import plan_stages
from widerface_evaluate import GroundTruth, Matches, evaluate_matches, match, resampled_deltas
from widerface_evaluate.ground_truth import SUBSETS

METRICS = ("ap", *SUBSETS)  # ap = mean of the subsets that have faces, what the trainer selects by
SIZE = (640, 480)  # of MACs and latency
ROUNDS = 9
TTA_COST = 7.0  # two mirrored views each at 0.5, 1.0 and 1.5 of the size, in network inputs of size 1.0
WITHIN_NOISE, ONE_SEED = "within noise", "outside image noise; one seed says nothing about training noise"

Predictions = Mapping[tuple[str, int], dict[str, dict[str, np.ndarray]]]  # (row, seed) -> set -> image -> [n, 5]


def present(gt: GroundTruth) -> list[str]:
    """The subsets that have any face; the others have no AP."""
    return [s for s in SUBSETS if gt.valid[s].any()]


def average_precisions(matches: Matches, gt: GroundTruth) -> dict[str, float]:
    """AP of each of :data:`METRICS`, in 0..1."""
    result = evaluate_matches(matches, gt)
    return {"ap": float(np.mean([result[s] for s in present(gt)] or [0.0])), **{s: result[s] for s in SUBSETS}}


def training_noise(aps: Mapping[str, Mapping[int, float]]) -> tuple[float, int]:
    """Standard deviation of AP between seeds, pooled over the rows, and its degrees of freedom (0: not known).

    Args:
        aps: row -> seed -> AP.
    """
    groups = [list(by_seed.values()) for by_seed in aps.values() if len(by_seed) > 1]
    freedom = sum(len(g) - 1 for g in groups)
    squares = sum((len(g) - 1) * statistics.variance(g) for g in groups)
    return (float(np.sqrt(squares / freedom)), freedom) if freedom else (0.0, 0)


def verdict(delta: float, low: float, high: float, seeds: int, deviation: float, freedom: int) -> str:
    """Whether a gain is more than noise.

    Two sources are judged, at 95% each: which images were drawn (the bootstrap interval must exclude 0) and how
    training happened to go (the gain must exceed Student's t times the error of a difference of two means over the
    seeds, from the pooled deviation between seeds).
    """
    if low <= 0 <= high:
        return WITHIN_NOISE
    if not freedom:
        return ONE_SEED
    if abs(delta) <= student_t.ppf(0.975, freedom) * deviation * np.sqrt(2 / seeds):
        return WITHIN_NOISE
    return "better" if delta > 0 else "worse"


def gains(
    row: Mapping[int, Matches], reference: Mapping[int, Matches], gt: GroundTruth, samples: int, sign: int = 1
) -> dict[str, dict[str, Any]]:
    """AP gains of a row over a reference, for the seeds that both have.

    Args:
        row, reference: seed -> matches.
        samples: of the bootstrap.
        sign: -1 turns the difference around.

    Returns:
        metric -> ``delta`` (mean over seeds), ``low``, ``high`` (95% interval: the same resampled images for both
        sides and all seeds), ``per_seed``, ``spread`` (largest minus smallest seed). Empty without a common seed.
    """
    seeds = [s for s in row if s in reference]
    drawn: dict[str, tuple[list[float], np.ndarray]] = {}
    for subset in present(gt) if seeds else []:
        both = [resampled_deltas(row[s], reference[s], gt, subset, samples) for s in seeds]
        drawn[subset] = ([sign * delta for delta, _ in both], sign * np.mean([d for _, d in both], axis=0))
    if drawn:
        mean = np.mean([d for d, _ in drawn.values()], axis=0).tolist()
        drawn["ap"] = (mean, np.mean([r for _, r in drawn.values()], axis=0))
    found = {}
    for metric, (per_seed, resampled) in drawn.items():
        low, high = np.percentile(resampled, [2.5, 97.5])
        spread = max(per_seed) - min(per_seed)
        found[metric] = {"delta": float(np.mean(per_seed)), "low": float(low), "high": float(high)}
        found[metric] |= {"per_seed": dict(zip(seeds, per_seed)), "spread": float(spread)}
    return found


def measure_cost(models: Sequence[ModelConfig], rounds: int = ROUNDS) -> list[dict[str, float]]:
    """Parameters, MACs and milliseconds (fused, 1 CPU thread, 640x480, batch 1; median) of each architecture.

    Timing goes round and round, so that a passing load on the machine hits all architectures alike.
    """
    threads = torch.get_num_threads()
    x = torch.zeros(1, 3, SIZE[1], SIZE[0])
    costs, fused = [], []
    for cfg in models:
        model = build_model(cfg).eval()
        summary = summarize(model, "", SIZE)
        costs.append({"parameters": summary["total"], "macs": summary["macs"]})
        fused.append(fuse_for_inference(model))
    times: list[list[float]] = [[] for _ in fused]
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(rounds + 1 if rounds else 0):
                for model, taken in zip(fused, times):
                    start = time.perf_counter()
                    model(x)
                    taken.append((time.perf_counter() - start) * 1e3)
    finally:
        torch.set_num_threads(threads)
    for cost, taken in zip(costs, times):
        cost["latency_ms"] = statistics.median(taken[1:]) if taken else float("nan")  # the first one warms up
    return costs


def build_report(
    study: Study,
    seeds: Sequence[int],
    out: Path,
    tests: Sequence[EvalSet],
    found: Predictions,
    errors: Mapping[tuple[str, int], str],
    launch: Launch,
    samples: int = 1000,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Everything the table shows, as one JSON object.

    Args:
        found: predictions of the finished runs by row and seed.
        errors: why the others are not there.
        samples: of the bootstrap.
        rounds: of the latency measurement; 0 = none.
    """
    configs = [study.load(row, seeds[0]) for row in study.rows]
    different = list({repr(c.model): c.model for c in configs}.values())
    costs = {repr(m): c for m, c in zip(different, measure_cost(different, rounds))}
    rows = []
    for row, cfg in zip(study.rows, configs):
        times = TTA_COST if row.tta else 1
        cost = costs[repr(cfg.model)]
        runs = []
        for seed in seeds:
            folder = run_folder(out, row, seed)
            command = shown(launch.command(study, row, seed, folder))
            status = "done" if (row.name, seed) in found else errors.get((row.name, seed), "not run")
            runs.append({"seed": seed, "out": str(folder), "command": command, "status": status})
        rows.append(
            {
                "name": row.name,
                "label": row.label,
                "plan": row.plan,
                "predicted": row.predicted,
                "tta": row.tta,
                "parameters": cost["parameters"],
                "over_budget": cost["parameters"] >= BUDGET,
                "macs": cost["macs"] * times,
                "latency_ms": cost["latency_ms"] * times,
                "ap": {},
                "gain": {},
                "runs": runs,
                "stages": stage_ends(run_folder(out, row, seeds[0]), cfg.train),
            }
        )
    report = {
        "study": study.name,
        "mode": study.mode,
        "config": study.config,
        "opts": list(study.opts),
        "seeds": list(seeds),
        "epochs": configs[0].train.epochs,
        "samples": samples,
        "rows": rows,
        "sets": {},
    }
    for test in tests:
        report["sets"][test.name] = _compare(study, seeds, test, found, rows, samples)
    return report


def _compare(
    study: Study, seeds: Sequence[int], test: EvalSet, found: Predictions, rows: list[dict], samples: int
) -> dict[str, Any]:
    """Fill in ``ap`` and ``gain`` of every row on one set; returns what holds for the set as a whole."""
    matched: dict[str, dict[int, Matches]] = {
        row.name: {s: match(found[row.name, s][test.name], test.truth) for s in seeds if (row.name, s) in found}
        for row in study.rows
    }
    aps = {n: {s: average_precisions(m, test.truth) for s, m in by.items()} for n, by in matched.items()}
    # Rows that share a training tell of it once: the first of them.
    trained = {row.run: aps[row.name] for row in reversed(study.rows)}
    noise = {m: training_noise({n: {s: a[m] for s, a in by.items()} for n, by in trained.items()}) for m in METRICS}
    for i, (row, line) in enumerate(zip(study.rows, rows)):
        seen = aps[row.name]
        if seen:
            mean = {m: float(np.mean([a[m] for a in seen.values()])) for m in METRICS}
            line["ap"][test.name] = mean | {"per_seed": seen}
        against = {"reference": 0, **({"before": i - 1} if study.name == "ladder" and i > 1 else {})}
        for kind, other in against.items() if i else ():
            over = study.rows[other].name
            gain = gains(matched[row.name], matched[over], test.truth, samples, study.sign)
            same_weights = row.run == study.rows[other].run  # differ in evaluation only: no training noise between
            for metric, g in gain.items():
                training = (0.0, 1) if same_weights else noise[metric]
                g["verdict"] = verdict(g["delta"], g["low"], g["high"], len(g["per_seed"]), *training)
            if gain:
                line["gain"].setdefault(test.name, {})[kind] = {"over": over, **gain}
    deviation, freedom = noise["ap"]
    return {"images": len(test.truth), "subsets": present(test.truth), "seed_deviation": deviation, "freedom": freedom}


def stage_ends(folder: Path, train: Any) -> list[dict[str, Any]]:
    """The last validation within each stage of progressive resizing, from a run's log; [] without one."""
    log = folder / "log.jsonl"
    lines = [x for x in read_lines(log) if x.get("kind") == "val"] if log.exists() else []
    ends = []
    for stage in plan_stages(train, lambda size, batch: 1):
        inside = [x for x in lines if stage.first_epoch < x["epoch"] <= stage.end_epoch]
        if inside:
            ends.append(
                {"size": stage.size, "end": stage.end_epoch, "epoch": inside[-1]["epoch"], "ap": inside[-1]["ap"]}
            )
    return ends


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    rows, sets, seeds = report["rows"], report["sets"], report["seeds"]
    mode = f" ({report['mode']})" if report["study"] == "innovations" else ""
    lines = [
        f"# Ablation: {report['study']}{mode}",
        "",
        f"Config `{report['config']}`, {report['epochs']} epochs, seeds {', '.join(map(str, seeds))}"
        + (f", overrides `{' '.join(report['opts'])}`" if report["opts"] else "")
        + ". Every row has the same data, epochs and seeds; AP is that of the final EMA weights.",
    ]
    for name, about in sets.items():
        lines += ["", f"## {name} ({about['images']} images)", "", *_table(report, name), "", *_reading(report, name)]
    if report["study"] == "family":
        lines += ["", *_stage_table(rows)]
    missing = [(r["label"], run) for r in rows for run in r["runs"] if run["status"] != "done"]
    if missing:
        lines += ["", "## Not in the table", ""]
        lines += [f"- {label}, seed {run['seed']}: {run['status']}" for label, run in missing]
    lines += ["", "## Commands", "", "Each run by hand:", "", "```sh"]
    lines += list(dict.fromkeys(run["command"] for r in rows for run in r["runs"]))
    return "\n".join([*lines, "```", ""])


def _table(report: Mapping[str, Any], test: str) -> list[str]:
    ladder = report["study"] == "ladder"
    gained = "gain over the first row" if ladder else f"gain over {report['rows'][0]['label']}"
    if report["mode"] == "leave-one-out":
        gained = "what it contributes"
    head = ["row", "plan", "predicted", "seeds", "mean AP", "E / M / H", *(["step: gain", "step: verdict"] * ladder)]
    head += [f"{gained} [95%]", "E / M / H gain", "seed spread", "verdict", "parameters", "MMACs", "ms"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        ap, gain = row["ap"].get(test), row["gain"].get(test, {})
        main, step = gain.get("reference"), gain.get("before")
        cells = [row["label"], row["plan"] or "-", "-" if row["predicted"] is None else f"+{row['predicted']:.1f}"]
        cells += [str(len(ap["per_seed"])), _percent(ap["ap"]), _three(ap, _percent)] if ap else ["0", "-", "-"]
        if ladder:
            cells += [_interval(step["ap"]), step["ap"]["verdict"]] if step else ["-", "-"]
        if main:
            each = _three({s: main[s]["delta"] for s in SUBSETS if s in main}, _points)
            cells += [_interval(main["ap"]), each, f"{100 * main['ap']['spread']:.2f}", main["ap"]["verdict"]]
        else:
            cells += ["-"] * 4
        cells += [f"{row['parameters']:,}" + (" (over 250,000)" if row["over_budget"] else "")]
        cells += [f"{row['macs'] / 1e6:.1f}", f"{row['latency_ms']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _reading(report: Mapping[str, Any], test: str) -> list[str]:
    about = report["sets"][test]
    if about["freedom"]:
        noise = (
            f"Two trainings of one row differ by {100 * about['seed_deviation']:.2f} points (standard deviation over "
            f"seeds, pooled, {about['freedom']} degrees of freedom)."
        )
    else:
        noise = "One seed only: what training noise does is not known, so no row can be called better or worse."
    judged = [r["gain"][test]["reference"]["ap"]["verdict"] for r in report["rows"] if test in r["gain"]]
    within = [
        r["label"]
        for r in report["rows"]
        if test in r["gain"] and r["gain"][test]["reference"]["ap"]["verdict"] == WITHIN_NOISE
    ]
    subsets = " / ".join(about["subsets"])
    lines = [
        f"AP x 100; mean AP is the mean of {subsets}. Gains are means over seeds in AP points, with the 95% interval "
        f"of {report['samples']} paired bootstraps over images. {noise} A verdict other than '{WITHIN_NOISE}' needs "
        f"both kinds of noise exceeded; of {len(judged)} rows about {max(1, round(0.05 * len(judged)))} may still pass "
        "either one by chance.",
        "",
        f"**Within noise: {', '.join(within) if within else 'none'}.**",
        "",
        f"MACs and milliseconds: {SIZE[0]}x{SIZE[1]}, fused, one CPU thread, without post-processing; `benchmark.py` "
        "measures more carefully.",
    ]
    if any(r["tta"] for r in report["rows"]):
        lines[-1] += f" Rows with test-time augmentation: {TTA_COST:g} times one view, computed."
    return lines


def _stage_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["## Progressive validation", "", "The last validation within each stage (first seed, mean AP x 100).", ""]
    lines += ["| row | picture size | stage ends with epoch | validated after epoch | AP |", "|" + "---|" * 5]
    for r in rows:
        lines += [
            f"| {r['label']} | {s['size']} | {s['end']} | {s['epoch']} | {_percent(s['ap'])} |" for s in r["stages"]
        ]
    return lines


def _three(values: Mapping[str, Any], form: Any) -> str:
    return " / ".join(form(values[s]) if s in values else "-" for s in SUBSETS)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _interval(gain: Mapping[str, float]) -> str:
    return f"{_points(gain['delta'])} [{_points(gain['low'])}, {_points(gain['high'])}]"
