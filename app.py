#!/usr/bin/env python3
"""A web page on this machine: drop a photo, see the faces, move the score slider.

    make app                       # installs Gradio (requirements-app.txt) and opens the page's server
    python app.py --weights v1 --port 8000

The network runs once per photo and size, at a low score; the slider, the boxes and the blur only redraw. Photos stay on
this machine: the page sends nothing to anywhere else and loads nothing from there (a request written by hand can have
Gradio fetch a picture from the web). Uploads lie in a folder of this user's alone, and are deleted after an hour or
when the page is stopped.

Exit code: 0 = the page was stopped by Ctrl-C or SIGTERM, 1 = weights or port cannot be used, 2 = mistake on the command
line or no Gradio.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from data.images import shrink
from models.detector import Detections, FaceDetector, pick_device
from utils.arguments import number
from utils.command import FINISHED, NotInstalled, Problem, command
from utils.draw import blur_faces, draw_detections
from utils.image import ImageReadError, read_image
from utils.inputs import add_pyramid
from utils.weights import DEFAULT, find_weights

# the slider's ends and start; the network is asked for everything from the left end on
LEAST_SCORE, MOST_SCORE, FIRST_SCORE = 0.05, 0.95, 0.5
SIZES = {
    "automatic (recommended)": "auto",
    "as it is": "original",
    "small: 640 px, fastest": "vga",
    "large: 1600 px, for tiny faces": "1600",
}
COLUMNS = ["face", "score", "x", "y", "width", "height"]
KEPT_SECONDS = 3600  # uploads and drawn pictures
UPLOAD_LIMIT = "50mb"
LONGEST = 16384  # px: JPEG has no longer sides than 65,500, and browsers draw few that come near
# The page is served whole from here; the browser is told to refuse anything that would come from elsewhere.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob: ws: wss:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#summary { min-height: 1.6em; font-size: 1.05em; }
"""


class AppError(Problem, RuntimeError):
    """The page cannot be offered; one line."""


@dataclass(frozen=True)
class Photo:
    """A photo with every face that the slider can show."""

    image: np.ndarray  # [H, W, 3] RGB uint8
    faces: Detections  # scores of at least LEAST_SCORE, best first


def look(detector: FaceDetector, path: str, size: str) -> Photo:
    """Read a photo and run the network on it.

    Args:
        size: a key of :data:`SIZES`.

    Raises:
        ImageReadError: the file is no picture, damaged or far too large.
    """
    image = read_image(path, "this photo")
    return Photo(image, detector(image, score=LEAST_SCORE, scale=SIZES[size]))


def at_least(faces: Detections, score: float) -> Detections:
    """The faces with at least this score, as if the network had been run with it.

    NMS keeps or drops a box because of surer ones only, so dropping unsure boxes afterwards gives the same faces. Where
    two sizes are merged by box voting unsure boxes vote, too, so there coordinates differ, now and then by some pixels.
    """
    keep = faces.scores >= score
    return Detections(faces.boxes[keep], faces.scores[keep], faces.landmarks[keep])


def show(photo: Photo, score: float, boxes: bool, blur: bool) -> tuple[np.ndarray, list[list], str]:
    """What the page shows of a photo: the picture, the rows of the table and a line of text."""
    faces = at_least(photo.faces, score)
    image = blur_faces(photo.image, faces.boxes) if blur else photo.image
    if boxes:
        image = draw_detections(image, *faces)
    image = shrink(image, LONGEST)
    count = len(faces.scores)
    hidden = len(photo.faces.scores) - count
    text = f"**{count} face{'' if count == 1 else 's'}** with a score of at least {score:.2f}"
    if hidden:
        text += f", {hidden} more below it"
    return image, rows(faces), text


def rows(faces: Detections) -> list[list]:
    """Table of faces: number, score, left, top, width, height; pixels."""
    sizes = faces.boxes[:, 2:] - faces.boxes[:, :2]
    return [
        [number, f"{score:.3f}", *(round(v) for v in (*box[:2].tolist(), *size.tolist()))]
        for number, (score, box, size) in enumerate(zip(faces.scores, faces.boxes, sizes), start=1)
    ]


