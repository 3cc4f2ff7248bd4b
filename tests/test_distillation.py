"""Distillation: each term is non-zero where it should be, zero where student equals teacher, and teaches the student
only; the schedule; different anchors; gradient balance; state."""

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from benchmark import sample_picture
from data.preprocess import normalise
from layers import distillation_terms as terms
from layers.anchors import encode_boxes, encode_landmarks, make_anchors, to_xyxy
from layers.distillation import ProgressiveDistillation, _teacher_better, balance_factor
from layers.distillation_memory import PredictionMemory, find_again, shown, to_batch, to_original
from layers.losses import MultiBoxLoss
from layers.matching import BACKGROUND, IGNORED, aligned_iou, assign
from layers.teachers import (
    Prediction,
    Target,
    Teacher,
    UltraDistillation,
    as_target,
    best_overlap,
    decode,
    load_teachers,
    match_by_iou,
    suppress,
)
from layers.teachers_onnx import scrfd_module, scrfd_raw
from models.featherface import build_model
from utils.checkpoint import CheckpointError
from utils.config import TERMS, ConfigError, DistillConfig, DistillStage, LossConfig, ModelConfig
from utils.onnx_export import describe, export_raw, write
from utils.peers import PEERS, load_peer

SIZE = 64
SMALL = {"out_channels": 8, "bifpn_repeats": 1, "cbam_reduction": 4, "ssh_groups": 2}
STUDENT = ModelConfig(**SMALL)
EXTRA = ModelConfig(**SMALL, anchors=[[8, 16, 32], [64, 128], [256, 512]])
WIDE = ModelConfig(**{**SMALL, "out_channels": 12})


def one_stage(**kwargs) -> DistillConfig:
    """A config whose only stage has the given terms (weight 1) and switches."""
    names = kwargs.pop("terms")
    stage = {k: kwargs.pop(k) for k in ("gradient_balance", "only_where_better") if k in kwargs}
    kwargs = {"memory_images": 50, **kwargs}
    stages = [DistillStage(1.0, dict.fromkeys(names, 1.0), **stage)]
    return DistillConfig(until=[1.0], temperature=[4.0], alpha=[0.7], stages=stages, **kwargs)


def make_batch(faces: int = 2, images: int = 2) -> dict:
    boxes = torch.tensor([[8.0, 8.0, 26.0, 30.0], [30.0, 24.0, 60.0, 60.0]])[:faces].expand(images, -1, -1)
    return {
        "images": torch.randn(images, 3, SIZE, SIZE) * 50,
        "boxes": boxes.clone(),
        "landmarks": (boxes[:, :, None, :2] + 8).expand(-1, -1, 5, -1).clone(),
        "has_landmarks": torch.ones(images, faces, dtype=torch.bool),
        "valid": torch.ones(images, faces, dtype=torch.bool),
        "ignore": torch.zeros(images, faces, dtype=torch.bool),
        "index": torch.arange(images),
        "transform": torch.tensor([[1.0, 0, 1, 0, 0, 0]]).repeat(images, 1),
        "names": ["x"] * images,
    }


def network(cfg: ModelConfig, seed: int) -> nn.Module:
    """A random network with scores around 0.5 and boxes that differ from the anchors."""
    torch.manual_seed(seed)
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of the one batch that follows, so that eval mode is well scaled
    with torch.no_grad():
        model(torch.randn(4, 3, SIZE, SIZE) * 50)
        for conv in [*model.heads.classes, *model.heads.boxes, *model.heads.landmarks]:
            conv.weight.mul_(30)
            conv.bias.zero_()
    return model.eval()


def distiller_for(cfg: DistillConfig, student: ModelConfig = STUDENT, teachers=()) -> ProgressiveDistillation:
    return ProgressiveDistillation(cfg, student, teachers, LossConfig())


def assigned(batch: dict, cfg: ModelConfig = STUDENT) -> torch.Tensor:
    anchors = make_anchors(*batch["images"].shape[-2:], cfg.strides, cfg.anchors)
    return assign(LossConfig(), batch, anchors)


def distil(distiller: ProgressiveDistillation, out: dict, batch: dict, progress: float = 0.0, ema_model=None):
    return distiller(out, batch, assigned(batch, distiller.student), progress, ema_model)


@pytest.fixture
def batch() -> dict:
    return make_batch()


@pytest.mark.parametrize(
    "epoch, expected",
    [
        (1, (6, 0.9, 0)),
        (100, (6, 0.9, 0)),
        (101, (4, 0.7, 0)),
        (150, (4, 0.7, 0)),
        (151, (4, 0.7, 1)),
        (200, (4, 0.7, 1)),
        (201, (2, 0.5, 1)),
        (300, (2, 0.5, 1)),
        (301, (1, 0.3, 2)),
        (400, (1, 0.3, 2)),
        (401, (1, 0.3, 2)),
    ],
)
def test_schedule_of_400_epochs(epoch, expected):
    cfg = DistillConfig()
    temperature, alpha, stage = cfg.schedule((epoch - 1) / 400)
    assert (temperature, alpha, cfg.stages.index(stage)) == expected


