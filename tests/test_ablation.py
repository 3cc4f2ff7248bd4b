"""The ablation runner: what it trains, how it tells gains from noise, resuming, one tiny run from end to end."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ablate
from data.labels import ImageError
from models.featherface import build_model
from tests.face_data import make_config, make_folder
from utils import ablation_runs
from utils.ablation import BUDGET, MODES, OFF, RECIPE, SMART_AUGMENT, STUDIES, Row, Study, build_study, changes
from utils.ablation_report import (
    ONE_SEED,
    WITHIN_NOISE,
    build_report,
    gains,
    markdown,
    stage_ends,
    training_noise,
    verdict,
)
from utils.ablation_runs import (
    START_KEYS,
    EvalSet,
    Launch,
    RunError,
    Stopped,
    finished_step,
    keep,
    load_kept,
    official_set,
    predictions,
    select_set,
    train,
)
from utils.calibrate import calibrate
from utils.checkpoint import inference_content, save_checkpoint
from utils.config import CONFIG_DIR, ConfigError, ModelConfig, load_config, to_dict
from widerface_evaluate import EvaluationError, GroundTruth, match
from widerface_evaluate.images import KEEP_ALL

ULTRA = "v2_ultra_plan"  # the network with room for every innovation
ALL = [("innovations", "leave-one-out"), *((name, "add-one") for name in STUDIES)]


def by_name(study: Study) -> dict:
    return {row.name: study.load(row, 0) for row in study.rows}


# -- what is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), ALL)
def test_every_row_is_a_valid_network_within_the_budget(name, mode):
    for row, cfg in by_name(build_study(name, ULTRA, mode=mode)).items():
        parameters = sum(p.numel() for p in build_model(cfg.model).parameters())
        if row in ("v2_base", "v2", "v1_compact"):  # what the product is compared with
            assert parameters >= BUDGET
        else:
            assert parameters < BUDGET, (row, parameters)


def test_add_one_rows_differ_from_the_base_by_one_innovation():
    study = build_study("innovations", ULTRA)
    rows = by_name(study)
    base = rows.pop("base")
    assert not changes(base, OFF)  # everything is off
    assert rows["feature_recycling"].model.feature_reuse and not rows["feature_recycling"].model.acf
    assert rows["attention_amplification"].model.attention_multiply == 3
    assert rows["ultra_distillation"].distill.enabled and not base.distill.enabled
    assert rows["anchors_8px"].model.anchors[0][0] == 8
    for name, cfg in rows.items():
        off = changes(cfg, OFF)
        assert off, name
        assert len(off) == {"bifpn_ultra": 3, "ultra_distillation": 2}.get(name, 1), name
        assert not changes(cfg, {"train.epochs": base.train.epochs, "train.lr": base.train.lr})
    assert {r.predicted for r in study.rows} == {None, 0.5, 0.7, 0.8, 1.0, 1.5}


def test_leave_one_out_takes_one_innovation_away():
    study = build_study("innovations", ULTRA, mode="leave-one-out")
    rows = by_name(study)
    full = rows.pop("all_on")
    assert study.sign == -1 and full.model.acf and full.model.multipath and full.distill.enabled
    assert full.model.attention_multiply == 3 and not rows["no_attention_amplification"].model.attention_multiply == 3
    assert not rows["no_bifpn_ultra"].model.acf and not rows["no_bifpn_ultra"].model.pfr
    assert rows["no_anchors_atss"].loss.assigner == "iou" and full.loss.assigner == "atss"


def test_ladder_keeps_what_it_has_climbed():
    mixing = ["data.augment.mixup_prob=0.1", "data.augment.mosaic_prob=0.5"]
    study = build_study("ladder", ULTRA, ["train.stages=[{size: 128, batch_size: 4}]", *mixing])
    rows = by_name(study)
    assert [rows[name].data.augment.mosaic_prob for name in ("fusion", "augmentation")] == [0.0, 0.5]
    alone = by_name(build_study("ladder", ULTRA, mixing[1:]))["augmentation"].data.augment
    assert alone.mosaic_prob == 0.5 and alone.erase_prob == SMART_AUGMENT["erase_prob"] > 0  # the plan's own, with it
    assert list(rows)[:2] == ["v2_base", "channel_cut"]
    assert rows["v2_base"].model.out_channels == 32 and rows["channel_cut"].model.out_channels == 28
    assert rows["fusion"].model.feature_reuse and rows["fusion"].distill.teachers
    assert rows["augmentation"].data.augment.mixup_prob > 0 and rows["fusion"].data.augment.mixup_prob == 0
    assert [s.size for s in rows["progressive_training"].train.stages] == [64, 96, 128]
    assert len(rows["augmentation"].train.stages) == 1
    tta = next(r for r in study.rows if r.name == "tta")
    assert tta.tta and tta.run == "multi_teacher" and rows["tta"] == rows["multi_teacher"]
    assert study.rows[-1].tta and study.rows[-1].run == "multi_path"


def test_a_rung_that_would_change_nothing_is_left_out(caplog):
    study = build_study("ladder", "v2_ultra")  # whose last stage distils neither scores nor boxes
    assert "multi_teacher" not in by_name(study) and "'multi_teacher'" in caplog.text
    assert next(r for r in study.rows if r.name == "tta").run == "progressive_training"
    trained = [repr(study.load(row, 0)) for row in study.rows if not row.trained_as]
    assert len(trained) == len(set(trained))
    two = by_name(build_study("ladder", "v2_ultra", ["distill.teachers=[v1, other.onnx]"]))["multi_teacher"].distill
    assert two.teachers == ["v1", "other.onnx"] and not (two.self_teacher or two.self_best)
    alone = by_name(build_study("innovations", "v2_ultra_second"))["ultra_distillation"].distill
    assert alone.teachers == ["v1"] and not alone.self_teacher


def test_family_shares_budget_data_and_start_but_not_the_recipe():
    opts = ["train.epochs=7", "data.root=elsewhere", "train.init_weights=mine.pth"]
    study = build_study("family", ULTRA, opts)
    rows = by_name(study)
    assert list(rows) == ["v1_compact", "v2", "v2_ultra_plan"]  # v1 only when asked for
    assert "v1" in by_name(build_study("family", ULTRA, opts, only=["v1"]))
    for cfg in rows.values():
        assert (cfg.train.epochs, cfg.data.root, cfg.train.stages) == (
            7,
            "elsewhere",
            rows["v2_ultra_plan"].train.stages,
        )
        assert (cfg.train.init_weights, cfg.train.backbone_weights) == ("", "mine.pth")
    assert rows["v1_compact"].loss.classification == "ohem_ce" and not rows["v1_compact"].distill.enabled


def test_recipe_rows_keep_the_network_and_change_one_thing_each():
    rows = by_name(build_study("recipe", ULTRA))
    base = rows.pop("as_is")
    assert "box_diou" not in rows and "class_quality" not in rows  # what the config has is the first row
    assert {"box_eiou", "class_focal", "landmark_wing", "curriculum", "multiscale", "dropblock", "no_ema"} < rows.keys()
    for name, cfg in rows.items():
        settings = next(on for row, _, on in RECIPE if row == name)
        assert len(settings) == 1 and changes(cfg, settings) == () and changes(base, settings), name
        (key,) = settings
        assert load_config(ULTRA, [*changes(load_config(ULTRA), settings), "train.seed=0"]) == cfg, key
    assert "box_diou" in by_name(build_study("recipe", ULTRA, ["loss.box=ciou"]))


@pytest.mark.parametrize("study", STUDIES)
def test_rows_start_from_a_trained_network_and_its_mimics_only_where_they_keep_its_shape(study):
    config = load_config("v2_ultra_polish")
    kept = (config.train.init_weights, config.distill.init_mimics) if study == "recipe" else ("", "")
    assert all((config.train.init_weights, config.distill.init_mimics))
    rows = by_name(build_study(study, "v2_ultra_polish", []))
    assert all((cfg.train.init_weights, cfg.distill.init_mimics) == kept for cfg in rows.values())


def test_named_teachers_teach_only_the_members_that_have_some():
    opts = ["distill.teachers=[other.onnx]", "distill.self_teacher=true"]
    rows = by_name(build_study("family", ULTRA, opts, only=["v1", "v2", "v2_ultra_plan"]))
    assert not rows["v1"].distill.enabled and not rows["v1_compact"].distill.enabled
    assert rows["v2"].distill.teachers == rows["v2_ultra_plan"].distill.teachers == ["other.onnx"]


def test_rows_that_cannot_inherit_start_from_the_backbone():
    opts = ["train.inherit_weights=teacher.pth", "train.backbone_weights="]
    for name in ("family", "ladder"):
        rows = by_name(build_study(name, "v2_ultra", opts))
        own = rows.pop("v2_ultra", None)
        assert own is None or own.train.inherit_weights == "teacher.pth"
        assert {(r.train.inherit_weights, r.train.backbone_weights) for r in rows.values()} == {("", "teacher.pth")}
    rows = by_name(build_study("innovations", "v2_ultra", opts))
    assert {r.train.inherit_weights for r in rows.values()} == {"teacher.pth"}


def test_runs_of_different_studies_never_share_a_name():
    names = [r.name for name, mode in ALL for r in build_study(name, ULTRA, mode=mode).rows]
    assert len(names) == len(set(names))


def test_commands_repeat_the_run_by_hand():
    study = build_study("innovations", ULTRA, ["train.epochs=7"], only=["acf"])
    assert [r.name for r in study.rows] == ["base", "acf"]
    row = study.rows[1]
    command = Launch("cpu", 2, 3).command(study, row, 5, Path("o/acf-s5"))
    assert command[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "3"]
    out = command.index("--out")
    opts, rest = command[command.index("--opts") + 1 : out], command[out + 1 :]
    assert rest == ["o/acf-s5", "--resume", "--device", "cpu", "--threads", "2"]
    assert load_config(row.config, opts) == study.load(row, 5)
    assert study.load(row, 5).train.seed == 5 and study.load(row, 5).train.epochs == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "acff"], "acff"),
        (["--study", "ladder", "--mode", "leave-one-out"], "--mode"),
        (["--opts", "train.epoch=3"], "train.epoch"),
        (["--opts", "data.select_images=0"], "select_images"),
        (["--opts", "train.patience=3"], "train.patience"),
        (["--config", "nosuch"], "nosuch"),
        (["--config", "v2_ultra_refine"], "train.only"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, words, capsys, tmp_path):
    assert ablate.main([*arguments, "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


# -- gains and noise ---------------------------------------------------------------------------------------------------


def faces(images: int = 40) -> EvalSet:
    """One 60 px face per image."""
    keys = [f"e/{i}" for i in range(images)]
    boxes = np.tile([[10.0, 10.0, 60.0, 60.0]], (images, 1))
    valid = {s: np.ones(images, bool) for s in ("easy", "medium", "hard")}
    return EvalSet("train_select", Path("x"), keys, keys, GroundTruth(keys, boxes, np.arange(images + 1), valid))


def found(test: EvalSet, share: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Predictions that hit a share of the faces; each image also has a faint false positive."""
    hit = np.random.default_rng(seed).permutation(len(test.keys)) < share * len(test.keys)
    wrong = [200.0, 200.0, 60.0, 60.0, 0.1]
    return {k: np.array([[10.0, 10, 60, 60, 0.9], wrong] if h else [wrong]) for k, h in zip(test.keys, hit)}


