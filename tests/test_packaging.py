"""What a release holds: built as `make dist` builds it, installed into an empty folder and used from elsewhere."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USE_FROM_ELSEWHERE = """
import importlib.metadata, sys
from pathlib import Path
import torch
from torch._dynamo import list_backends
assert "ternary" in list_backends(), list_backends()
assert "ternarize" not in sys.modules
import ternarize, ternarize.passes.manager, ternarize.backends.compiler
from ternarize.evaluate import sample_text
assert len(sample_text()) > 1000
scripts = importlib.metadata.entry_points(group="console_scripts", name="ternarize")
assert [script.value for script in scripts] == ["ternarize.cli:main"]
model = ternarize.ternarize(torch.nn.Sequential(torch.nn.Linear(8, 8)))
assert torch.isfinite(model(torch.ones(2, 8))).all()
# An editable installation would fill the gaps of an incomplete wheel.
modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "ternarize"]
outside = [module.__file__ for module in modules if not Path(module.__file__).is_relative_to(sys.argv[1])]
assert len(modules) > 20 and not outside, outside
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution, of a copy: building leaves folders behind."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ternarize", "passes", "backends"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    # No isolation: setuptools is among the development packages, and tests do not need the network.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(dist.glob("ternarize-*.tar.gz"))) == 1
    (built,) = dist.glob("ternarize-*.whl")
    return built


def test_the_wheel_holds_one_package_with_passes_backends_and_data(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].split("-")[0] for name in files} == {"ternarize"}
    modules = {
        str(file.relative_to(ROOT))
        for folder in ("passes", "backends")
        for pattern in ("*.py", "*.cuh", "*.json")
        for file in (ROOT / folder).rglob(pattern)
    }
    assert len(modules) > 10
    assert {f"ternarize/{module}" for module in modules} <= files
    assert {"ternarize/py.typed", "ternarize/data/sample.txt"} <= files


def test_the_installed_wheel_is_found_by_torch_compile_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    assert {path.name.split("-")[0] for path in target.iterdir()} == {"ternarize", "bin"}
    result = subprocess.run(
        [sys.executable, "-c", USE_FROM_ELSEWHERE, str(target)],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_no_verb_asks_for_the_backend_by_its_name() -> None:
    # The name is an entry point: a source tree that is not installed, as on a machine without a network, has none.
    files = list((ROOT / "ternarize").rglob("*.py"))
    named = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "ternary"
    ]
    assert len(files) > 50
    assert named == []


def test_passes_and_backends_are_tracked_as_links() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the sources are not a git checkout")
    command = ["git", "ls-files", "-s", "ternarize/passes", "ternarize/backends"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in listed] == [
        ("120000", "ternarize/backends"),
        ("120000", "ternarize/passes"),
    ]


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_the_folders_at_the_root_are_no_packages_of_their_own(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == f"ImportError: import ternarize.{name}, not {name}"
