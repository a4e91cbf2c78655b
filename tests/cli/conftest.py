"""Folders for the verb convert, which a test may spoil."""

import shutil
from pathlib import Path

import pytest

from ternarize.cli import main


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A dense folder that the test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "dense"))


@pytest.fixture
def packed(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A packed folder that the test may spoil."""
    assert main(["convert", str(source), str(tmp_path / "packed"), "--group-size", "32", "--quiet"]) == 0
    capsys.readouterr()
    return tmp_path / "packed"
