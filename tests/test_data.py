"""Labels, selection, order, cache and the two pipeline paths."""

import argparse
import json
import multiprocessing
import os
import pickle
import re
import shlex
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import benchmark, render
from data import cache as cache_module
from data.augmentations_smart import GEOMETRIC, POLICIES
from data.cache import DecodeStore, build_store
from data.dataset import load_dataset, select_dataset
from data.images import image_size, read_photo
from data.labels import DataError, ImageError, LabelError, merge_machine_labels, read_labels
from data.pipeline import build_pipeline
from data.pixels import apply_operation
from data.samplers import difficulty, epoch_order, event_weights
from data.select import event_of, select_names
from tests.face_data import FACES, line, make_config, make_folder
from utils.config import CONFIG_DIR, Config, ConfigError, add_opts, from_dict, load_config, to_dict

EVERYTHING = {
    "photometric_prob": 0.7,
    "auto_augment_prob": 0.5,
    "mixup_prob": 0.2,
    "cutmix_prob": 0.3,
    "mosaic_prob": 0.3,
    "erase_prob": 0.4,
    "whole_image_prob": 0.2,
}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def all_batches(pipeline, epoch=0, start=0, total=None):
    return list(pipeline.batches(epoch, start, total))


def assert_same(a: dict, b: dict, tolerance: float = 0.0):
    assert a.keys() == b.keys()
    assert a["names"] == b["names"]
    for key in a.keys() - {"names", "images"}:
        assert torch.equal(a[key], b[key]), key
    assert (a["images"] - b["images"]).abs().max() <= tolerance


# ---- labels


def test_labels_are_read_into_arrays(tmp_path):
    file = tmp_path / "label.txt"
    file.write_text(
        f"# e/a.jpg\n{line((10, 20, 30, 40))}\n{line((1, 2, 3, 4), False)}\n# e/b.jpg\n\n# c.jpg\n5 6 7 8\n"
    )
    labels = read_labels(file)
    assert labels.names == ["e/a.jpg", "e/b.jpg", "c.jpg"]
    assert labels.offsets.tolist() == [0, 2, 2, 3]
    assert labels.boxes.tolist() == [[10, 20, 40, 60], [1, 2, 4, 6], [5, 6, 12, 14]]
    assert labels.has_landmarks.tolist() == [True, False, False]
    assert labels.landmarks[0, 0].tolist() == pytest.approx([19, 32])
    assert labels.quality.tolist() == [0.5, 0.5, 0.0]
    assert not labels.problems and len(labels.faces(1)) == 0
    assert labels.take_images([2, 0]).boxes.tolist() == [[5, 6, 12, 14], [10, 20, 40, 60], [1, 2, 4, 6]]


def test_landmarks_just_outside_the_picture_are_kept(tmp_path):
    file = tmp_path / "label.txt"
    file.write_text("# a.jpg\n0 10 20 20 -3 15 0 5 15 0 -1.5 20 0 -2 25 0 4 25 0 0.3\n")
    assert read_labels(file).has_landmarks.tolist() == [True]


def test_quality_may_follow_the_box(tmp_path):
    file = tmp_path / "label.txt"
    file.write_text("# a.jpg\n5 6 7 8 0.25\n")
    labels = read_labels(file, "fail")
    assert labels.quality.tolist() == [0.25] and labels.has_landmarks.tolist() == [False]


def test_one_missing_landmark_means_none(tmp_path):
    file = tmp_path / "label.txt"
    for first in ("-1 -1", "3 -15"):  # no mark of "none", but too far outside to be a point of the face
        file.write_text(f"# a.jpg\n0 10 20 20 {first} -1 5 15 0 1 20 0 2 25 0 4 25 0 0.3\n")
        assert read_labels(file, "fail").has_landmarks.tolist() == [False]


BAD_LINES = [
    ("12 x 3 4", "'x' is not a number; image e/a.jpg is left out", 1),
    ("1 2 3", "3 numbers", 1),
    ("1 2 0 4", "no area", 2),
    ("1 2 -5 4", "corners exchanged", 1),
    ("1 nan 3 4", "not finite", 1),
    ("# e/a.jpg\n9 9 9 9", "already listed in line 1 and is left out", 1),
    ("#", "without an image name", 2),
]


@pytest.mark.parametrize(("text", "why", "images"), BAD_LINES)
def test_bad_lines_are_named_and_skipped_or_refused(tmp_path, text, why, images):
    """With the image, where a face is lost: it would count as background."""
    file = tmp_path / "label.txt"
    file.write_text(f"# e/a.jpg\n1 2 3 4\n{text}\n# e/b.jpg\n5 6 7 8\n")
    labels = read_labels(file)
    assert labels.names == ["e/a.jpg", "e/b.jpg"][-images:] and len(labels.boxes) == images
    assert len(labels.problems) == 1 and f"{file}:3: " in labels.problems[0] and why in labels.problems[0]
    with pytest.raises(LabelError, match=r"label\.txt:3: "):
        read_labels(file, "fail")


def test_labels_without_a_whole_image_are_refused(tmp_path):
    file = tmp_path / "label.txt"
    file.write_text("# e/a.jpg\n1 2 x 4\n")
    with pytest.raises(LabelError, match=r"every image has a line that cannot be read; the first: .*label\.txt:2: "):
        read_labels(file)


def test_faces_without_an_image_of_their_own_are_no_other_images(tmp_path):
    file = tmp_path / "label.txt"
    file.write_text("1 1 5 5\n# a.jpg\n1 2 3 4\n# b.jpg\n5 6 7 8\n# a.jpg\n9 9 3 3\n")
    labels = read_labels(file)
    assert labels.names == ["b.jpg"] and labels.boxes.tolist() == [[5, 6, 12, 14]]
    assert [p.startswith(f"{file}:{n}: ") for p, n in zip(labels.problems, (1, 6), strict=True)] == [True, True]
    with pytest.raises(LabelError, match=r"label\.txt:1: "):
        read_labels(file, "fail")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\x01", b"hello\n"])
