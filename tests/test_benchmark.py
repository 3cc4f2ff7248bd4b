"""benchmark.py: fair timing, peers' decoding, the table and the command."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hungry import Hungry
from torchvision.ops import box_iou

import benchmark as command
from models.detector import Detections
from utils import benchmark, contenders, peers
from utils.benchmark import Row, interleave, measure_memory, pareto_front, plot, ratio, runs_of, table, time_rows
from utils.checkpoint import CheckpointError
from utils.config import ConfigError, load_config
from utils.onnx_backend import fingerprint
from widerface_evaluate import GroundTruth
from widerface_evaluate.errors import OtherSettings

IMAGE = np.zeros((32, 64, 3), np.uint8)


class Clock:
    """A clock that only fake models move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Takes ``seconds`` for the network and as much again for the whole; notes when it was called."""

    def __init__(self, name, clock, seconds, log=None, batch_limit=99):
        self.name, self.clock, self.seconds = name, clock, seconds
        self.log = [] if log is None else log
        self.batch_limit = batch_limit

    def prepare(self, images):
        return images

    def network(self, x):
        self.clock.now += next(self.seconds) if hasattr(self.seconds, "__next__") else self.seconds
        self.log.append(f"{self.name} network")

    def __call__(self, images, score, nms):
        if len(images) > self.batch_limit:
            raise RuntimeError("only one picture at a time\nsecond line")
        self.network(images)
        self.clock.now += 0.001
        self.log[-1] = self.name


class FakeLoader:
    """Loads the same fake whatever the threads."""

    def __init__(self, runner):
        self.runner, self.source = runner, Path(__file__)

    def __call__(self, threads):
        return self.runner


def folder(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def row(name="a", load=None, **more):
    return Row(name, "fake", more.pop("ours", True), load, **more)


def test_turns_are_interleaved_and_start_one_further_each_time():
    log = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    seconds = interleave(calls, 3)
    assert "".join(log) == "aabbcc" + "bbccaa" + "ccaabb"  # an untimed call before each timed one
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_only_the_second_call_of_each_turn_is_timed():
    clock = Clock()
    steps = iter([100.0, 1.0, 100.0, 2.0])

    def call():
        clock.now += next(steps)

    assert interleave({"a": call}, 2, clock) == {"a": [1.0, 2.0]}


def test_ratio_is_of_the_same_turn_so_that_common_noise_cancels():
    noise = np.array([1, 1, 50, 1, 9.0])
    assert ratio(3 * noise, noise) == pytest.approx(3)


def test_rows_get_median_p95_throughput_and_ratios():
    clock = Clock()
    slow = FakeRunner("slow", clock, 0.030)
    rows = [row("fast", FakeLoader(FakeRunner("fast", clock, 0.010))), row("slow", FakeLoader(slow))]
    time_rows(rows, IMAGE, threads=1, batch=2, runs=10, clock=clock)
    fast, slow = (r.timing(1, 2) for r in rows)
    assert fast.ms == pytest.approx(11) and fast.network_ms == pytest.approx(10)
    assert slow.ms == pytest.approx(31) and slow.p95_ms == pytest.approx(31)
    assert slow.images_per_second == pytest.approx(2 / 0.031)
    assert fast.ratio == 1 and slow.ratio == pytest.approx(31 / 11) and slow.network_ratio == pytest.approx(3)
    assert rows[0].timing(1, 1) is None


def test_percentile_sees_the_slow_turns_that_the_median_ignores():
    clock = Clock()

    def seconds():
        yield from [0.010, 0.010]  # whole and network, warming up
        for turn in range(20):
            for _ in range(4):  # each of the two, untimed and timed
                yield 0.100 if turn >= 18 else 0.010

    rows = [row("a", FakeLoader(FakeRunner("a", clock, seconds())))]
    time_rows(rows, IMAGE, 1, 1, 20, clock=clock)
    timing = rows[0].timing(1, 1)
    assert timing.network_ms == pytest.approx(10) and timing.network_p95_ms == pytest.approx(100)
    assert timing.ms == pytest.approx(11) and timing.p95_ms == pytest.approx(101)
    assert timing.best_ms == pytest.approx(11) and timing.network_best_ms == pytest.approx(10)


def test_contenders_are_measured_with_the_threads_pictures_and_thresholds_asked_for():
    seen = set()

    def load(threads):
        seen.add(threads)
        return lambda images, score, nms: seen.add((len(images), score, nms))

    time_rows([row("a", load)], IMAGE, 3, 2, 1, score=0.1, nms=0.6)
    assert seen == {3, (2, 0.1, 0.6)}
    if Path("/proc/self/status").is_file():
        seen.clear()
        benchmark._memory_of(load, IMAGE, 3, 2, 0.1, 0.6)
        assert seen == {3, (2, 0.1, 0.6)}


def test_a_contender_that_fails_is_reported_and_the_others_are_timed():
    clock = Clock()
    rows = [
        row("single", FakeLoader(FakeRunner("single", clock, 0.01, batch_limit=1))),
        row("good", FakeLoader(FakeRunner("good", clock, 0.02))),
        row("absent"),
    ]
    rows[2].problems.append("not installed")
    for batch in (1, 4):
        time_rows(rows, IMAGE, 1, batch, 5, clock=clock)
    assert rows[0].timing(1, 1) and rows[0].timing(1, 4) is None
    assert rows[0].problems == ["1 thread, batch 4: only one picture at a time"]
    assert rows[1].timing(1, 1).ratio == pytest.approx(21 / 11)
    assert rows[1].timing(1, 4).ratio == 1  # the reference is the first that runs
    assert "relative to good, fake" in benchmark.legend([rows[2], rows[1]])
    text = table(rows, [(1, 1), (1, 4)])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "cannot run" in lines[2] and "- single, fake: 1 thread, batch 4: only one picture" in text
    assert "- absent, fake: not installed" in text


def test_large_batches_take_fewer_turns():
    assert (runs_of(50, 1), runs_of(160, 16), runs_of(50, 16), runs_of(3, 16)) == (50, 10, 5, 3)


def test_table_puts_ratios_before_times_and_marks_our_models():
    clock = Clock()
    mine = row("mine", FakeLoader(FakeRunner("m", clock, 0.01)), parameters=244_918, macs=300_000_000)
    theirs = row("theirs", FakeLoader(FakeRunner("t", clock, 0.02)), ours=False)
    mine.ap, mine.peak_mib, mine.own_mib = {"easy": 0.9, "medium": 0.8, "hard": 0.7}, 1300.0, 20.0
    time_rows([mine, theirs], IMAGE, 1, 1, 5, clock=clock)
    head, _, first, second = table([mine, theirs], [(1, 1)]).splitlines()
    assert head.index("× ours") < head.index("ms:")
    assert "**mine**" in first and "244,918" in first and "0.9000 / 0.8000 / 0.7000" in first and "1.00 (1.00)" in first
    assert "| 244,918 | 300 |" in first and first.endswith("| 1,300 (20) |")
    assert "| theirs |" in second and "1.91 (2.00)" in second and "21.0, 21.0; network 20.0, 20.0; 47.6/s" in second


def test_pareto_front_keeps_what_nothing_beats():
    points = [(10, 0.8), (5, 0.7), (20, 0.75), (30, 0.9), (5, 0.6)]
    assert pareto_front(points) == [1, 0, 3]
    assert pareto_front([]) == []


def test_plot_shows_only_contenders_with_ap_and_times(tmp_path):
    clock = Clock()
    rows = [row(n, FakeLoader(FakeRunner(n, clock, 0.01)), parameters=1000) for n in "aabc"]
    time_rows(rows[:3], IMAGE, 1, 1, 3, clock=clock)
    for r in (rows[0], rows[1], rows[3]):  # b has no AP, c no time, a two runtimes
        r.ap = {"easy": 0.9, "medium": 0.8, "hard": 0.7}
    assert plot(rows, 1, 1, tmp_path / "new" / "p.png") == 1
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")


def test_plot_takes_the_fastest_runtime_of_a_model(tmp_path, monkeypatch):
    clock, drawn = Clock(), []
    rows = [row("a", FakeLoader(FakeRunner("a", clock, s)), parameters=7, ap={"hard": 0.7}) for s in (0.03, 0.01, 0.02)]
    time_rows(rows, IMAGE, 1, 1, 3, clock=clock)
    monkeypatch.setattr(benchmark, "_draw_front", lambda _, items: drawn.append(items))
    plot(rows, 1, 1, tmp_path / "p.png")
    assert [cost for [(_, cost, _)] in drawn] == [pytest.approx(11), 7]


def test_memory_is_that_of_the_contender_not_of_this_process():
    ballast = np.ones(300 * 2**20, np.uint8)  # must not count: the measurement has its own process
    light, heavy = row("light", Hungry(1)), row("heavy", Hungry(200))
    for r in (light, heavy):
        measure_memory(r, IMAGE, 1, 1)
    assert not light.problems and not heavy.problems
    if light.peak_mib is None:
        pytest.skip("no /proc on this system")
    assert 150 < heavy.own_mib - light.own_mib < 250
    assert light.own_mib < 100 and len(ballast)


# --- peers' decoders, on outputs made by hand -------------------------------------------------------------------------


def bare(kind):
    """A peer without its file."""
    return kind.__new__(kind)


def test_yunet_decoding():
    yunet = bare(peers.YuNet)
    priors = yunet.priors(64, 96)
    assert priors.shape == (8 * 12 + 4 * 6 + 2 * 3, 3)
    cell = 8 * 12 + 1 * 6 + 2  # stride 16, row 1, column 2
    assert priors[cell].tolist() == [32, 16, 16]
    boxes = torch.tensor([[0.5, 0.25, np.log(2.0), np.log(3.0)]])
    points = torch.arange(10).float()[None] / 10
    decoded, landmarks = yunet.decode(boxes, points, priors[[cell]])
    assert decoded.tolist() == [pytest.approx([40 - 16, 20 - 24, 40 + 16, 20 + 24])]
    assert landmarks[0, 4].tolist() == pytest.approx([32 + 0.8 * 16, 16 + 0.9 * 16])


def test_yunet_scores_and_order_of_levels():
    counts = (6, 4, 2)
    outputs = [
        np.full((2, n, k), v, np.float32) for k, v in ((1, 0.64), (1, 0.25), (4, 0.0), (10, 0.0)) for n in counts
    ]
    outputs[0][1, 3] = 0.81
    raw = bare(peers.YuNet).split(outputs, 2)
    assert raw.scores.shape == (2, 12) and raw.boxes.shape == (2, 12, 4) and raw.landmarks.shape == (2, 12, 10)
    assert raw.scores[0, 3].item() == pytest.approx(0.4) and raw.scores[1, 3].item() == pytest.approx(0.45)


def test_scrfd_decoding():
    scrfd = bare(peers.SCRFD)
    priors = scrfd.priors(64, 96)
    assert priors.shape == (2 * (8 * 12 + 4 * 6 + 2 * 3), 3)
    cell = 2 * (1 * 12 + 3)  # stride 8, row 1, column 3, first of its two anchors
    assert priors[cell].tolist() == priors[cell + 1].tolist() == [24, 8, 8]
    decoded, landmarks = scrfd.decode(
        torch.tensor([[1.0, 0.5, 2.0, 3.0]]), torch.tensor([[0.5, -0.5] * 5]), priors[[cell]]
    )
    assert decoded.tolist() == [[16, 4, 40, 32]]
    assert landmarks[0].tolist() == [[28, 4]] * 5


def test_eresfd_priors_are_taller_than_wide_and_it_has_no_landmarks():
    eresfd = bare(peers.EResFD)
    priors = eresfd.priors(480, 640)
    assert len(priors) == sum(h * w for h, w in ((120, 160), (60, 80), (30, 40), (15, 20), (8, 10), (4, 5)))
    assert priors[0].tolist() == [2, 2, 16, 20]
    boxes, landmarks = eresfd.decode(torch.zeros(1, 4), torch.zeros(1, 0), priors[:1])
    assert boxes.tolist() == [[-6, -8, 10, 12]] and landmarks.isnan().all() and landmarks.shape == (1, 5, 2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (peers.YuNet, [30, 20, 10]),  # BGR as it is
        (peers.SCRFD, [(10 - 127.5) / 128, (20 - 127.5) / 128, (30 - 127.5) / 128]),
        (peers.RetinaFace, [30 - 104, 20 - 117, 10 - 123]),
        (peers.EResFD, [10 - 123, 20 - 117, 30 - 104]),
    ],
)
def test_peers_get_their_own_colours_and_zero_padding(kind, expected):
    image = np.tile(np.array([10, 20, 30], np.uint8), (50, 70, 1))
    x = bare(kind).prepare([image, image])
    assert x.shape == ((2, 3, 128, 128) if kind is peers.EResFD else (2, 3, 64, 96))
    assert x[1, :, 49, 69].tolist() == pytest.approx(expected)
    assert not x[:, :, 50:].any() and not x[:, :, :, 70:].any()


class OneBox(peers.OnnxPeer):
    """A peer whose network finds the same: one face twice, one that is weak, one in the padding."""

    def __init__(self):
        self.known_priors = lambda height, width: self.priors(height, width)

    def network(self, x):
        return []

    def split(self, outputs, batch):
        boxes = torch.tensor([[10, 10, 20, 30], [11, 10, 21, 30], [30, 5, 40, 15], [75, 5, 85, 15]]).float()
        scores = torch.tensor([0.8, 0.9, 0.3, 0.95])
        return peers.Raw(scores.repeat(batch, 1), boxes.repeat(batch, 1, 1), torch.zeros(batch, 4, 10))

    def priors(self, height, width):
        return torch.zeros(4, 1)

    def decode(self, boxes, landmarks, priors):
        return boxes, landmarks.unflatten(-1, (5, 2))


def test_peers_threshold_suppress_and_drop_what_lies_in_the_padding():
    image = np.zeros((50, 70, 3), np.uint8)
    faces = OneBox()(image)
    assert faces.boxes.tolist() == [[11, 10, 21, 30]] and faces.scores.tolist() == [pytest.approx(0.9)]
    several = OneBox()([image, np.zeros((20, 90, 3), np.uint8)], score=0.2)
    assert [len(f.scores) for f in several] == [2, 3]
    assert several[1].scores.tolist() == pytest.approx([0.95, 0.9, 0.3])
    assert several[1].boxes[1].tolist() == [11, 10, 21, 20]  # clipped to the picture
    with pytest.raises(ValueError, match="original"):
        OneBox()(image, scale="vga")


def test_peers_use_the_overlap_asked_for_each_pictures_scores_and_the_surest_candidates(monkeypatch):
    class Fading(OneBox):
        """Half as sure of the last picture as of the first."""

        def split(self, outputs, batch):
            raw = super().split(outputs, batch)
            return raw._replace(scores=raw.scores * torch.linspace(1, 0.5, batch)[:, None])

    image = np.zeros((50, 70, 3), np.uint8)
    assert OneBox()(image, nms=0.9).scores.tolist() == pytest.approx([0.9, 0.8])
    assert [f.scores.tolist() for f in Fading()([image, image])] == [[pytest.approx(0.9)], []]
    monkeypatch.setattr(peers, "TOP_K", 2)
    wide = OneBox()(np.zeros((50, 90, 3), np.uint8), score=0.2)
    assert wide.scores.tolist() == pytest.approx([0.95, 0.9])


def test_eresfd_scores_are_of_face_against_background():
    logits = [np.zeros((1, 1, 2), np.float32) + v for v in ([3, 3], [0, 2], [2, 0], [1, 1], [0, 0], [5, 0])]
    raw = bare(peers.EResFD).split([*logits, *(np.zeros((1, 1, 4), np.float32) for _ in range(6))], 1)
    assert raw.scores[0].tolist() == pytest.approx([0.5, 0.8808, 0.1192, 0.5, 0.5, 0.0067], abs=1e-4)


# --- peers' files -----------------------------------------------------------------------------------------------------


def test_every_peer_finds_the_same_one_face(shared):
    folder = shared / "peers"
    image = command.sample_picture(None, 640, 480)
    found = {}
    for name in peers.find_peers(folder):
        runner = peers.load_peer(name, folder)
        found[name], again = runner([image, image], score=0.5)
        assert len(found[name].scores) == 1, name
        assert np.allclose(found[name].boxes, again.boxes, atol=0.01)
    assert set(found) == set(peers.PEERS)
    overlaps = box_iou(*[torch.from_numpy(np.concatenate([f.boxes for f in found.values()]))] * 2)
    assert overlaps.min() > 0.5
    points = [f.landmarks[0] for f in found.values() if not np.isnan(f.landmarks).any()]
    assert len(points) == len(found) - 1  # EResFD has none
    assert max(np.abs(p - points[0]).max() for p in points) < 30  # of a face about 200 px wide
    assert all(p[0, 0] < p[1, 0] and p[2, 1] < p[3, 1] for p in points)


def test_opencv_and_our_decoding_of_yunet_agree(shared):
    image = command.sample_picture(None, 640, 480)
    ours, theirs = (peers.load_peer(n, shared / "peers")(image) for n in ("yunet_n", "yunet_n_opencv"))
    assert np.allclose(ours.boxes, theirs.boxes, atol=0.1) and np.allclose(ours.scores, theirs.scores, atol=1e-3)
    assert np.allclose(ours.landmarks, theirs.landmarks, atol=0.1)


def test_eresfd_with_other_sizes_agrees_with_its_file(shared):
    """640x480 lies on no multiple of 128, so its picture is compared with the same one in a padded input."""
    peer = peers.load_peer("eresfd", shared / "peers")
    image = command.sample_picture(None, 640, 480)
    built_in = peer(image)
    padded = peer(np.pad(image, ((0, 160), (0, 128), (0, 0))))  # 768x640: the path with replaced upsampling
    assert set(peer.sessions) == {True, False}
    overlap = box_iou(*(torch.from_numpy(f.boxes) for f in (built_in, padded)))
    assert overlap.shape == (1, 1) and overlap.item() > 0.8


def test_opencv_s_yunet_takes_the_thresholds_asked_for(shared):
    image = command.sample_picture(None, 640, 480)
    yunet = peers.load_peer("yunet_n_opencv", shared / "peers")
    (score,) = yunet(image, score=0.5).scores.tolist()
    assert [len(yunet(image, score=score + d).scores) for d in (-0.01, 0.01)] == [1, 0]
    assert len(yunet(image, score=0.5, nms=0.99).scores) > 1


def test_peers_compute_with_the_threads_asked_for(shared):
    for name in ("yunet_n", "scrfd_2.5g"):
        session = peers.load_peer(name, shared / "peers", threads=3).session
        assert session.get_session_options().intra_op_num_threads == 3


def test_counts_of_onnx_files(shared):
    parameters, macs = peers.onnx_counts(shared / "peers" / "yunet_n_dynamic.onnx", (640, 480))
    assert 70_000 < parameters < 75_856 and macs == pytest.approx(0.407e9, rel=0.01)
    fixed = peers.onnx_counts(shared / "peers" / "yunet_n_640_640.onnx", (640, 480))
    assert fixed == (parameters, macs)


def test_missing_and_broken_peers_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="none of"):
        peers.find_peers(tmp_path)
    (tmp_path / "yunet_n_dynamic.onnx").write_bytes(b"no model")
    assert peers.find_peers(tmp_path) == ["yunet_n"]
    with pytest.raises(CheckpointError, match=r"yunet_n_dynamic\.onnx: onnxruntime .* cannot run it"):
        peers.load_peer("yunet_n", tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        peers.load_peer("scrfd_2.5g", tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_on_a_random_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_memory", lambda *_: None)  # has a test of its own
    arguments = [
        "--models",
        "config:v2",
        "--backends",
        "onnx",
        "torch",
        "onnx",
        "--size",
        "96x64",
        "--threads",
        "1",
        "1",
    ]
    arguments += ["--batch", "1", "2", "--runs", "3", "--out", str(tmp_path / "deep" / "table.md"), "--json"]
    code = command.main(arguments)
    out = capsys.readouterr().out
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert [r["backend"] for r in result["rows"]] == ["onnxruntime", "PyTorch"]
    for r in result["rows"]:
        assert not r["problems"] and len(r["timings"]) == 2 and r["parameters"] > 200_000 and r["macs"] > 1e6
        assert "easy" not in r
    assert result["rows"][0]["timings"][0]["ratio"] == 1
    assert (tmp_path / "deep" / "table.md").read_text() in out


def test_our_models_compute_with_the_threads_asked_for():
    before = torch.get_num_threads(), contenders.cv2.getNumThreads()
    try:
        contenders.OurLoader(load_config("v2").model, None, "torch", None)(3)
        assert (torch.get_num_threads(), contenders.cv2.getNumThreads()) == (3, 3)
    finally:
        torch.set_num_threads(before[0])
        contenders.cv2.setNumThreads(before[1])


def test_wrong_results_on_a_runtime_are_not_timed():
    def runner(logit):
        return SimpleNamespace(prepare=lambda i: i, network=lambda x: {"logits": torch.full((1, 4), logit)})

    rows = [
        Row("m", "OpenCV", True, FakeLoader(runner(3.0))),
        Row("m", "onnxruntime", True, FakeLoader(runner(0.001))),
        Row("m", "PyTorch", True, FakeLoader(runner(0.0))),
        Row("other", "OpenCV", True, FakeLoader(runner(3.0))),
        Row("nan", "PyTorch", True, FakeLoader(runner(float("nan")))),
    ]
    contenders.verify(rows, IMAGE)
    assert [r.load is None for r in rows] == [True, False, False, False, True]
    assert rows[0].problems == ["wrong results: scores differ from PyTorch's by up to 0.45"]


def test_random_models_are_always_the_same_and_find_no_face():
    cfg = contenders.load_config("v2").model
    x = torch.rand(1, 3, 64, 64) * 255 - 120
    with torch.inference_mode():
        first, second = (contenders.random_model(cfg)(x)["logits"] for _ in range(2))
    assert torch.equal(first, second) and first.sigmoid().max() < 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--models", "config:nope"], 2, "nope"),
        (["--models", "nope"], 1, "nope"),
        (["--models", "--peers", "/nonexistent"], 1, "/nonexistent"),
        (["--models"], 2, "nothing to measure"),
        (["--images", "x"], 2, "--gt"),
        *(([option, "3"], 2, f"{option} is about AP") for option in ("--plot", "--list", "--ap-limit", "--out-preds")),
        (["--resume"], 2, "--out-preds"),
        (["--size", "640"], 2, "WIDTHxHEIGHT"),
    ],
)
def test_mistakes_are_one_line(arguments, code, text, capsys):
    try:
        got = command.main(arguments)
    except SystemExit as e:
        got = e.code
    assert got == code and text in capsys.readouterr().err.splitlines()[-1]


def test_nothing_measured_is_a_failure(monkeypatch, capsys):
    row = Row("v1", "OpenCV", True, None, 1, 1)
    row.problems.append("cannot run deformable convolutions")
    monkeypatch.setattr(command, "our_rows", lambda *_: [row])
    assert command.main(["--models", "v1"]) == 1
    assert "nothing could be measured" in capsys.readouterr().err.splitlines()[-1]


def test_an_exported_file_needs_a_runtime_of_its_own(monkeypatch, tmp_path):
    network = SimpleNamespace(cfg=load_config("v2_ultra").model, pyramid=None)
    monkeypatch.setattr(contenders, "OnnxNetwork", lambda path: network)
    with pytest.raises(ConfigError, match=r"n\.onnx: an exported file runs on onnx or opencv"):
        contenders.our_rows("n.onnx", ["torch"], (64, 64), str(tmp_path))


def test_a_damaged_peer_is_one_line(tmp_path):
    file = tmp_path / "yunet_n_dynamic.onnx"
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=f"{file.name}: not an ONNX file"):
        peers.onnx_counts(file, (64, 64))


def test_missing_pictures_are_told_before_the_long_work(tmp_path, capsys, shared):
    truth, names = shared / "data" / "labels" / "ground_truth", shared / "data" / "labels" / "val_dev.txt"
    arguments = ["--models", "config:v2_ultra", "--images", str(tmp_path), "--gt", str(truth), "--list", str(names)]
    assert command.main(arguments) == 1
    out, err = capsys.readouterr()
    assert not out and str(tmp_path) in err and len(err.splitlines()) == 1


def test_ap_of_predictions_that_are_there_already(tmp_path, shared):
    """--resume: no picture is read and nothing is loaded when every prediction exists."""
    names = command.load_list(shared / "data" / "labels" / "val_dev.txt")[:3]
    truth = command.load_ground_truth(shared / "data" / "labels" / "ground_truth", names)
    for i, name in enumerate(truth.names):
        boxes = truth.boxes[truth.offsets[i] : truth.offsets[i + 1]]
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        contenders.write_predictions(tmp_path, name, boxes, np.linspace(0.9, 0.1, len(boxes)))
    loader = FakeLoader(None)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"weights": fingerprint(loader.source)}))
    os.utime(settings, ns=(0, 0))
    perfect = contenders.average_precision(row("m", loader), tmp_path / "no pictures", truth, tmp_path, resume=True)
    assert perfect["hard"] == pytest.approx(1.0)
    settings.write_text(json.dumps({"weights": "those of another network"}))
    with pytest.raises(OtherSettings, match="weights='those of another network'"):
        contenders.average_precision(row("m", loader), tmp_path / "no pictures", truth, tmp_path, resume=True)


def test_ap_runs_the_contender_on_the_pictures_and_writes_what_it_finds(tmp_path):
    """Two black pictures; the fake finds the face of one of them exactly and nothing in the other."""
    boxes = np.array([[4.0, 5, 20, 30], [1, 2, 25, 25]])
    valid = {subset: np.ones(2, bool) for subset in ("easy", "medium", "hard")}
    truth = GroundTruth(["a/one", "a/two"], boxes, np.array([0, 1, 2]), valid)
    for name, width in (("one", 64), ("two", 65)):
        contenders.cv2.imwrite(str(folder(tmp_path / "in" / "a") / f"{name}.png"), np.zeros((50, width, 3), np.uint8))

    def runner(images, score, nms, **options):
        assert (score, nms, options["scale"]) == (0.02, 0.4, "original")
        found = [np.array([[4.0, 5, 24, 35]]) if i.shape[1] == 64 else np.zeros((0, 4)) for i in images]
        return [Detections(b, np.full(len(b), 0.7), np.zeros((len(b), 5, 2))) for b in found]

    ap = contenders.average_precision(row("m", FakeLoader(runner)), tmp_path / "in", truth, tmp_path / "out")
    assert ap == {"easy": 0.5, "medium": 0.5, "hard": 0.5}
    assert (tmp_path / "out" / "a" / "one.txt").read_text().splitlines()[1] == "1"
    assert (tmp_path / "out" / "a" / "two.txt").read_text().splitlines()[1] == "0"


def test_prediction_folders_are_distinct_and_plain():
    assert command.slug(Row("YuNet-n", "OpenCV", False, None)) == "yunet-n-opencv"
    assert command.slug(Row("YuNet-n", "onnxruntime", False, None)) == "yunet-n-onnxruntime"
    assert command.slug(Row("v2_ultra", "PyTorch", True, None)) == "v2_ultra"
    assert command.slug(Row("SCRFD-2.5G (kps)", "onnxruntime", False, None)) == "scrfd-2.5g--kps--onnxruntime"
