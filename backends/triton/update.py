"""The integer update of `ternarize.backends.torch.update`, equal to it bit for bit where G is exact.

A stage holds a tile of G = grad_yᵀ · x in registers and turns it into integers there: no float [N, K] exists. It is in
`update_tma` for Hopper and in `update_plain` for everything else. `commit_kernel` steps and packs the trits; what it
does on Hopper for most layers is in `update_lanes`. What is [N], [K] or [N, G] sized is in `update_vectors`. All are
launched without fused multiply-add: a rounding follows, and a CPU and a GPU have to agree about it.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton import update_lanes, update_tma
from ternarize.backends.triton.launch import ceil_div, launch
from ternarize.backends.triton.rounding import clamp, commit_words, commit_words_apart, load_key, round_off
from ternarize.backends.triton.update_lanes import commit_lanes, load_quarters, pull_of, step_of
from ternarize.backends.triton.update_plain import stage_anywhere
from ternarize.backends.triton.update_vectors import BLOCK, commit_vectors, finish_stage, normalisers, vector_programs
from ternarize.packing import ROW

#: Runs of a program of a commit, two a thread, and its warps: the fastest of five pairs on an H200
#: (docs/figures-training.md).
COMMIT_RUNS, COMMIT_WARPS = 256, 4

#: Neighbouring packed bytes of a run. Their weights are four words, a quarter of a group apart, and each word's four
#: share a block of random numbers, which no thread has to hand to another.
_RUN = tl.constexpr(4)

_ONE = tl.constexpr(reference.ONE)
_MOMENTUM_KEPT = tl.constexpr(reference.MOMENTUM_KEPT)


@triton.jit
def step_factored(
    T: tl.tensor,
    staged: tl.tensor,
    accum: tl.tensor,
    momentum: tl.tensor,
    words: tl.tensor,
    pull: tl.tensor,
    step: tl.tensor,
    bar: tl.tensor,
    theta: tl.tensor,
    limit: tl.tensor,
) -> tl.tuple:
    """`reference.factored_rule`: new trits, accumulators and momenta, all int32 as what is given.

    ``pull`` is what a staged unit adds to a momentum, ``step`` what a unit of momentum adds to an accumulator.
    """
    for_momentum, for_accum = (words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32)
    momentum = clamp(round_off(momentum * _MOMENTUM_KEPT + staged * pull, for_momentum), limit)
    accum = round_off(accum * _ONE + momentum * step, for_accum)
    # -1 where the accumulator is at its bar and the trit is not at its end: by sign bits, in fewer instructions.
    up, down = ((bar - 1 - accum) & (T - 1)) >> 31, ((accum + bar - 1) & ~T) >> 31
    back = up - down
    return T - back, clamp(accum + 2 * theta * back, theta), momentum


@triton.jit
def step_sign(
    T: tl.tensor, staged: tl.tensor, accum: tl.tensor, words: tl.tensor, step: tl.tensor, bar: tl.tensor
) -> tl.tuple:
    """`reference.sign_rule`: new trits and accumulators, all int32; ``step`` is what a vote adds to an accumulator."""
    accum = round_off(accum * _ONE + staged * step, (words >> 16).to(tl.int32))
    turn = (accum >= bar).to(tl.int32) - (accum <= -bar).to(tl.int32)
    return clamp(T + turn, 1), clamp(tl.where(turn != 0, 0, accum), 127)


@triton.jit
def commit_runs(
    program: tl.tensor,
    T_packed: tl.tensor,
    T_accum: tl.tensor,
    T_momentum: tl.tensor,
    rng: tl.tensor,
    stage: tl.tensor,
    count: tl.tensor,
    active: tl.tensor,
    lr: tl.tensor,
    rate: tl.tensor,
    bar: tl.tensor,
    theta: tl.tensor,
    unit: tl.tensor,
    limit: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    group_size: tl.tensor,
    FACTORED: tl.constexpr,
    RUNS: tl.constexpr,
    QUARTER: tl.constexpr,
) -> None:
    """Step the integers of RUNS runs of packed bytes, row after row, if ``active``.

    ``rate`` times the learning rate is what an accumulator loses for a unit of momentum (`factored`) or for a vote
    (`sign`), and ``bar`` where a trit steps; theta, unit and limit are those of `FORMS`. QUARTER is a quarter of the
    group size if no run spans two groups or rows, and 0 if one may.

    All is loaded before anything is stored: no compiler moves a load over a store.
    """
    column = tl.arange(0, _RUN)[None, :]
    key, learning_rate = load_key(rng), tl.load(lr)
    runs = tl.cdiv(N * tl.cdiv(K, 4), _RUN)
    run = program * RUNS + tl.arange(0, RUNS)
    byte = (run.to(tl.int64) * _RUN)[:, None] + column
    if QUARTER > 0:
        group, in_group = run // (QUARTER // _RUN), run % (QUARTER // _RUN) * _RUN
        # The first weight of a run, and weights from a quarter to the next.
        start, quarter = group.to(tl.int64) * (4 * QUARTER) + in_group, QUARTER
        first = start[:, None] + column
        there = (run < runs)[:, None]
        inside = (there, there, there, there)
    else:
        bytes_a_row, bytes_a_group = tl.cdiv(K, 4), tl.cdiv(group_size, 4)
        n, in_row = byte // bytes_a_row, byte % bytes_a_row
        group, in_group = in_row // bytes_a_group, in_row % bytes_a_group
        size = tl.minimum(group_size, K - group * group_size)
        quarter = (size + 3) // 4
        first_k = group * group_size + in_group
        first, there = n * K + first_k, n < N
        inside = (
            there & (in_group < size),
            there & (quarter + in_group < size),
            there & (2 * quarter + in_group < size),
            there & (3 * quarter + in_group < size),
        )
    at = (first, first + quarter, first + 2 * quarter, first + 3 * quarter)
    codes = tl.load(T_packed + byte, mask=there).to(tl.int32)
    staged = load_quarters(stage, at, inside)
    accum = load_quarters(T_accum, at, inside)
    momentum = accum
    if T_momentum is not None:
        momentum = load_quarters(T_momentum, at, inside)
    # All is on its way. Without a barrier each load is moved down to where its value is needed, and waited for there.
    tl.debug_barrier()
    if active:
        step, pull = step_of(learning_rate, rate), pull_of(unit, count)
        moved_codes = tl.zeros_like(codes)
        for i in tl.static_range(4):
            # Two shifts sign-extend a 2-bit code: it is two's complement.
            T = (codes << (30 - 2 * i)) >> 30
            old, votes = accum[i].to(tl.int32), staged[i].to(tl.int32)
            if QUARTER > 0:
                words = commit_words(key, start // 4 + i * (QUARTER // 4))
            else:
                k = first_k + i * quarter
                words = commit_words_apart(key, n * tl.cdiv(K, 4) + k // 4, k % 4)
            if FACTORED:
                if T_momentum is None:
                    old, m = (old << 28) >> 28, old >> 4
                else:
                    m = momentum[i].to(tl.int32)
                moved, new, m = step_factored(T, votes, old, m, words, pull, step, bar, theta, limit)
                if T_momentum is None:
                    new = (new & 15) | (m << 4)
                else:
                    tl.store(T_momentum + at[i], m.to(tl.int8), mask=inside[i])
            else:
                moved, new = step_sign(T, votes, old, words, step, bar)
            tl.store(T_accum + at[i], new.to(tl.int8), mask=inside[i])
            code = moved & 3 if QUARTER > 0 else tl.where(inside[i], moved & 3, 0)
            moved_codes |= code << (2 * i)
        tl.store(T_packed + byte, moved_codes.to(tl.uint8), mask=there)


@triton.jit
def commit_kernel(
    T_packed: tl.tensor,
    E: tl.tensor,
    T_accum: tl.tensor,
    T_momentum: tl.tensor,
    E_accum: tl.tensor,
    row_log2: tl.tensor,
    col_log2: tl.tensor,
    rng: tl.tensor,
    stage: tl.tensor,
    stage_E: tl.tensor,
    stage_row: tl.tensor,
    stage_col: tl.tensor,
    status: tl.tensor,
    refuse: tl.tensor,
    lr: tl.tensor,
    rate: tl.tensor,
    bar: tl.tensor,
    theta: tl.tensor,
    unit: tl.tensor,
    limit: tl.tensor,
    exponent_threshold: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    group_size: tl.tensor,
    exponents: tl.tensor,
    vectors: tl.tensor,
    FACTORED: tl.constexpr,
    RUNS: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """A layer: the first ``vectors`` programs have a part of `commit_vectors` each, the others one of `commit_runs`.

    With LANES that is done by `commit_lanes`.
    """
    program, count = tl.program_id(0), tl.load(status + 1)
    active = (tl.load(refuse) == 0) & (count > 0)
    if program < vectors:
        commit_vectors(
            program,
            E,
            E_accum,
            stage_E,
            row_log2,
            col_log2,
            stage_row,
            stage_col,
            N,
            K,
            exponents,
            exponent_threshold,
            count,
            active,
            BLOCK,
        )
    elif LANES:
        commit_lanes(
            program - vectors,
            T_packed,
            T_accum,
            T_momentum,
            rng,
            stage,
            count,
            active,
            lr,
            rate,
            unit,
            N,
            K,
            RUNS,
            QUARTER,
        )
    else:
        commit_runs(
            program - vectors,
            T_packed,
            T_accum,
            T_momentum,
            rng,
            stage,
            count,
            active,
            lr,
            rate,
            bar,
            theta,
            unit,
            limit,
            N,
            K,
            group_size,
            FACTORED,
            RUNS,
            QUARTER,
        )


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


def quarter_of(in_features: int, group_size: int) -> int:
    """QUARTER of `commit_kernel`."""
    size = in_features if group_size == ROW else group_size
    return 0 if in_features % size or size % (4 * _RUN.value) else size // 4


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
    """Apply the stage of one layer, unless it is of no micro-batch or ``refuse`` is set; drop its sums and votes."""
    N, K = T_accum.shape
    theta, unit, limit = reference.FORMS["int4" if T_momentum is None else "int8"]
    rate, bar = 1.0, threshold
    if rule == "factored":
        rate, bar = 2 * theta / unit, theta + (T_momentum is None)
    quarter = quarter_of(K, group_size)
    vectors = vector_programs(stage_row, stage_col, stage_E)
    with torch.cuda.device_of(T_packed):
        launch(
            commit_kernel,
            vectors + ceil_div(T_packed.numel(), _RUN.value * COMMIT_RUNS),
            T_packed,
            E,
            T_accum,
            T_momentum,
            E_accum,
            row_log2,
            col_log2,
            rng,
            stage,
            stage_E,
            stage_row,
            stage_col,
            status,
            refuse,
            lr,
            rate,
            bar,
            theta,
            unit,
            limit,
            exponent_threshold,
            N,
            K,
            K if group_size == ROW else min(group_size, K),
            0 if stage_E is None else stage_E.numel(),
            vectors,
            FACTORED=rule == "factored",
            RUNS=COMMIT_RUNS,
            QUARTER=quarter,
            BLOCK=BLOCK,
            LANES=rule == "factored" and update_lanes.takes(T_packed, T_accum, T_momentum, stage, quarter),
            num_warps=COMMIT_WARPS,
            enable_fp_fusion=False,
        )


update_apply = functools.partial(reference.update_apply, halves=(update_stage, update_commit))
