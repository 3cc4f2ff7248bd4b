"""Losses against by-hand formulas, their gradients, and awkward input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, sigmoid_focal_loss

from layers import losses
from layers.anchors import decode_boxes, decode_landmarks, encode_boxes, encode_landmarks, make_anchors
from layers.losses import BOX_LOSSES, MultiBoxLoss
from layers.losses_advanced import (
    AdaptiveLossWeighting,
    eiou_loss,
    normalised_weights,
    quality_focal_loss,
    scale_weights,
    wing_loss,
)
from layers.matching import BACKGROUND, IGNORED, assign
from utils.config import LossConfig

VARIANCES = (0.1, 0.2)
SIDE = 128
ANCHORS = make_anchors(SIDE, SIDE, [8, 16, 32], [[16, 32], [64, 128], [256, 512]])
N = len(ANCHORS)
V1 = {"assigner": "iou", "classification": "ohem_ce", "box": "smooth_l1", "landmark_weight": 1.0}


def make_batch(batch=2, faces=3):
    centre = torch.rand(batch, faces, 2) * SIDE
    size = 10 + torch.rand(batch, faces, 1) * torch.tensor([40.0, 55.0])
    yes = torch.ones(batch, faces, dtype=torch.bool)
    return {
        "boxes": torch.cat([centre - size / 2, centre + size / 2], -1),
        "landmarks": centre[:, :, None] + (torch.rand(batch, faces, 5, 2) - 0.5) * size[:, :, None],
        "has_landmarks": yes.clone(),
        "valid": yes.clone(),
        "ignore": ~yes,
    }


def make_out(batch=2, spread=0.5, dtype=torch.float32):
    shapes = {"logits": (batch, N), "boxes": (batch, N, 4), "landmarks": (batch, N, 10)}
    return {key: (torch.randn(s) * spread).to(dtype).requires_grad_() for key, s in shapes.items()}


def run(out, batch, **cfg):
    return loss_of(MultiBoxLoss(LossConfig(**cfg), VARIANCES), out, batch)


def loss_of(criterion, out, batch, anchors=ANCHORS):
    return criterion(out, batch, anchors, criterion.assign(out, batch, anchors))


def gradients(out, loss):
    return dict(zip(("logits", "boxes", "landmarks"), torch.autograd.grad(loss, [out[k] for k in out])))


def test_v1_loss_equals_a_loop_over_images_and_anchors():
    batch, out = make_batch(), make_out()
    batch["has_landmarks"][0, 0] = False
    matched = assign(LossConfig(**V1), batch, ANCHORS)
    classes = boxes = points = 0.0
    positives = with_points = 0
    for b in range(2):
        background = []
        own = int((matched[b] >= 0).sum())
        for n in range(N):
            face = int(matched[b, n])
            # The published head has two outputs and softmax cross-entropy; our logit is their difference.
            pair = torch.stack([torch.zeros(()), out["logits"][b, n]])
            if face < 0:
                background.append(float(-pair.detach().log_softmax(0)[0]))
                continue
            classes -= float(pair.detach().log_softmax(0)[1])
            target = encode_boxes(batch["boxes"][b, face], ANCHORS[n], VARIANCES)
            boxes += float(F.smooth_l1_loss(out["boxes"][b, n].detach(), target, reduction="sum"))
            positives += 1
            if batch["has_landmarks"][b, face]:
                target = encode_landmarks(batch["landmarks"][b, face], ANCHORS[n], VARIANCES)
                points += float(F.smooth_l1_loss(out["landmarks"][b, n].detach(), target, reduction="sum"))
                with_points += 1
        classes += sum(sorted(background, reverse=True)[: 7 * own])
    result = run(out, batch, **V1)
    assert int(result["positives"]) == positives > with_points > 0
    assert float(result["class"]) == pytest.approx(classes / positives, rel=1e-4)
    assert float(result["box"]) == pytest.approx(boxes / positives, rel=1e-4)
    assert float(result["landmark"]) == pytest.approx(points / with_points, rel=1e-4)
    total = result["class"] + 2 * result["box"] + result["landmark"]
    assert result["total"].item() == pytest.approx(float(total), rel=1e-5)


def test_quality_focal_classification_equals_a_loop():
    batch, out = make_batch(), make_out()
    matched = assign(LossConfig(), batch, ANCHORS)
    decoded = decode_boxes(out["boxes"].detach(), ANCHORS, VARIANCES)
    expected = 0.0
    for b, n in itertools.product(range(2), range(N)):
        face, score = int(matched[b, n]), out["logits"][b, n].sigmoid().item()
        y = float(box_iou(decoded[b, n][None], batch["boxes"][b, face][None])) if face >= 0 else 0.0
        expected += abs(score - y) ** 2 * -(y * math.log(score) + (1 - y) * math.log(1 - score))
    result = run(out, batch)
    assert float(result["class"]) == pytest.approx(expected / int((matched >= 0).sum()), rel=1e-3)


def test_focal_classification_is_torchvisions_over_unignored_anchors():
    batch, out = make_batch(), make_out()
    batch["valid"][0, 0], batch["ignore"][0, 0] = False, True
    matched = assign(LossConfig(), batch, ANCHORS)
    used = matched != IGNORED
    assert not used.all()
    each = sigmoid_focal_loss(out["logits"].detach(), (matched >= 0).float(), alpha=0.25, gamma=2.0)
    result = run(out, batch, classification="focal")
    assert float(result["class"]) == pytest.approx(float(each[used].sum() / (matched >= 0).sum()), rel=1e-4)


def test_hard_negatives_are_seven_per_positive_and_seven_in_an_image_without_faces():
    batch, out = make_batch(), make_out()
    batch["valid"][1] = False
    grad = gradients(out, run(out, batch, **V1)["total"])["logits"]
    positives = int((assign(LossConfig(**V1), batch, ANCHORS)[0] >= 0).sum())
    assert int((grad[0] != 0).sum()) == 8 * positives
    assert int((grad[1] != 0).sum()) == 7
    assert (grad[1] >= 0).all()
    worst = out["logits"][1].detach().topk(7).indices
    assert (grad[1, worst] > 0).all()


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_box_losses_by_hand(name):
    a, b = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[2.0, 1.0, 8.0, 4.0]])
    iou, diagonal, centres = 6 / 28, 64 + 16, 9 + 0.25
    aspect = 4 / math.pi**2 * (math.atan(6 / 3) - math.atan(4 / 4)) ** 2
    expected = {
        "iou": 1 - iou,
        "giou": 1 - iou + (32 - 28) / 32,
        "diou": 1 - iou + centres / diagonal,
        "ciou": 1 - iou + centres / diagonal + aspect**2 / (1 - iou + aspect),
        "eiou": 1 - iou + centres / diagonal + (6 - 4) ** 2 / 64 + (3 - 4) ** 2 / 16,
    }[name]
    assert float(BOX_LOSSES[name](a, b)) == pytest.approx(expected, rel=1e-5)
    assert float(BOX_LOSSES[name](a + 30, b + 30)) == pytest.approx(expected, rel=1e-5)  # wherever they are
    assert float(BOX_LOSSES[name](b, b)) == pytest.approx(0, abs=1e-6)


def test_eiou_pulls_apart_boxes_together():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]], requires_grad=True)
    loss = eiou_loss(box, torch.tensor([[50.0, 0.0, 60.0, 10.0]]))
    (grad,) = torch.autograd.grad(loss.sum(), box)
    assert grad[0, 0] + grad[0, 2] < 0, "a gradient step must move the box right although the IoU is 0"


def test_wing_is_continuous_steep_near_zero_and_linear_far_away():
    x = torch.tensor([0.0, 1e-3, 1 - 1e-5, 1 + 1e-5, 3.0, -3.0], requires_grad=True)
    y = wing_loss(x)
    zero, _, before, after, far, opposite = y.tolist()
    assert zero == 0
    assert before == pytest.approx(after, abs=1e-4)
    assert before == pytest.approx(math.log(1 + 1 / 0.2), abs=1e-4)
    assert far == opposite == pytest.approx(after + 2, abs=1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad[1] > 4.9
    assert grad[4:].tolist() == [1.0, -1.0]


def test_quality_focal_is_zero_and_flat_at_its_target():
    target = torch.tensor([0.3, 0.9])
    logits = torch.logit(target).requires_grad_()
    loss = quality_focal_loss(logits, target)
    assert loss.detach().abs().max() < 1e-6
    assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-5
    assert quality_focal_loss(logits + 1, target).sum() > 0.03


@pytest.mark.parametrize("box", ["smooth_l1", *BOX_LOSSES])
@pytest.mark.parametrize("landmark", ["smooth_l1", "wing"])
def test_gradient_reaches_what_it_should_and_nothing_else(box, landmark):
    batch, out = make_batch(), make_out()
    batch["has_landmarks"][1] = False
    batch["valid"][0, 0], batch["ignore"][0, 0] = False, True
    cfg = {"box": box, "landmark": landmark}
    matched = assign(LossConfig(), batch, ANCHORS)
    grad = gradients(out, run(out, batch, **cfg)["total"])
    positive = matched >= 0
    assert (grad["logits"] != 0)[matched != IGNORED].float().mean() > 0.99
    assert (grad["logits"][matched == IGNORED] == 0).all()
    assert (grad["boxes"][positive] != 0).any(-1).all()
    assert (grad["boxes"][~positive] == 0).all()
    assert (grad["landmarks"][0][positive[0]] != 0).all()
    assert (grad["landmarks"][0][~positive[0]] == 0).all()
    assert (grad["landmarks"][1] == 0).all(), "faces without landmarks train boxes only"


def test_a_box_far_smaller_than_its_anchor_learns_its_size():
    batch, out = make_batch(), make_out()
    tenth = torch.zeros(2, N, 4)
    tenth[..., 2:] = math.log(0.1) / VARIANCES[1]
    out["boxes"] = tenth.requires_grad_()
    gradient = torch.autograd.grad(run(out, batch)["total"], out["boxes"])[0]
    positive = assign(LossConfig(), batch, ANCHORS) >= 0
    assert (gradient[positive][:, 2:] != 0).all()


def test_class_gradient_does_not_reach_boxes_through_the_quality_target():
    batch, out = make_batch(), make_out()
    assert (gradients(out, run(out, batch, box_weight=0.0, landmark_weight=0.0)["total"])["boxes"] == 0).all()


def awkward_batch():
    """No faces; one face without landmarks; zero-area, inverted, outside and non-finite boxes; only ignored ones."""
    batch = make_batch(4, 4)
    batch["valid"][0] = False
    batch["has_landmarks"][1] = False
    batch["landmarks"][1] = math.nan
    batch["boxes"][2, 0] = torch.tensor([50.0, 50.0, 50.0, 50.0])
    batch["boxes"][2, 1] = torch.tensor([60.0, 60.0, 40.0, 40.0])
    batch["boxes"][2, 2] = torch.tensor([900.0, -50.0, 950.0, -10.0])
    batch["boxes"][2, 3, 0] = math.nan
    batch["valid"][3, 1:], batch["ignore"][3, 1:] = False, True
    return batch


COMBINATIONS = list(
    itertools.product(
        ["iou", "atss", "simota"], ["ohem_ce", "focal", "quality_focal"], ["smooth_l1", *BOX_LOSSES], [False, True]
    )
)


@pytest.mark.parametrize("kind", ["awkward", "no_columns", "all_padding"])
@pytest.mark.parametrize("spread", [0.5, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_combination_is_finite_with_finite_gradients(kind, spread, dtype):
    batch = awkward_batch()
    if kind == "no_columns":
        batch = {key: value[:, :0] for key, value in batch.items()}
    elif kind == "all_padding":
        batch = {key: torch.zeros_like(value) for key, value in batch.items()}
    out = make_out(4, spread, dtype)
    for assigner, classification, box, extra in COMBINATIONS:
        cfg = {
            "assigner": assigner,
            "classification": classification,
            "box": box,
            "landmark": "wing" if extra else "smooth_l1",
            "adaptive_weighting": extra,
            "scale_weighting": extra,
        }
        result = run(out, batch, **cfg)
        assert all(v.isfinite() for v in result.values()), (cfg, result)
        for key, grad in gradients(out, result["total"]).items():
            assert grad.isfinite().all(), (cfg, key)
        assert (result["positives"] > 0) == (kind == "awkward")


@pytest.mark.parametrize("assigner", ["iou", "atss", "simota"])
def test_a_crowd_of_thousands_is_finite(assigner):
    batch = make_batch(1, 3000)
    out = make_out(1)
    result = run(out, batch, assigner=assigner, adaptive_weighting=True, scale_weighting=True)
    assert result["total"].isfinite()
    assert result["positives"] > N / 4


def test_fitting_free_outputs_reaches_the_targets():
    batch = make_batch(2, 3)
    out = {k: torch.zeros_like(v).requires_grad_() for k, v in make_out().items()}
    criterion = MultiBoxLoss(LossConfig(landmark_weight=1.0), VARIANCES)
    optimiser = torch.optim.SGD(list(out.values()), lr=10.0, momentum=0.9)
    first = None
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 10.0 * (1 - step / 200)
        loss = loss_of(criterion, out, batch)["total"]
        first = first or float(loss.detach())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1 * first
    matched = assign(LossConfig(), batch, ANCHORS)
    image, anchor = (matched >= 0).nonzero(as_tuple=True)
    face = matched[image, anchor]
    with torch.no_grad():
        boxes = decode_boxes(out["boxes"][image, anchor], ANCHORS[anchor], VARIANCES)
        points = decode_landmarks(out["landmarks"][image, anchor], ANCHORS[anchor], VARIANCES)
        scores = out["logits"].sigmoid()
    iou = torch.stack([box_iou(a[None], b[None])[0, 0] for a, b in zip(boxes, batch["boxes"][image, face])])
    assert iou.min() > 0.85
    assert (points - batch["landmarks"][image, face]).abs().max() < 1.5
    assert scores[matched >= 0].min() > 0.5 > scores[matched < 0].max()


def test_coarse_and_paths_are_supervised_at_refine_weight():
    batch, out = make_batch(), make_out()
    coarse, paths = make_out(), [make_out(), make_out()]
    plain, extra = run(out, batch), {**out, "coarse": coarse, "paths": paths}
    full = run(extra, batch, refine_weight=0.5)
    expected_coarse = run(coarse, batch)["total"]
    expected_paths = (run(paths[0], batch)["total"] + run(paths[1], batch)["total"]) / 2
    assert float(full["coarse"]) == pytest.approx(expected_coarse.item(), rel=1e-5)
    assert float(full["paths"]) == pytest.approx(expected_paths.item(), rel=1e-5)
    expected = plain["total"] + 0.5 * (expected_coarse + expected_paths)
    assert full["total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(full["box"]) == pytest.approx(float(plain["box"]))
    off = run(extra, batch, refine_weight=0.0)
    assert off["total"].item() == pytest.approx(plain["total"].item())
    assert "coarse" not in off


def test_autocast_does_not_touch_the_loss():
    batch, out = make_batch(), make_out()
    plain = run(out, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(out, batch)
    assert mixed["total"].dtype == torch.float32
    assert torch.equal(plain["total"], mixed["total"])


def test_only_the_total_carries_a_gradient():
    result = run(make_out(), make_batch())
    assert set(result) == {"total", "class", "box", "landmark", "positives"}
    assert [key for key, value in result.items() if value.requires_grad] == ["total"]


def test_image_balance_of_one_is_the_mean_over_images_and_of_zero_over_faces():
    batch, out = make_batch(faces=6), make_out()
    batch["valid"][0, 1:] = False  # a portrait beside a crowd
    for classification in ("quality_focal", "ohem_ce"):
        alone = [
            run({k: v[i : i + 1] for k, v in out.items()}, {k: v[i : i + 1] for k, v in batch.items()},
                classification=classification)
            for i in range(2)
        ]  # fmt: skip
        positives = torch.stack([part["positives"] for part in alone])
        assert positives[1] > 2 * positives[0]
        for exponent, weights in ((0.0, positives / positives.sum()), (1.0, torch.full((2,), 0.5))):
            got = run(out, batch, classification=classification, image_balance=exponent)
            for key in ("class", "box", "landmark", "total"):
                expected = (weights * torch.stack([part[key] for part in alone])).sum()
                assert got[key].item() == pytest.approx(expected.item(), rel=1e-4), (classification, exponent, key)


def test_image_without_faces_counts_as_a_portrait():
    matched = torch.full((3, 400), -1)
    matched[1, :9], matched[2, :360] = 0, 0
    share = losses._image_shares(matched, 0.5)
    assert share[0] == share[1]
    assert (share[1] / share[2]).item() == pytest.approx((360 / 9) ** 0.5)
    assert (9 * share[1] + 360 * share[2]).item() == pytest.approx(369, rel=1e-5)
    assert 0 < losses._image_shares(matched[:1], 1.0).item() <= 1  # nor may a batch without any face explode


def test_image_balance_keeps_the_scale_of_landmarks_that_few_images_have():
    batch, out = make_batch(faces=6), make_out()
    batch["valid"][0, 1:] = False  # a portrait, the only one with landmarks, beside a crowd
    batch["has_landmarks"][1] = False
    plain, balanced = (run(out, batch, image_balance=exponent)["landmark"] for exponent in (0.0, 1.0))
    assert balanced.item() == pytest.approx(plain.item(), rel=1e-5)


def test_image_balance_keeps_the_scale_of_one_small_face_with_landmarks_in_a_crowd():
    batch, out = make_batch(4, 40), make_out(4)
    batch["valid"][:3, 1:] = False  # three portraits and a crowd, where the face of the fewest anchors has landmarks
    matched = assign(LossConfig(), batch, ANCHORS)
    served = torch.stack([(matched[3] == m).sum() for m in range(40)])
    batch["has_landmarks"][:] = False
    batch["has_landmarks"][3, served.argmin()] = True
    plain, balanced = (run(out, batch, image_balance=exponent)["landmark"] for exponent in (0.0, 1.0))
    assert plain > 0 and balanced.item() == pytest.approx(plain.item(), rel=1e-5)


def test_image_balance_is_of_all_processes(monkeypatch):
    batch, out = make_batch(faces=6), make_out()
    batch["valid"][0, 1:] = False
    whole = run(out, batch, image_balance=0.5)["total"]
    monkeypatch.setattr(losses.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(losses.dist, "get_world_size", lambda: 2)
    # each process holds one image; what all_reduce would add is what the other one has, noted in a first pass
    notes: list[list[torch.Tensor]] = [[], []]
    totals = [torch.zeros(()), torch.zeros(())]
    for _ in range(4):  # sums that depend on earlier ones settle one by one
        for rank in range(2):
            seen: list[torch.Tensor] = []

            def all_reduce(value, rank=rank, seen=seen):
                place = len(seen)
                seen.append(value.clone())
                other = notes[1 - rank]
                value += other[place] if place < len(other) else value

            monkeypatch.setattr(losses.dist, "all_reduce", all_reduce)
            part = {k: v[rank : rank + 1] for k, v in out.items()}
            totals[rank] = run(part, {k: v[rank : rank + 1] for k, v in batch.items()}, image_balance=0.5)["total"]
            notes[rank] = seen
    assert (totals[0] + totals[1]).item() / 2 == pytest.approx(whole.item(), rel=1e-4)


def test_normaliser_is_the_mean_over_the_processes(monkeypatch):
    batch, out = make_batch(), make_out()
    alone = run(out, batch)

    def other_process_has_none(count):
        return None  # the sum over two processes is this one's count

    monkeypatch.setattr(losses.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(losses.dist, "all_reduce", other_process_has_none)
    monkeypatch.setattr(losses.dist, "get_world_size", lambda: 2)
    shared = run(out, batch)
    for key in ("class", "box", "landmark"):
        assert float(shared[key]) == pytest.approx(2 * float(alone[key]), rel=1e-5)


def test_weights_have_mean_one_and_bounded_ratio():
    raw = torch.cat([torch.tensor([0.0, 1e9]), torch.rand(50)])
    weights = normalised_weights(raw)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    assert float(weights.max() / weights.min()) <= 4.0001
    assert normalised_weights(torch.zeros(0)).numel() == 0
    assert normalised_weights(torch.zeros(3)).isfinite().all()


def test_small_faces_weigh_more():
    side = torch.tensor([8.0, 16.0, 32.0, 64.0])
    weights = scale_weights(torch.stack([side * 0, side * 0, side, side], 1))
    assert (weights.diff() < 0).all()
    assert float(weights[0] / weights[2]) == pytest.approx(2, rel=1e-4)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    assert scale_weights(torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 500.0, 500.0]])).isfinite().all()


def test_adaptive_weights_follow_difficulty_and_leave_easy_background_alone():
    adaptive = AdaptiveLossWeighting()
    easy_hard = adaptive.positives(torch.tensor([0.95, 0.5, 0.01]), torch.tensor([0.95, 0.6, 0.1]))
    assert easy_hard[0] < easy_hard[1] < easy_hard[2]
    assert float(easy_hard.mean()) == pytest.approx(1, abs=1e-5)
    scores = torch.tensor([[0.0, 0.001, 0.05, 0.2, 0.9]])
    weights = adaptive.negatives(scores)
    assert (weights[0, :3] == 1).all()
    assert weights[0, 3] < 1 < weights[0, 4]
    assert float(weights[0, 3:].mean()) == pytest.approx(1, abs=1e-5)


def test_adaptive_weights_of_background_heed_background_alone():
    batch, out = make_batch(), make_out()
    background = assign(LossConfig(), batch, ANCHORS) == BACKGROUND

    def gradient(logit_of_faces):
        logits = torch.where(background, out["logits"].detach(), logit_of_faces).requires_grad_()
        total = run({**out, "logits": logits}, batch, adaptive_weighting=True)["total"]
        return torch.autograd.grad(total, logits)[0][background]

    torch.testing.assert_close(gradient(-9.0), gradient(4.0))


def test_adaptive_weights_reach_hard_background():
    """Of two false alarms the surer one gets more of the gradient, the other one less."""
    batch, out = make_batch(), make_out(spread=0.01)
    background = (assign(LossConfig(), batch, ANCHORS)[0] == -1).nonzero()[:, 0]
    logits = out["logits"].detach().fill_(-8.0)
    logits[0, background[:2]] = torch.tensor([-1.0, 3.0])
    out["logits"] = logits.requires_grad_()
    before, after = (
        torch.autograd.grad(run(out, batch, adaptive_weighting=on)["total"], out["logits"])[0][0, background[:3]]
        for on in (False, True)
    )
    ratio = after / before
    assert ratio[0] < 0.9 < 1.1 < ratio[1] and ratio[2] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "options", [["adaptive_weighting"], ["scale_weighting"], ["adaptive_weighting", "scale_weighting"]]
)
@pytest.mark.parametrize("classification", ["ohem_ce", "focal", "quality_focal"])
def test_weighting_shifts_gradient_between_anchors_but_keeps_its_scale(options, classification):
    batch, out = make_batch(), make_out()
    plain = run(out, batch, classification=classification)
    weighted = run(out, batch, classification=classification, **dict.fromkeys(options, True))
    before, after = gradients(out, plain["total"]), gradients(out, weighted["total"])
    a, b = before["boxes"].norm(dim=-1), after["boxes"].norm(dim=-1)
    ratio = b[a > 0] / a[a > 0]
    assert float(ratio.mean()) == pytest.approx(1, abs=1e-3)
    assert float(ratio.max() / ratio.min()) > 1.2
    torch.testing.assert_close(after["logits"][a > 0], before["logits"][a > 0] * ratio, rtol=1e-3, atol=1e-6)
    assert 0.5 < (weighted["total"] / plain["total"]).item() < 2


def test_both_weightings_together_multiply():
    batch, out = make_batch(), make_out()

    def length(**options):
        grown = gradients(out, run(out, batch, **options)["total"])["boxes"].norm(dim=-1)
        return grown[grown > 0]

    plain, adaptive, scale = length(), length(adaptive_weighting=True), length(scale_weighting=True)
    both = length(adaptive_weighting=True, scale_weighting=True)
    factor = both * plain / (adaptive * scale)
    torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-3, atol=0)
