"""Inheriting a bigger network's weights: what is copied, what is approximated and how well, what is refused."""

from dataclasses import replace

import pytest
import torch

from layers.anchors import decode_boxes, decode_landmarks
from models.blocks import DeformableConv2d
from models.featherface import build_model
from models.inherit import SSH_CONVOLUTIONS, InheritError, inherit, plain_kernel, separate
from utils.checkpoint import inference_content, save_checkpoint
from utils.config import ModelConfig, load_config
from utils.train_cli import main

TEACHER = ModelConfig(
    out_channels=16, bifpn_repeats=3, cbam="backbone+neck", ssh="deformable", class_outputs=2, extra_laterals=True
)
STUDENT = ModelConfig(
    backbone_last_blocks=1,
    backbone_last_channels=128,
    out_channels=16,
    bifpn_repeats=2,
    ssh="separable",
    cbam_reduction=TEACHER.cbam_reduction,
    anchors=[[8, 16, 32], [64, 128], [256, 512]],
)


def trained(cfg: ModelConfig) -> torch.nn.Module:
    """A network whose every tensor has moved off its start, in eval mode."""
    model = build_model(cfg).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                positive = name.endswith("running_var") or "fuse" in name
                tensor.add_(torch.rand_like(tensor) if positive else 0.02 * torch.randn_like(tensor))
    return model


def test_separable_kernels_are_the_best_rank_one_approximation():
    kernel = torch.randn(12, 5, 3, 3, dtype=torch.float64)
    depthwise, pointwise = separate(kernel)
    assert depthwise.shape == (5, 1, 3, 3) and pointwise.shape == (12, 5, 1, 1)
    error = (pointwise * depthwise.transpose(0, 1) - kernel).square().sum()
    tail = torch.linalg.svdvals(kernel.transpose(0, 1).flatten(2))[:, 1:].square().sum()
    torch.testing.assert_close(error, tail)  # Eckart-Young: nothing of rank one comes closer
    rank_one = pointwise * depthwise.transpose(0, 1)
    again = separate(rank_one)
    torch.testing.assert_close(again[1] * again[0].transpose(0, 1), rank_one)


def test_deformable_convolution_without_offsets_is_its_plain_kernel():
    conv = DeformableConv2d(4, 6, 3, 1, 1, bias=False)
    with torch.no_grad():
        conv.modulator.bias.normal_()
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(conv(x), torch.nn.functional.conv2d(x, plain_kernel(conv), padding=1))


@pytest.mark.parametrize("name", ["v1", "v2", "v2_ultra", "v2_ultra_full", "retinaface_mnet025"])
def test_an_equal_student_becomes_the_teacher(name):
    cfg = load_config(name).model
    teacher, student = trained(cfg), build_model(cfg).eval()
    assert inherit(student, teacher) == []
    wanted, got = teacher.state_dict(), student.state_dict()
    assert all(torch.equal(v, got[k]) for k, v in wanted.items())


