"""A short text and a tiny run."""

from pathlib import Path

import pytest

from tests.train.kit import Tiny


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)), encoding="utf-8")
    return file


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> Tiny:
    return Tiny(text, tmp_path / "run")
