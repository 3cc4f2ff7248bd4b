"""The assembled network: parameter budgets, shapes, gradients, batch independence, export."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layers.anchors import decode_boxes, encode_landmarks, make_anchors
from models.bifpn import BiFPN, Fusion, downsample
from models.blocks import DeformableConv2d, channel_shuffle, largest_groups, normalised
from models.cbam import CBAM, ResidualCBAM
from models.featherface import build_model
from models.fuse import fuse_for_inference
from models.landmark_refinement import LandmarkRefinement, read
from models.mobilenet import MobileNetV1
from models.ssh import SSH
from models.summary import count_macs, main, summarize
from utils.config import ModelConfig, load_config

NAMES = ["v1", "v1_compact", "v2", "v2_ultra", "v2_ultra_full", "retinaface_mnet025"]
EXACT = {"v1": 592_371, "retinaface_mnet025": 426_608}
AT_MOST = {"v1_compact": 487_000, "v2": 256_200, "v2_ultra": 249_999, "v2_ultra_full": 249_999}
PLAN_B = [
    "model.feature_reuse=true",
    "model.feature_reuse_before_heads=true",
    "model.attention_multiply=3",
    "model.progressive_enhancement=3",
    "model.multiscale_fusion=true",
    "model.dynamic_sharing=true",
]
PLAN_A = [f"model.{key}=true" for key in ("acf", "dca", "pfr", "cbam_cascade", "smart_head", "cascade_refinement")]
PLAN_A += ["model.multipath=true"]
OTHERS = ["model.class_outputs=2", "model.anchors=[[8,16,32],[64,128],[256,512]]", "model.dropblock=0.1"]
OTHERS += ["model.landmark_refinement=true"]
OFF = [opt.split("=")[0] + {"3": "=0"}.get(opt[-1], "=false") for opt in PLAN_B if "multiply" not in opt]
OFF += ["model.attention_multiply=1"]


def model_of(name: str, *opts: str) -> torch.nn.Module:
    return build_model(load_config(name, list(opts)).model)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def warmed_up(model: torch.nn.Module) -> torch.nn.Module:
    """In eval mode, with batch norm statistics that some batches have moved off their start."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 96, 96) * 50)
    return model.eval()


def tensors(out: dict) -> dict[str, torch.Tensor]:
    """Every tensor of an output, nested ones too, by a readable name."""
    flat = {}
    for key, value in out.items():
        if isinstance(value, torch.Tensor):
            flat[key] = value
        elif isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in tensors(value).items()}
        else:
            flat |= {f"{key}.{k}": v for k, v in tensors(dict(enumerate(value))).items()}
    return flat


@pytest.mark.parametrize("name", NAMES)
def test_parameter_budget(name):
    count = parameters(model_of(name))
    if name in EXACT:
        assert count == EXACT[name]
    else:
        assert count <= AT_MOST[name]


def test_ultra_budget_with_all_of_plan_b():
    assert parameters(model_of("v2_ultra", *PLAN_B)) < 250_000


def test_short_backbone_frees_the_parameters_of_its_last_block():
    whole, short = (MobileNetV1(n) for n in (2, 1))
    assert (parameters(whole), parameters(short)) == (213_072, 144_208)
    assert [f.shape for f in short(torch.zeros(1, 3, 64, 64))] == [f.shape for f in whole(torch.zeros(1, 3, 64, 64))]


@pytest.mark.parametrize("kind", ["plain", "grouped", "separable", "deformable"])
def test_ssh_sees_seven_pixels_across_and_all_channels(kind):
    ssh = SSH(16, kind, groups=1).eval()
    x = torch.randn(1, 16, 15, 15, requires_grad=True)
    ssh(x)[0, :, 7, 7].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (4, 10, 4, 10)
    assert (x.grad[0, :, 7, 7] != 0).all()


def test_separable_ssh_costs_less_than_grouped():
    assert parameters(SSH(64, "separable")) < parameters(SSH(64, "grouped", 4)) < parameters(SSH(64, "plain"))


