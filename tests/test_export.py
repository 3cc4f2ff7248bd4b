"""Exported networks against PyTorch: ONNX raw and end-to-end, int8, TorchScript, torch.export, the onnx backend."""

import builtins
import copy
import inspect
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from torch import nn

import export
from models.blocks import DeformableConv2d
from models.detector import Detections, FaceDetector
from models.featherface import build_model
from tests.squares import SquareNetwork
from utils import onnx_backend, onnx_export, onnx_quantise, weights
from utils.checkpoint import CheckpointError, inference_content, save_checkpoint
from utils.config import ROOT, ConfigError, load_config
from utils.contenders import OpenCVNetwork
from utils.image import read_image, sample_photo
from utils.onnx_backend import OnnxNetwork, fingerprint, load_network, open_session
from utils.onnx_check import Parity, check_end_to_end, check_raw
from utils.onnx_export import OUTPUTS, describe, export_end_to_end, export_raw, torch_export, torch_script
from utils.onnx_quantise import network_input

TOLERANCE = 0.02, 1e-4  # pixels and scores; random networks amplify rounding more than trained ones


def random_model(name="v2_ultra"):
    """A network with batch-norm statistics and heads that are not those of a fresh one: scores spread over (0, 1)."""
    torch.manual_seed(1)
    model = build_model(load_config(name).model).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.5, 1.5)
    for conv in model.heads.classes:
        nn.init.normal_(conv.weight, std=0.002)
        nn.init.constant_(conv.bias, -2.0)
    for conv in (*model.heads.boxes, *model.heads.landmarks):
        nn.init.normal_(conv.weight, std=0.001)
    with torch.no_grad():  # how far features spread depends on the architecture
        spread = model(torch.randn(1, 3, 96, 96) * 50)["logits"].std()
        for conv in model.heads.classes:
            conv.weight.div_(spread)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def small_model():
    """Quicker to export, and without the gates in which random weights let small errors explode."""
    return random_model("retinaface_mnet025")


