"""WIDERFace evaluation: against a plain loop, against the published figures, and on bad input."""

import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from tests import wider_oracle
from widerface_evaluate import (
    EvaluationError,
    GroundTruth,
    breakdown,
    evaluate,
    image_key,
    landmark_error,
    load_ground_truth,
    load_labels,
    load_list,
    load_predictions,
    match,
    paired_bootstrap,
    worst_cases,
    write_predictions,
)
from widerface_evaluate.__main__ import main
from widerface_evaluate.errors import OtherSettings
from widerface_evaluate.images import detect_images, find_image
from widerface_evaluate.plots import _crop, sheet
from widerface_evaluate.predictions import take_over, to_xywh

SUBSETS = ("easy", "medium", "hard")
VAL_DEV = Path(__file__).parents[1] / "widerface_evaluate" / "val_dev.txt"
PUBLISHED = {
    "retinaface_mnet025": (0.907076, 0.881650, 0.738273),
    "retinaface_resnet50": (0.954822, 0.940469, 0.844301),
}


def make_gt(faces: dict, valid: dict | None = None) -> GroundTruth:
    """``faces[name]`` = list of x y w h; ``valid[subset][name]`` = list of bool, default all."""
    counts = [len(v) for v in faces.values()]
    boxes = np.array([b for v in faces.values() for b in v], float).reshape(-1, 4)
    masks = {s: np.array([x for n in faces for x in m[n]], bool) for s, m in (valid or {}).items()}
    return GroundTruth(list(faces), boxes, np.r_[0, np.cumsum(counts)], masks or {"all": np.ones(len(boxes), bool)})


def random_set(seed: int, images: int = 25) -> tuple[dict, GroundTruth]:
    """Faces partly ignored, jittered and duplicate detections, tied scores, images without faces or detections."""
    rng = np.random.default_rng(seed)
    faces, preds, valid = {}, {}, {s: {} for s in SUBSETS}
    for i in range(images):
        name = f"{i % 4}--Event/img_{i}"
        n = int(rng.integers(0, 7)) if i % 6 else 0
        box = np.column_stack([rng.integers(0, 200, (n, 2)), rng.integers(1, 60, (n, 2))]).astype(float)
        faces[name] = box.tolist()
        for subset, share in zip(SUBSETS, (0.3, 0.6, 0.9)):
            valid[subset][name] = (rng.random(n) < share).tolist()
        near = np.repeat(box, 2, axis=0) + rng.normal(0, 3, (2 * n, 4))
        near[:, 2:] = np.abs(near[:, 2:])
        far = np.column_stack([rng.uniform(0, 200, (5, 2)), rng.uniform(1, 60, (5, 2))])
        dets = np.concatenate([near, far]) if i % 5 else np.zeros((0, 4))
        scores = rng.beta(1, 2, len(dets)).round(2)  # two digits: many ties
        preds[name] = np.column_stack([dets, scores])
    return preds, make_gt(faces, valid)


def test_the_list_of_val_dev_names_photos_of_all_events_once():
    names = load_list(VAL_DEV)
    assert len(names) == len(set(names)) == 349 and len({name.partition("/")[0] for name in names}) == 61


@pytest.mark.shared
def test_the_list_of_val_dev_is_the_reference_s(shared):
    names = load_list(VAL_DEV)
    assert names == load_list(shared / "data" / "labels" / "val_dev.txt")


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_plain_loop(seed):
    preds, gt = random_set(seed)
    fast, slow = evaluate(preds, gt), wider_oracle.evaluate(preds, gt)
    assert 0.05 < slow["hard"] < 0.95
    for subset in SUBSETS:
        assert fast[subset] == pytest.approx(slow[subset], abs=1e-9)


def test_scores_are_normalised_as_in_the_reference():
    """The range never starts above 1 or ends below 0."""
    gt = make_gt({"e/a": [[0, 0, 20, 20]]})
    for scores, low, high in (((3.0, 2.0), 1.0, 3.0), ((-2.0, -3.0), -3.0, 0.0)):
        matches = match({"e/a": np.array([[0, 0, 20, 20, s] for s in scores])}, gt)
        assert (matches.low, matches.high) == (low, high)


def write_mats(folder: Path, indices: list[list[int]]) -> None:
    """Official ground truth of an event with images a and b of three faces each; ``indices``: their hard ones."""

    def column(*items):
        array = np.empty((len(items), 1), object)
        array[:, 0] = items
        return array

    faces = [np.array([[k, 0, 10, 10 + k] for k in range(3)], float) + 100 * i for i in range(2)]
    savemat(
        folder / "wider_face_val.mat",
        {
            "event_list": column("e"),
            "file_list": column(column("a", "b")),
            "face_bbx_list": column(column(*faces)),
        },
    )
    for subset in SUBSETS:
        kept = indices if subset == "hard" else [[], []]
        table = column(column(*(np.array(k, np.uint8).reshape(-1, 1) for k in kept)))
        savemat(folder / f"wider_{subset}_val.mat", {"gt_list": table})


