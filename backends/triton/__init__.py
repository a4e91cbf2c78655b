"""Triton kernels: the default in training graphs, the fallback of TileLang in inference graphs.

Triton itself is imported with the kernels, when one is first asked for.
"""

import importlib.util
import os

import torch

from ternarize.backends.select import Facts

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Ampere: the first with bfloat16 tensor cores.
_MIN_CAPABILITY = (8, 0)


def verify(stem: str, facts: Facts) -> tuple[bool, str]:
    """Whether the Triton kernels can run a call, and why not.

    Args:
        stem: of the op.
        facts: of the call.
    """
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if facts.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return False, "the tensors are on the CPU, where Triton needs its interpreter (TRITON_INTERPRET=1)"
    if facts.device not in ("cpu", "cuda"):
        return False, f"the tensors are on {facts.device}"
    if facts.device == "cuda" and facts.capability < _MIN_CAPABILITY:
        return False, f"compute capability {facts.capability[0]}.{facts.capability[1]} is below 8.0"
    # The dtype of a commit is that of its integer planes: no activations take part in it.
    if stem != "update_commit" and facts.dtype not in _DTYPES:
        return False, f"{str(facts.dtype).removeprefix('torch.')} activations: it has bfloat16, float16 and float32"
    return True, "Triton runs it"
