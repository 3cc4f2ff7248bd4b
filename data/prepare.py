"""Turn face labels of other formats into this project's: ``OUT/label.txt`` and ``OUT/images``.

    python -m data.prepare --format wider wider_face_split.zip/wider_face_split/wider_face_train_bbx_gt.txt \\
        --images WIDER_train.zip/WIDER_train/images --out data/full/train
    python -m data.prepare --format voc annotations/ --images photos/ --out data/user/train --val-fraction 0.1

Labels and images may lie in zip archives. They are unpacked to ``OUT/unpacked``, where ``OUT/images`` then links to (or
with --copy does not). Bad entries are reported with file and line and left out; the input is never changed. Exit code
0: done, with or without problems (their number is printed); 1: nothing usable or unreadable input; 2: a mistake
on the command line.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.archive import unpacked
from data.formats import LARGEST_FRACTION, READERS, Face, LabelledImage
from data.images import read_photo
from data.labels import DataError, ImageError, LabelError
from data.select import select_names
from utils.command import FINISHED, command
from utils.files import whole

SHOWN = 20  # problems printed; all of them go to OUT/problems.txt
ROUNDING = 1e-6  # px; x + w - x is not always w


def check_images(found: list[LabelledImage], problems: list[str]) -> list[LabelledImage]:
    """Leave out images that cannot be read, are listed twice with other faces, differ in size from what the labels say
    or have a box that cannot be read, second lists of the same faces, and boxes without area or outside their image;
    clip boxes to the image. Everything left out is added to ``problems``.

    Raises:
        LabelError: the boxes are fractions of the images' sizes.
    """
    boxes = [face.box for image in found for face in image.faces]
    edges = [max(x + w, y + h) for x, y, w, h in boxes if w > 0 and h > 0]
    if edges and max(edges) <= LARGEST_FRACTION:
        raise LabelError(
            f"{found[0].source}: no box of these labels reaches beyond {max(edges):g} pixels; if they are fractions of "
            "the image's size, write pixels"
        )
    named: dict[str, LabelledImage] = {}
    dropped: set[str] = set()
    stems: dict[PurePosixPath, str] = {}
    for image in found:
        name = PurePosixPath(image.name.replace("\\", "/"))
        why, first = _bad_name(name), named.get(str(name))
        if first:
            why = "is listed twice; the second list is left out"
            if not image.complete or _boxes(image) != _boxes(first):
                why = "is left out: it is listed twice, and the faces of one list would be taught to be background"
                dropped.add(str(name))
        elif not why and not image.complete:
            why = "is left out: a box of it cannot be read, and that face would be taught to be background"
            dropped.add(str(name))
            named[str(name)] = image
        elif not why and stems.setdefault(name.with_suffix(""), name.name) != name.name:
            why = f"and '{stems[name.with_suffix('')]}' differ in their suffix alone, which evaluation does not see"
        if why:
            problems.append(f"{image.source}: {image.name!r} {why}")
        else:
            named[str(name)] = image
    named = {name: image for name, image in named.items() if name not in dropped}
    kept = []
    for (name, image), size in zip(named.items(), _sizes([image.path for image in named.values()])):
        if isinstance(size, str):
            problems.append(f"{image.source}: {size}")
            continue
        if image.size and image.size != size:
            said, true = ("x".join(map(str, s)) for s in (image.size, size))
            problems.append(f"{image.source}: made for {said} pixels, but {image.path} shows {true} (rotated by EXIF?)")
            continue
        faces = [f for f in (_clip(face, size, problems) for face in image.faces) if f]
        kept.append(LabelledImage(name, image.path, faces, image.source, size))
    return kept


def _boxes(image: LabelledImage) -> list[list[float]]:
    return sorted([*face.box, face.ignore] for face in image.faces)


def _bad_name(name: PurePosixPath) -> str:
    """What is wrong with an image's name; "" = nothing. A label file holds one name per line, in UTF-8."""
    if not name.name:
        return "is no file name"
    if name.is_absolute() or ".." in name.parts:
        return "leads out of the image folder"
    text = str(name)
    if text != text.strip() or len(text.splitlines()) != 1:
        return "begins or ends with a space or holds a line break; rename it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8; rename it"
    return ""


def _sizes(paths: list[Path]) -> list[tuple[int, int] | str]:
    """(width, height) of the upright images, or why one cannot be read to its end."""

    def size(path: Path) -> tuple[int, int] | str:
        try:
            return read_photo(path).shape[1::-1]
        except ImageError as e:
            return str(e)

    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(size, paths), total=len(paths), desc="reading images", unit="img", disable=None, leave=False
        )
        return list(bar)


def _clip(face: Face, size: tuple[int, int], problems: list[str]) -> Face | None:
    x, y, w, h = face.box
    if w <= 0 or h <= 0:
        problems.append(f"{face.source}: box of size {w:g} x {h:g} has no area")
        return None
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(size[0])), min(y + h, float(size[1]))
    if x1 - x0 < min(1.0, w) - ROUNDING or y1 - y0 < min(1.0, h) - ROUNDING:
        problems.append(f"{face.source}: box {x:g} {y:g} {w:g} {h:g} lies outside the {size[0]}x{size[1]} image")
        return None
    return Face([x0, y0, x1 - x0, y1 - y0], face.landmarks, face.quality, face.ignore, face.source)


