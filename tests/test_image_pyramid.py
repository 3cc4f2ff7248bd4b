"""The two looks of a pyramid: which anchors count where, that values stay those of the network, and its exports."""

import copy
import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch.nn import functional as F

import detect
import export
import test_widerface
from data.preprocess import normalise, pad_to_stride
from layers.teachers_onnx import OnnxTeacher
from models import FaceDetector
from models.detector import BATCH_PIXELS
from models.featherface import build_model
from models.image_pyramid import Factors, ImagePyramid, Look, parse_pyramid
from utils.checkpoint import CheckpointError, inference_content, save_checkpoint
from utils.config import ConfigError, ModelConfig, load_config
from utils.contenders import our_rows
from utils.image import read_image, resize
from utils.onnx_backend import OnnxNetwork, read_info
from utils.onnx_export import describe, export_raw, write
from utils.weights import WEIGHTS, WEIGHTS_DIR

SHIPPED = WEIGHTS_DIR / WEIGHTS["v2_ultra"]
SIZES = [(96, 160), (97, 61), (33, 128), (1, 40)]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return build_model(load_config("v2_ultra").model).eval()


@pytest.fixture(scope="module")
def photo():
    return get_sample_data("grace_hopper.jpg", asfileobj=False)


def gate(network, at):
    """Shift the class biases of the finest level, so that the surest small anchor of anything scores about ``at``."""
    with torch.no_grad():
        network.heads.classes[0].bias.fill_(np.log(at / (1 - at)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factors", [(1, 1.25), (1, 2), (0.75, 1.2), (0.5, 1.5)])
@pytest.mark.parametrize("always", [False, True])
def test_outputs_are_the_networks_own_for_the_sizes_that_count(network, size, factors, always):
    gate(network, 0.9)  # small faces everywhere: every picture is looked at again
    pyramid, images = ImagePyramid(network, "+".join(map(str, factors)), always), torch.randn(2, 3, *size) * 50

    def look(factor):
        """The network's own outputs and anchors of the picture at that size, and the way back to the picture."""
        round_off = math.ceil if factor < 1 else math.floor
        height, width = (round_off(round(side * factor, 6)) for side in size)
        fitted = -(-height // 32) * 32, -(-width // 32) * 32
        view = F.interpolate(images, (height, width), mode="bilinear")
        view = F.pad(view, (0, fitted[1] - width, 0, fitted[0] - height))
        if factor == 1:
            view, fitted = images, size
        return network(view), network.anchors(*fitted), torch.tensor([size[1] / width, size[0] / height] * 2)

    with torch.no_grad():
        found = pyramid(images)
        (coarse, far, far_back), (fine, near, near_back) = map(look, factors)
    small, rest = (near[:, 2] <= 128) & (near[:, 2] >= 8 * factors[1]), far[:, 2] >= 64
    anchors, split = pyramid.anchors(*size), int(small.sum())
    assert split and anchors.shape == (split + len(far), 4)
    assert all(len(value[0]) == len(anchors) for value in found.values())
    for key in ("logits", "boxes", "landmarks"):
        torch.testing.assert_close(found[key][:, :split], fine[key][:, small])
        torch.testing.assert_close(found[key][:, split:][:, rest], coarse[key][:, rest])
    assert (found["logits"][:, split:][:, ~rest] == -torch.inf).all()  # no face is found twice
    torch.testing.assert_close(anchors[:split], near[small] * near_back)
    torch.testing.assert_close(anchors[split:], far * far_back)


@pytest.mark.parametrize("pyramid", ["1.5", "0.75+1.2"])
def test_boxes_come_back_to_the_picture(network, pyramid):
    """Zero deltas are the anchors themselves: each look's cover the whole picture, and not much more."""
    anchors = ImagePyramid(network, pyramid).anchors(480, 640)
    corners = anchors[:, :2].amin(0), anchors[:, :2].amax(0)
    assert (corners[0] > 0).all() and (corners[0] < 8).all()
    assert (corners[1] > torch.tensor([632, 472])).all() and (corners[1] < torch.tensor([700, 540])).all()


@pytest.mark.parametrize("factors", ["1.5", "0.75+1.2"])
@pytest.mark.parametrize("always", [False, True])
def test_pictures_without_small_faces_keep_to_the_first_look(network, always, factors):
    pyramid, images = ImagePyramid(network, factors, always), torch.randn(3, 3, 64, 96) * 50
    seen = []
    handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    gate(network, 0.03)
    with torch.no_grad():
        found, plain = pyramid(images), network(pyramid.looks.first.view(images))
        seen.clear()
        pyramid(images)
    first, second = {"1.5": ((64, 96), (96, 160)), "0.75+1.2": ((64, 96), (96, 128))}[factors]
    assert seen == [(3, 3, *first)] + [(3, 3, *second)] * always
    split = len(found["logits"][0]) - len(plain["logits"][0])
    assert (found["logits"][:, :split] == -torch.inf).all()
    for key in ("logits", "boxes", "landmarks"):
        assert torch.equal(found[key][:, split:], plain[key])
    handle.remove()


@pytest.mark.parametrize("factors", ["1.5", "0.75+1.2"])
def test_each_picture_of_a_batch_decides_for_itself(network, factors):
    class OneFace(torch.nn.Module):
        cfg = network.cfg

        def forward(self, images):
            """A small face in the last picture only: the one that is brighter."""
            out = network(images)
            bright = images.mean((1, 2, 3)) > 50
            out["logits"] = torch.where(bright[:, None], 2.0, -5.0).expand_as(out["logits"])
            return out

    images = torch.zeros(3, 3, 64, 64)
    images[2] += 100
    with torch.no_grad():
        pyramid = ImagePyramid(OneFace(), factors)
        together, alone = pyramid(images), [pyramid(images[i : i + 1]) for i in range(3)]
        always = ImagePyramid(OneFace(), factors, always=True)(images)
    for i, one in enumerate(alone):
        assert torch.equal(together["logits"][i], one["logits"][0])
        assert torch.equal(together["logits"][i], always["logits"][i])
        counts = one["logits"][0] > -torch.inf
        torch.testing.assert_close(together["boxes"][i][counts], one["boxes"][0][counts])
    split = len(pyramid.anchors(64, 64)) - len(network.anchors(64, 64))  # 48 x 48 is padded to 64 x 64
    assert [bool((one["logits"][0, :split] > -9).any()) for one in alone] == [False, False, True]


@pytest.mark.parametrize(("small", "large", "again"), [(0.09, 0.9, False), (0.11, 0.01, True)])
def test_a_small_face_is_seen_from_a_tenth_on(network, small, large, again):
    class Sure(torch.nn.Module):
        """Every small anchor of the first look scores ``small``, all others ``large``."""

        cfg = network.cfg

        def forward(self, images):
            out = network(images)
            score = torch.where(network.anchors(*images.shape[-2:])[:, 2] < 64, small, large)
            return {**out, "logits": score.logit().expand_as(out["logits"])}

    pyramid = ImagePyramid(Sure(), 1.5)
    with torch.no_grad():
        logits = pyramid(torch.zeros(1, 3, 64, 64))["logits"]
    second = logits.shape[1] - len(network.anchors(64, 64))
    assert bool((logits[:, :second] > -torch.inf).all()) == again


def test_anchor_sizes():
    def sizes(name, factor):
        network = build_model(load_config(name).model)
        own, all_ = network.anchors(320, 320), ImagePyramid(network, factor).anchors(320, 320)
        return sorted({round(side, 1) for side in all_[: len(all_) - len(own), 2].tolist()})

    assert sizes("v2_ultra", 1.5) == [10.7, 21.3, 42.7, 85.3]
    assert sizes("v2_ultra", 2) == sizes("v1", 2) == [8, 16, 32, 64]


def test_anchors_that_do_not_split_by_level():
    config = load_config("v2_ultra", ["model.anchors=[[8,16,64],[64,128],[256,512]]"])
    with pytest.raises(ConfigError, match="finest level"):
        ImagePyramid(build_model(config.model), 1.5)


def test_factors_as_text():
    assert Factors.parse(1.5) == Factors.parse("1.5") == Factors.parse("1+1.5") == Factors(1, 1.5)
    assert Factors.parse("0.75+1.2") == Factors.parse(Factors(0.75, 1.2)) == Factors.parse((0.75, 1.2)) == (0.75, 1.2)
    assert Factors.parse("0.7501+1.999") == (0.75, 2)  # what an exported file says of itself is all there is
    assert all(parse_pyramid(nothing) is None for nothing in (None, "", "0", "0.0", 0, 0.0))
    assert parse_pyramid(1.5) == parse_pyramid("1.5") == (1, 1.5)
    assert [str(Factors(*f)) for f in ((1, 1.5), (0.75, 1.2))] == ["1.5", "0.75+1.2"]


@pytest.mark.parametrize(
    "factor", [1, 1.1, 0.5, -2, 4.1, float("nan"), "0.4+1.5", "1.1+1.5", "nan+2", "1+1+2", "+2", Factors(2, 3)]
)
def test_factors_out_of_range(network, factor):
    with pytest.raises(ConfigError, match="must be"):
        ImagePyramid(network, factor)
    with pytest.raises(ConfigError, match="must be"):
        FaceDetector(network, "cpu", pyramid=factor)


@pytest.mark.parametrize("value", ["1", "0.9", "5", "much", "nan", "1+", "0.3+1.5"])
def test_command_line_factors(value, capsys):
    with pytest.raises(SystemExit) as stopped:
        detect.main(["photo.jpg", "--pyramid", value])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--pyramid" in last and "must be a factor of 1.2 to 4, as 1.5, or two" in last and f"got '{value}'" in last


def sizes_seen(network):
    shapes = []
    network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[2:])))
    return shapes


