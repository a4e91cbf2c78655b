"""A packed folder made from the tiny model, and a way to spoil one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ternarize.checkpoint import convert
from ternarize.config import TernaryConfig


@pytest.fixture(scope="session")
def packed_source(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    convert(tiny_checkpoint, folder, TernaryConfig(planes=3, group_size=32))
    return folder


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit
