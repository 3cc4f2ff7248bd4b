"""WIDERFace evaluation as plain loops, written for clarity: the oracle that the vectorised code is tested against.

Slow on purpose (one Python step per detection, threshold and image); ``main`` measures the ratio:

    python -m tests.wider_oracle PRED GT
"""

import argparse
import json
import sys
import time

import numpy as np

from utils.command import FINISHED, command


def iou(box, face):
    """Inclusive-pixel overlap of two x y w h boxes."""
    bx2, by2, fx2, fy2 = box[0] + box[2], box[1] + box[3], face[0] + face[2], face[1] + face[3]
    width = min(bx2, fx2) - max(box[0], face[0]) + 1
    height = min(by2, fy2) - max(box[1], face[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    area_box = (bx2 - box[0] + 1) * (by2 - box[1] + 1)
    area_face = (fx2 - face[0] + 1) * (fy2 - face[1] + 1)
    return width * height / (area_box + area_face - width * height)


def image_counts(dets, faces, valid, iou_threshold):
    """Per detection in falling score: does it count (not on an ignored face), and how many faces are found so far."""
    found = [False] * len(faces)
    counts, recalled = [], []
    for det in dets:
        best, best_face = 0.0, -1
        for g, face in enumerate(faces):
            overlap = iou(det, face)
            if overlap > best:
                best, best_face = overlap, g
        matched = best_face >= 0 and best >= iou_threshold
        counts.append(not matched or valid[best_face])
        if matched and valid[best_face]:
            found[best_face] = True
        recalled.append(sum(found))
    return counts, recalled


def average_precision(preds, faces, valid, iou_threshold=0.5, thresholds=1000):
    """AP of ``preds[name] [n, 5]`` against ``faces[name] [m, 4]``, of which ``valid[name] [m]`` count."""
    scores = [s for p in preds.values() for s in p[:, 4]]
    low, high = min(scores), max(scores)
    predicted, recalled = np.zeros(thresholds), np.zeros(thresholds)
    for name, dets in preds.items():
        dets = dets[np.argsort(-dets[:, 4], kind="stable")]
        counts, found = image_counts(dets.tolist(), faces[name].tolist(), valid[name].tolist(), iou_threshold)
        normal = (dets[:, 4] - low) / (high - low)
        for t in range(thresholds):
            admitted = np.where(normal >= 1 - (t + 1) / thresholds)[0]
            if len(admitted):
                last = admitted[-1]
                predicted[t] += sum(counts[: last + 1])
                recalled[t] += found[last]
    total = sum(int(v.sum()) for v in valid.values())
    precision = [r / p if p else 0.0 for r, p in zip(recalled, predicted)]
    recall = [r / total for r in recalled]
    for t in reversed(range(thresholds - 1)):
        precision[t] = max(precision[t], precision[t + 1])
    area, before = 0.0, 0.0
    for r, p in zip(recall, precision):
        area += (r - before) * p
        before = r
    return area


def evaluate(preds, gt):
    """All subsets of a :class:`widerface_evaluate.GroundTruth`."""
    images = {n: slice(gt.offsets[i], gt.offsets[i + 1]) for i, n in enumerate(gt.names)}
    preds = {n: preds[n] for n in images}
    faces = {n: gt.boxes[rows] for n, rows in images.items()}
    return {
        subset: average_precision(preds, faces, {n: valid[rows] for n, rows in images.items()})
        for subset, valid in gt.valid.items()
    }


@command("tests.wider_oracle")
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.wider_oracle", description=__doc__.splitlines()[0])
    parser.add_argument("pred", help="folder of predictions in WIDERFace's text format")
    parser.add_argument("gt", help="folder of WIDERFace's four .mat files")
    parser.add_argument("--json", action="store_true", help="also print a JSON object on the last line")
    args = parser.parse_args(argv)
    from widerface_evaluate import evaluate as fast
    from widerface_evaluate import load_ground_truth, load_predictions

    start = time.perf_counter()
    gt = load_ground_truth(args.gt)
    preds = load_predictions(args.pred, gt.names)
    read = time.perf_counter()
    ours = fast(preds, gt)
    ran = time.perf_counter()
    loop = evaluate(preds, gt)
    end = time.perf_counter()
    for subset, ap in loop.items():
        print(f"{subset:<8}loop {ap:.6f}   vectorised {ours[subset]:.6f}   difference {abs(ap - ours[subset]):.1e}")
    print(f"reading {read - start:.2f} s, vectorised {ran - read:.2f} s, loop {end - ran:.1f} s")
    ratios = {"without_reading": (end - ran) / (ran - read), "with_reading": (end - start) / (ran - start)}
    print(f"ratio {ratios['without_reading']:.0f} without reading, {ratios['with_reading']:.0f} with it")
    if args.json:
        print(json.dumps({"loop": loop, "vectorised": {s: ours[s] for s in loop}, "ratio": ratios}))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
