"""Stochastic rounding in kernels: the random bits of `ternarize.philox`, bit for bit."""

import triton
import triton.language as tl

from ternarize.philox import COMMIT_STREAM, FRACTION_BITS, GRADIENT_STREAM

_COMMIT_STREAM = tl.constexpr(COMMIT_STREAM)
_GRADIENT_STREAM = tl.constexpr(GRADIENT_STREAM)
_FRACTION_BITS = tl.constexpr(FRACTION_BITS)
_ONE = tl.constexpr(float(2**FRACTION_BITS))

#: Added to 1.5 · 2^23, a float32 below 2^22 is rounded to an integer, to nearest with ties to even, and that is in the
#: last bits of the sum: an addition, of which a GPU does more a second than of conversions.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)


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
def load_key(rng: tl.tensor) -> tl.tuple:
    """Seed, layer and step as uint32: once, because no load passes a store."""
    halves = rng.to(tl.pointer_type(tl.uint32))
    return tl.load(halves), tl.load(halves + 2), tl.load(halves + 4)


@triton.jit
def random_words(key: tl.tuple, stream: tl.tensor, block: tl.tensor) -> tl.tuple:
    """The four words of int64 blocks of one stream, uint32 each."""
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zeros = tl.zeros_like(low)
    return philox(low, high, zeros + key[2], zeros + stream.to(tl.uint32), key[0], key[1])


@triton.jit
def interleave(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor) -> tl.tensor:
    """[..., C] four times to [..., C, 2, 2], which is [..., C, 4]: word i of block c at c, i."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def commit_words(key: tl.tuple, block: tl.tensor) -> tl.tensor:
    """The words of `philox.commit_bits` of int64 blocks [R], which serve 4 elements each: uint32 [R, 4]."""
    w0, w1, w2, w3 = random_words(key, tl.full((), _COMMIT_STREAM, tl.int32), block)
    return tl.reshape(interleave(w0, w1, w2, w3), (block.shape[0], 4))


@triton.jit
def commit_words_apart(key: tl.tuple, block: tl.tensor, word: tl.tensor) -> tl.tensor:
    """The same of elements that share no block: word 0 to 3 of a block each, uint32 of their shape."""
    w0, w1, w2, w3 = random_words(key, tl.full((), _COMMIT_STREAM, tl.int32), block)
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))


@triton.jit
def first_of_eight(tile: tl.tensor) -> tl.tensor:
    """Of a tile of whole runs of 32 columns the first of each 8 that share a block, [R, C] to [R, C / 8]."""
    ROWS: tl.constexpr = tile.shape[0]
    RUNS: tl.constexpr = tile.shape[1] // 32
    apart = tl.permute(tl.reshape(tile, (ROWS, RUNS, 2, 2, 4, 2)), (0, 1, 4, 2, 3, 5))
    words, _ = tl.split(apart)
    pairs, _ = tl.split(words)
    first, _ = tl.split(pairs)
    return tl.reshape(first, (ROWS, RUNS * 4))


@triton.jit
def gradient_bits(
    key: tl.tuple, micro_batch: tl.tensor, n: tl.tensor, run: tl.tensor, runs: tl.tensor, G: tl.tensor
) -> tl.tensor:
    """`philox.gradient_bits` of rows n and whole runs of 32 columns, of which a row has ``runs``: int32.

    If G, of float32, lies in wgmma's accumulators, nothing moves: a thread draws for the columns it holds.
    """
    ROWS: tl.constexpr = G.shape[0]
    WIDTH: tl.constexpr = G.shape[1]
    blocks = tl.reshape(run[:, None] * 4 + tl.arange(0, 4)[None, :], (WIDTH // 8,))
    block = (n.to(tl.int64) * (4 * runs))[:, None] + blocks[None, :]
    # Zero, which only LLVM finds out. Until then it makes Triton lay the blocks out as G, so that no word has to move.
    block += ((first_of_eight(G).to(tl.uint32, bitcast=True) >> 16) >> 16).to(tl.int64)
    w0, w1, w2, w3 = random_words(key, micro_batch + _GRADIENT_STREAM, block)
    words = tl.reshape(interleave(w0, w1, w2, w3), (ROWS, run.shape[0], 4, 4))
    words = tl.permute(words, (0, 1, 3, 2))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, WIDTH)).to(tl.int32)


@triton.jit
def gradient_bits_apart(key: tl.tuple, micro_batch: tl.tensor, n: tl.tensor, k: tl.tensor, K: tl.tensor) -> tl.tensor:
    """The same of any rows n and columns k, for eight times the work: int32."""
    block = (n.to(tl.int64) * (4 * tl.cdiv(K, 32)))[:, None] + (k // 32 * 4 + k % 8 // 2)[None, :]
    w0, w1, w2, w3 = random_words(key, micro_batch + _GRADIENT_STREAM, block)
    word = (k % 32 // 8)[None, :]
    drawn = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return ((drawn >> (k % 2 * 16)[None, :].to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def to_fixed(value: tl.tensor) -> tl.tensor:
    """`philox.to_fixed` of float32 below 64: the product with a power of two is exact, the sum rounds."""
    return tl.fma(value, _ONE, _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def round_off(fixed: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """`philox.round_off`."""
    return (fixed + bits) >> _FRACTION_BITS


@triton.jit
def clamp(value: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Value within -limit and limit."""
    return tl.minimum(tl.maximum(value, -limit), limit)
