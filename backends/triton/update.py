"""The integer update of `ternarize.backends.torch.update`, equal to it bit for bit where G is exact.

A stage holds a tile of G = grad_yᵀ · x in registers and turns it into integers there: no float [N, K] exists. It is in
`update_tma` for Hopper and in `update_plain` for everything else. `commit_kernel` steps and packs the trits. What is
[N], [K] or [N, G] sized is in `update_vectors`. All are launched without fused multiply-add: a floor or a logarithm's
rounding follows, and a CPU and a GPU have to agree about it.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton import update_tma
from ternarize.backends.triton.packed import tiling
from ternarize.backends.triton.rounding import (
    add_uniform,
    clamp,
    floor,
    floor_to_int,
    random_bits,
    to_int,
    words_together,
)
from ternarize.backends.triton.update_plain import stage_anywhere
from ternarize.backends.triton.update_vectors import commit_vectors, finish_stage, normalisers
from ternarize.philox import ACCUMULATOR_STREAM, MOMENTUM_STREAM

#: Packed bytes of a tile of a commit, and neighbouring weights that a thread loads at once. As many as 4 share a block
#: of random numbers, which then stays in the thread that drew it; with 16, loads are wider and the numbers change
#: threads through shared memory. No fewer bytes than threads: holders of a copy could read what another has stepped.
COMMIT_BYTES, COMMIT_RUN = 1024, 4

_MOMENTUM_STREAM = tl.constexpr(MOMENTUM_STREAM)
_ACCUMULATOR_STREAM = tl.constexpr(ACCUMULATOR_STREAM)


@triton.jit
def commit_kernel(
    T_packed: tl.tensor,
    T_accum: tl.tensor,
    T_momentum: tl.tensor,
    rng: tl.tensor,
    stage: tl.tensor,
    status: tl.tensor,
    refuse: tl.tensor,
    lr: tl.tensor,
    step: tl.tensor,
    bar: tl.tensor,
    theta: tl.tensor,
    unit: tl.tensor,
    limit: tl.tensor,
    gain: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    group_size: tl.tensor,
    chunks: tl.tensor,
    tiles: tl.tensor,
    FACTORED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS_TOGETHER: tl.constexpr,
) -> None:
    """One tile, BLOCK_C packed bytes of BLOCK_N rows: clears its stage and, unless refused, steps its integers.

    ``step`` times the learning rate is what an accumulator loses for a unit of momentum (`factored`) or for a vote
    (`sign`), and ``bar`` where a trit steps; theta, unit and limit are those of `FORMS`, gain is 1 - MOMENTUM_DECAY.
    The first weights of all bytes are stepped together, then the second and so on: each is a run of neighbours, that so
    many bytes are loaded at once as ALIGNED says. 1: a group may end within the tile.
    """
    step *= tl.load(lr)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) % tiles
    group = tile // chunks
    place = tile % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = (n < N)[:, None]
    if ALIGNED > 1:
        size, bytes_a_row = group_size, tl.multiple_of(K // 4, ALIGNED)
        quarter = tl.multiple_of(group_size // 4, ALIGNED)
        start, byte = tl.multiple_of(group * group_size, ALIGNED), tl.multiple_of(group * quarter, ALIGNED) + place
        in_bytes = rows
    else:
        size, bytes_a_row = tl.minimum(group_size, K - group * group_size), (K + 3) // 4
        quarter = (size + 3) // 4
        start, byte = group * group_size, group * (group_size // 4) + place
        in_bytes = rows & (place < quarter)[None, :]
    packed = T_packed + n.to(tl.int64)[:, None] * bytes_a_row + byte[None, :]
    codes = tl.load(packed, mask=in_bytes, other=0).to(tl.int32)
    moved_codes = tl.zeros_like(codes)
    count = tl.load(status + 1)
    active = (tl.load(refuse) == 0) & (count > 0)
    # unit is a power of two: the mean times unit, as the reference has it, is the same.
    mean = tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32)) * unit
    for i in tl.static_range(4):
        k = start + i * quarter + place
        inside = rows if ALIGNED > 1 else in_bytes & (i * quarter + place < size)[None, :]
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        staged = tl.load(stage + at, mask=inside, other=0).to(tl.float32)
        tl.store(stage + at, tl.zeros((BLOCK_N, BLOCK_C), tl.int8), mask=inside)
        if active:
            # Two shifts sign-extend a 2-bit code: it is two's complement.
            T = (codes << (30 - 2 * i)) >> 30
            state = tl.load(T_accum + at, mask=inside, other=0).to(tl.int32)
            bits = random_bits(rng, tl.full((), _ACCUMULATOR_STREAM, tl.int32), n, k, K, WORDS_TOGETHER)
            if FACTORED:
                if T_momentum is None:
                    accum, momentum = (state << 28) >> 28, (state >> 4).to(tl.float32)
                else:
                    accum = state
                    momentum = tl.load(T_momentum + at, mask=inside, other=0).to(tl.float32)
                more_bits = random_bits(rng, tl.full((), _MOMENTUM_STREAM, tl.int32), n, k, K, WORDS_TOGETHER)
                momentum += floor(add_uniform((staged * mean - momentum) * gain, more_bits))
                momentum = clamp(momentum, limit)
                accum -= floor_to_int(add_uniform(momentum * step, bits))
                moved = clamp(T + (accum >= bar).to(tl.int32) - (accum <= -bar).to(tl.int32), 1)
                accum = clamp(accum - 2 * theta * (moved - T), theta)
                if T_momentum is None:
                    accum = (accum & 15) | (to_int(momentum) << 4)
                else:
                    tl.store(T_momentum + at, to_int(momentum).to(tl.int8), mask=inside)
            else:
                accum = state - floor_to_int(add_uniform(staged * step, bits))
                turn = (accum >= bar).to(tl.int32) - (accum <= -bar).to(tl.int32)
                moved = clamp(T + turn, 1)
                accum = clamp(tl.where(turn != 0, 0, accum), 127)
            tl.store(T_accum + at, accum.to(tl.int8), mask=inside)
            code = moved & 3 if ALIGNED > 1 else tl.where(inside, moved & 3, 0)
            moved_codes |= code << (2 * i)
    if active:
        tl.store(packed, moved_codes.to(tl.uint8), mask=in_bytes)


def update_stage(
    grad_y: Sequence[Tensor],
    x: Tensor,
    T_packed: Sequence[Tensor],
    row_log2: Sequence[Tensor],
    col_log2: Sequence[Tensor],
    rng: Sequence[Tensor],
    stage: Sequence[Tensor],
    stage_E: Sequence[Tensor],
    stage_row: Sequence[Tensor],
    stage_col: Sequence[Tensor],
    status: Sequence[Tensor],
    group_size: int,
    rule: str,
) -> None:
    """Add one micro-batch's integers to the stage of some layers that share x; see `ternarize.ops` for shapes."""
    inputs = x.reshape(-1, x.shape[-1])
    for i, gradient in enumerate(grad_y):
        rows = gradient.reshape(-1, gradient.shape[-1])
        votes = stage_E[i] if stage_E else None
        with torch.cuda.device_of(x):
            parts: tuple[Tensor, Tensor] | None
            factors = normalisers(row_log2[i], col_log2[i]) if rule == "factored" else None
            if factors is not None and votes is None and update_tma.takes(rows, inputs):
                parts = update_tma.stage_factored(rows, inputs, *factors, rng[i], stage[i], status[i])
            else:
                parts = stage_anywhere(
                    rows, inputs, T_packed[i], factors, rng[i], stage[i], votes, status[i], group_size
                )
            # After the tiles: all their programs draw from the stream of the same count.
            finish_stage(status[i], (stage_row[i], stage_col[i]) if factors is not None else None, parts)


