"""A user's own boxes, end to end: every command of docs/own_data.md runs on a small set made here."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detect
import test_widerface as evaluate
from data import prepare, visualize
from data.labels import read_labels
from models.detector import FaceDetector
from models.featherface import build_model
from tests.conftest import ROOT
from utils import train_cli
from utils.checkpoint import inference_content, load_checkpoint, save_checkpoint
from utils.config import load_config

DOC = ROOT / "docs" / "own_data.md"
WIDTH, HEIGHT = 160, 128
HOPPER_FACE = (174, 110, 349, 330)  # xyxy in matplotlib's sample photo
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "data.prepare": prepare.main,
    "data.visualize": visualize.main,
    "test_widerface.py": evaluate.main,
    "detect.py": detect.main,
    "train_v2_progressive.py": lambda argv: train_cli.main("train", "", "configs/v2_ultra.yaml", argv),
}
# so small that 24 steps take seconds, so easy and steep that they teach even an untrained network something
QUICK = [
    *("train.stages=[{until: 1.0, size: 64, batch_size: 8}]", "train.epochs=12", "train.val_every=12", "train.amp=off"),
    *("train.lr=5e-3", "train.log_every=1", "train.pictures=0", "data.workers=0"),
    *("data.augment.whole_image_prob=1", "data.augment.photometric_prob=0"),
]


def photos_of(folder: Path, count: int = 20) -> dict[str, list[tuple[int, int, int, int]]]:
    """Write photos of one real face pasted once or twice on coloured backgrounds; -> xywh boxes by name."""
    import matplotlib.cbook as cbook

    face = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).crop(HOPPER_FACE)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    boxes: dict[str, list] = {}
    for i in range(count):
        slope = np.linspace(*rng.uniform(20, 220, (2, 3)), WIDTH)  # [W, 3]
        noise = rng.normal(0, 12, (HEIGHT, WIDTH, 3))
        image = Image.fromarray((slope + noise).clip(0, 255).astype(np.uint8))
        name = f"{i:02d}.png"
        boxes[name] = []
        for left in (0, WIDTH // 2)[: i % 3]:  # none, one or two
            w = int(rng.integers(24, 56))
            h = round(w * face.height / face.width)
            x, y = left + int(rng.integers(0, WIDTH // 2 - w)), int(rng.integers(0, HEIGHT - h))
            image.paste(face.resize((w, h)), (x, y))
            boxes[name].append((x, y, w, h))
        image.save(folder / name)
    return boxes


def write_voc(folder: Path, boxes: dict) -> None:
    folder.mkdir()
    for name, faces in boxes.items():
        objects = "".join(
            f"<object><name>face</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for x, y, w, h in faces
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        (folder / name).with_suffix(".xml").write_text(text)


def write_coco(file: Path, boxes: dict) -> None:
    images = [{"id": i, "file_name": n, "width": WIDTH, "height": HEIGHT} for i, n in enumerate(boxes)]
    faces = [(i, box) for i, many in enumerate(boxes.values()) for box in many]
    annotations = [{"id": k, "image_id": i, "category_id": 1, "bbox": list(b)} for k, (i, b) in enumerate(faces)]
    categories = [{"id": 1, "name": "face"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_yolo(folder: Path, boxes: dict) -> None:
    folder.mkdir()
    for name, faces in boxes.items():
        lines = [f"0 {(x + w / 2) / WIDTH} {(y + h / 2) / HEIGHT} {w / WIDTH} {h / HEIGHT}\n" for x, y, w, h in faces]
        (folder / name).with_suffix(".txt").write_text("".join(lines))


def commands() -> list[list[str]]:
    """The commands of the tutorial's bash blocks."""
    blocks = DOC.read_text().split("```bash\n")[1:]
    return [shlex.split(line) for block in blocks for line in block.split("```")[0].strip().splitlines()]


