"""The training-step benchmark: its rows are measurements of what was asked for."""

import json

import pytest
import torch

from data import benchmark as data_benchmark
from utils.step_benchmark import FACES, made_up_batch, main


def test_command_measures_each_size_and_batch(capsys):
    opts = ["model.out_channels=8", "model.ssh_groups=2", "train.amp=off"]
    code = main(["--config", "v2", "--opts", *opts, "--sizes", "64", "--batches", "1", "3", "--steps", "1", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert [(r["size"], r["batch"]) for r in result["rows"]] == [(64, 1), (64, 3)]
    for row in result["rows"]:
        assert row["images_per_second"] > 0
        assert abs(row["ms"] * row["images_per_second"] / 1000 - row["batch"]) < 0.2 * row["batch"]


def test_memory_is_what_the_step_takes_whatever_its_parent_holds(capsys):
    opts = ["model.out_channels=8", "model.ssh_groups=2", "train.amp=off"]
    ballast = bytearray(b"x") * 2**29
    assert main(["--config", "v2", "--opts", *opts, "--sizes", "192", "--batches", "16", "--steps", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(ballast) and row["peak_mib"] > 60


def test_bad_config_is_one_line_and_exit_2(capsys):
    assert main(["--config", "v2", "--opts", "model.nonsense=1"]) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, data_benchmark.main])
@pytest.mark.parametrize("option", ["--sizes", "--batches", "--threads"])
def test_numbers_below_one_are_refused(command, option, capsys):
    with pytest.raises(SystemExit) as stop:
        command(["--config", "v2", option, "0"])
    assert stop.value.code == 2 and f"argument {option}: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("command, option", [(main, "--steps"), (data_benchmark.main, "--seconds")])
def test_nothing_to_time_is_refused(command, option):
    with pytest.raises(SystemExit) as stop:
        command(["--config", "v2", option, "0"])
    assert stop.value.code == 2


@pytest.mark.parametrize("command", [main, data_benchmark.main])
def test_unknown_device_is_one_line_and_exit_2(command, capsys):
    assert command(["--config", "v2", "--device", "nonsense"]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and "nonsense" in message


def test_batch_has_the_form_the_losses_expect():
    batch = made_up_batch(2, 64, torch.device("cpu"))
    assert batch["boxes"].shape == (2, FACES, 4)
    assert bool((batch["boxes"][..., 2:] > batch["boxes"][..., :2]).all())
    assert not batch["ignore"].any()