def test_unusable_label_files_give_one_line(tmp_path, content):
    file = tmp_path / "label.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LabelError) as error:
        read_labels(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_boxes_outside_the_image_are_clipped_or_reported(folder, caplog):
    file = folder / "train" / "label.txt"
    text = file.read_text().replace(
        "# 1--Street/d.png", "# 1--Street/d.png\n170 170 40 40\n500 500 20 20\n-5 20 300 30"
    )
    file.write_text(text)
    data = load_dataset(make_config(folder).data)
    faces = data.labels.faces(data.names.index("train/1--Street/d.png"))
    assert faces.boxes.tolist() == [[170, 170, 180, 180], [0, 20, 180, 50]]
    number = text.splitlines().index("500 500 20 20") + 1
    assert f"label line {number}" in caplog.text and "180x180" in caplog.text and "d.png" in caplog.text
    with pytest.raises(LabelError, match="outside the 180x180 image"):
        load_dataset(make_config(folder, on_bad_label="fail").data)


def test_machine_labels_fill_landmarks_and_add_only_ignored_faces(folder):
    make_folder(folder, landmarks=False)
    x, y, w, h = FACES["0--Park/b.jpg"][2][0]
    machine = line((x + 2, y - 1, w, h)).split()
    points = " ".join(v for i, v in enumerate(machine[4:19]) if i % 3 != 2)
    (folder / "machine.txt").write_text(
        f"# train/0--Park/b.jpg\n{x + 2} {y - 1} {w} {h} {points} 0.9\n"
        f"5 5 20 20 {points} 0.8\n5 200 20 20 {points} 0.4\n"
    )
    plain = load_dataset(make_config(folder).data)
    data = load_dataset(make_config(folder, machine_labels="machine.txt", machine_ignore=0.6).data)
    faces = data.labels.faces(data.names.index("train/0--Park/b.jpg"))
    assert faces.boxes.tolist() == [[x, y, x + w, y + h], [5, 5, 25, 25]]
    assert faces.ignore.tolist() == [False, True] and faces.has_landmarks.tolist() == [True, False]
    assert (~data.labels.ignore).sum() == len(plain.labels.boxes)
    labels, filled, added = merge_machine_labels(plain.labels, read_labels(folder / "machine.txt"))
    assert (filled, added, len(labels.boxes)) == (1, 0, len(plain.labels.boxes))


def test_small_faces_stay_and_bad_lines_stop_where_asked(folder):
    file = folder / "train" / "label.txt"
    file.write_text(file.read_text().replace("# 1--Street/d.png", "# 1--Street/d.png\n20 20 0.5 0.5\n1 2 0 4"))
    data = load_dataset(make_config(folder).data)
    assert data.labels.faces(data.names.index("train/1--Street/d.png")).boxes.tolist() == [[20, 20, 20.5, 20.5]]
    with pytest.raises(LabelError, match=r"label\.txt:\d+: box of size 0 x 4"):
        load_dataset(make_config(folder, on_bad_label="fail").data)


def test_an_image_listed_twice_is_refused(folder):
    (folder / "train" / "more.txt").write_text("# 0--Park/a.png\n1 2 30 40\n")
    with pytest.raises(LabelError, match=r"more\.txt: the same image"):
        load_dataset(make_config(folder, labels=["train/label.txt", "train/more.txt"]).data)


def test_folders_with_equal_names_are_other_photos(tmp_path):
    for camera in ("one", "two"):
        make_folder(tmp_path / camera)
    labels = ["one/train/label.txt", "two/train/label.txt"]
    data = make_config(tmp_path, labels=labels, select_labels=labels[0], select_images=2).data
    assert len(load_dataset(data)) == 2 * len(FACES) - 2 and len(select_dataset(data)) == 2
    assert {name.split("/")[0] for name in select_dataset(data).names} == {"one"}
    data.labels = [str(tmp_path / labels[0]), labels[1]]
    assert len(load_dataset(data)) == 2 * len(FACES) - 2


def test_sizes_from_headers_are_those_of_the_upright_pictures(tmp_path):
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        for suffix in ("jpg", "png", "tif"):
            path = tmp_path / f"{turn}.{suffix}"
            Image.new("RGB", (30, 20)).save(path, exif=exif)
            assert image_size(path) == read_photo(path).shape[1::-1] == ((30, 20) if turn < 5 else (20, 30)), path
    Image.new("RGB", (30, 20)).save(path := tmp_path / "broken.png", exif=b"Exif\0\0no tiff header")
    assert image_size(path) == read_photo(path).shape[1::-1] == (30, 20)


def test_machine_labels_replace_nothing_they_do_not_match(tmp_path):
    """Not landmarks set by hand, boxes that lie beside theirs, or those of folders that are not to be tightened."""
    a, b, near = (10, 10, 40, 40), (100, 10, 40, 40), (12, 10, 40, 40)
    beside, within, new = (120.8, 10, 40, 40), (20, 20, 10, 10), (200, 200, 20, 20)  # IoU 0.32 and 0.06
    (tmp_path / "mine.txt").write_text(
        "\n".join(["# tight/1.jpg", line(a), line(b, False), "# loose/1.jpg", line(a, False), line(b, False), ""])
    )
    found = [line(box).rpartition(" ")[0] + " 0.9" for box in (near, beside, within, new)]
    (tmp_path / "machine.txt").write_text("\n".join(["# tight/1.jpg", *found, "# loose/1.jpg", *found, ""]))
    mine, machine = (read_labels(tmp_path / f"{name}.txt", "fail") for name in ("mine", "machine"))
    labels, filled, added = merge_machine_labels(mine, machine, 0.6, ["loose"])
    assert (filled, added) == (1, 2)
    tight, loose = labels.faces(0), labels.faces(1)
    assert [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in tight.boxes.tolist()] == [[*a], [*b], [*new]]
    assert [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in loose.boxes.tolist()] == [[*near], [*b], [*new]]
    for faces, points in ((tight, mine.landmarks[0]), (loose, machine.landmarks[0])):
        assert faces.has_landmarks.tolist() == [True, False, False] and faces.ignore.tolist() == [False, False, True]
        assert (faces.landmarks[0] == points).all()


def test_every_image_stays_when_the_last_ones_lose_their_faces(tmp_path):
    (tmp_path / "label.txt").write_text("# a.jpg\n1 2 30 40\n# b.jpg\n1 2 30 40\n# c.jpg\n")
    left = read_labels(tmp_path / "label.txt").take_faces(np.array([True, False]))
    assert left.offsets.tolist() == [0, 1, 1, 1]


def test_loose_boxes_are_tightened_in_training_and_nothing_is_changed_for_validation(folder):
    make_folder(folder, landmarks=False)
    x, y, w, h = FACES["0--Park/b.jpg"][2][0]
    (folder / "machine.txt").write_text(f"# train/0--Park/b.jpg\n{line((x + 4, y, w, h))}\n{line((5, 5, 20, 20))}\n")
    options = {"machine_labels": "machine.txt", "machine_ignore": 0.4, "machine_boxes": ["train"]}
    data = load_dataset(make_config(folder, **options).data)
    faces = data.labels.faces(data.names.index("train/0--Park/b.jpg"))
    assert faces.boxes.tolist() == [[x + 4, y, x + w + 4, y + h], [5, 5, 25, 25]]
    held = select_dataset(make_config(folder, val_labels="train/label.txt", **options).data)
    faces = held.labels.faces(held.names.index("train/0--Park/b.jpg"))
    assert faces.boxes.tolist() == [[x, y, x + w, y + h]] and not faces.has_landmarks.any()


# ---- selection and order


def test_select_is_stratified_and_independent_of_order():
    names = [f"{event}/{i}.jpg" for event, n in (("a", 100), ("b", 40), ("c", 10)) for i in range(n)]
    chosen = select_names(names, 30)
    assert chosen == select_names(names[::-1], 30)
    assert {e: sum(event_of(n) == e for n in chosen) for e in "abc"} == {"a": 20, "b": 8, "c": 2}
    assert chosen != select_names(names, 30, seed=1)
    assert len(select_names(names, 31)) == 31 and select_names(names, 0) == set()
    assert select_names(names, 999) == set(names)


def test_held_out_images_are_never_trained_on(folder):
    cfg = make_config(folder, select_images=2)
    held, trained = select_dataset(cfg.data), load_dataset(cfg.data)
    assert len(held) == 2 and not set(held.names) & set(trained.names)
    assert len(held) + len(trained) == len(FACES)
    assert all(p.is_file() for p in held.paths)
    with pytest.raises(DataError, match="nothing is left to train on"):
        load_dataset(make_config(folder, select_images=99).data)
    with pytest.raises(DataError, match="nothing to validate on"):
        select_dataset(make_config(folder).data)
    other = select_dataset(make_config(folder, val_labels="train/label.txt").data)
    assert len(other) == len(FACES)


def test_images_that_cannot_be_read_are_not_validated_on(folder):
    (folder / "train" / "images" / "0--Park" / "b.jpg").write_text("no picture")
    held = select_dataset(make_config(folder, val_labels="train/label.txt").data)
    assert len(held) == len(FACES) - 1 and "train/0--Park/b.jpg" not in held.names and held.sizes.all()


def test_train_select_of_the_shared_set_is_fixed(shared):
    """Every AP on train_select that was ever compared rests on these names: they must not change."""
    file = load_config("v2_ultra").data
    path = os.path.join(file.root, "train/label.txt")
    if not os.path.exists(path):
        pytest.skip("the shared photos are not unpacked")
    with open(path) as f:
        names = [row[2:].strip() for row in f if row.startswith("#")]
    chosen = sorted(select_names(names, 300))
    assert len(chosen) == 300 and len({event_of(n) for n in chosen}) == 9


def test_order_is_a_permutation_of_seed_and_epoch():
    a = epoch_order(50, 50, seed=1, epoch=3)
    assert sorted(a) == list(range(50))
    assert (a == epoch_order(50, 50, 1, 3)).all()
    assert (a != epoch_order(50, 50, 1, 4)).any() and (a != epoch_order(50, 50, 2, 3)).any()
    assert np.bincount(epoch_order(4, 10, 0, 0)).tolist() in [list(c) for c in _counts_of_ten()]


def _counts_of_ten():
    return {tuple(2 + (i in pair) for i in range(4)) for pair in [(a, b) for a in range(4) for b in range(a)]}


def test_curriculum_goes_from_easy_to_all(folder):
    data = load_dataset(make_config(folder).data)
    hardness = difficulty(data.labels, data.sizes)
    by_name = dict(zip(data.names, hardness))
    assert by_name["train/0--Park/b.jpg"] < by_name["train/1--Street/c.png"] == hardness.max()
    first = epoch_order(6, 600, 0, 0, hardness=hardness, progress=0.0)
    assert set(first) == set(np.argsort(hardness)[:2])
    assert set(epoch_order(6, 600, 0, 0, hardness=hardness, progress=0.34)) == set(range(6))
    assert len(set(epoch_order(100, 100, 0, 0, hardness=np.arange(100), progress=1 / 6))) == 65  # halfway from 30


@pytest.mark.parametrize("curriculum", [True, False])
def test_what_is_mixed_in_is_named_and_as_easy_as_the_rest(folder, curriculum):
    """Early in training only the two easiest of the six photos are shown, as partners of a mosaic too."""
    cfg = make_config(folder, {"mosaic_prob": 1.0}, curriculum=curriculum)
    names = [
        n.split(" + ")
        for epoch in range(3)
        for b in all_batches(build_pipeline(cfg, "cpu"), epoch, total=1000)
        for n in b["names"]
    ]
    assert {len(n) for n in names} == {4}
    assert len({n for four in names for n in four}) == (2 if curriculum else 6)


@pytest.mark.parametrize(
    ("easy", "hard"),
    [([(60, 0.5)], [(20, 0.5)]), ([(20, 0.5)], [(20, 0.5), (20, 0.5)]), ([(20, 0.8)], [(20, 0.2)])],
    ids=["small", "many", "poor"],
)
def test_small_many_and_poor_faces_are_hard(tmp_path, easy, hard):
    rows = [
        f"# {n}.jpg\n" + "".join(f"5 5 {s} {s} {'-1 ' * 15}{q}\n" for s, q in f) for n, f in enumerate((hard, easy))
    ]
    (tmp_path / "label.txt").write_text("".join(rows))
    labels = read_labels(tmp_path / "label.txt")
    assert difficulty(labels, np.full((2, 2), 200)).tolist() == [1, 0]


def test_a_face_is_small_beside_its_picture(tmp_path):
    (tmp_path / "label.txt").write_text("# a.jpg\n5 5 50 50\n# b.jpg\n5 5 40 40\n")
    labels = read_labels(tmp_path / "label.txt")
    assert difficulty(labels, np.array([[1000, 1000], [200, 200]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("easy", "hard"),
    [
        ([(60, 0.2)], [(20, 0.8)]),
        ([(40, 0.5)] * 3, [(60, 0.5), (20, 0.5), (20, 0.5)]),
        ([(40, 0.8), (40, 0)], [(40, 0.6), (40, 0.6)]),
        ([(40, 0)], [(40, 0.2)]),
    ],
    ids=[
        "size weighs more than quality",
        "most are small",
        "unknown quality is no poor one",
        "nothing known is middling",
    ],
)
def test_what_makes_a_photo_harder_than_another(tmp_path, easy, hard):
    rows = [
        f"# {n}.jpg\n" + "".join(f"5 5 {s} {s} {'-1 ' * 15}{q}\n" for s, q in f) for n, f in enumerate((hard, easy))
    ]
    (tmp_path / "label.txt").write_text("".join(rows))
    assert difficulty(read_labels(tmp_path / "label.txt"), np.full((2, 2), 200)).tolist() == [1, 0]


def test_every_pass_of_an_epoch_has_an_order_of_its_own():
    order = epoch_order(50, 100, 0, 0)
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50)) and (order[:50] != order[50:]).any()


def test_balanced_events_lift_rare_ones():
    names = [f"train/big/{i}" for i in range(90)] + [f"train/small/{i}" for i in range(10)]
    weights = event_weights(names)
    assert weights.sum() == pytest.approx(1) and weights[90:].sum() == pytest.approx(0.25)
    assert event_weights(["a/e/1", "b/e/1", "b/f/1"]).tolist() == pytest.approx([1 / 3] * 3)  # another folder's
    drawn = epoch_order(100, 4000, 0, 0, weights=weights)
    assert (drawn >= 90).mean() == pytest.approx(0.25, abs=0.03)


# ---- pipeline


def test_batch_holds_what_the_contract_says(folder):
    pipeline = build_pipeline(make_config(folder), "cpu")
    (batch, _) = all_batches(pipeline)
    m = batch["boxes"].shape[1]
    shapes = {
        "images": (3, 3, 64, 64),
        "boxes": (3, m, 4),
        "landmarks": (3, m, 5, 2),
        "has_landmarks": (3, m),
        "valid": (3, m),
        "ignore": (3, m),
        "index": (3,),
        "transform": (3, 6),
    }
    assert {k: tuple(v.shape) for k, v in batch.items() if k != "names"} == shapes
    assert batch["images"].dtype == torch.float32 and batch["index"].dtype == torch.int64
    assert batch["valid"].dtype == batch["ignore"].dtype == batch["has_landmarks"].dtype == torch.bool
    assert [pipeline.dataset.names[i] for i in batch["index"]] == batch["names"]
    real = batch["valid"] | batch["ignore"]
    assert not (batch["valid"] & batch["ignore"]).any() and not batch["boxes"][~real].any()
    assert ((batch["boxes"][real] >= 0) & (batch["boxes"][real] <= 64)).all()
    assert (batch["boxes"][real][:, 2:] > batch["boxes"][real][:, :2]).all()
    assert not (batch["has_landmarks"] & ~batch["valid"]).any()


def test_ignored_faces_have_no_landmarks_to_learn(folder):
    batches = all_batches(build_pipeline(make_config(folder, {"min_face": 40.0}), "cpu"))
    assert any(batch["ignore"].any() for batch in batches)
    assert not any((batch["has_landmarks"] & batch["ignore"]).any() for batch in batches)


@pytest.mark.parametrize("path", ["loader", "device"])
def test_resume_continues_an_epoch_exactly(folder, path):
    cfg = make_config(folder, EVERYTHING, {"stages": [{"size": 64, "batch_size": 1}]}, pipeline=path)
    pipeline = build_pipeline(cfg, "cpu")
    whole = all_batches(pipeline, epoch=2)
    rest = all_batches(build_pipeline(cfg, "cpu"), epoch=2, start=4)
    assert len(whole) == 6 and len(rest) == 2
    for a, b in zip(whole[4:], rest):
        assert_same(a, b)
    other = all_batches(pipeline, epoch=3)
    assert [b["names"] for b in other] != [b["names"] for b in whole]


def test_loader_and_device_path_give_the_same_batches(folder):
    options = {"cache_side": 200, "curriculum": True}
    train = {"multiscale": [1.0, 1.5], "stages": [{"size": 64, "batch_size": 2}]}
    by_loader = build_pipeline(make_config(folder, EVERYTHING, train, **{**options, "workers": 1}), "cpu")
    by_device = build_pipeline(make_config(folder, EVERYTHING, train, pipeline="device", **options), "cpu")
    sizes = set()
    for epoch in (0, 5):
        for a, b in zip(by_loader.batches(epoch), by_device.batches(epoch), strict=True):
            assert_same(a, b, tolerance=1e-3)
            sizes.add(a["images"].shape[-1])
    assert sizes == {64, 96}


def test_squares_drawn_at_once_are_those_drawn_one_by_one(folder, monkeypatch):
    monkeypatch.setattr(render, "DRAWN_AT_ONCE", 5)  # fewer than are drawn: several turns
    cfg = make_config(folder, {**EVERYTHING, "crop_scales": [0.3, 0.7, 1.0, 2.0]}, pipeline="device")
    pipeline = build_pipeline(cfg, "cpu")
    draws = (render._draw_at_once, render._draw_one_by_one)
    kinds = set()
    for epoch in range(4):
        plan = pipeline.planner.plan(epoch, np.arange(6), np.arange(6), 96)
        together, apart = (draw(plan, pipeline.pixels, torch.device("cpu")) for draw in draws)
        for sample, a, b in zip(plan.samples, together, apart):
            kinds.add((sample.crop.flip, sample.crop.placed(96) == (0, 0, 96, 96), sample.warp is None))
            # A grey level, spread by contrast; operations with steps in them (posterize, solarize) make more of it.
            far = (a - b).abs() > 2.5
            assert far.float().mean() < 0.02 and (sample.operations or not far.any())
    assert len(kinds) >= 6


def test_repeated_passes_make_a_longer_epoch(folder):
    stage = {"stages": [{"size": 64, "batch_size": 2}]}
    once, thrice = (build_pipeline(make_config(folder, train=stage, repeat=n), "cpu") for n in (1, 3))
    assert (once.steps_per_epoch, thrice.steps_per_epoch) == (3, 9)
    seen = Counter(name for batch in all_batches(thrice) for name in batch["names"])
    assert seen == Counter(dict.fromkeys((f"train/{name}" for name in FACES), 3))


def test_the_curriculum_begins_with_the_easy_images(folder):
    plain, gradual = (build_pipeline(make_config(folder, curriculum=on), "cpu") for on in (False, True))
    hardness = difficulty(plain.dataset.labels, plain.dataset.sizes)
    easiest = {plain.dataset.names[i] for i in hardness.argsort()[:2]}
    seen = [
        {n for b in all_batches(p, epoch) for n in b["names"]} for p, epoch in ((gradual, 0), (gradual, 4), (plain, 0))
    ]
    assert seen == [easiest, set(plain.dataset.names), set(plain.dataset.names)]


def test_balanced_events_come_more_evenly_than_their_images(tmp_path):
    pictures = {f"{e}/{i}.png": (64, 64, []) for e, n in (("0--Big", 8), ("1--Rare", 1)) for i in range(n)}
    folder, shares = make_folder(tmp_path, pictures), []
    for on in (False, True):
        pipeline = build_pipeline(make_config(folder, repeat=20, balanced_events=on), "cpu")
        shares.append(np.mean(["Rare" in name for batch in all_batches(pipeline) for name in batch["names"]]))
    assert shares == [pytest.approx(1 / 9), pytest.approx(1 / (1 + 8**0.5), abs=0.05)]


def test_plans_travel_without_faces(folder):
    pipeline = build_pipeline(make_config(folder, EVERYTHING, pipeline="device"), "cpu")
    plan = pipeline.planner.plan(0, np.arange(4), np.arange(4), 64)
    copy = pickle.loads(pickle.dumps(plan))
    assert all(s.faces is None and s.moved is None for s in copy.samples) and plan.samples[0].faces is not None
    a, b = (render.render_batch(p, pipeline.pixels, torch.device("cpu")) for p in (plan, copy))
    assert_same(a, b)


def test_ranks_share_an_epoch_without_overlap(folder):
    cfg = make_config(folder, train={"stages": [{"size": 64, "batch_size": 1}]})
    parts = [all_batches(build_pipeline(cfg, "cpu", rank, 2)) for rank in (0, 1)]
    assert [len(p) for p in parts] == [3, 3]
    names = [n for p in parts for b in p for n in b["names"]]
    assert sorted(names) == sorted(f"train/{n}" for n in FACES)


def test_an_epoch_draws_nothing_from_the_global_generator(folder):
    """Else a resumed run, which starts an epoch twice, would go on with other numbers."""
    pipeline, state = build_pipeline(make_config(folder, EVERYTHING), "cpu"), torch.get_rng_state()
    all_batches(pipeline)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_cuts_other_crops(folder):
    crops = []
    for seed in (1, 1, 2):
        planner = build_pipeline(make_config(folder, train={"seed": seed}), "cpu").planner
        crops.append([s.crop for s in planner.plan(0, np.arange(4), np.arange(4), 64).samples])
    assert crops[0] == crops[1] != crops[2]


def test_stage_changes_size_and_batch(folder):
    pipeline = build_pipeline(make_config(folder), "cpu")
    pipeline.set_stage(96, 2)
    assert pipeline.steps_per_epoch == 3
    assert next(iter(pipeline.batches(0)))["images"].shape == (2, 3, 96, 96)
    pipeline.set_stage(64, 8)  # more than there are images: some come twice
    (batch,) = all_batches(pipeline)
    assert len(batch["names"]) == 8


def test_the_size_changes_from_step_to_step_and_is_that_of_every_rank(folder):
    stages = [{"size": 64, "batch_size": 1}]
    cfg = make_config(folder, train={"multiscale": [0.5, 1.0, 1.7], "stages": stages}, repeat=4)
    first, second = (
        [b["images"].shape[-1] for b in all_batches(build_pipeline(cfg, "cpu", rank, 2))] for rank in (0, 1)
    )
    assert first == second and set(first) == {64, 96}  # multiples of 32, at least 64


def test_images_without_faces_or_landmarks(tmp_path):
    empty = make_folder(tmp_path / "empty", {"e/a.png": (90, 80, []), "e/b.png": (64, 200, [])})
    for augment in ({}, EVERYTHING):
        for batch in build_pipeline(make_config(empty, augment), "cpu").batches(0):
            assert batch["boxes"].shape[1] == 0 and batch["images"].isfinite().all()
    bare = make_folder(tmp_path / "bare", landmarks=False)
    for batch in build_pipeline(make_config(bare, EVERYTHING), "cpu").batches(0):
        assert batch["valid"].any() and not batch["has_landmarks"].any() and not batch["landmarks"].any()


def test_thousands_of_faces_in_one_image(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 180, (3000, 2))
    crowd = make_folder(tmp_path, {"e/a.png": (200, 200, []), "e/b.png": (200, 200, [])})
    rows = "\n".join(f"{x} {y} 12 12" for x, y in corners)
    (crowd / "train" / "label.txt").write_text(f"# e/a.png\n{rows}\n# e/b.png\n")
    cfg = make_config(crowd, {**EVERYTHING, "crop_scales": [1.0]}, {"stages": [{"size": 64, "batch_size": 2}]})
    start = time.perf_counter()
    batch = next(iter(build_pipeline(cfg, "cpu").batches(0)))
    assert batch["boxes"].shape[1] >= 1000 and batch["boxes"].isfinite().all()
    assert time.perf_counter() - start < 5


def test_extreme_image_shapes(tmp_path):
    shapes = {"e/a.png": (1, 1, []), "e/b.png": (600, 3, []), "e/c.png": (2, 500, [])}
    for augment in ({}, {"whole_image_prob": 1.0}):
        for batch in build_pipeline(make_config(make_folder(tmp_path, shapes), augment), "cpu").batches(0):
            assert batch["images"].shape == (3, 3, 64, 64) and batch["images"].isfinite().all()


# ---- broken images


def corrupt(folder):
    broken = folder / "train" / "images" / "0--Park" / "b.jpg"
    broken.write_bytes(broken.read_bytes()[:-60])  # the header is fine
    missing = folder / "train" / "images" / "2--Hall" / "f.png"
    missing.unlink()
    return broken, missing


@pytest.mark.parametrize("path", ["loader", "device"])
def test_broken_images_are_named_and_replaced_or_refused(folder, path, caplog):
    broken, missing = corrupt(folder)
    cfg = make_config(folder, pipeline=path)
    names = [n for b in build_pipeline(cfg, "cpu").batches(0) for n in b["names"]]
    assert len(names) == 6 and not {"train/0--Park/b.jpg", "train/2--Hall/f.png"} & set(names)
    assert str(broken) in caplog.text and str(missing) in caplog.text
    cfg.data.on_bad_image = "fail"
    with pytest.raises(ImageError, match=r"f\.png: cannot read the image"):
        build_pipeline(cfg, "cpu")
    make_folder(folder)  # mends both
    broken.write_bytes(broken.read_bytes()[:-60])
    with pytest.raises(ImageError, match=r"b\.jpg: ") as error:
        all_batches(build_pipeline(cfg, "cpu"))
    assert "\n" not in str(error.value)


def test_paths_agree_on_broken_images(folder):
    corrupt(folder)
    loader = all_batches(build_pipeline(make_config(folder, EVERYTHING), "cpu"))
    device = all_batches(build_pipeline(make_config(folder, EVERYTHING, pipeline="device"), "cpu"))
    for a, b in zip(loader, device, strict=True):
        assert_same(a, b, tolerance=1e-3)


def test_error_in_a_worker_is_one_line(folder):
    corrupt(folder)[1].write_bytes(b"")
    make_folder(folder)
    broken = folder / "train" / "images" / "0--Park" / "b.jpg"
    broken.write_bytes(broken.read_bytes()[:-60])
    with pytest.raises(ImageError) as error:
        all_batches(build_pipeline(make_config(folder, workers=1, on_bad_image="fail"), "cpu"))
    assert str(broken) in str(error.value) and "\n" not in str(error.value)


def test_ctrl_c_does_not_reach_the_workers(folder):
    cfg = make_config(folder, train={"stages": [{"size": 64, "batch_size": 1}]}, workers=1)
    batches = build_pipeline(cfg, "cpu").batches(0)
    next(batches)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    assert len(list(batches)) == 5


def test_an_epoch_left_early_leaves_no_thread(folder):
    stages = [{"size": 64, "batch_size": 1}]
    batches = build_pipeline(make_config(folder, train={"stages": stages}, repeat=9, pipeline="device"), "cpu").batches(
        0
    )
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "batches"]


