"""The commit of `factored` in its int8 form, a word of four weights at a time, for Hopper.

A commit reads and writes 5.5 bytes a weight. In that time a scheduler of an H200 has 38 cycles for the 32 weights of a
warp's lanes, and most instructions on integers take two: `commit_runs` needs 58 cycles and this 31. Weights are stepped
two at a time, in the 16-bit halves of a word: those of columns c and c + 2 of a run, whose codes are as far apart. What
is on its way to a rounding is 32 bits wide: its upper half is the rounded value, which nothing has to be shifted for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton.lanes import CAPABILITY, add_byte, add_lane, byte_over_lane, clamp_lanes, upper_lanes
from ternarize.backends.triton.packed import INTERPRETED
from ternarize.backends.triton.rounding import load_key, philox
from ternarize.philox import COMMIT_STREAM

_COMMIT_STREAM = tl.constexpr(COMMIT_STREAM)
_ONE = tl.constexpr(reference.ONE)
_MOMENTUM_KEPT = tl.constexpr(reference.MOMENTUM_KEPT)
_MAX_STEP = tl.constexpr(reference.MAX_STEP)

#: A 1 in each lane, byte and code of a word, and the sign of each byte.
_LANES, _BYTES, _CODES = tl.constexpr(0x00010001), tl.constexpr(0x01010101), tl.constexpr(0x55555555)
_SIGNS = tl.constexpr(0x80808080 - 2**32)

#: theta, which M_max and the bar equal. What lies between -theta and theta is kept with theta added: from 0 on.
_THETA = tl.constexpr(reference.FORMS["int8"][0])
#: Added to such lanes, it leaves 1 of theta and nothing above 0 of all else.
_BELOW_TOP = tl.constexpr((1 - 2 * _THETA.value) % 2**16 * _LANES.value - 2**32)


@triton.jit
def load_quarters(plane: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tuple:
    """What a plane holds for the lowest codes of some bytes, for the next and so on: its elements, four times."""
    return (
        tl.load(plane + at[0], mask=inside[0]),
        tl.load(plane + at[1], mask=inside[1]),
        tl.load(plane + at[2], mask=inside[2]),
        tl.load(plane + at[3], mask=inside[3]),
    )


@triton.jit
def step_of(learning_rate: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """What a unit of momentum, or a vote, adds to an accumulator: `reference.fixed_step`, below 0."""
    return -tl.minimum(tl.floor(learning_rate * rate * _ONE + 0.5), _MAX_STEP).to(tl.int32)


@triton.jit
def pull_of(unit: tl.tensor, count: tl.tensor) -> tl.tensor:
    """What a staged unit adds to a momentum, to nearest, of ``count`` micro-batches, 1 at least."""
    twice = 2 * unit * (_ONE - _MOMENTUM_KEPT) + count
    return (twice.to(tl.uint32) // (2 * count).to(tl.uint32)).to(tl.int32)


@triton.jit
def join(even: tl.tensor, odd: tl.tensor) -> tl.tensor:
    """Words of four int8 from lanes of columns 0 and 2 and of 1 and 3 that hold theta, 127, more."""
    return (even + _BYTES + (odd << 8)) ^ _SIGNS


@triton.jit
def step_momentum(
    momentum: tl.tensor, staged: tl.tensor, words: tl.tuple, pull: tl.tensor, c: tl.constexpr
) -> tl.tensor:
    """Momenta of columns c and c + 2 plus theta, as lanes.

    Args:
        momentum: int32 words of four weights each.
        staged: likewise.
        words: int32, four random words, one a weight.
        pull: int32 of `pull_of`.
        c: 0 or 1.
    """
    zeros = tl.zeros_like(staged)
    # Below 2^26, as `pull` is below 6.5 · 2^16.
    low = add_byte(add_byte(zeros, 1, staged, c) * pull, _MOMENTUM_KEPT, momentum, c)
    high = add_byte(add_byte(zeros, 1, staged, c + 2) * pull, _MOMENTUM_KEPT, momentum, c + 2)
    rounded = upper_lanes(add_lane(low, words[c], 0), add_lane(high, words[c + 2], 0))
    return clamp_lanes(rounded, _THETA * _LANES, 2 * _THETA * _LANES)


@triton.jit
def step_accum(
    accum: tl.tensor,
    momentum: tl.tensor,
    words: tl.tuple,
    at_top: tl.tensor,
    at_bottom: tl.tensor,
    step: tl.tensor,
    c: tl.constexpr,
    SHIFT: tl.constexpr,
) -> tl.tuple:
    """Accumulators of columns c and c + 2 plus theta, as lanes, and the steps of their trits, as a sum of lanes.

    Args:
        accum: int32 words of four weights each.
        momentum: lanes of `step_momentum`.
        words: int32, four random words, one a weight.
        at_top: int32 words of codes, with a 1 in the code of each trit that is 1.
        at_bottom: likewise of each that is -1.
        step: int32 of `step_of`.
        c: 0 or 1.
        SHIFT: where the code of column c is in them.
    """
    minus_theta = tl.zeros_like(accum) - _THETA
    low = add_lane(minus_theta, momentum, 0) * step + byte_over_lane(accum, c, words[c])
    high = add_lane(minus_theta, momentum, 1) * step + byte_over_lane(accum, c + 2, words[c + 2])
    # No further than 32640 from 0: theta more or less fits a lane too.
    rounded = upper_lanes(low, high)
    bounded = clamp_lanes(rounded, _THETA * _LANES, 2 * _THETA * _LANES)
    # Lanes below 0 for a trit at its end and above 0 for others: none of the shifts leaves anything in bit 0 of a lane.
    up = clamp_lanes(bounded, _BELOW_TOP, (at_top << (15 - SHIFT)) | _LANES)
    down = clamp_lanes(2 * _THETA * _LANES - bounded, _BELOW_TOP, (at_bottom << (15 - SHIFT)) | _LANES)
    offset = up * (2**16 - 2 * _THETA) + down * (2 * _THETA) + _THETA * _LANES
    return clamp_lanes(rounded, offset, 2 * _THETA * _LANES), up - down


@triton.jit
def commit_lanes(
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
    unit: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    RUNS: tl.constexpr,
    QUARTER: tl.constexpr,
) -> None:
    """`commit_runs` of whole runs, of planes that start at multiples of 4 bytes: a run of codes is a word."""
    key, learning_rate = load_key(rng), tl.load(lr)
    # In words, of which a plane has less than 2^31.
    run = program * RUNS + tl.arange(0, RUNS)
    there = run < N * (K // (4 * QUARTER)) * (QUARTER // 4)
    first = run // (QUARTER // 4) * QUARTER + run % (QUARTER // 4)
    if QUARTER % 8 == 0:
        # Neighbours are loaded together.
        first = tl.max_contiguous(tl.multiple_of(first, 2), 2)
    at = (first, first + QUARTER // 4, first + QUARTER // 2, first + 3 * QUARTER // 4)
    inside = (there, there, there, there)
    pointer: tl.constexpr = tl.pointer_type(tl.int32)
    packed, accum, momentum = T_packed.to(pointer) + run, T_accum.to(pointer), T_momentum.to(pointer)
    codes = tl.load(packed, mask=there)
    old_accum = load_quarters(accum, at, inside)
    old_momentum = load_quarters(momentum, at, inside)
    staged = load_quarters(stage.to(pointer), at, inside)
    # All is on its way. Without a barrier each load is moved down to where its value is needed, and waited for there.
    tl.debug_barrier()
    if active:
        step, pull = step_of(learning_rate, rate), pull_of(unit, count)
        nonzero, at_bottom = codes & _CODES, (codes >> 1) & _CODES
        at_top = nonzero & ~at_bottom
        # Trits plus 1.
        moved = (nonzero ^ _CODES) | (at_top << 1)
        # Zeros, which only LLVM finds out. Until then they make Triton lay the blocks out as what was loaded.
        zeros = (codes.to(tl.uint32, bitcast=True) >> 16) >> 16
        for i in tl.static_range(4):
            # A word's weights have a block, whose number is the word's.
            block = at[i].to(tl.uint32, bitcast=True) + zeros
            w0, w1, w2, w3 = philox(block, zeros, zeros + key[2], zeros + _COMMIT_STREAM, key[0], key[1])
            words = (w0.to(tl.int32), w1.to(tl.int32), w2.to(tl.int32), w3.to(tl.int32))
            m0 = step_momentum(old_momentum[i], staged[i], words, pull, 0)
            m1 = step_momentum(old_momentum[i], staged[i], words, pull, 1)
            tl.store(momentum + at[i], join(m0, m1), mask=there)
            a0, moves0 = step_accum(old_accum[i], m0, words, at_top, at_bottom, step, 0, 2 * i)
            a1, moves1 = step_accum(old_accum[i], m1, words, at_top, at_bottom, step, 1, 2 * i + 8)
            tl.store(accum + at[i], join(a0, a1), mask=there)
            moved += (moves0 << (2 * i)) + (moves1 << (2 * i + 8))
        nonzero = ~moved & _CODES
        tl.store(packed, nonzero | ((nonzero << 1) & ~moved), mask=there)


def takes(T_packed: Tensor, T_accum: Tensor, T_momentum: Tensor | None, stage: Tensor, quarter: int) -> bool:
    """Whether `commit_lanes` can step a layer: with momenta, of whole runs, on Hopper or later.

    Args:
        T_packed: uint8, the packed trits.
        T_accum: int8 [N, K].
        T_momentum: int8 [N, K] or None.
        stage: int8 [N, K].
        quarter: QUARTER of `commit_kernel`.
    """
    if T_momentum is None or quarter == 0:
        return False
    if not INTERPRETED and torch.cuda.get_device_capability(T_packed.device)[0] < CAPABILITY:
        return False
    return all(plane.data_ptr() % 4 == 0 for plane in (T_packed, T_accum, T_momentum, stage))
