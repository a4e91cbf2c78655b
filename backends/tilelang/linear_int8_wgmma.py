# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `ternarize.backends.tilelang.linear_int8` on wgmma, for any number of tokens."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import MULTIPROCESSORS
from ternarize.backends.tilelang.layers import Dtype, LayerShape, int8_call_arguments, pointer

SOURCE = "".join(Path(__file__).with_name(name).read_text() for name in ("numbers.cuh", "linear_int8_wgmma.cuh"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Tile:
    """How the work is shared out."""

    BLOCK_M: int
    """Tokens of a tile."""
    BLOCK_N: int
    """Outputs of a tile: 64 for each warpgroup."""
    stages: int
    """Steps along K, of one scale group each, that are in flight."""
    split: int = 1
    """Blocks of the cluster, among which K is split: a divisor of the groups a row and of BLOCK_M."""
    blocks_per_multiprocessor: int = 1
    """Blocks that fit a multiprocessor at a time: what bounds the registers of a thread."""


def int8_wgmma_program(
    layers: Sequence[LayerShape], K: int, g: int, dtype: Dtype, *, guarded: bool, tile: Int8Tile
) -> Any:
    """The program for one layer and any number of tokens.

    It computes yᵀ = W · qᵀ: the trits are decoded in registers, straight into the int8 operand A of wgmma, and the
    exponents with them (linear_int8_wgmma.cuh). One step along K is one scale group. TMA fills what lies beyond M and N
    with zeros. Packed groups of 32, 8 bytes each, are too short for it: TileLang copies those with predicated loads.

    Args:
        layers: of the launch, one, with one trit plane and no mantissa.
        K: in_features, a multiple of 64 and of g; below 2^17, so that no int32 sum overflows.
        g: weights a scale group, one of 32, 64, 128 and 256.
        dtype: of y.
        guarded: whether values that are not finite are reported in the status of the layer.
        tile: how the work is shared out.

    Returns:
        A TileLang prim_func of the arguments of `ternarize.backends.tilelang.layers.int8_call_arguments`.
    """
    (layer,) = layers
    N = layer.N
    BLOCK_M, BLOCK_N, split = tile.BLOCK_M, tile.BLOCK_N, tile.split
    bytes_per_group = g // 4
    words = max(1, g // 64)
    groups = K // g
    steps = groups // split
    sums = BLOCK_M // 2
    decode_group = f"ternarize::decode_group<{g}, {sums}, {N}, {groups}>"
    y_type = {"bfloat16": "__nv_bfloat16", "float16": "__half"}[dtype]
    store_sums = f"ternarize::store_sums<{y_type}, {sums}, {N}, {2 * BLOCK_N}, {split}>"

    @T.prim_func
    def ternary_linear_int8():
        q, scale, (tensors,) = int8_call_arguments(layers, K, g, dtype, guarded=guarded)
        M = q.shape[0]
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
            s_q = T.alloc_shared((BLOCK_M, g), T.int8)
            s_packed = T.alloc_shared((BLOCK_N, bytes_per_group), T.uint8)
            packed = T.alloc_local((2, words, 4), T.uint8)
            weight = T.alloc_fragment((BLOCK_N, g), T.int8)
            accumulator = T.alloc_fragment((BLOCK_N, BLOCK_M), T.int32)
            exact = T.alloc_local((sums,), T.float64)
            # RowExponents of the source.
            state = T.alloc_local((7,), T.int32)
            # The registers of wgmma's operand A and of its sums: a warp has 16 rows, a quad of its lanes 2 of them.
            T.annotate_layout(
                {
                    weight: T.Fragment(
                        (BLOCK_N, g),
                        forward_thread_fn=lambda n, k: n // 16 * 32 + n % 8 * 4 + k % 16 // 4,
                        forward_index_fn=lambda n, k: k // 32 * 16 + k % 32 // 16 * 8 + n % 16 // 8 * 4 + k % 4,
                    ),
                    accumulator: T.Fragment(
                        (BLOCK_N, BLOCK_M),
                        forward_thread_fn=lambda n, m: n // 16 * 32 + n % 8 * 4 + m % 8 // 2,
                        forward_index_fn=lambda n, m: m // 8 * 4 + n % 16 // 8 * 2 + m % 2,
                    ),
                }
            )
            thread = T.get_thread_binding()
            row = thread // 32 * 16 + thread % 32 // 4
            byte0 = thread % (4 if g > 32 else 2) * 4

            T.call_extern(
                "handle",
                f"ternarize::start_rows<{sums}, {N}, {groups}, {steps}>",
                T.access_ptr(accumulator, "w"),
                T.access_ptr(state, "w"),
                pointer(tensors.E, "r"),
                n0 + row,
                rank * steps,
            )
            for step in T.Pipelined(steps, num_stages=tile.stages):
                k = rank * steps + step
                T.copy(q[m0, k * g], s_q)
                T.copy(tensors.T_packed[n0, k * bytes_per_group], s_packed)
                for half, i in T.grid(2, words):
                    for byte in T.vectorized(4):
                        packed[half, i, byte] = s_packed[row + 8 * half, 16 * i + byte0 + byte]
                T.call_extern(
                    "handle",
                    decode_group,
                    T.access_ptr(packed, "r"),
                    T.access_ptr(weight, "w"),
                    T.access_ptr(accumulator, "rw"),
                    T.access_ptr(exact, "rw"),
                    T.access_ptr(state, "rw"),
                    pointer(tensors.E, "r"),
                    n0 + row,
                    k,
                )
                T.gemm(weight, s_q, accumulator, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
            s_part = T.alloc_shared((1 if split == 1 else sums * 2 * BLOCK_N,), T.float32)
            T.call_extern(
                "handle",
                store_sums,
                T.access_ptr(accumulator, "rw"),
                T.access_ptr(exact, "rw"),
                T.access_ptr(state, "rw"),
                pointer(scale, "r"),
                pointer(tensors.bias, "r"),
                pointer(tensors.bias_exponent, "r"),
                pointer(tensors.status, "rw"),
                pointer(tensors.y, "w"),
                pointer(s_part, "rw"),
                thread,
                n0 + row,
                m0,
                M,
                rank,
            )

    return ternary_linear_int8


#: A few tokens: reading the weight is most of the time.
_NARROW = Int8Tile(BLOCK_M=16, BLOCK_N=64, stages=6, blocks_per_multiprocessor=2)
_MIDDLE = Int8Tile(BLOCK_M=64, BLOCK_N=64, stages=6, blocks_per_multiprocessor=2)
_WIDE = Int8Tile(BLOCK_M=128, BLOCK_N=128, stages=5)
_WIDEST = Int8Tile(BLOCK_M=256, BLOCK_N=128, stages=5)

TILES = (_NARROW, _MIDDLE, _WIDE, _WIDEST)

#: Splitting K over a cluster costs a few microseconds: each part has to have so many steps.
_LEAST_STEPS = 16


def choose_int8_wgmma_tile(M: int, N: int, K: int, g: int) -> Int8Tile:
    """The sizes of the program for M tokens: the largest tile that they fill, K split where blocks are too few."""
    tile = next((tile for tile in TILES if M <= tile.BLOCK_M), _WIDEST)
    if g > 128:
        # Stages of twice the size.
        tile = dataclasses.replace(tile, stages=tile.stages // 2, blocks_per_multiprocessor=1)
    blocks = -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N)
    steps = K // g
    at_once = MULTIPROCESSORS * tile.blocks_per_multiprocessor
    split = max(
        split
        for split in (1, 2, 4, 8)
        if split == 1 or (blocks * split <= at_once and steps % split == 0 and steps // split >= _LEAST_STEPS)
    )
    return dataclasses.replace(tile, split=split)