@pytest.mark.parametrize("epochs", [8, 40, 1000])
def test_schedule_scales_with_epochs(epochs):
    cfg = DistillConfig()
    assert cfg.schedule((epochs // 4 - 1) / epochs)[0] == 6
    assert cfg.schedule((epochs // 4) / epochs)[0] == 4


@pytest.mark.parametrize("name", ["score", "box", "feature", "attention"])
def test_teacher_term_is_zero_for_an_equal_teacher_and_teaches_the_student_otherwise(name, batch):
    student = network(STUDENT, 1)
    same = distiller_for(one_stage(terms=[name]), teachers=[Teacher(copy.deepcopy(student), STUDENT, assigner="atss")])
    losses, alpha = distil(same, student(batch["images"], features=True), batch)
    assert alpha == 0.7
    assert abs(float(losses[name])) < 1e-5

    teacher = network(STUDENT, 2)
    other = distiller_for(one_stage(terms=[name]), teachers=[Teacher(teacher, STUDENT, assigner="atss")])
    losses, _ = distil(other, student(batch["images"], features=True), batch)
    assert losses[name] > 1e-3
    assert losses["total"].item() == pytest.approx(losses[name].item())
    losses["total"].backward()
    assert grad_norm(student) > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_dense_term_is_zero_for_a_mimic_that_repeats_its_teacher_and_teaches_the_student_otherwise(batch):
    """The teacher has other anchors than the student, whose own predictions take no part."""
    student, teacher = network(EXTRA, 1), network(STUDENT, 2)
    distiller = distiller_for(one_stage(terms=["dense"]), EXTRA, [Teacher(teacher, STUDENT)])
    assert distiller.needs_features(0.0)
    out = student(batch["images"], features=True)
    losses, alpha = distil(distiller, out, batch)
    assert alpha == 0.7 and losses["dense"] > 0.1
    losses["total"].backward()
    assert grad_norm(student.context) > 0 and grad_norm(student.heads) == 0
    assert all(p.grad.abs().sum() > 0 for p in distiller.mimics.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())

    distiller.mimics[0].load_state_dict(teacher.heads.state_dict())
    with torch.no_grad():
        theirs = teacher(batch["images"], features=True)
        same, _ = distil(distiller, {**out, "context": theirs["context"]}, batch)
        heard = distiller.mimics[0](*[theirs["context"]] * 3)
    assert torch.allclose(heard["logits"], theirs["logits"], atol=1e-4)
    assert same["dense"] < 1e-4


def test_a_split_batch_asks_each_teacher_about_its_share(batch):
    student, networks = network(EXTRA, 1), [network(STUDENT, 2), network(WIDE, 3)]
    seen = []
    for model in networks:
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    teachers = [Teacher(networks[0], STUDENT), Teacher(networks[1], WIDE)]
    distiller = distiller_for(one_stage(terms=["dense"], split_batch=True), EXTRA, teachers)
    out = student(batch["images"], features=True)
    losses, _ = distil(distiller, out, batch)
    assert [len(x) for x in seen] == [1, 1]
    assert torch.equal(torch.cat(seen), batch["images"])
    alone = distiller_for(one_stage(terms=["dense"]), EXTRA, teachers[1:])
    alone.mimics[0].load_state_dict(distiller.mimics[1].state_dict())
    other = distiller_for(one_stage(terms=["dense"]), EXTRA, teachers[:1])
    other.mimics[0].load_state_dict(distiller.mimics[0].state_dict())
    parts = []
    for each, i in ((other, 0), (alone, 1)):
        half = {k: v[i : i + 1] for k, v in batch.items()}
        parts.append(distil(each, {**out, "context": [x[i : i + 1] for x in out["context"]]}, half)[0]["dense"])
    torch.testing.assert_close(losses["dense"], torch.stack(parts).mean())
    bad = DistillConfig(split_batch=True).check()
    assert "split_batch" in bad and "'dense'" in bad["split_batch"]
    with pytest.raises(ConfigError, match="the term 'dense' needs one"):
        distiller_for(one_stage(terms=["dense"], self_teacher=True))


def test_dense_scores_are_counted_per_face_like_anchor():
    """One sure face of four anchors: the same error weighs the same among any number of silent ones."""
    teacher = torch.full((1, 400), -20.0)
    teacher[0, :4] = 20.0
    ours = teacher.clone()
    ours[0, :4] = 0.0
    few = terms.dense_score_term(ours[:, :40], teacher[:, :40])
    assert few == pytest.approx(0.5**2 * 0.6931, rel=1e-3)  # quality focal: |1 - 0.5|^2 * BCE
    assert terms.dense_score_term(ours, teacher) == pytest.approx(few.item())
    noisy = teacher.where(teacher > 0, -4.6)  # a hundredth on each silent anchor, which the student repeats
    assert terms.dense_score_term(ours.where(teacher > 0, -4.6), noisy) == pytest.approx(few.item(), rel=1e-3)
    assert terms.dense_score_term(torch.zeros(2, 9), torch.full((2, 9), -20.0)).isfinite()  # nothing there
    # an image without faces counts as one face, and takes nothing from those of another
    both, said = (torch.cat([x[:, :40], torch.full((1, 40), -20.0)]) for x in (ours, teacher))
    assert terms.dense_score_term(both, said) == pytest.approx(few.item() * 4 / 5, rel=1e-3)


def test_cross_scale_moves_p3_towards_the_coarser_levels(batch):
    student = network(STUDENT, 1)
    out = student(batch["images"], features=True)
    neck = [x.detach().requires_grad_() for x in out["neck"]]
    loss = terms.cross_scale_term(neck)
    assert loss > 1e-3
    grads = torch.autograd.grad(loss, neck, allow_unused=True)
    assert grads[0].abs().sum() > 0
    assert grads[1] is None and grads[2] is None  # the coarse levels are constants
    agreeing = [torch.nn.functional.interpolate(neck[2], scale_factor=f) for f in (4, 2, 1)]
    assert terms.cross_scale_term(agreeing) < 1e-6
    losses, _ = distil(distiller_for(one_stage(terms=["cross_scale"])), out, batch)
    losses["total"].backward()
    assert grad_norm(student) > 0


def test_temporal_memory_is_zero_while_predictions_stay_and_pulls_when_they_change(batch):
    student = network(STUDENT, 1)
    distiller = distiller_for(one_stage(terms=["temporal"]))
    first, _ = distil(distiller, student(batch["images"]), batch)
    assert first["temporal"] == 0  # nothing remembered yet
    assert (distiller.memory.table[:2, 0, 4] > 0.3).all()
    again, _ = distil(distiller, student(batch["images"]), batch)
    assert abs(float(again["temporal"])) < 1e-4
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.03 * torch.randn_like(p))
    changed, _ = distil(distiller, student(batch["images"]), batch)
    assert changed["temporal"] > 1e-3
    changed["total"].backward()
    assert grad_norm(student) > 0


def test_temporal_memory_speaks_to_the_anchor_that_is_sure_of_the_face():
    """Not to a weaker one whose box happens to overlap more, which the labels call background."""
    face = torch.tensor([10.0, 10, 40, 40])
    boxes = torch.stack([face, face + 4, face + 100, face + 104])[None]
    student = Prediction(torch.tensor([[-2.0, 1.0, 0.5, 2.0]]), boxes, torch.zeros(1, 4, 5, 2))
    image, anchor, column, overlap = find_again(boxes[:, [0, 2]], torch.tensor([[0.9, 0.0]]), student, 200)
    assert image.tolist() == [0] and anchor.tolist() == [1] and column.tolist() == [0]
    assert overlap.item() == pytest.approx(box_iou(face[None], face[None] + 4).item())


def test_remembered_boxes_weigh_by_score_and_overlap():
    distiller = distiller_for(one_stage(terms=["temporal"])).eval()
    now = torch.tensor([[[0.0, 0, 20, 20], [30, 30, 50, 50]]])
    distiller.memory.owner[0] = 0
    distiller.memory.table[0, :2] = torch.tensor([[0.0, 0, 20, 20, 0.9], [34, 30, 54, 50, 0.9]])  # IoU 1 and 2/3
    logits = torch.zeros(1, 2, requires_grad=True)
    distiller._memory_term(Prediction(logits, now, torch.zeros(1, 2, 5, 2)), make_batch(images=1)).backward()
    assert (logits.grad[0, 1] / logits.grad[0, 0]).item() == pytest.approx(2 / 3, rel=1e-4)
    assert distiller.memory.table[0, 0, 4] == pytest.approx(0.9)  # nothing is remembered in eval mode


def test_a_crop_does_not_show_boxes_thinner_than_four_px():
    assert shown(torch.tensor([[[5.0, 5, 8, 40], [5, 5, 10, 40]]]), 64).tolist() == [[False, True]]


def test_temporal_memory_follows_the_augmentation(batch):
    """What was seen in one crop is found again in a flipped, enlarged one of the same photo."""
    anchors = make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    memory = PredictionMemory(10, 4)
    seen = torch.tensor([[[10.0, 12.0, 20.0, 24.0]]]).expand(2, -1, -1)
    logits = torch.full((2, len(anchors)), -9.0)
    logits[:, 5] = 2.0
    boxes = to_xyxy(anchors).expand(2, -1, -1).clone()
    boxes[:, 5] = seen[:, 0]
    memory.remember(batch, Prediction(logits, boxes, torch.zeros(2, len(anchors), 5, 2)))
    later = {**batch, "transform": torch.tensor([[2.0, -10, 2, -10, 1, 0], [2.0, -30, 2, -10, 0, 0]])}
    recalled, scores = memory.recall(later)
    # x: 10..20 -> 10..30, mirrored in 64 px -> 34..54; y: 12..24 -> 14..38
    torch.testing.assert_close(recalled[0, 0], torch.tensor([34.0, 14.0, 54.0, 38.0]))
    assert scores[0, 0] == pytest.approx(float(torch.sigmoid(torch.tensor(2.0))))
    assert (scores[1] == 0).all()  # half outside of that crop: it has no say
    turned = {**batch, "transform": torch.tensor([[1.0, 0, 1, 0, 0, 1]]).repeat(2, 1)}
    assert (memory.recall(turned)[1] == 0).all()


def test_temporal_memory_keeps_what_a_crop_does_not_show(batch):
    anchors = make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    memory = PredictionMemory(10, 4)
    logits, boxes = torch.full((2, len(anchors)), -9.0), to_xyxy(anchors).expand(2, -1, -1).clone()
    points = torch.zeros(2, len(anchors), 5, 2)
    logits[:, 5] = 2.0
    boxes[:, 5] = torch.tensor([40.0, 40.0, 60.0, 60.0])
    memory.remember(batch, Prediction(logits, boxes, points))
    elsewhere = {**batch, "transform": torch.tensor([[1.0, -200, 1, 0, 0, 0], [1.0, 0, 1, 0, 0, 0]])}
    memory.remember(elsewhere, Prediction(torch.full_like(logits, -9.0), boxes, points))
    scores = memory.recall(batch)[1]
    assert scores[0, 0] > 0.8  # image 0: the crop was beside the face
    assert (scores[1] == 0).all()  # image 1: the face was in view, and is no longer predicted


def test_temporal_memory_is_bounded(batch):
    memory = PredictionMemory(3, 2)
    anchors = make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    points = torch.zeros(2, len(anchors), 5, 2)
    logits = torch.full((2, len(anchors)), 3.0)
    for start in range(0, 8, 2):
        index = torch.tensor([start, start + 1])
        memory.remember({**batch, "index": index}, Prediction(logits, to_xyxy(anchors).expand(2, -1, -1), points))
    assert memory.owner.tolist() == [6, 7, 5]
    assert memory.recall({**batch, "index": torch.tensor([6, 3])})[1].gt(0).any(1).tolist() == [True, False]


def test_of_two_predictions_for_one_row_the_later_is_remembered(batch):
    anchors = make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    boxes, points = to_xyxy(anchors).expand(2, -1, -1).clone(), torch.zeros(2, len(anchors), 5, 2)
    boxes[:, 5] = torch.tensor([10.0, 12.0, 20.0, 24.0])
    logits = torch.full((2, len(anchors)), -9.0)
    logits[:, 5] = torch.tensor([2.0, 3.0])
    same = {**batch, "index": torch.tensor([4, 4])}
    memory = PredictionMemory(10, 4)
    memory.remember(same, Prediction(logits, boxes, points))
    assert memory.table[4, 0, 4] == torch.sigmoid(torch.tensor(3.0)) and memory.owner[4] == 4
    turned = {**same, "transform": torch.tensor([[1.0, 0, 1, 0, 0, 0], [1.0, 0, 1, 0, 0, 1]])}
    memory.remember(turned, Prediction(logits, boxes, points))  # the later one cannot be mapped back
    assert memory.table[4, 0, 4] == torch.sigmoid(torch.tensor(2.0))


def test_transform_round_trip():
    transform = torch.tensor([[1.5, 3.0, 0.7, -4.0, 1.0, 0.0], [2.0, -3.0, 2.0, 4.0, 0.0, 0.0]])
    boxes = torch.rand(2, 6, 4) * 20
    boxes[..., 2:] += boxes[..., :2]
    torch.testing.assert_close(to_original(to_batch(boxes, transform, 64), transform, 64), boxes, atol=1e-4, rtol=1e-4)


def test_temporal_from_ema(batch):
    student, ema = network(STUDENT, 1), network(STUDENT, 2).train()
    distiller = distiller_for(one_stage(terms=["temporal"], temporal_source="ema"))
    assert distiller.memory is None and distiller.needs_ema(0.0)
    losses, _ = distil(distiller, student(batch["images"]), batch, ema_model=ema)
    losses["total"].backward()
    assert losses["temporal"] > 1e-3 and grad_norm(student) > 0
    assert grad_norm(ema) == 0 and all(m.training for m in ema.modules())
    equal, _ = distil(distiller, student(batch["images"]), batch, ema_model=copy.deepcopy(student))
    assert abs(float(equal["temporal"])) < 1e-5


@pytest.mark.parametrize("faces", [0, 2])
@pytest.mark.parametrize("temperature", [1.0, 6.0])
def test_all_terms_together_are_finite(faces, temperature):
    """A wider teacher without the extra anchors, EMA and own best on top; images without a face too."""
    batch = make_batch(faces)
    cfg = one_stage(terms=TERMS, self_teacher=True, self_best=True, ensemble="confidence", gradient_balance=True)
    cfg.temperature = [temperature]
    student = network(EXTRA, 1).train()
    distiller = distiller_for(cfg, EXTRA, [Teacher(network(WIDE, 2), WIDE), Teacher(network(EXTRA, 3), EXTRA)])
    distiller.set_own_best(student)
    out = student(batch["images"], features=True)
    assignment = assigned(batch, EXTRA)
    task = MultiBoxLoss(LossConfig())(out, batch, distiller.teachers.anchors(SIZE, SIZE), assignment)["total"]
    total, log = distiller.combine(task, out, batch, assignment, 0.5, ema_model=network(EXTRA, 4))
    total.backward()
    assert total.isfinite()
    assert {f"distill_{name}" for name in TERMS} <= log.keys()
    assert all(torch.as_tensor(v).isfinite() for v in log.values())
    assert all(p.grad.isfinite().all() for p in [*student.parameters(), *distiller.parameters()] if p.grad is not None)
    assert grad_norm(distiller.adapters) > 0 and grad_norm(distiller.mimics) > 0


def test_bf16_autocast(batch):
    student = network(STUDENT, 1)
    distiller = distiller_for(one_stage(terms=TERMS), teachers=[Teacher(network(WIDE, 2), WIDE)])
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = distil(distiller, student(batch["images"], features=True), batch)
    assert losses["total"].dtype == torch.float32 and losses["total"].isfinite()
    losses["total"].backward()
    assert grad_norm(student) > 0


def matched(student_logits: float, classification: str = "focal", faces: int = 0):
    """A teacher with the usual anchors that sees one 30-px face twice and a student with 8-px anchors on top."""
    anchors = make_anchors(SIZE, SIZE, EXTRA.strides, EXTRA.anchors)
    theirs = make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    n, m = len(anchors), len(theirs)
    out = {
        "logits": torch.full((1, n), student_logits),
        "boxes": torch.zeros(1, n, 4),
        "landmarks": torch.zeros(1, n, 10),
    }
    teacher = Prediction(torch.full((1, m), -6.0), to_xyxy(theirs)[None].clone(), torch.zeros(1, m, 5, 2))
    teacher.boxes[0, [60, 62]] = torch.tensor([[14.0, 14.0, 44.0, 44.0], [15.0, 14.0, 45.0, 44.0]])
    teacher.logits[0, [60, 62]] = torch.tensor([2.5, 1.0])
    teacher.landmarks[0, 60] = 9.0
    loss = LossConfig(classification=classification)
    batch = make_batch(faces, 1)
    assignment = assign(loss, batch, anchors)
    target = match_by_iou(teacher, out, batch, assignment, anchors, EXTRA.variances, loss)
    return anchors, teacher, assignment, target


def test_different_anchors_learn_the_teachers_detections_where_the_student_would_assign_them():
    anchors, teacher, _, target = matched(-2.0)
    face = {"boxes": teacher.boxes[:, 60:61], "valid": torch.ones(1, 1, dtype=torch.bool)}
    face["ignore"] = ~face["valid"]
    chosen = assign(LossConfig(), face, anchors)[0] >= 0
    assert 0 < chosen.sum() < 20
    assert torch.allclose(target.logits[0, chosen], torch.tensor(2.5))  # not the duplicate's 1.0
    assert (target.boxes[0, chosen] == teacher.boxes[0, 60]).all() and (target.landmarks[0, chosen] == 9).all()
    assert torch.allclose(target.trust[0], torch.tensor(2.5).sigmoid() * chosen)
    false_alarms = target.logits[0, ~chosen].sigmoid()  # the student's 0.12 where the teacher sees nothing
    assert torch.allclose(false_alarms, torch.tensor(0.05)) and target.known.all()
    quiet = matched(-4.0)[-1]
    assert (quiet.logits[0, ~chosen] == -4.0).all()  # quiet background is left alone


def test_scores_matched_by_iou_carry_the_quality_of_the_students_box():
    anchors, teacher, *_, target = matched(-2.0, "quality_focal")
    found = (target.trust > 0)[0]
    quality = aligned_iou(to_xyxy(anchors)[found], teacher.boxes[0, 60])
    torch.testing.assert_close(target.logits.sigmoid()[0, found], quality * torch.tensor(2.5).sigmoid())


def test_faces_that_the_teacher_misses_are_not_held_against_the_student():
    *_, assignment, target = matched(2.0, faces=1)  # a labelled face at 8..26 x 8..30, unseen by the teacher
    labelled = assignment >= 0
    assert labelled.any() and not target.known[labelled].any()
    assert target.known[assignment == -1].all()


def test_ignored_faces_that_the_teacher_misses_are_not_held_against_the_student():
    batch, anchors = make_batch(1, 1), make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    batch["valid"], batch["ignore"] = batch["ignore"], batch["valid"]
    assignment, n = assigned(batch), len(anchors)
    out = {"logits": torch.zeros(1, n), "boxes": torch.zeros(1, n, 4), "landmarks": torch.zeros(1, n, 10)}
    blind = Prediction(torch.full((1, n), -6.0), to_xyxy(anchors)[None], torch.zeros(1, n, 5, 2))
    target = match_by_iou(blind, out, batch, assignment, anchors, STUDENT.variances, LossConfig())
    ignored = assignment == IGNORED
    assert ignored.any() and torch.equal(target.known, ~ignored)


def test_iou_matching_asks_for_nothing_where_the_student_already_says_it(batch):
    """A student that predicts the teacher's detection on the assigned anchors, and is quiet elsewhere."""
    anchors, teacher, *_, target = matched(-5.0)
    out = {
        "logits": target.logits,
        "boxes": encode_boxes(target.boxes, anchors, EXTRA.variances),
        "landmarks": encode_landmarks(target.landmarks, anchors, EXTRA.variances),
    }
    theirs = make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    raw = {
        "logits": teacher.logits,
        "boxes": encode_boxes(teacher.boxes, theirs, STUDENT.variances),
        "landmarks": encode_landmarks(teacher.landmarks, theirs, STUDENT.variances),
    }
    cfg = one_stage(terms=["score", "box"])
    distiller = ProgressiveDistillation(cfg, EXTRA, [Teacher(Fixed(raw), STUDENT)], LossConfig(classification="focal"))
    losses, _ = distil(distiller, out, make_batch(0, 1))
    assert abs(float(losses["score"])) < 1e-5 and abs(float(losses["box"])) < 1e-5
    out["logits"] = out["logits"] - 1
    out["boxes"] = out["boxes"] + 0.5
    losses, _ = distil(distiller, out, make_batch(0, 1))
    assert losses["score"] > 0.01 and losses["box"] > 0.01


@pytest.mark.parametrize(
    "matching, anchors, assigner, by_iou",
    [
        ("auto", STUDENT, "atss", False),
        ("auto", STUDENT, "iou", True),
        ("auto", EXTRA, "atss", True),
        ("anchor", STUDENT, "iou", False),
        ("iou", STUDENT, "atss", True),
    ],
)
def test_matching_by_iou_where_anchors_or_assigner_differ(matching, anchors, assigner, by_iou, batch, monkeypatch):
    calls = []
    monkeypatch.setattr("layers.teachers.match_by_iou", lambda *a: calls.append(1) or match_by_iou(*a))
    teacher = Teacher(network(anchors, 2), anchors, assigner=assigner)
    distiller = distiller_for(one_stage(terms=["score"], matching=matching), teachers=[teacher])
    distil(distiller, network(STUDENT, 1)(batch["images"]), batch)
    assert bool(calls) == by_iou


def test_matching_by_anchor_refuses_other_anchors():
    teacher = Teacher(network(STUDENT, 2), STUDENT, "v1")
    with pytest.raises(ConfigError, match=r"^'distill\.matching': .* but v1 has \[\[16, 32\], .* \[\[8, 16, 32\], .*$"):
        distiller_for(one_stage(terms=["score"], matching="anchor"), EXTRA, [teacher])
    distiller_for(one_stage(terms=["dense"], matching="anchor"), EXTRA, [teacher])  # which matches nothing


def test_best_overlap_in_parts_equals_torchvision(monkeypatch):
    boxes = torch.rand(3, 17, 4) * 50
    boxes[..., 2:] += boxes[..., :2]
    others = torch.rand(3, 6, 4) * 50
    others[..., 2:] += others[..., :2]
    usable = torch.ones(3, 6, dtype=torch.bool)
    usable[2] = False
    monkeypatch.setattr("layers.teachers.PAIRS", 60)
    iou, index = best_overlap(boxes, others, usable)
    for b in range(2):
        expected, where = box_iou(boxes[b], others[b]).max(1)
        torch.testing.assert_close(iou[b], expected)
        assert (index[b] == where)[expected > 0].all()
    assert (iou[2] == 0).all()


def test_a_box_left_of_and_above_one_image_is_no_duplicate_of_another_images():
    boxes = torch.tensor([[[200.0, 200, 260, 260]], [[-61.0, -61, -1, -1]]])
    assert suppress(boxes, torch.tensor([[0.9], [0.8]]), torch.ones(2, 1, dtype=torch.bool)).all()
    assert not suppress(boxes, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool)).any()


def test_score_mask_holds_positives_neighbours_and_few_background_anchors():
    student = torch.full((2, 168), -5.0)
    student[0, 100] = 1.0  # a false alarm far away
    teacher = torch.full((2, 168), -5.0)
    positive = torch.zeros(2, 168, dtype=torch.bool)
    positive[0, 2 * (3 * 8 + 3)] = True  # P3, row 3, column 3, first size
    mask = terms.build_mask(student, teacher, positive, [(8, 8, 2), (4, 4, 2), (2, 2, 2)])
    picked = torch.zeros(2, 168, dtype=torch.bool)
    picked[mask.image, mask.anchor] = True
    near = [2 * (r * 8 + c) + s for r in (2, 3, 4) for c in (2, 3, 4) for s in (0, 1)]
    assert picked[0, near].all() and picked[0, 100]
    assert picked[0].sum() == 18 + 36 and picked[1].sum() == 32
    assert mask.positive.sum() == 1 and mask.weight[mask.positive] == 1
    weight = torch.zeros(2, 168).index_put((mask.image, mask.anchor), mask.weight)
    assert (
        set(weight[0, near].tolist()) == {1.0, 0.5} and weight[0, 100] == 0.5 and set(weight[1].tolist()) == {0.0, 0.5}
    )
    # the far background's logits get no gradient at all
    logits = student.clone().requires_grad_()
    terms.score_term(mask.pick(logits), mask.pick(teacher) + 1, mask.weight, 6.0).backward()
    assert (logits.grad[~picked] == 0).all() and (logits.grad[picked] != 0).all()


def test_hard_negatives_are_looked_for_beyond_the_neighbourhood():
    cells = [(16, 16, 2)]
    positive = torch.zeros(1, 512, dtype=torch.bool)
    positive[0, 2 * (8 * 16 + 8)] = True
    scores = torch.where(terms.dilate(positive, cells), 3.0, -5.0)  # highest in the neighbourhood
    mask = terms.build_mask(scores, scores, positive, cells)
    assert len(mask.anchor) == 3 * 3 * 2 * (1 + terms.HARD_PER_POSITIVE)


def test_score_gradient_keeps_its_size_over_temperatures():
    """T^2 undoes the softening: for small differences the gradient does not depend on T much."""
    norms = []
    for temperature in (4.0, 8.0):
        logits = torch.zeros(8, requires_grad=True)
        terms.score_term(logits, torch.full((8,), 0.1), torch.ones(8), temperature).backward()
        norms.append(float(logits.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_box_term_counts_only_confident_teachers():
    mine, theirs = torch.tensor([[0.0, 0, 10, 10]]).repeat(2, 1), torch.tensor([[2.0, 2, 12, 12]]).repeat(2, 1)
    points, ones = torch.zeros(2, 5, 2), torch.ones(2)
    sure = terms.box_term(mine, points, theirs, points, ones, torch.tensor([0.9, 0.1]), 0.1)
    unsure = terms.box_term(mine, points, theirs, points, ones, torch.tensor([0.2, 0.1]), 0.1)
    assert sure > 0.3 and unsure == 0
    moved = terms.box_term(theirs, points, theirs, points + 3, ones, torch.tensor([0.9, 0.1]), 0.1)
    assert moved > 0.01  # landmarks count too
    more = terms.box_term(theirs, points, theirs, points + 3, ones, torch.tensor([0.9, 0.1]), 0.3)
    assert more == pytest.approx(3 * moved.item())


def test_box_term_weighs_by_the_teachers_score():
    theirs = torch.tensor([[0.0, 0, 10, 10]]).repeat(2, 1)
    mine = theirs + torch.tensor([[0.0], [5.0]])
    points, ones = torch.zeros(2, 5, 2), torch.ones(2)
    alone = terms.box_term(mine[1:], points[1:], theirs[1:], points[1:], ones[1:], ones[1:], 0.0)
    both = terms.box_term(mine, points, theirs, points, ones, torch.tensor([0.9, 0.3]), 0.0)
    assert both.item() == pytest.approx(alone.item() * 0.3 / 1.2, rel=1e-4)


@pytest.mark.parametrize("term", ["box", "dense"])
def test_landmark_weight_reaches_the_terms_with_boxes(term, batch):
    student, teacher = network(STUDENT, 1), network(STUDENT, 2)
    for conv in teacher.heads.classes:
        torch.nn.init.constant_(conv.bias, 4.0)  # confident everywhere
    values = {}
    for weight in (0.0, 1.0, 2.0):
        cfg = one_stage(terms=[term], landmark_weight=weight)
        distiller = distiller_for(cfg, STUDENT, [Teacher(teacher, STUDENT, assigner="atss")])
        if term == "dense":
            distiller.mimics[0].load_state_dict(student.heads.state_dict())
        values[weight] = distil(distiller, student(batch["images"], features=True), batch)[0][term].item()
    part = values[1.0] - values[0.0]
    assert part > 1e-3
    assert values[2.0] - values[0.0] == pytest.approx(2 * part, rel=1e-3)
    assert "landmark_weight" in DistillConfig(landmark_weight=-1.0).check()


def test_feature_term_is_blind_to_scale_and_shift_and_heeds_attention():
    t = [torch.randn(2, 4, 8, 8)]
    assert terms.feature_term([3 * t[0] + 5], t) < 1e-5
    s = [t[0].clone()]
    s[0][:, :, :4] = torch.randn(2, 4, 4, 8)  # wrong in the upper half only
    up, down = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    up[:, :, :4], down[:, :, 4:] = 1, 1
    assert terms.feature_term(s, t, [up]) > 5 * terms.feature_term(s, t, [down])


def test_attention_weighs_places_of_an_image_and_not_images():
    s, t, attention = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.rand(2, 1, 8, 8)
    louder = attention * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(terms.feature_term([s], [t], [louder]), terms.feature_term([s], [t], [attention]))


def test_features_are_standardised_over_the_batch():
    """An image whose features are stronger than the teacher's, beside one where they are not, is an error."""
    t = torch.randn(2, 1, 8, 8)
    s = t + torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)
    pearson = torch.corrcoef(torch.stack([s.flatten(), t.flatten()]))[0, 1]
    assert terms.feature_term([s], [t]).item() == pytest.approx(1 - pearson.item(), abs=1e-4)


def test_only_where_better_ignores_a_worse_teacher(batch):
    """Of two teachers, one right and one wrong about the labels, only the right one pulls."""
    student = network(STUDENT, 1)
    cfg = one_stage(terms=["score", "box"], only_where_better=True)
    anchors = make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    out = student(batch["images"])
    assignment = assign(LossConfig(), batch, anchors)
    positive = assignment >= 0
    faces = batch["boxes"].gather(1, assignment.clamp(min=0)[..., None].expand(-1, -1, 4))
    exact = encode_boxes(faces, anchors, STUDENT.variances)
    right = {
        "logits": torch.where(positive, 20.0, -20.0),
        "boxes": torch.where(positive[..., None], exact, 0.0),
        "landmarks": torch.zeros_like(out["landmarks"]),
    }
    wrong = {**right, "logits": -right["logits"], "boxes": exact + 30.0}
    results = {}
    for name, fixed in (("right", right), ("wrong", wrong)):
        distiller = distiller_for(cfg, teachers=[Teacher(Fixed(fixed), STUDENT, assigner="atss")])
        results[name] = distil(distiller, out, batch)[0]
    assert results["right"]["score"] > 0.1 and results["right"]["box"] > 0.1
    assert results["wrong"]["score"] == 0 and results["wrong"]["box"] == 0


def test_no_teacher_is_better_on_an_ignored_face():
    places = torch.zeros(1, 2, 4), torch.zeros(1, 2, 5, 2)
    unsure, right = Prediction(torch.zeros(1, 2), *places), Prediction(torch.full((1, 2), -3.0), *places)
    mask = terms.Mask(torch.zeros(2).long(), torch.arange(2), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    assignment = torch.tensor([[IGNORED, BACKGROUND]])
    better, _ = _teacher_better(unsure, as_target(right), mask, torch.zeros(1, 0, 4), assignment, False)
    assert better.tolist() == [False, True]


@pytest.mark.parametrize("kind, follows", [("quality_focal", 0.0), ("focal", 1.0)])
def test_a_score_is_better_if_nearer_to_what_the_task_asks_for(kind, follows):
    """A student's box with an IoU of 0.25 should be scored 0.25 by quality focal loss, and 1 by others."""
    batch = make_batch(1, 1)
    anchors = make_anchors(SIZE, SIZE, STUDENT.strides, STUDENT.anchors)
    assignment = assign(LossConfig(), batch, anchors)
    x1, y1, x2, y2 = batch["boxes"][0, 0].tolist()
    quarter = torch.tensor([x1, y1, (x1 + x2) / 2, (y1 + y2) / 2])
    out = {
        "logits": torch.full((1, len(anchors)), 0.3).logit().where(assignment >= 0, -20.0),
        "boxes": encode_boxes(quarter.expand(1, len(anchors), 4), anchors, STUDENT.variances),
        "landmarks": torch.zeros(1, len(anchors), 10),
    }
    surer = {**out, "logits": torch.full((1, len(anchors)), 0.6).logit().where(assignment >= 0, -20.0)}
    cfg = one_stage(terms=["score"], only_where_better=True)
    distiller = ProgressiveDistillation(
        cfg, STUDENT, [Teacher(Fixed(surer), STUDENT, assigner="atss")], LossConfig(classification=kind)
    )
    assert (distil(distiller, out, batch)[0]["score"] > 0.01) == follows


def test_scores_that_a_teacher_has_no_opinion_on_are_not_copied():
    mine = Prediction(torch.zeros(1, 4), torch.rand(1, 4, 4), torch.rand(1, 4, 5, 2))
    mask = terms.Mask(torch.zeros(2).long(), torch.tensor([0, 1]), torch.ones(2), torch.tensor([True, False]))
    values = {}
    for known in (True, False):
        said = Target(
            torch.tensor([[0.0, 4.0, 0, 0]]),
            mine.boxes,
            mine.landmarks,
            torch.ones(1, 4),
            torch.tensor([[True, known, True, True]]),
        )
        values[known] = distiller_for(one_stage(terms=["score"]))._copy(
            mine, said, mask, mask.weight, mask.weight, 1.0
        )["score"]
    assert values[True] > 0.1 and values[False] == 0


@pytest.mark.parametrize("parts", [["cascade_refinement"], ["multipath"], ["cascade_refinement", "multipath"]])
def test_stages_before_the_last_are_taught_like_the_last(parts, batch):
    """The heads behind a cascade get no gradient from what it makes of their predictions."""
    cfg = ModelConfig(**{**SMALL, "bifpn_repeats": 2}, **dict.fromkeys(parts, True))
    student, teacher = network(cfg, 1).train(), network(STUDENT, 2)
    distiller = ProgressiveDistillation(
        one_stage(terms=["score", "box"]),
        cfg,
        [Teacher(teacher, STUDENT, assigner="atss")],
        LossConfig(refine_weight=2.0),
    )
    out = student(batch["images"])
    last = {k: v for k, v in out.items() if k not in ("coarse", "paths")}
    expected = distil(distiller, last, batch)[0]["score"]
    for group in ([out["coarse"]] if "coarse" in out else [], out.get("paths", [])):
        each = [
            distil(distiller, {**o, **{k: v for k, v in last.items() if k not in o}}, batch)[0]["score"] for o in group
        ]
        expected = expected + 2.0 * torch.stack(each).mean() if each else expected
    losses = distil(distiller, out, batch)[0]
    assert losses["score"].item() == pytest.approx(expected.item(), rel=1e-4)
    losses["total"].backward()
    assert all(p.grad.norm() > 0 for p in student.heads.parameters() if p.dim() > 1)


def test_ensembles():
    def one(logit: float, corner: float) -> Target:
        box = torch.tensor([[[corner, corner, corner + 10, corner + 10]]])
        return as_target(Prediction(torch.tensor([[logit]]), box, torch.zeros(1, 1, 5, 2)))

    sure, unsure = one(4.0, 0.0), one(0.1, 4.0)
    mean = UltraDistillation([], STUDENT, LossConfig(), "mean").merge([sure, unsure])
    by_certainty = UltraDistillation([], STUDENT, LossConfig(), "confidence").merge([sure, unsure])
    expected = (torch.tensor(4.0).sigmoid() + torch.tensor(0.1).sigmoid()) / 2
    assert mean.logits.sigmoid().item() == pytest.approx(float(expected), abs=1e-5)
    assert by_certainty.logits > mean.logits
    assert 0 < by_certainty.boxes[0, 0, 0] < mean.boxes[0, 0, 0] < 2  # the surer teacher weighs more
    unsure.known[:] = False
    alone = UltraDistillation([], STUDENT, LossConfig(), "mean").merge([sure, unsure])
    torch.testing.assert_close(alone.logits, sure.logits)
    torch.testing.assert_close(alone.boxes, sure.boxes)


def test_asking_the_average_leaves_each_module_in_its_mode():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3))
    model.train()[0][0].eval()  # a frozen norm in a part that trains
    before = [m.training for m in model.modules()]
    UltraDistillation([], STUDENT, LossConfig()).run(model, torch.zeros(1, 3, 4, 4))
    assert [m.training for m in model.modules()] == before


def test_self_teachers_join_in_the_last_stage_only(batch):
    student, ema = network(STUDENT, 1), network(STUDENT, 2)
    cfg = DistillConfig(self_teacher=True, memory_images=50)
    distiller = distiller_for(cfg)
    out = student(batch["images"], features=True)
    losses, alpha = distil(distiller, out, batch, 0.1, ema_model=ema)
    assert alpha == 0 and losses["total"] == 0 and not distiller.needs_ema(0.1)
    task = out["logits"].mean()
    assert distiller.combine(task, out, batch, assigned(batch), 0.1, ema_model=ema)[0] is task
    losses, alpha = distil(distiller, out, batch, 0.9, ema_model=ema)
    assert alpha == 0.3 and losses["score"] > 0


def test_the_own_best_joins_in_the_last_stage_only(batch):
    student, best = network(STUDENT, 1), network(STUDENT, 2)
    distiller = distiller_for(DistillConfig(self_best=True, memory_images=50))
    distiller.set_own_best(best)
    assert distil(distiller, student(batch["images"], features=True), batch, 0.1)[1] == 0
    losses, alpha = distil(distiller, student(batch["images"], features=True), batch, 0.9)
    assert alpha == 0.3 and losses["score"] > 0


def test_attention_maps_weigh_features_and_are_copied(batch):
    """Of teachers that differ in their maps alone, one that attends elsewhere teaches other things."""
    student, teacher = network(STUDENT, 1), network(STUDENT, 2)
    out, theirs = student(batch["images"], features=True), teacher(batch["images"], features=True)
    turned = {**theirs, "attention": [a.flip(-1) for a in theirs["attention"]]}
    for name, used in (("feature", True), ("attention", True), ("feature", False)):
        cfg = one_stage(terms=[name], feature_attention=used)
        teachers = [Teacher(Fixed(fixed), STUDENT, assigner="atss") for fixed in (theirs, turned)]
        values = [distil(distiller_for(cfg, teachers=[t]), out, batch)[0][name] for t in teachers]
        assert (abs(values[0] - values[1]) > 1e-4) == used


@pytest.mark.parametrize(
    "key, terms, others, useful",
    [
        ("self_teacher", ["dense"], {"teachers": ["v1"]}, False),
        ("self_teacher", ["temporal"], {"teachers": ["v1"]}, False),
        ("self_teacher", ["temporal"], {"teachers": ["v1"], "temporal_source": "ema"}, False),
        ("self_teacher", ["temporal"], {}, True),  # the memory needs no teacher, but it must be switched on
        ("self_teacher", ["score"], {}, True),
        ("self_best", ["temporal"], {}, True),
        ("self_best", ["temporal"], {"teachers": ["v1"]}, False),
        ("self_best", ["box"], {}, True),
    ],
)
def test_self_teachers_without_effect_are_refused(key, terms, others, useful):
    cfg = one_stage(terms=terms, **{key: True}, **others)
    assert (key in cfg.check()) != useful
    cfg.stages = [DistillStage(0.5, {"score": 1.0}), DistillStage(1.0, {})]  # they teach in the last stage only
    assert key in cfg.check()


def test_features_and_teachers_are_asked_for_only_when_used(batch):
    student, teacher = network(STUDENT, 1), Counting(network(STUDENT, 2))
    cfg = DistillConfig(
        stages=[DistillStage(0.5, {"feature": 1.0}), DistillStage(0.8, {"score": 1.0}), DistillStage(1.0, {})]
    )
    distiller = distiller_for(cfg, teachers=[Teacher(teacher, STUDENT, assigner="atss")])
    assert [distiller.needs_features(p) for p in (0.0, 0.6, 0.9)] == [True, False, False]
    for progress in (0.0, 0.6, 0.9):
        distil(distiller, student(batch["images"], features=progress == 0.0), batch, progress)
    assert teacher.calls == ["neck", False]


def test_teachers_stay_out_of_parameters_state_and_train_mode():
    teacher = network(WIDE, 2)
    distiller = distiller_for(one_stage(terms=["feature", "score"]), teachers=[Teacher(teacher, WIDE)])
    distiller.train()
    assert not any(m.training for m in teacher.modules())
    assert sum(p.numel() for p in distiller.parameters()) == 3 * (8 * 12 + 12)
    assert all(k.startswith("adapters.") for k in distiller.state_dict() if k != "_extra_state")
    distiller.double()  # stands for .to(device)
    assert next(teacher.parameters()).dtype == torch.float64


@pytest.mark.parametrize("strength", [0.01, 1.0, 1000.0])
def test_balance_keeps_the_distillation_gradient_within_the_task_gradient(strength, batch):
    student = network(STUDENT, 1)
    out = student(batch["images"], features=True)
    task = out["logits"].square().mean()
    distilled = strength * sum(x.sum() for x in out["neck"])
    factor = balance_factor(task, distilled, out["neck"])
    assert not factor.requires_grad and 0 < factor <= 1
    of_task, of_distilled = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, out["neck"], retain_graph=True)]).norm()
        for loss in (task, factor * distilled)
    )
    assert of_distilled <= of_task * 1.0001
    assert factor == 1 or of_distilled == pytest.approx(float(of_task), rel=1e-3)
    assert strength < 1000 or factor < 0.1