def test_no_readable_image_at_all(tmp_path):
    make_folder(tmp_path, {"e/a.png": (90, 80, [])})
    (tmp_path / "train" / "images" / "e" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 1 images"):
        build_pipeline(make_config(tmp_path), "cpu")


# ---- cache


def full(*_):
    raise OSError(28, "No space left on device")


def test_cache_is_reused_and_rebuilt_when_stale(folder, tmp_path):
    file = tmp_path / "cache.bin"
    cfg = make_config(folder, pipeline="device", cache=str(file))
    plain = all_batches(build_pipeline(make_config(folder, pipeline="device"), "cpu"))
    first = build_pipeline(cfg, "cpu")
    stamp = file.stat().st_mtime_ns
    for a, b in zip(plain, all_batches(first), strict=True):
        assert_same(a, b)
    assert file.stat().st_size == sum(w * h * 3 for w, h, _ in FACES.values())
    build_pipeline(cfg, "cpu")
    assert file.stat().st_mtime_ns == stamp
    image = folder / "train" / "images" / "0--Park" / "a.png"
    image.write_bytes(image.read_bytes() + b"\0")
    build_pipeline(cfg, "cpu")
    assert file.stat().st_mtime_ns != stamp
    (tmp_path / "cache.bin.json").write_text("{ not json")
    build_pipeline(cfg, "cpu")
    assert {f.suffix for f in tmp_path.glob("cache*")} == {".bin", ".json", ".lock"}


def test_a_cache_notices_a_photo_changed_in_place_and_its_own_loss(folder, tmp_path):
    data, file = load_dataset(make_config(folder).data), tmp_path / "cache.bin"
    photo = data.paths[0]
    Image.new("RGB", (320, 240), (9, 9, 9)).save(photo, "BMP")
    assert (build_store(data.paths, data.stored, 1024, file).get(0) == 9).all()
    size, stamp = photo.stat().st_size, photo.stat().st_mtime_ns
    Image.new("RGB", (320, 240), (7, 7, 7)).save(photo, "BMP")
    os.utime(photo, ns=(stamp + 10**9, stamp + 10**9))
    assert photo.stat().st_size == size and (build_store(data.paths, data.stored, 1024, file).get(0) == 7).all()
    file.write_bytes(file.read_bytes()[:1000])
    assert (build_store(data.paths, data.stored, 1024, file).get(0) == 7).all()


def test_a_cache_notices_a_photo_of_another_length_and_the_same_time(folder, tmp_path):
    """As cp -p leaves it."""
    data, file = load_dataset(make_config(folder).data), tmp_path / "cache.bin"
    photo = data.paths[0]
    stamp = photo.stat().st_mtime_ns
    build_store(data.paths, data.stored, 1024, file)
    Image.new("RGB", (320, 240), (7, 7, 7)).save(photo, "BMP")
    os.utime(photo, ns=(stamp, stamp))
    assert (build_store(data.paths, data.stored, 1024, file).get(0) == 7).all()


def test_a_cache_remembers_what_was_unreadable(folder, tmp_path):
    data, file = load_dataset(make_config(folder).data), tmp_path / "cache.bin"
    data.paths[1].write_bytes(data.paths[1].read_bytes()[:-60])
    data.stored[2, 0] += 1
    first, again = (build_store(data.paths, data.stored, 1024, file) for _ in range(2))
    for store in (first, again):
        assert [bool(store.check(i)) for i in range(6)] == [False, True, True, False, False, False]
        assert str(data.paths[1]) in store.check(1) and "its size differs" in store.check(2)


def test_a_file_that_is_no_cache_is_never_overwritten(folder, tmp_path):
    data, file = load_dataset(make_config(folder).data), tmp_path / "notes.txt"
    file.write_text("the only copy")
    with pytest.raises(DataError, match=r"notes\.txt: exists and is no image cache"):
        build_store(data.paths, data.stored, 1024, file)
    assert file.read_text() == "the only copy"
    file.write_text("")  # as of tempfile
    assert build_store(data.paths, data.stored, 1024, file).get(0).shape == (240, 320, 3)


def test_a_cache_whose_index_found_no_room_is_built_anew(folder, tmp_path, monkeypatch):
    data, file = load_dataset(make_config(folder).data), tmp_path / "cache.bin"

    with monkeypatch.context() as patched, pytest.raises(DataError, match="No space left"):
        patched.setattr(cache_module.json, "dumps", full)
        build_store(data.paths, data.stored, 1024, file)
    assert build_store(data.paths, data.stored, 1024, file).get(0).shape == (240, 320, 3)


def test_a_cache_too_large_for_its_disk_leaves_the_old_one(folder, tmp_path, monkeypatch):
    data, file = load_dataset(make_config(folder).data), tmp_path / "cache.bin"
    build_store(data.paths, data.stored, 1024, file)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=-(10**9)))
    with pytest.raises(DataError, match="are free"):
        build_store(data.paths[:2], data.stored[:2], 1024, file)
    build_store(data.paths, data.stored, 1024, file)  # nothing to build


