"""Offsets between anchor sizes: that scores can be changed after matching, and that the search repairs their order."""

import json

import numpy as np
import pytest
import torch
import yaml

from data.dataset import select_dataset
from models.detector import FaceDetector
from models.featherface import build_model
from tests.face_data import make_config, make_folder
from tests.test_evaluation import random_set
from utils import calibrate
from utils.calibrate import Scored, collect, kinds_of, main, shift_biases
from utils.checkpoint import inference_content, load_checkpoint, load_model, save_checkpoint
from utils.config import ModelConfig, to_dict
from utils.validation import NMS, SCORE
from widerface_evaluate import GroundTruth, evaluate, evaluate_matches, match, rescore

SIZES = [[8, 16, 32], [64, 128], [256, 512]]
MODEL = {"out_channels": 8, "bifpn_repeats": 1, "ssh_groups": 2, "anchors": SIZES}


def test_rescored_matches_are_those_of_the_new_scores():
    preds, gt = random_set(3)
    rng = np.random.default_rng(0)
    matches = match(preds, gt)
    score = rng.random(len(matches.score))
    changed = {n: np.array(p, float).reshape(-1, 5) for n, p in preds.items()}
    for image, row, value in zip(matches.image, matches.row, score):
        changed[gt.names[image]][row, 4] = value
    wanted, got = evaluate(changed, gt), evaluate_matches(rescore(matches, score), gt)
    assert all(got[k] == pytest.approx(wanted[k], abs=1e-12) for k in gt.valid)


def overrated_small_ones(images: int = 8, alarms: tuple[float, ...] = (0.6, 0.6, 0.6)) -> Scored:
    """Per image a 100-px face with score 0.5, and false alarms of the small kind with the given scores."""
    names = [f"e/{i}" for i in range(images)]
    boxes = np.tile([[50.0, 50, 100, 100]], (images, 1))
    valid = {k: np.ones(images, bool) for k in ("easy", "medium", "hard")}
    gt = GroundTruth(names, boxes, np.arange(images + 1), valid)
    wrong = [[300.0 + 20 * j, 300, 10, 10, score] for j, score in enumerate(alarms)]
    matches = match({n: np.array([[50.0, 50, 100, 100, 0.5], *wrong]) for n in names}, gt)
    return Scored(gt, matches, np.where(matches.boxes[:, 2] < 20, 0, 1))


def test_search_puts_overrated_small_faces_in_their_place():
    scored = overrated_small_ones()
    assert scored.measure(np.zeros(3))["ap"] == pytest.approx(0.25)
    offsets = scored.search(3)
    assert offsets[0] - offsets[1] < np.log(0.5 / 0.5) - np.log(0.6 / 0.4) and offsets[2] == 0
    assert scored.measure(offsets)["ap"] == pytest.approx(1.0)


def test_search_moves_no_size_beyond_the_limit_nor_the_last_one():
    scored = overrated_small_ones(alarms=(0.7, 0.88, 0.95, 0.98))  # each -1 puts one more below the face
    assert scored.search(2).tolist() == [-3, 0]


def test_search_takes_no_gain_that_may_be_noise(monkeypatch):
    monkeypatch.setattr(calibrate, "LEAST_GAIN", 0.8)
    assert overrated_small_ones().search(2).tolist() == [0, 0]  # of 0.75


def test_the_level_lets_as_many_pass_one_half_as_before():
    scored = overrated_small_ones(alarms=(0.9, 0.7, 0.3, 0.2))  # 16 of 40 above 0.5
    for offsets in (np.array([-2.0, 0]), np.array([1.0, 0]), np.array([-3.0, 1.5])):
        logits = np.log(scored.matches.score / (1 - scored.matches.score)) + offsets[scored.kind]
        assert ((logits + scored.level(offsets)) > 0).sum() == 16 != (logits > 0).sum()
    assert scored.level(np.zeros(2)) == 0  # what nothing was done to stays as it is, however few the scores
    assert overrated_small_ones(alarms=(0.3,)).level(np.array([-1.0, 0])) == 0  # nothing to keep


def test_measuring_leaves_out_empty_subsets_and_what_falls_below_the_score_of_the_benchmark():
    scored = overrated_small_ones()
    scored.truth.valid["easy"] = np.zeros(8, bool)
    assert scored.measure(np.zeros(2)) == pytest.approx({"ap": 0.25, "easy": 0, "medium": 0.25, "hard": 0.25})
    assert scored.measure(np.array([0.0, -5]))["ap"] == 0  # the faces' 0.5 become 0.007


