"""Stochastic rounding in kernels: the random numbers of `ternarize.philox`, bit for bit, and a floor."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ternarize.backends.triton.packed import INTERPRETED
from ternarize.packing import ROW

_INTERPRETED = tl.constexpr(INTERPRETED)

#: Added to 1.5 · 2^23, a float32 below 2^22 is rounded to an integer, which then is in the last bits of the sum.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)


def words_together(in_features: int, group_size: int) -> bool:
    """Whether every 4 neighbouring columns of a tile start at a multiple of 4, and so share a block of Philox."""
    size = in_features if group_size == ROW else min(group_size, in_features)
    tail = in_features % size
    return -(-size // 4) % 4 == 0 and -(-tail // 4) % 4 == 0


@triton.jit
def philox(c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tuple:
    """Ten rounds on uint32: `tl.philox` with one wide product where that has a high and a low one."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = p0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random_words(rng: tl.tensor, stream: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tuple:
    """The four words of the blocks low + 2^32 · high, uint32, of one stream."""
    key0, key1 = tl.load(rng).to(tl.uint32), tl.load(rng + 1).to(tl.uint32)
    step = tl.load(rng + 2).to(tl.uint32)
    zeros = tl.zeros_like(low)
    return philox(low, high, zeros + step, zeros + stream.to(tl.uint32), key0, key1)


@triton.jit
def interleave(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor) -> tl.tensor:
    """[R, C, ] four times to [R, 4 * C]: word i of block c in column 4 * c + i."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (w0.shape[0], 4 * w0.shape[1]))


@triton.jit
def random_bits(
    rng: tl.tensor,
    stream: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    K: tl.tensor,
    WORDS_TOGETHER: tl.constexpr,
) -> tl.tensor:
    """`ternarize.philox.uniform` at rows n and columns k, times 2^24: float32.

    WORDS_TOGETHER is that of `words_together`: then a block of Philox serves four columns, else only one.
    """
    in_row = tl.min(tl.reshape(k, (k.shape[0] // 4, 4)), 1) // 4 if WORDS_TOGETHER else k // 4
    block = n.to(tl.int64)[:, None] * ((K + 3) // 4) + in_row[None, :]
    w0, w1, w2, w3 = random_words(rng, stream, block.to(tl.uint32), (block >> 32).to(tl.uint32))
    if WORDS_TOGETHER:
        bits = interleave(w0, w1, w2, w3)
    else:
        word = (k % 4)[None, :]
        bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return (bits >> 8).to(tl.float32)


@triton.jit
def add_uniform(value: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """Value plus the uniform numbers of `random_bits`, rounded once: their product with a power of two is exact."""
    return tl.fma(bits, 5.9604644775390625e-08, value)


@triton.jit
def floor(value: tl.tensor) -> tl.tensor:
    """Floor of float32 below 2^22: two additions, where the instruction has a sixteenth of their rate."""
    if _INTERPRETED:
        return tl.floor(value)
    return libdevice.add_rd(value, _MAGIC) - _MAGIC


@triton.jit
def floor_to_int(value: tl.tensor) -> tl.tensor:
    """The same as int32."""
    if _INTERPRETED:
        return tl.floor(value).to(tl.int32)
    return libdevice.add_rd(value, _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def to_int(value: tl.tensor) -> tl.tensor:
    """int32 of integers below 2^22 in float32, likewise."""
    return (value + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def clamp(value: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Value within -limit and limit."""
    return tl.minimum(tl.maximum(value, -limit), limit)
