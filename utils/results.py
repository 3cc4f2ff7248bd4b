"""Where ``detect.py`` puts what it finds: drawn pictures and videos, face crops, JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from utils.command import UsageError
from utils.draw import align_face, blur_faces, draw_detections
from utils.files import naming, whole
from utils.image import WRITABLE_SUFFIXES, write_image
from utils.inputs import STDIN
from utils.video import CODECS, VIDEO_SUFFIXES, is_webcam

if TYPE_CHECKING:
    from models.detector import Detections

POINTS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
COLUMNS = ["file", "frame", "face", "score", "x1", "y1", "x2", "y2", *(f"{p}_{axis}" for p in POINTS for axis in "xy")]
CROP = re.compile(r"(?P<base>(?P<frame>.+)_\d{6,}|.+)_\d{2,}\.png")  # of a picture, or of a frame of a video


class Results(AbstractContextManager):
    """Collects and writes results; paths of results repeat the inputs' paths relative to ``root``.

    Args:
        root: the folder that the inputs lie in.
        out: folder of drawn pictures and videos; None = none.
        crops: folder of aligned face crops; None = none.
        csv_file: table to write; None = none.
        json_file: file that :meth:`as_json` is written to at the end, or after Ctrl-C what there is; None = none.
        keep: remember the faces for :meth:`as_json`.
        boxes, blur: what the drawn pictures show.
    """

    def __init__(
        self,
        root: str,
        out: str | None = None,
        crops: str | None = None,
        csv_file: str | None = None,
        json_file: str | None = None,
        keep: bool = False,
        boxes: bool = True,
        blur: bool = False,
    ):
        self.root, self.out, self.crops, self.csv_file, self.json_file = root, out, crops, csv_file, json_file
        self.keep, self.boxes, self.blur = keep, boxes, blur
        self._images: list[dict] = []
        self._file: TextIO | None = None
        self._json: Path | None = None  # until the end, when it takes json_file's place
        self._whole = ExitStack()
        self._table: csv.DictWriter | None = None

    def __enter__(self) -> Results:
        """Make the output folders and start the files. Raises UsageError where that is impossible."""
        try:
            files = [f for f in (self.csv_file, self.json_file) if f]
            for folder in (self.out, self.crops, *(Path(f).parent for f in files)):
                if folder:
                    os.makedirs(folder, exist_ok=True)
            with ExitStack() as stack:
                if self.json_file:
                    self._json = stack.enter_context(whole(self.json_file))
                    self._json.touch()
                if self.csv_file:  # a name that is not UTF-8 is escaped
                    self._file = open(self.csv_file, "w", newline="", encoding="utf-8", errors="backslashreplace")
                    self._table = csv.DictWriter(self._file, COLUMNS)
                    self._table.writeheader()
                self._whole = stack.pop_all()
        except OSError as e:
            raise UsageError(f"{e.filename}: cannot write there ({e.strerror})") from None
        return self

    def __exit__(self, *_) -> None:
        """Raises OSError where the rest cannot be written; the other file is written all the same."""
        try:
            if self._json:
                with self._whole:
                    self._json.write_text(self.as_json() + "\n", encoding="utf-8")
        finally:
            if self._file:
                with naming(self.csv_file):
                    self._file.close()

    def check(self, inputs: Iterable[str]) -> None:
        """Raises UsageError when an output would overwrite an input or another output."""
        inputs = list(inputs)
        made_from: dict[Path, str] = {}  # output -> input
        for name in inputs if self.out else ():
            target = self.output(name)
            other = made_from.setdefault(target, name)
            if os.path.abspath(other) != os.path.abspath(name):
                raise UsageError(f"{name}: would be drawn to {target}, as {other} is; give each a folder of its own")
        sources = {os.path.realpath(i) for i in inputs if i != STDIN and not is_webcam(i)}
        bases = {os.path.realpath(self._below(self.crops, name)): name for name in inputs} if self.crops else {}
        for source in sources:
            if (crop := CROP.fullmatch(source)) and (name := bases.get(crop["base"]) or bases.get(crop["frame"])):
                raise UsageError(
                    f"{source}: a crop of {name} would be written there; choose another folder for --crops"
                )
        for target in [*made_from, *([self.csv_file] if self.csv_file and inputs else [])]:
            if os.path.realpath(target) in sources:
                raise UsageError(f"{target}: would overwrite an input; choose another folder")

    def add(self, name: str, image: np.ndarray, found: Detections, frame: int | None = None) -> None:
        """Record the faces of one picture, or of one frame of a video, and save its crops. Raises OSError."""
        faces = found.as_dicts() if self.keep or self._table else []
        if self.keep:
            self._images.append({"file": name, **({} if frame is None else {"frame": frame}), "faces": faces})
        if self._table:
            for i, face in enumerate(faces):
                points = [v for point in face["landmarks"] for v in point]
                row = [name, "" if frame is None else frame, i, face["score"], *face["box"], *points]
                with naming(self.csv_file):
                    self._table.writerow(dict(zip(COLUMNS, row, strict=True)))
        if self.crops:
            base = self._below(self.crops, name)
            stem = base.name if frame is None else f"{base.name}_{frame:06d}"
            for i, points in enumerate(found.landmarks):
                write_image(base.with_name(f"{stem}_{i:02d}.png"), align_face(image, points))

    def draw(self, image: np.ndarray, found: Detections) -> np.ndarray:
        """The picture as it is to be shown: faces blurred and boxes drawn, as chosen."""
        if self.blur:
            image = blur_faces(image, found.boxes)
        return draw_detections(image, *found) if self.boxes else image

    def output(self, name: str) -> Path:
        """File of the drawn picture or video; kinds that cannot be written become .png or .mp4."""
        path = self._below(self.out, name)
        if is_webcam(name) or path.suffix.lower() in VIDEO_SUFFIXES:
            known, other = {".mp4", *CODECS}, ".mp4"
        else:
            known, other = WRITABLE_SUFFIXES, ".png"
        return path if path.suffix.lower() in known else path.with_name(path.name + other)

    def as_json(self) -> str:
        """``{"images": [{"file", "faces": [{"box", "score", "landmarks"}]}]}``; frames of videos also have "frame"."""
        return json.dumps({"images": self._images})

    def _below(self, folder: str, name: str) -> Path:
        if name == STDIN:
            return Path(folder, "stdin")
        if is_webcam(name):
            return Path(folder, name.replace(":", ""))
        return Path(folder, os.path.relpath(os.path.abspath(name), self.root))
