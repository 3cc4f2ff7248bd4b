"""The web page: what the slider does, the command line, and the page itself in a headless browser."""

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import app
from models.detector import Detections, FaceDetector
from tests.squares import SquareNetwork, picture
from utils.checkpoint import CheckpointError
from utils.image import ImageReadError, read_image

SURE, UNSURE = (30, 20, 70, 76), (90, 10, 110, 40)
AUTO = next(iter(app.SIZES))


@pytest.fixture
def detector():
    return FaceDetector(SquareNetwork(), "cpu")


@pytest.fixture
def photo_file(tmp_path) -> Path:
    """Two faces with scores of 0.999 and about 0.6."""
    image = picture(100, 120, SURE)
    image[UNSURE[1] : UNSURE[3], UNSURE[0] : UNSURE[2]] = 222
    Image.fromarray(image).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_network_runs_once_and_the_slider_filters(detector, photo_file):
    photo = app.look(detector, str(photo_file), AUTO)
    counts = {}
    for score in (0.05, 0.5, 0.8, 0.9999):
        image, rows, _ = app.show(photo, score, boxes=True, blur=False)
        counts[score] = len(rows)
        again = detector(read_image(photo_file), score=score)
        np.testing.assert_array_equal(app.at_least(photo.faces, score).boxes, again.boxes)
        assert image.shape == photo.image.shape and (image != photo.image).any() == bool(rows)
    assert counts == {0.05: 2, 0.5: 2, 0.8: 1, 0.9999: 0}
    assert "**1 face** with a score of at least 0.80, 1 more below it" in app.show(photo, 0.8, True, False)[2]
    assert len(detector.network.batches) == 1 + len(counts)  # one for the page, the others by this test


def test_table(detector, photo_file):
    photo = app.look(detector, str(photo_file), AUTO)
    rows = app.show(photo, 0.5, True, False)[1]
    assert [r[0] for r in rows] == [1, 2] and len(rows[0]) == len(app.COLUMNS)
    assert float(rows[0][1]) > 0.99 and rows[0][2:] == [30, 20, 40, 56] and rows[1][2:] == [90, 10, 20, 30]


def test_boxes_and_blur_are_independent(detector, photo_file):
    photo = app.look(detector, str(photo_file), AUTO)
    before = photo.image.copy()
    plain, boxed = (app.show(photo, 0.5, boxes, False)[0] for boxes in (False, True))
    blurred, both = (app.show(photo, 0.8, boxes, True)[0] for boxes in (False, True))
    np.testing.assert_array_equal(plain, before)
    np.testing.assert_array_equal(photo.image, before)
    assert (boxed != plain).any() and (blurred != plain).any() and (both != blurred).any()
    x1, y1, x2, y2 = UNSURE  # below the score: not blurred
    np.testing.assert_array_equal(blurred[y1:y2, x1:x2], before[y1:y2, x1:x2])


def test_size_decides_what_the_network_sees(detector, photo_file):
    for label, size in app.SIZES.items():
        detector.network.batches.clear()
        app.look(detector, str(photo_file), label)
        [shape] = detector.network.batches
        assert shape[2:] == {"auto": (128, 128), "original": (128, 128), "vga": (544, 640), "1600": (1600, 1920)}[size]


def test_bad_photo(detector, tmp_path):
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(ImageReadError, match=r"^this photo: not a picture"):
        app.look(detector, str(tmp_path / "x.jpg"), AUTO)


def test_without_gradio_one_line_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert app.main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("app.py: ") and "requirements-app.txt" in err and err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--port", "0"], ["--port", "65536"], ["--port", "x"], ["--share"], ["photo.jpg"]])
def test_mistakes_on_the_command_line(argv):
    with pytest.raises(SystemExit) as stop:
        app.main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "argv, code, words",
    [(["--weights", "none.pth"], 1, "none.pth"), (["--device", "cuda:77"], 2, "cuda:77")],
)
def test_bad_weights_and_device(monkeypatch, capsys, argv, code, words):
    monkeypatch.setattr(app, "load_gradio", lambda: None)
    assert app.main(argv) == code
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_the_page_is_for_this_machine_alone_unless_asked(monkeypatch, capsys):
    served = []
    monkeypatch.setattr(app, "load_gradio", lambda: None)
    monkeypatch.setattr(app, "find_weights", lambda name: Path("some.pth"))
    monkeypatch.setattr(FaceDetector, "from_pretrained", lambda *_, pyramid: FaceDetector(SquareNetwork(), "cpu"))
    monkeypatch.setattr(app, "build_page", lambda *_: None)
    monkeypatch.setattr(app, "serve", lambda gradio, page, host, port: served.append((host, port)))
    assert app.main([]) == app.main(["--host", "0.0.0.0", "--port", "8000"]) == 0
    assert served == [("127.0.0.1", None), ("0.0.0.0", 8000)]

    def taken(*_):
        raise app.AppError("cannot serve at 127.0.0.1, port 8000")

    monkeypatch.setattr(app, "serve", taken)
    assert app.main(["--port", "8000"]) == 1
    assert capsys.readouterr().err == "app.py: cannot serve at 127.0.0.1, port 8000\n"


def test_uploads_lie_in_a_folder_of_this_user_alone_while_the_page_is_up(monkeypatch, tmp_path):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with app.uploads_of_our_own():
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "photo.jpg").touch()
    assert not folder.exists() and "GRADIO_TEMP_DIR" not in os.environ
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with app.uploads_of_our_own():
        assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
    assert tmp_path.exists()


