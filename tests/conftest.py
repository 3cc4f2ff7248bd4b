"""Shared fixtures: paths into ../shared (skipping when absent) and small synthetic data."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The team's folder of reference data and weights; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (reference data and weights), which is not on this machine")
    return SHARED


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def fill_disk(monkeypatch) -> Callable[[], None]:
    """Called, there is room for nine more letters: whoever writes text gets so far."""

    def fill() -> None:
        write = Path.write_text

        def cut_off(path: Path, text: str, **options) -> None:
            write(path, text[:9], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_text", cut_off)

    return fill
