"""Balance the scores of small and large faces: one offset per anchor size, written into the class heads' biases.

    python -m utils.calibrate runs/v2_ultra_second/last.pth --out weights/featherface_v2_ultra.pth

Training crops enlarge and shrink photos, so they hold other shares of small and large faces than photos do, and a
score of 0.4 does not mean the same at 10 and at 100 px. Small false alarms then outrank large faces, which costs AP.
An offset on the logits of each anchor size repairs the order between sizes and leaves it alone within a size; as it is
part of the bias, the network stays the same in every runtime.

The offsets are chosen by coordinate ascent on the mean of Easy, Medium and Hard AP on ``train_select``, never on val.
A constant added to all of them keeps the number of scores above 0.5, detect.py's default threshold, as it was. Twice
they are also chosen on one half of those images and judged on the other, which tells how much is real.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import FaceDataset, select_dataset
from data.images import read_photo
from data.preprocess import normalise, pad_to_stride
from layers.anchors import cells
from layers.postprocess import postprocess
from models.detector import pick_device
from models.featherface import FeatherFace
from models.fuse import fuse_for_inference
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint, take_training
from utils.command import FINISHED, command
from utils.config import Config, ConfigError, DataConfig, ModelConfig, add_opts, apply_opts, from_dict, load_config
from utils.image import resize
from utils.inputs import scale_argument
from utils.validation import NMS, SCORE, ground_truth, readable
from utils.weights import find_weights
from widerface_evaluate import GroundTruth, Matches, image_key, match, rescore
from widerface_evaluate.ap import curve_of
from widerface_evaluate.ground_truth import SUBSETS

STEPS = (1.0, 0.5, 0.25)  # of the search, in logits
LIMIT = 3.0  # no offset is larger
LEAST_GAIN = 2e-4  # in mean AP; smaller ones are noise
MARGIN = 1e-3  # of a score from the threshold, in logits, where there is room


@dataclass
class Scored:
    """Detections of some images, matched once, for trying offsets on.

    NMS is not repeated: what another offset would suppress otherwise is left to the final measurement.

    Attributes:
        truth: the faces.
        matches: the D detections of a network without offsets.
        kind: ``[D]`` the anchor size each comes from, an index over all levels, in the order of ``matches``.
    """

    truth: GroundTruth
    matches: Matches
    kind: np.ndarray

    @cached_property
    def odds(self) -> np.ndarray:
        """``[D]`` exp(-logit) of each detection."""
        return 1 / self.matches.score.clip(1e-6, 1 - 1e-6) - 1

    def measure(self, offsets: np.ndarray, images: np.ndarray | None = None) -> dict[str, float]:
        """AP per subset and ``ap``, their mean, with ``offsets [K]`` on the logits; ``images``: a mask ``[I]``."""
        shifted = rescore(self.matches, 1 / (1 + self.odds * np.exp(-offsets[self.kind])), SCORE)
        chosen = np.ones(len(self.truth), bool) if images is None else images
        valid = {k: self.truth.valid[k] & chosen[self.truth.image] for k in SUBSETS}
        aps = {k: curve_of(shifted, v, chosen)[0] for k, v in valid.items()}
        counted = [aps[k] for k in SUBSETS if valid[k].any()]
        return {"ap": float(np.mean(counted)) if counted else 0.0, **aps}

    def search(self, count: int, images: np.ndarray | None = None) -> np.ndarray:
        """The best offsets ``[count]`` by coordinate ascent; the last size's stays 0, as AP heeds only differences
        (see :meth:`level`)."""
        best = np.zeros(count)
        score = self.measure(best, images)["ap"]
        for step in STEPS:
            better = True
            while better:
                better = False
                for k, sign in ((k, sign) for k in range(count - 1) for sign in (-1, 1)):
                    tried = best.copy()
                    tried[k] = np.clip(tried[k] + sign * step, -LIMIT, LIMIT)
                    ap = self.measure(tried, images)["ap"]
                    if ap > score + LEAST_GAIN:
                        best, score, better = tried, ap, True
        return best

    def level(self, offsets: np.ndarray) -> float:
        """What to add to all ``offsets [K]`` so that as many scores as without them are above 0.5.

        Of all that do, it is the one nearest to 0.
        """
        logits = -np.log(self.odds)
        shifted = np.sort(logits + offsets[self.kind])[::-1]
        above = int((logits > 0).sum())
        if not 0 < above < len(shifted) or (shifted > 0).sum() == above:
            return 0.0
        low, high = -shifted[above - 1], -shifted[above]
        margin = min(MARGIN, (high - low) / 4)  # biases are of single precision
        return float(np.clip(0, low + margin, high - margin))


@torch.inference_mode()
def collect(model: FeatherFace, dataset: FaceDataset, device: torch.device, scale: float = 1.0) -> Scored:
    """Detections of every image at so many times its original size, with the anchor size they come from."""
    network = fuse_for_inference(model).to(device, memory_format=torch.channels_last)
    found, kinds = {}, []
    for name, path in zip(tqdm(dataset.names, unit="image", disable=None, file=sys.stderr), dataset.paths):
        picture = read_photo(path)
        height, width = picture.shape[:2]
        tall, wide = (max(round(side * scale), 1) for side in (height, width))
        pixels = torch.from_numpy(resize(picture, tall, wide)).to(device)
        padded = pad_to_stride(normalise(pixels.permute(2, 0, 1))[None])
        anchors = network.anchors(*padded.shape[2:], device)
        faces = postprocess(network(padded), anchors, network.variances, SCORE, NMS, keep_k=len(anchors))[0]
        boxes = faces["boxes"] * torch.tensor([width / wide, height / tall] * 2, device=device)
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2, device=device))
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # not in the padding
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], faces["scores"][:, None]], 1)[inside]
        found[image_key(name)] = boxes.cpu().double().numpy()
        kinds.append(kinds_of(model.cfg, *padded.shape[2:])[faces["anchor"][inside].cpu()].numpy())
    truth = ground_truth(dataset, list(range(len(dataset))))
    matches = match(found, truth)
    starts = np.cumsum([0, *map(len, kinds)])
    kind = np.concatenate(kinds)[starts[matches.image] + matches.row]
    return Scored(truth, matches, kind)


def kinds_of(cfg: ModelConfig, height: int, width: int) -> Tensor:
    """Which anchor size, counted over all levels, each of the N anchors of an input has: ``[N]``."""
    parts, first = [], 0
    for stride, sizes in zip(cfg.strides, cfg.anchors):
        parts.append(torch.arange(first, first + len(sizes)).repeat(cells(height, stride) * cells(width, stride)))
        first += len(sizes)
    return torch.cat(parts)


def shift_biases(state: dict[str, Tensor], cfg: ModelConfig, offsets: np.ndarray) -> None:
    """Add the offsets ``[K]`` to the face logits' biases of a state dict, in place."""
    for level, part in enumerate(torch.from_numpy(offsets).float().split([len(sizes) for sizes in cfg.anchors])):
        state[f"heads.classes.{level}.bias"].view(-1, cfg.class_outputs)[:, -1] += part


