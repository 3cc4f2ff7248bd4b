"""Frozen teachers of knowledge distillation and their predictions, expressed on the student's anchors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from layers.anchors import AnchorCache, anchors_of, decode_boxes, decode_landmarks
from layers.matching import BACKGROUND, aligned_iou, assign
from utils.checkpoint import load_model
from utils.config import LossConfig, ModelConfig, from_dict

DETECTION_SCORE = 0.05  # a teacher's box below this score counts as "nothing there" when matching by IoU
DETECTIONS = 300  # teacher boxes per image that take part in matching by IoU
CANDIDATES = 1000  # the same before non-maximum suppression
NMS_IOU = 0.4
MATCH_IOU = 0.5  # overlap from which two boxes mean the same face
PAIRS = 4_000_000  # box pairs compared at once: bounds the memory of the overlap matrices


@dataclass
class Prediction:
    """Decoded predictions on N anchors: face ``logits [B, N]``, ``boxes [B, N, 4]`` xyxy px, ``landmarks [B, N, 5, 2]``
    px."""

    logits: Tensor
    boxes: Tensor
    landmarks: Tensor


@dataclass
class Target(Prediction):
    """What the student's anchors should predict: ``trust [B, N]``, the teacher's score of that box (0 = it has none),
    and ``known [B, N]`` bool, where the teacher has an opinion on the score at all."""

    trust: Tensor
    known: Tensor


@dataclass
class Teacher:
    """A network to learn from; ``config`` tells its anchors, variances and neck width.

    ``assigner`` is the rule by which its anchors learned: the published networks' is fixed IoU; "" = unknown.
    ``has_features``: whether it answers ``features=True``. ``per_size``: whether each of its outputs stands for faces
    of about one anchor's size (YuNet's stand for all sizes of a level).
    """

    model: nn.Module
    config: ModelConfig
    name: str = "teacher"
    assigner: str = "iou"
    has_features: bool = True
    per_size: bool = True
    anchors: AnchorCache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.anchors = anchors_of(self.config)


def load_teachers(paths: Iterable[str | Path], device: torch.device | str = "cpu") -> list[Teacher]:
    """Teachers from checkpoint files, and from ``.onnx`` files (see :mod:`layers.teachers_onnx`).

    Raises:
        utils.checkpoint.CheckpointError: a file is missing, damaged or not ours.
    """
    from models.fuse import fuse_for_inference  # models import layers

    teachers = []
    for path in map(Path, paths):
        if path.suffix == ".onnx":
            from layers.teachers_onnx import load_onnx  # onnxruntime is not needed otherwise

            network = load_onnx(path, torch.device(device))
            teachers.append(Teacher(network, network.cfg, network.name, "", network.has_features, network.per_size))
            continue
        model, meta = load_model(path, device)
        model = fuse_for_inference(model)
        trained_with = meta["meta"].get("config", {}).get("loss", {})
        teachers.append(
            Teacher(
                model,
                from_dict(ModelConfig, meta["model"], str(path), "model."),
                meta["name"],
                trained_with.get("assigner", "iou"),
            )
        )
    return teachers


class UltraDistillation:
    """Several frozen teachers behind one prediction: loaded ones, and the student's own past (best weights, EMA).

    Deliberately not an ``nn.Module``: teachers must stay out of the parameters, the state dict and ``train()`` of
    whatever holds them. They run in eval mode without gradient.

    Args:
        teachers: loaded teachers, the primary one first; may be empty.
        student: the student's architecture, whose anchors every prediction is expressed on.
        loss: the student's assigner and kind of classification.
        ensemble: ``mean`` averages the scores; ``confidence`` weighs each teacher by its certainty ``|2p - 1|``.
        matching: ``anchor`` pairs equal anchors, ``iou`` matches decoded boxes, ``auto`` takes the first where anchors
            and assigner are the same and the second elsewhere.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        student: ModelConfig,
        loss: LossConfig,
        ensemble: str = "mean",
        matching: str = "auto",
    ) -> None:
        self.frozen = list(teachers)
        for teacher in self.frozen:
            teacher.model.requires_grad_(False).eval()
        self.student = student
        self.anchors = anchors_of(student)
        self.loss = loss
        self.ensemble = ensemble
        self.matching = matching
        self.own_best: nn.Module | None = None

    def set_own_best(self, model: nn.Module) -> None:
        """Take a frozen copy of ``model`` (the student's architecture) as the own-best teacher."""
        self.own_best = copy.deepcopy(model).requires_grad_(False).eval()

    def apply_to_models(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Run ``nn.Module._apply`` (device moves) on every network held here."""
        for model in [t.model for t in self.frozen] + ([] if self.own_best is None else [self.own_best]):
            model._apply(fn)

    @torch.no_grad()
    def run(self, model: nn.Module, images: Tensor, features: bool = False, predictions: bool = True) -> dict:
        """Raw outputs of ``model`` in eval mode, without gradient; modules in training mode are put back to it.

        Without ``predictions`` the network runs only as far as its neck features need.
        """
        in_training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            if not predictions:
                return model.neck_features(images)
            return model(images, features=True) if features else model(images)
        finally:
            for module in in_training:
                module.training = True

    def run_frozen(
        self, images: Tensor, shares: Sequence[slice], features: bool, predictions: bool = True
    ) -> list[dict]:
        """Raw outputs of the loaded teachers, each on its share of the images; where only features are wanted, {} of
        those that have none."""
        return [
            self.run(t.model, images[share], features and t.has_features, predictions)
            if predictions or t.has_features
            else {}
            for t, share in zip(self.frozen, shares)
        ]

    def run_own(self, images: Tensor, ema_out: dict | None) -> list[dict]:
        """Raw outputs of the student's own past: the EMA's, if given, and those of the best weights, if known."""
        best = [] if self.own_best is None else [self.run(self.own_best.to(images.device), images)]
        return best if ema_out is None else [ema_out, *best]

    @torch.no_grad()
    def targets(self, frozen: list[dict], own: list[dict], student_out: dict, batch: dict, matched: Tensor) -> Target:
        """The ensemble's opinion on the student's anchors.

        Args:
            frozen: raw outputs of the loaded teachers, in their order.
            own: raw outputs of networks with the student's architecture.
            student_out: the student's raw outputs.
            batch: ``images [B, 3, H, W]``, ``boxes [B, M, 4]``.
            matched: ``[B, N]``, the labelled faces that the student's anchors have to predict.
        """
        place = (*batch["images"].shape[-2:], batch["images"].device)
        anchors = self.anchors(*place)
        opinions = [as_target(decode(out, anchors, self.student.variances)) for out in own]
        for teacher, out in zip(self.frozen, frozen):
            prediction = decode(out, teacher.anchors(*place), teacher.config.variances)
            same = teacher.config.anchors == self.student.anchors and teacher.assigner == self.loss.assigner
            if self.matching == "iou" or (self.matching == "auto" and not same):
                opinions.append(
                    match_by_iou(prediction, student_out, batch, matched, anchors, self.student.variances, self.loss)
                )
            else:
                opinions.append(as_target(prediction))
        return self.merge(opinions)

    def merge(self, targets: Sequence[Target]) -> Target:
        """Ensemble of targets on the same anchors; boxes and landmarks are averaged with the trust as weight."""
        if len(targets) == 1:
            return targets[0]
        scores, known = torch.stack([t.logits for t in targets]).sigmoid(), torch.stack([t.known for t in targets])
        weights = torch.ones_like(scores) if self.ensemble == "mean" else (2 * scores - 1).abs() + 1e-3
        weights = weights * known
        weights = weights / weights.sum(0).clamp(min=1e-6)
        trust = torch.stack([t.trust for t in targets])
        place = weights * trust.clamp(min=1e-6)
        place = (place / place.sum(0).clamp(min=1e-12))[..., None]
        return Target(
            logits=torch.logit((weights * scores).sum(0), eps=1e-6),
            boxes=(place * torch.stack([t.boxes for t in targets])).sum(0),
            landmarks=(place[..., None] * torch.stack([t.landmarks for t in targets])).sum(0),
            trust=(weights * trust).sum(0),
            known=known.any(0),
        )


def decode(out: dict, anchors: Tensor, variances: Sequence[float]) -> Prediction:
    """Raw network outputs -> pixels, in float32."""
    return Prediction(
        out["logits"].float(),
        decode_boxes(out["boxes"].float(), anchors, variances),
        decode_landmarks(out["landmarks"].float(), anchors, variances),
    )


def as_target(prediction: Prediction) -> Target:
    """A prediction on the student's own anchors as what they should predict."""
    return Target(
        prediction.logits,
        prediction.boxes,
        prediction.landmarks,
        trust=prediction.logits.sigmoid(),
        known=torch.ones_like(prediction.logits, dtype=torch.bool),
    )


@torch.no_grad()
def match_by_iou(
    teacher: Prediction,
    student_out: dict,
    batch: dict,
    matched: Tensor,
    anchors: Tensor,
    variances: Sequence[float],
    loss: LossConfig,
) -> Target:
    """A teacher's detections as targets of a student with other anchors or another assignment.

    The teacher's boxes after non-maximum suppression (score >= 0.05, at most 300 per image) are handed to the
    student's anchors like this: an anchor assigned to a labelled face takes the detection with IoU >= 0.5 to that
    face; the other anchors take what the student's own assigner would give them, were the detections labels. So the
    teacher never asks an anchor for a face that the student's assignment leaves to its neighbour. With quality focal
    loss the score is multiplied by the IoU of the student's box with the detection, which is what that score means.
    Background anchors without a detection keep their score, limited to 0.05: only false alarms are pushed down.
    Labelled or ignored faces that the teacher misses are not held against the student (``known`` is False).

    Args:
        teacher: ``[B, Nt]``, any anchors.
        student_out: raw outputs on ``anchors [N, 4]`` cxcywh px, a constant here.
        batch: ``boxes [B, M, 4]``. matched: ``[B, N]``, which of these the student's anchors have to predict.
    """
    student = decode(student_out, anchors, variances)
    floor = math.log(DETECTION_SCORE / (1 - DETECTION_SCORE))
    logits, index = teacher.logits.topk(min(CANDIDATES, teacher.logits.shape[1]), 1)
    kept = suppress(rows(teacher.boxes, index), logits, logits >= floor)
    most = min(max(1, int(kept.sum(1).max())), DETECTIONS)
    logits, order = logits.masked_fill(~kept, -torch.inf).topk(most, 1)
    index, valid = index.gather(1, order), logits > -torch.inf
    boxes, landmarks = rows(teacher.boxes, index), rows(teacher.landmarks, index)

    found = {"boxes": boxes, "valid": valid, "ignore": torch.zeros_like(valid)}
    taken = assign(loss, found, anchors, student_out, variances)
    if batch["boxes"].shape[1]:
        overlap, of_face = best_overlap(batch["boxes"].float(), boxes, valid)
        of_face = of_face.masked_fill(overlap < MATCH_IOU, BACKGROUND)
        of_label = of_face.gather(1, matched.clamp(min=0))
        taken = torch.where(matched >= 0, of_label, taken)
    has, taken = taken >= 0, taken.clamp(min=0)
    theirs, trust = rows(boxes, taken), logits.gather(1, taken).sigmoid()
    score = trust * aligned_iou(student.boxes, theirs).clamp(0, 1) if loss.classification == "quality_focal" else trust
    return Target(
        logits=torch.where(has, torch.logit(score, eps=1e-3), student.logits.detach().clamp(max=floor)),
        boxes=torch.where(has[..., None], theirs, student.boxes),
        landmarks=torch.where(has[..., None, None], rows(landmarks, taken), student.landmarks),
        trust=trust * has,
        known=has | (matched == BACKGROUND),
    )


def rows(values: Tensor, index: Tensor) -> Tensor:
    """``[B, N, ...]`` at ``[B, K]`` -> ``[B, K, ...]``."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def suppress(boxes: Tensor, scores: Tensor, usable: Tensor) -> Tensor:
    """Non-maximum suppression of a batch at once: boxes ``[B, C, 4]``, scores, usable ``[B, C]`` -> kept ``[B, C]``."""
    image, place = usable.nonzero(as_tuple=True)
    found = boxes[image, place]
    if len(found):  # batched_nms sets images apart by the largest coordinate, which negative ones would undo
        found = found - found.min()
    survivors = batched_nms(found, scores[image, place], image, NMS_IOU)
    kept = torch.zeros_like(usable)
    kept[image[survivors], place[survivors]] = True
    return kept


def best_overlap(boxes: Tensor, others: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """For each box the IoU and index of the usable other box it overlaps most; 0 and 0 where there is none.

    Args:
        boxes: ``[B, N, 4]`` xyxy px, or ``[N, 4]`` shared by all images.
        others: ``[B, M, 4]``.
        usable: ``[B, M]`` bool.

    Returns:
        IoU ``[B, N]`` and index ``[B, N]``. At most about 4 million pairs are in memory at once.
    """
    boxes = boxes.expand(len(others), -1, -1) if boxes.dim() == 2 else boxes
    batch, n, m = len(others), boxes.shape[1], others.shape[1]
    iou = boxes.new_zeros(batch, n)
    index = torch.zeros(batch, n, dtype=torch.int64, device=boxes.device)
    if not batch * n * m:
        return iou, index
    area = (others[..., 2] - others[..., 0]) * (others[..., 3] - others[..., 1])
    step = max(1, PAIRS // (batch * m))
    for start in range(0, n, step):
        part = boxes[:, start : start + step, None]
        width = torch.minimum(part[..., 2], others[:, None, :, 2]) - torch.maximum(part[..., 0], others[:, None, :, 0])
        height = torch.minimum(part[..., 3], others[:, None, :, 3]) - torch.maximum(part[..., 1], others[:, None, :, 1])
        inter = width.clamp(min=0) * height.clamp(min=0)
        own = (part[..., 2] - part[..., 0]) * (part[..., 3] - part[..., 1])
        pair = (inter / (own + area[:, None] - inter).clamp(min=1e-6)).masked_fill(~usable[:, None], -1)
        iou[:, start : start + step], index[:, start : start + step] = pair.max(-1)
    return iou.clamp(min=0), index
