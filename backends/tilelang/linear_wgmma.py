# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `ternarize.backends.tilelang.linear` on wgmma, for any number of tokens."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import MULTIPROCESSORS
from ternarize.backends.tilelang.layers import Dtype, LayerShape, call_arguments

SOURCE = Path(__file__).with_name("linear_wgmma.cuh").read_text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """The part of y that one cluster of blocks computes, and how far it loads ahead."""

    BLOCK_M: int
    """Tokens, a multiple of 16."""
    BLOCK_N: int
    """Outputs: 64 for each warpgroup."""
    stages: int
    """Steps along K, of one scale group each, that are in flight."""
    split: int = 1
    """Blocks of the cluster, among which K is split: a divisor of the groups a row and of BLOCK_M."""
    blocks_per_multiprocessor: int = 1
    """Blocks that fit a multiprocessor at a time: what bounds the registers of a thread."""


def _exp2(exponent: Any) -> Any:
    """2^exponent as float32, exact for integers in [-126, 127]."""
    return T.reinterpret((T.cast(exponent, T.int32) + 127) << 23, T.float32)


def wgmma_program(
    layers: Sequence[LayerShape],
    K: int,
    g: int,
    dtype: Dtype,
    *,
    guarded: bool,
    tile: Tile,
) -> Any:
    """The program for the layers of a call and any number of tokens.

    It computes yᵀ = W · xᵀ: the trits are decoded in registers, straight into the A operand of wgmma, so no decoded
    weight is ever written to memory (linear_wgmma.cuh). One step along K is one scale group. bfloat16 holds T · 2^E
    for every E in [-126, 127], so the operand is the weight itself; float16 does not, so there the operand is 2T, and
    2^(E - 1) multiplies the float32 sum of its group.

    TMA fills what lies beyond M and N with zeros and drops it on the way back. Where the rows of a tensor are no
    multiple of 16 bytes (T_packed if K is no multiple of 64, y if N is no multiple of 8), and for the 8-byte groups of
    g = 32, TileLang copies with ordinary, predicated loads and stores instead.

    Args:
        layers: of the call: one, of one plane, without a mantissa.
        K: in_features, a multiple of g.
        g: weights a scale group, one of 32, 64, 128 and 256.
        dtype: of x and y.
        guarded: whether there is a status for each layer.
        tile: how the work is shared out.

    Returns:
        A TileLang prim_func of the arguments of `ternarize.backends.tilelang.layers.call_arguments`.
    """
    (layer,) = layers
    N, has_bias = layer.N, layer.bias
    BLOCK_M, BLOCK_N, split = tile.BLOCK_M, tile.BLOCK_N, tile.split
    bytes_per_group = g // 4
    pairs = g // 32
    steps = K // g // split
    scaled = dtype == "bfloat16"
    decode_weight = f"ternarize::decode_weight<{g}, {str(scaled).lower()}>"

    @T.prim_func
    def ternary_linear():
        x, (buffers,) = call_arguments(layers, K, g, dtype, guarded=guarded)
        T_packed, E, bias, bias_exponent, y = (
            buffers.T_packed,
            buffers.E,
            buffers.bias,
            buffers.bias_exponent,
            buffers.y,
        )
        M = x.shape[0]
        with T.Kernel(
            split * T.ceildiv(N, BLOCK_N), T.ceildiv(M, BLOCK_M), threads=2 * BLOCK_N, cluster_dims=split
        ) as (block_n, block_m):
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(tile.blocks_per_multiprocessor)
            if tile.blocks_per_multiprocessor > 1:
                # Moving registers to the warpgroups that compute takes more of them than the blocks' share.
                T.no_set_max_nreg()
            rank = block_n % split
            n0, m0 = block_n // split * BLOCK_N, block_m * BLOCK_M
            s_x = T.alloc_shared((BLOCK_M, g), dtype)
            s_packed = T.alloc_shared((BLOCK_N, bytes_per_group), T.uint8)
            packed = T.alloc_local((2, pairs, 2), T.uint8)
            weight = T.alloc_fragment((BLOCK_N, g), dtype)
            accumulator = T.alloc_fragment((BLOCK_N, BLOCK_M), T.float32)
            if not scaled:
                group_sum = T.alloc_fragment((BLOCK_N, BLOCK_M), T.float32)
                scale = T.alloc_fragment((BLOCK_N,), T.float32)
            if has_bias:
                b = T.alloc_fragment((BLOCK_N,), T.float32)
            # The registers of wgmma's operand A: a warp has 16 rows, a quad of its lanes 2 of them.
            T.annotate_layout(
                {
                    weight: T.Fragment(
                        (BLOCK_N, g),
                        forward_thread_fn=lambda n, k: n // 16 * 32 + n % 8 * 4 + k % 8 // 2,
                        forward_index_fn=lambda n, k: k // 16 * 8 + k % 16 // 8 * 4 + n % 16 // 8 * 2 + k % 2,
                    )
                }
            )
            thread = T.get_thread_binding()
            row = thread // 32 * 16 + thread % 32 // 4
            pair = thread % 4 * 2

            T.clear(accumulator)
            for step in T.Pipelined(steps, num_stages=tile.stages):
                k = rank * steps + step
                T.copy(x[m0, k * g], s_x)
                T.copy(T_packed[n0, k * bytes_per_group], s_packed)
                for half, i in T.grid(2, pairs):
                    for byte in T.vectorized(2):
                        packed[half, i, byte] = s_packed[row + 8 * half, 8 * i + pair + byte]
                T.call_extern(
                    "handle",
                    decode_weight,
                    T.access_ptr(packed, "r"),
                    T.access_ptr(weight, "w"),
                    # Rows past the last read its exponent: TileLang would guard a read out of bounds by leaving the
                    # whole call out, and with it the row that is there.
                    T.call_extern("int32", "ternarize::half_scale_bits", T.cast(E[T.min(n0 + row, N - 1), k], T.int32)),
                    T.call_extern(
                        "int32", "ternarize::half_scale_bits", T.cast(E[T.min(n0 + row + 8, N - 1), k], T.int32)
                    ),
                )
                if scaled:
                    T.gemm(weight, s_x, accumulator, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                else:
                    T.gemm(weight, s_x, group_sum, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
                    for n in T.Parallel(BLOCK_N):
                        scale[n] = _exp2(E[n0 + n, k]) * 0.5
                    for n, m in T.Parallel(BLOCK_N, BLOCK_M):
                        accumulator[n, m] += group_sum[n, m] * scale[n]

            if has_bias:
                for n in T.Parallel(BLOCK_N):
                    # bias_exponent reaches -128, where 2^bias_exponent is subnormal: two normal factors instead.
                    half = T.cast(bias_exponent[0], T.int32) >> 1
                    b[n] = T.cast(bias[n0 + n], T.float32) * _exp2(half) * _exp2(bias_exponent[0] - half)
                for n, m in T.Parallel(BLOCK_N, BLOCK_M):
                    accumulator[n, m] += T.if_then_else(rank == 0, b[n], 0.0)
            if split == 1:
                s_y = T.alloc_shared((BLOCK_M, BLOCK_N), dtype)
                for n, m in T.Parallel(BLOCK_N, BLOCK_M):
                    s_y[m, n] = accumulator[n, m]
                T.copy(s_y, y[m0, n0])
            else:
                s_part = T.alloc_shared((BLOCK_M, BLOCK_N), T.float32)
                for n, m in T.Parallel(BLOCK_N, BLOCK_M):
                    s_part[m, n] = accumulator[n, m]
                T.call_extern("handle", "ternarize::cluster_barrier")
                for i, n in T.Parallel(BLOCK_M // split, BLOCK_N):
                    m = rank * (BLOCK_M // split) + i
                    y[m0 + m, n0 + n] = T.call_extern(
                        "float32", f"ternarize::cluster_sum<{split}>", T.address_of(s_part[m, n])
                    )
                # No block may leave while another reads its shared memory.
                T.call_extern("handle", "ternarize::cluster_barrier")

    return ternary_linear


#: A few tokens: y is narrow, reading the weight is all the time, so many loads in flight.
_NARROW = Tile(BLOCK_M=16, BLOCK_N=64, stages=6, blocks_per_multiprocessor=2)
_MIDDLE = Tile(BLOCK_M=64, BLOCK_N=64, stages=4, blocks_per_multiprocessor=2)
_MIDDLE_WIDE = Tile(BLOCK_M=64, BLOCK_N=128, stages=4)
#: The tensor cores are all the time. With groups of 256 its stages fill 216 of the 227 KiB of shared memory.
_WIDE = Tile(BLOCK_M=128, BLOCK_N=128, stages=3)
#: The fastest where it fits: bfloat16, whose sums need no second set of registers, and groups of 64 and 128. Groups of
#: 32 are copied by threads, not by TMA, and those threads leave too few registers.
_WIDEST = Tile(BLOCK_M=256, BLOCK_N=128, stages=2)

#: More tokens than this, the BLOCK_M of the next smaller tiles, are what a tile is worth its size for.
_NEXT_SMALLER = {64: 16, 128: 64, 256: 128}

TILES = (_NARROW, _MIDDLE, _MIDDLE_WIDE, _WIDE, _WIDEST)

#: Splitting K over a cluster costs a few microseconds: each part has to have so many steps.
_LEAST_STEPS = 16


def choose_wgmma_tile(M: int, layers: Sequence[LayerShape], K: int, g: int, dtype: Dtype) -> Tile:
    """The sizes of the program for M tokens.

    The largest tile that M tokens fill and whose blocks, with K split in two where that leaves them room, keep six in
    ten multiprocessors busy. A layer too small for any splits K further. Distilled from timings of every tile at the
    shapes of docs/benchmarks.md on one H200.
    """
    N = sum(layer.N for layer in layers)
    tiles = [tile for tile in TILES if tile is not _WIDEST or (dtype == "bfloat16" and g in (64, 128))]
    if g > 128:
        # Stages of twice the size leave no room for a second block.
        tiles = [dataclasses.replace(tile, blocks_per_multiprocessor=1) for tile in tiles]
    filled = [tile for tile in tiles[1:] if _NEXT_SMALLER[tile.BLOCK_M] < M]
    for tile in reversed(filled):
        split = _split(tile, M, N, K // g, most=2, blocks_at_once=MULTIPROCESSORS)
        if _blocks(tile, M, N) * split >= 0.6 * MULTIPROCESSORS:
            return dataclasses.replace(tile, split=split)
    tile = filled[0] if filled else tiles[0]
    at_once = MULTIPROCESSORS * (1 if filled else tile.blocks_per_multiprocessor)
    return dataclasses.replace(tile, split=_split(tile, M, N, K // g, most=8, blocks_at_once=at_once))


def _blocks(tile: Tile, M: int, N: int) -> int:
    return -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N)


def _split(tile: Tile, M: int, N: int, steps: int, *, most: int, blocks_at_once: int) -> int:
    """Into how many parts K is split: as many as still run at once and have steps enough."""
    blocks = _blocks(tile, M, N)
    return max(
        split
        for split in (1, 2, 4, 8)
        if split == 1
        or (
            split <= most and blocks * split <= blocks_at_once and steps % split == 0 and steps // split >= _LEAST_STEPS
        )
    )