def calibrate(path: Path, cfg: DataConfig, out: str, device: torch.device, scale: float = 1.0) -> dict:
    """Choose the offsets on the held-out images of ``cfg`` and write the calibrated checkpoint, without what only
    ``--resume`` needs. ``scale``: how large the network shall see photos, relative to their original size.

    Returns:
        ``labels``, ``images`` and ``scale``: what they were chosen on; ``offsets`` by level and anchor size (px); AP
        ``before`` and ``after`` (the calibrated network, run anew) and ``held_out_gain``, the mean gain on halves that
        the offsets were not chosen on.

    Raises:
        CheckpointError, DataError, ConfigError: each one line.
    """
    content = load_checkpoint(path)
    take_training(content, path, out)
    model, _ = load_model(path, device)
    if model.cfg.cascade_refinement:
        raise ConfigError(f"{path}: its scores are not its class heads' alone, so their biases cannot shift them")
    dataset = readable(select_dataset(cfg), cfg.on_bad_image)
    scored = collect(model, dataset, device, scale)
    sizes = [f"P{level + 3}/{size}" for level, sizes in enumerate(model.cfg.anchors) for size in sizes]
    none = np.zeros(len(sizes))
    even = np.arange(len(dataset)) % 2 == 0
    gains = []
    for chosen_on in (even, ~even):
        offsets = scored.search(len(sizes), chosen_on)
        before, after = (scored.measure(o, ~chosen_on) for o in (none, offsets))
        gains.append({k: after[k] - before[k] for k in before})
    offsets = scored.search(len(sizes))
    offsets = offsets + scored.level(offsets)
    shift_biases(content["state_dict"], model.cfg, offsets)
    model.load_state_dict(content["state_dict"])
    content["meta"]["calibration"] = {
        "labels": str(Path(cfg.root) / (cfg.val_labels or cfg.select_labels)),
        "images": len(dataset),
        "scale": scale,
        "offsets": dict(zip(sizes, offsets.tolist())),
        "before": scored.measure(none),
        "after": collect(model, dataset, device, scale).measure(none),
        "held_out_gain": {k: float(np.mean([g[k] for g in gains])) for k in gains[0]},
    }
    save_checkpoint(out, content)
    return content["meta"]["calibration"]


def data_of(path: Path) -> DataConfig:
    """The data that a checkpoint was trained on and not trained on. Raises ConfigError where it does not say."""
    config = load_checkpoint(path)["meta"].get("config")
    if not config:
        raise ConfigError(f"{path}: does not say what it was trained on; name the held-out images with --config")
    return from_dict(DataConfig, config["data"], str(path), "data.")


@command("utils.calibrate")
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m utils.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="checkpoint, or name of one (v2_ultra, ...)")
    parser.add_argument("--config", help="whose held-out images to use (default: the checkpoint's own)")
    add_opts(parser, "overrides of it")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the calibrated checkpoint")
    parser.add_argument(
        "--scale", type=scale_argument, default=1.0, metavar="FACTOR", help="how large photos are seen (default: 1)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    path = find_weights(args.weights)
    config = load_config(args.config) if args.config else Config(data=data_of(path))
    result = calibrate(path, apply_opts(config, args.opts).data, args.out, pick_device(args.device), args.scale)
    print(f"{result['images']} held-out images of {result['labels']}")
    print("offsets:", ", ".join(f"{size} {offset:+.2f}" for size, offset in result["offsets"].items()))
    for key in ("before", "after"):
        print(f"{key:<9}", " ".join(f"{k} {v:.4f}" for k, v in result[key].items()))
    print("gain on images the offsets were not chosen on:", end=" ")
    print(" ".join(f"{k} {v:+.4f}" for k, v in result["held_out_gain"].items()))
    if args.json:
        print(json.dumps(result))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