def test_balance_through_combine(batch):
    student = network(STUDENT, 1)
    cfg = one_stage(terms=["score", "feature"], gradient_balance=True)
    cfg.stages[0].terms["feature"] = 1e4
    distiller = distiller_for(cfg, teachers=[Teacher(network(WIDE, 2), WIDE)])
    out = student(batch["images"], features=True)
    assignment = assigned(batch)
    task = MultiBoxLoss(LossConfig())(out, batch, distiller.teachers.anchors(SIZE, SIZE), assignment)["total"]
    total, log = distiller.combine(task, out, batch, assignment, 0.0)
    assert log["balance"] < 1
    whole = torch.autograd.grad(total, out["neck"], retain_graph=True)
    of_task = torch.autograd.grad(0.3 * task, out["neck"], retain_graph=True)
    rest = torch.cat([(w - t).flatten() for w, t in zip(whole, of_task)]).norm()
    assert rest <= torch.cat([t.flatten() for t in of_task]).norm() * 1.001
    assert total.item() == pytest.approx(float(0.3 * log["task"] + 0.7 * log["balance"] * log["distill"]), rel=1e-4)


def test_balance_says_when_the_neck_is_not_the_one_used(batch):
    with pytest.raises(RuntimeError, match="does not depend on the neck"):
        x = torch.ones(3, requires_grad=True)
        balance_factor(x.sum(), x.sum(), [torch.ones(2, requires_grad=True)])


