import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_triton_kernels_compile_for_hopper(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("triton is for Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_triton.py"))],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "compiled\n"
