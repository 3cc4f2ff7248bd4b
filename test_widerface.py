"""Run a detector over WIDERFace (or any labelled images) and evaluate it.

python test_widerface.py --weights v2_ultra --images data/widerface/val/images --gt data/widerface/val/ground_truth \
    --list widerface_evaluate/val_dev.txt
python test_widerface.py --weights my.pth --images photos --labels photos/label.txt
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.detector import FaceDetector, pick_device
from utils.arguments import fraction, positive
from utils.command import FINISHED, command
from utils.inputs import add_pyramid, add_scale
from utils.onnx_backend import fingerprint
from widerface_evaluate import (
    GroundTruth,
    evaluate_matches,
    image_key,
    landmark_error,
    load_ground_truth,
    load_labels,
    load_list,
    match,
    write_predictions,
)
from widerface_evaluate.__main__ import as_json, print_summary, warn_about
from widerface_evaluate.images import KEEP_ALL, detect_images
from widerface_evaluate.predictions import take_over, to_xywh


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--config", help="architecture the weights must hold: YAML path or name (default: any)")
    p.add_argument("--weights", help="name (v2_ultra, v1, ...) or checkpoint; default: of --config, or V2 Ultra")
    p.add_argument("--images", required=True, metavar="DIR", help="folder of <event>/<name>.jpg")
    p.add_argument("--gt", metavar="DIR", help="folder of WIDERFace's wider_*_val.mat: official Easy/Medium/Hard")
    p.add_argument("--labels", metavar="FILE", help="RetinaFace label file: AP by face height, landmark error")
    p.add_argument("--list", metavar="FILE", help="only these images, 'event/name.jpg' lines")
    add_scale(p)
    p.add_argument("--tta", action="store_true", help="several scales and mirrored, merged by box voting")
    add_pyramid(p)
    p.add_argument("--no-pad", action="store_true", help="no padding to the stride, as the published V1 was measured")
    p.add_argument("--score", type=fraction, default=0.02, help="least score kept (default 0.02)")
    p.add_argument("--nms", type=fraction, default=0.4, help="NMS overlap (default 0.4)")
    p.add_argument("--out", metavar="DIR", help="write predictions in WIDERFace text format")
    p.add_argument("--resume", action="store_true", help="take over the prediction files already in --out")
    p.add_argument("--pr-curve", metavar="PNG", help="draw the precision-recall curves")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    p.add_argument("--batch-size", type=positive, default=1)
    p.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return p


def predict(
    detector: FaceDetector, args: argparse.Namespace, names: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """Predictions ``[n, 5]`` (x y w h score) and landmarks ``[n, 5, 2]`` by image key, and images per second.

    Reading the images counts as far as the detector waits for it; images taken over by --resume have no landmarks.
    """
    keys = [image_key(n) for n in names]
    preds = take_over(args.out, keys, settings(detector, args), args.resume) if args.out else {}
    todo = [n for n, k in zip(names, keys) if k not in preds]
    landmarks = {}
    start = time.perf_counter()
    found = detect_images(
        detector, args.images, todo, args.score, args.nms, args.scale, args.tta, not args.no_pad, args.batch_size
    )
    for name, faces in tqdm(found, total=len(todo), unit="image", disable=None, file=sys.stderr):
        key = image_key(name)
        preds[key] = to_xywh(faces)
        landmarks[key] = faces.landmarks
        if args.out:
            write_predictions(args.out, key, faces.boxes, faces.scores)
    return preds, landmarks, len(todo) / max(time.perf_counter() - start, 1e-9)


def settings(detector: FaceDetector, args: argparse.Namespace) -> dict:
    """What decides the predictions, for --resume."""
    protocol = {k: getattr(args, k) for k in ("scale", "tta", "no_pad", "score", "nms")}
    return {"weights": fingerprint(detector.path), "pyramid": str(detector.pyramid or ""), **protocol}


def run(args: argparse.Namespace) -> dict:
    """Detect, evaluate and print; returns the JSON object."""
    names = load_list(args.list) if args.list else None
    truths: list[GroundTruth] = []
    if args.gt:
        truths.append(load_ground_truth(args.gt, names))
    if args.labels:
        truths.append(load_labels(args.labels, names or (truths[0].names if truths else None)))
        warn_about(truths[-1])
    names = names or truths[0].names
    detector = FaceDetector.from_pretrained(
        args.weights, device=args.device, config=args.config, keep_k=KEEP_ALL, pyramid=args.pyramid
    )
    preds, landmarks, speed = predict(detector, args, names)
    output: dict = {"images": len(preds)}
    for gt in reversed(truths):  # where both are given, the official figures win the common keys
        matches = match(preds, gt)
        result = evaluate_matches(matches, gt)
        print_summary(result)
        output.update(as_json(result))
        if not np.isnan(gt.landmarks).all() and len(landmarks) == len(preds):
            output.update(landmark_error(matches, gt, landmarks))
            nme = "-" if output["nme"] is None else f"{output['nme']:.3f}"
            print(f"landmarks: NME {nme} on {output['landmark_faces']} faces; by height: mean, median, faces")
            for height, row in output["landmarks_by_height"].items():
                print(f"  {height:<8} {row['nme']:.3f}  {row['median']:.3f}  {row['faces']}")
        if args.pr_curve and gt is truths[0]:
            from widerface_evaluate.plots import pr_curve

            pr_curve({s: (result[s], c) for s, c in result["curves"].items()}, args.pr_curve, args.weights or "")
    more = f"{f', pyramid {detector.pyramid}' if detector.pyramid else ''}{', TTA' if args.tta else ''}"
    print(f"{speed:.2f} images/s ({detector.device}, scale {args.scale}{more})")
    protocol = {"scale": args.scale, "tta": args.tta, "pyramid": str(detector.pyramid) if detector.pyramid else None}
    return {**output, "images_per_second": speed, **protocol}


@command("test_widerface.py")
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if not (args.gt or args.labels or (args.list and args.out)):
        p.error("give --gt or --labels to evaluate (or --list and --out to only write predictions)")
    if args.resume and not args.out:
        p.error("--resume needs --out")
    if args.out and Path(args.out).resolve() == Path(args.images).resolve():
        p.error(f"--out {args.out}: is the folder of images; choose another")
    args.device = pick_device(args.device)
    output = run(args)
    if args.json:
        print(json.dumps(output))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