def test_state_round_trip(batch, tmp_path):
    """Adapters, memory and own-best weights come back, so that the next loss is the same."""
    student = network(STUDENT, 1)
    teachers = [Teacher(network(WIDE, 2), WIDE)]
    cfg = one_stage(terms=TERMS, self_best=True)
    first = distiller_for(cfg, teachers=teachers)
    with torch.no_grad():
        for p in first.parameters():
            p.add_(torch.randn_like(p))
    first.set_own_best(network(STUDENT, 5))
    distil(first, student(batch["images"], features=True), batch)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second = distiller_for(cfg, teachers=teachers)
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    other = make_batch()
    results = [distil(d, student(other["images"], features=True), other)[0] for d in (first, second)]
    assert results[0].keys() == results[1].keys() == {"total", *TERMS}
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_a_step_follows_the_teacher(batch):
    """A few steps on the whole sum bring the student's scores nearer to the teacher's."""
    student, teacher = network(STUDENT, 1), network(STUDENT, 2)
    distiller = distiller_for(
        one_stage(terms=["score", "box", "feature"]), teachers=[Teacher(teacher, STUDENT, assigner="atss")]
    )
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 3e-3)
    seen = []
    for _ in range(15):
        losses, _ = distil(distiller, student(batch["images"], features=True), batch)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        seen.append(losses["total"].item())
    assert seen[-1] < 0.7 * seen[0]


