"""One call of every kernel under compute-sanitizer, which comes with the CUDA toolkit: no access out of bounds.

    python -m tests.gpu.sanitize

Exits with 0 if nothing is found. The kernels are compiled first, by several processes, into the caches on disk.
"""

import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ternarize import ops
from ternarize.activation import quantize_activation
from ternarize.backends.select import facts_of, verify
from ternarize.backends.tilelang.linear import Fusible, fusible, rounds
from ternarize.cli.doctor import check_backend
from tests.backends.kit import Weights, random_weights

#: Tokens on both sides of what separates the programs and their tiles, some that fill a tile and some that do not.
TOKENS = (1, 13, 40, 300)

#: out_features of layers that share x, in_features, group size, trit planes, mantissa, bias: tails in every dimension.
LAYERS = (
    ((4096,), 4096, 128, 1, False, False),
    ((333, 64, 65), 1152, 128, 1, False, True),
    ((200, 200), 1152, 64, 1, False, True),
    ((130,), 14336, 128, 1, False, False),
    ((77,), 576, 64, 1, False, True),
    ((333,), 96, 32, 1, False, False),
    ((129,), 512, 256, 1, False, True),
    ((64,), 384, -1, 1, False, False),
    ((130,), 1000, 128, 1, False, True),
    ((130,), 1024, 128, 2, False, False),
    ((130,), 1024, 128, 3, True, True),
)

DTYPES = (torch.bfloat16, torch.float16)

#: Processes that compile, which takes seconds a kernel.
COMPILERS = len(os.sched_getaffinity(0))

#: Processes under the tool, which share the calls: it slows each launch down.
SANITIZERS = 8

#: Lines of the tool's findings that are shown of a process.
SHOWN_LINES = 60


#: What a call is, and the call.
Call = tuple[str, Callable[[], Any]]


def calls() -> Iterator[Call]:
    """Those of TileLang are guarded."""
    dtypes = itertools.cycle(DTYPES)
    for sizes, K, group_size, planes, mantissa, bias in LAYERS:
        layers = [
            random_weights(N, K, group_size, planes=planes, mantissa=mantissa, bias=bias, device="cuda") for N in sizes
        ]
        # So that each number of tokens meets both dtypes.
        next(dtypes)
        for M in TOKENS:
            yield from _of_one_input(torch.randn(M, K, device="cuda").to(next(dtypes)), layers, group_size)


def _of_one_input(x: torch.Tensor, layers: list[Weights], group_size: int) -> Iterator[Call]:
    weights = (
        [w.T_packed for w in layers],
        [w.E for w in layers],
        [w.E_mantissa for w in layers],
        [w.bias for w in layers],
        [w.bias_exponent for w in layers],
    )
    status = [torch.zeros(2, dtype=torch.int32, device="cuda") for _ in layers]
    for stem in ("linear", "linear_int8"):
        facts = facts_of(stem, (x, *weights, group_size))
        given: tuple[Any, ...] = (x, *weights, group_size)
        if stem == "linear_int8":
            given = (*quantize_activation(x), *weights, group_size, x.dtype)
        for backend in ("tilelang", "triton"):
            if verify(backend, stem, facts)[0]:
                sizes = [list(tensor.shape) for tensor in (x, *weights[0])]
                name = f"{stem} of {backend}, x and T_packed {sizes}, group size {group_size}, {x.dtype}"
                op = functools.partial(ops.lowered(stem, backend), *ops.with_status(stem, backend, given, status))
                yield name, op
                if (stem, backend) == ("linear", "tilelang"):
                    for besides in _besides(x, weights, group_size):
                        yield f"{name}, with {', '.join(besides)}", functools.partial(op, **besides)


def _besides(x: torch.Tensor, weights: Sequence[list[Any]], group_size: int) -> Iterator[dict[str, Any]]:
    """All that the kernel can do besides in such a call, with x as it is and rounded, and rounding alone."""
    packed, _, mantissas, *_ = weights
    fused = _fused(x, weights, fusible(x, packed, mantissas, group_size))
    if fused:
        yield fused
    if rounds(x, packed, mantissas, group_size):
        yield {"rounds": True}
        fused = _fused(x, weights, fusible(x, packed, mantissas, group_size, rounds=True))
        if fused:
            yield {"rounds": True, **fused}


def _fused(x: torch.Tensor, weights: Sequence[list[Any]], allowed: Fusible) -> dict[str, Any]:
    """The arguments of what a call may do besides."""
    packed = weights[0]
    besides: dict[str, Any] = {}
    if allowed.norm:
        besides |= {"norm_weight": torch.ones_like(x[0]), "norm_eps": 1e-5}
    if allowed.residual and len(packed) == 1:
        besides |= {"residual": x.new_zeros(len(x), packed[0].shape[-2])}
    if allowed.gate and len(packed) == 2:
        besides |= {"gated": True}
    return besides


def call_some(first: int, step: int) -> None:
    """Make every ``step``-th call from the ``first`` on; one line says how many that were."""
    torch.manual_seed(0)
    count = 0
    for name, call in itertools.islice(calls(), first, None, step):
        # What the tool finds comes after the name of the call that did it.
        print(name, flush=True)
        call()
        torch.cuda.synchronize()
        count += 1
    if first == 0:
        # The kernels of training.
        for backend in ("tilelang", "triton"):
            print(check_backend(backend, torch.device("cuda")))
    print(f"{count} calls", flush=True)


def find_sanitizer() -> str | None:
    """The tool on PATH, or in a CUDA toolkit."""
    places = [os.environ.get("CUDA_HOME", ""), *sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)]
    found = (shutil.which("compute-sanitizer", path=f"{place}/bin") for place in places if place)
    return shutil.which("compute-sanitizer") or next((path for path in found if path), None)


def _findings(lines: Sequence[str]) -> Sequence[str]:
    """The first that the tool found, after the name of the call; the last lines if it found nothing."""
    found = [i for i, line in enumerate(lines) if line.startswith("========= ") and "COMPUTE-SANITIZER" not in line]
    start = max(found[0] - 1, 0) if found and "ERROR SUMMARY" not in lines[found[0]] else max(len(lines) - 2, 0)
    return lines[start : start + SHOWN_LINES]


def main() -> int:
    """Make the calls twice: to compile the kernels, and under the tool."""
    tool = find_sanitizer()
    if tool is None:
        print("compute-sanitizer is neither on PATH nor under CUDA_HOME or /usr/local/cuda*", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "tests.gpu.sanitize"]
    compilers = [subprocess.Popen([*command, str(first), str(COMPILERS)]) for first in range(COMPILERS)]
    failures = sum(process.wait() != 0 for process in compilers)
    if failures:
        return 1
    # Each tensor in its own allocation: in PyTorch's pools most accesses out of bounds would hit a neighbour.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Imports take longer than the tool waits for a process that uses the GPU.
    options = shlex.split("--tool memcheck --launch-timeout 0 --target-processes application-only --print-limit 20")
    runs = [
        subprocess.Popen(
            [tool, *options, *command, str(first), str(SANITIZERS)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for first in range(SANITIZERS)
    ]
    clean = True
    for run in runs:
        output = run.communicate()[0]
        print("\n".join(_findings(output.splitlines())), flush=True)
        summary = re.search(r"ERROR SUMMARY: (\d+) errors?", output)
        clean &= run.returncode == 0 and summary is not None and summary[1] == "0"
    return 0 if clean else 1


if __name__ == "__main__":
    if sys.argv[1:]:
        call_some(*map(int, sys.argv[1:]))
    else:
        sys.exit(main())
