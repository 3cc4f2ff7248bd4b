"""Trainers: exact resume, fault handling, schedule, EMA, freezing, data-parallel equality."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from data.dataset import FaceDataset, load_dataset, select_dataset
from data.images import shrink
from data.labels import ImageError
from layers.matching import assign
from models.detector import Detections, FaceDetector
from models.featherface import build_model
from tests.face_data import make_config, make_folder
from tests.squares import SquareNetwork, picture
from utils import checkpoint, distributed, train_cli, validation
from utils.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint, take_training
from utils.config import Config, ConfigError, SizeStage, TrainConfig, from_dict, load_config, to_dict
from utils.distributed import World, own_gpu
from utils.engine import Meter, NonFiniteLoss, frozen_stages, learning_rate, mixed_precision, set_train_mode, uses_bf16
from utils.logger import LogError, RunLogger, read_lines, truncate
from utils.optim import EMA, build_optimizer, build_scheduler
from utils.resume import ResumeError, first_difference
from utils.start import start_weights
from utils.train_cli import main
from utils.trainer import Trainer, make_reproducible, plan_stages
from utils.validation import Validator, draw, readable

ROOT = Path(__file__).resolve().parent.parent
CPU = World(torch.device("cpu"))


def draw_face(canvas: ImageDraw.ImageDraw, x: int, y: int, side: int) -> str:
    """A cartoon face and its label line."""
    canvas.ellipse([x, y, x + side, y + side], fill=(230, 190, 160))
    spots = [(0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8)]
    points = [(x + a * side, y + b * side) for a, b in spots]
    for px, py in points:
        canvas.ellipse([px - 2, py - 2, px + 2, py + 2], fill=(40, 20, 20))
    return f"{x} {y} {side} {side} " + " ".join(f"{px} {py} 0.0" for px, py in points) + " 0.9"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Ten pictures with drawn faces and a config for them; returns the YAML file."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(10):
        image = Image.fromarray(rng.integers(60, 130, (96, 128, 3), dtype=np.uint8))
        lines.append(f"# event/{i}.png")
        lines += [draw_face(ImageDraw.Draw(image), 4 + 60 * k, int(rng.integers(2, 40)), 40) for k in range(2)]
        path = folder / "data" / "train" / "images" / "event" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (folder / "data" / "train" / "label.txt").write_text("\n".join(lines) + "\n")
    tree = {
        "name": "tiny",
        "model": {"out_channels": 8, "bifpn_repeats": 1, "cbam": "neck", "ssh_groups": 2, "dropblock": 0.1},
        "data": {"root": str(folder / "data"), "select_images": 2, "workers": 0},
        "train": {
            "epochs": 3,
            "stages": [{"until": 1.0, "size": 96, "batch_size": 2}],
            "amp": "off",
            "deterministic": True,
            "log_every": 1,
            "val_every": 0,
            "pictures": 1,
            "ema_decay": 0.9,
        },
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture
def cfg(tiny) -> Config:
    return from_dict(Config, yaml.safe_load(tiny.read_text()), str(tiny))


def weights(path: Path) -> dict:
    """Everything a run has learnt: raw weights, EMA weights and optimiser moments, by name."""
    content = load_checkpoint(path)
    moments = content["training"]["optimizer"]["state"]
    return {
        **{f"raw.{k}": v for k, v in content["training"]["model"].items()},
        **{f"ema.{k}": v for k, v in content["state_dict"].items()},
        **{f"adam.{i}.{k}": v for i, state in moments.items() for k, v in state.items()},
    }


def assert_equal_runs(a: Path, b: Path) -> None:
    first, second = weights(a / "last.pth"), weights(b / "last.pth")
    assert first.keys() == second.keys()
    different = [k for k in first if not torch.equal(first[k], second[k])]
    assert not different, different[:5]


def log_of(out: Path, kind: str = "train") -> list[dict]:
    return [line for line in read_lines(out / "log.jsonl") if line["kind"] == kind]


def learnt(lines: list[dict]) -> list[dict]:
    """Log lines without timings."""
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait", "seconds")} for line in lines]


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> Path:
    """An uninterrupted run of the tiny config."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert Trainer(from_dict(Config, yaml.safe_load(tiny.read_text()), str(tiny)), out, CPU).fit() == 0
    return out


