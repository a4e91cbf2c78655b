"""What the tests of the verb convert share: a refusal is one line, and changes nothing."""

from pathlib import Path

import pytest

from ternarize.cli import main


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str | Path) -> tuple[int, str]:
    """Run convert, which must fail with one line and change nothing; its exit code and that line."""
    before = snapshot(tmp_path)
    try:
        code = main(["convert", *map(str, arguments)])
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ternarize")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert snapshot(tmp_path) == before
    assert code != 0
    return code, captured.err