def call(words: list[str], moved: dict[str, str], extra: list[str] = ()) -> int:
    """Run one command of the tutorial in this process, its paths replaced as ``moved`` says."""
    assert words[0] == "python"
    program, *argv = words[2:] if words[1] == "-m" else words[1:]
    for old, new in moved.items():
        argv = [new + a[len(old) :] if a == old or a.startswith(f"{old}/") else a for a in argv]
    return PROGRAMS[program]([*argv, *extra])


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> tuple[Path, dict]:
    """A folder with photos/, annotations/ (VOC), faces.json (COCO) and labels/ (YOLO), and the boxes."""
    folder = tmp_path_factory.mktemp("own") / "my"
    boxes = photos_of(folder / "photos")
    write_voc(folder / "annotations", boxes)
    write_coco(folder / "faces.json", boxes)
    write_yolo(folder / "labels", boxes)
    return folder, boxes


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
def test_every_format_gives_the_same_boxes(mine, tmp_path, at_root, kind):
    folder, boxes = mine
    [words] = [c for c in commands() if kind in c]
    assert call(words, {"my": str(folder), "data/user": str(tmp_path / "user")}) == 0
    seen = {}
    for split, count in (("train", 18), ("val", 2)):
        labels = read_labels(tmp_path / "user" / split / "label.txt", "fail")
        assert len(labels.names) == count
        for i, name in enumerate(labels.names):
            faces = labels.faces(i)
            seen[name] = faces.boxes
            assert not faces.has_landmarks.any() and not faces.ignore.any()
            assert (tmp_path / "user" / split / "images" / name).is_file()
    assert sorted(seen) == sorted(boxes)
    for name, faces in boxes.items():
        expected = np.array([(x, y, x + w, y + h) for x, y, w, h in faces], np.float32).reshape(-1, 4)
        np.testing.assert_allclose(seen[name], expected, atol=1e-3)


def test_the_tutorial_from_preparing_to_detecting(mine, tmp_path, at_root, capsys):
    folder, _ = mine
    start, user, run = tmp_path / "start.pth", tmp_path / "user", tmp_path / "mine"
    model = load_config("v2_ultra").model
    save_checkpoint(start, inference_content("v2_ultra", model, build_model(model).state_dict()))
    moved = {
        "my": str(folder),
        "data/user": str(user),
        "runs/mine": str(run),
        "runs/mine_batch.png": str(tmp_path / "batch.png"),
        "v2_ultra": str(start),
        "weights/featherface_v2_ultra.pth": str(start),
    }
    extra = {
        "data.visualize": ["--count", "4", "--opts", f"data.root={user}", *QUICK],
        "train_v2_progressive.py": ["--device", "cpu", "--opts", f"data.root={user}", *QUICK],
    }
    ran = []
    for words in commands():
        if {"voc", "coco"} & set(words):  # the three write the same; YOLO's is used here
            continue
        program = words[2] if words[1] == "-m" else words[1]
        assert call(words, moved, extra.get(program, [])) == 0, (words, capsys.readouterr().err)
        ran.append(program)
    assert set(ran) == set(PROGRAMS)

    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["total"] for row in log if row["kind"] == "train"]
    assert len(losses) == 24 and np.isfinite(losses).all()
    assert np.mean(losses[-8:]) < 0.93 * np.mean(losses[:8])
    assert all(row["landmark"] == 0 for row in log if row["kind"] == "train")  # no labels, no loss, no NaN

    tuned, before = load_checkpoint(run / "best.pth")["state_dict"], load_checkpoint(start)["state_dict"]
    frozen = [k for k in tuned if k.startswith("backbone.stage1.")]
    assert frozen and all(torch.equal(tuned[k], before[k]) for k in frozen)
    assert any(not torch.equal(tuned[k], before[k]) for k in tuned if k.startswith("backbone.stage2."))
    faces = FaceDetector.from_pretrained(run / "best.pth", "cpu", config="v2_ultra")(
        folder / "photos" / "02.png", score=0.0
    )
    assert len(faces.scores) and np.isfinite(faces.boxes).all() and np.isfinite(faces.landmarks).all()
    assert len(list((run / "pictures").glob("*.png"))) == 2 and (tmp_path / "batch.png").is_file()


def test_the_options_that_the_tutorial_offers_exist():
    table = DOC.read_text().split("What to change")[1].split("\n## ")[0]
    offered = [shlex.split(text) for text in re.findall(r"`([^`]*\w=[^`]*)`", table) if "KEY=" not in text]
    assert len(offered) >= 6
    for opts in offered:
        load_config("finetune", opts)


def test_finetune_config_fits_the_shipped_network():
    assert load_config("finetune").model == load_config("v2_ultra").model
    assert not load_config("finetune").distill.enabled