def start_process(tiny: Path, out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, "train_v2_progressive.py", "--config", str(tiny), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "--device", "cpu", *more], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "log.jsonl").exists() and any(line["step"] >= step for line in read_lines(out / "log.jsonl")):
            return
        time.sleep(0.02)
    pytest.fail(f"the run never reached step {step}: {process.stderr.read().decode()}")


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_run_writes_usable_checkpoints_and_log(reference):
    lines = log_of(reference)
    assert [(line["step"], line["epoch"]) for line in lines] == [(i + 1, i // 4 + 1) for i in range(12)]
    assert all(math.isfinite(line["total"]) for line in lines)
    cfg = load_config(reference / "config.yaml")
    assert [line["lr"] for line in lines] == pytest.approx(rates(cfg.train, 12))
    assert {"epoch", "lr", "class", "box", "landmark", "grad_norm", "images_per_s", "data_wait"} <= lines[0].keys()
    assert log_of(reference, "val")[-1]["images"] == 2
    assert len(log_of(reference, "start")) == 1 and log_of(reference, "start")[0]["images"] == 8
    assert cfg.train.log_every == 1
    for name in ("last.pth", "best.pth"):
        model, meta = load_model(reference / name)
        assert meta["name"] == "tiny" and not model.training
    assert "training" not in load_checkpoint(reference / "best.pth")
    assert list((reference / "tensorboard").iterdir())


def test_sigkill_then_resume_is_bit_identical(tiny, reference, tmp_path):
    out = tmp_path / "run"
    opts = ("--threads", str(torch.get_num_threads()), "--opts", "train.save_every=3")
    process = start_process(tiny, out, *opts)
    wait_for_step(out, 7, process)  # the second epoch is steps 5..8; the last checkpoint is of step 6
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert load_checkpoint(out / "last.pth")["training"]["step"] < 12
    with open(out / "log.jsonl", "a") as f:
        f.write('{"kind": "train", "st')  # a line that the kill cut short
    assert main("train", "", str(tiny), ["--out", str(out), "--resume", "--device", "cpu"]) == 0
    assert_equal_runs(reference, out)
    assert len(log_of(out, "start")) == 1
    assert learnt(log_of(out)) == learnt(log_of(reference))
    assert learnt(log_of(out, "val")) == learnt(log_of(reference, "val"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_and_saves(cfg, reference, tmp_path, monkeypatch, number, code):
    out = tmp_path / "run"
    trainer = Trainer(cfg, out, CPU)
    check = trainer.run.guard.check

    def check_and_interrupt(value, loss, names, step):
        check(value, loss, names, step)
        if step == 6:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.run.guard, "check", check_and_interrupt)
    before = signal.getsignal(number)
    assert trainer.fit() == code
    assert signal.getsignal(number) is before
    assert load_checkpoint(out / "last.pth")["training"]["step"] == 6
    assert Trainer(cfg, out, CPU, resume=True).fit() == 0
    assert_equal_runs(reference, out)


def test_a_second_signal_stops_at_once(cfg, tmp_path):
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    trainer.on_step = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_validation_that_was_stopped_or_not_saved_comes_again(cfg, reference, tmp_path, monkeypatch):
    cfg.train.val_every, out = 1, tmp_path / "run"
    trainer = Trainer(cfg, out, CPU)
    validate = trainer.validator

    def validate_and_interrupt(*arguments):
        trainer.signal = 130
        return validate(*arguments)

    monkeypatch.setattr(trainer, "validator", validate_and_interrupt)
    assert trainer.fit() == 130
    saved = load_checkpoint(out / "last.pth")["training"]
    assert (saved["step"], saved["epoch"], saved["done"]) == (4, 0, 4) and not log_of(out, "val")
    assert saved["progress"] == 3 / 4 / 3  # the last step's, of four in each of three epochs
    assert Trainer(cfg, out, CPU, resume=True).run.progress == 3 / 4 / 3
    with (out / "log.jsonl").open("a") as log:  # as if killed before the next checkpoint
        log.write('{"kind": "val", "step": 4, "epoch": 1}\n')
    assert Trainer(cfg, out, CPU, resume=True).fit() == 0
    assert_equal_runs(reference, out)
    assert [(line["epoch"], line["images"]) for line in log_of(out, "val")] == [(1, 2), (2, 2), (3, 2)]


def test_time_limit_stops_with_a_checkpoint(tiny, reference, tmp_path, capsys):
    command = ["--out", str(tmp_path / "run"), "--device", "cpu", "--resume"]
    assert main("train", "", str(tiny), [*command, "--max-minutes", "1e-9"]) == 0
    assert "--resume continues" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "last.pth")["training"]["step"] == 1
    assert main("train", "", str(tiny), [*command, "--json"]) == 0
    assert_equal_runs(reference, tmp_path / "run")
    told, figures = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"finished: best AP 0\.\d{4} after epoch 3: .*best\.pth", told) and str(tmp_path) in told
    figures = json.loads(figures)
    assert figures["file"] == str(tmp_path / "run" / "best.pth") and f"{figures['ap']:.4f}" in told
    assert figures["epoch"] == 3 and {"ap_easy", "ap_medium", "ap_hard"} < figures.keys()


@pytest.mark.parametrize("missing", ["train.init_weights", "train.inherit_weights", "distill.teachers"])
def test_missing_weights_show_before_photos_are_decoded(tiny, tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setattr("utils.trainer.build_pipeline", lambda *_: pytest.fail("decodes all photos"))
    value = "[nowhere.pth]" if missing == "distill.teachers" else "nowhere.pth"
    command = ["--out", str(tmp_path / "run"), "--device", "cpu", "--opts", f"{missing}={value}"]
    assert main("train", "", str(tiny), command) == 1
    assert "nowhere.pth: cannot read" in capsys.readouterr().err


def test_time_limits_are_minutes(cfg, tmp_path):
    now = time.monotonic()
    assert Trainer(cfg, tmp_path / "run", CPU, max_minutes=2).deadline == pytest.approx(now + 120, abs=30)


def test_without_held_out_images_the_last_weights_are_the_best(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    opts = ["data.select_images=0", "train.epochs=1", "train.stages=[{size: 96, batch_size: 10}]"]  # one step
    assert main("train", "", str(tiny), ["--out", str(out), "--device", "cpu", "--opts", *opts]) == 0
    assert capsys.readouterr().out.strip() == f"finished: {out / 'best.pth'}"
    best, last = load_checkpoint(out / "best.pth")["state_dict"], load_checkpoint(out / "last.pth")
    for state in (last["state_dict"], last["training"]["model"]):  # the average begins with the first step's weights
        assert all(torch.equal(v, state[k]) for k, v in best.items())


def test_profile_names_the_slow_operations_and_changes_nothing(tiny, reference, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_cli, "WARM_UP", 2)
    command = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main("train", "", str(tiny), [*command, "--profile", "2"]) == 0
    shown = capsys.readouterr().out
    assert "aten::convolution_backward" in shown and "Self CPU" in shown
    assert load_checkpoint(tmp_path / "run" / "last.pth")["training"]["step"] == 4
    assert main("train", "", str(tiny), [*command, "--resume"]) == 0
    assert_equal_runs(reference, tmp_path / "run")
    monkeypatch.setattr(train_cli, "WARM_UP", 1000)
    command[1] = str(tmp_path / "short")
    assert main("train", "", str(tiny), [*command, "--profile", "2"]) == 0
    assert "the run ended before --profile looked, at its step 1000" in capsys.readouterr().err


def run_twice(folder: Path, program: str, *arguments: Path) -> None:
    """Run a program on two processes, each with its ``world``."""
    script = folder / "both.py"
    script.write_text(
        "import sys, torch\n"
        "from utils.config import load_config\n"
        "from utils.distributed import start_world\n"
        "from utils.trainer import Trainer\n"
        "world = start_world(torch.device('cpu'))\n"
        f"{program}"
        "world.close()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_two_gloo_processes_hold_the_same_weights(tiny, tmp_path):
    out = tmp_path / "run"
    run_twice(
        tmp_path,
        "trainer = Trainer(load_config(sys.argv[1], ['train.epochs=1']), sys.argv[2], world)\n"
        "assert trainer.fit() == 0\n"
        "state = {**trainer.run.model.state_dict(), **trainer.run.ema.state_dict()}\n"
        "torch.save((state, trainer.run.step, trainer.best['ap']), f'{sys.argv[2]}/rank{world.rank}.pt')\n",
        tiny,
        out,
    )
    (first, steps, ap), (second, *others) = (torch.load(out / f"rank{r}.pt") for r in (0, 1))
    assert [steps, ap] == others and steps == 4  # batch 2 is one picture per process
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert len(log_of(out)) == 4


def test_two_processes_learn_what_one_does_from_the_whole_batch(tiny, tmp_path):
    out = tmp_path / "run"
    options = ["train.epochs=1", "train.optimizer=sgd", "train.clip_norm=1e6"]  # gradients as they are
    options += ["model.dropblock=0", "train.freeze_bn_at=0"]  # these differ between processes
    run_twice(
        tmp_path, f"assert Trainer(load_config(sys.argv[1], {options}), sys.argv[2], world).fit() == 0\n", tiny, out
    )
    alone = Trainer(load_config(tiny, options), tmp_path / "alone", CPU)
    start = {k: v.clone() for k, v in alone.run.model.state_dict().items()}
    assert alone.fit() == 0
    both = load_checkpoint(out / "last.pth")["training"]["model"]
    for key, value in alone.run.model.state_dict().items():
        moved = (value - start[key]).abs().max()
        assert (value - both[key]).abs().max() <= 1e-3 * moved + 1e-6, key


def test_each_process_goes_on_with_its_own_memory_of_past_predictions(tiny, tmp_path):
    run_twice(
        tmp_path,
        "options = ['distill.self_teacher=true', 'distill.stages=[{until: 1.0, terms: {temporal: 1.0}}]']\n"
        "cfg = load_config(sys.argv[1], options)\n"
        "trainer = Trainer(cfg, sys.argv[2], world)\n"
        "def stop():\n"
        "    trainer.signal = 130 if trainer.run.step == 3 and world.rank == 1 else 0\n"  # all heed one's signal
        "trainer.on_step = stop\n"
        "assert trainer.fit() == 130\n"
        "before = trainer.run.distiller.memory.state_dict()\n"
        "seen = world.gather(set(before['owner'].tolist()))\n"
        "assert seen[0] != seen[1], seen\n"
        "after = Trainer(cfg, sys.argv[2], world, resume=True).run.distiller.memory.state_dict()\n"
        "assert all(torch.equal(before[k], after[k]) for k in before)\n",
        tiny,
        tmp_path / "run",
    )


def test_every_process_of_several_asks_for_its_own_gpu(monkeypatch):
    assert own_gpu("cuda") == "cuda" and own_gpu("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_gpu("cuda") == "cuda:3" and own_gpu("cpu") == "cpu"


@pytest.mark.parametrize("device", [[], ["--device", "cuda"]])
def test_more_processes_than_gpus_are_one_line(tiny, tmp_path, monkeypatch, capsys, device):
    monkeypatch.setenv("WORLD_SIZE", "100")
    monkeypatch.setenv("LOCAL_RANK", "99")  # more than any machine has
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main("train", "", str(tiny), ["--out", str(tmp_path / "run"), *device]) == 2
    assert "device 'cuda:99' cannot be used" in capsys.readouterr().err


def test_early_stopping_waits_for_its_patience(cfg, tmp_path, monkeypatch, capsys):
    cfg.train.epochs, cfg.train.val_every, cfg.train.patience = 9, 1, 2
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    aps = iter([0.1, 0.0, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(trainer, "validator", lambda *_: ({"ap": next(aps)}, []))
    assert trainer.fit() == 0
    assert trainer.epoch == 5 and trainer.best == {"epoch": 3, "ap": 0.3}
    resumed = Trainer(cfg, tmp_path / "run", CPU, resume=True)
    assert resumed.fit() == 0 and resumed.epoch == 5 and resumed.best == trainer.best
    capsys.readouterr()
    others = (
        (cfg.train, "val_scale", "vga"),
        (cfg.train, "val_images", 1),
        (cfg.data, "val_labels", "train/label.txt"),
    )
    for section, key, value in others:
        before = getattr(section, key)
        setattr(section, key, value)  # whose APs are others
        resumed = Trainer(cfg, tmp_path / "run", CPU, resume=True)
        assert resumed.best == {"epoch": 0, "ap": -1.0} and resumed.stale == 0
        assert resumed.validator.scale == cfg.train.val_scale
        assert f"{key} changed" in capsys.readouterr().err
        setattr(section, key, before)


@pytest.mark.parametrize("faces", ["", "5 5 6 6\n"])
def test_what_to_validate_on_has_a_face_or_chooses_nothing(cfg, tmp_path, monkeypatch, caplog, faces):
    """Faces below 10 px count where there are no others."""
    source = Path(cfg.data.root, "train")
    (tmp_path / "label.txt").write_text(f"# event/0.png\n{faces}")
    (tmp_path / "images").symlink_to(source / "images")
    cfg.data.select_images, cfg.data.val_labels = 0, str(tmp_path / "label.txt")
    cfg.train.epochs, cfg.train.val_every, cfg.train.patience, cfg.train.stages = 3, 1, 1, [SizeStage(1.0, 96, 10)]
    found = Detections(np.array([[5, 5, 11, 11]], np.float32), np.array([0.9], np.float32), np.zeros((1, 5, 2)))
    monkeypatch.setattr(validation, "FaceDetector", lambda *_, **__: lambda images, scale: [found] * len(images))
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    assert trainer.fit() == 0
    assert ("no face in the 1 photos to validate on" in caplog.text) == (not faces)
    assert "1 of the 1 photos to validate on are trained on too" in caplog.text
    assert trainer.best["epoch"] == bool(faces) and trainer.epoch == (2 if faces else 3)
    assert trainer.best["ap"] == (1.0 if faces else -1.0)
    assert (tmp_path / "run" / "best.pth").is_file()


def test_validation_comes_after_every_so_many_epochs_and_stages(cfg, tmp_path, monkeypatch):
    cfg.train.epochs, cfg.train.val_every = 6, 4
    cfg.train.stages = [SizeStage(0.3, 96, 8), SizeStage(1.0, 96, 8)]
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    monkeypatch.setattr(trainer, "validator", lambda *_: ({"ap": 0.0}, []))
    assert trainer.fit() == 0
    assert [line["epoch"] for line in log_of(tmp_path / "run", "val")] == [2, 4, 6]


@pytest.mark.parametrize("bf16, amx", [(False, False), (True, False), (False, True)])
def test_amp_is_bf16_where_the_device_computes_in_it(bf16, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    device, x = torch.device("cpu"), torch.ones(2, 2)
    for amp, expected in (("auto", bf16 or amx), ("bf16", True), ("off", False)):
        with mixed_precision(amp, device):
            assert (x @ x).dtype == (torch.bfloat16 if expected else torch.float32)
    assert not uses_bf16("auto", torch.device("mps"))  # whatever the CPU beside it can


def test_deformable_convolutions_train_under_bf16(cfg, tmp_path):
    cfg.model.ssh, cfg.model.class_outputs, cfg.train.amp, cfg.train.epochs = "deformable", 2, "bf16", 1
    assert Trainer(cfg, tmp_path / "run", CPU).fit() == 0
    assert all(math.isfinite(line["total"]) for line in log_of(tmp_path / "run"))


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed:\nNo space left on device")],
    ids=["system", "torch"],
)
def test_unwritable_disk_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, capsys, error):
    out = tmp_path / "run"
    command = ["--out", str(out), "--device", "cpu", "--resume", "--opts", "train.save_every=2"]
    saves, really_save = [], torch.save

    def save_until_full(content, file, *args, **kwargs):
        saves.append(content)
        if len(saves) == 2:
            file.write(b"half")
            raise error
        return really_save(content, file, *args, **kwargs)

    monkeypatch.setattr(checkpoint.torch, "save", save_until_full)
    assert main("train", "", str(tiny), command) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "last.pth" in message and "No space left" in message
    assert load_checkpoint(out / "last.pth")["training"]["step"] == 2
    assert not list(out.glob("*.part"))


def test_folder_that_cannot_be_made_is_one_line(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main("train", "", str(tiny), ["--out", str(tmp_path / "file" / "run"), "--device", "cpu"]) == 1
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and str(tmp_path / "file" / "run") in message


def test_a_log_that_cannot_be_written_is_one_line(tiny, tmp_path, capsys):
    log = tmp_path / "run" / "log.jsonl"
    log.mkdir(parents=True)
    assert main("train", "", str(tiny), ["--out", str(log.parent), "--device", "cpu"]) == 1
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and f"{log}: cannot write the log" in message
    logger = RunLogger(tmp_path, 0, 1)
    logger.file.close()
    logger.file = open("/dev/full", "w")
    with pytest.raises(LogError, match=r"log\.jsonl: .*No space left"):
        logger.write("train", {"step": 1})
    logger.close()


@pytest.mark.parametrize(
    "error, code, part",
    [
        (KeyboardInterrupt(), 130, ""),
        (NonFiniteLoss("non-finite loss at step 1; files of the batch: a.png"), 1, "a.png"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has"), 1, "smaller batch_size"),
    ],
    ids=["ctrl-c", "nan", "memory"],
)
def test_what_ends_a_run_has_its_exit_code_and_at_most_a_line(tiny, tmp_path, monkeypatch, capsys, error, code, part):
    def fit(_):
        raise error

    monkeypatch.setattr(Trainer, "fit", fit)
    assert main("train", "", str(tiny), ["--out", str(tmp_path / "run"), "--device", "cpu"]) == code
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == bool(part) and part in message


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_loss_names_the_files_and_spares_the_weights(cfg, tmp_path, what):
    out = tmp_path / "run"
    cfg.train.save_every = 1
    trainer = Trainer(cfg, out, CPU)
    criterion, names = trainer.run.criterion, []

    class Poisoned(nn.Module):
        assign = criterion.assign

        def forward(self, *args):
            losses, batch = criterion(*args), args[1]
            if trainer.run.step == 2:
                names.extend(batch["names"])
                if what == "loss":
                    losses["total"] = losses["total"] * float("nan")
                else:
                    losses["total"].register_hook(lambda gradient: gradient * float("nan"))
            return losses

    trainer.run.criterion = Poisoned()
    with pytest.raises(NonFiniteLoss) as error:
        trainer.fit()
    assert len(names) == 2 and all(name in str(error.value) for name in names) and "step 3" in str(error.value)
    assert str(error.value).startswith(f"non-finite {what} ")
    saved = load_checkpoint(out / "last.pth")["training"]
    assert saved["step"] == 2
    parameters = dict(trainer.run.model.named_parameters())  # the forward pass has moved BatchNorm statistics
    assert all(torch.equal(saved["model"][k], v) for k, v in parameters.items())


def test_epochs_begun_are_noted_in_both_checkpoints(reference):
    assert [load_checkpoint(reference / f"{name}.pth")["meta"]["epoch"] for name in ("best", "last")] == [3, 3]


def test_start_weights_may_have_any_name(tiny, reference, tmp_path, monkeypatch):
    """As YAML their path would be cut at the #. And a folder with a config's name is no config."""
    weights = tmp_path / "try #3" / "a: b.pth"
    weights.parent.mkdir()
    weights.write_bytes((reference / "best.pth").read_bytes())
    out = tmp_path / "run"
    command = ["--out", str(out), "--device", "cpu", "--weights", str(weights), "--opts", "train.epochs=1"]
    assert main("train", "", str(tiny), command) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["init_weights"] == str(weights)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v2_ultra").mkdir()
    assert load_config("v2_ultra").name == "v2_ultra"


def test_resume_tells_when_the_labels_have_changed(cfg, tmp_path, capsys):
    shutil.copytree(cfg.data.root, tmp_path / "data")
    cfg.data.root = str(tmp_path / "data")
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    trainer.on_step = lambda: setattr(trainer, "signal", 130)
    assert trainer.fit() == 130
    shutil.move(tmp_path / "data", tmp_path / "moved")
    cfg.data.root = str(tmp_path / "moved")
    labels = tmp_path / "moved" / "train" / "label.txt"
    for lines, told in ((labels.read_text().splitlines(), False), (labels.read_text().splitlines()[::3], True)):
        labels.write_text("\n".join(lines))
        capsys.readouterr()
        Trainer(cfg, tmp_path / "run", CPU, resume=True)
        assert ("photos or labels have changed" in capsys.readouterr().err) == told


def test_resume_refuses_another_config_and_names_the_key(tiny, reference, capsys):
    command = ["--out", str(reference), "--device", "cpu", "--resume", "--opts"]
    assert main("train", "", str(tiny), [*command, "train.lr=0.1"]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and "train.lr=0.001" in message and "0.1" in message
    assert main("train", "", str(tiny), [*command, "train.log_every=7", "data.workers=1"]) == 0


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda content: content.pop("training"), "holds weights only, nothing to resume; use --weights"),
        (lambda content: content["training"].update(total_steps=13), "had 13 steps, this one has 12"),
        (lambda content: content["training"].pop("scheduler"), "cannot be resumed: 'scheduler'"),
    ],
    ids=["weights", "data", "damaged"],
)
def test_a_last_pth_that_cannot_be_resumed_is_one_line(tiny, reference, tmp_path, capsys, edit, message):
    content, file = load_checkpoint(reference / "last.pth"), tmp_path / "last.pth"
    edit(content)
    save_checkpoint(file, content)
    assert main("train", "", str(tiny), ["--out", str(tmp_path), "--device", "cpu", "--resume"]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and str(file) in error and message in error


def test_a_finished_run_keeps_its_best_and_needs_no_start_weights(cfg, reference):
    cfg.train.val_scale, cfg.train.init_weights = "vga", str(reference / "removed.pth")
    assert Trainer(cfg, reference, CPU, resume=True).best["epoch"] == 3


def test_validation_may_change_unless_the_best_teaches(cfg):
    saved, now = to_dict(cfg), to_dict(cfg)
    now["train"]["val_every"] = 5
    now["data"] |= {"root": "/moved", "cache": "cache.bin", "workers": 7}
    assert first_difference(saved, now) is None
    saved["distill"]["self_best"] = now["distill"]["self_best"] = True
    assert first_difference(saved, now) == ("train.val_every", 0, 5)


@pytest.fixture
def broken_photo(tiny, tmp_path) -> Path:
    """A copy of the data in which one of the two held-out photos breaks off behind its header; returns its root."""
    root = tmp_path / "data"
    shutil.copytree(tiny.parent / "data", root)
    photo = select_dataset(from_dict(Config, yaml.safe_load(tiny.read_text()), "").data).paths[0]
    photo = root / photo.relative_to(tiny.parent / "data")
    Image.open(photo).save(photo, "JPEG")  # whose header is read without the rest
    photo.write_bytes(photo.read_bytes()[:2000])
    return root


def test_validation_leaves_out_a_photo_that_breaks_off(tiny, broken_photo, tmp_path, caplog):
    options = [f"data.root={broken_photo}", "train.val_every=1", "train.epochs=2"]
    assert main("train", "", str(tiny), ["--out", str(tmp_path / "run"), "--device", "cpu", "--opts", *options]) == 0
    assert [line["images"] for line in log_of(tmp_path / "run", "val")] == [1, 1]
    named = [r.getMessage() for r in caplog.records if "truncated" in r.getMessage()]
    assert len(named) == 1 and str(broken_photo) in named[0]  # once, not at every validation


def test_validation_that_fails_loses_no_epoch(tiny, broken_photo, tmp_path, capsys):
    command = ["--out", str(tmp_path / "run"), "--device", "cpu", "--opts", "train.val_every=1", "train.epochs=2"]
    command += [f"data.root={broken_photo}", "data.on_bad_image=fail"]
    assert main("train", "", str(tiny), command) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(broken_photo) in message and "truncated" in message
    assert load_checkpoint(tmp_path / "run" / "last.pth")["training"]["step"] == 4


def painted(folder: Path, pictures: dict[str, list[tuple[int, int, int, int]]], value: int = 255) -> FaceDataset:
    """Pictures of 120 x 160 px whose faces (xywh) are bright where they are meant to be found: those left of 80 px."""
    make_folder(folder, {name: (160, 120, boxes) for name, boxes in pictures.items()})
    for name, boxes in pictures.items():
        shown = [(x, y, x + w, y + h) for x, y, w, h in boxes if x < 80]
        image = Image.fromarray(picture(120, 160, *shown, value=value))
        image.save(folder / "train" / "images" / name, "JPEG", quality=100)
    return load_dataset(make_config(folder).data)


def test_validation_counts_what_is_found_of_every_size(tmp_path):
    half = {"e/a.png": [(10, 10, 40, 60)], "e/b.png": [(10, 10, 60, 30), (100, 60, 30, 30)]}
    figures, pictures = Validator(painted(tmp_path / "half", half, value=210), pictures=1)(SquareNetwork(), CPU)
    aps = [figures[f"ap_{k}"] for k in ("easy", "medium", "hard", "all")]
    assert aps == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3], abs=0.01)
    assert figures["ap"] == pytest.approx(7 / 9, abs=0.01) and figures["images"] == 2 and len(pictures) == 1
    small = painted(tmp_path / "small", {"e/a.png": [(10, 10, 20, 20)]})
    assert Validator(small)(SquareNetwork(), CPU)[0]["ap"] == pytest.approx(1)  # no face is easy


def test_validation_shows_the_network_what_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    dataset = painted(tmp_path, {f"e/{i}.png": [(10, 10, 40, 40)] for i in range(5)})
    assert [dataset.names[i] for i in Validator(dataset, images=3).indices] == [f"train/e/{i}.png" for i in (0, 2, 4)]
    for scale, side in (("original", 160), ("vga", 640), (1.4, 224)):
        network = SquareNetwork()
        Validator(dataset, scale=scale)(network, CPU)
        assert {max(shape) for shape in network.batches} == {side}
    assert Validator(dataset)(network, CPU, lambda: True) is None
    assert torch.backends.cudnn.benchmark  # as it was


def test_what_cannot_be_read_is_no_miss(tmp_path):
    dataset = painted(tmp_path, {f"e/{i}.png": [(10, 10, 40, 60)] for i in range(2)})
    validator = Validator(dataset)
    dataset.paths[0].write_bytes(dataset.paths[0].read_bytes()[:1000])
    figures, _ = validator(SquareNetwork(), CPU)
    assert figures["ap"] == pytest.approx(1) and figures["images"] == 1
    assert readable(dataset, "skip").names == ["train/e/1.png"]
    dataset.paths[1].write_bytes(dataset.paths[0].read_bytes())
    with pytest.raises(ImageError, match=r"0\.png: .*none of the other images to validate on"):
        Validator(dataset)(SquareNetwork(), CPU)


def test_sample_pictures_are_small_and_show_faces_in_their_places():
    image, box = picture(400, 960), np.array([[200.0, 100, 300, 200]])
    points = np.array([[[220.0, 140], [280, 140], [250, 150], [230, 180], [270, 180]]])
    shown = draw(image, Detections(box, np.array([0.9]), points))
    rows, columns = (np.flatnonzero((shown != shrink(image, 480)).any(axis=(2, axis))) for axis in (1, 0))
    assert shown.shape == (200, 480, 3) and rows.size and 30 <= rows.min() and rows.max() <= 105
    assert 90 <= columns.min() and columns.max() <= 160


def test_a_finished_run_is_not_overwritten(cfg, reference):
    with pytest.raises(ResumeError, match="--resume"):
        Trainer(cfg, reference, CPU)


@pytest.mark.parametrize(
    "option, code, part",
    [
        (["--opts", "train.epochz=3"], 2, "epochz"),
        (["--config", "no_such"], 2, "no_such"),
        (["--device", "nonsense"], 2, "nonsense"),
        (["--weights", "/no/such.pth"], 1, "/no/such.pth: cannot read"),
        (["--opts", "data.root=/no/such"], 1, "/no/such"),
        (["--opts", "train.seed=-1"], 2, "train.seed"),
        (["--opts", "train.seed=4294967296"], 2, "train.seed"),
        (["--opts", "train.multiscale=[]"], 2, "train.multiscale"),
        (["--opts", "train.multiscale=[0]"], 2, "train.multiscale"),
        (["--opts", "train.multiscale=[.inf]"], 2, "train.multiscale"),
        (["--opts", "distill.stages=[{until: 1.0, terms: {box: -1.0}}]"], 2, "'box' must be >= 0"),
    ],
)
def test_mistakes_are_one_line(tiny, tmp_path, capsys, option, code, part):
    assert main("train", "", str(tiny), ["--out", str(tmp_path / "run"), "--device", "cpu", *option]) == code
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and part in message


@pytest.mark.parametrize("option", [("--max-minutes", "-1"), ("--threads", "0"), ("--profile", "0")])
def test_numbers_that_make_no_sense_are_refused(tiny, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stop:
        main("train", "", str(tiny), ["--out", str(tmp_path / "run"), "--device", "cpu", *option])
    assert stop.value.code == 2 and f"argument {option[0]}: must be" in capsys.readouterr().err


def test_threads_are_those_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    assert main("train", "", "no_such", ["--out", "unused", "--threads", "3"]) == 2 and seen == [3]


# -- parts -------------------------------------------------------------------------------------------------------------


def test_ema_follows_its_formula_and_includes_buffers():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    ema = EMA(model, 0.5)
    expected = None
    for n in range(4):
        with torch.no_grad():
            model[0].weight.fill_(float(n * n))
            model[1].running_mean.fill_(10.0 * n)
            model[1].num_batches_tracked.fill_(n)
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = 0.0 if n == 0 else decay * expected + (1 - decay) * n * n
    assert ema.module[0].weight.item() == pytest.approx(expected)
    assert ema.module[1].running_mean.item() != 30.0 and ema.module[1].running_mean.item() > 10
    assert ema.module[1].num_batches_tracked.item() == 3
    ema.train()
    assert not ema.module.training and not ema.module[0].weight.requires_grad


def rates(cfg: TrainConfig, steps: int) -> list[float]:
    optimizer = build_optimizer(cfg, nn.Conv2d(1, 1, 1))
    scheduler = build_scheduler(cfg, optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_learning_rate_rises_then_falls_over_all_steps(schedule):
    lr = rates(TrainConfig(schedule=schedule, lr=0.1, warmup=0.2, final_lr=0.05), 100)
    peak = int(np.argmax(lr))
    assert peak in (19, 20) and lr[peak] == pytest.approx(0.1)
    assert lr[0] == pytest.approx(0.1 / 25)
    assert all(np.diff(lr[: peak + 1]) > 0) and all(np.diff(lr[peak:]) < 0)
    assert lr[-1] == pytest.approx(0.005, rel=1e-3)


def test_sgd_has_the_momentum_asked_for():
    (group,) = build_optimizer(TrainConfig(optimizer="sgd", momentum=0.7), nn.Conv2d(1, 1, 1, bias=False)).param_groups
    assert group["momentum"] == 0.7 and group["nesterov"]


def test_algorithms_repeat_themselves_only_when_asked_to():
    for on in (True, False):  # the other tests go on without
        make_reproducible(TrainConfig(deterministic=on))
        assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == on


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_very_short_runs_have_a_schedule(schedule, steps, warmup):
    assert all(
        0 <= lr <= 1e-3 + 1e-12 for lr in rates(TrainConfig(schedule=schedule, warmup=warmup, final_lr=0.0), steps)
    )


def test_norms_biases_and_gates_do_not_decay(cfg):
    model = build_model(cfg.model)
    cfg.train.backbone_lr, cfg.train.weight_decay = 0.1, 0.02
    adapter = nn.Conv2d(2, 2, 1)
    optimizer = build_optimizer(cfg.train, model, adapter.parameters())
    groups = optimizer.param_groups
    learnt = [*model.parameters(), *adapter.parameters()]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in learnt}
    assert all(g["weight_decay"] == (0.02 if p.ndim > 1 else 0) for g in groups for p in g["params"])
    assert learning_rate(optimizer) == cfg.train.lr
    backbone = {id(p) for p in model.backbone.parameters()}
    for group in groups:
        inside = {id(p) in backbone for p in group["params"]}
        assert inside == {group["lr"] == pytest.approx(1e-4)}


def test_frozen_stages_stay_put_then_thaw(cfg, tmp_path):
    cfg.train.freeze_stages, cfg.train.unfreeze_at, cfg.train.epochs = 2, 0.5, 2
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    backbone = trainer.run.model.backbone
    start = {k: v.clone() for k, v in backbone.state_dict().items()}
    after_first = {}
    save = trainer.save

    def spy():
        after_first.setdefault("state", {k: v.clone() for k, v in backbone.state_dict().items()})
        save()

    trainer.save = spy
    trainer.fit()
    moved = {k for k, v in after_first["state"].items() if not torch.equal(v, start[k])}
    assert moved and all(k.startswith("stage3") for k in moved)
    moved = {k for k, v in backbone.state_dict().items() if not torch.equal(v, start[k])}
    assert any(k.startswith("stage1") and "running_mean" in k for k in moved)
    assert any(k.startswith("stage2") and "weight" in k for k in moved)


def test_a_frozen_stage_folds_its_batchnorm_and_computes_the_same(cfg, monkeypatch):
    model, images = build_model(cfg.model), torch.randn(2, 3, 64, 64)
    for bn in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(bn.weight, -1, 1), torch.nn.init.normal_(bn.bias)
    with torch.no_grad():
        expected = model.eval().backbone.stage1(images)
    set_train_mode(model, 1)
    stage = model.backbone.stage1
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda *_: pytest.fail("a batch norm of its own"))
    assert torch.allclose(stage(images), expected, atol=1e-5, rtol=1e-4)
    assert not stage(images).requires_grad


def test_frozen_batchnorm_is_in_eval_mode(cfg):
    model = build_model(cfg.model)
    cfg.train.freeze_stages, cfg.train.unfreeze_at, cfg.train.epochs = 1, 0.3, 10
    assert [frozen_stages(cfg, e) for e in (0, 2, 3, 9)] == [1, 1, 0, 0]
    set_train_mode(model, 1)
    assert not model.backbone.stage1.training and model.backbone.stage2.training
    assert not any(p.requires_grad for p in model.backbone.stage1.parameters())
    set_train_mode(model, 0)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_batchnorm_statistics_stand_still_while_its_weights_learn(cfg, tmp_path):
    cfg.train.freeze_bn_at, cfg.train.epochs = 0.5, 2
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    states, save = [], trainer.save

    def spy():
        states.append({k: v.clone() for k, v in trainer.run.model.state_dict().items()})
        save()

    trainer.save = spy
    start = {k: v.clone() for k, v in trainer.run.model.state_dict().items()}
    trainer.fit()
    first, last = states[0], states[-1]
    statistics = [k for k in start if "running" in k]
    assert statistics and not any(torch.equal(first[k], start[k]) for k in statistics)
    assert all(torch.equal(last[k], first[k]) for k in statistics)
    scales = [k for k in start if k.endswith("bn.weight")]
    assert scales and not any(torch.equal(last[k], first[k]) for k in scales)


def test_gradients_are_clipped(cfg, tmp_path):
    cfg.data.select_images, cfg.train.epochs, cfg.train.stages = 0, 1, [SizeStage(1.0, 96, 10)]  # one step
    cfg.train.optimizer, cfg.train.lr, cfg.train.momentum, cfg.train.weight_decay = "sgd", 1.0, 0.0, 0.0
    cfg.train.clip_norm = 0.1
    trainer = Trainer(cfg, tmp_path / "run", World(torch.device("cpu")))
    trainer.run.world.average_gradients = lambda parameters: [p.grad.mul_(10) for p in parameters]  # comes before
    start = [p.detach().clone() for p in trainer.run.model.parameters()]
    assert trainer.fit() == 0
    (line,) = log_of(tmp_path / "run")
    moved = nn.utils.get_total_norm([p - q for p, q in zip(trainer.run.model.parameters(), start)]).item()
    assert line["grad_norm"] > 0.2 and moved == pytest.approx(0.1 * line["lr"], rel=1e-3)  # logged as it was before


def test_a_gradient_that_one_process_lacks_counts_as_zero(monkeypatch):
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([2.0, 4.0])))  # the other's
    mine, theirs = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    mine.grad = torch.tensor([2.0])
    World(torch.device("cpu"), size=2).average_gradients([theirs, mine])
    assert (theirs.grad.item(), mine.grad.item()) == (1.0, 3.0)


def test_processes_draw_different_numbers(cfg, tmp_path):
    Trainer(cfg, tmp_path / "run", World(torch.device("cpu"), rank=3))
    assert torch.initial_seed() == cfg.train.seed + 3


def test_steps_between_two_lines_are_averaged_and_forget_their_gradients(cfg, reference, tmp_path):
    cfg.train.log_every = 3
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    trainer.on_step = lambda: [p.grad.fill_(1e9) for p in trainer.run.model.parameters() if p.grad is not None]
    assert trainer.fit() == 0
    every = [line["total"] for line in log_of(reference)]
    expected = {last: np.mean(every[first:last]) for first, last in ((0, 3), (3, 4), (4, 6), (6, 8), (8, 9), (9, 12))}
    assert {line["step"]: line["total"] for line in log_of(tmp_path / "run")} == pytest.approx(expected, abs=1e-5)


def test_gates_and_pictures_reach_the_log_and_tensorboard(cfg, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg.model.acf, cfg.train.epochs, cfg.train.stages = True, 1, [SizeStage(1.0, 96, 8)]  # one step
    assert Trainer(cfg, tmp_path / "run", CPU).fit() == 0
    (line,) = log_of(tmp_path / "run", "gates")
    (gate, value), *_ = ((k, v) for k, v in line.items() if "/" in k)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Scalars(f"gates/{gate}")[0].value == pytest.approx(value)
    assert events.Scalars("train/total")[0].step == 1 and events.Scalars("val/ap")
    assert events.Images("val/0")[0].width == 128


def test_distillation_is_given_the_average_of_the_weights_and_the_assignment_of_the_task(cfg, tmp_path, monkeypatch):
    cfg.distill.self_teacher, cfg.train.epochs, cfg.train.stages = True, 1, [SizeStage(1.0, 96, 8)]  # one step
    trainer, made, given = Trainer(cfg, tmp_path / "run", CPU), [], []
    monkeypatch.setattr("layers.losses.assign", lambda *a: made.append(assign(*a)) or made[-1])
    combine = trainer.run.distiller.combine
    trainer.run.distiller.combine = lambda *a: given.append(a) or combine(*a)
    assert trainer.fit() == 0
    (*_, assignment, _, ema), (only,) = *given, made  # assigned once, though both losses need it
    assert assignment is only and ema is trainer.run.ema.module


def test_dropblock_rises_from_step_to_step(cfg, tmp_path):
    cfg.train.epochs, cfg.train.stages = 2, [SizeStage(1.0, 96, 4)]
    trainer, seen = Trainer(cfg, tmp_path / "run", CPU), []
    trainer.on_step = lambda: seen.append(trainer.run.model.dropblock.p)
    assert trainer.fit() == 0
    assert seen == pytest.approx([0.0, 0.025, 0.05, 0.075])  # of 0.1


def test_the_averaged_weights_are_validated_and_the_best_of_them_kept_and_taught(cfg, tmp_path, monkeypatch):
    cfg.train.val_every, cfg.distill.self_best = 1, True
    trainer, seen = Trainer(cfg, tmp_path / "run", CPU), []
    aps = iter([0.1, 0.3, 0.2])

    def validate(model, *_):
        raw = trainer.run.model.state_dict()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        assert not any(torch.equal(state[k], raw[k]) for k in raw if k.startswith("heads.") and k.endswith("weight"))
        assert all(torch.equal(v, state[k]) for k, v in trainer.run.ema.module.state_dict().items())
        seen.append(state)
        return {"ap": next(aps)}, []

    monkeypatch.setattr(trainer, "validator", validate)
    assert trainer.fit() == 0 and len(seen) == 3
    kept = load_checkpoint(tmp_path / "run" / "best.pth")["state_dict"]
    taught = trainer.run.distiller.teachers.own_best.state_dict()
    for state in (kept, taught):
        assert all(torch.equal(v, seen[1][k]) for k, v in state.items()) and state.keys() == seen[1].keys()


def test_stages_of_progressive_resizing_cover_all_epochs():
    cfg = TrainConfig(epochs=8, stages=[SizeStage(0.375, 320, 64), SizeStage(0.75, 480, 48), SizeStage(1.0, 640, 32)])
    stages = plan_stages(cfg, lambda size, batch: 1000 // batch)
    assert [(s.size, s.first_epoch, s.end_epoch, s.steps) for s in stages] == [
        (320, 0, 3, 15),
        (480, 3, 6, 20),
        (640, 6, 8, 31),
    ]
    cfg.epochs = 1
    assert [s.size for s in plan_stages(cfg, lambda size, batch: 1)] == [480]


def test_stages_and_multiscale_reach_the_network(cfg, tmp_path):
    cfg.train.stages = [SizeStage(0.5, 96, 4), SizeStage(1.0, 128, 2)]
    cfg.train.multiscale, cfg.train.epochs = [1.0, 1.5], 2
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    assert trainer.run.total_steps == 2 + 4
    assert trainer.fit() == 0
    lines = log_of(tmp_path / "run")
    assert [line["batch"] for line in lines] == [4] * 2 + [2] * 4
    assert {line["size"] for line in lines[:2]} <= {96, 128, 160} and {line["size"] for line in lines[2:]} == {128, 192}


def test_the_landmark_refinement_learns_alone_on_finished_weights(cfg, reference, tmp_path, capsys):
    before = load_checkpoint(reference / "best.pth")["state_dict"]
    cfg.train.init_weights, cfg.train.only, cfg.model.landmark_refinement = (
        str(reference / "best.pth"),
        "landmark_refinement",
        True,
    )
    cfg.loss.landmark_weight, cfg.train.lr = 1.0, 1e-2
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    assert "best.pth: the landmark refinement is new" in capsys.readouterr().err
    start = {k: v.clone() for k, v in trainer.run.model.state_dict().items()}
    trainer.fit()
    after = load_checkpoint(tmp_path / "run" / "last.pth")["state_dict"]
    assert all(torch.equal(after[k], v) for k, v in before.items())  # batch norm statistics, too
    new = [k for k in after if k not in before]
    assert new and all(k.startswith("landmark_refinement.") for k in new)
    assert not any(torch.equal(after[k], start[k]) for k in new)
    # and a network without it goes on from the result
    cfg.train.init_weights, cfg.train.only, cfg.model.landmark_refinement = (
        str(tmp_path / "run" / "last.pth"),
        "",
        False,
    )
    state = Trainer(cfg, tmp_path / "without", CPU).run.model.state_dict()
    assert "last.pth, without its landmark refinement" in capsys.readouterr().err
    assert all(torch.equal(state[k], v) for k, v in before.items()) and len(state) == len(before)
    cfg.train.only = "landmark_refinement"
    with pytest.raises(ConfigError, match=r"^'train\.only': .* needs model\.landmark_refinement$"):
        Trainer(cfg, tmp_path / "other", CPU)
    cfg.model.landmark_refinement, cfg.distill.self_teacher = True, True
    with pytest.raises(ConfigError, match=r"^'train\.only': a part alone learns from the labels"):
        Trainer(cfg, tmp_path / "other", CPU)


def test_starting_from_a_finished_run(cfg, reference, tmp_path):
    best, _ = load_model(reference / "best.pth")
    cfg.train.init_weights = str(reference / "best.pth")
    whole = Trainer(cfg, tmp_path / "whole", CPU).run.model.state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in best.state_dict().items())
    cfg.train.init_weights, cfg.train.backbone_weights = "", str(reference / "best.pth")
    part = Trainer(cfg, tmp_path / "part", CPU).run.model.state_dict()
    same = {k for k, v in best.state_dict().items() if torch.equal(v, part[k])}
    assert all(k in same for k in part if k.startswith("backbone."))
    assert not any(k in same for k in part if k.startswith("heads.") and k.endswith("weight"))
    cfg.model.out_channels, cfg.train.init_weights = 12, str(reference / "best.pth")
    with pytest.raises(CheckpointError, match=r"best\.pth"):
        Trainer(cfg, tmp_path / "other", CPU)


def test_distillation_with_teacher_and_self_teacher_resumes_exactly(cfg, reference, tmp_path):
    cfg.distill.teachers, cfg.distill.self_teacher, cfg.train.val_every = [str(reference / "best.pth")], True, 1
    cfg.distill.self_best = True
    cfg.distill.stages[0].terms["dense"] = 1.0
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    trainer = Trainer(cfg, straight, CPU)
    mimic, heads = trainer.run.distiller.mimics[0], trainer.run.model.heads
    assert all(torch.equal(a, b) for a, b in zip(mimic.parameters(), heads.parameters(), strict=True))
    assert trainer.fit() == 0
    assert log_of(straight, "start")[0]["precision"] == ("bf16" if uses_bf16(cfg.train.amp, CPU.device) else "float32")
    lines = log_of(straight)
    assert lines[0]["temperature"] == 6 and lines[-1]["temperature"] == 1 and lines[0]["alpha"] == 0.9
    assert all(lines[0][f"distill_{name}"] > 0 for name in ("feature", "score", "dense"))
    first = Trainer(cfg, broken, CPU)
    update, done = first.run.ema.update_parameters, []

    def update_then_interrupt(model):
        update(model)
        done.append(1)
        first.signal = 130 if len(done) == 10 else 0

    first.run.ema.update_parameters = update_then_interrupt
    assert first.fit() == 130
    assert Trainer(cfg, broken, CPU, resume=True).fit() == 0
    assert_equal_runs(straight, broken)
    cfg.distill.init_mimics = str(straight / "last.pth")  # another run's mimics go on in a new one
    taken = Trainer(cfg, tmp_path / "next", CPU).run.distiller.mimics[0]
    assert all(torch.equal(a, b) for a, b in zip(taken.parameters(), mimic.parameters(), strict=True))
    for file, why in ((reference / "last.pth", "has 0 mimics, 1 are needed"), (reference / "none.pth", "")):
        cfg.distill.init_mimics = str(file)
        with pytest.raises(CheckpointError, match=rf"{file.name}.*{why}"):
            Trainer(cfg, tmp_path / "other", CPU)
        Trainer(cfg, broken, CPU, resume=True)  # has mimics of its own by then


def test_log_is_cut_at_the_resumed_step(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"kind": "train", "step": s}) + "\n" for s in range(1, 6)) + '{"kind": "tr')
    assert truncate(log, 3) == 3
    assert [line["step"] for line in read_lines(log)] == [1, 2, 3]
    with log.open("a") as file:
        file.write('{"kind": "val", "step": 3}\n')
    assert truncate(log, 3) == 4
    assert truncate(log, 3, validated=False) == 3  # the validation comes again


def test_a_log_that_cannot_be_cut_stays_as_it_was(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"kind": "train", "step": s}) + "\n" for s in range(1, 6)))

    def half(path, *_, **__):
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError):
        truncate(log, 3)
    assert len(read_lines(log)) == 5


