"""How commands end: every one of them in the same way."""

import argparse
import errno
import importlib
import os
import subprocess
import sys

import pytest

from utils import train_cli
from utils.command import NotInstalled, Problem, UsageError, command
from utils.config import ROOT

TRAINING = ("train_v1.py", "train_v2_progressive.py")  # utils.train_cli
COMMANDS = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in (".", "data", "layers", "models", "utils", "widerface_evaluate")
    for file in sorted((ROOT / folder).glob("*.py"))
    if file.name not in TRAINING and 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")
]


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
        (ModuleNotFoundError("no 'onnx'", name="onnx"), 2, "no 'onnx': `pip install -r requirements.txt`"),
        (ImportError("cannot import 'x'", name="onnx.y"), 2, "cannot import 'x': `pip install -r requirements.txt`"),
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


@pytest.mark.parametrize("error", [IndexError(), ModuleNotFoundError("no 'utils.typo'", name="utils.typo")])
def test_a_fault_of_ours_keeps_its_traceback(error):
    @command("find.py")
    def main():
        raise error

    with pytest.raises(type(error)):
        main()


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and /dev/full")
@pytest.mark.parametrize("mode", [[], ["-u"]])
def test_closed_pipes_are_quiet_and_full_disks_told(mode):
    text = "from utils.command import command\n@command('x')\ndef main():\n    print('y' * 100000)\n    return 0\n"
    command = [sys.executable, *mode, "-c", text + "raise SystemExit(main())"]
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (1, b"")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
        assert ended.returncode == 1 and b"x: [Errno 28] No space left on device" in ended.stderr


def test_all_commands_are_tried():
    assert {"detect", "ablate", "data.prepare", "utils.calibrate", "widerface_evaluate.__main__"} < set(COMMANDS)
    assert len(COMMANDS) >= 17


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