def test_narrow_last_stage_feeds_the_neck():
    model = model_of("v2_ultra", "model.backbone_last_blocks=2", "model.backbone_last_channels=96")
    assert model.backbone(torch.zeros(1, 3, 64, 64))[2].shape == (1, 96, 2, 2)
    assert model(torch.zeros(1, 3, 64, 64))["logits"].shape == (1, len(model.anchors(64, 64)))


@pytest.mark.parametrize("bias", [False, True])
def test_still_batchnorm_gives_the_gradients_of_the_unfolded_one(bias):
    conv, bn = nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=bias), nn.BatchNorm2d(8)
    with torch.no_grad():
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2), bn.weight.normal_(), bn.bias.normal_()
    bn.eval()
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    inputs = [x, *conv.parameters(), *bn.parameters()]
    plain, folded = bn(conv(x)), normalised(x, conv, bn)
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * weight).sum(), inputs)
    for got, want in zip(torch.autograd.grad((folded * weight).sum(), inputs), wanted):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_neck_features_are_those_of_the_whole_network():
    model = warmed_up(model_of("v2_ultra_full"))
    x = torch.randn(2, 3, 96, 64) * 50
    whole, part = tensors(model(x, features=True)), tensors(model.neck_features(x))
    assert {k.partition(".")[0] for k in part} == {"laterals", "neck", "attention", "complexity"}
    assert all(torch.equal(whole[k], v) for k, v in part.items())


def test_full_config_has_every_switch_on():
    full = load_config("v2_ultra_full").model
    for opt in PLAN_A + PLAN_B:
        key, value = opt.removeprefix("model.").split("=")
        assert str(getattr(full, key)).lower() == value, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 96), (75, 101), (33, 31), (1, 1)])
def test_any_image_size_gives_one_prediction_per_anchor(name, size):
    model = model_of(name).eval()
    with torch.inference_mode():
        out = model(torch.randn(1, 3, *size), features=True)
    n = sum(len(a) * -(-size[0] // s) * -(-size[1] // s) for s, a in zip((8, 16, 32), model.cfg.anchors))
    assert model.anchors(*size).shape == (n, 4)
    assert out["logits"].shape == (1, n)
    assert out["boxes"].shape == (1, n, 4)
    assert out["landmarks"].shape == (1, n, 10)
    channels = model.cfg.out_channels
    for key in ("laterals", "neck", "context"):
        expected = [(1, channels, -(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32)]
        assert [tuple(f.shape) for f in out[key]] == expected, key
    if "attention" in out:
        assert [f.shape[1] for f in out["attention"]] == [1, 1, 1]
        assert all(((f >= 0) & (f <= 1)).all() for f in out["attention"])
    assert all(torch.isfinite(t).all() for t in tensors(out).values())


def test_an_empty_batch_gives_empty_predictions():
    out = model_of("v2_ultra").eval()(torch.zeros(0, 3, 64, 64))
    assert {k: v.shape[:2] for k, v in out.items()} == dict.fromkeys(("logits", "boxes", "landmarks"), (0, 232))


def test_640_gives_16800_anchors():
    assert model_of("v1").anchors(640, 640).shape == (16_800, 4)


def test_predictions_are_in_the_order_of_the_anchors():
    """Raising the features of one cell of one level must raise exactly the anchors centred on that cell."""
    model = model_of("v2", "model.anchors=[[8,16,32],[64,128],[256,512]]").eval()
    heads = model.heads
    levels = [torch.zeros(1, 32, -(-70 // s), -(-90 // s)) for s in (8, 16, 32)]
    before = heads(levels, levels, levels)
    for level, (stride, sizes) in enumerate(zip((8, 16, 32), ([8, 16, 32], [64, 128], [256, 512]))):
        moved = [f.clone() for f in levels]
        moved[level][0, :, 1, 2] = 1.0
        after = heads(moved, moved, moved)
        for key in ("logits", "boxes", "landmarks"):
            changed = (after[key] != before[key]).view(1, before["logits"].shape[1], -1).any(-1)[0]
            anchors = model.anchors(70, 90)[changed]
            assert anchors.tolist() == [[2.5 * stride, 1.5 * stride, size, size] for size in sizes]


def test_two_class_outputs_give_the_difference_of_the_pair():
    heads = model_of("retinaface_mnet025").heads
    levels = [torch.randn(1, 64, 2, 2) for _ in range(3)]
    pair = torch.cat([c(x).permute(0, 2, 3, 1).reshape(1, -1, 2) for c, x in zip(heads.classes, levels)], 1)
    assert torch.allclose(heads(levels, levels, levels)["logits"].sigmoid(), pair.softmax(-1)[..., 1], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_anchor_starts_from_a_small_face_probability(name):
    out = model_of(name)(torch.randn(2, 3, 64, 64) * 50)
    assert 0.003 < out["logits"].sigmoid().mean() < 0.03


@pytest.mark.parametrize("opt", ["", *PLAN_B, *PLAN_A, *OTHERS])
def test_gradients_reach_every_parameter_of_each_switch(opt):
    assert_gradients(model_of("v2_ultra", *OFF, *([opt] if opt else [])))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_of_each_config(name):
    assert_gradients(model_of(name))


def assert_gradients(model: torch.nn.Module) -> None:
    out = model.train()(torch.randn(2, 3, 160, 128) * 50)
    loss = sum((t * torch.randn_like(t)).sum() for t in tensors(out).values())
    loss.backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


AFTER_NECK = {"attention", "context", "logits", "boxes", "landmarks"}


@pytest.mark.parametrize(
    "one, other, moved",
    [
        ("feature_reuse=false", "feature_reuse=true", AFTER_NECK),
        ("feature_reuse_before_heads=false", "feature_reuse_before_heads=true", AFTER_NECK - {"attention"}),
        ("multiscale_fusion=false", "multiscale_fusion=true", AFTER_NECK),
        ("progressive_enhancement=0", "progressive_enhancement=1", AFTER_NECK),
        ("progressive_enhancement=1", "progressive_enhancement=3", AFTER_NECK),
        ("attention_multiply=1", "attention_multiply=2", AFTER_NECK),
        ("attention_multiply=2", "attention_multiply=3", AFTER_NECK),
    ],
)
def test_a_switch_without_parameters_changes_what_the_same_weights_compute(one, other, moved):
    """Behind the neck, on every level: there are no gradients that would tell of it."""
    first, second = (model_of("v2_ultra", *OFF, f"model.{opt}").eval() for opt in (one, other))
    with torch.no_grad():
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            b.copy_(a)
        x = torch.randn(1, 3, 64, 96) * 50
        first, second = (tensors(model(x, features=True)) for model in (first, second))
    same = {key for key, value in first.items() if torch.equal(value, second[key])}
    assert {key.partition(".")[0] for key in first.keys() - same} == moved
    assert {key.partition(".")[0] for key in same} == {"laterals", "neck"} | AFTER_NECK - moved


@pytest.mark.parametrize("opt", [*PLAN_A, "model.dynamic_sharing=true", "model.landmark_refinement=true"])
def test_every_other_switch_adds_parameters(opt):
    """Which get gradients (above), so that they take part."""
    plain = [*OFF, "model.landmark_refinement=false"]
    assert parameters(model_of("v2_ultra", *plain, opt)) > parameters(model_of("v2_ultra", *plain))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_a_parameter_or_a_buffer(name):
    """Any other is not trained, not saved and stays behind when the network moves to a device."""
    held = [(path, key, value) for path, m in model_of(name).named_modules() for key, value in vars(m).items()]
    assert not [(path, key) for path, key, value in held if isinstance(value, torch.Tensor)]


def test_stages_that_need_supervision_are_returned_in_training_only():
    model = model_of("v2_ultra_full")
    x = torch.randn(2, 3, 64, 64)
    out = model(x)
    assert out["coarse"]["boxes"].shape == out["boxes"].shape
    assert len(out["paths"]) == model.cfg.bifpn_repeats
    assert all(p["logits"].shape == out["logits"].shape for p in out["paths"])
    assert set(model.eval()(x)) == {"logits", "boxes", "landmarks"}
    assert {"coarse", "paths", "complexity"} <= set(model(x, features=True))
    assert model(x, features=True)["complexity"].shape == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_what_its_images_give_one_by_one(name):
    model = warmed_up(model_of(name))
    x = torch.randn(3, 3, 96, 64) * torch.tensor([1.0, 30.0, 80.0]).view(3, 1, 1, 1)
    with torch.inference_mode():
        together = tensors(model(x, features=True))
        singles = [tensors(model(image[None], features=True)) for image in x]
    for key, value in together.items():
        scale = value.abs().max().clamp(min=1)
        for i, single in enumerate(singles):
            assert (value[i] - single[key][0]).abs().max() / scale < 1e-5, key


def test_training_state_does_not_leak_into_evaluation():
    model = warmed_up(model_of("v2_ultra_full"))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x)["logits"], model(x)["logits"])


@pytest.mark.parametrize("name", ["v2_ultra", "v2_ultra_full"])
def test_trace_agrees_with_eager(name):
    model = warmed_up(model_of(name))
    x = torch.randn(1, 3, 64, 96)
    traced = torch.jit.trace(model, x, strict=False, check_trace=False)
    other = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        for key, value in model(other).items():
            assert torch.allclose(traced(other)[key], value, atol=1e-5), key


def test_export_agrees_with_eager_at_other_sizes():
    model = warmed_up(model_of("v2_ultra", *PLAN_B))
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64), 2: 32 * height, 3: 32 * width}}
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes)
    other = torch.randn(3, 3, 64, 160)
    with torch.inference_mode():
        exported = program.module()(other)
        for key, value in model(other).items():
            assert torch.allclose(exported[key], value, atol=1e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_fused_model_computes_the_same(name):
    model = warmed_up(model_of(name))
    before = copy.deepcopy(model.state_dict())
    fused = fuse_for_inference(model)
    x = torch.randn(1, 3, 75, 101) * 50
    with torch.inference_mode():
        ours, theirs = model(x), fused(x)
    for key, value in ours.items():
        assert (theirs[key] - value).abs().max() < 1e-4 * value.abs().max().clamp(min=1), key
    assert torch.equal(fused.eval()(x)["logits"], theirs["logits"])  # also where nobody switched gradients off
    assert not any(p.requires_grad for p in fused.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    norms = [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not norms or name == "v2_ultra_full"  # plan A shares convolutions between batch norms


def test_landmark_refinement_reads_the_features_at_the_points():
    strides, anchors, variances = (8, 16, 32), ((16, 32), (64, 128), (256,)), (0.1, 0.2)
    module = LandmarkRefinement(2, strides, anchors, variances, hidden=2)
    module.reduce.weight.data, module.reduce.bias.data = torch.eye(2)[..., None, None], torch.zeros(2)
    module.correct.weight.data.zero_()
    for point in range(5):  # moves itself by where it is
        module.correct.weight.data[12 * point : 12 * point + 2, :, 0, 0] = torch.eye(2)
    height, width = 203, 331  # no multiple of a stride: the levels' maps differ in what they cover
    laterals = []
    for stride in strides:  # every cell knows its own x and y
        y, x = ((torch.arange(-(-n // stride)) + 0.5) * stride for n in (height, width))
        laterals.append(torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))])[None].repeat(2, 1, 1, 1))
    priors = make_anchors(height, width, strides, anchors)
    places = torch.rand(2, len(priors), 5, 2) * torch.tensor([width - 60.0, height - 60.0]) + 20
    boxes = torch.randn(2, len(priors), 4)
    points = encode_landmarks(places, priors, variances)
    unit = torch.exp(0.2 * boxes[..., None, 2:]) / 0.1  # the box's sides, encoded
    moved = (points.unflatten(2, (5, 2)) + places * unit).flatten(2)
    expected = torch.where(priors[:, 2:3] >= 64, moved, points)  # those of P4 and P5
    torch.testing.assert_close(module(boxes, points, laterals), expected, atol=0.01, rtol=1e-4)


def test_reading_between_cells_is_grid_sample_with_the_edge_repeated():
    maps = torch.randn(2, 5 * 3, 4, 6)
    places = torch.rand(2, 7, 5, 2) * torch.tensor([9.0, 7.0]) - 2  # inside and beyond every edge
    grid = (places + 0.5) / torch.tensor([6.0, 4.0]) * 2 - 1
    each = maps.unflatten(1, (5, 3)).unbind(1)
    expected = sum(
        F.grid_sample(m, grid[:, :, i : i + 1], padding_mode="border", align_corners=False) for i, m in enumerate(each)
    )
    torch.testing.assert_close(read(maps, places), expected.squeeze(3).transpose(1, 2))


def test_landmark_refinement_teaches_neither_boxes_nor_the_layers_below():
    module = LandmarkRefinement(4, (8, 16, 32), ((64,), (128,), (256,)), (0.1, 0.2))
    laterals = [torch.randn(1, 4, n, n, requires_grad=True) for n in (4, 2, 1)]
    boxes, points = (torch.randn(1, 21, n, requires_grad=True) for n in (4, 10))
    refined = module(boxes, points, laterals)
    assert (refined - points).abs().max() < 0.1  # a new one changes next to nothing
    refined.sum().backward()
    assert points.grad.eq(1).all() and boxes.grad is None and not any(x.grad is not None for x in laterals)
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_box_of_any_size_moves_its_landmarks_by_exp_2_to_exp_minus_2_of_its_anchor(sign):
    module = LandmarkRefinement(2, (8, 16, 32), ((16,), (64,), (256,)), (0.1, 0.2))
    laterals = [torch.randn(1, 2, n, n) for n in (8, 4, 2)]
    points = torch.zeros(1, 84, 10)
    with torch.no_grad():
        far, limit = (module(torch.full((1, 84, 4), sign * v), points, laterals) for v in (100.0, 10.0))
    assert torch.equal(far, limit) and not torch.equal(far, points)


def test_a_landmark_that_is_no_number_reaches_the_loss():
    module = LandmarkRefinement(4, (8, 16, 32), ((16,), (64,), (256,)), (0.1, 0.2))
    points = torch.full((1, 21, 10), torch.nan)
    refined = module(torch.zeros(1, 21, 4), points, [torch.randn(1, 4, n, n) for n in (4, 2, 1)])
    assert refined.isnan().all()


def test_landmark_refinement_keeps_float32_under_autocast():
    model = warmed_up(model_of("v2_ultra"))
    x = torch.randn(1, 3, 64, 64)
    maps, places = torch.randn(2, 50, 4, 6), torch.rand(2, 7, 5, 2) * 4
    expected = read(maps, places)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(x)["landmarks"].dtype == torch.float32
        assert torch.equal(read(maps, places), expected)


@pytest.mark.parametrize("extra", [False, True])
def test_only_the_first_repeat_of_the_bifpn_sees_the_laterals(extra):
    neck = BiFPN([8, 8, 8], 8, 2, extra_laterals=extra).eval()
    with torch.no_grad():
        per_repeat, _ = neck([torch.rand(1, 8, side, side) for side in (16, 8, 4)])
        wanted = neck.repeats[1](per_repeat[0], per_repeat[0][1:])
    assert all(torch.equal(a, b) for a, b in zip(per_repeat[1], wanted, strict=True))


def test_dropblock_ramps_up_in_training_and_is_off_in_evaluation():
    model = model_of("v2_ultra", "model.dropblock=0.4")
    x = torch.randn(2, 3, 96, 96) * 50
    assert model.dropblock.p == 0.0
    model.set_progress(0.5)
    assert model.dropblock.p == pytest.approx(0.2)
    model.set_progress(7)
    assert model.dropblock.p == pytest.approx(0.4)
    frozen = warmed_up(copy.deepcopy(model))
    assert torch.equal(frozen(x)["logits"], frozen(x)["logits"])
    frozen.dropblock.train()
    assert not torch.equal(frozen(x)["logits"], frozen(x)["logits"])
    frozen(x[..., :64, :64])  # P5 is smaller than a block


def test_a_decoded_box_grows_to_exp_4_of_its_anchor_at_most():
    box = decode_boxes(torch.tensor([[0.0, 0.0, 1e4, 1e4]]), torch.tensor([[99.0, 99.0, 16.0, 16.0]]), (0.1, 0.2))[0]
    assert (box[2:] - box[:2]).tolist() == pytest.approx([16 * math.exp(4)] * 2)


def test_anchor_cache_is_bounded_and_stays_out_of_the_state():
    model = model_of("v2")
    first = model.anchors(64, 64)
    assert model.anchors(64, 64) is first
    for side in range(1, 60):
        model.anchors(side, 64)
    assert len(model._anchors._kept) <= 16
    assert not copy.deepcopy(model)._anchors._kept
    assert not any("anchor" in key for key in model.state_dict())


def test_anchors_cached_in_validation_serve_training():
    model = model_of("v2")
    with torch.inference_mode():
        model.anchors(64, 64)
    deltas = torch.zeros(len(model.anchors(64, 64)), 4, requires_grad=True)
    decode_boxes(deltas, model.anchors(64, 64), model.variances).sum().backward()
    assert deltas.grad.abs().sum() > 0


def test_deformable_convolution_starts_as_the_plain_one():
    conv = DeformableConv2d(6, 4, 3, 1, 1, bias=False)
    x = torch.randn(2, 6, 9, 7)
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight, padding=1), atol=1e-5)


def test_deformable_offsets_are_y_then_x():
    conv = DeformableConv2d(1, 1, 1, 1, 0, bias=False)
    conv.weight.data.fill_(1)
    conv.offset.bias.data = torch.tensor([1.0, 0.0])  # one row down
    x = torch.arange(12.0).view(1, 1, 3, 4)
    assert torch.allclose(conv(x)[0, 0, :2], x[0, 0, 1:])


def test_downsample_pads_with_zeros_on_the_side_tensorflow_does():
    x = -torch.ones(1, 1, 4, 5)
    y = downsample(x)[0, 0]
    # height 4: one zero row below; width 5: a zero column left and right
    assert y.tolist() == [[0, -1, 0], [0, 0, 0]]


def test_fusion_normalises_over_unused_weights_too():
    fusion = Fusion(3)
    fusion.weight.data = torch.tensor([1.0, -1.0, 1.0])
    assert torch.allclose(fusion(torch.ones(1), torch.ones(1) * 7), torch.tensor([1 / 2.0001]))


def test_cbam_is_the_product_of_its_gates():
    cbam = CBAM(8, 16).eval()
    x = torch.randn(2, 8, 5, 6)
    channel, spatial = cbam.gates(x)
    assert channel.shape == (2, 8, 1, 1)
    assert spatial.shape == (2, 1, 5, 6)
    assert torch.allclose(cbam(x), x * channel * spatial)


def test_groups_and_shuffle():
    assert largest_groups(28, 14, 8) == 7
    assert largest_groups(32, 8, 4) == 4
    assert largest_groups(5, 7, 8) == 1
    assert channel_shuffle(torch.arange(6.0).view(1, 6, 1, 1), 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_macs_of_the_published_retinaface():
    macs = sum(count_macs(model_of("retinaface_mnet025"), (640, 480)).values())
    assert macs == pytest.approx(0.736e9, rel=0.005)  # as known from the literature


def test_macs_count_deformable_kernels():
    model = model_of("v1")
    macs = count_macs(model, (64, 64))
    conv = model.context[0].conv3.conv
    assert macs["context.0.conv3.conv"] == conv.weight.numel() * 8 * 8
    assert model.training


def test_summary_command(capsys):
    args = ["--config", "v2_ultra", "--size", "64x64"]
    assert main([*args, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["total"] == parameters(model_of("v2_ultra"))
    assert summary["total"] == sum(c["parameters"] for c in summary["components"].values())
    backbone = summary["components"]["backbone"]
    assert (backbone["plan"], backbone["parameters"]) == (213_000, 127_568)
    assert main([*args, "--opts", "model.nonsense=1"]) == 2
    error = capsys.readouterr().err
    assert "nonsense" in error
    assert len(error.splitlines()) == 1


def test_summary_puts_innovations_in_their_own_row():
    rows = {
        c: r["parameters"]
        for c, r in summarize(model_of("v2_ultra_full"), "v2_ultra_full", (64, 64))["components"].items()
    }
    off = [opt.replace("true", "false") for opt in PLAN_A] + OFF
    base = {
        c: r["parameters"]
        for c, r in summarize(model_of("v2_ultra_full", *off), "v2_ultra_full", (64, 64))["components"].items()
    }
    assert base.pop("innovations") == 0
    assert rows.pop("innovations") > 1000
    assert rows == base


def test_config_is_kept_for_checkpoints():
    cfg = ModelConfig(out_channels=16)
    assert build_model(cfg).cfg == cfg


def test_cbam_formula():
    cbam, x = CBAM(8, 2).eval(), torch.randn(2, 8, 9, 7)
    for p in cbam.parameters():
        nn.init.normal_(p)
    nn.init.normal_(cbam.bn.running_mean)

    def mlp(pooled):
        return cbam.excite(F.relu(cbam.squeeze(pooled)))

    channel, spatial = cbam.gates(x)
    torch.testing.assert_close(channel[..., 0, 0], torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3)))))
    seen = x * channel
    planes = torch.stack([seen.amax(1), seen.mean(1)], 1)
    torch.testing.assert_close(spatial, torch.sigmoid(cbam.bn(cbam.spatial(planes))))
    out, shown = ResidualCBAM(cbam).with_map(x)
    torch.testing.assert_close(out, F.relu(seen * spatial + x))
    assert torch.equal(shown, spatial)


@pytest.mark.parametrize("seed", range(8))
def test_a_channel_gate_of_one_hidden_unit_starts_alive(seed):
    torch.manual_seed(seed)
    cbam = CBAM(8, 16)
    cbam(torch.rand(2, 8, 5, 6)).sum().backward()
    assert cbam.squeeze.weight.grad.abs().sum() > 0


def test_landmark_refinement_rectifies_its_features():
    module = LandmarkRefinement(2, (8, 16, 32), ((16,), (64,), (256,)), (0.1, 0.2))
    nn.init.zeros_(module.reduce.weight)
    boxes, points, laterals = (
        torch.randn(1, 84, 4),
        torch.randn(1, 84, 10),
        [torch.randn(1, 2, n, n) for n in (8, 4, 2)],
    )
    nn.init.constant_(module.reduce.bias, -1.0)
    assert torch.equal(module(boxes, points, laterals), points)
    nn.init.constant_(module.reduce.bias, 1.0)
    assert not torch.equal(module(boxes, points, laterals), points)


def test_a_landmark_that_is_no_number_is_no_index():
    module = LandmarkRefinement(4, (8, 16, 32), ((16,), (64,), (256,)), (0.1, 0.2))
    points = torch.zeros(1, 38, 10)
    points[:, 25:] = torch.nan
    refined = module(torch.zeros(1, 38, 4), points, [torch.randn(1, 4, n, n) for n in (5, 3, 2)])
    assert refined[:, 25:].isnan().all()