def load_gradio() -> ModuleType:
    """Gradio, without its usage statistics.

    Raises:
        NotInstalled: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as e:
        raise NotInstalled(
            f"the page needs Gradio, which is not installed here ({e}): run `make app`, "
            "or `pip install -r requirements-app.txt`"
        ) from None
    return gradio


def build_page(gr: ModuleType, detector: FaceDetector, name: str) -> Any:
    """The page, a ``gradio.Blocks``; ``name`` says which network finds the faces."""
    empty = (None, [], "")

    def detect(path: str | None, size: str) -> Photo | None:
        try:
            return look(detector, path, size) if path else None
        except ImageReadError as e:  # an error of Gradio's would leave the faces of the photo before on the page
            gr.Warning(str(e), title="Cannot read this photo", duration=None)
            return None

    def draw(photo: Photo | None, score: float, boxes: bool, blur: bool) -> tuple:
        return show(photo, score, boxes, blur) if photo else empty

    with gr.Blocks(title="FeatherFace", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gr.Markdown(f"# FeatherFace\nDrop a photo, see the faces. Nothing leaves this machine. Network: {name}.")
        found = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                path = gr.Image(
                    label="Photo",
                    type="filepath",
                    sources=["upload", "clipboard", "webcam"],
                    height=220,
                    elem_id="photo",
                )
                # Hand over the file as it is: our reader knows EXIF orientation, transparency and 16-bit samples, and
                # says in plain words what is wrong with a file.
                path.preprocess = lambda upload: upload.path if upload else None
                score = gr.Slider(
                    LEAST_SCORE,
                    MOST_SCORE,
                    FIRST_SCORE,
                    step=0.01,
                    label="Least score",
                    info="Further left: more faces, more mistakes.",
                    elem_id="score",
                )
                # Somebody typing 0.3 passes through 0, which Gradio would complain about.
                score.preprocess = lambda value: min(max(value or 0.0, LEAST_SCORE), MOST_SCORE)
                size = gr.Radio(list(SIZES), value=next(iter(SIZES)), label="Size to search at", elem_id="size")
                with gr.Row():
                    boxes = gr.Checkbox(True, label="Draw boxes", elem_id="boxes")
                    blur = gr.Checkbox(False, label="Blur faces", elem_id="blur")
            with gr.Column(scale=2, min_width=400):
                picture = gr.Image(
                    label="Faces",
                    format="jpeg",
                    interactive=False,
                    height=500,
                    buttons=["download", "fullscreen"],  # not Gradio's own "share", which would upload the picture
                    elem_id="picture",
                )
                text = gr.Markdown(elem_id="summary")
        table = gr.Dataframe(
            headers=COLUMNS, type="array", interactive=False, label="Faces (pixels)", max_height=320, elem_id="table"
        )
        settings, outputs = [found, score, boxes, blur], [picture, table, text]
        for change in (path.change, size.change):
            change(detect, [path, size], found).then(draw, settings, outputs)
        for change in (score.change, boxes.change, blur.change):
            # only the last of many slider positions is drawn
            change(draw, settings, outputs, show_progress="hidden", trigger_mode="always_last")
    return page


def serve(gr: ModuleType, page: Any, host: str, port: int | None, wait: bool = True) -> str:
    """Start the server; -> the page's address. With ``wait``, returns when Ctrl-C ends it.

    Raises:
        AppError: the port is taken or the address is not this machine's.
    """
    try:  # Gradio would take an address that is not ours for ports in use, and try a hundred
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as e:
        raise AppError(f"cannot serve at {host}: {e.strerror or e}") from None
    from starlette.middleware import Middleware  # comes with Gradio

    fonts = ["system-ui", "sans-serif"]
    for key in ("NO_PROXY", "no_proxy"):  # Gradio asks its own address whether it is up
        os.environ[key] = ",".join(filter(None, (os.environ.get(key), "127.0.0.1", "localhost", host)))
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            theme=gr.themes.Soft(primary_hue="emerald", font=fonts, font_mono=["monospace"]),
            css=CSS,
            footer_links=[],
            max_file_size=UPLOAD_LIMIT,
            show_error=True,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(LocalOnly)]},
        )
    except OSError:
        ports = f"port {port} is" if port else "the ports from 7860 on are"
        raise AppError(f"cannot serve at {host}: {ports} taken, choose another --port") from None
    if wait:
        print(f"FeatherFace is at {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return address


class LocalOnly:
    """ASGI middleware: every page carries :data:`CONTENT_POLICY`."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def build_parser() -> argparse.ArgumentParser:
    title, _, usage = __doc__.partition("\n")
    p = argparse.ArgumentParser(
        description=title, epilog=usage.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--weights", default=DEFAULT, help="checkpoint file or name: v2_ultra (default), v1, ...")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: GPU if present)")
    add_pyramid(p)
    p.add_argument(
        "--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 = whole network (default: %(default)s)"
    )
    p.add_argument("--port", type=_port, help="default: the first free one from 7860")
    return p


@command("app.py")
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with uploads_of_our_own():
        gradio = load_gradio()
        device = pick_device(args.device)
        weights = find_weights(args.weights)
        detector = FaceDetector.from_pretrained(weights, device, pyramid=args.pyramid)
        page = build_page(gradio, detector, f"{weights.stem} on {detector.device}")
        with until_stopped():
            serve(gradio, page, args.host, args.port)
    return FINISHED


@contextlib.contextmanager
def uploads_of_our_own() -> Iterator[None]:
    """Gradio keeps uploads and drawn pictures in a new folder that other users cannot read; gone in the end.

    Where ``GRADIO_TEMP_DIR`` names a folder, it is the user's choice and stays.
    """
    if "GRADIO_TEMP_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="featherface-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read at import and whenever a component is made
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """Ctrl-C, and the SIGTERM by which services are told to end, end what is within; no error."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _port(text: str) -> int:
    value = number(text, int, "a port (1 to 65535)")
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port (1 to 65535)")
    return value


if __name__ == "__main__":
    sys.exit(main())