def alignment(size: int, in_features: int, BLOCK_C: int) -> int:
    """ALIGNED of `commit_kernel`: bytes of an aligned run of weights, if every tile of groups of ``size`` is full."""
    if in_features % size or size % (4 * BLOCK_C):
        return 1
    return math.gcd(size // 4, COMMIT_RUN)


def update_commit(
    T_packed: Tensor,
    E: Tensor,
    T_accum: Tensor,
    T_momentum: Tensor | None,
    E_accum: Tensor | None,
    row_log2: Tensor | None,
    col_log2: Tensor | None,
    rng: Tensor,
    stage: Tensor,
    stage_E: Tensor | None,
    stage_row: Tensor | None,
    stage_col: Tensor | None,
    status: Tensor,
    refuse: Tensor,
    lr: Tensor,
    threshold: int,
    exponent_threshold: int,
    group_size: int,
    rule: str,
) -> None:
    """Apply and clear the stage of one layer; change nothing else if ``refuse`` is set or nothing is staged."""
    N, K = T_accum.shape
    size, chunks, tiles, BLOCK_C = tiling(K, group_size)
    theta, unit, limit = reference.FORMS["int4" if T_momentum is None else "int8"]
    step, bar = 1.0, threshold
    if rule == "factored":
        step, bar = 2 * theta / unit, theta + (T_momentum is None)
    with torch.cuda.device_of(T_packed):
        BLOCK_N = COMMIT_BYTES // BLOCK_C
        commit_kernel[(triton.cdiv(N, BLOCK_N) * tiles,)](
            T_packed,
            T_accum,
            T_momentum,
            rng,
            stage,
            status,
            refuse,
            lr,
            step,
            bar,
            theta,
            unit,
            float(limit),
            1 - reference.MOMENTUM_DECAY,
            N,
            K,
            size,
            chunks,
            tiles,
            FACTORED=rule == "factored",
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            ALIGNED=alignment(size, K, BLOCK_C),
            WORDS_TOGETHER=words_together(K, group_size),
            num_warps=4,
            enable_fp_fusion=False,
        )
        commit_vectors(
            E, E_accum, row_log2, col_log2, stage_E, stage_row, stage_col, status, refuse, exponent_threshold
        )
    # After all of them: each reads the count.
    status.zero_()


update_apply = functools.partial(reference.update_apply, halves=(update_stage, update_commit))
