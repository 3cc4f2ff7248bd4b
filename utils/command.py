"""How every command of this repository ends: with an exit code, and one line instead of a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

FINISHED, FAILED, BAD_USE, INTERRUPTED = 0, 1, 2, 130


class Problem(Exception):
    """Something that a user can mend; its text is one line naming the file, and the line or key in it."""

    code = FAILED


class UsageError(Problem):
    """A mistake in a command or a config, found before any work is done."""

    code = BAD_USE


class NotInstalled(UsageError, ImportError):
    """An optional package is missing; its text is one line saying what to install."""


def command(prog: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator of a ``main``: in it a :class:`Problem`, an OSError or a missing package is one line on stderr, and
    Ctrl-C is quiet.

    Args:
        prog: what users call the command; the line begins with it.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args, **kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except Problem as e:
                text, code = str(e), e.code
            except ModuleNotFoundError as e:
                text, code = f"{e}: `pip install -r requirements.txt`", BAD_USE
            except OSError as e:
                text, code = describe(e), FAILED
            except KeyboardInterrupt:
                return INTERRUPTED
            print(f"{prog}: {text}", file=sys.stderr)
            return code

        return run

    return decorate


def describe(error: OSError | Problem) -> str:
    """One line: the file and the reason, where an OSError knows both."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
