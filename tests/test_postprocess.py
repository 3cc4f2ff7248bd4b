"""Threshold, decoding, NMS and box voting."""

import pytest
import torch

from layers.anchors import encode_boxes, encode_landmarks, make_anchors
from layers.postprocess import box_voting, postprocess

VARIANCES = [0.1, 0.2]
SIZES = [[16, 32], [64, 128], [256, 512]]
ANCHORS = make_anchors(128, 160, (8, 16, 32), SIZES)
N = len(ANCHORS)


def raw(batch: int = 1) -> dict[str, torch.Tensor]:
    """Outputs without any face."""
    shape = (batch, N)
    return {
        "logits": torch.full(shape, -9.0),
        "boxes": torch.zeros(*shape, 4),
        "landmarks": torch.zeros(*shape, 10),
    }


def put(out: dict, image: int, anchor: int, box: list, logit: float, points: torch.Tensor | None = None) -> None:
    a = ANCHORS[anchor : anchor + 1]
    out["logits"][image, anchor] = logit
    out["boxes"][image, anchor] = encode_boxes(torch.tensor([box], dtype=torch.float32), a, VARIANCES)[0]
    if points is not None:
        out["landmarks"][image, anchor] = encode_landmarks(points[None], a, VARIANCES)[0]


def test_decodes_what_was_encoded_and_drops_duplicates():
    out = raw(2)
    points = torch.rand(5, 2) * 100
    put(out, 1, 20, [10, 20, 40, 60], 2.0, points)
    put(out, 1, 33, [11, 20, 40, 61], 3.0)  # overlaps, better
    put(out, 1, 500, [100, 20, 140, 60], 1.0, points)
    nothing, found = postprocess(out, ANCHORS, VARIANCES)
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["scores"].shape == (0,)
    assert nothing["landmarks"].shape == (0, 5, 2)
    assert torch.allclose(found["boxes"], torch.tensor([[11.0, 20, 40, 61], [100, 20, 140, 60]]), atol=1e-3)
    assert torch.allclose(found["scores"], torch.tensor([3.0, 1.0]).sigmoid())
    assert torch.allclose(found["landmarks"][1], points, atol=1e-3)


def test_same_place_in_two_images_is_no_duplicate():
    out = raw(2)
    for image in (0, 1):
        put(out, image, 20, [10, 20, 40, 60], 2.0)
    assert [len(d["scores"]) for d in postprocess(out, ANCHORS, VARIANCES)] == [1, 1]


def test_a_box_left_of_and_above_one_image_suppresses_nothing_in_another():
    out = raw(2)
    put(out, 0, 500, [100, 70, 160, 128], 1.0)
    put(out, 1, 20, [-61, -91, -1, -33], 3.0)  # where batched_nms would shift it onto the face of image 0
    assert [len(d["scores"]) for d in postprocess(out, ANCHORS, VARIANCES)] == [1, 1]


def test_nms_threshold_is_an_iou():
    out = raw()
    put(out, 0, 0, [0, 0, 40, 40], 2.0)
    put(out, 0, 1, [0, 0, 40, 20], 1.0)  # IoU 0.5
    assert len(postprocess(out, ANCHORS, VARIANCES, nms_threshold=0.49)[0]["scores"]) == 1
    assert len(postprocess(out, ANCHORS, VARIANCES, nms_threshold=0.51)[0]["scores"]) == 2


def test_score_threshold_and_limits():
    out = raw()
    for i in range(6):
        put(out, 0, i * 40, [20 * i, 0, 20 * i + 15, 15], float(i))
    run = lambda **kw: postprocess(out, ANCHORS, VARIANCES, **kw)[0]["scores"].logit().round().tolist()  # noqa: E731
    assert run(score_threshold=0.9) == [5, 4, 3]
    assert run(score_threshold=0.1) == [5, 4, 3, 2, 1, 0]
    assert run(score_threshold=0.1, top_k=2) == [5, 4]
    assert run(score_threshold=0.1, keep_k=1) == [5]


def test_batch_equals_one_by_one():
    generator = torch.Generator().manual_seed(1)
    out = {
        "logits": torch.randn(3, N, generator=generator) * 2,
        "boxes": torch.randn(3, N, 4, generator=generator),
        "landmarks": torch.randn(3, N, 10, generator=generator),
    }
    together = postprocess(out, ANCHORS, VARIANCES, 0.3, 0.4, top_k=200, keep_k=30)
    for i, faces in enumerate(together):
        single = postprocess({k: v[i : i + 1] for k, v in out.items()}, ANCHORS, VARIANCES, 0.3, 0.4, 200, 30)[0]
        for key in faces:
            assert torch.equal(faces[key], single[key])


