"""Evaluate a folder of WIDERFace text predictions.

python -m widerface_evaluate PRED GT                      official Easy/Medium/Hard (GT: folder of the .mat files)
python -m widerface_evaluate PRED GT --list val_dev.txt   on the listed images only
python -m widerface_evaluate PRED label.txt               any data with a RetinaFace label file: AP by face height
python -m widerface_evaluate PRED GT --against PRED2      difference with its 95% interval (paired bootstrap)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from utils.arguments import fraction, given, natural, positive
from utils.command import FINISHED, command
from utils.files import whole

from .ap import evaluate_matches, match
from .bootstrap import paired_bootstrap
from .breakdown import breakdown, worst_cases
from .ground_truth import SUBSETS, GroundTruth, load_ground_truth, load_labels, load_list
from .predictions import load_predictions


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m widerface_evaluate", description=__doc__.split("\n")[0])
    p.add_argument("pred", help="folder of predictions, <event>/<name>.txt")
    p.add_argument("gt", help="folder of WIDERFace's wider_*_val.mat, or a RetinaFace label file")
    p.add_argument("--list", metavar="FILE", help="evaluate only these images, 'event/name.jpg' lines")
    p.add_argument("--iou", type=fraction, default=0.5, help="least overlap of a hit (default 0.5)")
    p.add_argument("--pr-curve", metavar="PNG", help="draw the precision-recall curves")
    p.add_argument("--against", metavar="PRED2", help="second prediction folder: report PRED - PRED2")
    p.add_argument("--samples", type=positive, help="bootstrap resamples of --against (default 1000)")
    p.add_argument("--seed", type=natural, help="of the bootstrap (default 0)")
    p.add_argument("--breakdown", action="store_true", help="print AP and recall by face height and event")
    p.add_argument("--report", metavar="JSON", help="write breakdown, worst false positives and misses")
    p.add_argument("--top", type=positive, help="length of the lists of --report (default 100)")
    p.add_argument("--images", metavar="DIR", help="with --report: also draw its lists beside it, as PNG sheets")
    p.add_argument("--subset", choices=(*SUBSETS, "all"), default="hard", help="of --breakdown and --report")
    p.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return p


def read_truth(path: str, names: list[str] | None) -> GroundTruth:
    """Official ground truth from a folder, or a label file."""
    return load_ground_truth(path, names) if Path(path).is_dir() else load_labels(path, names)


def print_summary(result: dict) -> None:
    """A line per subset and the best operating point where there is one."""
    for subset, faces in result["faces"].items():
        print(f"{subset:<8}AP {f'{result[subset]:.6f}' if faces else '-':<8}   {faces} faces")
    if result.get("f1"):
        print("best threshold {threshold:.4f}: precision {precision:.3f}, recall {recall:.3f}".format(**result))
    print(f"{result['images']} images")


def warn_about(gt: GroundTruth) -> None:
    """One line on stderr if label lines had to be left out."""
    if gt.problems:
        print(f"{len(gt.problems)} label lines left out, first: {gt.problems[0]}", file=sys.stderr)


def as_json(result: dict) -> dict:
    """A result without its curves, and with None for what could not be measured, as 0 would read as a failure."""
    unmeasured = [subset for subset, faces in result["faces"].items() if not faces]
    if "all" in unmeasured:
        unmeasured += ["precision", "recall", "f1"]
    if not result.get("f1"):
        unmeasured.append("threshold")
    return {k: None if k in unmeasured else v for k, v in result.items() if k != "curves"}


def run(args: argparse.Namespace) -> dict:
    """Evaluate, print and write what was asked for; returns the JSON object."""
    gt = read_truth(args.gt, load_list(args.list) if args.list else None)
    warn_about(gt)
    matches = match(load_predictions(args.pred, gt.names), gt, args.iou)
    result = evaluate_matches(matches, gt)
    print_summary(result)
    output = as_json(result)
    if args.pr_curve:
        from .plots import pr_curve  # matplotlib takes longer to import than the evaluation to run

        pr_curve({s: (result[s], c) for s, c in result["curves"].items()}, args.pr_curve, Path(args.pred).name)
    if args.against:
        other = match(load_predictions(args.against, gt.names), gt, args.iou)
        output["against"] = {}
        for subset, valid in gt.valid.items():
            if not valid.any():
                output["against"][subset] = None
                continue
            delta, low, high = paired_bootstrap(matches, other, gt, subset, args.samples, args.seed)
            output["against"][subset] = {"delta": delta, "low": low, "high": high}
            print(f"{subset:<8}difference {delta:+.4f}   95% interval {low:+.4f} to {high:+.4f}")
    if args.breakdown or args.report:
        detail = breakdown(matches, gt, args.subset)
        if args.breakdown:
            output.update(detail)
            for key in ("by_height", "by_event"):
                print(f"{key.replace('_', ' ')} ({args.subset}): AP, recall, faces")
                for name, row in detail[key].items():
                    ap, recall = ("-     " if row[k] is None else f"{row[k]:.4f}" for k in ("ap", "recall"))
                    print(f"  {name:<32} {ap}  {recall}  {row['faces']}")
        if args.report:
            write_report({**as_json(result), **detail, **worst_cases(matches, gt, args.subset, args.top)}, args)
    return output


def write_report(report: dict, args: argparse.Namespace) -> None:
    """The JSON report, and with --images a PNG sheet per list beside it."""
    path = Path(args.report)
    with whole(path) as part:
        part.write_text(json.dumps(report, indent=1))
    if args.images:
        from .plots import sheet

        for key in ("false_positives", "misses"):
            if report[key]:
                sheet(args.images, report[key], path.with_name(f"{path.stem}_{key}.png"))


@command("widerface_evaluate")
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if not args.iou:
        p.error("--iou must be above 0")
    if (useless := given(args, samples=1000, seed=0)) and not args.against:
        p.error(f"{useless[0]} needs --against")
    if (useless := given(args, top=100, images=None)) and not args.report:
        p.error(f"{useless[0]} needs --report")
    output = run(args)
    if args.json:
        print(json.dumps(output))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
