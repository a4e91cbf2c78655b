"""The part of an update that is not one integer a weight: statistics [N] and [K], exponents [N, G], the count.

A dozen kernels of the reference are three here, one of them a part of the commit: in float64, as there, and equal to
it, but that the mean of `normalisers` is added up in another order, which may change a last bit of float32. Programs
are numbered over the rows first, then over the columns, then over the exponents. Nothing is added by atomics: what
several tiles have found of a row lies in a buffer, a row of it each, and is added in the order of tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton.launch import ceil_div, launch
from ternarize.packing import E_MAX, E_MIN

_NO_STATISTICS = tl.constexpr(reference.NO_STATISTICS)
_DECAY = tl.constexpr(reference.STATISTICS_DECAY)
_NEW = tl.constexpr(1 - reference.STATISTICS_DECAY)
_E_MIN = tl.constexpr(E_MIN)
_E_MAX = tl.constexpr(E_MAX)

#: What logarithms are in units of, a power of two: a division of float64 would be most of what a kernel here computes.
_UNIT = tl.constexpr(1 / 256)

#: Elements a program, and partial sums that it loads at once. Few, so that a vector keeps many SMs busy.
BLOCK = 64
_PARTS = tl.constexpr(128)

#: Elements a program of `normalisers`, one a thread, and the most rows that it adds up at once: each program takes the
#: mean over all rows, and each of its warps the logarithm of that.
_NORMALISED, _ADDED = 512, 16384


@triton.jit
def normalisers_kernel(
    row_log2: tl.tensor,
    col_log2: tl.tensor,
    row_factor: tl.tensor,
    col_factor: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
) -> None:
    """BLOCK row or column factors of `reference.normalisers`, whose mean is added up from ADDED rows at a time."""
    programs = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    if program < programs:
        # Loaded first, for none of it to be waited for after the sum.
        known = tl.load(row_log2) != _NO_STATISTICS
        n = program * BLOCK + tl.arange(0, BLOCK)
        log2 = tl.load(row_log2 + n, mask=n < N, other=0).to(tl.float64) * _UNIT
        total = tl.zeros((ADDED,), tl.float64)
        for first in range(0, N, ADDED):
            row = first + tl.arange(0, ADDED)
            row_square = tl.exp2(tl.load(row_log2 + row, mask=row < N, other=0).to(tl.float64) * _UNIT)
            total += tl.where(row < N, row_square, 0.0)
        factor = tl.exp2(0.5 * (tl.log2(tl.sum(total, 0) / N) - log2)).to(tl.float32)
        tl.store(row_factor + n, tl.where(known, factor, 0.0), mask=n < N)
    else:
        k = (program - programs) * BLOCK + tl.arange(0, BLOCK)
        log2 = tl.load(col_log2 + k, mask=k < K, other=0).to(tl.float64) * _UNIT
        tl.store(col_factor + k, tl.exp2(-0.5 * log2).to(tl.float32), mask=k < K)


@triton.jit
def add_parts(
    total: tl.tensor, parts: tl.tensor, first: tl.tensor, size: tl.tensor, tiles: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """total[first : first + BLOCK] += the sum over the rows of parts [tiles, size], whose places fit int32."""
    at = first + tl.arange(0, BLOCK)
    old = tl.load(total + at, mask=at < size, other=0.0)
    part = tl.zeros((_PARTS, BLOCK), tl.float32)
    added = part
    for tile in range(0, tiles, _PARTS):
        # Parts are added a turn later. Else a thread waits for its first loads before it issues the others.
        added += part
        rows = tile + tl.arange(0, _PARTS)
        mask = (rows < tiles)[:, None] & (at < size)[None, :]
        part = tl.load(parts + (rows * size)[:, None] + at[None, :], mask=mask, other=0.0)
    tl.store(total + at, old + tl.sum(added + part, 0), mask=at < size)


@triton.jit
def finish_stage_kernel(
    stage_row: tl.tensor,
    stage_col: tl.tensor,
    row_parts: tl.tensor,
    col_parts: tl.tensor,
    status: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    row_tiles: tl.tensor,
    col_tiles: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Program 0 counts a micro-batch. If that has statistics, the others add the parts of its tiles to them."""
    program = tl.program_id(0) - 1
    if program < 0:
        tl.store(status + 1, tl.load(status + 1) + 1)
    elif row_parts is not None:
        programs = tl.cdiv(N, BLOCK)
        if program < programs:
            add_parts(stage_row, row_parts, program * BLOCK, N, row_tiles, BLOCK)
        else:
            add_parts(stage_col, col_parts, (program - programs) * BLOCK, K, col_tiles, BLOCK)


