#!/usr/bin/env python3
"""Find faces in pictures, videos or a webcam.

    python detect.py photo.jpg                                 # draws runs/detect/photo.jpg
    python detect.py photos/ --out found --json faces.json
    python detect.py "photos/**/*.jpg" --csv faces.csv --crops crops
    python detect.py party.mp4 --blur --no-draw --out anonymous
    python detect.py webcam:0 --frames 300
    cat photo.jpg | python detect.py - --json

Exit code: 0 = fine, 1 = something could not be read or written (named on stderr), 2 = mistake on the command line, an
output that cannot be begun included.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.detector import FaceDetector
from utils.arguments import fraction, positive
from utils.command import FAILED, FINISHED, UsageError, command, describe, silence_stdout
from utils.image import ImageReadError, further_frames, read_image, write_image
from utils.inputs import STDIN, add_pyramid, add_scale, find_inputs
from utils.results import Results
from utils.video import VideoError, VideoReader, VideoWriter, is_webcam

DEFAULT_OUT = "runs/detect"
CHUNK_PIXELS = 64_000_000  # pictures held in memory at once

Report = Callable[[str], None]


def build_parser() -> argparse.ArgumentParser:
    title, _, usage = __doc__.partition("\n")
    p = argparse.ArgumentParser(
        description=title, epilog=usage.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("inputs", nargs="*", metavar="INPUT", help="picture, folder, pattern, video, webcam:N, or - (stdin)")
    p.add_argument("--weights", help="checkpoint file or name (v2_ultra, v1, ...); default: of --config, or V2 Ultra")
    p.add_argument("--config", help="architecture the weights must have (name or YAML file)")
    p.add_argument(
        "--out",
        metavar="DIR",
        help=f"folder of drawn pictures and videos (default: {DEFAULT_OUT}, or none with --json, --csv or --crops)",
    )
    p.add_argument("--json", nargs="?", const=STDIN, metavar="FILE.json", help="JSON to a file or the last stdout line")
    p.add_argument("--csv", metavar="FILE.csv", help="one line per face")
    p.add_argument("--score", type=fraction, default=0.5, help="keep faces with a score above this (default: 0.5)")
    p.add_argument("--nms", type=fraction, default=0.4, help="IoU above which the weaker box goes (default: 0.4)")
    add_scale(p, "auto")
    p.add_argument("--tta", action="store_true", help="several sizes, each also mirrored: slower, finds more")
    add_pyramid(p)
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: GPU if present)")
    p.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="pictures or frames at once (default: 8)"
    )
    p.add_argument("--backend", choices=["torch", "onnx"], default="torch", help="onnx = onnxruntime, on the CPU")
    p.add_argument("--crops", metavar="DIR", help="save every face, aligned to 112 x 112 pixels")
    p.add_argument("--blur", action="store_true", help="make faces unrecognisable in the drawn output")
    p.add_argument("--no-draw", action="store_true", help="no boxes; without --blur no drawn output at all")
    p.add_argument("--frames", type=positive, metavar="N", help="stop a video or webcam after N frames")
    return p


@command("detect.py")
def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--" in argv:  # what follows are inputs, which argparse forgets where options and inputs are mixed
        end = argv.index("--")
        argv[end:] = [
            os.path.join(os.curdir, name) if name.startswith("-") and name != STDIN else name
            for name in argv[end + 1 :]
        ]
    args = build_parser().parse_intermixed_args(argv)
    if sys.stdout:  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    settle(args)
    return run(args)


def settle(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other arguments, and check what argparse cannot. Raises UsageError."""
    if args.json not in (None, STDIN) and Path(args.json).suffix.lower() != ".json":
        if not (os.path.lexists(args.json) or glob.has_magic(args.json) or is_webcam(args.json)):
            raise UsageError(
                f"--json {args.json}: no such picture, folder or video, and no file's name ending in .json"
            )
        args.inputs.insert(0, args.json)  # `--json photo.jpg` names a picture, not a file to write
        args.json = STDIN
    if STDIN in args.inputs and not sys.stdin:
        raise UsageError("-: stdin is closed")
    if not args.inputs:
        raise UsageError("nothing to do: name a picture, folder, video, webcam:0, or - for stdin (see --help)")
    if args.csv and Path(args.csv).suffix.lower() != ".csv":
        raise UsageError(f"--csv {args.csv}: the file's name must end in .csv")
    if args.no_draw and not args.blur:
        if args.out:
            raise UsageError(f"--out {args.out}: with --no-draw and without --blur nothing is drawn")
    elif args.out is None and (args.blur or not (args.json or args.csv or args.crops)):
        args.out = DEFAULT_OUT


