"""detect.py from the command line: outputs, exit codes, bad input."""

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detect
from models.detector import Detections, FaceDetector
from models.featherface import build_model
from tests.squares import SquareNetwork, picture, points_of
from utils.checkpoint import inference_content, save_checkpoint
from utils.config import load_config
from utils.image import read_image
from utils.inputs import find_inputs
from utils.results import Results
from utils.video import VideoError, VideoReader, VideoWriter

BOX = (30, 20, 70, 76)
SECOND = (90, 10, 110, 40)


@pytest.fixture
def fake(monkeypatch):
    """detect.py with the square network; the arguments it asked for are in ``asked``."""
    asked = {}

    def from_pretrained(name=None, device=None, config=None, backend="torch", **options):
        asked.update(name=name, device=device, config=config, backend=backend, **options)
        return FaceDetector(SquareNetwork(), "cpu", **options)

    monkeypatch.setattr(FaceDetector, "from_pretrained", from_pretrained)
    return asked


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """The working folder, holding photos/{a.png, b.jpg, sub/c.png, note.txt} with 1, 2 and 0 faces."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(picture(100, 120, BOX)).save(folder / "a.png")
    Image.fromarray(picture(100, 120, BOX, SECOND)).save(folder / "b.jpg", quality=100, subsampling=0)
    Image.fromarray(picture(64, 64)).save(folder / "sub" / "c.png")
    (folder / "note.txt").write_text("not a picture")
    return folder


def save_untrained() -> None:
    """V2 Ultra with random weights as ``ultra.pth``."""
    torch.manual_seed(0)
    config = load_config("v2_ultra").model
    save_checkpoint("ultra.pth", inference_content("v2_ultra", config, build_model(config).state_dict()))


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


@contextmanager
def files_end_at(size: int):
    """No file can grow beyond ``size`` bytes: a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_one_picture_is_drawn_by_default(fake, photos, capsys):
    assert detect.main(["photos/a.png"]) == 0
    assert capsys.readouterr().out == "photos/a.png: 1 face -> runs/detect/a.png\n"
    drawn, original = read_image("runs/detect/a.png"), read_image("photos/a.png")
    assert drawn.shape == original.shape and (drawn != original).any()
    assert fake["name"] is None and fake["score_threshold"] == 0.5 and fake["nms_threshold"] == 0.4