def test_a_cache_that_is_in_place_of_an_older_one_needs_no_more_room(folder, tmp_path, monkeypatch):
    data, file = load_dataset(make_config(folder).data), tmp_path / "cache.bin"
    build_store(data.paths, data.stored, 1024, file)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    os.utime(data.paths[0], ns=(1, 1))
    assert build_store(data.paths, data.stored, 1024, file).get(0).shape == (240, 320, 3)


def test_a_cache_cut_off_before_its_last_step_is_never_taken_for_the_new_one(folder, tmp_path, monkeypatch):
    """The index of the new photos must not stand beside the pixels of the old ones."""
    data, file = load_dataset(make_config(folder).data), tmp_path / "cache.bin"
    build_store(data.paths, data.stored, 1024, file)
    Image.new("RGB", (320, 240), (7, 7, 7)).save(data.paths[0], "PNG")
    replace_file = os.replace

    def cut_off(source, target):
        if os.fspath(target) == os.fspath(file):
            full()
        replace_file(source, target)

    with monkeypatch.context() as patched, pytest.raises(DataError, match="No space left"):
        patched.setattr(os, "replace", cut_off)
        build_store(data.paths, data.stored, 1024, file)
    assert (build_store(data.paths, data.stored, 1024, file).get(0) == 7).all()


