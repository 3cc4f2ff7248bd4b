"""Assignment against hand-written loops, and on awkward input."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from layers import matching
from layers.anchors import decode_boxes, encode_boxes, make_anchors, to_xyxy
from layers.matching import BACKGROUND, IGNORED, anchor_levels, assign, assign_atss, assign_iou, assign_simota
from utils.config import LossConfig

STRIDES, SIZES = [8, 16, 32], [[16, 32], [64, 128], [256, 512]]
SIDE = 192
ANCHORS = make_anchors(SIDE, SIDE, STRIDES, SIZES)
ASSIGNERS = ["iou", "atss", "simota"]


def random_faces(batch, count, low=10.0, high=120.0, side=SIDE):
    """Boxes ``[B, M, 4]`` of log-uniform size, partly over the border."""
    centre = torch.rand(batch, count, 2) * side
    size = low * (high / low) ** torch.rand(batch, count, 1) * torch.tensor([1.0, 1.3])
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def make_batch(boxes, valid=None, ignore=None):
    yes = torch.ones(boxes.shape[:2], dtype=torch.bool)
    return {
        "boxes": boxes,
        "valid": yes if valid is None else valid,
        "ignore": ~yes if ignore is None else ignore,
    }


def run(assigner, batch, anchors=ANCHORS, seed=0):
    g = torch.Generator().manual_seed(seed)
    b, n = len(batch["boxes"]), len(anchors)
    out = {"logits": torch.randn(b, n, generator=g), "boxes": torch.randn(b, n, 4, generator=g) * 0.5}
    return assign(LossConfig(assigner=assigner), batch, anchors, out)


def cells_by_level():
    """For every level: list of (centre x, centre y, anchor indices of that cell)."""
    result, index = [], 0
    for stride, sizes in zip(STRIDES, SIZES):
        cells = []
        for row in range(SIDE // stride):
            for col in range(SIDE // stride):
                anchors = list(range(index, index + len(sizes)))
                cells.append(((col + 0.5) * stride, (row + 0.5) * stride, anchors, stride))
                index += len(sizes)
        result.append(cells)
    return result


def resolve(claims):
    """{anchor: [(priority, face)]} -> {anchor: face of the highest priority}."""
    return {anchor: max(bids)[1] for anchor, bids in claims.items()}


def loop_atss(boxes, topk):
    claims = {}
    for face, box in enumerate(boxes.tolist()):
        cx, cy, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
        cx_in, cy_in = min(max(cx, 0), SIDE), min(max(cy, 0), SIDE)
        candidates = []
        for cells in cells_by_level():
            cells = sorted(cells, key=lambda c: math.hypot(c[0] - cx_in, c[1] - cy_in))
            for x, y, anchors, _ in cells[: math.ceil(topk / len(cells[0][2]))]:
                inside = abs(x - cx) < max(w / 2, STRIDES[0]) and abs(y - cy) < max(h / 2, STRIDES[0])
                candidates += [(a, inside) for a in anchors]
        iou = box_iou(torch.tensor([box]), to_xyxy(ANCHORS[[a for a, _ in candidates]]))[0]
        threshold = float(iou.mean() + iou.std())
        for (anchor, inside), value in zip(candidates, iou.tolist()):
            if inside and value >= threshold:
                claims.setdefault(anchor, []).append((value, face))
    return resolve(claims)


def loop_simota(boxes, logits, deltas, radius):
    decoded = decode_boxes(deltas, ANCHORS, (0.1, 0.2))
    claims = {}
    for face, box in enumerate(boxes.tolist()):
        cx, cy, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
        rows = []
        for cells in cells_by_level():
            for x, y, anchors, stride in cells:
                if max(abs(x - cx), abs(y - cy)) > radius * stride:
                    continue
                inside = abs(x - cx) < max(w / 2, STRIDES[0]) and abs(y - cy) < max(h / 2, STRIDES[0])
                for a in anchors:
                    iou = float(box_iou(torch.tensor([box]), decoded[a][None]))
                    cost = math.log1p(math.exp(-float(logits[a]))) - 3 * math.log(iou + 1e-8) + 1e3 * (not inside)
                    rows.append((cost, iou, a))
        k = max(1, int(sum(sorted((iou for _, iou, _ in rows), reverse=True)[:10])))
        for cost, _, a in sorted(rows)[:k]:
            claims.setdefault(a, []).append((-cost, face))
    return resolve(claims)


def as_dict(matched):
    return {int(a): int(matched[a]) for a in (matched >= 0).nonzero().squeeze(1)}


@pytest.mark.parametrize("height, width", [(192, 192), (64, 640), (33, 50), (32, 32)])
def test_levels_are_recovered_from_the_anchors(height, width):
    sizes = [[8, 16, 32], [64], [256, 512]]
    levels = anchor_levels(make_anchors(height, width, STRIDES, sizes))
    start = 0
    for level, stride, level_sizes in zip(levels, STRIDES, sizes):
        rows, cols = math.ceil(height / stride), math.ceil(width / stride)
        assert level == (start, rows, cols, stride, tuple(level_sizes))
        start += rows * cols * len(level_sizes)


def test_levels_are_found_once_per_tensor(monkeypatch):
    """Images of 64 x 256 and of 256 x 64 have equally many anchors; a tensor that is gone is forgotten."""
    finds, find = [], matching._find_levels
    monkeypatch.setattr(matching, "_find_levels", lambda anchors: finds.append(1) or find(anchors))
    before = len(matching._LEVELS)
    wide, high = (make_anchors(*size, STRIDES, [[16], [64], [256]]) for size in ((64, 256), (256, 64)))
    assert [anchor_levels(a)[0].rows for a in (wide, high, wide)] == [8, 32, 8]
    assert len(finds) == 2
    del wide, high
    assert len(matching._LEVELS) <= before


@pytest.mark.parametrize("topk", [9, 18])
def test_atss_equals_the_loop(topk):
    boxes = random_faces(3, 4)
    result = assign_atss(**make_batch(boxes), anchors=ANCHORS, topk=topk)
    for b in range(3):
        expected = loop_atss(boxes[b], topk)
        assert set(expected.values()) == {0, 1, 2, 3}, "the reference itself left a face out: choose another seed"
        assert as_dict(result[b]) == expected


def test_atss_counts_centres_outside_the_image_as_on_its_border():
    boxes = torch.tensor([[20.0, 70.0, 60.0, 120.0], [-70.0, 60.0, 40.0, 150.0], [40.0, -60.0, 130.0, 30.0]])
    expected = loop_atss(boxes, 9)
    assert set(expected.values()) == {0, 1, 2}
    assert as_dict(assign_atss(**make_batch(boxes[None]), anchors=ANCHORS)[0]) == expected


@pytest.mark.parametrize("radius", [1.0, 2.5, 3.2])
def test_simota_equals_the_loop(radius):
    boxes = random_faces(2, 4)
    logits, deltas = torch.randn(2, len(ANCHORS)), torch.randn(2, len(ANCHORS), 4) * 0.5
    result = assign_simota(**make_batch(boxes), anchors=ANCHORS, logits=logits, deltas=deltas, radius=radius)
    for b in range(2):
        expected = loop_simota(boxes[b], logits[b], deltas[b], radius)
        assert set(expected.values()) == {0, 1, 2, 3}, "the reference itself left a face out: choose another seed"
        assert as_dict(result[b]) == expected


def test_simota_gives_better_predicted_faces_more_anchors():
    boxes = torch.tensor([[[40.0, 40.0, 80.0, 92.0], [120.0, 120.0, 160.0, 172.0]]])
    deltas = torch.zeros(1, len(ANCHORS), 4)
    near = (ANCHORS[:, :2] - torch.tensor([60.0, 66.0])).abs().amax(1) < 30
    deltas[0, near] = encode_boxes(boxes[0, 0].expand(int(near.sum()), 4), ANCHORS[near], (0.1, 0.2))
    logits = torch.zeros(1, len(ANCHORS))
    matched = assign_simota(**make_batch(boxes), anchors=ANCHORS, logits=logits, deltas=deltas)
    assert int((matched == 0).sum()) == 10 > int((matched == 1).sum())


@pytest.mark.parametrize("threshold", [0.35, 0.5])
def test_iou_assignment_equals_the_full_matrix(threshold):
    boxes = random_faces(3, 5)
    result = assign_iou(**make_batch(boxes), anchors=ANCHORS, threshold=threshold)
    for b in range(3):
        iou = box_iou(boxes[b], to_xyxy(ANCHORS))
        best, face = iou.max(0)
        expected = torch.where(best >= threshold, face, BACKGROUND)
        differing = (result[b] != expected).nonzero().squeeze(1)
        for a in differing.tolist():  # only where some face keeps its best anchor
            owner = int(result[b, a])
            assert owner >= 0
            assert iou[owner, a] == pytest.approx(float(iou[owner].max()), abs=1e-5)
        for m in range(5):
            kept = iou[m, result[b] == m]
            assert kept.numel()
            assert kept.max() == pytest.approx(float(iou[m].max()), abs=1e-5)


def test_iou_assignment_lets_a_face_keep_its_best_anchor_against_a_better_neighbour():
    boxes = torch.tensor([[[2.0, 8.0, 66.0, 72.0], [-12.0, 20.0, 52.0, 60.0]]])  # best: the 64-px anchors at x 40, 24
    iou = box_iou(boxes[0], to_xyxy(ANCHORS))
    contested = int(iou[1].argmax())
    assert iou[0, contested] > iou[1, contested]
    assert iou[0].argmax() != contested
    assert assign_iou(**make_batch(boxes), anchors=ANCHORS)[0, contested] == 1


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_batch_equals_one_by_one_whatever_the_padding(assigner):
    boxes = random_faces(3, 7)
    valid = torch.rand(3, 7) < 0.6
    valid[1] = False
    ignore = ~valid & (torch.rand(3, 7) < 0.5)
    logits, deltas = torch.randn(3, len(ANCHORS)), torch.randn(3, len(ANCHORS), 4)
    cfg = LossConfig(assigner=assigner)
    whole = assign(cfg, make_batch(boxes, valid, ignore), ANCHORS, {"logits": logits, "boxes": deltas})
    for b in range(3):
        only = slice(b, b + 1)
        alone = assign(
            cfg,
            make_batch(boxes[only], valid[only], ignore[only]),
            ANCHORS,
            {"logits": logits[only], "boxes": deltas[only]},
        )
        assert torch.equal(alone[0], whole[b])
        used = valid[b].nonzero().squeeze(1)
        order = torch.cat([used, ignore[b].nonzero().squeeze(1)])
        is_valid = torch.arange(len(order))[None] < len(used)
        packed = assign(
            cfg,
            make_batch(boxes[only][:, order], is_valid, ~is_valid),
            ANCHORS,
            {"logits": logits[only], "boxes": deltas[only]},
        )[0]
        same = torch.where(packed >= 0, used[packed.clamp(min=0)] if len(used) else packed, packed)
        assert torch.equal(same, whole[b])


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("size", [4, 6, 8, 10])
def test_tiny_faces_get_anchors_of_the_smallest_size(assigner, size):
    centre = torch.rand(1, 12, 2) * 20 + torch.tensor([[40.0 * (i % 4) + 6, 50.0 * (i // 4) + 6] for i in range(12)])
    batch = make_batch(torch.cat([centre - size / 2, centre + size / 2], -1))
    out = {"logits": torch.zeros(1, len(ANCHORS)), "boxes": torch.zeros(1, len(ANCHORS), 4)}
    matched = assign(LossConfig(assigner=assigner), batch, ANCHORS, out)[0]
    for m in range(12):
        anchors = ANCHORS[matched == m]
        assert len(anchors)
        assert (anchors[:, 2] == 16).any()
        assert (anchors[:, 2] <= 64).all()


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_every_face_of_a_crowd_keeps_an_anchor(assigner):
    grid = torch.stack(torch.meshgrid(torch.arange(14), torch.arange(14), indexing="xy"), -1).view(1, -1, 2) * 13.0 + 7
    centre = grid + torch.rand(grid.shape) * 3
    batch = make_batch(torch.cat([centre - 5, centre + 6], -1))
    matched = run(assigner, batch)[0]
    assert set(matched[matched >= 0].tolist()) == set(range(grid.shape[1]))


def test_two_faces_in_one_place_share_its_anchors():
    boxes = torch.tensor([[[60.0, 60.0, 100.0, 112.0], [61.0, 60.0, 101.0, 112.0], [60.0, 60.0, 100.0, 112.0]]])
    for assigner in ASSIGNERS:
        matched = run(assigner, make_batch(boxes))
        assert set(matched[matched >= 0].tolist()) == {0, 1, 2}, assigner


@pytest.mark.parametrize(
    ("assign_by", "setting", "argument", "value"),
    [
        (assign_iou, "iou_threshold", "threshold", 0.6),
        (assign_atss, "atss_topk", "topk", 18),
        (assign_simota, "simota_radius", "radius", 1.0),
        (assign_simota, None, "variances", (0.3, 0.5)),
    ],
)
def test_assigners_follow_the_settings(assign_by, setting, argument, value):
    batch, assigner = make_batch(random_faces(2, 6)), assign_by.__name__.removeprefix("assign_")
    out = {"logits": torch.randn(2, len(ANCHORS)), "boxes": torch.randn(2, len(ANCHORS), 4) * 0.5}
    predicted = {"logits": out["logits"], "deltas": out["boxes"]} if assign_by is assign_simota else {}
    wanted = assign_by(**batch, anchors=ANCHORS, **predicted, **{argument: value})
    cfg = LossConfig(assigner=assigner, **({setting: value} if setting else {}))
    got = assign(cfg, batch, ANCHORS, out, **({} if setting else {argument: value}))
    assert torch.equal(got, wanted)
    assert not torch.equal(got, assign(LossConfig(assigner=assigner), batch, ANCHORS, out))


def test_a_face_outbid_everywhere_takes_a_free_anchor_first():
    box = torch.tensor([[[60.0, 60.0, 100.0, 112.0]]])
    alone, both = (assign_atss(**make_batch(b), anchors=ANCHORS) for b in (box, box.repeat(1, 2, 1)))
    assert torch.equal(both == 0, alone == 0) and (both == 1).sum() == 1


@pytest.mark.parametrize("others, owners", [([3], [1, 0, 2, 3]), ([], [1, 0, 0, 2])])
def test_a_face_gives_up_one_anchor_at_a_time_and_none_while_others_are_free(others, owners):
    """Faces 1 and 2 both like the two middle anchors best, which face 0 holds; the outer ones are face 3's, or free."""
    anchors = make_anchors(8, 32, [8], [[16]])
    left = torch.tensor([16.0, 11.5, 20.4, 16.0])[: 3 + len(others)] - 8
    boxes = torch.stack([left, torch.full_like(left, -4.0), left + 16, torch.full_like(left, 12.0)], 1)
    faces = matching._Faces(torch.zeros(len(boxes), dtype=torch.long), torch.arange(len(boxes)), boxes)
    owner = torch.tensor([*(others or [BACKGROUND]), 0, 0, *(others or [BACKGROUND])])
    matching._serve_lonely(owner, faces, anchors, anchor_levels(anchors))
    assert owner.tolist() == owners