def write_split(images: list[LabelledImage], out: Path, copy: bool) -> None:
    """Write ``out/label.txt`` and put the images below ``out/images`` (symbolic links unless ``copy``)."""
    lines = []
    for image in images:
        target = out / "images" / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():  # of an earlier run
            target.unlink()
        if not target.exists():
            if copy:
                with whole(target) as part:
                    shutil.copyfile(image.path, part)
            else:
                target.symlink_to(image.path.resolve())
        lines.append(f"# {image.name}")
        for face in image.faces:
            numbers = [*face.box, *face.landmarks, face.quality]
            lines.append(" ".join(f"{v:.10g}" for v in numbers) + (" 1" if face.ignore else ""))
    with whole(out / "label.txt") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def summary(images: list[LabelledImage]) -> dict[str, int]:
    """Counts of a split."""
    faces = [f for image in images for f in image.faces]
    return {
        "images": len(images),
        "without_faces": sum(not image.faces for image in images),
        "faces": len(faces),
        "with_landmarks": sum(min(f.landmarks[2::3]) >= 0 for f in faces),
        "ignored": sum(f.ignore for f in faces),
    }


@command("data.prepare")
def main(argv: list[str] | None = None) -> int:
    """Command line; -> exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="label file (wider, retinaface, coco) or folder, also X.zip/PATH",
    )
    parser.add_argument("--format", required=True, choices=sorted(READERS))
    parser.add_argument(
        "--images",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder that image names start from, also X.zip/FOLDER",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--val-fraction", type=float, default=0.0, help="part put aside in OUT/val (default 0)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="voc, coco, yolo: only these (default: all)")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking to them")
    parser.add_argument("--json", action="store_true", help="also print a JSON object on the last line")
    args = parser.parse_args(argv)
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must be in [0, 1), got {args.val_fraction}")
    if args.classes and args.format in ("wider", "retinaface"):
        parser.error(f"--classes: the {args.format} format has no classes")
    problems: list[str] = []
    args.source = unpacked(args.source, args.out / "unpacked" / "labels")
    args.images = unpacked(args.images, args.out / "unpacked" / "images")
    if not args.images.is_dir():
        raise DataError(f"{args.images}: no such folder")
    parts = [args.out, args.out / "train", args.out / "val"]
    for folder in parts:
        if (folder / "images").resolve() == args.images.resolve():
            raise DataError(f"{args.out}: its images folder is the input; choose another --out")
        if (folder / "label.txt").resolve() == args.source.resolve():
            raise DataError(f"{args.source}: the input would be overwritten; choose another --out")
    others, how = (parts[:1], "without") if args.val_fraction else (parts[1:], "with")
    for file in (folder / "label.txt" for folder in others):
        if file.exists():  # training would go on reading it
            raise DataError(f"{file}: made {how} --val-fraction before; delete it or choose another --out")
    extra = {"classes": set(args.classes)} if args.classes else {}
    found = READERS[args.format](args.source, args.images, problems, **extra)
    images = check_images(found, problems)
    _print_problems(problems, args.out / "problems.txt")
    if not images:
        raise DataError(f"{args.source}: no usable image")
    splits = _write(images, args.out, args.val_fraction, args.copy)
    for name, counts in splits.items():
        print(
            f"{name}: {counts['images']} images ({counts['without_faces']} without faces), {counts['faces']} faces, "
            f"{counts['with_landmarks']} with landmarks, {counts['ignored']} ignored"
        )
    count = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
    print(count + (f", listed in {args.out / 'problems.txt'}" if problems else ""))
    if args.json:
        print(json.dumps({"splits": splits, "problems": len(problems)}))
    return FINISHED


def _write(images: list[LabelledImage], out: Path, val_fraction: float, copy: bool) -> dict[str, dict[str, int]]:
    """Write the split or splits; -> counts by label file, relative to ``out``."""
    parts = {"": images}
    if val_fraction:
        held = select_names([image.name for image in images], max(1, round(val_fraction * len(images))))
        parts = {"train/": [i for i in images if i.name not in held], "val/": [i for i in images if i.name in held]}
        if not parts["train/"]:
            raise DataError(f"{out}: --val-fraction {val_fraction:g} leaves none of {len(images)} images to train on")
    for name, part in parts.items():
        for image in part:
            target = out / name / "images" / image.name
            there = target.exists() and not target.is_symlink()
            if there and not filecmp.cmp(target, image.path, shallow=False):
                raise DataError(f"{target}: is another picture than {image.path}; choose another --out")
    for name, part in parts.items():
        write_split(part, out / name, copy)
    return {f"{name}label.txt": summary(part) for name, part in parts.items()}


def _print_problems(problems: list[str], file: Path) -> None:
    """The first few to stderr, all to ``file``, which is removed where there are none."""
    file.unlink(missing_ok=True)
    problems = [text.encode(errors="backslashreplace").decode() for text in problems]  # names that are not UTF-8
    if problems:
        with whole(file) as part:
            part.write_text("\n".join(problems) + "\n", encoding="utf-8")
    for text in problems[:SHOWN]:
        print(text, file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN} more", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