def test_several_processes_build_a_cache_once(folder, tmp_path, monkeypatch):
    data, file, builds = load_dataset(make_config(folder).data), tmp_path / "cache.bin", []
    build = cache_module._build_file

    def slowly(*arguments):
        builds.append(1)
        time.sleep(0.3)
        return build(*arguments)

    monkeypatch.setattr(cache_module, "_build_file", slowly)
    both = [threading.Thread(target=build_store, args=(data.paths, data.stored, 1024, file)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(builds) == 1


def test_a_cache_is_whole_though_the_system_writes_in_pieces(folder, tmp_path, monkeypatch):
    data, write = load_dataset(make_config(folder).data), os.pwrite
    wanted = build_store(data.paths, data.stored, 1024)
    monkeypatch.setattr(os, "pwrite", lambda file, view, start: write(file, view[:50_000], start))
    got = build_store(data.paths, data.stored, 1024, tmp_path / "cache.bin")
    assert all(torch.equal(got.get(i), wanted.get(i)) for i in range(6))


def test_a_cache_too_large_for_its_disk_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DataError, match=r"^\S*cache\.bin: the image cache needs .* GB are free$"):
        build_pipeline(make_config(folder, cache=str(tmp_path / "cache.bin")), "cpu")
    assert not (tmp_path / "cache.bin").exists()


def test_decoded_photos_are_held_until_their_batch_is_done(folder):
    data = load_dataset(make_config(folder).data)
    store = DecodeStore(data.paths, data.stored, 1024)
    first = store.get(0)
    assert store.get(0) is first
    store.release()
    assert store.get(0) is not first


def test_a_batch_that_is_done_leaves_no_photo_in_memory(folder):
    pipeline = build_pipeline(make_config(folder), "cpu")
    all_batches(pipeline)
    assert not pipeline.planner.store._held


def test_a_photo_that_has_another_size_than_when_its_labels_were_read_is_named(folder):
    data = load_dataset(make_config(folder).data)
    store = DecodeStore(data.paths, data.stored, 1024)
    Image.new("RGB", (7, 5)).save(data.paths[0])
    assert store.check(0) == f"{data.paths[0]}: its size differs from its header's" and not store.check(1)


def test_cache_that_cannot_be_written_is_one_line(folder, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="cannot write the image cache"):
        build_pipeline(make_config(folder, cache=str(blocked / "cache.bin")), "cpu")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match="No space left"):
        build_pipeline(make_config(folder, cache=str(tmp_path / "cache.bin")), "cpu")
    assert not (tmp_path / "cache.bin").exists() and not list(tmp_path.glob("*.tmp"))


