"""Published checkpoints -> ours: strict, complete, and still finding faces."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.preprocess import normalise
from layers.postprocess import postprocess
from models.featherface import build_model
from models.mobilenet import MobileNetV1
from utils.checkpoint import CheckpointError, load_model, load_tensors
from utils.convert import convert, convert_state, load_backbone, main, rename

FILES = {"v1": "featherface_v1_published.pth", "retinaface_mnet025": "retinaface_mnet025_published.pth"}


@pytest.fixture(scope="session")
def published(shared) -> dict[str, dict]:
    return {arch: load_tensors(shared / "weights" / name) for arch, name in FILES.items()}


@pytest.mark.parametrize("arch", FILES)
def test_every_published_tensor_is_used_once(published, arch):
    source = {k: v for k, v in published[arch].items() if not k.endswith(("total_ops", "total_params"))}
    name, config, state = convert_state(published[arch])
    assert name == arch
    assert len(state) == len(source)
    assert all(torch.equal(state[rename(k)], v) for k, v in source.items())
    assert config.class_outputs == 2


def test_thop_counters_and_dataparallel_prefix_are_dropped(published):
    source = {f"module.{k}": v for k, v in published["retinaface_mnet025"].items()}
    source["module.fpn.total_ops"] = torch.zeros(1)
    source["module.total_params"] = torch.zeros(1)
    _, _, state = convert_state(source)
    assert not any("total" in k for k in state)


def test_unknown_missing_and_misshapen_keys_are_named(published):
    good = published["retinaface_mnet025"]
    with pytest.raises(ValueError, match=r"body\.stage4\.0\.weight"):
        convert_state(good | {"body.stage4.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"heads\.boxes\.1\.bias"):
        convert_state({k: v for k, v in good.items() if k != "BboxHead.1.conv1x1.bias"})
    with pytest.raises(ValueError, match=r"ClassHead\.0\.conv1x1\.bias.*\(6,\).*\(4,\)"):
        convert_state(good | {"ClassHead.0.conv1x1.bias": torch.zeros(6)})
    with pytest.raises(ValueError, match="has no place in 'v1'"):
        convert_state(good, "v1")
    with pytest.raises(ValueError, match="neither"):
        convert_state({"conv.weight": torch.zeros(3)})


@pytest.mark.parametrize("arch", FILES)
def test_converted_weights_find_the_face(shared, tmp_path, arch):
    photo = find_portrait()
    convert(shared / "weights" / FILES[arch], tmp_path / "out.pth")
    model, meta = load_model(tmp_path / "out.pth")
    assert meta["name"] == arch
    image = torch.from_numpy(np.array(Image.open(photo).convert("RGB").resize((512, 600))))
    with torch.inference_mode():
        out = model(normalise(image.permute(2, 0, 1)[None]))
    faces = postprocess(out, model.anchors(600, 512), model.variances, score_threshold=0.5)[0]
    assert len(faces["scores"]) == 1
    assert faces["scores"][0] > 0.99
    # where they are in the picture, marked by hand (pixels)
    box = torch.tensor([174.0, 112, 354, 331])
    points = torch.tensor([[225.0, 187], [305, 185], [266, 235], [240, 280], [297, 280]])
    assert (faces["boxes"][0] - box).abs().max() < 15
    assert (faces["landmarks"][0] - points).abs().max() < 15


def test_converted_retinaface_computes_what_its_onnx_file_does(published, shared):
    """An export of the same weights by others: small differences of the wiring would still find the portrait."""
    ort = pytest.importorskip("onnxruntime")
    _, config, state = convert_state(published["retinaface_mnet025"])
    model = build_model(config).eval()
    model.load_state_dict(state)
    images = torch.randn(1, 3, 96, 128) * 50
    session = ort.InferenceSession(shared / "peers" / "retinaface_mbnet0.25.onnx")
    boxes, scores, landmarks = map(torch.from_numpy, session.run(None, {"input": images.numpy()}))
    with torch.no_grad():
        ours = model(images)
    torch.testing.assert_close(ours["boxes"], boxes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["logits"].sigmoid(), scores[..., 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours["landmarks"], landmarks, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("bifpn.1.p4_w1", "neck.repeats.1.fuse_p4_up.weight"),
        ("bifpn.1.p3_w1", "neck.repeats.1.fuse_p3.weight"),
        ("bifpn.1.p4_w2", "neck.repeats.1.fuse_p4.weight"),
        ("bifpn.1.p5_w2", "neck.repeats.1.fuse_p5.weight"),
    ],
)
def test_fusion_weights_of_one_shape_go_to_their_own_nodes(published, key, ours):
    assert torch.equal(convert_state(published["v1"])[2][ours], published["v1"][key])


def find_portrait() -> Path:
    """The portrait of Grace Hopper that matplotlib ships (public domain)."""
    matplotlib = pytest.importorskip("matplotlib")
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.exists():
        pytest.skip("this matplotlib has no sample portrait")
    return path


@pytest.mark.parametrize("name", ["mobilenetV1X0.25_pretrain.tar", *FILES.values()])
def test_backbone_of_every_known_file_loads(shared, name):
    backbone = MobileNetV1()
    before = backbone.stage3[1][1].conv.weight.clone()
    load_backbone(backbone, shared / "weights" / name)
    assert not torch.equal(before, backbone.stage3[1][1].conv.weight)


def test_backbone_of_our_own_checkpoint_loads(shared, tmp_path):
    convert(shared / "weights" / FILES["v1"], tmp_path / "v1.pth")
    ours, theirs = MobileNetV1(), MobileNetV1()
    load_backbone(ours, tmp_path / "v1.pth")
    load_backbone(theirs, shared / "weights" / FILES["v1"])
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def test_short_backbone_takes_the_blocks_it_has(shared):
    whole, short = MobileNetV1(), MobileNetV1(last_blocks=1)
    for backbone in (whole, short):
        load_backbone(backbone, shared / "weights" / FILES["v1"])
    left = short.state_dict()
    assert left.keys() == {k for k in whole.state_dict() if not k.startswith("stage3.1.")}
    assert all(torch.equal(whole.state_dict()[k], v) for k, v in left.items())


def test_backbone_of_another_network_is_refused(tmp_path):
    torch.save({"stage1.0.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth: no MobileNetV1"):
        load_backbone(MobileNetV1(), tmp_path / "other.pth")


def test_command(shared, tmp_path, capsys):
    src, dst = str(shared / "weights" / FILES["retinaface_mnet025"]), str(tmp_path / "new" / "out.pth")
    assert main([src, dst]) == 0
    assert load_model(dst)[1]["name"] == "retinaface_mnet025"
    capsys.readouterr()
    assert main([dst, str(tmp_path / "twice.pth")]) == 1
    assert "already" in capsys.readouterr().err
    assert main([src, str(tmp_path / "wrong.pth"), "--arch", "v1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"utils.convert: {src}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "wrong.pth").exists()


def test_command_reports_bad_files_in_one_line(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("hello")
    for name in ("text.pth", "absent.pth"):
        assert main([str(tmp_path / name), str(tmp_path / "out.pth")]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"utils.convert: {tmp_path / name}")
        assert len(error.splitlines()) == 1