def test_verdicts():
    assert verdict(0.05, 0.04, 0.06, 2, 0.001, 5) == "better"
    assert verdict(-0.05, -0.06, -0.04, 2, 0.001, 5) == "worse"
    assert verdict(0.05, -0.01, 0.06, 2, 0.001, 5) == WITHIN_NOISE  # image noise
    assert verdict(0.05, 0.04, 0.06, 2, 0.03, 5) == WITHIN_NOISE  # training noise: t 2.57 x 0.03
    assert verdict(0.05, 0.04, 0.06, 2, 0.022, 5) == WITHIN_NOISE  # 2.57 x 0.022 x sqrt(2/2) = 0.057
    assert verdict(0.05, 0.04, 0.06, 8, 0.022, 5) == "better"  # with more seeds half of that
    assert verdict(0.05, 0.04, 0.06, 2, 0.01, 1) == WITHIN_NOISE  # t of one degree of freedom: 12.7
    assert verdict(0.05, 0.04, 0.06, 1, 0.0, 0) == ONE_SEED


def test_training_noise_is_pooled_over_rows():
    deviation, freedom = training_noise({"a": {0: 0.5, 1: 0.6}, "b": {0: 0.9, 1: 0.8}, "c": {0: 0.1}})
    assert freedom == 2 and deviation == pytest.approx(np.sqrt(0.005))
    assert training_noise({"a": {0: 0.5}}) == (0.0, 0)


