"""Runs Python code or tests as if some packages were not installed.

    python -m tests.without triton,tilelang -c CODE
    python -m tests.without triton,tilelang PYTEST-ARGUMENTS...

Must start before anything imports torch, which looks for Triton itself.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def hide(packages: Sequence[str]) -> None:
    """Let the import system find nothing by these names from now on."""

    class Finder(PathFinder):
        @classmethod
        def find_spec(
            cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            return None if fullname.partition(".")[0] in packages else super().find_spec(fullname, path, target)

    sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]


if __name__ == "__main__":
    hide(sys.argv[1].split(","))
    if sys.argv[2] == "-c":
        exec(sys.argv[3])
    else:
        import pytest

        sys.exit(pytest.main(sys.argv[2:]))
