"""``ternarize doctor``: what is installed, which kernels run here, and whether they compute the right numbers."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ternarize import ops
from ternarize.backends import tilelang
from ternarize.backends.select import Phase, choose, facts_of, verify
from ternarize.cli.machine import describe, versions
from ternarize.cli.output import Output
from ternarize.config import Kernels, TernaryConfig, cache_dir, kernels_policy
from ternarize.errors import KernelError
from ternarize.evaluate import default_device
from ternarize.layer import TernaryLinear

HELP = "show versions and devices, and check every kernel that can run here against the torch reference"

#: The ops that each backend is checked on.
STEMS: dict[str, tuple[str, ...]] = {
    "tilelang": ("linear", "update_stage"),
    "triton": ("linear", "grad_input", "update_stage", "update_commit"),
    "torch": ("linear", "grad_input", "update_stage", "update_commit"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(_: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the verb; not ok if the kernels that TERNARIZE_BACKEND asks for cannot run or are wrong."""
    policy = kernels_policy()
    device = default_device()
    choices = {phase: _choice(phase, policy, device) for phase in ("inference", "training")}
    checks = {backend: check_backend(backend, device) for backend in STEMS}
    used = {choice["backend"] for choice in choices.values() if choice["backend"]}
    report = {
        "versions": versions(),
        "device": describe(device),
        "policy": policy,
        "choices": choices,
        "backends": checks,
        "tools": {tool: shutil.which(tool) for tool in ("nvcc", "gcc")},
        "missing": None if tilelang.finds_nvcc() else tilelang.WITHOUT_NVCC,
        "caches": _caches(),
        # TileLang alone does not cover training: a policy of tilelang is fine as long as inference runs.
        "ok": choices["inference"]["backend"] is not None and all(checks[name]["status"] == "PASS" for name in used),
    }
    _print(report, output)
    return report


def _caches() -> dict[str, dict[str, Any]]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_dir

    folders: dict[str, str | Path] = {
        "inductor": inductor_dir(),
        "triton": os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache"),
        "tilelang": os.environ.get("TILELANG_CACHE_DIR", "~/.tilelang/cache"),
        "ternarize": cache_dir(),
    }
    caches = {}
    for name, folder in folders.items():
        path = Path(folder).expanduser()
        existing = next(p for p in (path, *path.parents) if p.exists())
        caches[name] = {
            "path": str(path),
            "writable": os.access(existing, os.W_OK),
            "free_bytes": shutil.disk_usage(existing).free,
        }
    return caches


