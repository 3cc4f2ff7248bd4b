"""Files that are whole or not there, and errors that name theirs."""

import contextlib
import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Write a file so that ``path`` always holds the old or the new content, never half of one.

    Yields:
        the path to write to, beside ``path`` (whose folder is made as needed). It takes ``path``'s place when the block
        ends (that of a link, not of what the link leads to), and is removed when the block raises. Of a device or pipe,
        which nothing may take the place of, ``path`` itself.

    Raises:
        OSError: ``path`` is a folder, or it or its folder cannot be made or written; what ``path`` held stays. It names
            ``path`` where it would name no file (as when the disk is full) or the one written to.
    """
    path = Path(path)
    if path.is_dir():  # else only the end would tell
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # nor /dev/stdout, a link to what may be a file; /dev/shm holds files
    device = path.absolute().parent in (Path("/dev"), Path("/dev/fd"))
    replaceable = not device and (path.is_file() or not path.exists())
    part = path
    if replaceable:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a suffix that no reader takes for its own; the name itself may be as long as names can be
        part = path.with_name(f"{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.part")
    try:
        yield part
        if replaceable:
            os.replace(part, path)
    except BaseException as e:
        if replaceable:
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(e, OSError) and e.strerror and (e.filename is None or str(part) in (e.filename, e.filename2)):
            raise OSError(e.errno, e.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """OSErrors inside name this file: that of a write that fails (a full disk) names none, and that of :func:`whole`
    what a link was resolved to."""
    try:
        yield
    except OSError as e:
        if not e.strerror:  # its text says all, as that of a library
            raise
        raise OSError(e.errno, e.strerror, str(path)) from None