@pytest.fixture
def exported(tmp_path) -> tuple[nn.Module, Path]:
    """A network and its raw export."""
    return exported_to(tmp_path / "teacher.onnx")


def exported_to(path: Path, features: bool = False) -> tuple[nn.Module, Path]:
    pytest.importorskip("onnxruntime")
    model = network(WIDE, 3)
    proto = export_raw(model, features=features)
    describe(proto, WIDE, "wide", form="raw", precision="fp32")
    write(path, proto.SerializeToString())
    return model, path


def test_an_exported_network_teaches_what_the_network_itself_would(exported, batch):
    model, path = exported
    (teacher,) = load_teachers([path])
    assert (teacher.name, teacher.config, teacher.assigner, teacher.has_features) == ("wide", WIDE, "", False)
    cfg = one_stage(terms=["score", "box"], matching="anchor")
    out = network(STUDENT, 1)(batch["images"])
    theirs, _ = distil(distiller_for(cfg, teachers=[teacher]), out, batch, 0.5)
    own, _ = distil(distiller_for(cfg, teachers=[Teacher(model, WIDE)]), out, batch, 0.5)
    assert own["score"] > 1e-3 and own["box"] > 1e-3
    assert all(torch.isclose(theirs[k], own[k], rtol=1e-3) for k in own)