def test_gains_average_seeds_and_pair_images():
    test = faces()
    good = {s: match(found(test, 0.9, s), test.truth) for s in (0, 1)}
    poor = {s: match(found(test, share, s), test.truth) for s, share in ((0, 0.5), (1, 0.6), (2, 0.1))}
    gain = gains(good, poor, test.truth, 200)["ap"]
    assert gain["per_seed"] == pytest.approx({0: 0.4, 1: 0.3}, abs=1e-6)
    assert gain["delta"] == pytest.approx(0.35) and gain["spread"] == pytest.approx(0.1)
    assert 0.1 < gain["low"] < 0.35 < gain["high"] < 0.6
    turned = gains(good, poor, test.truth, 200, sign=-1)["hard"]
    assert turned["delta"] == pytest.approx(-0.35) and turned["low"] < turned["delta"] < turned["high"]
    same = gains(good, good, test.truth, 50)["easy"]
    assert (same["delta"], same["low"], same["high"]) == (0, 0, 0)
    assert gains(good, {7: good[0]}, test.truth, 50) == {}


def test_report_says_what_is_noise_and_what_is_missing(tmp_path):
    study = build_study("innovations", ULTRA, only=["feature_recycling", "acf", "dca"])
    test = faces()
    shares = {"base": (0.5, 0.5), "feature_recycling": (0.9, 0.9), "acf": (0.5, 0.525)}
    preds = {(n, s): {test.name: found(test, share[s])} for n, share in shares.items() for s in (0, 1)}
    errors = {("dca", 0): "failed: it broke", ("dca", 1): "not run"}
    report = build_report(study, [0, 1], tmp_path, [test], preds, errors, Launch(), samples=100, rounds=1)
    rows = {r["name"]: r for r in report["rows"]}
    assert rows["base"]["gain"] == {} and rows["base"]["ap"]["train_select"]["ap"] == pytest.approx(0.5, abs=1e-3)
    gain = rows["feature_recycling"]["gain"]["train_select"]["reference"]
    assert gain["ap"]["verdict"] == "better" and gain["ap"]["delta"] == pytest.approx(0.4, abs=1e-3)
    assert rows["acf"]["gain"]["train_select"]["reference"]["ap"]["verdict"] == WITHIN_NOISE
    assert rows["dca"]["gain"] == {} and rows["dca"]["runs"][0]["status"] == "failed: it broke"
    assert rows["acf"]["parameters"] > rows["base"]["parameters"] > 200_000 and not rows["acf"]["over_budget"]
    assert rows["base"]["macs"] > 1e8 and rows["base"]["latency_ms"] > 0
    json.dumps(report)
    text = markdown(report)
    line = next(x for x in text.splitlines() if x.startswith("| FeatureRecycling "))
    assert "| +1.0 |" in line and "+40.0" in line and "| better |" in line
    assert "**Within noise: AdaptiveContextFusion.**" in text
    assert "- DynamicChannelAllocation, seed 0: failed: it broke" in text
    assert "python train_v2_progressive.py --config" in text