def test_sigterm_ends_the_page_as_ctrl_c_does():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        for number in before:
            reached = False
            with app.until_stopped():
                os.kill(os.getpid(), number)
                time.sleep(5)  # not reached
                reached = True
            assert not reached and signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])


def test_a_picture_too_long_for_a_jpeg_is_shown_smaller(detector):
    long = np.full((10, 70_000, 3), 128, np.uint8)
    faces = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2)))
    assert app.show(app.Photo(long, faces), 0.5, boxes=True, blur=False)[0].shape == (2, app.LONGEST, 3)


def test_pyramid_is_handed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(app, "load_gradio", lambda: None)
    monkeypatch.setattr(app, "find_weights", lambda name: Path("some.pth"))

    def from_pretrained(*_, pyramid=None):
        asked.append(str(pyramid))
        raise CheckpointError("enough")

    monkeypatch.setattr(FaceDetector, "from_pretrained", from_pretrained)
    assert app.main(["--pyramid", "1.5"]) == 1 and asked == ["1.5"]


def test_nothing_is_shared_and_uploads_are_limited(monkeypatch):
    """What Gradio, which is not needed here, is asked for."""
    launched = {}

    class Page:
        def launch(self, **options):
            launched.update(options)
            return None, "http://127.0.0.1:7860/", ""

    middleware = SimpleNamespace(Middleware=lambda kind: kind)
    monkeypatch.setitem(sys.modules, "starlette", SimpleNamespace(middleware=middleware))
    monkeypatch.setitem(sys.modules, "starlette.middleware", middleware)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(themes=SimpleNamespace(Soft=lambda **_: None)))
    for key in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(key, "")
    assert app.serve(app.load_gradio(), Page(), "127.0.0.1", None, wait=False) == "http://127.0.0.1:7860/"
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert launched["share"] is False and launched["enable_monitoring"] is False and launched["mcp_server"] is False
    assert launched["server_name"] == "127.0.0.1" and launched["max_file_size"] == "50mb"
    assert launched["app_kwargs"]["middleware"] == [app.LocalOnly]


def test_every_answer_tells_the_browser_to_load_nothing_from_elsewhere():
    sent = []

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"kept")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message):
        sent.append(message)

    asyncio.run(app.LocalOnly(answer)({}, None, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"x"] == b"kept" and headers[b"content-security-policy"].startswith(b"default-src 'self'")
    assert sent[1] == {"type": "http.response.body", "body": b"page"}


def test_an_address_of_another_machine_is_refused_at_once():
    with pytest.raises(app.AppError, match=r"cannot serve at 192\.0\.2\.1"):
        app.serve(None, None, "192.0.2.1", None)


# ---- the page in a browser ----------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
WAIT = 60  # s; a machine busy with training is slow


@pytest.fixture(scope="module")
def gradio():
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs Gradio (make app)")
    return app.load_gradio()


@pytest.fixture
def page(gradio, detector):
    """Address of the page, served from this process."""
    page = app.build_page(gradio, detector, "test")
    yield app.serve(gradio, page, "127.0.0.1", None, wait=False)
    page.close(verbose=False)


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install selenium)")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *(f"user-data-dir={tmp_path / 'chromium'}", "window-size=1280,1100"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def test_taken_port(gradio, detector):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(app.AppError, match=str(port)):
            app.serve(gradio, app.build_page(gradio, detector, "test"), "127.0.0.1", port, wait=False)


@pytest.mark.filterwarnings("ignore::Warning:gradio")  # Gradio's own use of pandas
def test_page_in_a_browser(page, browser, detector, photo_file, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(css: str):
        return WebDriverWait(browser, WAIT).until(lambda b: b.find_elements(By.CSS_SELECTOR, css))[0]

    def wait_for(words: str, css: str = "#summary") -> None:
        WebDriverWait(browser, WAIT, ignored_exceptions=(Exception,)).until(lambda _: words in find(css).text, words)

    def source() -> str:
        return find("#picture img").get_attribute("src")

    browser.get(page)
    find("#photo input[type=file]").send_keys(str(photo_file))
    wait_for("2 faces with a score of at least 0.50")
    table = find("#table").text
    assert all(name in table for name in app.COLUMNS) and "90" in table
    first = source()

    number = find("#score input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("0.8", Keys.ENTER)
    wait_for("1 face with a score of at least 0.80, 1 more below it")
    WebDriverWait(browser, WAIT).until(lambda _: source() != first)
    find("#score input[type=range]").send_keys(Keys.ARROW_LEFT)
    wait_for("at least 0.79")
    second = source()
    find("#blur input").click()
    WebDriverWait(browser, WAIT).until(lambda _: source() != second)
    assert len(detector.network.batches) == 1  # sliding and blurring never ran the network

    find("#size input[value^=small]").click()
    WebDriverWait(browser, WAIT).until(lambda _: len(detector.network.batches) == 2)

    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded and all(url.startswith((page, "data:", "blob:")) for url in loaded)
    errors = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not errors  # a refused outside resource would be listed here

    assert not browser.find_elements(By.CSS_SELECTOR, ".toast-body")  # typing 0.8 passes 0, which is no error

    (tmp_path / "x.jpg").write_text("no picture")
    browser.get(page)
    find("#photo input[type=file]").send_keys(str(tmp_path / "x.jpg"))
    wait_for("this photo: not a picture", ".toast-body")
