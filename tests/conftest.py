"""Small recipes on disk, made from the real files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of stages/ and mixtures/ that a test may damage."""
    for folder in ("stages", "mixtures"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path