def test_mapped_store_is_not_copied_to_other_processes(folder, tmp_path):
    data = load_dataset(make_config(folder).data)
    store = build_store(data.paths, data.stored, 1024, tmp_path / "cache.bin", workers=1)
    sent = pickle.dumps(store)
    assert len(sent) < 5000 < store.flat.numel()
    assert torch.equal(pickle.loads(sent).get(3), store.get(3))


def test_pixels_that_would_fill_the_gpu_stay_in_host_memory(folder, monkeypatch, caplog):
    data = load_dataset(make_config(folder).data)
    store = build_store(data.paths, data.stored, 1024)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (round(store.flat.numel() / 0.65), 10**12))
    assert store.to(torch.device("cuda")) is store and "stay in host memory" in caplog.text


def test_a_store_without_pixels_holds_none(folder):
    data = load_dataset(make_config(folder).data)
    store = build_store(data.paths, data.stored, 1024, workers=1).without_pixels()
    assert store.flat.untyped_storage().nbytes() == 0 and store.check(0) == ""


# ---- configuration


@pytest.mark.parametrize(
    ("opts", "why"),
    [
        (["data.machine_ignore=2"], "'machine_ignore'"),
        (["data.augment.cutmix_prob=1.5"], r"'cutmix_prob' must be in \[0, 1\]"),
        (["data.augment.mosaic_prob=0.6", "data.augment.mixup_prob=0.5"], r"'mosaic_prob'.*mixup_prob 0\.5.*got 0\.6"),
        (["data.augment.crop_scales=[]"], "'crop_scales'"),
        (["distill.init_mimics=last.pth", "distill.stages=[{until: 1.0, terms: {score: 1.0}}]"], "'init_mimics'"),
        (["distill.init_mimics=last.pth", "distill.teachers=[]"], "'init_mimics'"),
        (
            ["distill.self_best=true", "distill.stages=[{until: 1.0, terms: {box: 1.0}}]", "train.val_every=0"],
            "self_best'",
        ),
        (
            ["distill.self_best=true", "distill.stages=[{until: 1.0, terms: {box: 1.0}}]", "data.select_images=0"],
            r"'distill\.self_best' without effect.*\(got True\)",
        ),
        (["train.stages=[{size: 330}]"], r"'train\.stages\[0\]\.size' must be a multiple of 32"),
        (["train.stages=[{batch_size: 0}]"], r"'train\.stages\[0\]\.batch_size' must be >= 1"),
        (["train.stages=[{until: 0.9}, {until: 0.5}, {until: 1.0}]"], "'stages' their until must rise"),
        (["distill.stages=[{terms: {boxes: 1.0}}]"], "unknown term 'boxes'"),
        (["train.epochs"], "--opts train.epochs: expected key=value"),
        (["train.epochs.more=3"], "--opts train.epochs.more=3: unknown key 'train.epochs.more'"),
        (["train.patience=3", "train.val_every=0"], r"'train\.patience' without effect.*\(got 3\)"),
        (["name=2024-13-45"], "--opts name=2024-13-45: '2024-13-45' is not a valid YAML value"),
        ([f"train.lr={'9' * 400}"], r"'train\.lr' must be a finite number"),
        (["distill.temperature=[.inf, 1, 1, 1]"], r"'distill\.temperature\[0\]' must be a finite number \(got inf\)"),
        (["distill.stages=[{terms: {box: .inf}}]"], r"'distill\.stages\[0\]\.terms\.box' must be a finite number"),
        (["model.cascade_refinement=true", "loss.refine_weight=0"], r"'loss\.refine_weight'.*\(got 0\.?0?\)"),
    ],
)
def test_impossible_settings_are_refused(opts, why):
    with pytest.raises(ConfigError, match=why):
        load_config("v2_ultra", opts)