@pytest.mark.parametrize("kind", ["plain", "grouped", "deformable"])
def test_every_context_kernel_reaches_its_own_layer(kind):
    """Kernels of rank one (and no offsets) lose nothing when they are separated."""
    small = {"out_channels": 16, "bifpn_repeats": 2, "ssh_groups": 2}
    teacher, student = (trained(ModelConfig(**small, ssh=k)) for k in (kind, "separable"))
    for name in SSH_CONVOLUTIONS:
        conv = getattr(teacher.context[0], name).conv
        with torch.no_grad():
            conv.weight.copy_(torch.randn(len(conv.weight), conv.weight.shape[1], 1, 1) * torch.randn(1, 1, 3, 3))
            if kind == "deformable":
                conv.offset.bias.zero_(), conv.offset.weight.zero_(), conv.modulator.weight.zero_()
    inherit(student, teacher)
    x = torch.randn(1, 16, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(student.context[0](x), teacher.context[0](x), rtol=1e-3, atol=1e-4)


def test_plain_context_takes_a_deformable_one_at_rest():
    teacher, student = trained(TEACHER), build_model(ModelConfig(out_channels=16, bifpn_repeats=2, ssh="plain"))
    inherit(student, teacher)
    wanted = plain_kernel(teacher.context[1].conv7_2.conv)
    assert torch.equal(student.context[1].conv7_2.conv.weight, wanted)
    assert not torch.equal(wanted, teacher.context[1].conv7_2.conv.weight)


def test_amplified_attention_starts_as_the_plain_one():
    small = {"out_channels": 16, "bifpn_repeats": 2}
    teacher, student = trained(ModelConfig(**small)), build_model(ModelConfig(**small, attention_multiply=3))
    assert inherit(student, teacher) == []
    for use in student.attention[0].uses:
        assert torch.equal(use.spatial.weight, teacher.attention[0].cbam.spatial.weight)
        assert torch.equal(use.bn.running_mean, teacher.attention[0].cbam.bn.running_mean)


def test_a_cbam_of_another_reduction_is_left_alone():
    small = {"out_channels": 16, "bifpn_repeats": 2}
    teacher, student = (trained(ModelConfig(**small, cbam_reduction=r)) for r in (4, 16))
    left = inherit(student, teacher)
    assert left == [k for k in student.state_dict() if k.startswith("attention.") and "num_batches" not in k]


def test_fusion_weights_the_teacher_lacks_are_zero():
    small = {"out_channels": 16, "bifpn_repeats": 2}
    teacher, student = trained(ModelConfig(**small)), build_model(ModelConfig(**small, extra_laterals=True))
    inherit(student, teacher)
    wanted = teacher.neck.repeats[0].fuse_p5.weight.tolist()
    assert student.neck.repeats[0].fuse_p5.weight.tolist() == [*wanted, 0.0]


def test_an_unused_fusion_weight_that_counts_is_named(caplog):
    teacher = build_model(TEACHER)
    inherit(build_model(STUDENT), teacher)
    assert "repeat 1, fuse_p5.weight: an unused weight is not 0 there; P5 starts 1.50 times as strong" in caplog.text
    caplog.clear()
    with torch.no_grad():
        for repeat in teacher.neck.repeats:
            repeat.fuse_p5.weight[2] = -0.1  # as in the published V1: ReLU makes it 0
    inherit(build_model(STUDENT), teacher)
    assert not caplog.text


def test_only_the_new_lateral_of_a_compressed_student_starts_at_random():
    teacher, student = trained(TEACHER), build_model(STUDENT)
    left = inherit(student, teacher)
    assert left and all(name.startswith("neck.laterals.2.") for name in left)
    assert torch.equal(
        student.neck.repeats[0].conv_p3.depthwise.weight, teacher.neck.repeats[0].conv_p3.depthwise.weight
    )
    assert torch.equal(
        student.neck.repeats[1].conv_p3.depthwise.weight, teacher.neck.repeats[2].conv_p3.depthwise.weight
    )


@pytest.mark.parametrize("by", ["next layer", "own norm"])
def test_a_narrower_last_stage_keeps_the_channels_that_weigh_most(by):
    teacher, student = trained(TEACHER), build_model(STUDENT)
    with torch.no_grad():  # make the second half of the channels matter
        stage = teacher.backbone.stage3
        (stage[1][0].conv if by == "next layer" else stage[0][1].bn).weight[:128] *= 1e-3
    inherit(student, teacher)
    wide, narrow = teacher.backbone.stage3[0], student.backbone.stage3[0]
    x = torch.randn(1, 128, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(narrow.eval()(x), wide(x)[:, 128:])


def test_the_nearest_anchor_is_that_of_the_smallest_ratio():
    teacher, student = trained(TEACHER), build_model(replace(STUDENT, anchors=[[23], [64, 128], [256, 512]]))
    inherit(student, teacher)
    pair = teacher.heads.classes[0].weight[2:]  # of 32 px; 16 are fewer px away
    assert torch.equal(student.heads.classes[0].weight, pair[1:] - pair[:1])


def test_a_new_anchor_predicts_what_its_nearest_one_does():
    teacher, student = trained(TEACHER), build_model(STUDENT).eval()
    inherit(student, teacher)
    levels = [torch.randn(1, 16, s, s) for s in (4, 2, 1)]
    with torch.no_grad():
        theirs, ours = teacher.heads(levels, levels, levels), student.heads(levels, levels, levels)
    their_anchors, our_anchors = teacher.anchors(32, 32), student.anchors(32, 32)
    their_boxes = decode_boxes(theirs["boxes"][0], their_anchors, teacher.variances)
    our_boxes = decode_boxes(ours["boxes"][0], our_anchors, student.variances)
    their_points = decode_landmarks(theirs["landmarks"][0], their_anchors, teacher.variances)
    our_points = decode_landmarks(ours["landmarks"][0], our_anchors, student.variances)
    # at stride 8 the teacher has 16 and 32 px, the student 8 (from 16), 16 and 32
    p3 = torch.arange(4 * 4)
    source = torch.cat([torch.stack([2 * p3, 2 * p3, 2 * p3 + 1], 1).flatten(), torch.arange(32, 32 + 10)])
    torch.testing.assert_close(ours["logits"][0], theirs["logits"][0][source])
    torch.testing.assert_close(our_boxes, their_boxes[source])
    torch.testing.assert_close(our_points, their_points[source])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"out_channels": 32}, r"model\.out_channels is 16 there and 32 here"),
        ({"neck": "fpn"}, r"model\.neck is 'bifpn' there and 'fpn' here"),
        ({"bifpn_repeats": 4}, "3 BiFPN repeats there, 4 here"),
    ],
)
def test_what_does_not_fit_is_refused(change, reason):
    student = ModelConfig(**{"out_channels": 16, **change})
    with pytest.raises(InheritError, match=reason):
        inherit(build_model(student), build_model(TEACHER))