def test_features_come_from_the_teachers_that_have_them(exported, batch):
    teachers = [*load_teachers([exported[1]]), Teacher(network(WIDE, 2), WIDE)]
    cfg = one_stage(terms=["feature", "attention"])
    out = network(STUDENT, 1)(batch["images"], features=True)
    both, alone = (distiller_for(cfg, teachers=t) for t in (teachers, teachers[1:]))
    assert len(both.adapters) == len(alone.adapters) == 1
    both.load_state_dict(alone.state_dict())
    assert distil(both, out, batch, 0.5)[0]["total"] == distil(alone, out, batch, 0.5)[0]["total"] > 0
    with pytest.raises(ConfigError, match=r"feature.*onnx"):
        distiller_for(cfg, teachers=teachers[:1])


def test_an_export_with_features_teaches_them_as_the_network_itself_would(tmp_path, batch):
    model, path = exported_to(tmp_path / "teacher.onnx", features=True)
    (teacher,) = load_teachers([path])
    assert teacher.has_features
    cfg = one_stage(terms=["feature", "attention", "dense"], feature_attention=False)  # an export has no attention maps
    out = network(STUDENT, 1)(batch["images"], features=True)
    theirs, own = (distiller_for(cfg, teachers=[t]) for t in (teacher, Teacher(model, WIDE)))
    theirs.load_state_dict(own.state_dict())
    losses = [distil(d, out, batch, 0.5)[0] for d in (theirs, own)]
    for name in ("feature", "dense"):
        assert losses[1][name] > 1e-3 and torch.isclose(losses[0][name], losses[1][name], rtol=1e-3)
    neck = terms.attention_term(out["neck"], model.neck_features(batch["images"])["neck"])
    assert losses[0]["attention"] == pytest.approx(neck.item(), rel=1e-4)