def test_json_is_the_last_line(fake, photos, capsys):
    assert detect.main(["photos", "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    assert list(result) == ["images"]
    assert [i["file"] for i in result["images"]] == ["photos/a.png", "photos/b.jpg", "photos/sub/c.png"]
    assert [len(i["faces"]) for i in result["images"]] == [1, 2, 0]
    face = result["images"][0]["faces"][0]
    assert sorted(face) == ["box", "landmarks", "score"]
    assert face["box"] == pytest.approx(BOX, abs=0.01) and 0.99 < face["score"] <= 1
    np.testing.assert_allclose(face["landmarks"], points_of(BOX), atol=0.01)
    assert not Path("runs").exists()


def test_json_before_a_picture_never_overwrites_it(fake, photos, capsys):
    before = Path("photos/a.png").read_bytes()
    assert detect.main(["--json", "photos/a.png", "photos/b.jpg"]) == 0
    assert [i["file"] for i in last_json(capsys.readouterr().out)["images"]] == ["photos/a.png", "photos/b.jpg"]
    assert Path("photos/a.png").read_bytes() == before


def test_json_and_csv_files(fake, photos, capsys):
    assert detect.main(["photos", "--json", "new/f.json", "--csv", "new/f.csv", "--batch-size", "2"]) == 0
    assert fake["batch_size"] == 2
    images = json.loads(Path("new/f.json").read_text())["images"]
    rows = list(csv.DictReader(Path("new/f.csv").open()))
    assert [(r["file"], r["face"]) for r in rows] == [
        ("photos/a.png", "0"),
        ("photos/b.jpg", "0"),
        ("photos/b.jpg", "1"),
    ]
    face = images[0]["faces"][0]
    assert [float(rows[0][k]) for k in ("x1", "y1", "x2", "y2")] == face["box"]
    assert [float(rows[0]["right_mouth_x"]), float(rows[0]["right_mouth_y"])] == face["landmarks"][4]
    assert "photos/a.png: 1 face" in capsys.readouterr().out


def test_outputs_repeat_the_folders_tree_and_are_not_searched_again(fake, photos, capsys):
    for _ in range(2):
        assert detect.main(["photos", "--out", "photos/out", "--crops", "photos/crops", "--json"]) == 0
        assert len(last_json(capsys.readouterr().out)["images"]) == 3
    assert files(photos / "out") == ["a.png", "b.jpg", "sub/c.png"]
    assert files(photos / "crops") == ["a.png_00.png", "b.jpg_00.png", "b.jpg_01.png"]
    assert read_image(photos / "crops" / "a.png_00.png").shape == (112, 112, 3)


def test_inputs_after_two_dashes_may_begin_with_one(fake, photos, capsys):
    shutil.copy("photos/a.png", "-a.png")
    assert detect.main(["--json", "--score", "0.4", "--", "-a.png", "photos/b.jpg"]) == 0
    assert [i["file"] for i in last_json(capsys.readouterr().out)["images"]] == ["./-a.png", "photos/b.jpg"]


def test_of_an_animation_it_is_told_that_one_frame_is_searched(fake, photos, capsys):
    frame = Image.fromarray(picture(100, 120, BOX))
    frame.save("a.gif", save_all=True, append_images=[Image.new("RGB", frame.size)])
    assert detect.main(["a.gif", "photos/a.png", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(last_json(out)["images"][0]["faces"]) == 1
    assert "a.gif: its first frame or page alone is searched, 1 more are not" in err and "a.png" not in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of Unix")
def test_a_named_pipe_is_read_once(fake, photos, capsys):
    os.mkfifo("pipe.png")
    writer = threading.Thread(target=lambda: Path("pipe.png").write_bytes(Path("photos/a.png").read_bytes()))
    writer.start()
    assert detect.main(["pipe.png", "--json"]) == 0
    writer.join()
    assert len(last_json(capsys.readouterr().out)["images"][0]["faces"]) == 1


def test_pattern(fake, photos, capsys):
    assert detect.main(["photos/**/*.png", "--json"]) == 0
    assert [i["file"] for i in last_json(capsys.readouterr().out)["images"]] == ["photos/a.png", "photos/sub/c.png"]
    assert detect.main(["photos/*.bmp"]) == 2
    assert capsys.readouterr().err == "detect.py: photos/*.bmp: no file matches\n"
    for _ in range(2):  # the second time earlier results match as well
        assert detect.main(["**/*.png", "--out", "o"]) == 0
    assert files(Path("o")) == ["a.png", "sub/c.png"]
    assert "**/*.png: not searched: 2 file(s) of earlier results" in capsys.readouterr().err
    assert detect.main(["o/*.png", "--out", "o"]) == 2 and "would overwrite an input" in capsys.readouterr().err


def test_stdin(fake, photos, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("photos/b.jpg").read_bytes())))
    assert detect.main(["-", "--json", "--out", "o"]) == 0
    assert len(last_json(capsys.readouterr().out)["images"][0]["faces"]) == 2
    assert files(Path("o")) == ["stdin.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert detect.main(["-"]) == 1
    assert capsys.readouterr().err.startswith("stdin: ")


def test_blur_changes_only_faces(fake, photos):
    noise = np.random.default_rng(0).integers(100, 255, (100, 120, 3), np.uint8)
    image = picture(100, 120)
    image[20:76, 30:70] = np.maximum(noise[20:76, 30:70], 200)
    Image.fromarray(image).save("photos/a.png")
    assert detect.main(["photos/a.png", "--blur", "--no-draw", "--out", "o"]) == 0
    blurred = read_image("o/a.png")
    outside = np.ones((100, 120), bool)
    outside[11:85, 24:76] = False
    np.testing.assert_array_equal(blurred[outside], image[outside])
    assert (blurred[30:66, 40:60] != image[30:66, 40:60]).mean() > 0.9
    assert read_image("photos/a.png").tolist() == image.tolist()


def test_no_draw_writes_no_pictures(fake, photos, capsys):
    assert detect.main(["photos/a.png", "--no-draw"]) == 0
    assert capsys.readouterr().out == "photos/a.png: 1 face\n" and not Path("runs").exists()


@pytest.mark.parametrize("options", [["--no-draw", "--out", "o"], ["--frames", "3"]])
def test_options_without_effect_are_refused(fake, photos, capsys, options):
    assert detect.main(["photos/a.png", *options]) == 2
    err = capsys.readouterr().err
    assert options[-2] in err and err.count("\n") == 1 and not Path("o").exists()


def test_kinds_that_cannot_be_written_become_png(fake, photos):
    Image.fromarray(picture(100, 120, BOX)).save("photos/g.gif")
    assert detect.main(["photos/g.gif", "--out", "o"]) == 0
    assert files(Path("o")) == ["g.gif.png"]


@pytest.mark.parametrize("name, width", [("wide.webp", 17_000), ("wide.jpg", 70_000)])
def test_a_picture_that_its_format_cannot_hold_is_reported(fake, photos, capsys, name, width):
    Image.fromarray(picture(2, width)).save("photos/wide.png")
    Path("photos/wide.png").rename(f"photos/{name}")
    assert detect.main([f"photos/{name}", "photos/a.png", "--out", "o", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"o/{name}: cannot write the picture (") and err.count("\n") == 1
    assert files(Path("o")) == ["a.png"] and len(last_json(out)["images"]) == 2


def test_a_link_among_the_outputs_stays_one(fake, photos):
    Path("there").mkdir()
    Path("o").mkdir()
    Path("o/a.png").symlink_to(Path("there/target.png").resolve())
    assert detect.main(["photos/a.png", "--out", "o"]) == 0
    assert Path("o/a.png").is_symlink() and read_image("there/target.png").shape == (100, 120, 3)


def test_inputs_are_never_overwritten(fake, photos, capsys):
    before = {f: (photos / f).read_bytes() for f in files(photos)}
    (photos.parent / "link").symlink_to(photos)
    for out in ("photos", "link", "photos/../photos"):
        assert detect.main(["photos/a.png", "photos/b.jpg", "--out", out]) == 2
        assert "overwrite" in capsys.readouterr().err
    assert {f: (photos / f).read_bytes() for f in files(photos)} == before


def test_two_inputs_are_never_drawn_to_one_file(fake, photos, capsys):
    Image.fromarray(picture(100, 120, BOX)).save("photos/x.gif")
    Image.fromarray(picture(100, 120)).save("photos/x.gif.png")
    assert detect.main(["photos", "--out", "o"]) == 2
    assert "x.gif.png: would be drawn to o/x.gif.png, as photos/x.gif is" in capsys.readouterr().err
    assert detect.main(["photos", "--json"]) == 0 and detect.main(["photos/a.png", "./photos/a.png", "--out", "o"]) == 0


def test_options_reach_pictures_and_videos_alike(fake, photos, monkeypatch):
    make_video(Path("clip.avi"), frames=1)
    asked = []

    def nothing(self, images, **options):
        asked.append(options)
        return [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))) for _ in images]

    monkeypatch.setattr(FaceDetector, "__call__", nothing)
    command = ["clip.avi", "photos/a.png", "--scale", "vga", "--tta", "--score", "0.3", "--nms", "0.2", "--no-draw"]
    assert detect.main(command) == 0
    assert asked == [{"scale": "vga", "tta": True}] * 2
    assert fake["score_threshold"] == 0.3 and fake["nms_threshold"] == 0.2


def test_few_large_pictures_are_held_at_once(fake, photos, monkeypatch):
    held, call = [], FaceDetector.__call__

    def count(self, images, **options):
        held.append(len(images))
        return call(self, images, **options)

    monkeypatch.setattr(FaceDetector, "__call__", count)
    monkeypatch.setattr(detect, "CHUNK_PIXELS", 20_000)
    assert detect.main(["photos", "--no-draw"]) == 0 and held == [2, 1]


def test_columns_of_the_table(fake, photos):
    """Left and right as in the picture's JSON; a picture has no frame, a video's first frame is 0."""
    make_video(Path("clip.avi"), frames=2)
    assert detect.main(["photos/a.png", "clip.avi", "--csv", "f.csv", "--json", "f.json"]) == 0
    rows = list(csv.DictReader(Path("f.csv").open()))
    assert [r["frame"] for r in rows] == ["", "0", "1"]
    (face,) = json.loads(Path("f.json").read_text())["images"][0]["faces"]
    for point, name in zip(face["landmarks"], ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")):
        assert [float(rows[0][f"{name}_{axis}"]) for axis in "xy"] == point
    assert float(rows[0]["left_eye_x"]) < float(rows[0]["right_eye_x"]) and float(rows[0]["score"]) == face["score"]


def test_crops_take_no_inputs_place(fake, photos, capsys):
    """Neither a picture that has the name of one, nor those of an earlier run, as inputs of the next."""
    assert detect.main(["photos/a.png", "--crops", "photos"]) == 0
    before = Path("photos/a.png_00.png").read_bytes()
    capsys.readouterr()
    assert detect.main(["photos", "--crops", "photos"]) == 2
    err = capsys.readouterr().err
    assert "a.png_00.png: a crop of photos/a.png would be written there" in err and len(err.splitlines()) == 1
    assert Path("photos/a.png_00.png").read_bytes() == before
    make_video(Path("photos/clip.avi"))
    Path("photos/a.png_00.png").rename("photos/clip.avi_000003_00.png")
    assert detect.main(["photos", "photos/clip.avi", "--crops", "photos"]) == 2
    assert "clip.avi_000003_00.png: a crop of photos/clip.avi would" in capsys.readouterr().err


def test_crops_are_each_of_its_own_face(fake, photos):
    image = read_image("photos/b.jpg")
    image[SECOND[1] : SECOND[3], SECOND[0] : SECOND[2]] = (255, 230, 255)
    Image.fromarray(image).save("photos/two.png")
    assert detect.main(["photos/two.png", "--crops", "c"]) == 0
    greens = sorted(read_image(f"c/two.png_0{i}.png")[60, 56, 1] for i in (0, 1))
    assert greens == [230, 255]


def test_boxes_are_drawn_on_blurred_faces(fake, photos):
    assert detect.main(["photos/a.png", "--blur", "--out", "o"]) == 0
    assert (read_image("o/a.png")[20, 30:70] == (0, 220, 80)).all()


def test_a_picture_named_twice_is_one(fake, photos, capsys):
    assert detect.main(["photos/a.png", "photos", "photos/a.png", "--json"]) == 0
    files = [i["file"] for i in last_json(capsys.readouterr().out)["images"]]
    assert files == ["photos/a.png", "photos/b.jpg", "photos/sub/c.png"]


def test_names_that_look_like_patterns_or_shout(fake, photos, capsys):
    make_video(Path("clip.avi"), frames=1)
    Path("clip.avi").rename("CLIP.AVI")
    (photos / "a.png").rename("[1].png")
    assert detect.main(["[1].png", "CLIP.AVI", "--json"]) == 0
    images = last_json(capsys.readouterr().out)["images"]
    assert [(i["file"], i.get("frame")) for i in images] == [("[1].png", None), ("CLIP.AVI", 0)]


def test_a_table_never_overwrites_an_input(fake, photos, capsys):
    before = (photos / "a.png").rename(photos / "a.csv").read_bytes()
    assert detect.main(["photos/a.csv", "--csv", "photos/a.csv"]) == 2
    assert "overwrite" in capsys.readouterr().err and (photos / "a.csv").read_bytes() == before


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_unreadable_files_are_reported_and_skipped(fake, photos, capsys):
    data = Path("photos/b.jpg").read_bytes()
    Path("photos/cut.jpg").write_bytes(data[: len(data) // 2])
    Path("photos/text.jpg").write_text("hello")
    assert detect.main(["photos", "missing.jpg", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [i["file"] for i in last_json(out)["images"]] == ["photos/a.png", "photos/b.jpg", "photos/sub/c.png"]
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["photos/cut.jpg", "photos/text.jpg", "missing.jpg"]
    assert "No such file" in lines[2]


def test_every_suffix_of_a_kind_is_searched(fake, photos, capsys):
    for name in ("saved.jfif", "old.jpe"):
        (photos / "sub" / name).write_bytes((photos / "b.jpg").read_bytes())
    assert detect.main(["photos/sub", "--out", "o"]) == 0
    assert "saved.jfif: 2 faces -> o/saved.jfif.png" in capsys.readouterr().out
    assert files(Path("o")) == ["c.png", "old.jpe.png", "saved.jfif.png"]


def test_a_full_disk_is_named_and_leaves_no_half_a_picture(fake, photos, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    noise[20:76, 30:70] = 255
    Image.fromarray(noise).save(photos / "noise.png")
    with files_end_at(10_000):
        assert detect.main(["photos/noise.png", "photos/a.png", "--out", "o"]) == 1
    out, err = capsys.readouterr()
    assert err == "o/noise.png: File too large\n" and out == "photos/a.png: 1 face -> o/a.png\n"
    assert files(Path("o")) == ["a.png"]


def test_empty_folder(fake, photos, capsys):
    (photos / "empty").mkdir()
    assert detect.main(["photos/empty"]) == 2
    assert capsys.readouterr().err == "detect.py: photos/empty: no pictures in this folder\n"


def test_a_folder_of_other_things_says_what_they_are(fake, tmp_path, monkeypatch, capsys):
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").write_text("x")
    assert detect.main([str(tmp_path / "phone")]) == 2
    assert "no pictures in this folder (not searched: 1 picture(s) of a kind" in capsys.readouterr().err


def test_unreadable_folder(fake, photos, capsys, monkeypatch):
    """As root no folder is unreadable, so the system's answer is imitated."""
    real = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert detect.main(["photos", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == "photos/sub: cannot read the folder (Permission denied)\n"
    assert len(last_json(out)["images"]) == 2
    assert detect.main(["photos/sub"]) == 1


def test_unwritable_output(fake, photos, capsys):
    Path("file").write_text("")
    assert detect.main(["photos/a.png", "--out", "file/x"]) == 2
    assert "file" in capsys.readouterr().err
    assert detect.main(["photos/a.png", "--json", "file/x.json"]) == 2
    Path("dir.json").mkdir()
    assert detect.main(["photos/a.png", "--json", "dir.json"]) == 2
    out, err = capsys.readouterr()
    assert "a.png" not in out and "dir.json: cannot write there" in err  # said before any work


def test_an_older_json_stays_until_there_is_a_new_one(fake, photos, capsys):
    Path("file").write_text("")
    Path("old.json").write_text("old")
    assert detect.main(["photos/a.png", "--json", "old.json", "--csv", "file/x.csv"]) == 2
    assert Path("old.json").read_text() == "old" and list(Path().glob("old.json*")) == [Path("old.json")]
    Path("full.csv").symlink_to("/dev/full")
    assert detect.main(["photos/a.png", "--json", "old.json", "--csv", "full.csv"]) == 1
    assert "full.csv: No space left" in capsys.readouterr().err
    assert len(json.loads(Path("old.json").read_text())["images"]) == 1


def test_what_was_found_outlives_ctrl_c(fake, photos, monkeypatch):
    names = iter(["photos/a.png", "photos/b.jpg"])
    read = detect.read_image

    def read_two_then_stop(name):
        if next(names, None) is None:
            raise KeyboardInterrupt
        return read(name)

    monkeypatch.setattr(detect, "read_image", read_two_then_stop)
    assert detect.main(["photos", "--json", "found.json", "--batch-size", "1"]) == 130
    assert [len(i["faces"]) for i in json.loads(Path("found.json").read_text())["images"]] == [1, 2]


def test_names_that_no_encoding_knows(fake, photos, capsys):
    os.rename(b"photos/a.png", b"photos/caf\xe9.png")
    assert detect.main(["photos", "--csv", "faces.csv", "--json", "faces.json", "--out", "o"]) == 0
    assert "caf\\udce9.png: 1 face" in capsys.readouterr().out
    rows = list(csv.DictReader(Path("faces.csv").open(encoding="utf-8")))
    assert [r["file"] for r in rows] == ["photos/b.jpg", "photos/b.jpg", "photos/caf\\udce9.png"]
    assert os.path.isfile(b"o/caf\xe9.png")


def test_what_a_folder_holds_besides_pictures_is_told(fake, photos, capsys):
    (photos / "IMG_1.HEIC").write_text("x")
    make_video(photos / "clip.avi")
    (photos / "more").symlink_to(photos / "sub")
    assert detect.main(["photos", "--json"]) == 0
    err = capsys.readouterr().err
    assert "photos: not searched: 1 video(s)" in err and "1 picture(s) of a kind" in err and "1 linked folder" in err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--json"],
        ["photos/a.png", "--score", "2"],
        ["photos/a.png", "--score", "x"],
        ["photos/a.png", "--batch-size", "0"],
        ["photos/a.png", "--scale", "huge"],
        ["photos/a.png", "--scale", "1600.0"],
        ["photos/a.png", "--scale", "nan"],
        ["photos/a.png", "--csv", "photos/b.jpg"],
        ["photos/a.png", "--json", "results"],
        ["photos/a.png", "--unknown"],
    ],
)
def test_mistakes_on_the_command_line(fake, photos, capsys, argv):
    try:
        code = detect.main(argv)
    except SystemExit as e:  # argparse
        code = e.code
    assert code == 2 and capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, code, words",
    [
        (["--weights", "none.pth"], 1, "none.pth"),
        (["--weights", "ultra.pth", "--config", "v1"], 1, "'v2_ultra'"),
        (["--weights", "ultra.pth", "--config", "v1", "--backend", "onnx"], 1, "'v1' was asked for (model."),
        (["--weights", "ultra.pth", "--config", "nothing"], 2, "nothing"),
        (["--weights", "ultra.pth", "--device", "cuda:77"], 2, "cuda:77"),
        (["--weights", "photos/a.png"], 1, "photos/a.png"),
    ],
)
def test_bad_weights_config_and_device(photos, capsys, argv, code, words):
    save_untrained()
    assert detect.main(["photos/a.png", *argv]) == code
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


# ---- video --------------------------------------------------------------------------------------------------------


def make_video(path: Path, frames: int = 5) -> None:
    try:
        with VideoWriter(path, 10) as writer:
            for i in range(frames):
                writer.write(picture(96, 128, (20 + 4 * i, 20, 60 + 4 * i, 70)))
    except VideoError as e:
        pytest.skip(f"no codec: {e}")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_video_round_trip(fake, photos, capsys, name):
    make_video(Path(name))
    assert detect.main([name, "--out", "o", "--json", "--crops", "c", "--batch-size", "2"]) == 0
    images = last_json(capsys.readouterr().out)["images"]
    assert [(i["file"], i["frame"], len(i["faces"])) for i in images] == [(name, k, 1) for k in range(5)]
    for k, image in enumerate(images):
        assert image["faces"][0]["box"] == pytest.approx((20 + 4 * k, 20, 60 + 4 * k, 70), abs=4)
    with VideoReader(Path("o") / name) as reader:
        drawn = list(reader)
        assert len(drawn) == 5 and drawn[0].shape == (96, 128, 3) and reader.fps == pytest.approx(10)
    assert len(files(Path("c"))) == 5 and files(Path("c"))[3] == f"{name}_000003_00.png"


def test_a_videos_name_may_hold_a_colon(fake, photos, capsys):
    make_video(Path("12.avi"))
    Path("12.avi").rename("12:30.avi")
    assert detect.main(["12:30.avi", "--out", "o:x"]) == 0
    assert capsys.readouterr().out == "12:30.avi: 5 faces -> o:x/12:30.avi\n"
    with VideoReader("o:x/12:30.avi") as reader:
        assert len(list(reader)) == 5


def test_frames_limit_and_blurred_video(fake, photos, capsys):
    make_video(Path("clip.avi"))
    assert detect.main(["clip.avi", "--out", "o", "--blur", "--no-draw", "--frames", "3"]) == 0
    assert capsys.readouterr().out == "clip.avi: 3 faces -> o/clip.avi\n"
    with VideoReader("o/clip.avi") as reader:
        assert len(list(reader)) == 3


def test_ctrl_c_in_a_video_ends_the_work(fake, photos, monkeypatch):
    make_video(Path("clip.avi"))
    frames = VideoReader.__iter__

    def two_then_stop(self):
        for _, frame in zip(range(2), frames(self)):
            yield frame
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoReader, "__iter__", two_then_stop)
    assert detect.main(["clip.avi", "clip.avi", "--json", "found.json", "--batch-size", "1"]) == 130
    assert [i["frame"] for i in json.loads(Path("found.json").read_text())["images"]] == [0, 1]


def test_a_blurred_video_shows_no_face(fake, photos):
    image = picture(96, 128, BOX)
    image[20:76, 30:70] = np.where(np.add.outer(np.arange(56), np.arange(40))[..., None] // 4 % 2, 255, 160)
    with VideoWriter(Path("clip.avi"), 10) as writer:
        for _ in range(2):
            writer.write(image)
    assert detect.main(["clip.avi", "--out", "o", "--blur", "--no-draw"]) == 0
    for before, after in zip(VideoReader("clip.avi"), VideoReader("o/clip.avi"), strict=True):
        spread = [frame[30:66, 36:64].astype(float).std() for frame in (before, after)]
        assert spread[1] < spread[0] / 2


def test_colours_of_a_video_survive(tmp_path):
    with VideoWriter(tmp_path / "red.avi", 10) as writer:
        writer.write(np.full((64, 64, 3), (200, 90, 20), np.uint8))
    with VideoReader(tmp_path / "red.avi") as reader:
        (frame,) = reader
    assert frame.mean((0, 1)) == pytest.approx([200, 90, 20], abs=12)
    stored = cv2.VideoCapture(str(tmp_path / "red.avi")).read()[1]  # BGR, as any other program would see it
    assert stored.mean((0, 1)) == pytest.approx([20, 90, 200], abs=12)


@pytest.mark.parametrize("stated", [0.0, float("nan"), 90_000.0, 30.0])
def test_cameras_that_state_no_speed(monkeypatch, stated):
    def get(key):
        return stated if key == cv2.CAP_PROP_FPS else -1.0

    camera = SimpleNamespace(isOpened=lambda: True, get=get, release=lambda: None)
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: camera)
    with VideoReader("webcam:0") as reader:
        assert reader.fps == (30 if stated == 30 else 25) and reader.count == 0


@pytest.mark.parametrize("step", [0.02, 0.1, 0.3])
def test_an_unsteady_video_lasts_as_long_as_its_frames(tmp_path, step):
    """At 10 frames a second: ten frames a tenth of a second apart, then ten that come faster, as fast, or slower."""
    times = [*np.arange(10) / 10, *(1 + step * np.arange(10))]
    with VideoWriter(tmp_path / "a.avi", 10) as writer:
        for i, time in enumerate(times):
            writer.write(np.full((16, 16, 3), 10 * i, np.uint8), time + 5 if i > 2 else np.nan)
    with VideoReader(tmp_path / "a.avi") as reader:
        shown = [frame.mean() for frame in reader]
    assert len(shown) == pytest.approx(10 * times[-1] + 1, abs=1)
    assert shown[0] == pytest.approx(0, abs=4) and np.all(np.diff(shown) > -4)
    assert reader.times == pytest.approx(np.arange(len(shown)) / 10)


def test_a_whole_video_may_have_fewer_frames_than_its_length_makes_one_expect(tmp_path, monkeypatch):
    """Matroska states a length; with the highest of its speeds that makes more frames than there are."""
    make_video(tmp_path / "clip.avi", frames=40)
    with VideoReader(tmp_path / "clip.avi") as reader:
        list(reader)
        reader.count *= 2
        reader.check_end()
        reader.times[-1] /= 2
        with pytest.raises(VideoError, match="breaks off: 40 frames can be read, it states 80"):
            reader.check_end()


def test_the_speed_of_slow_motion_is_written(tmp_path):
    for fps in (66.667, 239.679, 960.123):
        with VideoWriter(tmp_path / "slow.mp4", fps) as writer:
            writer.write(picture(64, 64, (20, 10, 40, 40)))
        with VideoReader(tmp_path / "slow.mp4") as reader:
            assert reader.fps == pytest.approx(fps, rel=1e-3)


def test_bad_videos_are_reported(fake, photos, capfd):
    Path("text.mp4").write_text("hello")
    assert detect.main(["text.mp4", "missing.mp4", "webcam:99", "webcam:x", "photos/a.png", "--json"]) == 1
    out, err = capfd.readouterr()
    for name in ("text.mp4", "missing.mp4", "webcam:99", "webcam:x"):
        assert f"{name}: cannot open the" in err
    assert len(last_json(out)["images"]) == 1 and not Path("o").exists()


def test_a_video_that_breaks_off_is_reported_and_what_there_is_is_kept(fake, photos, capfd):
    make_video(Path("clip.avi"), frames=40)
    whole = Path("clip.avi").read_bytes()
    Path("clip.avi").write_bytes(whole[: len(whole) // 2])
    with VideoReader("clip.avi") as reader:
        stated, readable = reader.count, len(list(reader))
    assert readable < 0.8 * stated
    assert detect.main(["clip.avi", "--out", "o"]) == 1
    assert f"clip.avi: breaks off: {readable} frames can be read, it states {stated}" in capfd.readouterr().err
    with VideoReader("o/clip.avi") as reader:
        assert len(list(reader)) == readable
    assert detect.main(["clip.avi", "--out", "o", "--frames", "3"]) == 0


def test_a_full_disk_is_not_a_finished_video(fake, photos, capfd):
    frames = np.random.default_rng(0).integers(0, 256, (60, 120, 160, 3), np.uint8)
    with VideoWriter(Path("noise.avi"), 10) as writer:
        for frame in frames:
            writer.write(frame)
    with files_end_at(100_000):
        assert detect.main(["noise.avi", "--out", "o", "--no-draw", "--blur"]) == 1
    out, err = capfd.readouterr()
    assert "of 60 frames were written" in err and "->" not in out


def test_odd_sides_are_kept_and_other_sizes_refused(tmp_path):
    with VideoWriter(tmp_path / "odd.avi", 10) as writer:
        writer.write(picture(51, 101, (20, 10, 60, 40)))
        with pytest.raises(VideoError, match="101x51 and 100x50"):
            writer.write(picture(50, 100, (20, 10, 60, 40)))
    with VideoReader(tmp_path / "odd.avi") as reader:
        assert [frame.shape for frame in reader] == [(52, 102, 3)]


def test_what_makes_sides_even_is_added_at_the_right_and_below(tmp_path):
    frame = np.zeros((51, 101, 3), np.uint8)
    frame[16:32, 32:48] = 255
    with VideoWriter(tmp_path / "odd.avi", 10) as writer:
        writer.write(frame)
    with VideoReader(tmp_path / "odd.avi") as reader:
        (shown,) = reader
    np.testing.assert_allclose(shown[:51, :101], frame, atol=40)


def test_a_pause_shows_the_frame_before_it(tmp_path):
    red, green = (200, 20, 20), (20, 200, 20)
    with VideoWriter(tmp_path / "a.avi", 10) as writer:
        for colour, time in ((red, 0.0), (red, 0.1), (green, 0.5)):
            writer.write(np.full((32, 32, 3), colour, np.uint8), time)
    with VideoReader(tmp_path / "a.avi") as reader:
        shown = np.array([frame.mean((0, 1)) for frame in reader])
    np.testing.assert_allclose(shown, [red] * (len(shown) - 1) + [green], atol=15)
    assert len(shown) == 5


def test_a_thousand_frames_per_second_are_a_speed_not_stated(monkeypatch):
    def get(key):
        return 1000.0 if key == cv2.CAP_PROP_FPS else -1.0

    camera = SimpleNamespace(isOpened=lambda: True, get=get, release=lambda: None)
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: camera)
    with VideoReader("webcam:0") as reader:
        assert reader.fps == 25


def test_a_table_alone_holds_the_faces(fake, photos):
    assert detect.main(["photos/b.jpg", "--no-draw", "--csv", "f.csv"]) == 0
    assert len(list(csv.DictReader(Path("f.csv").open()))) == 2


def test_an_input_behind_a_link_is_not_overwritten(fake, photos, capsys):
    before = (photos / "a.png").rename(photos / "a.csv").read_bytes()
    Path("linked").symlink_to(photos)
    assert detect.main(["linked/a.csv", "--no-draw", "--csv", "photos/a.csv"]) == 2
    assert "overwrite" in capsys.readouterr().err and (photos / "a.csv").read_bytes() == before


def test_suffixes_in_capitals_are_kept():
    results = Results("/photos", out="o")
    assert [results.output(f"/photos/{name}").name for name in ("A.JPG", "B.MP4")] == ["A.JPG", "B.MP4"]


def test_results_of_several_folders_lie_below_what_holds_them_all(photos):
    assert find_inputs(["photos/sub/c.png", "photos/a.png"]).root == str(photos)


def test_a_pattern_matches_files_alone_and_a_video_named_twice_is_one(photos):
    assert find_inputs(["photos/*"]).pictures == ["photos/a.png", "photos/b.jpg", "photos/note.txt"]
    assert find_inputs(["clip.avi", "clip.avi"]).videos == ["clip.avi"]


# ---- the real thing -----------------------------------------------------------------------------------------------


def test_as_a_program(photos):
    save_untrained()
    script = Path(detect.__file__)
    done = subprocess.run(
        [
            sys.executable,
            script,
            "photos/a.png",
            "photos/none.png",
            "--weights",
            "ultra.pth",
            "--json",
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("photos/none.png: ")
    assert [i["file"] for i in last_json(done.stdout)["images"]] == ["photos/a.png"]


def test_a_reader_that_leaves_does_not_stop_the_work(photos):
    """``detect.py ... | head -1``"""
    save_untrained()
    command = [sys.executable, detect.__file__, "photos", "--weights", "ultra.pth", "--out", "o", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 0 and not error
    assert files(Path("o")) == ["a.png", "b.jpg", "sub/c.png"]


@pytest.mark.parametrize("redirect, code, error", [(">&-", 0, ""), ("<&-", 2, "detect.py: -: stdin is closed\n")])
def test_closed_streams(photos, redirect, code, error):
    save_untrained()
    source = "-" if "<" in redirect else "photos"
    command = f'"$0" "$1" {source} --weights ultra.pth --out o --device cpu {redirect}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, detect.__file__], stderr=subprocess.PIPE, text=True, stdin=None
    )
    assert (done.returncode, done.stderr) == (code, error)
    assert code or files(Path("o")) == ["a.png", "b.jpg", "sub/c.png"]
