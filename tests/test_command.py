"""How commands end: every one of them in the same way."""

import argparse
import errno
import importlib

import pytest

from utils import train_cli
from utils.command import NotInstalled, Problem, UsageError, command

COMMANDS = (
    "ablate app benchmark detect export test_widerface data.benchmark data.prepare data.select data.visualize "
    "models.summary utils.calibrate utils.convert utils.merge_mimics utils.plot utils.step_benchmark "
    "widerface_evaluate.__main__"
).split()


@pytest.mark.parametrize(
    "error, code, line",
    [
        (Problem("a.jpg: not a picture"), 1, "a.jpg: not a picture"),
        (UsageError("--share: above 1"), 2, "--share: above 1"),
        (NotInstalled("onnx is not installed"), 2, "onnx is not installed"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "list.txt"),
            1,
            "list.txt: No such file or directory",
        ),
        (ModuleNotFoundError("No module named 'onnx'"), 2, "No module named 'onnx': `pip install -r requirements.txt`"),
        (OSError("cannot write\nWebP"), 1, "cannot write WebP"),
    ],
)
def test_what_users_can_mend_is_one_line(error, code, line, capsys):
    @command("find.py")
    def main(argv):
        raise error

    assert main([]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"find.py: {line}\n")


def test_a_fault_of_ours_keeps_its_traceback():
    @command("find.py")
    def main():
        raise IndexError

    with pytest.raises(IndexError):
        main()


def test_exit_codes_of_main_are_passed_on():
    assert [command("find.py")(lambda code: code)(code) for code in (0, 1, 143)] == [0, 1, 143]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_so(name, monkeypatch, capsys):
    main = importlib.import_module(name).main
    for error, code in ((KeyboardInterrupt(), 130), (PermissionError(errno.EACCES, "Permission denied", "x"), 1)):

        def stopped(*_, error=error):
            raise error

        for parse in ("parse_args", "parse_intermixed_args"):
            monkeypatch.setattr(argparse.ArgumentParser, parse, stopped)
        assert main([]) == code
    prog = name.removesuffix(".__main__") if "." in name else f"{name}.py"
    assert capsys.readouterr().err == f"{prog}: x: Permission denied\n"


def test_training_ends_so(tmp_path, monkeypatch, capsys):
    for error, code in ((KeyboardInterrupt(), 130), (PermissionError(errno.EACCES, "Permission denied", "x"), 1)):

        def stopped(*_, error=error):
            raise error

        monkeypatch.setattr(train_cli, "load_config", stopped)
        assert train_cli.main("train_v1.py", "", "v1", ["--out", str(tmp_path)]) == code
    assert capsys.readouterr().err == "train_v1.py: x: Permission denied\n"