def test_equal_scores_are_told_apart_as_in_any_batch():
    """A crowd beyond top_k changes nothing of the picture beside it, nor a quiet one of it."""
    crowd, quiet = raw(), raw()
    for i in range(40):
        put(crowd, 0, i, [20 * i, 0, 20 * i + 15, 15], 1 + i / 40)
    for i in range(6):  # all alike, all over each other
        put(quiet, 0, i, [0, 0, 40, 40], 2.0)
    alone = [postprocess(out, ANCHORS, VARIANCES, top_k=10)[0] for out in (crowd, quiet)]
    both = {key: torch.cat([crowd[key], quiet[key]]) for key in crowd}
    for one, other in zip(alone, postprocess(both, ANCHORS, VARIANCES, top_k=10)):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert [len(a["anchor"]) for a in alone] == [10, 1] and alone[1]["anchor"] == 0  # the first of equals


def test_half_precision_outputs_give_float_pixels():
    out = {k: v.to(torch.bfloat16) for k, v in raw().items()}
    out["logits"][0, 3] = 4.0
    faces = postprocess(out, ANCHORS, VARIANCES)[0]
    assert faces["boxes"].dtype == faces["scores"].dtype == torch.float32


def test_voting_averages_by_score():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    scores = torch.tensor([0.9, 0.3, 0.5])
    points = torch.arange(30.0).view(3, 5, 2)
    merged = box_voting(boxes, scores, points, 0.4)
    assert merged["scores"].tolist() == pytest.approx([0.9, 0.5])
    assert merged["boxes"][0].tolist() == pytest.approx([0.25, 0, 10.25, 10])
    assert torch.equal(merged["boxes"][1], boxes[2])
    assert torch.allclose(merged["landmarks"][0], points[0] * 0.75 + points[1] * 0.25)


@pytest.mark.parametrize(("nms", "vote", "right"), [(0.4, 0.5, [11]), (0.4, 0.7, [10]), (0.7, 0.7, [10, 16])])
def test_voting_thresholds_are_ious(nms, vote, right):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 16, 10]])  # IoU 0.625
    merged = box_voting(boxes, torch.tensor([0.75, 0.15]), torch.zeros(2, 5, 2), nms, vote)
    assert merged["boxes"][:, 2].tolist() == pytest.approx(right)


def test_voting_without_detections_and_with_an_empty_box():
    none = box_voting(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5, 2))
    assert none["boxes"].shape == (0, 4)
    flat = box_voting(torch.tensor([[3.0, 3, 3, 3]]), torch.tensor([0.7]), torch.zeros(1, 5, 2))
    assert flat["boxes"].tolist() == [[3, 3, 3, 3]]


def test_half_precision_outputs_are_decoded_in_single_precision():
    out = {k: v.to(torch.bfloat16) for k, v in raw().items()}
    out["logits"][0, :] = torch.linspace(1, 4, out["logits"].shape[1])
    out["boxes"].copy_(torch.randn_like(out["boxes"]))
    got, wanted = (
        postprocess(out, ANCHORS, VARIANCES),
        postprocess({k: v.float() for k, v in out.items()}, ANCHORS, VARIANCES),
    )
    assert all(torch.equal(got[0][k], wanted[0][k]) for k in wanted[0])


def test_a_score_at_the_threshold_is_not_above_it():
    out = raw()
    out["logits"][0, 3] = 0.0
    assert [len(postprocess(out, ANCHORS, VARIANCES, t)[0]["scores"]) for t in (0.49, 0.5)] == [1, 0]


def test_voting_of_an_empty_box_without_any_score():
    merged = box_voting(torch.full((1, 4), 5.0), torch.zeros(1), torch.full((1, 5, 2), 5.0))
    assert (merged["boxes"] == 5).all() and (merged["landmarks"] == 5).all()


def test_half_of_two_boxes_is_enough_to_vote():
    boxes, points = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20]]), torch.zeros(2, 5, 2)
    assert box_voting(boxes, torch.tensor([0.6, 0.2]), points)["boxes"].tolist() == [pytest.approx([0, 0, 10, 12.5])]