def test_a_bigger_backbone_is_refused():
    with pytest.raises(InheritError, match="last backbone stage is smaller there"):
        inherit(build_model(ModelConfig(out_channels=16)), build_model(STUDENT))


def test_training_names_the_file_it_cannot_inherit_from(tmp_path, capsys):
    save_checkpoint(tmp_path / "t.pth", inference_content("t", TEACHER, build_model(TEACHER).state_dict()))
    root = tmp_path / "data" / "train"
    (root / "images").mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (96, 96)).save(root / "images" / "a.png")
    (root / "label.txt").write_text("# a.png\n10 10 40 40\n")
    opts = [f"data.root={tmp_path / 'data'}", "data.labels=[train/label.txt]", "data.machine_labels=", "data.cache="]
    opts += ["data.select_images=0", "train.stages=[{until: 1.0, size: 64, batch_size: 1}]", "distill.teachers=[]"]
    opts += [f"train.inherit_weights={tmp_path / 't.pth'}", "model.out_channels=32"]
    arguments = ["--config", "v2_ultra", "--out", str(tmp_path / "run"), "--device", "cpu", "--opts", *opts]
    assert main("train", "", "v2_ultra", arguments) == 1
    assert capsys.readouterr().err.strip() == (
        f"train: {tmp_path / 't.pth'}: cannot inherit: model.out_channels is 16 there and 32 here"
    )


def test_each_use_of_amplified_attention_inherits_its_own_and_more_uses_the_last():
    small = {"out_channels": 16, "bifpn_repeats": 2}
    teacher = trained(ModelConfig(**small, attention_multiply=3))
    student = build_model(ModelConfig(**small, attention_multiply=4))
    assert inherit(student, teacher) == []
    for use, known in zip(student.attention[0].uses, (0, 1, 2, 2)):
        assert torch.equal(use.bn.running_mean, teacher.attention[0].uses[known].bn.running_mean)


def test_boxes_coded_otherwise_are_not_inherited():
    teacher, student = (build_model(ModelConfig(out_channels=16, variances=v)) for v in ([0.1, 0.2], [0.2, 0.2]))
    with pytest.raises(InheritError, match=r"cannot inherit: model\.variances is"):
        inherit(student, teacher)
