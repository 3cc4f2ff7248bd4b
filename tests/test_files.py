"""Files that are whole or not there."""

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest

from utils.files import whole


def test_a_file_takes_the_old_ones_place_at_the_end(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with whole(file) as part:
        part.write_text("first")
        assert not file.exists()
    with whole(file) as part:
        part.write_text("second")
        assert file.read_text() == "first"
    assert file.read_text() == "second" and [f.name for f in file.parent.iterdir()] == ["a.txt"]


def test_names_may_be_as_long_as_names_can_be(tmp_path):
    with whole(tmp_path / ("n" * 255)) as part:
        part.write_text("all")
    assert (tmp_path / ("n" * 255)).read_text() == "all"


def test_what_a_link_leads_to_is_left_alone(tmp_path):
    """A run's last.pth may be a link to another run's, to go on from there."""
    (tmp_path / "other.txt").write_text("other")
    (tmp_path / "link.txt").symlink_to(tmp_path / "other.txt")
    with whole(tmp_path / "link.txt") as part:
        part.write_text("own")
    assert (tmp_path / "link.txt").read_text() == "own" and (tmp_path / "other.txt").read_text() == "other"


def test_a_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(IsADirectoryError, match=tmp_path.name), whole(tmp_path):
        pytest.fail("the end would lose it")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), whole(tmp_path / "a.txt") as part:
        part.write_text("ne")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), whole(tmp_path / "file" / "a.txt"):
        pytest.fail("nothing can be written there")


def test_errors_name_the_file_and_not_its_part(tmp_path):
    file = tmp_path / "a.txt"
    with pytest.raises(OSError) as full, whole(file):
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() does, which knows no name
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(file))
    with pytest.raises(FileNotFoundError) as gone, whole(file) as part:
        part.read_text()
    assert gone.value.filename == str(file)
    with pytest.raises(OSError) as both, whole(file) as part:
        raise OSError(errno.ENOSPC, "No space left on device", "source.png", None, str(part))  # as copyfile does
    assert both.value.filename == str(file)
    with pytest.raises(FileNotFoundError) as other, whole(file):
        (tmp_path / "source.txt").read_text()
    assert other.value.filename == str(tmp_path / "source.txt")
    with pytest.raises(OSError, match=r"^broken$"), whole(file):
        raise OSError("broken")  # a library's own words


@pytest.mark.skipif(os.name != "posix", reason="needs /dev and named pipes")
def test_devices_and_pipes_are_written_to_not_replaced(tmp_path, capfd):
    with whole("/dev/null") as part:
        part.write_text("gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    if os.path.exists("/dev/full"):
        (tmp_path / "link").symlink_to("/dev/full")
        with pytest.raises(OSError) as full, whole(tmp_path / "link") as part:
            part.write_text("too much")
        assert full.value.filename == str(tmp_path / "link") and (tmp_path / "link").is_char_device()
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, whole(Path(folder) / "a.txt") as part:
            assert part.name != "a.txt"
            part.write_text("all")
    link = os.readlink("/dev/stdout")
    with whole("/dev/stdout") as part, part.open("a") as out:
        out.write("told")
    assert os.readlink("/dev/stdout") == link and capfd.readouterr().out == "told"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with whole(tmp_path / "pipe") as part:
        part.write_text("through")
    assert os.read(reader, 10) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