def test_an_export_asked_for_features_alone_computes_its_neck_alone(tmp_path, batch, monkeypatch):
    model, path = exported_to(tmp_path / "teacher.onnx", features=True)
    given = []
    session = pytest.importorskip("onnxruntime").InferenceSession
    monkeypatch.setattr(
        "onnxruntime.InferenceSession", lambda source, *a, **k: given.append(source) or session(source, *a, **k)
    )
    (teacher,) = load_teachers([path])
    whole, neck = (onnx_nodes(source) for source in given)
    assert len(neck) < 0.8 * len(whole)
    monkeypatch.setattr(teacher.model.network, "session", None)  # the whole is not run
    found, expected = (m.neck_features(batch["images"])["neck"] for m in (teacher.model, model))
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def onnx_nodes(source) -> list:
    onnx = pytest.importorskip("onnx")
    return list((onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)).graph.node)


def test_mimics_begin_as_the_students_own_heads_where_the_anchors_are_the_same(batch):
    student = network(EXTRA, 1)
    sizes = [[16, 24], [64, 128], [512]]
    teacher = ModelConfig(**SMALL, anchors=sizes)
    distiller = distiller_for(one_stage(terms=["dense"]), EXTRA, [Teacher(network(teacher, 2), teacher)])
    before = copy.deepcopy(distiller.mimics[0].state_dict())
    distiller.start_mimics(student.heads)
    with torch.no_grad():
        out = student(batch["images"], features=True)
        heard = distiller.mimics[0](*[out["context"]] * 3)
    cells = [64, 16, 4]
    for kind in ("logits", "boxes", "landmarks"):
        ours = out[kind].split([n * len(a) for n, a in zip(cells, EXTRA.anchors)], 1)
        theirs = heard[kind].split([n * len(a) for n, a in zip(cells, sizes)], 1)
        torch.testing.assert_close(theirs[0][:, 0::2], ours[0][:, 1::3])
        torch.testing.assert_close(theirs[1], ours[1])
        torch.testing.assert_close(theirs[2], ours[2][:, 1::2])
    after = distiller.mimics[0].state_dict()
    assert torch.equal(after["classes.0.weight"][1], before["classes.0.weight"][1])  # 24 px: the student has none


