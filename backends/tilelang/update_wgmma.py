# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `ternarize.backends.tilelang.update` on wgmma, for any shape: update_wgmma.cuh."""

import dataclasses
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import MULTIPROCESSORS
from ternarize.backends.tilelang.layers import Dtype, argument, pointer
from ternarize.backends.tilelang.linear_wgmma import tensor_map

#: What the kernel is made of beside the instructions of hopper.cuh and wgmma.cuh.
PARTS = ("rounding.cuh", "update_wgmma.cuh")

SOURCE = "".join(Path(__file__).with_name(name).read_text() for name in ("hopper.cuh", "wgmma.cuh", *PARTS))

#: Rows and columns of a tile of G, and rows of it whose squares are added up: constants of update_wgmma.cuh.
BLOCK_N, BLOCK_K, PART_N = 128, 256, 64

#: Tokens and columns that TMA loads at once, likewise.
BOX = (64, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateTile:
    """How update_wgmma.cuh shares out the work; its template arguments, in their order."""

    STAGES: int
    """Steps of 64 tokens that are in flight."""
    PANEL: int
    """Rows of tiles that are taken together, column by column."""
    SKEW: int
    """Steps that one warpgroup has left when the other begins to round: 0 to STAGES."""
    DRAWN: int
    """Of 16 blocks of random bits, those that a thread draws before it rounds, in four registers each."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: stages with two barriers each, sums of columns of 8 warps, factors for 2 of 4."""
        return self.STAGES * ((BLOCK_N + BLOCK_K) * BOX[0] * 2 + 16) + (8 + 2) * BLOCK_K * 4


#: Of any layer. Registers have room for 10 of the 16 blocks of random bits.
TILE = UpdateTile(STAGES=4, PANEL=8, SKEW=3, DRAWN=8)


def parts_shapes(N: int, K: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of row_parts and col_parts: sums of G² over the columns of each tile, and over each 64 rows."""
    return (-(-K // BLOCK_K), N), (-(-N // PART_N), K)


def update_function(dtype: Dtype, tile: UpdateTile) -> str:
    """The instance of update_wgmma.cuh; arguments as of `update_program`."""
    parameters = (
        "__nv_bfloat16" if dtype == "bfloat16" else "__half",
        *dataclasses.astuple(tile),
        tile.shared_bytes,
    )
    return f"ternarize::update_wgmma<{', '.join(map(str, parameters))}>"


def update_program(dtype: Dtype, tile: UpdateTile) -> Any:
    """The program for any number of tokens and any layer that `verify` accepts.

    Args:
        dtype: of grad_y and x.
        tile: how the work is shared out.

    Returns:
        A TileLang prim_func of grad_y [M, N]; x [M, K]; row_factor, float32 [N]; col_factor, float32 [K]; rng,
        int64 [3]; stage, int8 [N, K]; row_parts and col_parts, float32 of `parts_shapes`; and status,
        int32 [2].
    """
    function = update_function(dtype, tile)
    shared_bytes = tile.shared_bytes

    @T.prim_func
    def ternary_update_wgmma():
        M, N, K = T.dynamic("M"), T.dynamic("N"), T.dynamic("K")
        grad_y, x = argument("grad_y", (M, N), dtype), argument("x", (M, K), dtype)
        row_factor, col_factor = argument("row_factor", (N,), "float32"), argument("col_factor", (K,), "float32")
        rng, stage = argument("rng", (3,), "int64"), argument("stage", (N, K), "int8")
        row_parts = argument("row_parts", (T.dynamic("row_tiles"), N), "float32")
        col_parts = argument("col_parts", (T.dynamic("col_tiles"), K), "float32")
        status = argument("status", (2,), "int32")
        with T.Kernel(MULTIPROCESSORS, threads=384):
            T.import_source(SOURCE)
            shared = T.alloc_shared((shared_bytes,), T.uint8)
            T.call_extern(
                "handle",
                function,
                tensor_map(grad_y, BOX),
                tensor_map(x, BOX),
                grad_y.shape[0],
                grad_y.shape[1],
                x.shape[1],
                T.access_ptr(shared[0], "rw"),
                pointer(row_factor, "r"),
                pointer(col_factor, "r"),
                pointer(rng, "r"),
                pointer(stage, "rw"),
                pointer(row_parts, "w"),
                pointer(col_parts, "w"),
                pointer(status, "rw"),
            )

    return ternary_update_wgmma