@pytest.mark.parametrize("assign_by", [assign_iou, assign_atss])
def test_a_crowd_in_one_place_takes_no_anchor_that_hardly_fits(assign_by):
    """With 60 faces for so few anchors, some stay without."""
    box = torch.tensor([50.0, 50.0, 60.0, 60.0])
    taken = assign_by(**make_batch(box.repeat(1, 60, 1)), anchors=ANCHORS)[0] >= 0
    iou = box_iou(box[None], to_xyxy(ANCHORS))[0]
    assert iou[taken].min() >= matching.FALLBACK_SHARE * iou.max()


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_ignored_faces_silence_their_anchors_but_never_a_valid_face(assigner):
    boxes = torch.tensor([[[20.0, 20.0, 52.0, 60.0], [100.0, 100.0, 180.0, 190.0], [150.0, 30.0, 153.0, 33.0]]])
    valid = torch.tensor([[True, False, False]])
    alone = run(assigner, make_batch(boxes[:, :1]))
    result = run(assigner, make_batch(boxes, valid, ~valid))
    assert torch.equal(result >= 0, alone >= 0)
    iou = box_iou(boxes[0, 1:], to_xyxy(ANCHORS))
    silent = result[0] == IGNORED
    assert silent[(iou[0] >= 0.5)].all()
    inner = (ANCHORS[:, 2] == 16) & ((ANCHORS[:, :2] - 140).abs().amax(1) < 20)
    assert inner.any()
    assert silent[inner].all(), "small anchors within an ignored face are no background"
    edge = (ANCHORS[:, 2] == 32) & (ANCHORS[:, 0] == 92) & ((ANCHORS[:, 1] - 140).abs() < 30)  # a quarter inside
    assert edge.any() and not silent[edge].any()
    tiny = silent & ((ANCHORS[:, :2] - torch.tensor([151.5, 31.5])).abs().amax(1) < 40)
    assert tiny.any(), "the 3-px face is smaller than any overlap limit, yet its own cell must stay silent"
    assert (ANCHORS[tiny, 2] <= 32).all()
    assert (result[0] == BACKGROUND).float().mean() > 0.5
    # The same ignored face on top of the valid one takes nothing from it.
    both = run(assigner, make_batch(boxes[:, [0, 0]], valid[:, :2], ~valid[:, :2]))
    assert torch.equal(both == 0, alone == 0)
    assert (both == IGNORED).any()