@pytest.mark.parametrize(
    "opt",
    [
        *(f"train.{o}" for o in ("epochs=0", "epochs=true", "val_images=-1", "patience=-1", "log_every=0")),
        *(
            f"train.{o}"
            for o in ("lr=0", "lr=.nan", "lr=.inf", "clip_norm=0", "ema_decay=1.1", "momentum=2", "warmup=-0.1")
        ),
        *(f"train.{o}" for o in ("backbone_lr=-1", "weight_decay=-1", "weight_decay=.inf", "freeze_stages=4")),
        *(f"data.{o}" for o in ("workers=-1", "repeat=0", "select_images=-1")),
        *(f"data.augment.{o}" for o in ("min_face=-5", "min_face=.inf", "flip_prob=2")),
        *(f"model.{o}" for o in ("out_channels=30", "strides=[4,8,16]", "dropblock=1")),
        *(
            f"loss.{o}"
            for o in ("landmark_weight=-1", "landmark_weight=.inf", "iou_threshold=1", "image_balance=2", "atss_topk=0")
        ),
        *(f"loss.{o}" for o in ("simota_radius=0", "simota_radius=1e9", "simota_radius=.inf")),
        *(f"distill.{o}" for o in ("alpha=[2,1,1,1]", "temperature=[0,1,1,1]", "memory_boxes=0")),
    ],
)
def test_numbers_out_of_range_are_refused(opt):
    key = opt.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ConfigError, match=rf"^--opts.*\b{key}' must be .* \(got .*\)$"):
        load_config("v2_ultra", [opt])


