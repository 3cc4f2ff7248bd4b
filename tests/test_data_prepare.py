"""data.prepare for every format, and the picture grid of data.visualize."""

import errno
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import prepare, visualize
from data.formats import Face, LabelledImage, read_wider, read_yolo
from data.labels import read_labels
from tests.face_data import POINTS, line, make_config, make_folder, paint

BOXES = {"e/a.jpg": [(10, 20, 30, 40), (60, 20, 20, 20)], "e/b.jpg": [(5, 5, 50, 50)], "c.jpg": []}
SIZE = (100, 80)


@pytest.fixture
def photos(tmp_path):
    for name, boxes in BOXES.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(paint(*SIZE, boxes)).save(path)
    return tmp_path / "photos"


def run(capsys, *args) -> tuple[int, dict, str]:
    """-> exit code, the JSON of the last line, stderr."""
    code = prepare.main([*map(str, args), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err


def check(out, landmarks: bool):
    labels = read_labels(out / "label.txt", "fail")
    for name, boxes in BOXES.items():
        faces = labels.faces(labels.names.index(name))
        expected = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], np.float32).reshape(-1, 4)
        assert np.allclose(faces.boxes, expected, atol=1e-3)
        assert faces.has_landmarks.all() == (landmarks or not boxes)
        if landmarks and boxes:
            assert np.allclose(faces.landmarks[0], POINTS * boxes[0][2:] + boxes[0][:2], atol=1e-2)
        assert Image.open(out / "images" / name).size == SIZE


def wider(boxes_of, extra="0 0 0 0 0 0") -> str:
    rows = []
    for name, boxes in boxes_of.items():
        rows += [name, str(len(boxes)), *(f"{x} {y} {w} {h} {extra}" for x, y, w, h in boxes)]
        rows += [] if boxes else ["0 0 0 0 0 0 0 0 0 0"]
    return "\n".join(rows) + "\n"