def test_every_anchor_half_inside_an_ignored_face_is_silent_whatever_their_sizes():
    boxes = random_faces(1, 12)
    none = torch.zeros(1, 12, dtype=torch.bool)
    silent = run("atss", make_batch(boxes, none, ~none))[0] == IGNORED
    corners = to_xyxy(ANCHORS)
    shared = torch.minimum(boxes[0, :, None, 2:], corners[:, 2:]) - torch.maximum(boxes[0, :, None, :2], corners[:, :2])
    share = shared.clamp(min=0).prod(-1).amax(0) / ANCHORS[:, 2] ** 2
    assert silent[share > matching.IGNORE_OVERLAP + 1e-3].all() and not silent.all()


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_unusable_boxes_match_nothing(assigner):
    nan, inf = math.nan, math.inf
    boxes = torch.tensor(
        [
            [[50.0, 50.0, 50.0, 70.0], [60.0, 60.0, 40.0, 40.0], [nan, 0.0, 30.0, 30.0], [0.0, 0.0, inf, 30.0]],
            [[2000.0, 50.0, 2050.0, 90.0], [-900.0, -900.0, -800.0, -800.0], [0.0] * 4, [90.0, 90.0, 90.05, 130.0]],
        ]
    )
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)):
        result = run(assigner, make_batch(boxes, mask, ~mask))
        assert (result < 0).all()


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("count", [0, 3])
def test_no_faces_is_all_background(assigner, count):
    batch = make_batch(torch.zeros(2, count, 4), torch.zeros(2, count, dtype=torch.bool))
    result = run(assigner, batch)
    assert result.shape == (2, len(ANCHORS))
    assert (result == BACKGROUND).all()


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_chunks_do_not_change_the_result(assigner, monkeypatch):
    boxes = random_faces(2, 40)
    valid = torch.rand(2, 40) < 0.7
    batch = make_batch(boxes, valid, ~valid)
    whole = run(assigner, batch)
    monkeypatch.setattr(matching, "PAIR_BUDGET", 700)
    assert torch.equal(run(assigner, batch), whole)


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_three_thousand_faces_in_one_image(assigner):
    anchors = make_anchors(640, 640, STRIDES, SIZES)
    batch = make_batch(random_faces(1, 3000, 4.0, 30.0, side=640))
    matched = run(assigner, batch, anchors)[0]
    served = matched[matched >= 0].unique().numel()
    assert served >= 0.99 * 3000


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_broken_predictions_do_not_break_the_assignment(assigner):
    batch = make_batch(random_faces(1, 5))
    out = {"logits": torch.full((1, len(ANCHORS)), math.nan), "boxes": torch.full((1, len(ANCHORS), 4), 1e9)}
    result = assign(LossConfig(assigner=assigner), batch, ANCHORS, out)
    assert set(result[result >= 0].tolist()) == set(range(5))


def test_simota_without_predictions_is_refused():
    with pytest.raises(ValueError, match="SimOTA"):
        assign(LossConfig(assigner="simota"), make_batch(random_faces(1, 1)), ANCHORS)
