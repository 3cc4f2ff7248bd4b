"""Let the student's heads hear what its mimics learnt: their weighted mean becomes the student's heads.

    python -m utils.merge_mimics runs/v2_ultra_third/last.pth --share 0.5 --out runs/v2_ultra_third/merged.pth

The distillation term ``dense`` trains heads that repeat a teacher's predictions from the student's last features. They
and the student's own are 1x1 convolutions on the same features, so the mean of their logits, of their boxes and of
their landmarks is again such a convolution: two opinions, the labels' and the teacher's, at the price of one. Teachers
whose outputs do not stand for one anchor size (YuNet) are left out.

Do it at the end of a run: the checkpoint's heads are averages over many steps (EMA), the mimics are not, which matters
while the learning rate is high. Choose the share on ``train_select``, and calibrate afterwards
(:mod:`utils.calibrate`), since teachers score otherwise. A landmark refinement comes after both: it corrects the
landmarks that the merged heads predict.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from models.heads import before_heads, merge_heads
from utils.checkpoint import (
    CheckpointError,
    last_progress,
    load_checkpoint,
    part_of,
    save_checkpoint,
    take_training,
)
from utils.command import FINISHED, command
from utils.config import Config, ConfigError, ModelConfig, from_dict
from utils.weights import find_weights

log = logging.getLogger("featherface")


def merge(
    weights: str, out: str, share: float, box_share: float | None = None, teachers: Sequence[str] | None = None
) -> int:
    """Merge the mimics of a training checkpoint (``last.pth``) and write an inference checkpoint.

    Args:
        share, box_share: as of :func:`merge_heads`; ``box_share`` is ``share`` where None.
        teachers: whose mimics take part, as the run's ``distill.teachers`` names them; None = all.

    Returns:
        How many anchor sizes had a counterpart.

    Raises:
        CheckpointError: the file has no mimics, none that fit, ones that stopped learning, or heads that see other
            features than they do; or ``out`` is that file. One line.
        ConfigError: a share outside 0..1, or a teacher that the run did not have.
    """
    box_share = share if box_share is None else box_share
    if not (0 <= share <= 1 and 0 <= box_share <= 1):
        raise ConfigError("--share and --box-share must be from 0 to 1")
    path = find_weights(weights)
    content = load_checkpoint(path)
    training = take_training(content, path, out)
    learnt = training.get("distiller") or {}
    mimicked = (learnt.get("_extra_state") or {}).get("mimicked")
    if not mimicked:
        raise CheckpointError(f"{path}: no mimics in it: give the last.pth of a run with the distillation term 'dense'")
    cfg = from_dict(Config, training["config"], str(path))
    between = before_heads(cfg.model)
    if between:
        raise CheckpointError(f"{path}: cannot merge: with model.{between} heads and mimics see other features")
    names = cfg.distill.teachers
    strange = [name for name in teachers or () if name not in names]
    if strange:
        raise ConfigError(f"--teachers {strange[0]}: {path} had {', '.join(names)}")
    progress = last_progress(training, cfg.train.epochs)
    _, alpha, stage = cfg.distill.schedule(progress)
    if not alpha or "dense" not in stage.active:
        raise CheckpointError(f"{path}: cannot merge: its mimics stopped learning while the features went on")
    mimics = []
    for i, teacher in enumerate(mimicked):
        theirs = from_dict(ModelConfig, teacher["model"], str(path))
        wanted = teachers is None or names[i] in teachers
        if wanted and teacher["per_size"] and theirs.variances == cfg.model.variances:
            mimics.append((theirs.anchors, part_of(learnt, f"mimics.{i}.")))
    heads = part_of(content["state_dict"], "heads.")
    met = merge_heads(heads, cfg.model.anchors, mimics, share, box_share)
    if not met:
        raise CheckpointError(f"{path}: cannot merge: no teacher has an anchor of the student's")
    if cfg.model.landmark_refinement:
        log.warning(f"{path}: its landmark refinement has not seen the merged landmarks: train it again (train.only)")
    content["meta"]["mimics"] = {"share": share, "box_share": box_share}
    save_checkpoint(out, content)
    return met


@command("utils.merge_mimics")
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m utils.merge_mimics", description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="last.pth of a run with the distillation term 'dense'")
    parser.add_argument("--share", type=float, default=0.5, help="of the mimics in the scores (default %(default)s)")
    parser.add_argument("--box-share", type=float, help="of the mimics in boxes and landmarks (default: --share)")
    parser.add_argument("--teachers", nargs="+", help="whose, as in the run's distill.teachers (default: all)")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the merged checkpoint")
    args = parser.parse_args(argv)
    met = merge(args.weights, args.out, args.share, args.box_share, args.teachers)
    print(f"{args.out}: {met} anchor sizes merged with the mimics")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