def test_subsets_of_mat_files_count_faces_from_1(tmp_path):
    write_mats(tmp_path, [[1, 3], [2]])
    gt = load_ground_truth(tmp_path)
    assert gt.names == ["e/a", "e/b"] and gt.boxes[:, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert gt.valid["hard"].tolist() == [True, False, True, False, True, False] and not gt.valid["easy"].any()


@pytest.mark.parametrize("face", [0, 4])
def test_subsets_of_mat_files_name_faces_that_there_are(tmp_path, face):
    write_mats(tmp_path, [[1], [face]])
    with pytest.raises(EvaluationError, match=r"wider_hard_val\.mat: names a face that"):
        load_ground_truth(tmp_path)


def test_images_without_valid_face_still_cost_precision():
    faces = {"e/a": [[0, 0, 20, 20]], "e/b": [], "e/c": [[0, 0, 20, 20]]}
    gt = make_gt(faces, {"hard": {"e/a": [True], "e/b": [], "e/c": [False]}})
    hit, miss = np.array([[0, 0, 20, 20, 0.8]]), np.array([[100, 100, 20, 20, 0.9]])
    nothing = np.zeros((0, 5))
    low = np.array([[300, 300, 5, 5, 0.0]])  # keeps the score range fixed
    preds = {"e/a": np.concatenate([hit, low]), "e/b": nothing, "e/c": nothing}
    assert evaluate(preds, gt)["hard"] == pytest.approx(1.0)
    assert evaluate({**preds, "e/b": miss}, gt)["hard"] == pytest.approx(0.5)
    assert evaluate({**preds, "e/c": miss}, gt)["hard"] == pytest.approx(0.5)
    on_ignored = np.array([[0, 0, 20, 20, 0.9]])
    assert evaluate({**preds, "e/c": on_ignored}, gt)["hard"] == pytest.approx(1.0)


def test_duplicates_are_false_positives_and_plus_one_iou_counts():
    gt = make_gt({"e/a": [[10, 10, 9, 9]]})
    matches = match({"e/a": np.array([[10, 10, 9, 9, 0.9], [11, 10, 9, 9, 0.8], [10, 10, 9, 4, 0.1]])}, gt)
    assert matches.iou.tolist() == pytest.approx([1.0, 90 / 110, 0.5])  # pixels inclusive: 10 x 10, 10 x 5
    counted, hit = matches.count(gt.valid["all"])
    assert counted.tolist() == [True] * 3 and hit.tolist() == [True, False, False]


def test_nothing_detected_and_constant_scores():
    gt = make_gt({"e/a": [[0, 0, 20, 20]], "e/b": []})
    nothing = np.zeros((0, 5))
    assert evaluate({"e/a": nothing, "e/b": nothing}, gt)["all"] == 0.0
    constant = np.array([[0, 0, 20, 20, 0.5]])
    assert evaluate({"e/a": constant, "e/b": nothing}, gt)["all"] == pytest.approx(1.0)
    assert evaluate({"e/a": nothing, "e/b": nothing}, gt)["f1"] == 0.0
    assert match({"e/a": constant, "e/b": []}, gt).score.tolist() == [0.5]


@pytest.fixture(scope="session")
def wider(shared, tmp_path_factory):
    """Official ground truth and both published prediction sets: ``(gt folder, {name: folder}, list file)``."""
    folder = tmp_path_factory.mktemp("preds")
    for name in PUBLISHED:
        with tarfile.open(shared / "preds" / f"{name}.tar.xz") as archive:
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in the 3.11.2 of Debian 12
            archive.extractall(folder, **safe)
    labels = shared / "data" / "labels"
    return labels / "ground_truth", {name: folder / name for name in PUBLISHED}, labels / "val_dev.txt"


@pytest.mark.shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_parity_with_the_reference_on_all_images(wider, name):
    mats, preds, _ = wider
    gt = load_ground_truth(mats)
    result = evaluate(load_predictions(preds[name], gt.names), gt)
    assert result["images"] == 3226 and result["faces"] == {"easy": 7211, "medium": 13319, "hard": 31958}
    assert [result[s] for s in SUBSETS] == pytest.approx(PUBLISHED[name], abs=1e-6)


@pytest.mark.shared
def test_command_line_on_a_subset(wider, tmp_path, capsys):
    mats, preds, val_dev = wider
    argv = [str(preds["retinaface_resnet50"]), str(mats), "--list", str(val_dev), "--json"]
    argv += ["--pr-curve", str(tmp_path / "pr.png"), "--report", str(tmp_path / "report.json"), "--top", "5"]
    argv += ["--against", str(preds["retinaface_mnet025"]), "--samples", "50"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [round(result[s], 4) for s in SUBSETS] == [0.9460, 0.9382, 0.8385] and result["images"] == 349
    against = result["against"]["hard"]
    assert 0.05 < against["low"] < against["delta"] < against["high"] < 0.15
    assert Image.open(tmp_path / "pr.png").size[0] > 300
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["false_positives"]) == len(report["misses"]) == 5
    assert sum(row["images"] for row in report["by_event"].values()) == 349


@pytest.mark.parametrize("option", ["--samples", "--seed", "--top", "--images"])
def test_options_without_effect_are_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), str(tmp_path), option, "5"])
    assert stop.value.code == 2 and f"{option} needs --" in capsys.readouterr().err


def write_set(folder, preds):
    for name, boxes in preds.items():
        write_predictions(folder, name, np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]]), boxes[:, 4])


def test_the_oracle_measures_and_tells_both(photos, capsys, monkeypatch):
    preds, gt = random_set(1)
    monkeypatch.setattr("widerface_evaluate.load_ground_truth", lambda _: gt)
    monkeypatch.setattr("widerface_evaluate.load_predictions", lambda *_: preds)
    wider_oracle.main(["PRED", "GT", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["loop"] == pytest.approx(told["vectorised"], abs=1e-9) and set(told["loop"]) == set(SUBSETS)
    assert told["ratio"]["without_reading"] > 0


def test_predictions_survive_writing_as_floats(tmp_path, fill_disk):
    preds, gt = random_set(1)
    write_set(tmp_path, {f"{name}.jpg": boxes for name, boxes in preds.items()})
    again = load_predictions(tmp_path, gt.names)
    for name, boxes in preds.items():
        assert again[name] == pytest.approx(boxes[np.argsort(-boxes[:, 4], kind="stable")], abs=6e-4)
    assert evaluate(again, gt)["hard"] == pytest.approx(evaluate(preds, gt)["hard"], abs=1e-3)
    assert not list(tmp_path.rglob("*.part"))
    close = np.array([0.9999999, 0.9999998])
    write_predictions(tmp_path, "e/a", np.zeros((2, 4)), close)
    assert load_predictions(tmp_path, ["e/a"])["e/a"][:, 4].tolist() == close.tolist()
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match=r"file/e/a\.txt: cannot write"):
        write_predictions(tmp_path / "file", "e/a.jpg", np.zeros((0, 4)), np.zeros(0))
    fill_disk()
    with pytest.raises(EvaluationError, match=r"e/a\.txt: cannot write \(No space left"):
        write_predictions(tmp_path, "e/a", np.zeros((1, 4)), close[:1])
    assert load_predictions(tmp_path, ["e/a"])["e/a"][:, 4].tolist() == close.tolist()


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ("a\nmany\n", 2, "number of detections"),
        ("a\n", 2, "number of detections"),
        ("a\n1\n1 2 3 4\n", 3, "five finite numbers"),
        ("a\n2\n1 2 3 4 0.5\n1 2 3 x 0.5\n", 4, "five finite numbers"),
        ("a\n2\n1 2 3 4 0.5\n1 2 3 nan 0.5\n", 4, "five finite numbers"),
        ("a\n2\n1 2 3 4 0.5 6\n1 2 3 4\n", 3, "five finite numbers"),
        ("a\n3\n1 2 3 4 0.5\n", 2, "truncated"),
    ],
)
def test_malformed_prediction_file_is_named_with_its_line(tmp_path, content, line, what):
    path = tmp_path / "e" / "a.txt"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(EvaluationError, match=what) as error:
        load_predictions(tmp_path, ["e/a"])
    assert str(error.value).startswith(f"{path}:{line}:") and "\n" not in str(error.value)


