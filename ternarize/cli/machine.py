"""What a measurement ran on, for the verbs that report it."""

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

PACKAGES = ("ternarize", "torch", "triton", "tilelang", "transformers", "gemlite", "gguf", "safetensors", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of Python, of the packages that matter, of CUDA and its driver; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["CUDA"] = torch.version.cuda
    found["driver"] = _driver()
    return found


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() or None


def device_argument(text: str) -> torch.device:
    """A device by its name, for --device: the CPU or a CUDA device."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device to run on: write cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no {text}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """Name and size of a device."""
    if device.type != "cuda":
        return {"type": device.type, "name": platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }
