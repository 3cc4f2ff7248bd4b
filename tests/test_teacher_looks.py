"""Teachers that look twice: what the enlarged look says lands on the right anchors, and only there."""

import pytest
import torch
from torch import nn

from layers.anchors import decode_boxes, decode_landmarks, encode_boxes, encode_landmarks, make_anchors, to_xyxy
from layers.distillation import ProgressiveDistillation
from layers.matching import aligned_iou
from layers.teacher_looks import TwoLooks, best_of_four, enlarged_anchors, split_levels
from layers.teachers import Teacher
from models.featherface import build_model
from utils.config import ConfigError, DistillConfig, DistillStage, LossConfig, ModelConfig, load_config

PUBLISHED = ModelConfig()
ULTRA = ModelConfig(anchors=[[8, 16, 32], [64, 128], [256, 512]])
FACES = [[0.10, 0.10, 0.16, 0.17], [0.5, 0.4, 0.55, 0.47], [0.3, 0.6, 0.7, 0.95]]  # xyxy, shares of the picture


class Oracle(nn.Module):
    """Knows the faces at any size: every anchor points at the face it overlaps most, as sure as it overlaps."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def forward(self, images: torch.Tensor, features: bool = False) -> dict:
        height, width = images.shape[-2:]
        faces = torch.tensor(FACES) * torch.tensor([width, height, width, height])
        anchors = make_anchors(height, width, self.config.strides, self.config.anchors)
        overlap = torch.stack([aligned_iou(to_xyxy(anchors), face.expand(len(anchors), 4)) for face in faces])
        boxes = faces[overlap.argmax(0)]
        points = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2 + torch.arange(10.0).view(5, 2) * width / 500
        out = {
            "logits": torch.logit(overlap.amax(0), eps=1e-3),
            "boxes": encode_boxes(boxes, anchors, self.config.variances),
            "landmarks": encode_landmarks(points, anchors, self.config.variances),
        }
        out = {name: x.expand(len(images), *x.shape) for name, x in out.items()}
        return out | ({"neck": ["features"]} if features else {})


@pytest.mark.parametrize("config", [PUBLISHED, ULTRA], ids=["published", "ultra"])
def test_both_looks_point_at_the_same_faces(config):
    images = torch.zeros(2, 3, 256, 320)
    one, two = Oracle(config)(images), TwoLooks(Oracle(config), config)(images)
    anchors = make_anchors(256, 320, config.strides, config.anchors)
    small = anchors[:, 2] <= 64
    assert {name: x.shape for name, x in two.items()} == {name: x.shape for name, x in one.items()}
    for name in one:  # the others have one look
        torch.testing.assert_close(two[name][:, ~small], one[name][:, ~small])
    # Where the looks agree on the face, so must the mean of what they say of its place.
    sure = small & (two["logits"][0] > -2) & (one["logits"][0] > -2)
    assert sure.sum() > 8
    for decode, name in ((decode_boxes, "boxes"), (decode_landmarks, "landmarks")):
        ours, theirs = (decode(out[name][0], anchors, config.variances)[sure] for out in (two, one))
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)
    assert (two["logits"][0][sure] > one["logits"][0][sure]).float().mean() > 0.5  # the best of four overlaps more


def test_which_anchor_stands_for_which_when_enlarged():
    assert enlarged_anchors(PUBLISHED) == {(0, 0): (0, 1), (0, 1): (1, 0), (1, 0): (1, 1)}
    assert enlarged_anchors(ULTRA) == {(0, 0): (0, 1), (0, 1): (0, 2), (0, 2): (1, 0), (1, 0): (1, 1)}


def test_the_surest_of_four_cells_is_taken_with_its_place():
    torch.manual_seed(0)
    maps = {name: torch.randn(2, 4, 6, k) for name, k in (("logits", 1), ("boxes", 4), ("landmarks", 10))}
    best = best_of_four(maps, 0.25)
    for b, y, x in ((0, 0, 0), (1, 1, 2), (1, 0, 1)):
        dy, dx = max(
            ((i, j) for i in (0, 1) for j in (0, 1)), key=lambda c: maps["logits"][b, 2 * y + c[0], 2 * x + c[1]]
        )
        moved = torch.tensor([0.25 if dx else -0.25, 0.25 if dy else -0.25])
        chosen = {name: m[b, 2 * y + dy, 2 * x + dx] for name, m in maps.items()}
        assert best["logits"][b, y, x] == chosen["logits"]
        torch.testing.assert_close(best["boxes"][b, y, x, :2], chosen["boxes"][:2] + moved)
        torch.testing.assert_close(best["boxes"][b, y, x, 2:], chosen["boxes"][2:])
        torch.testing.assert_close(best["landmarks"][b, y, x], chosen["landmarks"] + moved.repeat(5))


def test_levels_are_split_as_anchors_are_ordered():
    anchors = make_anchors(96, 64, ULTRA.strides, ULTRA.anchors)
    out = {"logits": anchors[None, :, 2], "boxes": anchors[None], "landmarks": anchors[None].repeat(1, 1, 3)[..., :10]}
    levels = split_levels(out, ULTRA, 96, 64)
    assert levels[0]["boxes"].shape == (1, 12, 8, 3, 4) and levels[2]["logits"].shape == (1, 3, 2, 2, 1)
    assert levels[0]["boxes"][0, 5, 7, 1].tolist() == [60, 44, 16, 16]
    assert levels[1]["logits"][0, 0, 0].flatten().tolist() == [64, 128]


def distiller_of(teacher: Teacher, **options) -> ProgressiveDistillation:
    stages = [DistillStage(1.0, {"dense": 1.0})]
    cfg = DistillConfig(until=[1.0], temperature=[1.0], alpha=[0.5], stages=stages, teachers=["v1"], **options)
    assert not cfg.check()
    return ProgressiveDistillation(cfg, ULTRA, [teacher], LossConfig())


def test_a_mimic_learns_what_two_looks_say():
    torch.manual_seed(0)
    student = build_model(ULTRA)
    images = torch.randn(2, 3, 64, 96)
    batch, out = {"images": images}, student(images, features=True)
    losses = []
    for twice in (False, True):
        torch.manual_seed(1)
        distiller = distiller_of(Teacher(Oracle(PUBLISHED), PUBLISHED), look_twice=twice)
        (teacher,) = distiller.teachers.frozen
        assert isinstance(teacher.model, TwoLooks) == twice and teacher.config == PUBLISHED
        losses.append(distiller(out, batch, 0.5)[0]["total"])
    assert losses[0] != losses[1]
    losses[1].backward()
    assert student.heads.classes[0].weight.grad is None and next(student.neck.parameters()).grad is not None


class Recorder(Oracle):
    """Remembers what it is shown."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.weight, self.seen = nn.Parameter(torch.ones(1)), []

    def forward(self, images: torch.Tensor, features: bool = False) -> dict:
        self.seen.append(images)
        return super().forward(images, features)

    def neck_features(self, images: torch.Tensor) -> dict:
        self.seen.append(images)
        return {"neck": ["features"]}