def test_ladder_report_compares_with_the_rung_before_and_the_base(tmp_path):
    study = build_study("ladder", ULTRA, only=["channel_cut", "feature_reuse"])
    test = faces()
    preds = {(r.name, 0): {test.name: found(test, share)} for r, share in zip(study.rows, (0.4, 0.6, 0.8))}
    report = build_report(study, [0], tmp_path, [test], preds, {}, Launch(), samples=50, rounds=0)
    gain = report["rows"][2]["gain"]["train_select"]
    assert (gain["before"]["over"], gain["reference"]["over"]) == ("channel_cut", "v2_base")
    assert gain["before"]["ap"]["delta"] == pytest.approx(0.2, abs=1e-3)
    assert gain["reference"]["ap"]["delta"] == pytest.approx(0.4, abs=1e-3)
    assert report["rows"][0]["over_budget"] and "(over 250,000)" in markdown(report)
    assert gain["before"]["ap"]["verdict"] in (ONE_SEED, WITHIN_NOISE) and "One seed only" in markdown(report)


def test_tta_is_judged_without_training_noise_against_its_own_weights(tmp_path):
    study = build_study("ladder", ULTRA, only=["multi_teacher", "tta"])
    test = faces()
    preds = {(r.name, 0): {test.name: found(test, share)} for r, share in zip(study.rows, (0.4, 0.6, 0.95))}
    report = build_report(study, [0], tmp_path, [test], preds, {}, Launch(), samples=50, rounds=1)
    gain = report["rows"][2]["gain"]["train_select"]
    assert gain["before"]["ap"]["verdict"] == "better" and gain["reference"]["ap"]["verdict"] == ONE_SEED
    for cost in ("macs", "latency_ms"):
        assert report["rows"][2][cost] == 7 * report["rows"][1][cost] > 0
    preds |= {(r.name, 1): preds[r.name, 0] for r in study.rows}
    report = build_report(study, [0, 1], tmp_path, [test], preds, {}, Launch(), samples=50, rounds=0)
    assert report["sets"]["train_select"]["freedom"] == 2  # three rows, but two trainings per seed