@triton.jit
def merge_vector(
    log2: tl.tensor,
    staged: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    samples: tl.tensor,
    active: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """`reference.merge_statistics` of BLOCK elements, if ``active``; clears what was staged."""
    at = first + tl.arange(0, BLOCK)
    mask = at < size
    if active:
        old = tl.load(log2 + at, mask=mask, other=0)
        new = tl.div_rn(tl.load(staged + at, mask=mask, other=0.0), samples).to(tl.float64)
        merged = _DECAY * tl.exp2(old.to(tl.float64) * _UNIT) + _NEW * new
        merged = tl.maximum(tl.where(old == _NO_STATISTICS, new, merged), 1e-37)
        # No logarithm is a tie: how the reference rounds those does not matter.
        rounded = tl.floor(256 * tl.log2(merged) + 0.5)
        rounded = tl.minimum(tl.maximum(rounded, -32767.0), 32767.0)
        tl.store(log2 + at, rounded.to(tl.int16), mask=mask)
    tl.store(staged + at, tl.zeros((BLOCK,), tl.float32), mask=mask)


@triton.jit
def step_exponents(
    E: tl.tensor,
    E_accum: tl.tensor,
    stage_E: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    threshold: tl.tensor,
    active: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """`reference.exponent_rule` of BLOCK exponents, if ``active``; clears their votes. Of none before 0."""
    at = first + tl.arange(0, BLOCK)
    mask = (at >= 0) & (at < size)
    if active:
        votes = tl.load(stage_E + at, mask=mask, other=0).to(tl.int32)
        accum = tl.load(E_accum + at, mask=mask, other=0).to(tl.int32) - votes
        turn = (accum >= threshold).to(tl.int32) - (accum <= -threshold).to(tl.int32)
        stepped = tl.load(E + at, mask=mask, other=0).to(tl.int32) + turn
        tl.store(E + at, tl.minimum(tl.maximum(stepped, _E_MIN), _E_MAX).to(tl.int8), mask=mask)
        accum = tl.minimum(tl.maximum(tl.where(turn != 0, 0, accum), -127), 127)
        tl.store(E_accum + at, accum.to(tl.int8), mask=mask)
    tl.store(stage_E + at, tl.zeros((BLOCK,), tl.int8), mask=mask)


@triton.jit
def commit_vectors(
    program: tl.tensor,
    E: tl.tensor,
    E_accum: tl.tensor,
    stage_E: tl.tensor,
    row_log2: tl.tensor,
    col_log2: tl.tensor,
    stage_row: tl.tensor,
    stage_col: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    exponents: tl.tensor,
    exponent_threshold: tl.tensor,
    count: tl.tensor,
    active: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """`reference.commit_groups_and_vectors` of BLOCK rows, columns or exponents, by the number of the program."""
    if stage_row is not None:
        rows, columns = tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK)
        if program < rows:
            samples = count.to(tl.float64) * K
            merge_vector(row_log2, stage_row, program * BLOCK, N, samples.to(tl.float32), active, BLOCK)
        elif program < rows + columns:
            samples = count.to(tl.float64) * N
            merge_vector(col_log2, stage_col, (program - rows) * BLOCK, K, samples.to(tl.float32), active, BLOCK)
        program -= rows + columns
    if stage_E is not None:
        step_exponents(E, E_accum, stage_E, program * BLOCK, exponents, exponent_threshold, active, BLOCK)


def normalisers(row_log2: Tensor, col_log2: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.normalisers` in one launch."""
    N, K = row_log2.shape[0], col_log2.shape[0]
    row_factor, col_factor = (vector.new_empty(vector.shape, dtype=torch.float32) for vector in (row_log2, col_log2))
    launch(
        normalisers_kernel,
        ceil_div(N, _NORMALISED) + ceil_div(K, _NORMALISED),
        row_log2,
        col_log2,
        row_factor,
        col_factor,
        N,
        K,
        BLOCK=_NORMALISED,
        # The next power of two. Exponentials take the time: none is of a row that is not there, where there are few.
        ADDED=min(_ADDED, 1 << (N - 1).bit_length()),
        num_warps=_NORMALISED // 32,
        enable_fp_fusion=False,
    )
    return row_factor, col_factor


def finish_stage(status: Tensor, sums: tuple[Tensor, Tensor] | None, parts: tuple[Tensor, Tensor] | None) -> None:
    """Count a micro-batch, after its tiles, and add what they found of rows and columns.

    Args:
        status: int32 [2].
        sums: stage_row float32 [N] and stage_col float32 [K]; None for a rule without statistics.
        parts: float32 [tiles, N] and [tiles, K], to be added to them; None likewise.
    """
    programs, N, K, row_tiles, col_tiles = 1, 0, 0, 0, 0
    if parts is not None:
        (row_tiles, N), (col_tiles, K) = parts[0].shape, parts[1].shape
        programs += ceil_div(N, BLOCK) + ceil_div(K, BLOCK)
    row, col = sums if sums is not None else (None, None)
    row_parts, col_parts = parts if parts is not None else (None, None)
    launch(
        finish_stage_kernel,
        programs,
        row,
        col,
        row_parts,
        col_parts,
        status,
        N,
        K,
        row_tiles,
        col_tiles,
        BLOCK=BLOCK,
        num_warps=8,
    )


def vector_programs(stage_row: Tensor | None, stage_col: Tensor | None, stage_E: Tensor | None) -> int:
    """How many programs of `commit_vectors` a layer takes."""
    return sum(ceil_div(vector.numel(), BLOCK) for vector in (stage_row, stage_col, stage_E) if vector is not None)
