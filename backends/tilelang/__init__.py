"""TileLang kernels: the default in inference graphs on Hopper, and behind a gate the forward and the stage of training.

TileLang itself is imported when a kernel is built.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ternarize.backends.select import Facts

#: Compute capability of Hopper: the kernels use its wgmma and TMA instructions.
CAPABILITY = (9, 0)

#: Both are the same kernel.
UPDATES = ("update_stage", "update_apply")

#: in_features of which a sum of products of 64 and 128 may leave int32.
MOST_INT8_COLUMNS = 2**17


#: What a machine without nvcc gets, and how it gets nvcc, in a place where `finds_nvcc` looks.
WITHOUT_NVCC = (
    "there is no nvcc, with which TileLang compiles: inference on Hopper runs Triton kernels instead, on a CPU torch; "
    "pip install 'tilelang[nvcc]' brings the package nvidia-cuda-nvcc, or put a CUDA toolkit's nvcc on PATH"
)


def finds_nvcc() -> bool:
    """Whether TileLang will find nvcc, in the places and the order of tilelang.env."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return (Path(home) / "bin" / "nvcc").is_file()
    if shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file():
        return True
    try:
        importlib.metadata.version("nvidia-cuda-nvcc")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def verify(stem: str, facts: "Facts") -> tuple[bool, str]:
    """Whether a TileLang kernel can run a call, and why not.

    Args:
        stem: of the op.
        facts: of the call.
    """
    if stem not in ("linear", "linear_int8", *UPDATES):
        return False, f"there is no TileLang kernel for {stem}"
    of_op = _refusals_of_update(facts) if stem in UPDATES else _refusals_of_linear(stem, facts)
    for refused, reason in (
        (facts.device != "cuda", f"the tensors are on {facts.device}, need cuda"),
        (
            facts.capability != CAPABILITY,
            "the GPU has compute capability {}.{}, need 9.0 (Hopper)".format(*facts.capability),
        ),
        (
            facts.dtype not in (torch.bfloat16, torch.float16),
            f"the activations are {facts.dtype}, need torch.bfloat16 or torch.float16",
        ),
        *of_op,
        (importlib.util.find_spec("tilelang") is None, "the package tilelang is not installed"),
        (not finds_nvcc(), "TileLang compiles with nvcc, and there is none on PATH or under CUDA_HOME"),
    ):
        if refused:
            return False, reason
    return True, "TileLang runs on Hopper"


def _refusals_of_update(facts: "Facts") -> tuple[tuple[bool, str], ...]:
    sizes = (("in_features", [facts.in_features]), ("out_features", facts.out_features))
    odd = [f"{name} {size}" for name, of_layers in sizes for size in of_layers if size % 8]
    return (
        (facts.rule != "factored", f"the rule is {facts.rule}, need factored"),
        (facts.trains_exponents, "exponents are trained, need train_exponents=False"),
        (len(odd) > 0, f"the layers have {', '.join(odd)}, need multiples of 8: rows of 16 bytes for TMA"),
        (importlib.util.find_spec("triton") is None, "triton is not installed, whose kernels do the rest of an update"),
    )


def _refusals_of_linear(stem: str, facts: "Facts") -> tuple[tuple[bool, str], ...]:
    K = facts.in_features
    g = facts.group_size if facts.group_size > 0 else K
    return (
        (len(set(facts.planes)) > 1, f"layers of one call have {' and '.join(map(str, facts.planes))} trit planes"),
        (
            len(set(facts.mantissas)) > 1,
            "layers of one call have E_mantissa of " + " and ".join(map(str, facts.mantissas)),
        ),
        (K % 64 != 0, f"in_features is {K}, need a multiple of 64: rows of 16 bytes for TMA"),
        (
            not (g % 128 == 0 or (g == K and g > 64) or (g in (32, 64) and K % g == 0)),
            f"group_size is {facts.group_size}, need 32, 64, a multiple of 128 or whole rows",
        ),
        (
            stem == "linear_int8" and (any(facts.mantissas) or facts.planes != (1,) * len(facts.planes)),
            "int8 activations need one trit plane, and scales that are powers of two",
        ),
        (
            stem == "linear_int8" and K >= MOST_INT8_COLUMNS,
            f"in_features is {K}, int8 products need fewer than {MOST_INT8_COLUMNS} for sums of 32 bits",
        ),
    )
