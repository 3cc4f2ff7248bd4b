"""P2: its place among the anchors, what it sees, that it alone learns, and the enlarged look as its teacher."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from matplotlib.cbook import get_sample_data
from torch import nn

import export
from layers.distillation import ProgressiveDistillation
from layers.teachers import Teacher
from models import FaceDetector
from models.featherface import build_model
from models.fine_level import enlarge, full_resolution
from models.fuse import fold_norms, fuse_for_inference
from models.image_pyramid import ImagePyramid
from tests.test_distillation import EXTRA, make_batch, one_stage
from tests.test_distillation import FINE as UNREFINED
from utils.calibrate import kinds_of, shift_biases
from utils.config import ConfigError, ModelConfig, load_config
from utils.image import read_image, resize
from utils.weights import WEIGHTS, WEIGHTS_DIR

SHIPPED = WEIGHTS_DIR / WEIGHTS["v2_ultra_fine"]

FINE = replace(UNREFINED, landmark_refinement=True)


def network(cfg: ModelConfig, seed: int = 0) -> nn.Module:
    """With batch norm statistics of its own, in eval mode."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 96, 96) * 50)
    return model.eval()


@pytest.mark.parametrize("size", [(64, 96), (75, 101), (33, 40)])
def test_p2_comes_first_and_the_other_levels_stay_as_they_are(size):
    model = network(FINE)
    images = torch.randn(2, 3, *size) * 50
    count = -(-size[0] // 4) * -(-size[1] // 4) * 2
    with torch.no_grad():
        found, alone = model(images), model.heads_alone(images)
        model.fine_level = None
        plain = model(images)
    anchors = model.anchors(*size)
    assert anchors.shape == (found["logits"].shape[1], 4)
    assert anchors[:count, 2].unique().tolist() == [8, 16] and anchors[:2, 0].tolist() == [2, 2]
    for key, channels in (("boxes", 4), ("landmarks", 10)):
        assert found[key].shape == (2, len(anchors), channels)
    assert all(torch.equal(found[key][:, count:], plain[key]) for key in plain)
    assert all(torch.equal(alone[key], plain[key]) for key in ("logits", "boxes"))
    assert not torch.equal(alone["landmarks"], plain["landmarks"])  # without the refinement


def test_p2_sees_the_detail_at_its_place_and_what_lies_around():
    level = network(FINE).fine_level
    images, context = torch.zeros(1, 3, 64, 64), torch.zeros(1, 8, 8, 8)
    stage1 = network(FINE).backbone.stage1
    with torch.no_grad():
        before = level(stage1, images, context)["logits"].view(16, 16, 2)
        images[..., 20:24, 40:44] = 100
        moved = level(stage1, images, context)["logits"].view(16, 16, 2) != before
        assert moved[5, 10].all() and not moved[:, :4].any()
        context[..., 6, 6] = 5
        around = level(stage1, torch.zeros(1, 3, 64, 64), context)["logits"].view(16, 16, 2) != before
    assert around[12:14, 12:14].all() and not around[:10].any()  # and the 3x3 around


@pytest.mark.parametrize("size", [(32, 48), (33, 31)])
@pytest.mark.parametrize("folded", [False, True])
def test_the_first_stage_at_full_resolution_is_that_of_the_enlarged_picture(size, folded):
    model = network(FINE)
    stage1 = (fuse_for_inference(model) if folded else model).backbone.stage1
    images = torch.randn(2, 3, *size) * 50
    with torch.no_grad():
        found, expected = full_resolution(stage1[0], images), stage1[0](enlarge(images))
        whole = stage1[1:](found)
    assert found.shape == expected.shape == (2, 8, *size)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-3, rtol=1e-4)
    assert whole.shape == (2, 64, -(-size[0] // 4), -(-size[1] // 4))


def test_p2_teaches_the_neck_nothing():
    model = network(FINE).train()
    out = model(torch.randn(2, 3, 64, 64) * 50)
    out["logits"][:, : 16 * 16 * 2].sum().backward()
    learns = {name.split(".0")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.partition(".")[0] for name in learns} == {"backbone", "fine_level"}
    assert not any(name.startswith(("backbone.stage2", "backbone.stage3")) for name in learns)


def test_folded_norms_are_the_same_network_with_fewer_parameters():
    model = network(FINE)
    folded = build_model(replace(FINE, fold_norms=True)).eval()
    state = fold_norms(copy.deepcopy(model)).state_dict()
    own = {k: v for k, v in model.state_dict().items() if k.startswith("fine_level.")}  # P2 keeps its norms
    folded.load_state_dict({k: v for k, v in state.items() if not k.startswith("fine_level.")} | own)
    assert any(isinstance(m, nn.BatchNorm2d) for m in folded.fine_level.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for n, m in folded.named_modules() if not n.startswith("fine_level"))
    counts = [sum(p.numel() for p in m.parameters()) for m in (folded, model)]
    assert counts[0] < counts[1]
    images = torch.randn(1, 3, 64, 96) * 50
    with torch.no_grad():
        ours, theirs, fused = (m(images) for m in (folded, model, fuse_for_inference(folded)))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(fused[key], value, atol=1e-3, rtol=1e-4)


def test_the_enlarged_look_is_a_teacher_on_p2s_own_anchors():
    model, batch = network(FINE), make_batch()
    distiller = ProgressiveDistillation(one_stage(terms=["enlarged"]), FINE)
    with torch.no_grad():
        for conv in model.heads.classes:
            conv.bias += 4  # faces to copy the boxes of
        out, seen = model(batch["images"]), model.heads_alone(enlarge(batch["images"]))
    count = 16 * 16 * 3  # P3 of 128 px
    first = {k: v[:, :count].unflatten(1, (-1, 3))[:, :, 1:].flatten(1, 2) for k, v in seen.items()}  # 16 and 32 px
    assert seen["logits"].shape[1] > count and (first["logits"].sigmoid() > 0.3).any()
    same = {k: torch.cat([first[k], out[k][:, first[k].shape[1] :]], 1) for k in first}
    term = distiller(same, batch, 0.5, ema_model=model)[0]["enlarged"]
    assert term.abs() < 1e-6
    student = network(FINE, seed=1).train()
    losses, alpha = distiller(student(batch["images"]), batch, 0.5, ema_model=model)
    assert alpha == 0.7 and losses["enlarged"] > 0.01
    losses["total"].backward()
    learns = {n.split(".")[0] for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {"backbone", "fine_level"} and not any(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="needs ema_model"):
        distiller(same, batch, 0.5)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["model.fine_channels=8"], r"'strides' must be \[4, 8, 16, 32\], the strides of the backbone and P2"),
        (["model.strides=[4,8,16,32]"], r"'strides' must be \[8, 16, 32\]"),
        (["model.fine_channels=-1"], r"'fine_channels' must be >= 0"),
    ],
)
def test_a_config_that_does_not_fit_together_is_one_line(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config("v2_ultra", opts)


@pytest.mark.parametrize("key", ["cascade_refinement", "multipath"])
def test_p2_refuses_what_it_takes_no_part_in(key):
    with pytest.raises(ConfigError, match=rf"P2 does not take part in {key}"):
        load_config("v2_ultra_fine", [f"model.{key}=true"])


def test_a_teaching_that_cannot_be_is_one_line():
    enlarged = one_stage(terms=["enlarged"])
    with pytest.raises(ConfigError, match=r"'enlarged' teaches P2: needs model\.fine_channels"):
        ProgressiveDistillation(enlarged, EXTRA)
    lacking = replace(FINE, anchors=[[8, 24], *FINE.neck_anchors])
    with pytest.raises(ConfigError, match="P3 needs anchors of 48 px, twice P2's"):
        ProgressiveDistillation(enlarged, lacking)
    with pytest.raises(ConfigError, match="'dense' cannot teach what a teacher's P2 says"):
        ProgressiveDistillation(one_stage(terms=["dense"]), EXTRA, [Teacher(network(FINE), FINE)])


def test_offsets_reach_p2s_own_heads():
    model = network(FINE)
    state, images = model.state_dict(), torch.randn(1, 3, 64, 96) * 50
    with torch.no_grad():
        before = model(images)["logits"][0]
        offsets = torch.arange(9.0) / 4
        shift_biases(state, FINE, offsets.numpy())
        model.load_state_dict(state)
        moved = model(images)["logits"][0] - before
    torch.testing.assert_close(moved, offsets[kinds_of(FINE, 64, 96)], atol=1e-4, rtol=0)


def test_a_pyramid_counts_p2_among_the_finest_levels():
    model = network(FINE)
    pyramid, images = ImagePyramid(model, 1.5, always=True), torch.randn(1, 3, 64, 96) * 50
    with torch.no_grad():
        model.fine_level.heads.classes[0].bias.fill_(2.0)  # small faces everywhere
        found, plain = pyramid(images), model(images)
    anchors = pyramid.anchors(64, 96)
    assert anchors.shape == (found["logits"].shape[1], 4)
    small = model.anchors(64, 96)[:, 2] < 64
    own = found["logits"][0, -len(small) :]
    assert own[small].eq(-torch.inf).all() and torch.equal(own[~small], plain["logits"][0, ~small])
    near = anchors[: -len(small)]
    assert near[:, 2].unique().tolist() == pytest.approx([16 / 1.5, 32 / 1.5, 64 / 1.5, 128 / 1.5])
    assert (near[:, 2] < 11).sum() == 24 * 40 + 12 * 20  # 16 px of P2 and of P3, padded to 96 x 160


@pytest.mark.skipif(not SHIPPED.is_file(), reason="V2 Ultra fine is not trained yet")
def test_shipped_weights_are_v2_ultras_but_for_small_faces():
    photo = read_image(get_sample_data("grace_hopper.jpg", asfileobj=False))
    plain, fine = (FaceDetector.from_pretrained(name, "cpu") for name in ("v2_ultra", "v2_ultra_fine"))
    for a, b in zip(plain(photo), fine(photo)):
        np.testing.assert_allclose(a, b, atol=1e-3)
    for height, gain in ((24, 0.1), (30, 0.1), (42, 0.0)):  # of the photo; the face has 0.4 of it
        tiny = np.full((256, 256, 3), 127, np.uint8)
        tiny[100 : 100 + height, 100 : 100 + height * 5 // 6] = resize(photo, height, height * 5 // 6)
        assert fine(tiny, score=0.02).scores[0] > plain(tiny, score=0.02).scores[0] + gain


@pytest.mark.skipif(not SHIPPED.is_file(), reason="V2 Ultra fine is not trained yet")
def test_exports_agree_and_have_the_kernel_ready(tmp_path, capsys):
    assert export.main(["--weights", "v2_ultra_fine", "--out", str(tmp_path), "--form", "both", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"]
    graph = onnx.load(tmp_path / "featherface_v2_ultra_fine.onnx").graph
    constant = {tensor.name for tensor in graph.initializer}
    assert all(node.input[1] in constant for node in graph.node if node.op_type == "Conv")
