"""Reading data sets that come as zip archives."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.labels import DataError
from utils.files import whole


def unpacked(path: Path, folder: Path) -> Path:
    """``path`` itself, or where it leads into a zip archive (``WIDER_train.zip/WIDER_train/images``) the same file or
    folder below ``folder``, unpacked. Files that lie there as in the archive are not unpacked again, others are
    removed; the archive stays.

    Raises:
        DataError: not a zip archive, damaged, encrypted, leading out of ``folder``, or without such a file or folder.
        OSError: ``folder`` cannot be written.
    """
    archive = next((p for p in (path, *path.parents) if p.suffix.lower() == ".zip" and p.is_file()), None)
    if archive is None:
        return path
    inside = path.relative_to(archive)
    target = folder / archive.stem
    try:
        with zipfile.ZipFile(archive) as file:
            entries = {PurePosixPath(e.filename): e for e in file.infolist() if not e.is_dir()}
            wanted = {name: e for name, e in entries.items() if name.is_relative_to(inside.as_posix())}
            if not wanted:
                held = sorted({str(name.parent) for name in entries})
                raise DataError(f"{archive}: holds no {inside.as_posix()}; it has {', '.join(held[:5]) or 'no files'}")
            for old in (target / inside).rglob("*"):  # of another archive of this name
                if old.is_file() and PurePosixPath(old.relative_to(target).as_posix()) not in wanted:
                    old.unlink()
            for name, entry in tqdm(wanted.items(), desc=archive.name, unit="file", disable=None, leave=False):
                if name.is_absolute() or ".." in name.parts:
                    raise DataError(f"{archive}: '{name}' leads out of the folder")
                to = target / name
                if not to.is_file() or zlib.crc32(to.read_bytes()) != entry.CRC:
                    with whole(to) as part, file.open(entry) as packed, part.open("wb") as plain:
                        shutil.copyfileobj(packed, plain)
    except DataError:  # a RuntimeError as well
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:  # the last: encrypted
        raise DataError(f"{archive}: cannot unpack it ({e})") from None
    return target / inside