def run(args: argparse.Namespace) -> int:
    """Detect in everything and write the results. Returns the exit code."""
    inputs = find_inputs(args.inputs, skip=[d for d in (args.out, args.crops) if d])
    if args.frames and not inputs.videos:
        raise UsageError("--frames: no video or webcam is among the inputs")
    results = Results(
        inputs.root,
        args.out,
        args.crops,
        args.csv,
        args.json if args.json != STDIN else None,
        keep=bool(args.json),
        boxes=not args.no_draw,
        blur=args.blur,
    )
    results.check(inputs.pictures + inputs.videos)
    detector = FaceDetector.from_pretrained(
        args.weights,
        args.device,
        args.config,
        args.backend,
        score_threshold=args.score,
        nms_threshold=args.nms,
        batch_size=args.batch_size,
        pyramid=args.pyramid,
    )
    problems = []

    def report(problem: str) -> None:
        problems.append(problem)
        tqdm.write(problem, file=sys.stderr)

    for problem in inputs.problems:
        report(problem)
    for note in inputs.notes:
        print(note, file=sys.stderr)
    try:
        with results:
            detect_pictures(inputs.pictures, detector, results, args, report)
            for name in inputs.videos:
                try:
                    detect_video(name, detector, results, args)
                except (VideoError, OSError) as e:
                    report(describe(e))
        if args.json == STDIN:
            say(results.as_json())
    except OSError as e:
        report(describe(e))
    return FAILED if problems else FINISHED


def detect_pictures(
    names: list[str], detector: FaceDetector, results: Results, args: argparse.Namespace, report: Report
) -> None:
    """Detect in picture files, a batch at a time; what cannot be read or written is reported and skipped."""
    with tqdm(total=len(names), unit="picture", disable=None if len(names) > 1 else True) as bar:
        for batch in _batches(names, args.batch_size, report, bar):
            found = detector([image for _, image in batch], scale=args.scale, tta=args.tta)
            for (name, image), faces in zip(batch, found):
                target = results.output(name) if results.out else None
                try:
                    results.add(name, image, faces)
                    if target:
                        write_image(target, results.draw(image, faces))
                except OSError as e:
                    report(describe(e))
                    continue
                if args.json != STDIN:
                    say(_summary(name, len(faces.scores), target))


def detect_video(name: str, detector: FaceDetector, results: Results, args: argparse.Namespace) -> None:
    """Detect in every frame of a video, or of a webcam until Ctrl-C or ``--frames``. Raises VideoError, OSError."""
    faces = 0
    target = results.output(name) if results.out else None
    with VideoReader(name) as reader, VideoWriter(target, reader.fps) if target else nullcontext() as writer:
        frames = enumerate(islice(reader, args.frames))
        total = min(reader.count, args.frames or reader.count) or args.frames
        try:
            with tqdm(total=total, desc=name, unit="frame", disable=None) as bar:
                while batch := list(islice(frames, args.batch_size)):
                    found = detector([image for _, image in batch], scale=args.scale, tta=args.tta)
                    for (index, image), one in zip(batch, found):
                        faces += len(one.scores)
                        results.add(name, image, one, frame=index)
                        if writer:
                            writer.write(results.draw(image, one), reader.times[index])
                    bar.update(len(batch))
        except KeyboardInterrupt:
            if not is_webcam(name):
                raise
        if not args.frames:
            reader.check_end()
    if args.json != STDIN:
        say(_summary(name, faces, target))


def say(text: str) -> None:
    """A line on stdout; where nobody listens (``>&-``), or not any more (``| head``), the work goes on in silence."""
    if not sys.stdout:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()


def _batches(names: list[str], size: int, report: Report, bar: tqdm) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Readable pictures with their names, at most ``size`` and about CHUNK_PIXELS at a time."""
    batch, pixels = [], 0
    for name in names:
        bar.update()
        try:
            image = read_image(sys.stdin.buffer.read(), "stdin") if name == STDIN else read_image(name)
        except ImageReadError as e:
            report(str(e))
            continue
        if name != STDIN and (more := further_frames(name)):
            tqdm.write(f"{name}: its first frame or page alone is searched, {more} more are not", file=sys.stderr)
        batch.append((name, image))
        pixels += image.shape[0] * image.shape[1]
        if len(batch) == size or pixels >= CHUNK_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _summary(name: str, faces: int, target: Path | None) -> str:
    return f"{name}: {faces} face{'' if faces == 1 else 's'}{f' -> {target}' if target else ''}"


if __name__ == "__main__":
    sys.exit(main())