def test_leave_one_out_tells_what_an_innovation_contributes(tmp_path):
    study = build_study("innovations", ULTRA, mode="leave-one-out", only=["no_feature_recycling"])
    test = faces()
    preds = {(r.name, s): {test.name: found(test, share)} for r, share in zip(study.rows, (0.9, 0.5)) for s in (0, 1)}
    report = build_report(study, [0, 1], tmp_path, [test], preds, {}, Launch(), samples=200, rounds=0)
    gain = report["rows"][1]["gain"]["train_select"]["reference"]["ap"]
    assert gain["delta"] == pytest.approx(0.4, abs=1e-3) and gain["verdict"] == "better"
    assert 0.2 < gain["high"] - gain["low"] < 0.4  # 95% of 40 images: 4 sqrt(0.24 / 40)


def test_stages_end_with_their_own_last_validation(tmp_path):
    stages = [{"size": 64, "batch_size": 3, "until": 0.5}, {"size": 96, "batch_size": 3}]
    cfg = make_config(tmp_path, train={"epochs": 10, "stages": stages}).train
    assert stage_ends(tmp_path, cfg) == []
    lines = [{"kind": "val", "step": e, "epoch": e, "ap": e / 100} for e in (2, 4, 5, 6, 9)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stage_ends(tmp_path, cfg) == [
        {"size": 64, "end": 5, "epoch": 5, "ap": 0.05},
        {"size": 96, "end": 10, "epoch": 9, "ap": 0.09},
    ]


# -- runs --------------------------------------------------------------------------------------------------------------


def broken_photo(tmp_path: Path) -> tuple:
    """A config with four held-out photos, one of which breaks off behind its header; and that photo."""
    cfg = make_config(make_folder(tmp_path / "data"), select_images=4)
    photo = tmp_path / "data" / "train" / "images" / select_set(cfg.data).names[1]
    Image.open(photo).save(photo, "JPEG")  # whose header is read without the rest
    photo.write_bytes(photo.read_bytes()[:2000])
    return cfg, photo


def test_a_held_out_photo_that_breaks_off_is_left_out_and_named(tmp_path, caplog):
    cfg, photo = broken_photo(tmp_path)
    test = select_set(cfg.data)
    assert len(test.names) == len(test.keys) == len(test.truth) == 3
    assert not any(photo.match(name) for name in test.names)
    assert [str(photo) in r.getMessage() for r in caplog.records] == [True]
    cfg.data.on_bad_image = "fail"
    with pytest.raises(ImageError, match=photo.name):
        select_set(cfg.data)


def test_calibration_does_without_a_photo_that_breaks_off(tmp_path, caplog):
    cfg, photo = broken_photo(tmp_path)
    model = ModelConfig(out_channels=8, bifpn_repeats=1, ssh_groups=2)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "in.pth", inference_content("tiny", model, build_model(model).state_dict()))
    told = calibrate(tmp_path / "in.pth", cfg.data, str(tmp_path / "out.pth"), torch.device("cpu"))
    assert told["images"] == 3 and [str(photo) in r.getMessage() for r in caplog.records] == [True]