def test_config_survives_its_way_through_a_checkpoint(cfg, reference):
    saved = load_checkpoint(reference / "last.pth")["training"]["config"]
    assert from_dict(Config, saved, "x") == cfg and saved == to_dict(cfg)


def test_plot_draws_a_log_and_names_a_bad_one(reference, tmp_path, capsys):
    from utils.plot import main as plot
    from utils.plot import smooth

    assert plot([str(reference / "log.jsonl"), "--out", str(tmp_path / "curves.png")]) == 0
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    assert plot([str(reference / "log.jsonl"), "--out", str(tmp_path / "deep" / "curves.svg")]) == 0
    assert "<svg" in (tmp_path / "deep" / "curves.svg").read_text()
    assert plot([str(reference / "log.jsonl"), "--out", str(tmp_path / "curves.xyz")]) == 2
    assert "curves.xyz: '.xyz' is none of the kinds" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert plot([str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "x.png")]) == 1
    assert "empty.jsonl" in capsys.readouterr().err
    steps, values = smooth([(i, 2.0 * i) for i in range(1000)])
    assert len(steps) == 200 and values[0] == pytest.approx(2 * steps[0])


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_lie_in_memory_as_asked_for(cfg, tmp_path, channels_last):
    cfg.train.channels_last = channels_last
    weight = next(
        p for p in Trainer(cfg, tmp_path / "run", CPU).run.model.parameters() if p.ndim == 4 and min(p.shape) > 1
    )
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_the_own_best_teacher_lies_in_memory_as_the_others_after_a_resume(cfg, reference, tmp_path):
    cfg.distill.teachers, cfg.distill.self_best = [str(reference / "best.pth")], True
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    trainer.run.distiller.set_own_best(trainer.run.ema.module)
    trainer.save()
    best = Trainer(cfg, tmp_path / "run", CPU, resume=True).run.distiller.teachers.own_best
    weight = next(p for p in best.parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(cfg, tmp_path, monkeypatch):
    """Even where files could be made, as root can."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="run: the run's folder is not writable"):
        Trainer(cfg, tmp_path / "run", CPU)


def test_only_the_main_process_writes_the_best(cfg, tmp_path):
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    trainer.validator, trainer.epoch = None, cfg.train.epochs - 1
    for writes in (False, True):
        trainer.world = SimpleNamespace(main=writes)
        assert trainer._validate_if_due() and (tmp_path / "run" / "best.pth").exists() == writes


def test_what_is_not_finite_is_never_saved(cfg, tmp_path, monkeypatch):
    """Losses are looked at a step late: those that still wait come first."""
    trainer = Trainer(cfg, tmp_path / "run", CPU)

    def not_finite():
        raise NonFiniteLoss("loss")

    monkeypatch.setattr(trainer.run.guard, "flush", not_finite)
    with pytest.raises(NonFiniteLoss):
        trainer.save()
    assert not (tmp_path / "run" / "last.pth").exists()


def test_a_signal_that_kills_the_workers_too_stops_with_a_checkpoint(cfg, tmp_path, monkeypatch):
    trainer = Trainer(cfg, tmp_path / "run", CPU)
    batches = trainer.pipeline.batches

    def cut_off(*arguments):
        whole = batches(*arguments)
        yield next(whole)
        yield next(whole)
        trainer.signal = 143
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    monkeypatch.setattr(trainer.pipeline, "batches", cut_off)
    assert trainer.fit() == 143
    assert load_checkpoint(tmp_path / "run" / "last.pth")["training"]["step"] == 2


@pytest.mark.parametrize("best_teaches", [False, True])
def test_only_what_changes_nothing_learnt_may_change_at_a_resume(cfg, best_teaches):
    cfg.distill.self_best = best_teaches
    now, free = to_dict(cfg), set()
    validation_keys = {"data.val_labels", *(f"train.{k}" for k in ("val_scale", "val_images", "val_every"))}

    def walk(tree: dict, prefix: str = "") -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif prefix + key != "distill.self_best":
                tree[key] = "another"
                if first_difference(to_dict(cfg), now) is None:
                    free.add(prefix + key)
                tree[key] = value

    walk(now)
    assert free == {
        *(f"data.{k}" for k in ("root", "workers", "cache")),
        *(f"train.{k}" for k in ("patience", "save_every", "log_every", "pictures")),
        *(f"train.{k}_weights" for k in ("init", "inherit", "backbone")),
        "distill.init_mimics",
        *(() if best_teaches else validation_keys),
    }


def test_a_landmark_refinement_that_both_have_is_taken_over(cfg, tmp_path):
    cfg.model.landmark_refinement = True
    trained, fresh = build_model(cfg.model), build_model(cfg.model)
    save_checkpoint(tmp_path / "a.pth", checkpoint.inference_content("a", cfg.model, trained.state_dict()))
    cfg.train.init_weights = str(tmp_path / "a.pth")
    assert start_weights(fresh, cfg.train) == ""
    for key, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_whole_weights_come_before_those_to_inherit_and_of_the_backbone(cfg, reference):
    cfg.train.init_weights = str(reference / "best.pth")
    cfg.train.inherit_weights = cfg.train.backbone_weights = "none.pth"
    model = build_model(cfg.model)
    assert start_weights(model, cfg.train) == ""
    assert all(
        torch.equal(v, model.state_dict()[k]) for k, v in load_checkpoint(reference / "best.pth")["state_dict"].items()
    )


def test_validation_detects_as_the_benchmark_does(tmp_path, monkeypatch):
    asked = []

    def detector(*arguments, **options):
        asked.append(options)
        return FaceDetector(*arguments, **options)

    monkeypatch.setattr(validation, "FaceDetector", detector)
    Validator(painted(tmp_path, {"e/a.png": [(10, 10, 40, 40)]}))(SquareNetwork(), CPU)
    assert (asked[0]["score_threshold"], asked[0]["nms_threshold"]) == (0.02, 0.4)


def test_tensorboard_forgets_what_came_after_the_resumed_step(tmp_path):
    for start, steps in ((0, range(1, 6)), (3, [4])):
        logger = RunLogger(tmp_path, start, 6)
        for step in steps:
            logger.write("train", {"step": step, "loss": float(start + step)})
        logger.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 7)]


def test_a_resumed_log_goes_on_behind_what_is_kept(tmp_path):
    for start, step in ((0, 1), (1, 2)):
        logger = RunLogger(tmp_path, start, 2)
        logger.write("train", {"step": step})
        logger.close()
    assert [line["step"] for line in read_lines(tmp_path / "log.jsonl")] == [1, 2]


def test_lines_that_are_none_of_a_log_are_passed_over(tmp_path):
    lines = ['{"kind": "tr', "3", '{"kind": "x"}', json.dumps({"kind": "train", "step": 2})]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_lines(tmp_path / "log.jsonl") == [{"kind": "train", "step": 2}]


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_learning_rate_formula(schedule):
    lr = rates(TrainConfig(schedule=schedule, lr=1.0, warmup=0.4, final_lr=0.1), 11)
    for step, value in enumerate(lr[:4]):
        part = step / 4 if schedule == "cosine" else (1 - math.cos(math.pi * step / 4)) / 2
        assert value == pytest.approx(0.04 + 0.96 * part)
    for step, value in enumerate(lr[4:]):
        assert value == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * step / 6)) / 2)


def test_what_learns_alone_is_in_training_mode():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    set_train_mode(model.eval(), 0, only="1")
    assert [(m.training, m.weight.requires_grad) for m in model] == [(False, False), (True, True)]


def test_images_per_second_are_images_by_seconds(monkeypatch):
    clock = iter([0.0, 4.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter()
    meter.add({"total": torch.tensor(1.0)}, 20)
    meter.add({"total": torch.tensor(2.0)}, 20)
    assert meter.summary() == {"total": 1.5, "images_per_s": 10.0, "data_wait": 0.0}


def test_held_out_photos_that_cannot_be_read_stop_where_asked_to_or_where_none_can(tmp_path):
    dataset = painted(tmp_path, {f"e/{i}.png": [(10, 10, 40, 60)] for i in range(2)})
    dataset.paths[0].write_bytes(dataset.paths[0].read_bytes()[:1000])
    with pytest.raises(ImageError, match=r"0\.png"):
        readable(dataset, "fail")
    dataset.paths[1].write_bytes(dataset.paths[0].read_bytes())
    with pytest.raises(ImageError, match="none of the other held-out images"):
        readable(dataset, "skip")


def test_a_runs_state_is_not_overwritten_even_through_a_link(tmp_path):
    (tmp_path / "link.pth").symlink_to(tmp_path / "last.pth")
    for out in ("last.pth", "link.pth"):
        with pytest.raises(CheckpointError, match=f"{out}: would overwrite the run's state"):
            take_training({"training": {"step": 1}}, tmp_path / "last.pth", tmp_path / out)
    assert take_training({"training": {"step": 1}}, tmp_path / "last.pth", tmp_path / "other.pth") == {"step": 1}