def test_what_an_older_run_stored_is_read_as_it_is():
    """Settings that are refused together today may have been trained with."""
    stored = to_dict(load_config("v2_ultra"))
    stored["distill"] |= {"self_best": True, "stages": [{"until": 1.0, "terms": {"box": 1.0}}]}
    stored["train"]["val_every"] = 0
    assert from_dict(Config, stored, "last.pth").distill.self_best
    assert load_config(
        "v2",
        [
            "distill.self_best=true",
            "distill.stages=[{until: 1.0, terms: {temporal: 1.0}}]",
            "distill.teachers=[]",
            "distill.self_teacher=false",
            "train.val_every=0",
        ],
    ).distill.enabled  # the switch alone


def test_overrides_are_judged_together_and_the_documented_ones_are_accepted():
    text = (CONFIG_DIR.parent / "docs/training.md").read_text()
    opts = shlex.split(text.split("--out runs/kd --opts \\\n")[1].split("\npython")[0].replace("\\\n", " "))
    for order in (opts, opts[::-1]):
        cfg = load_config("v2_ultra", order).distill
        assert cfg.split_batch and cfg.alpha == [0.5] and cfg.stages[0].terms == {"dense": 6.0}
    with pytest.raises(ConfigError, match=r"--opts distill.until=.*'temperature' needs 1 values"):
        load_config("v2_ultra", ["distill.until=[1.0]"])


def test_overrides_say_what_they_seem_to_say():
    parser = argparse.ArgumentParser()
    add_opts(parser)
    argv = "--opts train.amp=off train.lr=2e-3 --opts train.val_scale=1600 data.cache=".split()
    cfg = load_config("v2_ultra", parser.parse_args(argv).opts)
    assert (cfg.train.amp, cfg.train.lr, cfg.train.val_scale, cfg.data.cache) == ("off", 0.002, "1600", "")
    with pytest.raises(ConfigError, match=r"^mine\.yaml: 'train\.epochs' must be >= 1 \(got 0\)$"):
        from_dict(Config, {"train": {"epochs": 0}}, "mine.yaml")


def test_the_scale_of_validation_is_a_word_or_a_number():
    for text, scale in (("auto", "auto"), ("vga", "vga"), ("1600", "1600"), ("1.4", 1.4), ("2", 2.0)):
        made = load_config("v2_ultra", [f"train.val_scale={text}"])
        assert made.train.val_scale == scale
        assert from_dict(Config, to_dict(made), "stored").train.val_scale == scale
    for text, why in (
        ("large", "must be one of auto, original, vga, 1600, or a number (got 'large')"),
        ("true", "must be one of auto, original, vga, 1600, or a number (got True)"),
        ("[1.4]", "must be one of auto, original, vga, 1600, or a number (got [1.4])"),
        ("9", "must be between 0.1 and 8 (got 9.0)"),
    ):
        with pytest.raises(ConfigError, match=rf"^--opts.*val_scale' {re.escape(why)}"):
            load_config("v2_ultra", [f"train.val_scale={text}"])


def test_a_config_with_a_base_holds_only_the_differences(tmp_path):
    (tmp_path / "first.yaml").write_text("name: mine\ntrain: {epochs: 7, lr: 1e-2}\ndistill: {teachers: [v1]}\n")
    second = tmp_path / "second.yaml"
    second.write_text("base: first.yaml\ntrain: {lr: 5e-3}\ndistill: {teachers: []}\n")
    cfg = load_config(second, ["train.epochs=3"])
    assert (cfg.name, cfg.train.epochs, cfg.train.lr, cfg.distill.teachers) == ("mine", 3, 5e-3, [])
    assert load_config(second).train.epochs == 7


@pytest.mark.parametrize(
    ("base", "text", "parts"),
    [
        ("first.yaml", "train: {epoch: 7}", ["first.yaml", "train.epoch"]),  # the file that has the mistake is named
        ("none.yaml", "", ["second.yaml", "base", "none.yaml"]),
        ("second.yaml", "", ["second.yaml", "leads back"]),
        ("../" + "{here}/second.yaml", "", ["second.yaml", "leads back"]),
        ("[1]", "", ["second.yaml", "base"]),
        ('"a\\0b"', "", ["second.yaml", "base"]),
    ],
)
def test_a_bad_base_is_one_line_with_the_file(tmp_path, base, text, parts):
    (tmp_path / "first.yaml").write_text(text)
    (tmp_path / "second.yaml").write_text(f"base: {base.format(here=tmp_path.name)}\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "second.yaml")
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts)


def test_shipped_configs_load():
    for path in sorted(CONFIG_DIR.glob("*.yaml")):
        assert load_config(path).train.epochs >= 1
    first, second = load_config("v2_ultra"), load_config("v2_ultra_second")
    assert second.model == replace(first.model, landmark_refinement=False)  # that comes last, alone
    assert load_config("v2_ultra_refine").model == first.model
    assert second.train.stages == first.train.stages


def test_policies_name_known_operations():
    image = torch.rand(3, 32, 32) * 255

    for policy in POLICIES:
        for name, probability, low, high in policy:
            assert 0 < probability <= 1 and low <= high
            if name not in GEOMETRIC:
                for magnitude in (low, high):
                    out = apply_operation(image, name, magnitude, seed=1)
                    assert out.shape == image.shape and 0 <= out.min() and out.max() <= 255.01
                    assert not torch.equal(out, image), name


def test_benchmark_prints_crops_per_second(folder, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{root: {folder}, select_images: 0, workers: 0}}\n")
    arguments = ["--config", str(config), "--sizes", "64", "--batches", "2", "--seconds", "0.05", "--device", "cpu"]
    assert benchmark.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [r["path"] for r in rows] == ["loader", "device"] and all(r["crops_per_second"] > 0 for r in rows)