def test_wider(photos, tmp_path, capsys):
    source = tmp_path / "gt.txt"
    source.write_text(wider(BOXES))
    code, result, _ = run(capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and result["problems"] == 0
    counts = result["splits"]["label.txt"]
    assert (counts["images"], counts["faces"], counts["without_faces"]) == (3, 3, 1)
    check(tmp_path / "out", landmarks=False)
    assert source.read_text() == wider(BOXES)


def test_archives(photos, tmp_path, capsys):
    images, labels, out = tmp_path / "WIDER_train.zip", tmp_path / "split.zip", tmp_path / "out"
    with zipfile.ZipFile(images, "w") as file:
        for name in BOXES:
            file.write(photos / name, f"WIDER_train/images/{name}")
    with zipfile.ZipFile(labels, "w") as file:
        file.writestr("split/gt.txt", wider(BOXES))
        file.writestr("split/other.txt", "")
    command = ["--format", "wider", labels / "split" / "gt.txt", "--images", images / "WIDER_train" / "images"]
    code, result, _ = run(capsys, *command, "--out", out)
    assert code == 0 and result["problems"] == 0
    check(out, landmarks=False)
    assert not list(out.rglob("other.txt"))
    picture = out / "unpacked" / "images" / "WIDER_train" / "WIDER_train" / "images" / "c.jpg"
    first = picture.stat().st_mtime_ns
    (picture.parent / "e" / "a.jpg").write_bytes(b"cut")  # by a kill, say
    assert run(capsys, *command, "--out", out)[0] == 0 and picture.stat().st_mtime_ns == first
    check(out, landmarks=False)


def test_another_archive_of_the_same_name_takes_the_place_of_the_first(photos, tmp_path, capsys):
    archive = tmp_path / "d.zip"
    for files in ({"c": "0 0.5 0.5 0.2 0.2", "e/a": "0 0.5 0.5 0.4 0.4"}, {"c": "0 0.5 0.5 0.3 0.3"}):
        with zipfile.ZipFile(archive, "w") as file:
            for name, text in files.items():
                file.writestr(f"labels/{name}.txt", text)
        command = ["--format", "yolo", archive / "labels", "--images", photos, "--out", tmp_path / "out"]
        assert run(capsys, *command)[0] == 0
    labels = read_labels(tmp_path / "out" / "label.txt")
    assert labels.faces(labels.names.index("c.jpg")).boxes.tolist() == [pytest.approx([35, 28, 65, 52])]
    assert len(labels.offsets) - 1 == labels.names.index(labels.names[-1]) + 1 and labels.offsets[-1] == 1


def test_archives_that_cannot_be_used_are_named(photos, tmp_path, capsys):
    broken, evil, good = (tmp_path / f"{name}.zip" for name in ("broken", "evil", "good"))
    broken.write_bytes(b"PK but no archive")
    for path, name in ((evil, "images/../../gt.txt"), (good, "images/c.jpg")):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, "text")
    for source, why in (
        (broken / "gt.txt", "broken.zip: cannot unpack it ("),
        (evil / "images", "evil.zip: 'images/../../gt.txt' leads out"),
        (good / "gt.txt", "good.zip: holds no gt.txt; it has images\n"),
    ):
        code, _, err = run(capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out" / "in")
        assert code == 1 and f": {tmp_path / why}" in err and err.count("\n") == 1
        assert ("cannot unpack" in err) == (source.parent == broken)
    assert not list(tmp_path.rglob("gt.txt"))


def test_an_encrypted_archive_is_one_line(photos, tmp_path, capsys):
    archive = tmp_path / "secret.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("gt.txt", wider(BOXES))
    content = bytearray(archive.read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(header) + flags] |= 1
    archive.write_bytes(content)
    source = archive / "gt.txt"
    code, _, err = run(capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out")
    assert code == 1 and "secret.zip: cannot unpack it" in err and err.count("\n") == 1


def test_wider_invalid_faces_are_ignored_and_attributes_become_quality(photos, tmp_path, capsys):
    source = tmp_path / "gt.txt"
    source.write_text("e/a.jpg\n2\n10 20 30 40 2 0 0 0 1 0\n60 20 20 20 0 0 0 1 0 0\n")
    assert run(capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out")[0] == 0
    labels = read_labels(tmp_path / "out" / "label.txt")
    assert labels.ignore.tolist() == [False, True] and labels.quality.tolist() == pytest.approx([0.4, 1.0])


def test_wider_bad_entries_are_named(photos, tmp_path, capsys):
    source = tmp_path / "gt.txt"
    text = "c.jpg\n2\n10 20 30 40 0 0 0 0 0 0\n5 5 0 9 0 0 0 0 0 0\ne/a.jpg\n2\n10 20 30 40\n60 x 20 20\n"
    source.write_text(text + "lost.jpg\n1\n1 1 9 9 0 0 0 0 0 0\ne/b.jpg\nmany\n")
    code, result, err = run(capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and result["splits"]["label.txt"]["faces"] == 1
    for wanted in (
        f"{source}:4: box of size 0 x 9",
        f"{source}:8: 'x'",
        "'e/a.jpg' is left out",
        "lost.jpg",
        f"{source}:13: expected the number",
        "'e/b.jpg' is left out",
    ):
        assert wanted in err
    assert result["splits"]["label.txt"]["images"] == 1  # the others' faces would be taught to be background
    assert (tmp_path / "out" / "problems.txt").read_text().splitlines() == err.splitlines()


def test_wider_with_fewer_faces_than_it_states_keeps_the_next_image(photos, tmp_path, capsys):
    source = tmp_path / "gt.txt"
    source.write_text("e/a.jpg\n3\n10 20 30 40\nc.jpg\n1\n5 5 20 20\ne/b.jpg\n1\nnan 5 20 20\n")
    code, _, err = run(capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and f"{source}:3: fewer than 3 faces listed for e/a.jpg" in err and f"{source}:9: 'nan'" in err
    labels = read_labels(tmp_path / "out" / "label.txt", "fail")
    assert labels.names == ["c.jpg"] and labels.boxes[:, 0].tolist() == [5]


def test_wider_with_more_faces_than_it_states_is_not_complete(tmp_path):
    (tmp_path / "gt.txt").write_text("e/a.jpg\n1\n10 10 30 30\n50 50 30 30\ne/b.jpg\n1\n10 10 30 30\n")
    problems = []
    images = read_wider(tmp_path / "gt.txt", tmp_path, problems)
    assert [(i.name, len(i.faces), i.complete) for i in images] == [("e/a.jpg", 1, False), ("e/b.jpg", 1, True)]
    assert len(problems) == 1 and "gt.txt:4: expected an image name" in problems[0]


@pytest.mark.parametrize("bad", ["10 20 x 40", "10 20 30", "40 60 -30 -40"])
def test_retinaface_image_with_a_line_that_cannot_be_read_is_left_out(photos, tmp_path, capsys, bad):
    source = tmp_path / "label.txt"
    source.write_text(f"# e/a.jpg\n60 20 20 20\n{bad}\n# e/b.jpg\n5 5 50 50\n1 1 0 9\n")
    code, _, err = run(capsys, "--format", "retinaface", source, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and f"{source}:3: " in err and "image e/a.jpg is left out" in err
    assert read_labels(tmp_path / "out" / "label.txt", "fail").names == ["e/b.jpg"]


def test_retinaface(photos, tmp_path, capsys):
    source = tmp_path / "label.txt"
    source.write_text("".join(f"# {n}\n" + "".join(line(b) + "\n" for b in boxes) for n, boxes in BOXES.items()))
    arguments = ("--format", "retinaface", source, "--images", photos, "--out", tmp_path / "out", "--copy")
    code, result, _ = run(capsys, *arguments)
    assert code == 0 and result["splits"]["label.txt"]["with_landmarks"] == 3
    check(tmp_path / "out", landmarks=True)
    assert not (tmp_path / "out" / "images" / "c.jpg").is_symlink()
    assert run(capsys, *arguments)[0] == 0  # twice does no harm
    check(tmp_path / "out", landmarks=True)


def test_retinaface_keeps_what_it_says_of_a_face(photos, tmp_path, capsys):
    source = tmp_path / "label.txt"
    source.write_text(f"# e/a.jpg\n10 20 30 40 {'-1 ' * 15}0.7 1\n60 20 20 20\n")
    code, result, _ = run(capsys, "--format", "retinaface", source, "--images", photos, "--out", tmp_path / "out")
    counts = result["splits"]["label.txt"]
    assert code == 0 and (counts["faces"], counts["with_landmarks"], counts["ignored"]) == (2, 0, 1)
    labels = read_labels(tmp_path / "out" / "label.txt", "fail")
    assert labels.ignore.tolist() == [True, False] and labels.quality.tolist() == pytest.approx([0.7, 0])
    assert not labels.has_landmarks.any()


def test_retinaface_quality_stays_with_its_face(photos, tmp_path, capsys):
    source = tmp_path / "label.txt"
    source.write_text("# e/a.jpg\n10 20 30 40 0.7\n# e/b.jpg\n5 5 50 50 0.2\n60 20 20 20 0.4\n")
    assert run(capsys, "--format", "retinaface", source, "--images", photos, "--out", tmp_path / "out")[0] == 0
    assert read_labels(tmp_path / "out" / "label.txt").quality.tolist() == pytest.approx([0.7, 0.2, 0.4])


def test_boxes_are_clipped_to_the_image_and_keep_their_fractions(photos, tmp_path, capsys):
    """What shows less than a pixel is left out, but a small face that shows whole stays."""
    source = tmp_path / "gt.txt"
    source.write_text("e/a.jpg\n3\n-10 60.25 30.125 40\n99.5 10 30 30\n20 20 0.5 0.5\n")
    code, result, err = run(capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and result["problems"] == 1 and f"{source}:4: box 99.5 10 30 30 lies outside the 100x80" in err
    labels = read_labels(tmp_path / "out" / "label.txt", "fail")
    assert labels.boxes.tolist() == [[0, 60.25, 20.125, 80], [20, 20, 20.5, 20.5]]
    assert labels.quality.tolist() == [0, 0]  # not known of four numbers


def voc(name, boxes, size=SIZE, label="face") -> str:
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        "</bndbox></object>"
        for x, y, w, h in boxes
    )
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation><filename>{name}</filename>{shape}{objects}</annotation>"


def test_voc(photos, tmp_path, capsys):
    folder = tmp_path / "xml"
    for name, boxes in BOXES.items():
        file = (folder / name).with_suffix(".xml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(voc(name.rpartition("/")[2], boxes))
    code, _, _ = run(capsys, "--format", "voc", folder, "--images", photos, "--out", tmp_path / "out")
    assert code == 0
    check(tmp_path / "out", landmarks=False)
    (folder / "broken.xml").write_text("<annotation><object>")
    (folder / "lost.xml").write_text(voc("lost.jpg", []))
    (folder / "c.xml").write_text(voc("c.jpg", [], size=(80, 100)))
    code, result, err = run(capsys, "--format", "voc", folder, "--images", photos, "--out", tmp_path / "out2")
    assert code == 0 and result["problems"] == 3
    assert "broken.xml:1: not valid XML" in err and "lost.jpg" in err and "made for 80x100" in err
    code, _, err = run(
        capsys, "--format", "voc", folder, "--images", photos, "--out", tmp_path / "out3", "--classes", "Face"
    )
    assert code == 2 and "--classes Face" in err and "it has: face" in err and not (tmp_path / "out3").exists()


def test_voc_difficult_objects_are_ignored_and_other_classes_left_out(photos, tmp_path, capsys):
    folder = tmp_path / "xml"
    folder.mkdir()
    text = voc("c.jpg", [(10, 20, 30, 40), (60, 20, 20, 20)]).replace(
        "</object>", "<difficult>1</difficult></object>", 1
    )
    lamp = voc("c.jpg", [(5, 5, 9, 9)], label="lamp").partition("</size>")[2]
    (folder / "c.xml").write_text(text.replace("</annotation>", lamp))
    arguments = ["--format", "voc", folder, "--images", photos, "--out", tmp_path / "out", "--classes", "face"]
    assert run(capsys, *arguments)[0] == 0
    labels = read_labels(tmp_path / "out" / "label.txt", "fail")
    assert labels.boxes[:, 0].tolist() == [10, 60] and labels.ignore.tolist() == [True, False]


def test_voc_of_other_tools(photos, tmp_path, capsys):
    folder = tmp_path / "xml"
    folder.mkdir()
    for name, path in (("c.xml", "C:\\photos\\c.jpg"), ("b.xml", "/home/me/e/b.jpg")):  # the file was made elsewhere
        (folder / name).write_text(voc(path, []))
    (photos / "b.jpg").write_bytes((photos / "e" / "b.jpg").read_bytes())
    text = '<?xml version="1.0" encoding="{}"?>' + voc("e/a.jpg", BOXES["e/a.jpg"])
    (folder / "a.xml").write_bytes(text.format("GBK").encode("gbk"))
    turned = voc("e/a.jpg", [(40, 60, -30, -40)])  # corners exchanged
    (folder / "t.xml").write_text(turned)
    code, _, err = run(capsys, "--format", "voc", folder, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and read_labels(tmp_path / "out" / "label.txt").names == ["b.jpg", "c.jpg"]
    assert "a.xml: its encoding cannot be read" in err and "t.xml: object 1: box of size -30 x -40" in err
    assert "'e/a.jpg' is left out: a box of it cannot be read" in err and len(err.splitlines()) == 3


@pytest.mark.parametrize("stated", ["C:\\photos\\a.jpg", "a.jpg", "e/a.jpg"])
def test_voc_photo_beside_its_file_comes_first_and_none_from_elsewhere(photos, tmp_path, capsys, stated):
    """Two photos of one name, and a path that exists on this machine, outside the photos."""
    (photos / "a.jpg").write_bytes((photos / "c.jpg").read_bytes())
    other = tmp_path / "other" / "c.jpg"
    other.parent.mkdir()
    other.write_bytes((photos / "c.jpg").read_bytes())
    (tmp_path / "xml" / "e").mkdir(parents=True)
    (tmp_path / "xml" / "e" / "a.xml").write_text(voc(stated, BOXES["e/a.jpg"]))
    (tmp_path / "xml" / "c.xml").write_text(voc(other.as_posix(), []))
    arguments = ["--format", "voc", tmp_path / "xml", "--images", photos, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    assert sorted(read_labels(tmp_path / "out" / "label.txt").names) == ["c.jpg", "e/a.jpg"]


def test_coco(photos, tmp_path, capsys):
    source = tmp_path / "coco.json"
    tree = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "face"}]}
    for i, (name, boxes) in enumerate(BOXES.items()):
        tree["images"].append({"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for box in boxes:
            points = [v for x, y in POINTS * box[2:] + box[:2] for v in (x, y, 2)]
            tree["annotations"].append({"image_id": i, "category_id": 7, "bbox": list(box), "keypoints": points})
    source.write_text(json.dumps(tree))
    assert run(capsys, "--format", "coco", source, "--images", photos, "--out", tmp_path / "out")[0] == 0
    check(tmp_path / "out", landmarks=True)
    tree["annotations"] += [
        {"image_id": 99, "bbox": [1, 2, 3, 4]},
        {"image_id": 1, "bbox": [1, 2, 3]},
        {"image_id": 0, "bbox": [300, 2, 30, 30]},
        {"image_id": 2, "bbox": [1, 2, 30, 30], "iscrowd": 1},
    ]
    source.write_text(json.dumps(tree))
    code, result, err = run(capsys, "--format", "coco", source, "--images", photos, "--out", tmp_path / "out2")
    assert code == 0 and result["problems"] == 4 and result["splits"]["label.txt"]["ignored"] == 1
    assert result["splits"]["label.txt"]["images"] == 2 and "'e/b.jpg' is left out: a box of it cannot be read" in err
    assert "annotations[3]: its image_id" in err and "annotations[4]: expected 4" in err
    assert "annotations[5]: box 300 2 30 30 lies outside" in err


def test_coco_takes_the_classes_asked_for_and_landmarks_that_are_all_labelled(photos, tmp_path, capsys):
    source = tmp_path / "coco.json"
    annotations = [
        {"image_id": 0, "category_id": 1, "bbox": [10, 20, 30, 40], "keypoints": [12, 25, 2, *[20, 30, flag] * 4]}
        for flag in (0, 1)  # not labelled, hidden
    ]
    annotations.append({"image_id": 0, "category_id": 2, "bbox": [5, 5, 9, 9]})
    categories = [{"id": 1, "name": "face"}, {"id": 2, "name": "lamp"}]
    tree = {"images": [{"id": 0, "file_name": "c.jpg"}], "annotations": annotations, "categories": categories}
    source.write_text(json.dumps(tree))
    arguments = ["--format", "coco", source, "--images", photos, "--out", tmp_path / "out", "--classes", "face"]
    assert run(capsys, *arguments)[0] == 0
    assert read_labels(tmp_path / "out" / "label.txt", "fail").has_landmarks.tolist() == [False, True]


def test_coco_that_would_mislead(photos, tmp_path, capsys):
    """Files that would put faces on the wrong photo, or leave photos without theirs, are refused in one line."""
    source = tmp_path / "coco.json"
    images = [{"id": i, "file_name": name} for i, name in enumerate(BOXES)]
    one = [{"image_id": 0, "category_id": 1, "bbox": [10, 20, 30, 40]}]
    for tree, why in (
        ({"images": [*images, {"id": 0, "file_name": "c.jpg"}], "annotations": one}, "images[3]: its id 0 is that of"),
        ({"images": images, "annotations": [{**one[0], "image_id": "0"}]}, "no annotation's image_id"),
    ):
        source.write_text(json.dumps(tree))
        code, _, err = run(capsys, "--format", "coco", source, "--images", photos, "--out", tmp_path / "out")
        assert code == 1 and why in err and len(err.splitlines()) == 1
    arguments = ["--format", "coco", source, "--images", photos, "--out", tmp_path / "out", "--classes", "face"]
    tree = {"images": images, "categories": [{"id": "1", "name": "face"}], "annotations": one}
    source.write_text(json.dumps(tree))
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "no annotation's category_id" in err and len(err.splitlines()) == 1
    tree["annotations"] = [*one, {**one[0], "image_id": 1, "category_id": "1"}]
    source.write_text(json.dumps(tree))
    code, result, err = run(capsys, *arguments)
    assert code == 0 and result["splits"]["label.txt"]["images"] == len(images) - 1
    assert "annotations[0]: its category_id" in err and f"'{images[0]['file_name']}' is left out" in err
    for categories in (None, [{"id": 1, "name": "Face"}]):
        source.write_text(json.dumps({"images": images, "annotations": one, "categories": categories}))
        assert run(capsys, *arguments)[0] == 2
    source.write_text(json.dumps({"images": [*images, {"id": [1], "file_name": "c.jpg"}], "annotations": one}))
    code, _, err = run(capsys, "--format", "coco", source, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and "images[3]: needs an id" in err


def test_coco_made_for_another_size_is_left_out(photos, tmp_path, capsys):
    source = tmp_path / "coco.json"
    images = [
        {"id": i, "file_name": n, "width": w, "height": 80} for i, n, w in ((0, "c.jpg", 100), (1, "e/a.jpg", 60))
    ]
    source.write_text(json.dumps({"images": images, "annotations": [{"image_id": 1, "bbox": [10, 20, 30, 40]}]}))
    code, _, err = run(capsys, "--format", "coco", source, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and read_labels(tmp_path / "out" / "label.txt").names == ["c.jpg"] and "made for 60x80" in err


@pytest.mark.parametrize("kind", ["wider", "retinaface", "coco"])
def test_marks_of_windows_tools_cost_nothing(photos, tmp_path, capsys, kind):
    source = tmp_path / "labels"
    coco = {"images": [{"id": 0, "file_name": "e/a.jpg"}], "annotations": [{"image_id": 0, "bbox": [10, 20, 30, 40]}]}
    text = {"wider": "e/a.jpg\n1\n10 20 30 40\n", "retinaface": "# e/a.jpg\n10 20 30 40\n", "coco": json.dumps(coco)}
    source.write_bytes(text[kind].replace("\n", "\r\n").encode("utf-8-sig"))
    code, result, _ = run(capsys, "--format", kind, source, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and result["problems"] == 0 and result["splits"]["label.txt"]["faces"] == 1


@pytest.mark.parametrize("landmarks", [False, True])
def test_yolo(photos, tmp_path, capsys, landmarks):
    folder = tmp_path / "yolo"
    for name, boxes in BOXES.items():
        rows = []
        for x, y, w, h in boxes:
            row = [(x + w / 2) / SIZE[0], (y + h / 2) / SIZE[1], w / SIZE[0], h / SIZE[1]]
            row += list(((POINTS * (w, h) + (x, y)) / SIZE).ravel()) if landmarks else []
            rows.append("0 " + " ".join(f"{v:.8f}" for v in row) + "\n")
        file = (folder / name).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(rows))
    assert run(capsys, "--format", "yolo", folder, "--images", photos, "--out", tmp_path / "out")[0] == 0
    check(tmp_path / "out", landmarks)
    (folder / "c.txt").write_text("0 0.5 0.5 0.2\n0 50 50 20 20\n0 0.5 0.5 -0.2 0.1\n0 0.5 0.5 0.2 0.2\n")
    (folder / "e" / "b.txt").unlink()
    code, result, err = run(capsys, "--format", "yolo", folder, "--images", photos, "--out", tmp_path / "out2")
    assert code == 0 and result["problems"] == 5 and result["splits"]["label.txt"]["faces"] == 2
    assert "'c.jpg' is left out: a box of it cannot be read" in err and "1 photos have no label file" in err
    (folder / "c.txt").write_text("\ufeff1 0.5 0.5 0.2 0.2\nlamp 0.5\n", encoding="utf-8")  # another class may be odd
    arguments = ["--format", "yolo", folder, "--images", photos, "--classes", "1", "--out", tmp_path / "out3"]
    code, result, _ = run(capsys, *arguments)
    assert code == 0 and result["splits"]["label.txt"]["faces"] == 1
    assert run(capsys, *arguments[:-3], "7", *arguments[-2:])[0] == 2
    assert "c.txt:1: expected 5 or 15 or 20" in err and "c.txt:2: expected fractions" in err and "c.txt:3: box" in err


def test_yolo_of_cameras_and_labelling_tools(photos, tmp_path, capsys):
    """Photos may end in .JPG, and a list of classes is no photo's labels."""
    folder = tmp_path / "yolo"
    folder.mkdir()
    for name in BOXES:
        (photos / name).unlink()
    Image.fromarray(paint(*SIZE, [])).save(photos / "DSC1.JPG")
    (folder / "DSC1.txt").write_text("0 0.5 0.5 0.2 0.5\n")
    (folder / "classes.txt").write_text("face\n")
    code, result, err = run(capsys, "--format", "yolo", folder, "--images", photos, "--out", tmp_path / "out")
    assert code == 0 and not err and result["splits"]["label.txt"]["faces"] == 1
    assert read_labels(tmp_path / "out" / "label.txt", "fail").names == ["DSC1.JPG"]


def test_yolo_landmarks_that_are_not_labelled_are_none(photos, tmp_path, capsys):
    folder = tmp_path / "yolo"
    folder.mkdir()
    points = ("0.4 0.4 2 " * 5, "0.4 0.4 2 " * 4 + "0.4 0.4 0", "0.4 0.4 " * 4 + "-1 -1", "0.4 0.4 " * 5)
    (folder / "c.txt").write_text("".join(f"0 0.5 0.5 0.4 0.4 {p}\n" for p in points))
    assert run(capsys, "--format", "yolo", folder, "--images", photos, "--out", tmp_path / "out")[0] == 0
    labels = read_labels(tmp_path / "out" / "label.txt", "fail")
    assert labels.has_landmarks.tolist() == [True, False, False, True]
    assert labels.landmarks[0].tolist() == [[40, 32]] * 5


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.34, 1), (0.6, 2)])
def test_val_fraction_splits_without_overlap(photos, tmp_path, capsys, fraction, held):
    source = tmp_path / "gt.txt"
    source.write_text(wider(BOXES))
    code, result, _ = run(
        capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out", "--val-fraction", fraction
    )
    assert code == 0 and {k: v["images"] for k, v in result["splits"].items()} == {
        "train/label.txt": 3 - held,
        "val/label.txt": held,
    }
    names = [set(read_labels(tmp_path / "out" / part / "label.txt").names) for part in ("train", "val")]
    assert not names[0] & names[1] and names[0] | names[1] == set(BOXES)


def test_label_files_of_another_split_are_not_left_beside_the_new_ones(photos, tmp_path, capsys):
    source, out = tmp_path / "gt.txt", tmp_path / "out"
    source.write_text(wider(BOXES))
    base = ["--format", "wider", source, "--images", photos, "--out", out]
    assert run(capsys, *base, "--val-fraction", "0.34")[0] == 0
    code, _, err = run(capsys, *base)
    assert code == 1 and "train/label.txt: made with --val-fraction before" in err and not (out / "label.txt").exists()
    for part in ("train", "val"):
        (out / part / "label.txt").unlink()
    assert run(capsys, *base)[0] == 0
    code, _, err = run(capsys, *base, "--val-fraction", "0.34")
    assert code == 1 and "out/label.txt: made without --val-fraction before" in err


def test_of_two_lists_of_a_photo_that_differ_none_is_taken(photos):
    lists = [LabelledImage("c.jpg", photos / "c.jpg", [Face([x, 5.0, 20.0, 20.0])]) for x in (5.0, 60.0)]
    problems = []
    assert prepare.check_images(lists, problems) == [] and "is left out: it is listed twice" in problems[0]
    assert [image.name for image in prepare.check_images([lists[0], lists[0]], [])] == ["c.jpg"]


def test_boxes_in_fractions_of_the_picture_are_refused_where_pixels_are_meant(photos, tmp_path, capsys):
    tree = {"images": [{"id": 1, "file_name": "c.jpg"}], "annotations": [{"image_id": 1, "bbox": [0.3, 0.2, 0.1, 0.2]}]}
    (tmp_path / "coco.json").write_text(json.dumps(tree))
    code, _, err = run(
        capsys, "--format", "coco", tmp_path / "coco.json", "--images", photos, "--out", tmp_path / "out"
    )
    assert code == 1 and "if they are fractions of the image's size, write pixels" in err
    assert not (tmp_path / "out" / "label.txt").exists()


def test_a_box_of_less_than_a_pixel_is_not_called_outside():
    rng, problems = np.random.default_rng(0), []
    for x, y, w, h in rng.uniform(0.01, 0.9, (200, 4)):
        assert prepare._clip(Face([50 + x, 40 + y, w, h]), (100, 80), problems), problems


@pytest.mark.parametrize(
    "flag, ignored", [(1, True), ("1", True), (True, True), (0, False), ("0", False), (None, False)]
)
def test_flags_are_read_as_tools_write_them(photos, tmp_path, capsys, flag, ignored):
    face = {"image_id": 1, "bbox": [30, 20, 10, 20], **({} if flag is None else {"iscrowd": flag})}
    (tmp_path / "coco.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "c.jpg"}], "annotations": [face]})
    )
    (tmp_path / "voc").mkdir()
    difficult = "" if flag is None else f"<difficult>{flag}</difficult>"
    box = "<bndbox><xmin>30</xmin><ymin>20</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    (tmp_path / "voc" / "c.xml").write_text(
        f"<annotation><object><name>face</name>{difficult}{box}</object></annotation>"
    )
    for kind, source in (("coco", "coco.json"), ("voc", "voc")):
        out = tmp_path / f"{kind}_out"
        assert run(capsys, "--format", kind, tmp_path / source, "--images", photos, "--out", out)[0] == 0
        assert read_labels(out / "label.txt").ignore.tolist() == [ignored]


@pytest.mark.parametrize("beside", ["0 0.1 0.1 0.2 0.1 0.2 0.2", ""])
def test_an_outline_of_seven_points_is_no_face_with_landmarks(photos, tmp_path, capsys, beside):
    """Other outlines among the labels tell, and points far outside of what would be the box."""
    (tmp_path / "yolo").mkdir()
    outline = "0 0.3 0.3 0.4 0.3 0.45 0.35 0.4 0.4 0.35 0.4 0.3 0.38 0.28 0.33"
    outline = outline if beside else "0 0.35 0.12 0.44 0.11 0.53 0.12 0.53 0.35 0.44 0.36 0.35 0.35 0.34 0.2"
    (tmp_path / "yolo" / "c.txt").write_text(outline)
    (tmp_path / "yolo" / "e").mkdir()
    (tmp_path / "yolo" / "e" / "a.txt").write_text(beside)
    arguments = ["--format", "yolo", tmp_path / "yolo", "--images", photos, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *arguments)
    assert "outline" in err and "c.txt:1: " in err
    assert code == 1 if beside else read_labels(tmp_path / "out" / "label.txt").names == ["e/a.jpg"]


def test_one_bad_line_among_many_with_landmarks_costs_its_own_photo_alone(photos, tmp_path, capsys):
    (tmp_path / "yolo" / "e").mkdir(parents=True)
    good = "0 0.5 0.5 0.4 0.4 0.4 0.4 0.6 0.4 0.5 0.5 0.45 0.6 0.55 0.6\n"
    for name, text in (("c", good), ("e/a", 2 * good), ("e/b", "0 0.5 0.5 0.1 0.2 0.9 1\n")):
        (tmp_path / "yolo" / f"{name}.txt").write_text(text)
    arguments = ["--format", "yolo", tmp_path / "yolo", "--images", photos, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    labels = read_labels(tmp_path / "out" / "label.txt")
    assert labels.names == ["c.jpg", "e/a.jpg"] and labels.has_landmarks.tolist() == [True] * 3


def test_a_line_of_zeros_is_no_fraction(photos, tmp_path, capsys):
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "c.txt").write_text("0 0 0 0 0")
    arguments = ["--format", "yolo", tmp_path / "yolo", "--images", photos, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *arguments)
    assert code == 0 and "has no area" in err


@pytest.mark.parametrize("end", ["", "c.jpg\n1\n5 5 20 20\n"])
def test_wider_image_without_a_number_of_faces_is_not_complete(tmp_path, end):
    (tmp_path / "gt.txt").write_text(f"e/a.jpg\n1\n10 10 30 30\ne/b.jpg\n{end}")
    problems = []
    images = read_wider(tmp_path / "gt.txt", tmp_path, problems)
    assert [i.complete for i in images[:2]] == [True, False] and "expected the number of faces" in problems[0]


def test_one_outline_among_boxes_is_remembered(photos, tmp_path):
    """Fifteen numbers that may be an outline are refused wherever the certain outline stands."""
    (tmp_path / "yolo" / "e").mkdir(parents=True)
    (tmp_path / "yolo" / "c.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.2\n0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "yolo" / "e" / "a.txt").write_text("0 0.5 0.5 0.4 0.4 " + "0.5 0.5 " * 5)
    (tmp_path / "yolo" / "e" / "b.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    images = read_yolo(tmp_path / "yolo", photos, [])
    assert [(i.name, i.complete) for i in images] == [("c.jpg", False), ("e/a.jpg", False), ("e/b.jpg", True)]


def test_landmarks_a_little_outside_their_box_are_landmarks(photos, tmp_path):
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "c.txt").write_text("0 0.5 0.5 0.2 0.2 " + "0.5 0.5 " * 4 + "0.64 0.36")
    problems = []
    (image,) = read_yolo(tmp_path / "yolo", photos, problems)
    assert image.complete and image.faces[0].landmarks[12:14] == pytest.approx([64, 28.8])
    assert not any("outline" in p for p in problems)


@pytest.mark.parametrize("flag, ignored", [(1.0, True), (" Yes ", True), ("TRUE", True), ("2", False), ("?", False)])
def test_flags_are_read_however_they_are_written(photos, tmp_path, capsys, flag, ignored):
    tree = {"images": [{"id": 1, "file_name": "c.jpg"}]}
    tree["annotations"] = [{"image_id": 1, "bbox": [30, 20, 10, 20], "iscrowd": flag}]
    (tmp_path / "coco.json").write_text(json.dumps(tree))
    arguments = ["--format", "coco", tmp_path / "coco.json", "--images", photos, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    assert read_labels(tmp_path / "out" / "label.txt").ignore.tolist() == [ignored]


def test_fractions_of_a_face_beyond_the_border_are_no_pixels(photos):
    with pytest.raises(prepare.LabelError, match="write pixels"):
        prepare.check_images([LabelledImage("c.jpg", photos / "c.jpg", [Face([0.9, 0.2, 0.3, 0.4])])], [])


@pytest.mark.parametrize("other", [{"ignore": True}, {"complete": False}])
def test_of_two_lists_of_a_photo_that_differ_in_more_than_boxes_none_is_taken(photos, other):
    lists = [LabelledImage("c.jpg", photos / "c.jpg", [Face([5.0, 5.0, 20.0, 20.0])]) for _ in range(2)]
    for target in (lists[1], lists[1].faces[0]):
        for key in set(other) & set(vars(target)):
            setattr(target, key, other[key])
    assert prepare.check_images(lists, []) == []


def test_links_lead_to_photos_named_relative_to_the_folder_of_the_call(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "label.txt").write_text("# e/a.jpg\n10 20 30 40\n")
    assert run(capsys, "--format", "retinaface", "label.txt", "--images", "photos", "--out", "deep/out")[0] == 0
    link = tmp_path / "deep" / "out" / "images" / "e" / "a.jpg"
    assert link.is_symlink() and link.read_bytes() == (photos / "e" / "a.jpg").read_bytes()


def test_links_of_an_earlier_run_lead_to_the_new_photos(photos, tmp_path, capsys):
    (tmp_path / "label.txt").write_text("# c.jpg\n")
    shutil.copytree(photos, tmp_path / "others")
    Image.fromarray(paint(*SIZE, [(1, 2, 30, 30)])).save(tmp_path / "others" / "c.jpg")
    for folder in (photos, tmp_path / "others"):
        arguments = ["--format", "retinaface", tmp_path / "label.txt", "--images", folder, "--out", tmp_path / "out"]
        assert run(capsys, *arguments)[0] == 0
        assert (tmp_path / "out" / "images" / "c.jpg").read_bytes() == (folder / "c.jpg").read_bytes()


def test_the_folder_of_the_photos_is_not_the_one_to_make(photos, tmp_path, capsys):
    """Links of the user's in it would be taken for those of an earlier run."""
    mine = tmp_path / "mine" / "images"
    mine.mkdir(parents=True)
    (mine / "c.jpg").symlink_to(photos / "c.jpg")
    (tmp_path / "label.txt").write_text("# c.jpg\n5 5 20 20\n")
    arguments = ["--format", "retinaface", tmp_path / "label.txt", "--images", mine, "--out", tmp_path / "mine"]
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "its images folder is the input" in err and not (tmp_path / "mine" / "label.txt").exists()


def test_a_part_that_leaves_nothing_to_train_on_is_refused(photos, tmp_path, capsys):
    (tmp_path / "label.txt").write_text("# c.jpg\n5 5 20 20\n")
    arguments = ["--format", "retinaface", tmp_path / "label.txt", "--images", photos, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *arguments, "--val-fraction", "0.5")
    assert code == 1 and "leaves none of 1 images to train on" in err and not (tmp_path / "out" / "train").exists()


def test_photos_of_one_size_and_time_are_told_apart(photos, tmp_path, capsys):
    (tmp_path / "label.txt").write_text("# c.jpg\n")
    target = tmp_path / "out" / "images" / "c.jpg"
    target.parent.mkdir(parents=True)
    target.write_bytes(np.arange((photos / "c.jpg").stat().st_size, dtype=np.uint8).tobytes())
    for file in (target, photos / "c.jpg"):
        os.utime(file, (1e9, 1e9))
    arguments = ["--format", "retinaface", tmp_path / "label.txt", "--images", photos, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "is another picture" in err


def test_photos_named_from_the_root_are_refused(photos, tmp_path, capsys):
    """Their links would be put outside the folder to make, in the photos' own places."""
    mine = tmp_path / "link.jpg"
    mine.symlink_to(photos / "c.jpg")
    tree = {"images": [{"id": 1, "file_name": str(mine)}], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(tree))
    arguments = ["--format", "coco", tmp_path / "coco.json", "--images", photos, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "leads out of the image folder" in err and mine.resolve() == (photos / "c.jpg").resolve()


def test_mistakes_and_unusable_input(photos, tmp_path, capsys):
    source = tmp_path / "gt.txt"
    source.write_text("nowhere.jpg\n1\n1 1 5 5 0 0 0 0 0 0\n")
    base = ["--images", photos, "--out", tmp_path / "out"]
    for source_, format_, why in (
        (source, "wider", "no usable image"),
        (tmp_path / "none.txt", "wider", "cannot read the labels"),
        (source, "coco", "not valid JSON"),
        (photos, "voc", "no VOC XML files"),
        (tmp_path / "none", "yolo", "no YOLO txt files"),
    ):
        code, _, err = run(capsys, "--format", format_, source_, *base)
        assert code == 1 and why in err.splitlines()[-1] and "Traceback" not in err
    assert run(capsys, "--format", "wider", source, "--images", tmp_path / "none", "--out", tmp_path / "out")[0] == 1
    for bad in (
        ["--format", "pascal"],
        ["--format", "wider", "--val-fraction", "1"],
        ["--format", "wider", "--classes", "a"],
    ):
        with pytest.raises(SystemExit) as stop:
            prepare.main([*map(str, [*bad, source, *base])])
        assert stop.value.code == 2
    code, _, err = run(capsys, "--format", "wider", source, "--images", photos, "--out", source / "x")
    assert code == 1
    escape = tmp_path / "escape.txt"
    escape.write_text("../gt.jpg\n0\n0 0 0 0 0 0 0 0 0 0\n")
    code, _, err = run(capsys, "--format", "wider", escape, *base)
    assert code == 1 and "leads out of the image folder" in err


def test_photos_that_cannot_be_used_are_named(photos, tmp_path, capsys):
    (photos / "cut.jpg").write_bytes((photos / "e" / "a.jpg").read_bytes()[:-300])  # its header is whole
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in (" lead.jpg", "two\nlines.jpg", "c.png", "turned.tif"):
        Image.fromarray(paint(*SIZE, [])).save(photos / name, **({"exif": exif} if name == "turned.tif" else {}))
    odd = photos.as_posix().encode() + b"/caf\xe9.jpg"
    with open(odd, "wb") as file:
        file.write((photos / "c.jpg").read_bytes())
    names = ["c.jpg", "cut.jpg", " lead.jpg", "two\nlines.jpg", "c.png", "caf\udce9.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    images.append({"id": 7.0, "file_name": ""})
    images.append({"id": 8, "file_name": "e\\b.jpg"})
    images.append({"id": 9, "file_name": "turned.tif", "width": SIZE[1], "height": SIZE[0]})
    source = tmp_path / "coco.json"
    source.write_text(json.dumps({"images": images, "annotations": []}))
    base = ["--format", "coco", source, "--images", photos, "--out", tmp_path / "out"]
    code, result, err = run(capsys, *base)
    assert code == 0 and result["problems"] == 6 and len(err.splitlines()) == 6
    assert read_labels(tmp_path / "out" / "label.txt").names == ["c.jpg", "e/b.jpg", "turned.tif"]
    for words in (
        "cut.jpg: ",
        "'' is no file name",
        "' lead.jpg' begins",
        "holds a line break",
        "suffix alone",
        "is not UTF-8",
    ):
        assert words in err
    source.write_text(json.dumps({"images": images[:1], "annotations": []}))
    assert run(capsys, *base)[0] == 0 and not (tmp_path / "out" / "problems.txt").exists()  # those were of another run


def test_nothing_of_the_users_is_overwritten(photos, tmp_path, capsys):
    source = tmp_path / "my" / "label.txt"
    source.parent.mkdir()
    source.write_text("# c.jpg\n# nowhere.jpg\n")
    code, _, err = run(capsys, "--format", "retinaface", source, "--images", photos, "--out", source.parent)
    assert code == 1 and "would be overwritten" in err and source.read_text() == "# c.jpg\n# nowhere.jpg\n"
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    Image.fromarray(paint(*SIZE, [(1, 2, 30, 30)])).save(out / "images" / "c.jpg")
    before = (out / "images" / "c.jpg").read_bytes()
    code, _, err = run(capsys, "--format", "retinaface", source, "--images", photos, "--out", out)
    assert code == 1 and f"{out / 'images' / 'c.jpg'}: is another picture" in err
    assert (out / "images" / "c.jpg").read_bytes() == before and not (out / "label.txt").exists()


def test_a_full_disk_leaves_no_half_a_file(photos, tmp_path, capsys, fill_disk, monkeypatch):
    (tmp_path / "label.txt").write_text("# c.jpg\n5 5 20 20\n")
    arguments = ["--format", "retinaface", tmp_path / "label.txt", "--images", photos, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    labels, copied = tmp_path / "out" / "label.txt", tmp_path / "copy" / "images"
    before = labels.read_text()

    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    code, _, err = run(capsys, *arguments[:-1], tmp_path / "copy", "--copy")
    assert code == 1 and f"{copied / 'c.jpg'}: No space left" in err and not list(copied.iterdir())
    fill_disk()
    code, _, err = run(capsys, *arguments)
    assert code == 1 and f"{labels}: No space left" in err and labels.read_text() == before


def test_links_become_copies_when_asked(photos, tmp_path, capsys):
    source = tmp_path / "label.txt"
    source.write_text("# c.jpg\n")
    arguments = ["--format", "retinaface", source, "--images", photos, "--out", tmp_path / "out"]
    target = tmp_path / "out" / "images" / "c.jpg"
    for more, link in (([], True), (["--copy"], False), ([], False)):  # a copy stays
        assert run(capsys, *arguments, *more)[0] == 0 and target.is_symlink() == link
        assert target.read_bytes() == (photos / "c.jpg").read_bytes()


def test_prepared_folder_trains(photos, tmp_path, capsys):
    from data.pipeline import build_pipeline

    source = tmp_path / "gt.txt"
    source.write_text(wider(BOXES))
    run(capsys, "--format", "wider", source, "--images", photos, "--out", tmp_path / "out")
    batch = next(iter(build_pipeline(make_config(tmp_path / "out", labels=["label.txt"]), "cpu").batches(0)))
    assert sorted(batch["names"]) == sorted(BOXES) and batch["valid"].any()


def test_visualize_draws_a_grid(tmp_path, capsys):
    make_folder(tmp_path)
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{root: {tmp_path}, select_images: 0}}\ntrain: {{stages: [{{size: 96}}]}}\n")
    out = tmp_path / "grids" / "grid.png"
    assert visualize.main(["--config", str(config), "--out", str(out), "--count", "5"]) == 0
    grid = np.asarray(Image.open(out))
    assert grid.shape == (192, 288, 3) and (grid == visualize.LEARN).all(axis=2).sum() > 50
    assert visualize.main(["--config", "nowhere", "--out", str(out)]) == 2
    assert visualize.main(["--config", str(config), "--out", str(out), "--opts", f"data.root={tmp_path}/none"]) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 2 and "nowhere" in err[0] and "label.txt" in err[1]