def test_memory_stays_bounded(network, caplog):
    network = copy.deepcopy(network)
    gate(network, 0.9)
    shapes = sizes_seen(network)
    shrunk = FaceDetector(network, "cpu", pyramid="0.5+2", max_side=900)
    shrunk(np.zeros((100, 400, 3), np.uint8), scale="original")
    assert shapes == [(64, 224), (256, 832)]
    shapes.clear()
    shrunk(np.zeros((480, 480, 3), np.uint8), scale="original")
    assert shapes == [(480, 480)]  # one look, at full size
    shapes.clear()
    detector = FaceDetector(network, "cpu", pyramid=2, max_side=900)
    detector(np.zeros((100, 400, 3), np.uint8), scale="original")
    assert shapes == [(128, 416), (256, 832)]
    shapes.clear()
    detector([np.zeros((480, 480, 3), np.uint8)] * 2, scale="original")  # twice that is too large: one look, not shrunk
    detector(np.zeros((480, 480, 3), np.uint8), scale="original")
    assert shapes == [(480, 480)] * 2
    told = [r.message for r in caplog.records]
    assert told == ["views of more than 450 x 450 px are looked at once, not twice"] * 2  # once per detector
    parts = list(detector._parts([None] * 16, (2048, 2048)))
    assert all(len(p) * 2048 * 2048 * 4 <= BATCH_PIXELS for p in parts)
    assert detector.top_k == 2 * FaceDetector(network, "cpu").top_k  # of each look


