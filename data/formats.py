"""Readers of other tools' face labels; bad entries are reported with file and line."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.images import image_size
from data.labels import ImageError, LabelError, read_labels, read_text
from utils.command import UsageError
from utils.image import IMAGE_SUFFIXES

NO_LANDMARKS = [-1.0] * 15  # five times x y flag, as RetinaFace label files write it
LARGEST_FRACTION = 1.5  # of the image's size, that a box may reach to; what is larger are pixels


@dataclass
class Face:
    """One face to write: box xywh in pixels, 15 landmark numbers (x y flag), quality, ignore."""

    box: list[float]
    landmarks: list[float] = field(default_factory=lambda: list(NO_LANDMARKS))
    quality: float = 0.0
    ignore: bool = False
    source: str = ""  # "file:line", for messages


@dataclass
class LabelledImage:
    """One image of the source labels."""

    name: str  # as it shall be listed, relative
    path: Path
    faces: list[Face]
    source: str = ""
    size: tuple[int, int] | None = None  # (width, height) that the labels were made for, when they say so
    complete: bool = True  # False: a box of it cannot be read; that face would be taught to be background


class UnknownClass(UsageError, LabelError):
    """A class was asked for that the labels do not have."""


Report = list[str]


def read_retinaface(src: Path, images: Path, problems: Report) -> list[LabelledImage]:
    """RetinaFace ``label.txt``."""
    labels = read_labels(src)
    problems += labels.problems
    result = []
    for i, name in enumerate(labels.names):
        faces = labels.faces(i)
        rows = range(labels.offsets[i], labels.offsets[i + 1])
        result.append(
            LabelledImage(
                name,
                images / name,
                [
                    Face(
                        _xywh(faces.boxes[j]),
                        _flags(faces.landmarks[j]) if faces.has_landmarks[j] else list(NO_LANDMARKS),
                        float(labels.quality[row]),
                        bool(faces.ignore[j]),
                        f"{src}:{labels.lines[row]}",
                    )
                    for j, row in enumerate(rows)
                ],
                str(src),
            )
        )
    return result


def read_wider(src: Path, images: Path, problems: Report) -> list[LabelledImage]:
    """WIDERFace's ``wider_face_*_bbx_gt.txt``: name, count, then per face x y w h and six attributes.

    Faces marked invalid become ignored ones. Blur and occlusion (0 to 2) become a quality in (0, 1] for the curriculum.
    """
    lines = read_text(src).splitlines()
    result: list[LabelledImage] = []
    at = 0
    while at < len(lines):
        name = lines[at].strip()
        at += 1
        if not name:
            continue
        if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
            problems.append(f"{src}:{at}: expected an image name, found '{name[:60]}'")
            if result:  # perhaps a face more than its number says
                result[-1].complete = False
            continue
        image = LabelledImage(name, images / name, [], f"{src}:{at}")
        result.append(image)
        count = lines[at].strip() if at < len(lines) else ""
        if not count.isdigit():
            problems.append(f"{src}:{at + 1}: expected the number of faces of {name}, found '{count[:60]}'")
            image.complete = False
            continue
        at += 1
        for _ in range(max(1, int(count))):  # an image without faces still has one line of zeros
            if at >= len(lines) or Path(lines[at].strip()).suffix.lower() in IMAGE_SUFFIXES:
                if int(count):
                    problems.append(f"{src}:{at}: fewer than {count} faces listed for {name}")
                    image.complete = False
                break
            at += 1
            v = _numbers(lines[at - 1].split(), f"{src}:{at}", problems, (4, 10))
            if not int(count):
                continue
            face = _add(image, v and v[:4], f"{src}:{at}", problems)
            if face and len(v) == 10:
                face.quality = 1 - (v[4] + v[8]) / 5  # blur and occlusion
                face.ignore = v[7] > 0
    return result


def read_voc(src: Path, images: Path, problems: Report, classes: set[str] | None = None) -> list[LabelledImage]:
    """A folder of Pascal VOC XML files; every object counts as a face unless ``classes`` names some.

    Objects marked difficult become ignored faces.
    """
    files = sorted(src.rglob("*.xml")) if src.is_dir() else []
    if not files:
        raise LabelError(f"{src}: no VOC XML files (give the folder that holds them)")
    result, seen = [], set()
    for file in files:
        try:
            root = ET.parse(file).getroot()
        except ET.ParseError as e:
            problems.append(f"{file}:{e.position[0]}: not valid XML ({e.msg if hasattr(e, 'msg') else e})")
            continue
        except (ValueError, LookupError) as e:  # GBK, Shift_JIS, ...
            problems.append(f"{file}: its encoding cannot be read ({e}); save it as UTF-8")
            continue
        name = (root.findtext("filename") or "").strip()
        path = _find(images, name, file.relative_to(src).with_suffix(""))
        if path is None:
            problems.append(f"{file}: its image '{name or file.stem}' is not in {images}")
            continue
        try:
            size = (int(float(root.findtext("size/width") or 0)), int(float(root.findtext("size/height") or 0)))
        except ValueError:
            size = (0, 0)
        image = LabelledImage(path.relative_to(images).as_posix(), path, [], str(file), size if all(size) else None)
        for number, item in enumerate(root.iter("object"), start=1):
            name = (item.findtext("name") or "").strip()
            seen.add(name)
            if classes and name not in classes:
                continue
            where = f"{file}: object {number}"
            edges = [item.findtext(f"bndbox/{k}") or "" for k in ("xmin", "ymin", "xmax", "ymax")]
            v = _numbers(edges, where, problems, (4,))
            face = _add(image, v and [v[0], v[1], v[2] - v[0], v[3] - v[1]], where, problems)
            if face:
                face.ignore = _is_true(item.findtext("difficult"))
        result.append(image)
    _check_classes(classes, seen, src)
    return result


def read_coco(src: Path, images: Path, problems: Report, classes: set[str] | None = None) -> list[LabelledImage]:
    """COCO JSON: ``bbox`` is x y w h; five ``keypoints``, all labelled, are landmarks; ``iscrowd`` means ignored."""
    try:
        tree = json.loads(read_text(src))
    except ValueError as e:
        raise LabelError(f"{src}: not valid JSON ({e})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("images"), list):
        raise LabelError(f"{src}: not COCO: no list of images at the top")
    wanted = known = None
    if classes:
        categories = [c for c in tree.get("categories") or [] if isinstance(c, dict)]
        _check_classes(classes, {str(c.get("name")) for c in categories}, src)
        wanted = [c.get("id") for c in categories if c.get("name") in classes]
        known = [c.get("id") for c in categories]
    result: dict = {}
    for number, item in enumerate(tree["images"]):
        if not isinstance(item, dict) or not _is_id(item.get("id")) or not isinstance(item.get("file_name"), str):
            problems.append(f"{src}: images[{number}]: needs an id (a number or text) and a file_name")
            continue
        if item["id"] in result:  # whose are the boxes of this id?
            first = result[item["id"]].source.removeprefix(f"{src}: ")
            raise LabelError(f"{src}: images[{number}]: its id {item['id']!r} is that of {first}")
        size = (item.get("width"), item.get("height"))
        told = all(isinstance(s, int) and s > 0 for s in size)
        name = item["file_name"].replace("\\", "/")
        result[item["id"]] = LabelledImage(name, images / name, [], f"{src}: images[{number}]", size if told else None)
    annotations, lost = tree.get("annotations") or [], {"image_id": 0, "category_id": 0}
    for number, item in enumerate(annotations):
        where = f"{src}: annotations[{number}]"
        if not isinstance(item, dict) or not _is_id(item.get("image_id")) or item["image_id"] not in result:
            problems.append(f"{where}: its image_id is not in the list of images")
            lost["image_id"] += 1
            continue
        image = result[item["image_id"]]
        if known is not None and item.get("category_id") not in known:
            problems.append(f"{where}: its category_id is not in the list of categories")
            image.complete = False  # it may be a face
            lost["category_id"] += 1
            continue
        if wanted is not None and item.get("category_id") not in wanted:
            continue
        face = _add(image, _numbers(item.get("bbox"), where, problems, (4,)), where, problems)
        if face is None:
            continue
        face.ignore = _is_true(item.get("iscrowd"))
        points = item.get("keypoints")
        if isinstance(points, list) and len(points) == 15:
            v = _numbers(points, where, problems, (15,))
            if v is not None and min(v[2::3]) > 0:
                face.landmarks = _flags(np.array(v).reshape(5, 3)[:, :2])
    for key, count in lost.items():
        if annotations and count == len(annotations):
            raise LabelError(f"{src}: no annotation's {key} is in the file's list of them (1 and '1' are two ids)")
    return list(result.values())


def read_yolo(src: Path, images: Path, problems: Report, classes: set[str] | None = None) -> list[LabelledImage]:
    """A folder of YOLO txt files: class, centre x, centre y, width, height as fractions, perhaps five landmarks.

    Landmarks are ``x y`` or ``x y visible`` fractions; visible 0 (not labelled) or negative numbers mean none. Outlines
    are refused; one of seven points looks like a box and landmarks, so the other lines must tell, or places that no
    landmarks have. An empty file is an image without faces; images without a file are left out, and counted in one line
    of ``problems``. ``classes`` are the numbers as written.
    """
    files = sorted(p for p in src.rglob("*.txt") if p.name != "classes.txt") if src.is_dir() else []
    if not files:
        raise LabelError(f"{src}: no YOLO txt files (give the folder that holds them)")
    result, seen = [], set()
    outlines, perhaps = 0, []  # lines that are outlines of faces, and those that may be such of seven points
    for file in files:
        path = _find(images, "", file.relative_to(src).with_suffix(""))
        if path is None:
            problems.append(f"{file}: no image of this name in {images}")
            continue
        try:
            w, h = image_size(path)
        except ImageError as e:
            problems.append(str(e))
            continue
        image = LabelledImage(path.relative_to(images).as_posix(), path, [], str(file))
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            if not line.strip():
                continue
            where, fields = f"{file}:{number}", line.split()
            seen.add(fields[0])
            if classes and fields[0] not in classes:
                continue
            outlines += len(fields) >= 7 and len(fields) % 2 == 1 and len(fields) != 15
            v = _numbers(fields, where, problems, (5, 15, 20))
            if v and max(abs(x) for x in v[1:5]) > LARGEST_FRACTION:
                problems.append(f"{where}: expected fractions of the image's size, found {fields[1:5]}")
                v = None
            box = v and [(v[1] - v[3] / 2) * w, (v[2] - v[4] / 2) * h, v[3] * w, v[4] * h]
            face = _add(image, box, where, problems)
            if face and len(v) > 5:
                points = np.array(v[5:]).reshape(5, -1)
                if (points[:, :2] >= 0).all() and (points.shape[1] == 2 or (points[:, 2] > 0).all()):
                    face.landmarks = _flags(points[:, :2] * (w, h))
                    if (np.abs(points[:, :2] - v[1:3]) > v[3:5]).any():
                        problems.append(f"{where}: landmarks far outside their box (perhaps an outline)")
                        image.complete = False
            if len(fields) == 15:
                perhaps.append((image, where))
        result.append(image)
    for image, where in perhaps if outlines >= len(perhaps) else ():  # not one bad line among many with landmarks
        problems.append(f"{where}: 15 numbers, in labels that hold outlines: left out as an outline of seven points")
        image.complete = False
    _check_classes(classes, seen, src)
    known = {image.path for image in result}
    rest = sum(p.suffix.lower() in IMAGE_SUFFIXES and p not in known for p in images.rglob("*"))
    if rest:
        problems.append(f"{images}: {rest} photos have no label file (an empty one says that there is no face)")
    return result


def _add(image: LabelledImage, box: list[float] | None, where: str, problems: Report) -> Face | None:
    """Give the image a face, unless its box ``xywh`` makes no sense: then the image is no longer ``complete``."""
    if box and min(box[2:]) < 0:
        problems.append(f"{where}: box of size {box[2]:g} x {box[3]:g}: corners exchanged?")
        box = None
    if box is None:
        image.complete = False
        return None
    image.faces.append(Face(box, source=where))
    return image.faces[-1]


def _check_classes(classes: set[str] | None, seen: set[str], src: Path) -> None:
    for name in sorted((classes or set()) - seen):
        raise UnknownClass(f"--classes {name}: {src} has no such class (it has: {', '.join(sorted(seen)) or 'none'})")


def _is_true(value) -> bool:
    """A flag as tools write it: 1, true or yes, as text too; missing or anything else is false."""
    return str(value).strip().lower() in ("1", "1.0", "true", "yes")


def _is_id(value) -> bool:
    return isinstance(value, (int, float, str))


def _numbers(fields, where: str, problems: Report, counts: tuple[int, ...]) -> list[float] | None:
    """The fields as finite numbers, or None with a problem noted."""
    if not isinstance(fields, list) or len(fields) not in counts:
        found = len(fields) if isinstance(fields, list) else repr(fields)
        problems.append(f"{where}: expected {' or '.join(map(str, counts))} numbers, found {found}")
        return None
    values = []
    for text in fields:
        try:
            value = float(text)
        except (TypeError, ValueError):
            problems.append(f"{where}: '{text}' is not a number")
            return None
        if not np.isfinite(value):
            problems.append(f"{where}: '{text}' is not finite")
            return None
        values.append(value)
    return values


def _find(images: Path, name: str, stem: Path) -> Path | None:
    """The image of a label file: by the path or name it states, else by its own path with any image suffix."""
    file = Path(name.replace("\\", "/"))
    stated = [images / file] if len(file.parts) > 1 else []  # a bare name is first one beside the label file
    for candidate in [*stated, images / stem.parent / file.name, images / file.name] if name else []:
        if candidate.is_file() and candidate.is_relative_to(images):
            return candidate
    for suffix in sorted(IMAGE_SUFFIXES):
        for variant in (suffix, suffix.upper()):
            candidate = images / f"{stem}{variant}"
            if candidate.is_file():
                return candidate
    return None


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(v) for v in box)
    return [x0, y0, x1 - x0, y1 - y0]


def _flags(points: np.ndarray) -> list[float]:
    """``[5, 2]`` -> x y 0, five times (0 = visible)."""
    return [float(v) for x, y in points for v in (x, y, 0.0)]


READERS = {
    "wider": read_wider,
    "retinaface": read_retinaface,
    "voc": read_voc,
    "coco": read_coco,
    "yolo": read_yolo,
}