@pytest.fixture(scope="module")
def checkpoint(small_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    save_checkpoint(path, inference_content("tiny", small_model.cfg, small_model.state_dict(), {"epochs": 3}))
    return path


@pytest.fixture(scope="module")
def raw(model):
    return export_raw(model)


@pytest.fixture(scope="module")
def raw_file(model, raw, tmp_path_factory):
    return saved(raw, model, tmp_path_factory.mktemp("onnx") / "tiny.onnx", "raw")


@pytest.fixture(scope="module")
def picture():
    """A smooth picture, ``[70, 90, 3]``."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8))
    return np.array(small.resize((90, 70), Image.Resampling.BICUBIC))


def saved(proto, model, path, form):
    describe(proto, model.cfg, "v2_ultra", form=form, precision="fp32", meta={})
    path.write_bytes(proto.SerializeToString())
    return path


def outputs_of(session):
    return lambda x: session.run(list(OUTPUTS), {"images": x.numpy()})


def test_raw_form_equals_pytorch_at_any_size(model, raw, raw_file, picture):
    parity = check_raw(outputs_of(open_session(raw_file)), model, [picture])
    assert parity.within(*TOLERANCE), parity
    assert parity.inputs >= 6 and parity.compared > 500
    assert "BatchNormalization" not in {n.op_type for n in raw.graph.node}  # folded


def test_opencv_computes_what_pytorch_does(model, raw_file):
    images = torch.randn(1, 3, 96, 160) * 50
    theirs = OpenCVNetwork(raw_file, model.cfg)(images)
    with torch.no_grad():
        for key, value in model(images).items():
            torch.testing.assert_close(theirs[key], value, atol=1e-2, rtol=1e-3, msg=key)


def test_parity_check_notices_small_differences(model, raw_file, picture):
    session = open_session(raw_file)

    def off_by(index, delta):
        def run(x):
            out = outputs_of(session)(x)
            out[index] = out[index] + np.float32(delta)
            return out

        return check_raw(run, model, [picture], any_size=False)

    assert not off_by(0, 1e-3).within(0.05, 1e-4)
    assert not off_by(1, 0.05).within(0.05, 1e-4)
    assert not off_by(2, 0.05).within(0.05, 1e-4)
    assert not off_by(0, np.nan).within(0.05, 1e-4)
    assert not Parity(feature=float("nan"), compared=100).within(1, 1)
    assert not Parity().within(1, 1)  # nothing compared proves nothing
    assert not Parity(compared=100, unmatched=1).within(1, 1)
    short = check_raw(lambda x: [o[:, 1:] for o in outputs_of(session)(x)], model, [picture], any_size=False)
    assert not short.within(1e9, 1)


def test_parity_check_notices_invented_faces(picture):
    """Predictions that PyTorch is sure are none, and the export is sure are faces."""

    class Ramp(SquareNetwork):
        def forward(self, images):
            out = super().forward(images)
            return {**out, "logits": torch.linspace(0, -10, out["logits"].shape[1]).repeat(len(images), 1)}

    def compare(logit):
        def run(x):
            out = network(x)
            out["logits"][:, -1] = logit
            return [out[key] for key in OUTPUTS]

        return check_raw(run, network, [picture], any_size=False)

    network = Ramp().eval()
    assert compare(-10.0).within(0, 0) and not compare(3.0).within(1, 0.5)


def test_parity_check_of_faces_notices_small_differences(picture):
    faces = Detections(
        np.float32([[10, 10, 30, 30], [40, 10, 60, 30]]), np.float32([0.9, 0.6]), np.ones((2, 5, 2), np.float32)
    )

    def compare(boxes=faces.boxes, scores=faces.scores, landmarks=faces.landmarks):
        def run(batch, score):
            index = np.repeat(np.arange(len(batch)), len(scores))
            return *(np.concatenate([a] * len(batch)) for a in (boxes, scores, landmarks)), index

        return check_end_to_end(run, lambda batch, **_: [faces] * len(batch), [picture])

    assert compare().within(0, 0) and compare().compared == 10  # in four views, one of them of two pictures
    assert not compare(boxes=faces.boxes + 0.1).within(0.05, 1e-4)
    assert not compare(scores=faces.scores + np.float32(1e-3)).within(0.05, 1e-4)
    assert not compare(landmarks=faces.landmarks + 0.1).within(0.05, 1e-4)
    lost, moved = compare(*(a[:1] for a in faces)), compare(boxes=faces.boxes + np.float32([[0], [50]]))
    assert (lost.unmatched, moved.unmatched) == (5, 10) and not lost.within(1, 1) and not moved.within(1, 1)


@pytest.mark.parametrize("image_type", ["uint8", "float"])
def test_end_to_end_form_finds_the_detector_s_faces(model, raw, picture, image_type, tmp_path):
    proto = export_end_to_end(raw, model, image_type=image_type)
    path = saved(proto, model, tmp_path / "whole.onnx", "end2end")
    parity = check_end_to_end(export._runner(str(path), image_type), FaceDetector(model, "cpu"), [picture], score=0.3)
    assert parity.within(*TOLERANCE), parity
    assert parity.compared > 20


def test_end_to_end_thresholds_and_empty_result(model, raw, picture, tmp_path):
    path = saved(export_end_to_end(raw, model, 0.15, 0.2), model, tmp_path / "whole.onnx", "end2end")
    session = open_session(path)
    images = np.stack([picture, picture[::-1]]).transpose(0, 3, 1, 2)
    assert [i.name for i in session.get_inputs()] == ["images"]  # the thresholds are optional
    boxes, scores, landmarks, index = session.run(None, {"images": images})
    assert boxes.shape == (len(scores), 4) and landmarks.shape == (len(scores), 5, 2) and len(index) == len(scores)
    assert scores.min() > 0.15 and set(index) == {0, 1}
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [90, 70]).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    for i in (0, 1):
        assert (np.diff(scores[index == i]) <= 0).all()
    looser = session.run(["scores"], {"images": images, "nms_threshold": np.float32([0.6])})[0]
    assert len(looser) > len(scores)
    nothing = session.run(None, {"images": images, "score_threshold": np.float32([1.0])})
    assert [o.shape for o in nothing] == [(0, 4), (0,), (0, 5, 2), (0,)]


def test_torchscript(small_model, picture):
    assert check_raw(torch_script(small_model), small_model, [picture]).within(*TOLERANCE)


def test_torchscript_runs_where_it_is_moved(model):
    """What a trace makes itself (anchors, indices) stays on the tracer's device until it follows the pictures."""
    graph = torch_script(model).inlined_graph
    moved, made = {value.debugName() for value in graph.inputs()}, set()
    for node in graph.nodes():
        inputs, outputs = ({value.debugName() for value in values} for values in (node.inputs(), node.outputs()))
        if node.kind() == "aten::size":  # a number, which stays on the CPU
            continue
        limits = list(node.inputs())[1:] if node.kind().startswith("aten::clamp") else []
        assert all(limit.type().kind() != "TensorType" for limit in limits), node  # clamp takes none from there
        if node.kind() in ("prim::GetAttr", "aten::type_as"):
            moved |= outputs
        elif node.kind() == "aten::arange" or inputs & made:
            made |= outputs
            assert not inputs & moved, node
        elif inputs & moved:
            moved |= outputs
    assert made


def test_torch_export(small_model, picture):
    module = torch_export(small_model).module()
    assert check_raw(module, small_model, [picture], any_size=False).within(*TOLERANCE)


def test_deformable_convolutions(picture):
    model = random_model("v1")
    with pytest.raises(ConfigError, match=r"opset 17.*deformable"):
        export_raw(model, 17)
    proto = export_raw(model)
    assert sum(n.op_type == "DeformConv" for n in proto.graph.node) == 15


def test_a_runtime_without_deform_conv_is_named(raw_file, monkeypatch):
    class OldRuntime:
        __version__ = "1.20"
        SessionOptions = onnx_backend.import_onnxruntime().SessionOptions

        @staticmethod
        def InferenceSession(*args, **kwargs):
            raise RuntimeError("Could not find an implementation for DeformConv(19)\nnode")

    monkeypatch.setattr(onnx_backend, "import_onnxruntime", lambda: OldRuntime)
    with pytest.raises(
        CheckpointError, match=r"tiny.onnx: onnxruntime 1.20 cannot run it: no CPU kernel for DeformConv"
    ):
        open_session(raw_file)


def test_int8_runs_and_is_close(small_model, picture, tmp_path):
    from utils.onnx_quantise import quantise

    raw, photos = export_raw(small_model), []
    for i, image in enumerate((picture, picture[::-1], picture[:, ::-1])):
        photos.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(photos[-1])
    proto = quantise(raw, photos)
    assert any(n.op_type == "QuantizeLinear" for n in proto.graph.node)
    assert sum(i.data_type == onnx.TensorProto.INT8 for i in proto.graph.initializer) > 20
    path = saved(proto, small_model, tmp_path / "int8.onnx", "raw")
    parity = check_raw(outputs_of(open_session(path)), small_model, [picture])
    assert 1e-4 < parity.score < 0.2, parity
    whole = saved(export_end_to_end(proto, small_model), small_model, tmp_path / "whole.onnx", "end2end")
    images = picture.transpose(2, 0, 1)[None]
    assert len(open_session(whole).run(None, {"images": images, "score_threshold": np.float32([0.2])})[1])
    with pytest.raises(ValueError, match="photos"):
        quantise(raw, [])


def test_calibration_sees_what_the_detector_would(picture):
    """Shrunk to 640 px but never enlarged, BGR minus mean, padded with zeros."""
    x = network_input(np.full((50, 70, 3), (10, 20, 30), np.uint8))
    assert x.shape == (1, 3, 64, 96) and not x[..., 50:, :].any() and not x[..., 70:].any()
    assert x[0, :, 49, 69].tolist() == [30 - 104, 20 - 117, 10 - 123]
    assert network_input(np.zeros((100, 1280, 3), np.uint8)).shape == (1, 3, 64, 640)


def test_onnx_backend_finds_the_same_faces(small_model, checkpoint, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = [picture, picture[:50, :33], picture[:, ::-1]]
    expected = FaceDetector(small_model, "cpu")(pictures, score=0.1)
    detector = FaceDetector.from_pretrained(checkpoint, backend="onnx")
    assert isinstance(detector.network, OnnxNetwork) and detector.device.type == "cpu"
    for a, b in zip(expected, detector(pictures, score=0.1)):
        assert len(a.scores) == len(b.scores) > 0
        np.testing.assert_allclose(a.boxes, b.boxes, atol=0.01)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
        np.testing.assert_allclose(a.landmarks, b.landmarks, atol=0.01)
    (made,) = (tmp_path / "featherface").iterdir()
    before = made.stat().st_mtime_ns
    load_network(checkpoint)
    assert made.stat().st_mtime_ns == before  # exported once


def test_onnx_detectors_go_to_other_processes(checkpoint, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    detector = FaceDetector.from_pretrained(checkpoint, backend="onnx")
    detector.network.threads = 3
    there = pickle.loads(pickle.dumps(detector))
    assert there.network.threads == 3 and len(detector(picture, score=0.1).scores)
    for a, b in zip(detector(picture, score=0.1), there(picture, score=0.1)):
        np.testing.assert_array_equal(a, b)


def test_other_weights_of_the_same_name_are_exported_anew(small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("first", "second"):
        save_checkpoint(tmp_path / "n.pth", inference_content(name, small_model.cfg, small_model.state_dict()))
        assert load_network(tmp_path / "n.pth").name == name


def test_threads_are_those_of_pytorch_unless_given(raw_file):
    assert open_session(raw_file).get_session_options().intra_op_num_threads == torch.get_num_threads()
    assert open_session(raw_file, 3).get_session_options().intra_op_num_threads == 3


def test_threads_export_one_after_the_other(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        networks = list(pool.map(load_network, [checkpoint] * 3))
    assert {n.info["name"] for n in networks} == {"tiny"} and len(list((tmp_path / "featherface").iterdir())) == 1


def test_calibration_photos_are_spread_over_the_folder(tmp_path, picture):
    for i in range(7):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    assert [p[-5] for p in export._photos(str(tmp_path), 4)] == ["0", "2", "4", "6"]
    assert len(export._photos(str(tmp_path), 9)) == 7


def test_file_beside_the_checkpoint_counts_only_if_made_from_it(raw, model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_backend, "export_raw", lambda model: pytest.fail("exported again"))
    here = tmp_path / "tiny.pth"
    here.write_bytes(checkpoint.read_bytes())
    proto = onnx.ModelProto.FromString(raw.SerializeToString())
    describe(proto, model.cfg, "beside", form="raw", precision="fp32", source=fingerprint(here))
    here.with_suffix(".onnx").write_bytes(proto.SerializeToString())
    assert load_network(here).name == "beside"
    monkeypatch.setattr(onnx_backend, "write_cached", lambda name, make: here.with_name("from_cache.onnx"))
    for other in ({"source": "another"}, {"source": fingerprint(here), "pyramid": "1.5"}):
        describe(proto, model.cfg, "beside", form="raw", precision="fp32", **other)
        here.with_suffix(".onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(CheckpointError, match="from_cache"):  # it went on to the cache, which is empty here
            load_network(here)


def test_from_pretrained_takes_an_onnx_file(raw_file, model, caplog):
    detector = FaceDetector.from_pretrained(raw_file, "cpu", score_threshold=0.3)
    assert not caplog.records  # the CPU is where it computes anyway
    assert detector.network.cfg == model.cfg and detector.network.name == "v2_ultra"
    with pytest.raises(CheckpointError, match=r"tiny.onnx: holds 'v2_ultra'.*'v1'"):
        FaceDetector.from_pretrained(raw_file, config="v1")


def test_unusable_onnx_files(raw, model, tmp_path):
    with pytest.raises(CheckpointError, match=r"gone.onnx: no such file"):
        load_network(tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(CheckpointError, match=r"text.onnx: onnxruntime .* cannot run it"):
        load_network(tmp_path / "text.onnx")
    foreign = onnx.ModelProto.FromString(raw.SerializeToString())
    del foreign.metadata_props[:]
    (tmp_path / "foreign.onnx").write_bytes(foreign.SerializeToString())
    with pytest.raises(CheckpointError, match=r"foreign.onnx: not made by export.py"):
        load_network(tmp_path / "foreign.onnx")
    describe(foreign, model.cfg, "later", form="raw", format="featherface-onnx-2")
    (tmp_path / "later.onnx").write_bytes(foreign.SerializeToString())
    with pytest.raises(CheckpointError, match=r"later.onnx: not made by export.py"):
        load_network(tmp_path / "later.onnx")
    whole = saved(export_end_to_end(raw, model), model, tmp_path / "whole.onnx", "end2end")
    with pytest.raises(CheckpointError, match=r"whole.onnx: has NMS inside"):
        load_network(whole)


def test_missing_onnxruntime(checkpoint, monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install"):
        FaceDetector.from_pretrained(checkpoint, backend="onnx")
    assert export.main(["--weights", str(checkpoint), "--out", str(tmp_path)]) == 2
    assert "onnxruntime is not installed" in capsys.readouterr().err


def test_command_writes_and_checks(checkpoint, picture, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(picture).save(photo)
    out = tmp_path / "out"
    command = ["--weights", str(checkpoint), "--out", str(out), "--check", str(photo), "--json"]
    assert export.main(command) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ok"] and [f["form"] for f in report["files"]] == ["raw", "end2end"]
    assert load_network(out / "tiny.onnx").info["source"] == fingerprint(checkpoint)
    assert export.main([*command, "--form", "raw", "--features"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert load_network(out / "tiny_features.onnx").has_features and not load_network(out / "tiny.onnx").has_features
    assert 0 < report["files"][0]["parity"]["feature"] < 1e-4
    assert export.main([*command, "--form", "raw", "--tolerance-px", "1e-9"]) == 1
    captured = capsys.readouterr()
    assert "NOT EQUAL" in captured.out and "does not compute" in captured.err
    with pytest.raises(SystemExit) as stop:
        export.main([*command, "--tolerance-px", "-1"])
    assert stop.value.code == 2 and "must be above 0" in capsys.readouterr().err


def test_command_options_of_the_end_to_end_form(checkpoint, picture, tmp_path, capsys, monkeypatch):
    """They reach the file; and finding other faces than PyTorch is no success."""
    monkeypatch.setattr(export, "check_end_to_end", lambda *_: Parity(unmatched=3, inputs=5))
    command = ["--weights", str(checkpoint), "--out", str(tmp_path), "--form", "end2end"]
    assert export.main([*command, "--score", "0.1", "--nms", "0.2", "--input", "float"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    graph = onnx.load(tmp_path / "tiny_end2end.onnx").graph
    defaults = {i.name: onnx.numpy_helper.to_array(i).tolist() for i in graph.initializer}
    assert defaults["score_threshold"] == [pytest.approx(0.1)] and defaults["nms_threshold"] == [pytest.approx(0.2)]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_command_int8(checkpoint, picture, tmp_path, capsys, monkeypatch):
    """It is calibrated on every photo, may differ from PyTorch, and never stands in for the checkpoint."""
    seen, folder = [], tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(picture).save(folder / f"{name}.png")
    monkeypatch.setattr(onnx_quantise, "read_image", lambda path: seen.append(path) or read_image(path))
    command = ["--weights", str(checkpoint), "--out", str(tmp_path), "--form", "raw", "--check", str(folder / "a.png")]
    assert export.main([*command, "--int8", str(folder), "--json"]) == 0
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert [(f["precision"], f["ok"]) for f in files] == [("fp32", True), ("int8", True)]
    assert files[1]["parity"]["score"] > 1e-4
    assert sorted(set(seen)) == [str(folder / "a.png"), str(folder / "b.png")]
    int8 = OnnxNetwork(tmp_path / "tiny_int8.onnx")
    assert int8.info["precision"] == "int8" and int8.info["source"] != fingerprint(checkpoint)
    graph = onnx.load(tmp_path / "tiny_int8.onnx").graph
    sizes = {i.name: int(np.prod(i.dims)) for i in graph.initializer}
    scales = [sizes.get(n.input[1], 1) for n in graph.node if n.op_type == "DequantizeLinear"]
    assert max(scales) > 1  # of weights: one for each channel


def test_a_network_that_finds_nothing_can_be_exported(small_model, tmp_path, capsys):
    model = copy.deepcopy(small_model)
    for conv in model.heads.classes:
        nn.init.zeros_(conv.weight)
        conv.bias.data = torch.tensor([9.0, 0.0]).repeat(len(conv.bias) // 2)  # background, face
    save_checkpoint(tmp_path / "early.pth", inference_content("early", model.cfg, model.state_dict()))
    assert export.main(["--weights", str(tmp_path / "early.pth"), "--out", str(tmp_path), "--form", "end2end"]) == 0
    out = capsys.readouterr().out
    assert "neither finds a face to compare" in out and "NOT EQUAL" not in out


def test_the_example_in_the_readme(tmp_path, monkeypatch):
    """Its very lines, on the shipped weights and a portrait."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (example,) = [b for b in blocks if "onnxruntime" in b]
    monkeypatch.chdir(tmp_path)
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        photo.save("photo.jpg", quality=95)
    command = ["--weights", "v2_ultra", "--out", "exported", "--form", "end2end"]
    assert export.main([*command, "--check", "photo.jpg"]) == 0
    names = {}
    exec(example, names)
    wanted = FaceDetector.from_pretrained("v2_ultra", device="cpu")("photo.jpg", scale="original")
    np.testing.assert_allclose(names["boxes"], wanted.boxes, atol=0.01)
    np.testing.assert_allclose(names["landmarks"], wanted.landmarks, atol=0.01)
    assert len(wanted.boxes) == 1 and names["picture"].tolist() == [0]


def test_what_skips_in_pytorch_is_exported_whole(picture, tmp_path):
    cfg = load_config("v2_ultra", ["model.dynamic_sharing=true", "model.sharing_skip_below=0.999"]).model
    save_checkpoint(tmp_path / "n.pth", inference_content("n", cfg, build_model(cfg).state_dict()))
    Image.fromarray(picture).save(tmp_path / "photo.png")
    command = ["--weights", str(tmp_path / "n.pth"), "--out", str(tmp_path), "--form", "raw"]
    assert export.main([*command, "--check", str(tmp_path / "photo.png")]) == 0


@pytest.mark.parametrize(
    "options",
    [["--form", "raw", "--score", "0.3"], ["--form", "raw", "--input", "uint8"], ["--int8-photos", "4"]],
)
def test_options_without_effect_are_refused(checkpoint, tmp_path, capsys, options):
    assert export.main(["--weights", str(checkpoint), "--out", str(tmp_path / "out"), *options]) == 2
    assert options[-2] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_command_mistakes(checkpoint, tmp_path, capsys):
    def fails(code, *words, says):
        assert export.main(["--out", str(tmp_path / "out"), *words]) == code
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1

    good = ("--weights", str(checkpoint))
    fails(1, "--weights", "nowhere.pth", says="nowhere.pth")
    fails(1, *good, "--check", "nowhere.jpg", says="nowhere.jpg")
    fails(2, *good, "--opset", "99", says="opset 99")
    fails(2, *good, "--int8", str(tmp_path / "none"), says="not a folder")
    fails(2, *good, "--features", says="--form raw")
    fails(2, *good, "--features", "--form", "raw", "--torchscript", says="--form raw")
    fails(2, "--weights", "x.onnx", says="exported already")
    with pytest.raises(SystemExit, match="2"):
        export.main(["--out", str(tmp_path / "out"), *good, "--score", "2"])
    assert "--score: must be between 0 and 1, got 2" in capsys.readouterr().err


@pytest.mark.shared
@pytest.mark.parametrize("name", ["retinaface_mnet025", "v1"])
def test_published_weights(shared, name, tmp_path):
    try:
        path = weights.find_weights(name)
    except CheckpointError as e:
        pytest.skip(str(e))
    model, _ = export.load_model(path)
    proto = export_raw(model)
    photo = np.asarray(Image.open(sample_photo()).convert("RGB").resize((160, 188)))
    raw_file = saved(proto, model, tmp_path / "raw.onnx", "raw")
    assert check_raw(outputs_of(open_session(raw_file)), model, [photo]).within(*TOLERANCE)
    whole = saved(export_end_to_end(proto, model), model, tmp_path / "whole.onnx", "end2end")
    parity = check_end_to_end(export._runner(str(whole), "uint8"), FaceDetector(model, "cpu"), [photo])
    assert parity.within(*TOLERANCE) and parity.compared >= 3, parity


def test_an_exported_network_keeps_as_many_faces_as_the_detector():
    assert inspect.signature(FaceDetector).parameters["keep_k"].default == onnx_export.KEEP


def test_an_exported_deformable_convolution_computes_the_same():
    """By ONNX's reference, as onnxruntime cannot run it on a CPU."""
    layer, x = DeformableConv2d(2, 3, 3, 1, 1), torch.randn(1, 2, 5, 6)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    opset = onnx_export.DEFORM_OPSET
    torch.onnx.register_custom_op_symbolic("torchvision::deform_conv2d", onnx_export._deform_conv, opset)
    proto = onnx_export._trace(layer, (x,), ["x"], ["y"], {}, opset)
    (y,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x.numpy()})
    assert y == pytest.approx(layer(x).detach().numpy(), abs=1e-4)