def test_a_mask_measures_those_images_only():
    scored = overrated_small_ones()
    scored.matches.score[scored.matches.image == 0] = [0.3, 0.2, 0.1, 0.05]  # the face first in image 0
    scored.kind[scored.matches.image == 0] = [1, 0, 0, 0]
    first = np.arange(8) == 0
    scored.matches.face[scored.matches.image == 0] = [0, -1, -1, -1]
    assert scored.measure(np.zeros(2), first)["ap"] == pytest.approx(1.0)
    assert scored.measure(np.zeros(2), ~first)["ap"] == pytest.approx(0.25)


@pytest.mark.parametrize("outputs", [1, 2])
def test_shifted_biases_are_offsets_on_the_logits(outputs):
    cfg = ModelConfig(**MODEL, class_outputs=outputs)
    model = build_model(cfg).eval()
    x, offsets = torch.randn(1, 3, 64, 96) * 50, np.linspace(-1, 1, 7)
    with torch.no_grad():
        before = model(x)["logits"][0]
        shift_biases(model.state_dict(), cfg, offsets)
        after = model(x)["logits"][0]
    kind = kinds_of(cfg, 64, 96)
    assert torch.tensor([s for level in SIZES for s in level])[kind].tolist() == model.anchors(64, 96)[:, 2].tolist()
    torch.testing.assert_close(after - before, torch.from_numpy(offsets).float()[kind], atol=1e-4, rtol=1e-4)


def test_command_writes_a_checkpoint_with_the_offsets_it_tells(tmp_path, capsys, monkeypatch):
    cfg = make_config(make_folder(tmp_path), select_images=4, select_labels="train/label.txt")
    cfg.model = ModelConfig(**MODEL)
    torch.manual_seed(0)
    model = build_model(cfg.model)
    for conv in model.heads.classes:
        torch.nn.init.normal_(conv.weight, std=0.05)
        torch.nn.init.zeros_(conv.bias)
    content = inference_content("test", cfg.model, model.state_dict()) | {"training": {"step": 1}}
    save_checkpoint(tmp_path / "in.pth", content)
    cfg.model.landmark_refinement = True  # the config gives the images, whatever network it describes
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    assert main([str(tmp_path / "in.pth"), "--device", "cpu", "--out", str(tmp_path / "out.pth")]) == 2
    assert "--config" in capsys.readouterr().err
    arguments = [str(tmp_path / "in.pth"), "--config", str(tmp_path / "c.yaml"), "--device", "cpu"]
    wanted = np.linspace(-1.5, 0, 7)
    monkeypatch.setattr(Scored, "search", lambda *_: wanted - 0.25)
    monkeypatch.setattr(Scored, "level", lambda *_: 0.25)
    assert main([*arguments, "--out", str(tmp_path / "out.pth"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = load_checkpoint(tmp_path / "out.pth")
    assert "training" not in written and written["meta"]["calibration"] == told
    assert list(told["offsets"]) == [f"P{i + 3}/{s}" for i, level in enumerate(SIZES) for s in level]
    assert list(told["offsets"].values()) == wanted.tolist()
    calibrated, _ = load_model(tmp_path / "out.pth")
    for level, kinds in enumerate(([0, 1, 2], [3, 4], [5, 6])):
        bias = calibrated.heads.classes[level].bias.detach()
        torch.testing.assert_close(bias, torch.from_numpy(wanted[kinds]).float())
    content["meta"]["config"] = to_dict(cfg)
    content["meta"]["config"]["data"]["select_images"] = 3
    save_checkpoint(tmp_path / "own.pth", content)
    own = [str(tmp_path / "own.pth"), "--device", "cpu", "--out", str(tmp_path / "out.pth")]
    for more, images in (([], 3), (["--opts", "data.select_images=2"], 2)):
        assert main([*own, *more]) == 0
        assert f"{images} held-out images of {tmp_path}" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "in.pth")]) == 1
    assert "would overwrite" in capsys.readouterr().err
    assert main([str(tmp_path / "none.pth"), *arguments[1:], "--out", str(tmp_path / "x.pth")]) == 1
    assert "none.pth" in capsys.readouterr().err


def test_gains_are_measured_on_the_other_half_and_the_offsets_chosen_on_all(tmp_path, monkeypatch):
    """In even images kind 0 is overrated, in odd ones kind 2: raising kind 1 helps all, lowering kind 0 even ones."""
    cfg = make_config(make_folder(tmp_path), select_images=4, select_labels="train/label.txt")
    scored, good = overrated_small_ones(4), overrated_small_ones(4, (0.4,))
    scored.kind[(scored.kind == 0) & (scored.matches.image % 2 == 1)] = 2
    model, biases, results = build_model(ModelConfig(**MODEL)), [], iter((scored, good))

    def collect(model, dataset, device, scale):
        assert scale == 1.5
        biases.append(model.heads.classes[0].bias.detach().clone())
        return next(results)

    monkeypatch.setattr(calibrate, "collect", collect)
    save_checkpoint(tmp_path / "in.pth", inference_content("test", model.cfg, model.state_dict()))
    told = calibrate.calibrate(tmp_path / "in.pth", cfg.data, str(tmp_path / "out.pth"), torch.device("cpu"), 1.5)
    assert told["scale"] == 1.5 == load_checkpoint(tmp_path / "out.pth")["meta"]["calibration"]["scale"]
    assert np.diff(list(told["offsets"].values())).tolist() == pytest.approx([2, -1, 0, 0, 0, 0])
    assert (biases[1] - biases[0]).tolist() == pytest.approx(list(told["offsets"].values())[:3])
    assert told["held_out_gain"]["ap"] == pytest.approx((0 + 0.75) / 2)
    assert (told["before"]["ap"], told["after"]["ap"]) == (pytest.approx(0.25), pytest.approx(1))