def test_missing_val_dev_images_are_found_before_anything_trains(tmp_path):
    (tmp_path / "list.txt").write_text("0--Park/a.jpg\n")
    with pytest.raises(EvaluationError, match=r"a\.jpg: no such image"):
        official_set(str(tmp_path / "imagse"), str(tmp_path), str(tmp_path / "list.txt"))


def test_kept_predictions_are_reused_only_for_the_same_checkpoint_and_images(tmp_path):
    preds = {"e/a": np.array([[1, 2, 3, 4, 0.5]]), "e/b": np.zeros((0, 5)), "e/c": np.ones((2, 5))}
    keep(tmp_path / "p.npz", "f00d", preds)
    again = load_kept(tmp_path / "p.npz", "f00d", ["e/c", "e/a", "e/b"])
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in preds.items()}
    assert load_kept(tmp_path / "p.npz", "beef", list(preds)) is None
    assert load_kept(tmp_path / "p.npz", "f00d", ["e/a"]) is None
    content = (tmp_path / "p.npz").read_bytes()
    flipped = content[:100] + bytes([content[100] ^ 255]) + content[101:]
    for damaged in (b"half a file", content[: len(content) // 2], flipped):
        (tmp_path / "p.npz").write_bytes(damaged)
        assert load_kept(tmp_path / "p.npz", "f00d", list(preds)) is None


def fake_checkpoint(folder: Path, cfg, epoch: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = inference_content(cfg.name, cfg.model, build_model(cfg.model).state_dict(), {})
    content["training"] = {"config": to_dict(cfg), "epoch": epoch, "step": 8}
    save_checkpoint(folder / "last.pth", content)


def test_a_run_trained_again_to_the_same_step_is_asked_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation_runs, "detect_images", lambda *_, **__: asked.append(1) or [])
    test = EvalSet("train_select", Path("x"), [], [], GroundTruth([], np.zeros((0, 4)), np.zeros(1, int), {}))
    for _ in range(2):
        fake_checkpoint(tmp_path, load_config(ULTRA), epoch=2)  # other random weights each time
        for _ in range(2):
            predictions(tmp_path, [test], False, "original", "cpu")
    assert len(asked) == 2


def test_test_time_augmentation_is_used_and_kept_apart(tmp_path, monkeypatch):
    """And all faces count, as in the evaluation."""
    asked = []

    def detect(detector, folder, names, **options):
        asked.append((detector.keep_k, options))
        return []

    monkeypatch.setattr(ablation_runs, "detect_images", detect)
    test = EvalSet("train_select", Path("x"), [], [], GroundTruth([], np.zeros((0, 4)), np.zeros(1, int), {}))
    fake_checkpoint(tmp_path, load_config(ULTRA), epoch=2)
    settings = [(False, "original"), (True, "original"), (False, "1600")]
    for _ in range(2):
        for tta, scale in settings:
            predictions(tmp_path, [test], tta, scale, "cpu")
    assert asked == [(KEEP_ALL, {"scale": scale, "tta": tta}) for tta, scale in settings]


def test_predictions_kept_with_another_limit_are_made_anew(tmp_path, monkeypatch):
    keep(tmp_path / "p.npz", "f00d", {"e/a": np.ones((2, 5))})
    monkeypatch.setattr(ablation_runs, "KEEP_ALL", KEEP_ALL + 1)
    assert load_kept(tmp_path / "p.npz", "f00d", ["e/a"]) is None


@pytest.mark.parametrize("key", sorted(START_KEYS))
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_from_other_weights_is_not_taken_for_a_row(tmp_path, key, epoch):
    cfg = load_config("v2_ultra_polish", ["train.epochs=2"])
    fake_checkpoint(tmp_path, cfg, epoch)
    cfg.train.log_every += 1  # this may change as ever
    assert finished_step(tmp_path, cfg) == (8 if epoch == 2 else None)
    section, name = key.split(".")
    setattr(getattr(cfg, section), name, "other.pth")
    with pytest.raises(RunError, match=rf"{key}.*another --out"):
        finished_step(tmp_path, cfg)


def test_finished_runs_are_skipped_and_half_finished_ones_continued(tmp_path, monkeypatch):
    study = build_study("innovations", ULTRA, ["train.epochs=2"], only=["acf", "dca"])
    base, acf, dca = study.rows
    fake_checkpoint(tmp_path / "base-s0", study.load(base, 0), epoch=2)
    fake_checkpoint(tmp_path / "acf-s0", study.load(acf, 0), epoch=1)
    trained = []

    def fake_train(command, folder):
        trained.append(folder.name)
        assert "--resume" in command
        fake_checkpoint(folder, study.load(acf, 0), epoch=2)

    monkeypatch.setattr(ablate, "train", fake_train)
    assert ablate.finish(study, base, 0, tmp_path, Launch(), True) == 8
    assert ablate.finish(study, acf, 0, tmp_path, Launch(), False) is None  # report only
    assert trained == []
    assert ablate.finish(study, acf, 0, tmp_path, Launch(), True) == 8
    assert trained == ["acf-s0"]
    with pytest.raises(RunError, match=r"train\.epochs"):
        finished_step(tmp_path / "base-s0", load_config(ULTRA, [*study.overrides(base, 0), "train.epochs=3"]))
    (tmp_path / "dca-s0").mkdir()
    (tmp_path / "dca-s0" / "last.pth").write_bytes(b"broken")
    with pytest.raises(RunError, match=r"last\.pth"):
        finished_step(tmp_path / "dca-s0", study.load(dca, 0))


def test_a_failing_run_is_reported_by_its_last_words(tmp_path):
    code = "import sys; print('train_v2_progressive.py: x.pth: damaged'); print('Traceback tail'); sys.exit(1)"
    with pytest.raises(RunError, match=r"exit code 1: x\.pth: damaged"):
        train([sys.executable, "-c", code], tmp_path / "run")
    assert "Traceback tail" in (tmp_path / "run" / "console.log").read_text()


def test_sigterm_lets_the_run_save_and_stops_the_ablation(tmp_path):
    child = (
        "import os, signal, sys, time\n"
        "def save(*a): open(sys.argv[1], 'w').close(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        train([sys.executable, "-c", child, str(tmp_path / "saved")], tmp_path / "run")
    assert stopped.value.code == 143 and (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_rows_end_to_end_and_resume(tmp_path, monkeypatch, capsys):
    tree = {
        "name": "tiny",
        "model": {"out_channels": 8, "bifpn_repeats": 1, "cbam": "neck", "ssh_groups": 2},
        "data": {"root": str(make_folder(tmp_path / "data")), "select_images": 2, "workers": 0},
        "train": {"epochs": 2, "stages": [{"size": 64, "batch_size": 4}], "amp": "off", "pictures": 0, "val_every": 1},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    command = ["--config", str(file), "--only", "feature_recycling", "dca", "--seeds", "0", "--samples", "20"]
    command += ["--out", str(out), "--device", "cpu", "--threads", "1", "--json"]
    started = []

    def some_train(argv, folder):
        started.append(folder.name)
        if folder.name.startswith("dca"):
            raise RunError("exit code 1: out of paper")
        train(argv, folder)

    monkeypatch.setattr(ablate, "train", some_train)
    threads = torch.get_num_threads()
    try:
        assert ablate.main(command) == 1  # one run failed, the others went on
        assert started == ["base-s0", "feature_recycling-s0", "dca-s0"]
        report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert report == json.loads((out / "innovations.json").read_text())
        rows = {r["name"]: r for r in report["rows"]}
        assert report["sets"]["train_select"]["images"] == 2
        assert 0 <= rows["base"]["ap"]["train_select"]["ap"] <= 1
        assert rows["feature_recycling"]["gain"]["train_select"]["reference"]["over"] == "base"
        assert rows["dca"]["runs"][0]["status"] == "failed: exit code 1: out of paper"
        assert "out of paper" in (out / "innovations.md").read_text()

        assert ablate.main(command) == 2  # it holds runs: only --resume may touch them
        assert "--resume" in capsys.readouterr().err
        del started[:]
        monkeypatch.setattr(ablation_runs, "detect_images", None)  # predictions are kept, too
        assert ablate.main([*command, "--report-only"]) == 0
        assert ablate.main([*command, "--resume"]) == 1
        assert started == ["dca-s0"]
        before = (out / "innovations.json").read_text()
        assert ablate.main([*command, "--resume", "--opts", "train.lr=1e-5"]) == 1  # no run is of this config
        assert (out / "innovations.json").read_text() == before
    finally:
        torch.set_num_threads(threads)


def test_list_trains_nothing(capsys, tmp_path):
    for name in STUDIES:
        assert ablate.main(["--study", name, "--list", "--seeds", "0", "--out", str(tmp_path / "o")]) == 0
    assert "multi_teacher-s0" in capsys.readouterr().out and not (tmp_path / "o").exists()


def test_row_shares_the_run_it_was_trained_as():
    assert Row("tta", "", "", "c", (), tta=True, trained_as="a").run == "a"
    with pytest.raises(ConfigError, match="known: base"):
        build_study("innovations", ULTRA, only=["nothing"])


def test_studies_of_a_config_that_skips(tmp_path):
    (tmp_path / "c.yaml").write_text(f"base: {CONFIG_DIR / 'v2_ultra_full.yaml'}\nmodel: {{sharing_skip_below: 0.3}}\n")
    for name, mode in (("innovations", MODES[0]), ("innovations", MODES[1]), ("ladder", MODES[0])):
        study = build_study(name, tmp_path / "c.yaml", mode=mode)
        models = [study.load(row, 0).model for row in study.rows]
        assert {(m.dynamic_sharing, m.sharing_skip_below) for m in models} == {(True, 0.3), (False, 0.0)}
