"""Programs to kernels: built once a process, in parallel where several are wanted.

TileLang keeps compiled kernels on disk. A kernel that is there takes some ten milliseconds, most of them to trace its
program, whose text is the key; processes that compile the same kernel at the same time end up with one of the results.
"""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import tilelang

from ternarize.backends.tilelang.hopper import TARGET
from ternarize.backends.tilelang.layers import Dtype, LayerShape
from ternarize.backends.tilelang.linear_decode import DecodeTile, decode_program
from ternarize.backends.tilelang.linear_wgmma import Tile, wgmma_program
from ternarize.backends.tilelang.update_wgmma import TILE, UpdateTile, update_program
from ternarize.config import Activation

Kernel = Callable[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """All that a kernel of linear layers depends on."""

    layers: tuple[LayerShape, ...]
    K: int
    g: int
    """Weights a scale group; K for whole rows."""
    dtype: Dtype
    """Of y, and of x unless that is int8."""
    activation: Activation = "float"
    """int8: x is int8, with a scale for each token."""
    guarded: bool
    """Whether it reports outputs that are not finite."""
    tile: DecodeTile | Tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateProgram:
    """All that a kernel of `update_stage` depends on: one is for all layers."""

    dtype: Dtype
    """Of grad_y and x."""
    tile: UpdateTile = TILE


def compile_program(program: Program | UpdateProgram) -> Kernel:
    """Trace a program, then compile it or load it from TileLang's cache. Any number of threads may."""
    function = update_program(program.dtype, program.tile) if isinstance(program, UpdateProgram) else _linear(program)
    kernel: Kernel = tilelang.compile(function, target=TARGET)
    return kernel


def _linear(program: Program) -> Any:
    of_call = (program.layers, program.K, program.g, program.dtype)
    guarded, activation = program.guarded, program.activation
    if isinstance(program.tile, DecodeTile):
        return decode_program(*of_call, guarded=guarded, tile=program.tile, activation=activation)
    return wgmma_program(*of_call, guarded=guarded, tile=program.tile, activation=activation)


_kernels: dict[Program | UpdateProgram, Future[Kernel]] = {}
_lock = threading.Lock()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # Threads are enough: lowering releases the GIL and nvcc is a process.
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="ternarize-compile")


def start(program: Program | UpdateProgram) -> Future[Kernel]:
    """Begin to build a kernel in the background, unless that was begun before."""
    with _lock:
        if program not in _kernels:
            _kernels[program] = _pool().submit(compile_program, program)
        return _kernels[program]