def test_more_detections_than_a_prediction_file_says_are_refused(tmp_path):
    path = tmp_path / "e" / "a.txt"
    path.parent.mkdir()
    path.write_text("a\n1\n1 2 3 4 0.5\n1 2 3 4 0.4\n")
    with pytest.raises(EvaluationError, match=r"a\.txt:2: says 1 detections, 2 follow"):
        load_predictions(tmp_path, ["e/a"])


def test_empty_prediction_files_mean_no_detections(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "a.txt").write_text("a\n0\n")
    (tmp_path / "e" / "b.txt").write_text("")
    (tmp_path / "e" / "c.txt").write_text("c\r\n1\r\n1 2 3 4 0.5\r\n")
    assert [len(v) for v in load_predictions(tmp_path, ["e/a", "e/b", "e/c"]).values()] == [0, 0, 1]


def test_unusable_input_is_one_line_and_exit_code_1(tmp_path, capsys):
    labels = tmp_path / "label.txt"
    labels.write_text("# e/a.jpg\n0 0 20 20\n# e/b.jpg\n0 0 20 20\n")
    write_predictions(tmp_path / "preds", "e/a.jpg", np.array([[0, 0, 20, 20]]), np.array([0.9]))
    (tmp_path / "bad.mat").mkdir()
    (tmp_path / "bad.mat" / "wider_face_val.mat").write_bytes(b"not matlab at all")
    (tmp_path / "list.txt").write_text("e/none.jpg\n")
    (tmp_path / "empty.txt").write_text("\n")
    preds = str(tmp_path / "preds")
    cases = [
        ([preds, str(labels)], "e/b.txt: missing prediction file (1 of 2"),
        ([str(tmp_path / "nowhere"), str(labels)], "nowhere: no such folder"),
        ([preds, str(tmp_path / "none.txt")], "none.txt: cannot read"),
        ([preds, str(tmp_path)], "wider_face_val.mat: no such file"),
        ([preds, str(tmp_path / "bad.mat")], "wider_face_val.mat: not a readable .mat file"),
        ([preds, str(labels), "--list", str(tmp_path / "list.txt")], "e/none"),
        ([preds, str(labels), "--list", str(tmp_path / "empty.txt")], "empty.txt: lists no image"),
        ([preds, str(tmp_path / "empty.txt")], "empty.txt: no '# image'"),
    ]
    for argv, message in cases:
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main([preds, str(labels), "--iou", "2"])
    assert stop.value.code == 2


def test_what_cannot_be_measured_is_no_zero(tmp_path, capsys):
    """No face counts as easy; then none at all; then one that nothing finds."""

    def evaluated(lines: str, preds: dict) -> tuple[dict, str]:
        (tmp_path / "label.txt").write_text(lines)
        write_set(tmp_path / "preds", preds)
        assert main([str(tmp_path / "preds"), str(tmp_path / "label.txt"), "--json"]) == 0
        out = capsys.readouterr().out
        return json.loads(out.splitlines()[-1]), out

    small, text = evaluated("# e/a.jpg\n0 0 12 14\n", {"e/a": np.array([[0, 0, 12, 14, 0.7]])})
    assert (small["easy"], small["hard"], small["threshold"]) == (
        None,
        1.0,
        pytest.approx(0.6995),
    ) and "easy    AP -" in text
    more = ["--against", str(tmp_path / "preds"), "--breakdown"]
    assert main([str(tmp_path / "preds"), str(tmp_path / "label.txt"), "--json", *more]) == 0
    detail = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert detail["against"]["easy"] is None and detail["against"]["hard"]["delta"] == 0
    assert detail["by_height"]["16-24"] == {"faces": 0, "recall": None, "ap": None}
    empty, text = evaluated("# e/a.jpg\n", {"e/a": np.array([[0, 0, 12, 14, 0.7]])})
    assert [empty[k] for k in ("all", "threshold", "precision", "recall", "f1")] == [None] * 5
    assert "best threshold" not in text
    missed, text = evaluated("# e/a.jpg\n50 50 12 14\n", {"e/a": np.array([[0, 0, 12, 14, 0.7]])})
    assert (missed["all"], missed["threshold"], missed["recall"]) == (0.0, None, 0.0) and "best threshold" not in text


def test_the_least_overlap_asked_for_counts_everywhere(tmp_path, capsys):
    exact, near = ({"e/a": np.array([[0, 0, 99, h, 0.9]])} for h in (99, 59))  # IoU 1 and 0.6
    (tmp_path / "label.txt").write_text("# e/a.jpg\n0 0 99 99\n")
    gt = load_labels(tmp_path / "label.txt")
    folders = [str(tmp_path / name) for name in ("exact", "near")]
    for folder, preds in zip(folders, (exact, near)):
        write_set(folder, preds)
    for iou, ap in ((0.6, 1.0), (0.7, 0.0)):
        assert evaluate(near, gt, iou)["all"] == ap
        assert breakdown(match(near, gt, iou), gt, "all")["by_height"]["96-300"]["recall"] == ap
        for a, b, own, delta in ((*folders, 1.0, 1 - ap), (*folders[::-1], ap, ap - 1)):
            argv = [a, str(tmp_path / "label.txt"), "--iou", str(iou), "--against", b, "--samples", "10", "--json"]
            assert main(argv) == 0
            result = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert result["all"] == own and result["against"]["all"]["delta"] == delta


