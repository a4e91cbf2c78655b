"""Arithmetic on bytes and 16-bit lanes of int32 words: one instruction of Hopper each, of which Triton knows none.

Its interpreter knows no machine code, so for that the same is spelt out. Signed lanes are two's complement, lane 0 the
lower half of a word.
"""

import triton
import triton.language as tl

from ternarize.backends.triton.packed import INTERPRETED

#: Compute capability of Hopper, the first with instructions for two 16-bit lanes (PTX ISA, add and min).
CAPABILITY = 9

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def machine(code: tl.constexpr, a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """What PTX makes of three int32, $1 to $3: its result $0."""
    return tl.inline_asm_elementwise(code, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def lane(word: tl.tensor, i: tl.constexpr) -> tl.tensor:
    """Signed lane i, for the interpreter. It may have a number for a word: shifts would not drop its upper bits."""
    return (((word >> (16 * i)) & 0xFFFF) ^ 0x8000) - 0x8000


@triton.jit
def add_byte(addend: tl.tensor, factor: tl.tensor, word: tl.tensor, i: tl.constexpr) -> tl.tensor:
    """``addend`` plus ``factor``, 0 to 65535, times the signed byte i."""
    if _INTERPRETED:
        total = addend + factor * ((word << (24 - 8 * i)) >> 24)
    else:
        HALF: tl.constexpr = "lo" if i < 2 else "hi"
        total = machine("dp2a." + HALF + ".u32.s32 $0, $1, $2, $3;", factor << (16 * (i % 2)), word, addend)
    return total


@triton.jit
def add_lane(addend: tl.tensor, word: tl.tensor, i: tl.constexpr) -> tl.tensor:
    """``addend`` plus the unsigned lane i."""
    if _INTERPRETED:
        total = addend + ((word >> (16 * i)) & 0xFFFF)
    else:
        total = machine("dp2a.lo.u32.u32 $0, $1, $2, $3;", word, 1 << (8 * i), addend)
    return total


@triton.jit
def byte_over_lane(word: tl.tensor, i: tl.constexpr, lanes: tl.tensor) -> tl.tensor:
    """65536 times the signed byte i of ``word`` plus the unsigned lane 1 of ``lanes``."""
    if _INTERPRETED:
        joined = (((word << (24 - 8 * i)) >> 24) << 16) | ((lanes >> 16) & 0xFFFF)
    else:
        # Bytes 2 and 3 of the lanes, the byte of the word and its sign.
        joined = machine("prmt.b32 $0, $1, $2, $3;", lanes, word, 0xC432 + 0x1100 * i)
    return joined


@triton.jit
def upper_lanes(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Lane 1 of ``low`` and lane 1 of ``high`` as lanes 0 and 1."""
    if _INTERPRETED:
        joined = ((low >> 16) & 0xFFFF) | ((high >> 16) << 16)
    else:
        joined = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    return joined


@triton.jit
def clamp_lanes(lanes: tl.tensor, offset: tl.tensor, top: tl.tensor) -> tl.tensor:
    """max(0, min(lanes + offset, top)) of signed lanes, whose sums are to fit 16 bits."""
    if _INTERPRETED:
        low = tl.maximum(tl.minimum(lane(lanes, 0) + lane(offset, 0), lane(top, 0)), 0)
        high = tl.maximum(tl.minimum(lane(lanes, 1) + lane(offset, 1), lane(top, 1)), 0)
        clamped = low | (high << 16)
    else:
        clamped = machine("{ .reg .b32 sum; add.s16x2 sum, $1, $2; min.s16x2.relu $0, sum, $3; }", lanes, offset, top)
    return clamped