def _small_call(stem: str, device: torch.device) -> tuple[list[Any], list[Tensor]]:
    """Arguments of one call of a lowered op, and those of them that it mutates.

    Activations and gradients are small multiples of 1/4, so that every product and sum is exact whatever the order:
    integers must come out equal bit for bit.
    """
    generator = torch.Generator().manual_seed(0)
    M, N, K = 64, 128, 256
    config = TernaryConfig(group_size=64)
    levels = torch.randint(-1, 2, (N, K), generator=generator, dtype=torch.int8)
    E = torch.randint(-3, 1, (N, K // 64), generator=generator, dtype=torch.int8)
    layer = TernaryLinear.from_levels(levels, E, config=config, trainable=True).to(device)
    layer.prepare_training()
    state = [layer.row_log2, layer.col_log2, layer.stage, layer.stage_row, layer.stage_col, layer.status]
    row_log2, col_log2, stage, stage_row, stage_col, status = [tensor for tensor in state if tensor is not None]
    # Statistics of a gradient of mean square 1: a layer without any only collects them.
    row_log2.zero_(), col_log2.zero_()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, grad_y = (
        torch.randint(-2, 3, (M, features), generator=generator).div(4).to(device, dtype) for features in (K, N)
    )
    weights: list[Any] = [[layer.T_packed], [layer.E], [None]]
    if stem == "linear":
        return [x, *weights, [None], [None], layer.group_size], []
    if stem == "grad_input":
        return [[grad_y], *weights, K, layer.group_size], []
    staged = [stage, stage_row, stage_col, status]
    if stem == "update_stage":
        lists = [[layer.T_packed], [row_log2], [col_log2], [layer.rng], [stage], [], [stage_row], [stage_col], [status]]
        return [[grad_y], x, *lists, layer.group_size, layer.rule], staged
    stage.copy_(torch.randint(-4, 5, (N, K), generator=generator))
    status[1] = 1
    refuse = torch.zeros(1, dtype=torch.int32, device=device)
    integers = [layer.T_packed, layer.E, layer.T_accum, layer.T_momentum, None, row_log2, col_log2]
    buffers = [layer.rng, stage, None, stage_row, stage_col, status]
    mutated = [*(tensor for tensor in integers if tensor is not None), *staged]
    lr = torch.full((1,), 0.5, device=device)
    return [*integers, *buffers, refuse, lr, 16, 16, layer.group_size, layer.rule], mutated


def _choice(phase: Phase, policy: Kernels, device: torch.device) -> dict[str, Any]:
    stem = "linear" if phase == "inference" else "update_stage"
    args, _ = _small_call(stem, device)
    try:
        choice = choose(stem, phase, facts_of(stem, args), policy)
    except KernelError as error:
        return {"backend": None, "reason": str(error)}
    return {"backend": choice.backend, "reason": choice.reason}


def check_backend(backend: str, device: torch.device) -> dict[str, str]:
    """Run each op of a backend once and compare with the torch reference on the same device."""
    for stem in STEMS[backend]:
        args, mutated = _small_call(stem, device)
        available, why = verify(backend, stem, facts_of(stem, args))
        if not available:
            return {"status": "unavailable", "reason": why}
        try:
            result = _tensors(ops.lowered(stem, backend)(*ops.with_status(stem, backend, args))) + mutated
        except Exception as error:  # whatever a kernel's compiler raises is the finding
            return {"status": "FAIL", "reason": f"{stem}: {type(error).__name__}: {error}"}
        reference_args, reference_mutated = _small_call(stem, device)
        reference = _tensors(ops.lowered(stem, "torch")(*reference_args)) + reference_mutated
        if not all(_agree(ours, theirs) for ours, theirs in zip(result, reference, strict=True)):
            return {"status": "FAIL", "reason": f"{stem} differs from the torch reference"}
    what = "is the reference, runs" if backend == "torch" else "equal to the torch reference:"
    return {"status": "PASS", "reason": f"{what} {', '.join(STEMS[backend])}"}


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Integers bit for bit; floats up to the rounding of bfloat16."""
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    return torch.allclose(ours.double(), theirs.double(), rtol=2**-8, atol=2**-8)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or [])


def _print(report: dict[str, Any], output: Output) -> None:
    facts = Table("what", "found", title="ternarize doctor")
    for name, version in report["versions"].items():
        facts.add_row(name, version or Text("not found", "dim"))
    facts.add_row("device", ", ".join(str(value) for value in report["device"].values()))
    for tool, path in report["tools"].items():
        facts.add_row(tool, path or Text("not found", "dim"))
    for name, cache in report["caches"].items():
        free = f"{cache['path']} ({cache['free_bytes'] / 2**30:.1f} GiB free"
        note = ("", "") if cache["writable"] else (", not writable", "red")
        facts.add_row(f"{name} cache", Text.assemble(free, note, ")"))
    output.console.print(facts)
    kernels = Table("what", "result", "why", title=f"kernels (TERNARIZE_BACKEND={report['policy']})")
    for phase, choice in report["choices"].items():
        kernels.add_row(f"{phase} graphs run", choice["backend"] or Text("nothing", "red"), choice["reason"])
    colours = {"PASS": "green", "FAIL": "red", "unavailable": "dim"}
    for backend, check in report["backends"].items():
        kernels.add_row(backend, Text(check["status"], colours[check["status"]]), check["reason"])
    output.console.print(kernels)
    if report["missing"] is not None:
        output.console.print(report["missing"], highlight=False, soft_wrap=True)
