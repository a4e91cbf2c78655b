# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `ternarize.backends.tilelang.linear_int8` for a few tokens: linear_int8_decode.cuh."""

import dataclasses
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import HALF_SHARED_BYTES, MULTIPROCESSORS, SHARED_BYTES
from ternarize.backends.tilelang.layers import Dtype
from ternarize.backends.tilelang.linear_decode import GROUP, DecodeTile

SOURCE = Path(__file__).with_name("linear_int8_decode.cuh").read_text()

_Y_TYPE = {"bfloat16": "__nv_bfloat16", "float16": "__half"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8DecodeTile(DecodeTile):
    """How linear_int8_decode.cuh shares out the work."""

    def shared_bytes(self, N: int, K: int) -> int:
        """Shared memory of a block: its part of q, and the parts of the sums that it adds up."""
        steps = K // GROUP // self.STEP
        q_bytes = -(-steps // self.CLUSTER) * self.STEP * GROUP * self.TOKENS
        blocks = -(-self.row_blocks(N) // self.CLUSTERS)
        sums = -(-blocks // self.CLUSTER) * self.CLUSTER * self.K_WARPS * 16 * self.TILES * self.TOKENS
        return q_bytes + sums * 4


def int8_decode_program(N: int, K: int, dtype: Dtype, *, has_bias: bool, tile: Int8DecodeTile) -> Any:
    """The program for layers of one shape, groups of 128, and up to tile.TOKENS tokens.

    Args:
        N: out_features, at least 16 tile.TILES.
        K: in_features, a multiple of 128 tile.STEP.
        dtype: of y.
        has_bias: whether the program takes bias and bias_exponent, after E.
        tile: how the work is shared out.

    Returns:
        A TileLang prim_func of the tensors of `ternarize.backends.tilelang.linear_int8_wgmma.int8_wgmma_program`.
    """
    M = T.dynamic("M")
    sizes = (tile.TOKENS, tile.TILES, tile.STEP, tile.WARPS, tile.K_WARPS, tile.CLUSTER, tile.CLUSTERS, N, K)
    function = f"ternarize::linear_int8_decode<{_Y_TYPE[dtype]}, {', '.join(map(str, sizes))}>"
    shared_bytes = tile.shared_bytes(N, K)

    @T.macro
    def block(q, scale, T_packed, E, bias, bias_exponent, y):
        with T.Kernel(tile.CLUSTER * tile.CLUSTERS, threads=32 * tile.WARPS, cluster_dims=tile.CLUSTER):
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(tile.blocks_per_multiprocessor)
            shared = T.alloc_shared((shared_bytes,), T.uint8)
            T.call_extern(
                "handle",
                function,
                T.access_ptr(q[0, 0], "r"),
                T.access_ptr(scale[0], "r"),
                T.access_ptr(T_packed[0, 0], "r"),
                T.access_ptr(E[0, 0], "r"),
                T.access_ptr(y[0, 0], "w"),
                T.access_ptr(shared[0], "rw"),
                M,
                *((T.access_ptr(bias[0], "r"), T.access_ptr(bias_exponent[0], "r")) if has_bias else ()),
            )
            # The function has waited already: what TileLang launches as dependent is a kernel in which it sees a wait.
            T.pdl_sync()

    if has_bias:

        @T.prim_func
        def ternary_linear_int8_decode(
            q: T.Tensor((M, K), T.int8),
            scale: T.Tensor((M,), T.float32),
            T_packed: T.Tensor((N, K // 4), T.uint8),
            E: T.Tensor((N, K // GROUP), T.int8),
            bias: T.Tensor((N,), T.int32),
            bias_exponent: T.Tensor((1,), T.int8),
            y: T.Tensor((M, N), dtype),
        ):
            block(q, scale, T_packed, E, bias, bias_exponent, y)

    else:

        @T.prim_func
        def ternary_linear_int8_decode(
            q: T.Tensor((M, K), T.int8),
            scale: T.Tensor((M,), T.float32),
            T_packed: T.Tensor((N, K // 4), T.uint8),
            E: T.Tensor((N, K // GROUP), T.int8),
            y: T.Tensor((M, N), dtype),
        ):
            block(q, scale, T_packed, E, None, None, y)

    return ternary_linear_int8_decode


def int8_decode_tile(
    M: int, N: int, K: int, *, tiles: int, step: int, warps: int = 16, cluster: int = 2
) -> Int8DecodeTile | None:
    """The sizes for M tokens, of blocks that fill a multiprocessor with 16 warps, or None where they do not fit.

    K is split over a cluster, and over as many warps of a block as have no row block of their own.
    """
    groups = K // GROUP
    blocks_per_multiprocessor = 16 // warps
    if 16 * tiles > N or groups % step:
        return None
    row_blocks = -(-N // (16 * tiles))
    clusters = min(row_blocks, blocks_per_multiprocessor * MULTIPROCESSORS // cluster)
    blocks = -(-row_blocks // clusters)
    splits = [k_warps for k_warps in (1, 2, 4, 8, 16) if k_warps <= warps and cluster * k_warps <= groups // step]
    if not splits:
        return None
    tile = Int8DecodeTile(
        TOKENS=8 if M <= 8 else 16,
        TILES=tiles,
        STEP=step,
        WARPS=warps,
        K_WARPS=next((k_warps for k_warps in splits if warps // k_warps <= blocks), splits[-1]),
        CLUSTER=cluster,
        CLUSTERS=clusters,
        blocks_per_multiprocessor=blocks_per_multiprocessor,
    )
    room = SHARED_BYTES if blocks_per_multiprocessor == 1 else HALF_SHARED_BYTES
    return tile if tile.shared_bytes(N, K) <= room else None


def choose_int8_decode_tile(M: int, N: int, K: int, g: int) -> Int8DecodeTile | None:
    """The sizes of linear_int8_decode.cuh, or None where another program has to run: see `int8_decode_tile`."""
    if M > 16 or g != GROUP or K % GROUP:
        return None
    step = next(step for step in (4, 2, 1) if K // GROUP % step == 0)
    for cluster in (1, 2, 4, 8) if K <= 4096 and M <= 8 else (2, 4, 8):
        for tiles in (4 // step, 1):
            tile = int8_decode_tile(M, N, K, tiles=min(tiles, 4 if M <= 8 else 2), step=step, cluster=cluster)
            if tile is not None:
                return tile
    return None