def test_the_best_threshold_admits_equal_scores_together_and_heeds_no_ignored_face():
    gt = make_gt({"e/a": [[0, 0, 20, 20], [100, 0, 20, 20]]}, {"all": {"e/a": [False, True]}})
    preds = {"e/a": np.array([[0, 0, 20, 20, 0.9], [100, 0, 20, 20, 0.5], [200, 0, 20, 20, 0.5]])}
    result = evaluate(preds, gt)
    assert [result[k] for k in ("threshold", "precision", "recall", "f1")] == [0.4995, 0.5, 1.0, pytest.approx(2 / 3)]
    preds["e/a"][2, 4] = 0.4998
    assert evaluate(preds, gt)["threshold"] == pytest.approx(0.4999)  # between the last to keep and the next


def test_a_score_on_a_threshold_is_admitted_by_it():
    scores = [1.0, 0.5, 0.25, 0.0]
    preds = {"e/a": np.array([[0, 0, 20, 20, s] for s in scores])}
    assert match(preds, make_gt({"e/a": [[0, 0, 20, 20]]})).bin.tolist() == [0, 499, 749, 999]


def test_command_passes_its_options_on(tmp_path, capsys):
    found, truth = random_set(4)
    rows = np.split(truth.boxes, truth.offsets[1:-1])
    lines = (f"# {n}.jpg\n" + "".join("{} {} {} {}\n".format(*b) for b in faces) for n, faces in zip(truth.names, rows))
    (tmp_path / "label.txt").write_text("".join(lines))
    write_set(tmp_path / "a", found)
    write_set(tmp_path / "b", {n: p + np.r_[3, 0, 0, 0, 0] for n, p in found.items()})
    argv = [str(tmp_path / "a"), str(tmp_path / "label.txt"), "--subset", "medium", "--breakdown", "--json"]
    argv += ["--report", str(tmp_path / "r.json"), "--top", "3"]
    argv += ["--against", str(tmp_path / "b"), "--samples", "20", "--seed", "5"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    gt = load_labels(tmp_path / "label.txt")
    a, b = (match(load_predictions(tmp_path / n, gt.names), gt) for n in "ab")
    detail = breakdown(a, gt, "medium")
    assert {k: result[k] for k in detail} == detail != breakdown(a, gt)
    report = json.loads((tmp_path / "r.json").read_text())
    worst = worst_cases(a, gt, "medium", 3)
    assert {k: report[k] for k in worst} == worst and len(worst["misses"]) == 3
    assert tuple(result["against"]["medium"].values()) == paired_bootstrap(a, b, gt, "medium", 20, 5)


def test_arrays_of_wrong_shape_or_missing_images_are_refused():
    gt = make_gt({"e/a": [[0, 0, 20, 20]]})
    with pytest.raises(EvaluationError, match="no predictions for 1 of 1 images, first: e/a"):
        evaluate({}, gt)
    with pytest.raises(EvaluationError, match=r"e/a: expected \[n, 5\]"):
        evaluate({"e/a": np.zeros((3, 4))}, gt)
    with pytest.raises(EvaluationError, match="e/a: non-finite"):
        evaluate({"e/a.jpg": np.full((1, 5), np.nan)}, gt)
    with pytest.raises(EvaluationError, match="e/a is there twice"):
        GroundTruth(["e/a", "e/a"], np.zeros((0, 4)), np.zeros(3, int), {})


def test_labels_by_hand(tmp_path, capsys):
    """Faces of 60, 40, 20 and 5 px; the 40-px one is missed, one false positive in an image without faces."""
    labels = tmp_path / "label.txt"
    marks = " ".join(f"{x} {y} 0" for x, y in ((20, 20), (40, 20), (30, 30), (22, 45), (38, 45)))
    none = "-1 -1 -1 " * 5
    labels.write_text(
        f"# e/a.jpg\n0 0 60 60 {marks} 0.9\n100 0 40 40 {none}0\n# e/b.jpg\n# e/c.jpg\n"
        f"200 0 20 20\n300 0 5 5\n7 7 0 0 {none}0\n"
    )
    preds = {
        "e/a.jpg": np.array([[0, 0, 60, 60, 0.9]]),
        "e/b.jpg": np.array([[50, 50, 30, 30, 0.6]]),
        "e/c.jpg": np.array([[300, 0, 5, 5, 0.1], [200, 0, 20, 20, 0.4]]),
    }
    result = evaluate(preds, load_labels(labels))
    assert result["faces"] == {"easy": 1, "medium": 2, "hard": 3, "all": 4} and result["images"] == 3
    assert result["easy"] == pytest.approx(1.0)
    assert result["medium"] == pytest.approx(1 / 2)
    assert result["hard"] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert result["all"] == pytest.approx(1 / 4 + 2 / 4 * 3 / 4)
    assert (result["threshold"], result["precision"], result["recall"]) == (pytest.approx(0.0995), 0.75, 0.75)
    write_set(tmp_path / "preds", preds)
    assert main([str(tmp_path / "preds"), str(labels), "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out.splitlines()[-1])["all"] == pytest.approx(result["all"])
    assert f"{labels}:8:" in out.err

    gt = load_labels(labels)
    assert np.isfinite(gt.landmarks[0]).all() and np.isnan(gt.landmarks[1:]).all()
    matches = match(preds, gt)
    marks = np.array([[20, 20], [40, 20], [30, 30], [22, 45], [38, 45]], float)
    landmarks = {"e/a": marks[None] + [2, 0], "e/b": np.zeros((1, 5, 2)), "e/c": np.zeros((2, 5, 2))}
    row = {"faces": 1, "nme": pytest.approx(0.1), "median": pytest.approx(0.1)}
    assert landmark_error(matches, gt, landmarks) == {
        "nme": pytest.approx(0.1),
        "landmark_faces": 1,
        "landmarks_by_height": {"48-96": row},
    }


def test_a_curve_says_what_is_found_at_which_raw_score():
    gt = make_gt({"e/a": [[100 * i, 0, 20, 20] for i in range(4)]})
    scores = np.array([0.81, 0.53, 0.2])
    curve = evaluate({"e/a": np.column_stack([gt.boxes[:3], scores])}, gt)["curves"]["all"]
    np.testing.assert_allclose(curve.recall, (scores >= curve.threshold[:, None] - 1e-9).sum(1) / 4)
    assert curve.threshold[-1] == pytest.approx(0.2) and curve.threshold[0] > 0.8


def test_ignored_labels_are_neither_missed_nor_false_alarms(tmp_path):
    (tmp_path / "label.txt").write_text(
        f"# e/a.jpg\n0 0 60 60 {'-1 ' * 15}0 1\n100 0 60 60\n200 0 60 60 {'-1 ' * 15}0 1\n"
    )
    preds = {"e/a": np.array([[0, 0, 60, 60, 0.9], [100, 0, 60, 60, 0.5]])}
    result = evaluate(preds, load_labels(tmp_path / "label.txt"))
    assert result["faces"] == dict.fromkeys((*SUBSETS, "all"), 1) and result["precision"] == 1
    assert [result[s] for s in (*SUBSETS, "all")] == pytest.approx([1.0] * 4)


def test_what_lies_in_an_ignored_region_is_no_false_alarm(tmp_path):
    """One box around a crowd, as COCO's iscrowd is: faces in it overlap it little; half of the third is outside."""
    region, face = f"0 0 400 200 {'-1 ' * 15}0 1\n", "500 0 60 60\n"
    (tmp_path / "label.txt").write_text(f"# e/a.jpg\n{region}{face}")
    crowd = [[20, 20, 40, 40, 0.9], [300, 100, 40, 40, 0.8], [381, 20, 40, 40, 0.7]]
    gt = load_labels(tmp_path / "label.txt")
    preds = {"e/a": np.array([*crowd, [500, 0, 60, 60, 0.6]])}
    assert match(preds, gt).face.tolist() == [0, 0, -1, 1]
    assert evaluate({"e/a": preds["e/a"][[0, 1, 3]]}, gt)["all"] == pytest.approx(1.0)
    assert evaluate({"e/a": preds["e/a"][[0, 2, 3]]}, gt)["all"] == pytest.approx(0.5)
    official = make_gt({"e/a": gt.boxes.tolist()}, {s: {"e/a": [False, True]} for s in SUBSETS})
    assert match(preds, official).face.tolist() == [-1, -1, -1, 1]  # the benchmark's protocol has no such rule
    (tmp_path / "label.txt").write_text(f"# d/0.jpg\n{face}{face}# e/a.jpg\n{face}{region}")  # not the first
    after = match({"d/0": np.zeros((0, 5)), **preds}, load_labels(tmp_path / "label.txt"))
    assert after.face.tolist() == [3, 3, -1, 2]
    no_area = {"d/0": np.zeros((0, 5)), "e/a": np.array([[600, 20, 0, 40, 0.9]])}
    assert match(no_area, load_labels(tmp_path / "label.txt")).face.tolist() == [-1]


def test_half_of_a_detection_in_an_ignored_region_is_enough(tmp_path):
    (tmp_path / "label.txt").write_text(f"# e/a.jpg\n0 0 400 200 {'-1 ' * 15}0 1\n")
    preds = {"e/a": np.array([[379, 20, 40, 40, 0.9], [381, 60, 40, 40, 0.8]])}  # 21 and 19 of 40 px inside
    assert match(preds, load_labels(tmp_path / "label.txt")).face.tolist() == [0, -1]


def test_landmarks_follow_the_row_of_an_unsorted_prediction():
    gt = make_gt({"e/a": [[0, 0, 20, 20]]})
    gt.landmarks = np.array([[[5, 5], [15, 5], [10, 10], [6, 15], [14, 15]]], float)
    preds = {"e/a": np.array([[50, 50, 9, 9, 0.1], [0, 0, 20, 20, 0.9]])}
    landmarks = {"e/a": np.stack([np.zeros((5, 2)), gt.landmarks[0]])}
    assert landmark_error(match(preds, gt), gt, landmarks)["nme"] == 0


def test_ignored_faces_have_no_landmark_error(tmp_path):
    points = "5 5 0 15 5 0 10 10 0 6 15 0 14 15 0"
    (tmp_path / "label.txt").write_text(f"# e/a.jpg\n0 0 20 20 {points} 0.5 1\n")
    gt = load_labels(tmp_path / "label.txt")
    found = match({"e/a": np.array([[0, 0, 20, 20, 0.9]])}, gt)
    assert landmark_error(found, gt, {"e/a": np.zeros((1, 5, 2))})["landmark_faces"] == 0


def test_landmark_error_by_height():
    sides = [20, 20, 20, 400]
    gt = make_gt({"e/a": [[1000 * i, 0, 2 * side, side] for i, side in enumerate(sides)]})
    marks = np.array([[5, 5], [15, 5], [10, 10], [6, 15], [14, 15]], float)
    gt.landmarks = np.stack([marks * side / 20 + [1000 * i, 0] for i, side in enumerate(sides)])
    off = np.array([1.0, 2.0, 9.0, 20.0])  # px; the eyes are 10 and 200 px apart
    preds = {"e/a": np.column_stack([gt.boxes, [0.9, 0.8, 0.7, 0.6]])}
    found = landmark_error(match(preds, gt), gt, {"e/a": gt.landmarks + off[:, None, None] * [1, 0]})
    assert found["landmarks_by_height"] == {
        "16-24": {"faces": 3, "nme": pytest.approx(0.4), "median": pytest.approx(0.2)},
        ">300": {"faces": 1, "nme": pytest.approx(0.1), "median": pytest.approx(0.1)},
    }


def test_profiles_have_no_landmark_error():
    gt = make_gt({"e/a": [[0, 0, 20, 20], [100, 0, 20, 20]]})
    eyes = np.array([[5.0, 5], [15, 5]]), np.array([[110.0, 5], [111.5, 5]])
    gt.landmarks = np.stack([np.concatenate([pair, pair[[0, 0, 0]]]) for pair in eyes])
    preds = {"e/a": np.column_stack([gt.boxes, [0.9, 0.8]])}
    found = landmark_error(match(preds, gt), gt, {"e/a": gt.landmarks + np.eye(2)[0]})
    assert (found["nme"], found["landmark_faces"]) == (pytest.approx(0.1), 1)


def test_bootstrap():
    preds, gt = random_set(3, images=40)
    rng = np.random.default_rng(0)
    worse = {n: p + np.r_[4, 4, 0, 0, 0] * (rng.random((len(p), 1)) < 0.5) for n, p in preds.items()}
    good, bad = match(preds, gt), match(worse, gt)
    assert paired_bootstrap(good, good, gt, "hard", samples=50) == (0.0, 0.0, 0.0)
    delta, low, high = paired_bootstrap(good, bad, gt, "hard", samples=300)
    assert delta == pytest.approx(evaluate(preds, gt)["hard"] - evaluate(worse, gt)["hard"], abs=1e-6)
    assert low < delta < high and high - low > 1e-3
    assert (delta, low, high) == paired_bootstrap(good, bad, gt, "hard", samples=300)
    back = paired_bootstrap(bad, good, gt, "hard", samples=300)
    assert back == pytest.approx((-delta, -high, -low), abs=1e-6)


def test_bootstrap_interval_equals_evaluating_the_drawn_images():
    """The same draws, each evaluated as a set of its own; every image has the extreme scores, so ranges agree."""
    preds, gt = random_set(2, images=12)
    ends = np.array([[900, 900, 9, 9, 0.0], [900, 900, 9, 9, 1.0]])
    preds = {n: np.concatenate([p, ends]) for n, p in preds.items()}
    other = {n: p[1:] if len(p) > 4 else p for n, p in preds.items()}
    draws = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=20)
    deltas = []
    for weights in draws:
        drawn = [f"{i} {copy}" for i, w in enumerate(weights) for copy in range(w)]
        index = [int(d.split()[0]) for d in drawn]
        rows = [np.arange(gt.offsets[i], gt.offsets[i + 1]) for i in index]
        flat = np.concatenate(rows)
        offsets = np.r_[0, np.cumsum([len(r) for r in rows])]
        part = GroundTruth(drawn, gt.boxes[flat], offsets, {"hard": gt.valid["hard"][flat]})
        a, b = (evaluate({d: p[gt.names[i]] for d, i in zip(drawn, index)}, part)["hard"] for p in (preds, other))
        deltas.append(a - b)
    expected = np.percentile(deltas, [2.5, 97.5])
    got = paired_bootstrap(match(preds, gt), match(other, gt), gt, "hard", samples=20, seed=7)
    assert got[1:] == pytest.approx(expected, abs=1e-6)


def test_breakdown_and_worst_cases():
    faces = {"x--E/a": [[0, 0, 12, 12], [100, 100, 200, 200]], "y--F/b": [[0, 0, 30, 30]]}
    gt = make_gt(faces)
    preds = {
        "x--E/a": np.array([[0, 0, 12, 12, 0.9], [1, 0, 12, 12, 0.8], [400, 400, 50, 50, 0.7]]),
        "y--F/b": np.array([[0, 0, 30, 30, 0.05]]),
    }
    detail = breakdown(match(preds, gt), gt, "all")
    assert {k: r["recall"] for k, r in detail["by_height"].items() if r["faces"]} == {
        "10-16": 1,
        "24-48": 1,
        "96-300": 0,
    }
    without = {**preds, "y--F/b": np.zeros((0, 5))}
    for found, worst_first in ((preds, ["x--E", "y--F"]), (without, ["y--F", "x--E"])):
        assert list(breakdown(match(found, gt), gt, "all")["by_event"]) == worst_first
    assert detail["by_event"]["x--E"]["recall"] == 0.5 and detail["by_event"]["y--F"]["ap"] == pytest.approx(1.0)
    worst = worst_cases(match(preds, gt), gt, "all")
    assert [(i["score"], i["duplicate"]) for i in worst["false_positives"]] == [(0.8, True), (0.7, False)]
    assert [(i["name"], i["box"][3], i["score"]) for i in worst["misses"]] == [("x--E/a", 200, None)]


def test_a_height_between_two_bins_is_in_the_upper_one_and_tall_misses_come_first():
    gt = make_gt({"e/a": [[0, 0, 50, 16], [100, 0, 10, 300], [500, 0, 80, 10]]})
    nothing = {"e/a": np.zeros((0, 5))}
    rows = breakdown(match(nothing, gt), gt, "all")["by_height"]
    assert [key for key, row in rows.items() if row["faces"]] == ["10-16", "16-24", ">300"]
    assert [m["box"][3] for m in worst_cases(match(nothing, gt), gt, "all")["misses"]] == [300, 16, 10]


def test_a_face_found_twice_is_not_missed():
    gt = make_gt({"e/a": [[0, 0, 20, 20], [100, 0, 20, 20]]})
    preds = {"e/a": np.array([[0, 0, 20, 20, 0.9], [100, 0, 20, 20, 0.8], [1, 0, 20, 20, 0.1]])}
    worst = worst_cases(match(preds, gt), gt, "all")
    assert worst["misses"] == [] and [f["score"] for f in worst["false_positives"]] == [0.1]


def test_events_without_faces_come_last():
    gt = make_gt({"a--E/a": [], "b--F/b": [[0, 0, 30, 30]]})
    preds = {"a--E/a": np.zeros((0, 5)), "b--F/b": np.array([[0, 0, 30, 30, 0.9]])}
    rows = breakdown(match(preds, gt), gt, "all")["by_event"]
    assert list(rows) == ["b--F", "a--E"] and rows["a--E"]["ap"] is None


def test_a_false_alarm_beside_a_face_is_no_duplicate():
    gt = make_gt({"e/a": [[0, 0, 19, 19]]})
    preds = {"e/a": np.array([[0, 0, 19, 19, 0.9], [0, 0, 19, 7, 0.8]])}  # 20 x 8 px of the face's 20 x 20
    false_positives = worst_cases(match(preds, gt), gt, "all")["false_positives"]
    assert [(f["score"], f["duplicate"]) for f in false_positives] == [(0.8, False)]


def test_worst_cases_heed_the_subset_and_say_how_near_it_was():
    faces = [[0, 0, 19, 19], [100, 0, 19, 19], [200, 0, 19, 19]]
    gt = make_gt({"e/a": faces}, {"hard": {"e/a": [True, True, False]}})
    wrong = [[0, 0, 19, 7], [300, 0, 19, 19], [400, 0, 19, 19]]  # the first is 20 x 8 px of a face's 20 x 20
    preds = np.column_stack([[faces[0], *wrong, faces[2], faces[1]], [0.9, 0.8, 0.7, 0.6, 0.5, 0.1]])
    worst = worst_cases(match({"e/a": preds}, gt), gt)
    assert worst["threshold"] == pytest.approx(0.8995) and [f["iou"] for f in worst["false_positives"]] == [
        pytest.approx(0.4),
        0,
        0,
    ]
    assert [(m["box"], m["score"]) for m in worst["misses"]] == [(faces[1], 0.1)]


def test_detections_become_the_benchmark_s_rows():
    from models.detector import Detections

    faces = Detections(np.array([[1.0, 2, 31, 42]]), np.array([0.5]), np.zeros((1, 5, 2)))
    assert to_xywh(faces).tolist() == [[1, 2, 30, 40, 0.5]]


@pytest.mark.parametrize(
    ("name", "key"), [("e/a.jpg", "e/a"), ("./e\\a.JPG", "e/a"), (" e/a\n", "e/a"), ("e/a.b", "e/a.b")]
)
def test_images_have_one_key_however_they_are_written(name, key):
    assert image_key(name) == key


class Finder:
    """Stands in for a detector: finds the red square of each picture and checks how it is called."""

    device, pyramid = "cpu", None

    def __init__(self):
        self.calls, self.path = [], Path(__file__)

    def __call__(self, images, score, nms, scale, tta, pad):
        from models.detector import Detections

        self.calls.append((len(images), score, nms, scale, tta, pad))
        results = []
        for image in images:
            ys, xs = np.nonzero((image[..., 0] > 200) & (image[..., 1] < 60))
            box = np.array([[xs.min(), ys.min(), xs.max(), ys.max()]], np.float32) if len(xs) else np.zeros((0, 4))
            marks = np.repeat(box[:, None, :2], 5, axis=1).reshape(-1, 5, 2)
            results.append(Detections(box, np.full(len(box), 0.9, np.float32), marks))
        return results


@pytest.fixture
def photos(tmp_path):
    """Three pictures with a red square each (one PNG), and their label file."""
    lines = []
    for i, suffix in enumerate((".jpg", ".png", ".jpg")):
        image = np.zeros((100 + 20 * (i % 2), 120, 3), np.uint8)
        image[20:61, 10 + i : 51 + i, 0] = 255
        path = tmp_path / "images" / "0--E" / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=95)
        marks = " ".join(f"{10 + i + x} 20 0" for x in (0, 20, 0, 0, 0))
        lines.append(f"# 0--E/{i}{suffix}\n{10 + i} 20 40 40 {marks} 1\n")
    (tmp_path / "label.txt").write_text("".join(lines))
    return tmp_path


def test_script_detects_writes_and_evaluates(photos, monkeypatch, capsys):
    import test_widerface

    finder = Finder()
    monkeypatch.setattr(test_widerface.FaceDetector, "from_pretrained", lambda *a, **k: finder)
    argv = ["--images", str(photos / "images"), "--labels", str(photos / "label.txt"), "--device", "cpu"]
    argv += ["--out", str(photos / "out"), "--batch-size", "2", "--scale", "vga", "--tta", "--no-pad", "--json"]
    assert test_widerface.main(argv) == 0
    printed = capsys.readouterr().out
    assert re.search(r"NME 0\.\d{3} on 3 faces", printed)
    result = json.loads(printed.splitlines()[-1])
    assert result["images"] == 3 and result["easy"] is None and result["medium"] == pytest.approx(1.0)
    assert result["landmark_faces"] == 3 and result["nme"] < 0.3 and result["images_per_second"] > 0
    assert sorted(finder.calls) == [(1, 0.02, 0.4, "vga", True, False), (2, 0.02, 0.4, "vga", True, False)]
    assert main([str(photos / "out"), str(photos / "label.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["medium"] == pytest.approx(1.0)

    (photos / "out" / "0--E" / "1.txt").unlink()
    assert test_widerface.main([*argv, "--resume"]) == 0
    resumed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(finder.calls) == 3 and resumed["medium"] == pytest.approx(1.0)


def test_script_measures_at_every_scale_that_detection_has(photos, monkeypatch, capsys):
    import test_widerface

    finder = Finder()
    monkeypatch.setattr(test_widerface.FaceDetector, "from_pretrained", lambda *a, **k: finder)
    argv = ["--images", str(photos / "images"), "--labels", str(photos / "label.txt"), "--device", "cpu"]
    for given, seen in (([], "original"), (["--scale", "auto"], "auto"), (["--scale", "1.4"], 1.4)):
        assert test_widerface.main([*argv, *given]) == 0
        assert finder.calls[-1][3] == seen
        assert f"scale {seen}" in capsys.readouterr().out


def test_resume_takes_over_its_own_predictions_only(tmp_path):
    keys, boxes = ["e/a", "e/b"], np.array([[1.0, 2, 30, 40]])
    mine, other = {"weights": "x", "scale": "vga"}, {"weights": "x", "scale": "original"}
    assert take_over(tmp_path, keys, other, resume=False) == {}
    for key in keys:
        write_predictions(tmp_path, key, boxes, np.array([0.5]))
        os.utime(tmp_path / f"{key}.txt", ns=(0, 0))  # of an earlier run
    assert take_over(tmp_path, keys, mine, resume=False) == {}
    write_predictions(tmp_path, keys[1], boxes, np.array([0.9]))  # then it was interrupted
    assert {k: v[0, 4] for k, v in take_over(tmp_path, keys, mine, resume=True).items()} == {"e/b": 0.9}
    with pytest.raises(OtherSettings, match="scale='vga', now it is 'original'"):
        take_over(tmp_path, keys, other, resume=True)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(OtherSettings, match="does not tell"):
        take_over(tmp_path, keys, mine, resume=True)


def test_predictions_whose_settings_lack_one_are_not_taken_over(tmp_path):
    take_over(tmp_path, ["e/a"], {"nms": 0.4}, resume=False)
    write_predictions(tmp_path, "e/a", np.array([[0, 0, 20, 20]]), np.array([0.9]))
    assert list(take_over(tmp_path, ["e/a"], {"nms": 0.4}, resume=True)) == ["e/a"]
    with pytest.raises(OtherSettings, match="does not tell what made the predictions"):
        take_over(tmp_path, ["e/a"], {"nms": 0.4, "scale": "original"}, resume=True)


@pytest.mark.parametrize("name", ["/photos/a.jpg", "../photos/a.jpg"])
def test_predictions_stay_in_their_folder(tmp_path, name):
    with pytest.raises(EvaluationError, match="leads out of"):
        write_predictions(tmp_path / "out", name, np.zeros((0, 4)), np.zeros(0))


def test_a_list_of_windows_tools(tmp_path):
    (tmp_path / "list.txt").write_bytes("e/a.jpg\r\ne/b.jpg\r\n".encode("utf-8-sig"))
    assert load_list(tmp_path / "list.txt") == ["e/a.jpg", "e/b.jpg"]


def test_script_reports_bad_calls_and_bad_pictures(photos, monkeypatch, capsys):
    import test_widerface

    monkeypatch.setattr(test_widerface.FaceDetector, "from_pretrained", lambda *a, **k: Finder())
    base = ["--images", str(photos / "images"), "--device", "cpu"]
    for argv in (base, [*base, "--labels", "x", "--resume"]):
        with pytest.raises(SystemExit) as stop:
            test_widerface.main(argv)
        assert stop.value.code == 2
    assert test_widerface.main([*base, "--labels", "x", "--device", "warp"]) == 2
    argv = [*base, "--labels", str(photos / "label.txt")]
    (photos / "images" / "0--E" / "2.jpg").write_text("no picture")
    capsys.readouterr()
    assert test_widerface.main(argv) == 1
    assert "2.jpg: not a picture" in capsys.readouterr().err
    (photos / "images" / "0--E" / "2.jpg").unlink()
    assert test_widerface.main(argv) == 1
    assert "2.jpg: no such image (1 of 3" in capsys.readouterr().err


def test_images_of_cameras_and_rare_kinds_are_found(tmp_path):
    for name in ("IMG_1.JPG", "b.gif", "c.PNG"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    for name, file in (("IMG_1", "IMG_1.JPG"), ("IMG_1.jpg", "IMG_1.JPG"), ("b.gif", "b.gif"), ("c.PNG", "c.PNG")):
        assert find_image(tmp_path, name) == tmp_path / file


def test_report_draws_its_lists(photos, capsys):
    preds = {f"0--E/{i}": np.array([[60.0, 50, 30, 30, 0.8]]) for i in range(3)}  # every face missed
    write_set(photos / "preds", preds)
    argv = [str(photos / "preds"), str(photos / "label.txt"), "--subset", "medium"]
    assert main([*argv, "--report", str(photos / "r.json"), "--images", str(photos / "images")]) == 0
    assert sorted(p.name for p in photos.glob("r_*.png")) == ["r_false_positives.png", "r_misses.png"]


def test_sheet_draws_boxes_beyond_the_border(photos):
    items = [{"name": "0--E/0", "box": [10, 20, 40, 40], "score": 0.9}, {"name": "0--E/1", "box": [-5, -5, 300, 20]}]
    sheet(photos / "images", items, photos / "sheet.png", columns=2)
    red = np.asarray(Image.open(photos / "sheet.png").convert("RGB")).astype(int)
    assert ((red[..., 0] > 200) & (red[..., 1] < 60)).sum() > 500
    with pytest.raises(EvaluationError, match="no such image"):
        sheet(photos / "images", [{"name": "0--E/9", "box": [0, 0, 5, 5]}], photos / "no.png")


def test_a_crop_has_its_box_where_it_says():
    image = np.random.default_rng(0).integers(0, 255, (100, 120, 3), np.uint8)
    crop, (x, y, w, h) = _crop(image, [30, 20, 40, 10])
    np.testing.assert_array_equal(crop[int(y) : int(y + h), int(x) : int(x + w)], image[20:30, 30:70])
    assert crop.shape == (120, 120, 3)


def test_the_crop_of_a_box_far_larger_than_its_image_is_bounded():
    crop, (*_, w, h) = _crop(np.zeros((100, 120, 3), np.uint8), [-5000, -5000, 10000, 10000])
    assert crop.shape == (480, 480, 3) and (w, h) == (10000, 10000)


def test_detect_images_keeps_names_with_their_faces(photos):
    names = ["0--E/2.jpg", "0--E/0.jpg", "0--E/1.png"]
    for batch_size in (1, 2, 5):
        found = dict(detect_images(Finder(), photos / "images", names, batch_size=batch_size))
        assert {n: round(float(f.boxes[0, 0])) for n, f in found.items()} == {n: 10 + int(n[5]) for n in names}
    finder = Finder()
    list(detect_images(finder, photos / "images", names[:1], 0.1, 0.6, "vga", True, False))
    assert finder.calls == [(1, 0.1, 0.6, "vga", True, False)]


def test_images_taken_by_size_keep_their_names(tmp_path):
    """The smaller ones come first, whatever the order of the names."""
    (tmp_path / "e").mkdir()
    for name, height in (("a", 60), ("b", 40), ("c", 50)):
        Image.new("RGB", (50, height)).save(tmp_path / "e" / f"{name}.png")
    seen = []

    class Sizer:
        def __call__(self, images, **_):
            seen.extend(len(image) for image in images)
            return [len(image) for image in images]

    found = dict(detect_images(Sizer(), tmp_path, ["e/a.png", "e/b.png", "e/c.png"], batch_size=3))
    assert found == {"e/a.png": 60, "e/b.png": 40, "e/c.png": 50} and seen == [40, 50, 60]


def test_list_file_takes_comments_and_order(tmp_path):
    (tmp_path / "list.txt").write_text("# two of them\n\ne/b.jpg\ne/a.jpg\ne/b.jpg\n")
    gt = make_gt({"e/a": [[0, 0, 9, 9]], "e/b": [[1, 1, 9, 9], [2, 2, 9, 9]], "e/c": []})
    gt.landmarks = np.repeat(gt.boxes[:, None, :2], 5, axis=1)
    part = gt.take(load_list(tmp_path / "list.txt"))
    np.testing.assert_array_equal(part.landmarks[:, 0], part.boxes[:, :2])
    assert (
        part.names == ["e/b", "e/a"] and part.offsets.tolist() == [0, 2, 3] and part.boxes[:, 0].tolist() == [1, 2, 0]
    )