def test_detectors_go_to_other_processes(network):
    detector = FaceDetector(network, "cpu", 0.1, pyramid=1.5)
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    for a, b in zip(detector(image), pickle.loads(pickle.dumps(detector))(image)):
        np.testing.assert_array_equal(a, b)


def test_memory_of_an_exported_pyramid_stays_bounded(network):
    """It cannot be told to look once."""

    class Exported:
        cfg, pyramid = network.cfg, parse_pyramid(2)
        anchors = ImagePyramid(network, 2).anchors
        sizes: list[tuple[int, ...]] = []

        def __call__(self, images):
            self.sizes.append(tuple(images.shape[2:]))
            return ImagePyramid(network, self.pyramid)(images)

    detector = FaceDetector(Exported(), "cpu", max_side=900)
    for height, width in ((400, 400), (480, 480), (100, 1200), (300, 1200)):
        detector(np.zeros((height, width, 3), np.uint8), scale="original")
    assert Exported.sizes == [(416, 416), (480, 480), (128, 1216), (256, 928)]  # 480 px become 450, 1,200 become 900


def test_a_network_switched_to_training_is_switched_back(network):
    network = copy.deepcopy(network)
    detector = FaceDetector(network, "cpu", pyramid=1.5)
    network.train()
    detector(np.zeros((64, 64, 3), np.uint8))
    assert not any(m.training for m in detector.network.modules())


