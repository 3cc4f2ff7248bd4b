"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Write a file so that ``path`` always holds the old or the new content, never half of one.

    Yields:
        the path to write to, beside ``path`` (whose folder is made as needed). It takes ``path``'s place when the block
        ends, and is removed when the block raises.

    Raises:
        OSError: the folder cannot be made or written to; what ``path`` held stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a suffix that no reader takes for its own
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