@pytest.mark.parametrize(
    "student, teacher, per_size",
    [
        (EXTRA, ModelConfig(**SMALL, variances=[0.2, 0.4]), True),
        (ModelConfig(**SMALL, multipath=True), STUDENT, True),
        (ModelConfig(**SMALL, class_outputs=2), STUDENT, True),
        (EXTRA, STUDENT, False),
    ],
)
def test_mimics_begin_anew_where_the_students_heads_mean_another_thing(student, teacher, per_size):
    distiller = distiller_for(
        one_stage(terms=["dense"]), student, [Teacher(network(teacher, 2), teacher, per_size=per_size)]
    )
    before = copy.deepcopy(distiller.mimics[0].state_dict())
    distiller.start_mimics(network(student, 1).heads)
    assert all(torch.equal(before[k], v) for k, v in distiller.mimics[0].state_dict().items())


def test_mimics_of_another_kind_are_not_taken():
    teachers = [Teacher(network(c, 2), c) for c in (STUDENT, EXTRA)]
    one, other = (distiller_for(one_stage(terms=["dense"]), STUDENT, [t]) for t in teachers)
    with pytest.raises(ValueError, match="mimic 1 does not fit: size mismatch"):
        one.take_mimics(other.state_dict())


def test_mimics_of_another_teacher_are_not_taken():
    first, second = (
        Teacher(network(c, 2), c, name)
        for c, name in ((STUDENT, "a"), (dataclasses.replace(STUDENT, cbam_reduction=2), "b"))
    )
    one, both, other = (
        distiller_for(one_stage(terms=["dense"]), STUDENT, t) for t in ([first], [first, second], [second])
    )
    one.take_mimics(both.state_dict())
    with pytest.raises(ValueError, match="mimic 1 is another teacher's than 'a'"):
        one.take_mimics(other.state_dict())


@pytest.mark.parametrize("name", ["scrfd_2.5g", "yunet_n"])
def test_another_detector_teaches_what_it_detects(name, shared):
    pytest.importorskip("onnxruntime")
    image = sample_picture(None, 640, 640)
    (teacher,) = load_teachers([shared / "peers" / PEERS[name].file])
    images = normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
    found = decode(teacher.model(images), teacher.anchors(640, 640), teacher.config.variances)
    best = found.logits[0].argmax()
    faces = load_peer(name, shared / "peers")(image, score=0.3)
    assert len(faces.scores) and found.logits[0, best].sigmoid() == pytest.approx(float(faces.scores[0]), abs=1e-4)
    assert torch.allclose(found.boxes[0, best], torch.from_numpy(faces.boxes[0]), atol=0.1)
    assert torch.allclose(found.landmarks[0, best], torch.from_numpy(faces.landmarks[0]), atol=0.1)


def test_scrfd_in_pytorch_is_what_onnxruntime_computes(shared):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx2torch")
    peer = load_peer("scrfd_2.5g", shared / "peers")
    network = scrfd_module(peer.path)
    for height, width in ((96, 160), (64, 64)):
        pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
        images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        theirs = peer.split(peer.network(peer.prepare(pixels)), 2)
        for a, b in zip(scrfd_raw(network, images), theirs, strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)
    assert not any("Shape" in str(node.target) for node in network.graph.nodes)  # sizes are looked up on the GPU


def test_scrfd_on_a_gpu_without_its_converter_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(CheckpointError, match=r"x\.onnx: as a teacher on a GPU it needs `pip install") as e:
        scrfd_module(tmp_path / "x.onnx")
    assert "\n" not in str(e.value)


def test_a_missing_converter_is_noticed_when_teachers_are_loaded(monkeypatch, shared):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    file = shared / "peers" / PEERS["scrfd_2.5g"].file
    with pytest.raises(CheckpointError, match=rf"{file.name}: as a teacher on a GPU it needs `pip install") as e:
        load_teachers([file], "cuda")
    assert "\n" not in str(e.value)


def test_unusable_onnx_teachers_are_one_line(tmp_path):
    pytest.importorskip("onnxruntime")
    for name in ("other.onnx", PEERS["yunet_n"].file):
        (tmp_path / name).write_bytes(b"no network")
        with pytest.raises(CheckpointError, match=name) as e:
            load_teachers([tmp_path / name])
        assert "\n" not in str(e.value)


class Fixed(nn.Module):
    """A teacher with given outputs."""

    def __init__(self, out: dict) -> None:
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out

    neck_features = forward


class Counting(nn.Module):
    """Notes what was asked for at each call: predictions with (True) or without features, or the neck's alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, x, features=False):
        self.calls.append(features)
        return self.model(x, features=features)

    def neck_features(self, x):
        self.calls.append("neck")
        return self.model.neck_features(x)


def grad_norm(model: nn.Module) -> float:
    return float(sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None))
