"""Which kernel runs an op: one choice a node, made when a graph is lowered, with the reason for it.

Each backend has a verifier, ``verify(stem, facts) -> (ok, reason)``, in its ``__init__``. In ``auto`` the candidates
are tried in order; their refusals are the reason, and are logged once. A forced backend that cannot run a call raises.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ternarize.config import Kernels, flag, kernels_policy
from ternarize.errors import KernelError
from ternarize.ops import LINEAR_STEM

log = logging.getLogger(__name__)

Phase = Literal["inference", "training"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a verifier may look at: static facts of one call. Token counts are left out, they may be symbolic."""

    device: str
    """Type of the device: 'cpu', 'cuda'."""
    capability: tuple[int, int]
    """CUDA compute capability, (0, 0) elsewhere."""
    dtype: torch.dtype
    """Of the activations."""
    in_features: int
    out_features: tuple[int, ...]
    planes: tuple[int, ...]
    """Of each layer; of an update, empty: they have one."""
    group_size: int
    mantissas: tuple[torch.dtype | None, ...]
    """Of each layer, the dtype of E_mantissa, or None; of a call that takes no mantissas, empty."""
    rule: str = ""
    """Of an update."""
    trains_exponents: bool = False
    """Whether an update of `update_stage` or `update_apply` is also one of E."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that runs a node, and why."""

    backend: str
    reason: str


#: Position of the tensors that an update has for exponents: stage_E or E_accum.
_EXPONENTS = {"update_stage": 7, "update_apply": 6}

#: Ops of training graphs that have TileLang kernels, behind their gate.
_TILELANG_TRAINING = (*LINEAR_STEM.values(), "update_stage", "update_apply")


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def facts_of(stem: str, args: Sequence[Any]) -> Facts:
    """Facts of a call of ``stem``, from its arguments, real or fake, in the order of its lowered schema.

    The arguments of ``linear_int8`` are those of ``linear``: the choice comes before x is quantised.
    """
    if stem in LINEAR_STEM.values():
        x, T_packed, mantissas, in_features, group_size = args[0], args[1], args[3], args[0].shape[-1], args[6]
    elif stem == "grad_input":
        (x, *_), T_packed, mantissas, in_features, group_size = args[0], args[1], args[3], args[4], args[5]
    elif stem in _EXPONENTS:
        # An update that a graph calls tells of what it mutates no more than how many tensors there are.
        x, T_packed, mantissas, in_features, group_size = args[1], [], [], args[1].shape[-1], args[-2]
    else:
        x, T_packed, mantissas, in_features, group_size = args[2], [args[0]], [], args[2].shape[1], args[17]
    of_layers, dim = (args[0], -1) if stem in _EXPONENTS else (T_packed, -2)
    return Facts(
        device=x.device.type,
        capability=_capability(x.device),
        dtype=x.dtype,
        in_features=int(in_features),
        out_features=tuple(int(rows.shape[dim]) for rows in of_layers),
        planes=tuple(int(packed.shape[0]) if packed.dim() == 3 else 1 for packed in T_packed),
        group_size=group_size,
        mantissas=tuple(None if m is None else m.dtype for m in mantissas),
        rule=args[-1] if stem.startswith("update") else "",
        trains_exponents=stem in _EXPONENTS and len(args[_EXPONENTS[stem]]) > 0,
    )


def verify(backend: str, stem: str, facts: Facts) -> tuple[bool, str]:
    """Whether ``backend`` can run a call of ``stem``, and why (not)."""
    if backend == "torch":
        return True, "the reference runs everywhere"
    result: tuple[bool, str] = importlib.import_module(f"ternarize.backends.{backend}").verify(stem, facts)
    return result


def candidates(phase: Phase, policy: Kernels) -> tuple[str, ...]:
    """Backends in the order in which they are tried."""
    if policy != "auto":
        return (policy,)
    return ("tilelang", "triton", "torch") if phase == "inference" else ("triton", "torch")


def choose(stem: str, phase: Phase, facts: Facts, policy: Kernels, *, tilelang: bool = True) -> Choice:
    """The backend for one call of ``stem``.

    Args:
        stem: linear, linear_int8, grad_input, update_stage, update_commit or update_apply.
        phase: of the graph.
        facts: of the call.
        policy: as of `ternarize.config.kernels_policy`.
        tilelang: False where the output guard has taken a layer off TileLang.

    Raises:
        KernelError: if a backend is forced and cannot run the call.
    """
    if policy == "tilelang" and phase == "training":
        if not tilelang_trains():
            raise KernelError(
                "kernels=tilelang covers inference graphs only, and this is a training graph: use auto, or set "
                "TERNARIZE_TILELANG_TRAINING=1"
            )
        if stem not in _TILELANG_TRAINING:
            other = _choose(stem, phase, facts, "auto", tilelang)
            return Choice(other.backend, f"there is no TileLang kernel for {stem}; {other.reason}")
    return _choose(stem, phase, facts, policy, tilelang)


def tilelang_trains() -> bool:
    """Whether TileLang may be forced in training graphs: TERNARIZE_TILELANG_TRAINING, off by default."""
    return flag("TERNARIZE_TILELANG_TRAINING", "ARB_TILELANG_TRAINING", default=False)


@functools.cache
def _choose(stem: str, phase: Phase, facts: Facts, policy: Kernels, tilelang: bool) -> Choice:
    refusals: list[str] = []
    for backend in candidates(phase, policy):
        if backend == "tilelang" and not tilelang:
            ok, reason = False, "its output was not finite earlier in this process, or is not guarded here"
        elif policy == "auto" and backend != "torch" and facts.device != "cuda":
            ok, reason = False, f"the tensors are on {facts.device}"
        else:
            ok, reason = verify(backend, stem, facts)
        if ok and not refusals:
            return Choice(backend, reason)
        if ok:
            passed_over = "; ".join(refusals)
            # On a CPU there is nothing to tell: that is what the reference is for.
            _say_once(logging.WARNING if facts.device == "cuda" else logging.INFO, f"{stem}: {backend}, {passed_over}")
            return Choice(backend, passed_over)
        if policy != "auto":
            raise KernelError(f"kernels={policy} cannot run {stem}: {reason}; use auto, or lift that limit")
        refusals.append(f"not {backend}: {reason}")
    raise AssertionError("the torch backend accepts every call")


@functools.cache
def _say_once(level: int, message: str) -> None:
    log.log(level, message)


def eager_backend(stem: str, args: Sequence[Any], policy: Kernels | None = None) -> str:
    """The backend that runs a semantic op outside of graphs, by ``policy`` or what the environment asks for.

    In ``auto`` that is Triton or torch: TileLang's output is guarded in graphs only.
    """
    policy = policy or kernels_policy()
    # Whether a layer that is called eagerly trains is not known; the other ops only run in training.
    phase: Phase = "inference" if policy == "tilelang" and stem in LINEAR_STEM.values() else "training"
    return choose(stem, phase, facts_of(stem, args), policy).backend


def fingerprint() -> tuple[Any, ...]:
    """All that choices depend on beside the graph: part of the key of Inductor's caches."""
    versions = tuple(_version(package) for package in ("triton", "tilelang"))
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return (*versions, capability, tilelang_trains(), os.environ.get("TRITON_INTERPRET"), shutil.which("nvcc"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