def test_commands_look_twice(network, photo, tmp_path, monkeypatch, capsys):
    network = copy.deepcopy(network)
    gate(network, 0.9)
    save_checkpoint(tmp_path / "n.pth", inference_content("n", network.cfg, network.state_dict()))
    shapes, build = [], ImagePyramid.__init__

    def watched(self, inner, *args, **kwargs):
        build(self, inner, *args, **kwargs)
        shapes.append(sizes_seen(inner))

    monkeypatch.setattr(ImagePyramid, "__init__", watched)
    event = tmp_path / "images" / "0--Parade"
    event.mkdir(parents=True)
    picture = resize(read_image(photo), 90, 120)
    for path in (tmp_path / "a.png", event / "a.jpg"):
        Image.fromarray(picture).save(path)
    (tmp_path / "list.txt").write_text("0--Parade/a.jpg\n")
    common = ["--weights", str(tmp_path / "n.pth"), "--device", "cpu", "--pyramid", "1.5"]
    assert detect.main([*common, str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 0
    output = ["--images", str(tmp_path / "images"), "--list", str(tmp_path / "list.txt"), "--out", str(tmp_path / "p")]
    (tmp_path / "label.txt").write_text("# 0--Parade/a.jpg\n30 20 50 60\n")
    assert test_widerface.main([*common, *output, "--labels", str(tmp_path / "label.txt"), "--json"]) == 0
    assert shapes == [[(96, 128), (160, 192)]] * 2  # 144 x 192, padded
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pyramid"] == "1.5"
    for last, said in ((["--pyramid", "0.75+1.2"], "0.75+1.2"), (["--pyramid", "0.0"], None)):
        assert test_widerface.main([*common, *last, *output, "--labels", str(tmp_path / "label.txt"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["pyramid"] == said


@pytest.mark.parametrize("value", [1.5, "1.5", "0.75+1.2", 0, 0.0, "", None, "abc", 9])
def test_what_an_exported_file_says_of_its_pyramid(network, tmp_path, value):
    proto = export_raw(network)
    describe(proto, network.cfg, "n", form="raw", precision="fp32", pyramid=value)
    write(tmp_path / "n.onnx", proto.SerializeToString())
    if value in ("abc", 9):
        with pytest.raises(CheckpointError, match=f"n.onnx: its architecture cannot be read.*'{value}'"):
            OnnxNetwork(tmp_path / "n.onnx")
    else:
        assert OnnxNetwork(tmp_path / "n.onnx").pyramid == parse_pyramid(value)


def test_an_unreadable_file_beside_a_checkpoint_is_no_hindrance(network, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "n.pth", inference_content("n", network.cfg, network.state_dict()))
    (tmp_path / "n.onnx").write_bytes(b"no graph")
    with caplog.at_level("WARNING", "featherface"):
        detector = FaceDetector.from_pretrained(tmp_path / "n.pth", backend="onnx")
    assert detector.pyramid is None and "n.onnx" in caplog.text and "anew" in caplog.text


def test_benchmark_rows(tmp_path):
    plain, twice = (our_rows(n, ["torch"], (160, 96), tmp_path)[0] for n in ("config:v2_ultra", "config:v2_ultra@1.5"))
    assert twice.model == "v2_ultra (random), pyramid 1.5" and twice.parameters == plain.parameters
    assert 3.2 < twice.macs / plain.macs < 3.7  # 3.25 and padding
    runner = twice.load(1)
    assert isinstance(runner.detector.network, ImagePyramid)
    assert runner.network(torch.zeros(1, 3, 96, 160))["logits"].shape[1] == len(
        runner.detector.network.anchors(96, 160)
    )
    for name in ("config:v2_ultra@9", "x.onnx@1.5"):
        with pytest.raises(ConfigError):
            our_rows(name, ["torch"], (160, 96), tmp_path)


@pytest.mark.skipif(not SHIPPED.is_file(), reason="V2 Ultra is not trained yet")
def test_shipped_weights_find_small_faces_better(photo):
    plain = FaceDetector.from_pretrained("v2_ultra", "cpu")
    twice = FaceDetector.from_pretrained("v2_ultra", "cpu", pyramid=1.5)
    one = plain(photo)
    same = twice(photo)
    assert len(one.boxes) == 1
    for a, b in zip(one, same):  # a portrait has no small face, so the first look is all
        np.testing.assert_array_equal(a, b)
    picture = read_image(photo)
    tiny = np.full((256, 256, 3), 110, np.uint8)
    height, width = 40, 34  # of the photo; the face is then 12 px high
    tiny[100 : 100 + height, 90 : 90 + width] = resize(picture, height, width)
    assert twice(tiny, score=0.02).scores[0] > plain(tiny, score=0.02).scores[0]


@pytest.mark.skipif(not SHIPPED.is_file(), reason="V2 Ultra is not trained yet")
@pytest.mark.parametrize("pyramid", ["1.5", "0.75+1.2"])
def test_exports_have_both_looks(photo, tmp_path, capsys, pyramid):
    command = ["--weights", "v2_ultra", "--out", str(tmp_path), "--pyramid", pyramid, "--form", "both", "--json"]
    assert export.main(command) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ok"] and len(report["files"]) == 2
    path = tmp_path / f"featherface_v2_ultra_pyramid{pyramid}.onnx"
    network = OnnxNetwork(path)
    assert read_info(network.session, path)["pyramid"] == pyramid
    crowd = np.tile(resize(read_image(photo), 80, 70), (4, 5, 1))
    exported, ours = FaceDetector(network, "cpu"), FaceDetector.from_pretrained("v2_ultra", "cpu", pyramid=pyramid)
    for picture, faces in ((photo, 1), (crowd, 20)):
        found, expected = exported(picture), ours(picture)
        assert len(found.boxes) == faces
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.05)
        np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=0.05)
    raw = network(pad_to_stride(normalise(torch.from_numpy(crowd).permute(2, 0, 1)[None])))
    second = raw["logits"].shape[1] - len(ours.network.looks.first.anchors(320, 352))
    assert (raw["logits"].topk(20).indices < second).all()  # small faces: the second look's
    assert exported.pyramid == ours.pyramid and exported.top_k == ours.top_k
    capsys.readouterr()
    assert detect.main([photo, "--weights", str(path), "--pyramid", "2"]) == 2
    assert capsys.readouterr().err == "detect.py: --pyramid: this network has a pyramid inside already\n"
    with pytest.raises(CheckpointError, match="exported without --pyramid"):
        OnnxTeacher(path)
    shutil.copy(SHIPPED, tmp_path / "copy.pth")
    shutil.copy(path, tmp_path / "copy.onnx")  # made of it, but not what was asked for
    assert FaceDetector.from_pretrained(tmp_path / "copy.pth", backend="onnx").pyramid is None
    for flag in ("--features", "--torch-export"):
        assert (
            export.main(["--weights", "v2_ultra", "--out", str(tmp_path), "--pyramid", "2", "--form", "raw", flag]) == 2
        )


def test_a_view_rounded_differently_along_its_sides_is_scaled_back_along_each():
    """77 x 202 px seen at 0.75 are 58 x 152: the one side is rounded up, the other by half as much of itself."""
    cfg = ModelConfig()
    look = Look(cfg, 0.75)
    tall, wide = look.size(77, 202)
    assert (tall, wide) == (58, 152)
    first = look.anchors(77, 202)[0]
    half, side = cfg.strides[0] / 2, cfg.anchors[0][0]
    across, down = 202 / wide, 77 / tall
    assert first.tolist() == pytest.approx([half * across, half * down, side * across, side * down])


def test_second_looks_come_back_to_their_own_pictures(network):
    """Two of three are looked at again, and differ."""

    class Sure(torch.nn.Module):
        cfg = network.cfg

        def forward(self, images):
            bright = images.mean((1, 2, 3)) > 50
            out = network(images)
            return {**out, "logits": torch.where(bright[:, None], 2.0, -5.0).expand_as(out["logits"])}

    images = torch.rand(3, 3, 64, 64) * 50 + torch.tensor([75.0, 0, 150]).view(3, 1, 1, 1)
    with torch.no_grad():
        pyramid = ImagePyramid(Sure(), 1.5)
        together, alone = pyramid(images), [pyramid(images[i : i + 1]) for i in range(3)]
    assert not torch.equal(alone[0]["boxes"], alone[2]["boxes"])
    for i, one in enumerate(alone):
        torch.testing.assert_close(together["boxes"][i], one["boxes"][0], atol=1e-4, rtol=1e-4)
