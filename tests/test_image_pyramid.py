"""The enlarged second look: which anchors count where, that values stay those of the network, and its exports."""

import json

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from torch.nn import functional as F
from torchvision.ops import box_iou

import detect
import export
from models import FaceDetector
from models.detector import BATCH_PIXELS
from models.featherface import build_model
from models.image_pyramid import ImagePyramid
from utils.config import load_config
from utils.image import read_image, resize
from utils.onnx_backend import OnnxNetwork, read_info
from utils.weights import WEIGHTS, WEIGHTS_DIR

SHIPPED = WEIGHTS_DIR / WEIGHTS["v2_ultra"]
SIZES = [(96, 160), (97, 61), (33, 128)]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return build_model(load_config("v2_ultra").model).eval()


@pytest.fixture(scope="module")
def photo():
    return get_sample_data("grace_hopper.jpg", asfileobj=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1.25, 1.5, 2])
def test_outputs_are_the_networks_own_for_the_sizes_that_count(network, size, factor):
    pyramid, images = ImagePyramid(network, factor), torch.randn(2, 3, *size) * 50
    large = int(size[0] * factor), int(size[1] * factor)
    with torch.no_grad():
        found = pyramid(images)
        plain = network(images)
        fine = network(F.interpolate(images, large, mode="bilinear"))
    near, far = network.anchors(*large), network.anchors(*size)
    small, rest = (near[:, 2] <= 128) & (near[:, 2] >= 8 * factor), far[:, 2] >= 64
    anchors = pyramid.anchors(*size)
    assert anchors.shape == (int(small.sum() + rest.sum()), 4)
    split = int(small.sum())
    assert split and int(rest.sum())
    for key in ("logits", "boxes", "landmarks"):
        assert torch.equal(found[key][:, :split], fine[key][:, small])
        assert torch.equal(found[key][:, split:], plain[key][:, rest])
    assert torch.equal(anchors[split:], far[rest])
    back = torch.tensor([size[1] / large[1], size[0] / large[0]] * 2)
    torch.testing.assert_close(anchors[:split], near[small] * back)


def test_anchor_sizes():
    network = build_model(load_config("v2_ultra").model)
    sides = {
        f: sorted({round(s, 1) for s in ImagePyramid(network, f).anchors(320, 320)[:, 2].tolist()}) for f in (1.5, 2)
    }
    assert sides[1.5] == [10.7, 21.3, 42.7, 64, 85.3, 128, 256, 512]
    assert sides[2] == [8, 16, 32, 64, 128, 256, 512]
    v1 = ImagePyramid(build_model(load_config("v1").model), 2)
    assert sorted(set(v1.anchors(64, 64)[:, 2].tolist())) == [8, 16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize("factor", [1, 0.5, -2, 4.1, float("nan")])
def test_factors_out_of_range(network, factor):
    with pytest.raises(ValueError, match="pyramid must be above 1"):
        ImagePyramid(network, factor)
    with pytest.raises(ValueError, match="pyramid must be above 1"):
        FaceDetector(network, "cpu", pyramid=factor)


@pytest.mark.parametrize("value", ["1", "0.9", "5", "much", "nan"])
def test_command_line_factors(value, capsys):
    with pytest.raises(SystemExit) as stopped:
        detect.main(["photo.jpg", "--pyramid", value])
    assert stopped.value.code == 2
    assert "--pyramid" in capsys.readouterr().err


def test_memory_stays_bounded(network):
    detector = FaceDetector(network, "cpu", pyramid=2, max_side=800)
    shapes = []
    detector.network.network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[2:])))
    detector(np.zeros((300, 1200, 3), np.uint8), scale="original")
    assert shapes == [(256, 832), (128, 416)]  # 400 px long, padded; twice that
    parts = list(detector._parts([None] * 16, (2048, 2048)))
    assert all(len(p) * 2048 * 2048 * 4 <= BATCH_PIXELS for p in parts)


@pytest.mark.skipif(not SHIPPED.is_file(), reason="V2 Ultra is not trained yet")
def test_shipped_weights_find_small_faces_better(photo):
    plain = FaceDetector.from_pretrained("v2_ultra", "cpu")
    twice = FaceDetector.from_pretrained("v2_ultra", "cpu", pyramid=1.5)
    one = plain(photo)
    same = twice(photo)
    assert len(one.boxes) == len(same.boxes) == 1
    assert box_iou(torch.tensor(one.boxes), torch.tensor(same.boxes)).item() > 0.9
    np.testing.assert_allclose(same.landmarks, one.landmarks, atol=12)
    picture = read_image(photo)
    tiny = np.full((256, 256, 3), 110, np.uint8)
    height, width = 40, 34  # of the photo; the face is then 12 px high
    tiny[100 : 100 + height, 90 : 90 + width] = resize(picture, height, width)
    assert twice(tiny, score=0.02).scores[0] > plain(tiny, score=0.02).scores[0]


@pytest.mark.skipif(not SHIPPED.is_file(), reason="V2 Ultra is not trained yet")
def test_exports_have_both_looks(photo, tmp_path, capsys):
    command = ["--weights", "v2_ultra", "--out", str(tmp_path), "--pyramid", "1.5", "--form", "both", "--json"]
    assert export.main(command) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ok"] and len(report["files"]) == 2
    path = tmp_path / "featherface_v2_ultra_pyramid.onnx"
    network = OnnxNetwork(path)
    assert read_info(network.session, path)["pyramid"] == 1.5
    found = FaceDetector(network, "cpu")(photo)
    expected = FaceDetector.from_pretrained("v2_ultra", "cpu", pyramid=1.5)(photo)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.05)
    np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=0.05)
    with pytest.raises(ValueError, match="inside already"):
        FaceDetector.from_pretrained(path, pyramid=2)
    for flag in ("--features", "--torch-export"):
        assert (
            export.main(["--weights", "v2_ultra", "--out", str(tmp_path), "--pyramid", "2", "--form", "raw", flag]) == 2
        )
