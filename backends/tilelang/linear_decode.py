# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `ternarize.backends.tilelang.linear` for a few tokens: linear_decode.cuh, hosted by TileLang."""

import dataclasses
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import HALF_SHARED_BYTES, MULTIPROCESSORS, SHARED_BYTES

#: Weights that share an exponent, and the packed bytes of one group.
GROUP = 128

SOURCE = Path(__file__).with_name("linear_decode.cuh").read_text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """How linear_decode.cuh shares out the work; its template arguments, in their order."""

    TOKENS: int
    """Tokens a call has at most: 8 or 16."""
    TILES: int
    """mma tiles of 16 rows in a row block."""
    STEP: int
    """Groups that a warp loads at once: 1, 2 or 4, a divisor of the groups a row."""
    WARPS: int
    """Warps a block."""
    K_WARPS: int
    """Warps of a block among which K is split; the others take other row blocks."""
    CLUSTER: int
    """Blocks among which K is split."""
    CLUSTERS: int
    """Clusters, among which the row blocks are shared out: at most as many as there are row blocks."""
    blocks_per_multiprocessor: int
    """Blocks that fit a multiprocessor at a time: what bounds the registers of a thread."""

    def row_blocks(self, N: int) -> int:
        """Row blocks of N rows; the last overlaps the one before it if N is no multiple of their size."""
        return -(-N // (16 * self.TILES))

    def shared_bytes(self, N: int, K: int) -> int:
        """Shared memory of a block: its part of x, and the parts of the sums that it adds up."""
        steps = K // GROUP // self.STEP
        x_bytes = -(-steps // self.CLUSTER) * self.STEP * GROUP * self.TOKENS * 2
        blocks = -(-self.row_blocks(N) // self.CLUSTERS)
        sums = -(-blocks // self.CLUSTER) * self.CLUSTER * self.K_WARPS * 16 * self.TILES * self.TOKENS
        return x_bytes + sums * 4


def decode_program(N: int, K: int, *, has_bias: bool, tile: DecodeTile) -> Any:
    """The program for bfloat16 layers of one shape, groups of 128, and up to tile.TOKENS tokens.

    Args:
        N: out_features, at least 16 tile.TILES.
        K: in_features, a multiple of 128 tile.STEP.
        has_bias: whether the program takes bias and bias_exponent, after E.
        tile: how the work is shared out.

    Returns:
        A TileLang prim_func of the tensors of `ternarize.backends.tilelang.linear_wgmma.wgmma_program`.
    """
    M = T.dynamic("M")
    parameters = ", ".join(
        str(value)
        for value in (tile.TOKENS, tile.TILES, tile.STEP, tile.WARPS, tile.K_WARPS, tile.CLUSTER, tile.CLUSTERS, N, K)
    )
    function = f"ternarize::linear_decode<{parameters}>"
    shared_bytes = tile.shared_bytes(N, K)

    @T.macro
    def block(x, T_packed, E, bias, bias_exponent, y):
        with T.Kernel(tile.CLUSTER * tile.CLUSTERS, threads=32 * tile.WARPS, cluster_dims=tile.CLUSTER):
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(tile.blocks_per_multiprocessor)
            shared = T.alloc_shared((shared_bytes,), T.uint8)
            T.call_extern(
                "handle",
                function,
                T.access_ptr(x[0, 0], "r"),
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
        def ternary_linear_decode(
            x: T.Tensor((M, K), T.bfloat16),
            T_packed: T.Tensor((N, K // 4), T.uint8),
            E: T.Tensor((N, K // GROUP), T.int8),
            bias: T.Tensor((N,), T.int32),
            bias_exponent: T.Tensor((1,), T.int8),
            y: T.Tensor((M, N), T.bfloat16),
        ):
            block(x, T_packed, E, bias, bias_exponent, y)

    else:

        @T.prim_func
        def ternary_linear_decode(
            x: T.Tensor((M, K), T.bfloat16),
            T_packed: T.Tensor((N, K // 4), T.uint8),
            E: T.Tensor((N, K // GROUP), T.int8),
            y: T.Tensor((M, N), T.bfloat16),
        ):
            block(x, T_packed, E, None, None, y)

    return ternary_linear_decode


def choose_decode_tile(M: int, N: int, K: int) -> DecodeTile | None:
    """The sizes of linear_decode.cuh for up to 16 tokens, or None where its part of x does not fit shared memory.

    A warp loads 2 KiB of weights at once, four groups of 16 rows where the groups allow. One block of sixteen warps
    fills a multiprocessor. K is split over a cluster of two blocks, but for short rows and few tokens, and over as many
    warps of a block as have no row block of their own. Where half of x is too much, eight blocks of half the size share
    it, two to a multiprocessor.
    """
    groups = K // GROUP
    step = next(step for step in (4, 2, 1) if groups % step == 0)
    # Sixteen tokens take the registers of the third and fourth tile.
    tiles = min(4 // step, 4 if M <= 8 else 2)
    if 16 * tiles > N:
        return None
    row_blocks = -(-N // (16 * tiles))
    for warps, blocks_per_multiprocessor, cluster, room in (
        (16, 1, 1 if K <= 4096 and M <= 8 else 2, SHARED_BYTES),
        (8, 2, 8, HALF_SHARED_BYTES),
    ):
        clusters = min(row_blocks, blocks_per_multiprocessor * MULTIPROCESSORS // cluster)
        blocks = -(-row_blocks // clusters)
        splits = [k_warps for k_warps in (1, 2, 4, 8, 16) if k_warps <= warps and cluster * k_warps <= groups // step]
        if not splits:
            continue
        tile = DecodeTile(
            TOKENS=8 if M <= 8 else 16,
            TILES=tiles,
            STEP=step,
            WARPS=warps,
            K_WARPS=next((k_warps for k_warps in splits if warps // k_warps <= blocks), splits[-1]),
            CLUSTER=cluster,
            CLUSTERS=clusters,
            blocks_per_multiprocessor=blocks_per_multiprocessor,
        )
        if tile.shared_bytes(N, K) <= room:
            return tile
    return None