def test_a_cascade_s_scores_cannot_be_shifted(tmp_path, capsys):
    cfg = make_config(make_folder(tmp_path), select_images=4, select_labels="train/label.txt")
    model = build_model(ModelConfig(**MODEL, cascade_refinement=True))
    content = inference_content("test", model.cfg, model.state_dict(), {"config": to_dict(cfg)})
    save_checkpoint(tmp_path / "in.pth", content)
    assert main([str(tmp_path / "in.pth"), "--device", "cpu", "--out", str(tmp_path / "out.pth")]) == 2
    assert "not its class heads' alone" in capsys.readouterr().err and not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_collected_detections_are_the_detector_s(tmp_path, scale):
    cfg = make_config(make_folder(tmp_path), select_images=4, select_labels="train/label.txt")
    torch.manual_seed(0)
    model = build_model(ModelConfig(**MODEL)).eval()
    for conv in model.heads.classes:
        torch.nn.init.normal_(conv.weight, std=0.02)
        torch.nn.init.constant_(conv.bias, -2.0)
    dataset = select_dataset(cfg.data)
    scored = collect(model, dataset, torch.device("cpu"), scale)
    detector = FaceDetector(model, "cpu", score_threshold=SCORE, nms_threshold=NMS, keep_k=100_000)
    for i, path in enumerate(dataset.paths):
        faces = detector(str(path), scale=scale)
        mine = scored.matches.image == i
        assert mine.sum() == len(faces.scores) > 20
        np.testing.assert_allclose(scored.matches.score[mine], faces.scores, atol=1e-5)
        # each to its nearest: the order of equal scores is a matter of rounding
        corners = np.abs(scored.matches.boxes[mine, None, :2] - faces.boxes[None, :, :2]).max(2)
        scores = np.abs(scored.matches.score[mine, None] - faces.scores[None])
        same = (corners <= 1e-2) & (scores <= 1e-5)
        assert same.any(0).all() and same.any(1).all()


def test_search_finds_a_window_narrower_than_its_first_step():
    """Of logits: small faces at 1, their alarms at 0.9, large faces at 0.5, their alarms at 0.2."""
    logits, sides = np.array([1.0, 0.9, 0.5, 0.2]), [12, 10, 100, 90]
    boxes = np.array([[300.0 * i, 0, side, side] for i, side in enumerate(sides)])
    valid = {k: np.ones(2, bool) for k in ("easy", "medium", "hard")}
    gt = GroundTruth(["e/a"], boxes[[0, 2]], np.array([0, 2]), valid)
    matches = match({"e/a": np.column_stack([boxes, 1 / (1 + np.exp(-logits))])}, gt)
    scored = Scored(gt, matches, np.where(matches.boxes[:, 2] < 20, 0, 1))
    offsets = scored.search(2)
    assert -0.8 < offsets[0] < -0.4 and scored.measure(offsets)["ap"] == pytest.approx(1.0)


def test_each_detection_has_the_kind_of_the_anchor_it_comes_from(tmp_path):
    """Boxes are as large as their anchors where nothing moves them."""
    cfg = make_config(make_folder(tmp_path), select_images=4, select_labels="train/label.txt")
    model = build_model(ModelConfig(**MODEL)).eval()
    for conv in [*model.heads.classes, *model.heads.boxes]:
        torch.nn.init.normal_(conv.weight, std=0.02 if conv in model.heads.classes else 0.0)
        torch.nn.init.zeros_(conv.bias)
    scored = collect(model, select_dataset(cfg.data), torch.device("cpu"))
    sides = np.array([side for level in SIZES for side in level])[scored.kind]
    whole = (scored.matches.boxes[:, :2] > 0).all(1) & (scored.matches.boxes[:, :2] + sides[:, None] < 160).all(1)
    assert whole.sum() > 20 and len(set(scored.kind[whole])) > 2
    np.testing.assert_allclose(scored.matches.boxes[whole, 2], sides[whole], atol=0.01)