def test_it_looks_at_each_picture_and_at_a_copy_of_twice_its_size():
    ramp = torch.arange(96.0).expand(2, 3, 64, 96) * torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
    recorder = Recorder(PUBLISHED)
    out = TwoLooks(recorder, PUBLISHED)(ramp, features=True)
    first, second = recorder.seen
    assert first is ramp and second.shape == (2, 3, 128, 192) and out["neck"] == ["features"]
    wanted = (torch.arange(2.0, 190) + 0.5) / 2 - 0.5  # the middle of a pixel is where it was
    torch.testing.assert_close(second[0, 1, 7, 2:190], wanted)
    torch.testing.assert_close(second[1, 1, 7, 2:190], -2 * wanted)
    assert TwoLooks(recorder, PUBLISHED).neck_features(ramp)["neck"] == ["features"]
    assert len(recorder.seen) == 3 and recorder.seen[2] is ramp  # features need no second look


def test_such_a_teacher_is_frozen_and_no_part_of_the_state():
    recorder = Recorder(PUBLISHED).train()
    distiller = distiller_of(Teacher(recorder, PUBLISHED), look_twice=True)
    assert not recorder.weight.requires_grad and not recorder.training
    assert {name for name in distiller.state_dict() if not name.startswith("mimics.")} == {"_extra_state"}
    assert all(name.startswith("mimics.") for name, _ in distiller.named_parameters())


def test_a_teacher_without_anchors_of_twice_the_size_is_refused():
    yunet = ModelConfig(anchors=[[16], [64], [256]])
    with pytest.raises(ConfigError, match=r"'distill\.look_twice': yunet_n has no anchors"):
        distiller_of(Teacher(Oracle(yunet), yunet, "yunet_n"), look_twice=True)


def test_it_needs_a_teacher_and_a_term_for_what_that_says():
    said = "distill.stages=[{until: 1.0, terms: {box: 1.0}}]"
    assert load_config("v2_ultra", [said, "distill.look_twice=true"]).distill.look_twice
    for opts in (["distill.teachers=[]", said], []):  # v2_ultra's only term is about features
        with pytest.raises(ConfigError, match="'look_twice' without effect"):
            load_config("v2_ultra", [*opts, "distill.look_twice=true"])
