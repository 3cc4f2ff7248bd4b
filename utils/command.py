"""How every command of this repository ends: with an exit code, and one line instead of a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

FINISHED, FAILED, BAD_USE, INTERRUPTED = 0, 1, 2, 130
OURS = ("data", "layers", "models", "utils", "widerface_evaluate")


class Problem(Exception):
    """Something that a user can mend; its text is one line naming the file, and the line or key in it."""

    code = FAILED


class UsageError(Problem):
    """A mistake in a command or a config, found before any work is done."""

    code = BAD_USE


class NotInstalled(UsageError, ImportError):
    """An optional package is missing; its text is one line saying what to install."""


def command(prog: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator of a ``main``: in it a :class:`Problem`, an OSError or a package that cannot be imported is one line on
    stderr; Ctrl-C and a closed pipe (``| head``) are quiet.

    Args:
        prog: what users call the command; the line begins with it.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args, **kwargs) -> int:
            try:
                code = main(*args, **kwargs)
                if sys.stdout:  # None where it is closed
                    sys.stdout.flush()  # what cannot be written shows here, not after the exit code is settled
                return code
            except Problem as e:
                text, code = str(e), e.code
            except ImportError as e:
                if (e.name or "").partition(".")[0] in OURS:  # a mistake in this repository
                    raise
                text, code = f"{e}: `pip install -r requirements.txt`", BAD_USE
            except BrokenPipeError:
                silence_stdout()
                return FAILED
            except OSError as e:
                text, code = describe(e), FAILED
            except KeyboardInterrupt:
                return INTERRUPTED
            print(f"{prog}: {text}", file=sys.stderr)
            return code

        return run

    return decorate


def silence_stdout() -> None:
    """After a BrokenPipeError: nobody listens any more, and at its exit the interpreter would try once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(error: OSError | Problem) -> str:
    """One line: the file and the reason, where an OSError knows both."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
