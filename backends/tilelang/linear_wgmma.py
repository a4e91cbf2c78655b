# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `ternarize.backends.tilelang.linear` on wgmma, for any number of tokens: linear_wgmma.cuh."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import CLUSTERS
from ternarize.backends.tilelang.layers import Dtype, LayerShape, call_arguments

SOURCE = Path(__file__).with_name("linear_wgmma.cuh").read_text()

#: Of cuTensorMapEncodeTiled: CUtensorMapDataType, and the swizzles of 32, 64 and 128 bytes.
_TMA_DTYPE = {"uint8": 0, "float16": 6, "bfloat16": 9}
_TMA_SWIZZLE = {32: 1, 64: 2, 128: 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How linear_wgmma.cuh shares out the work."""

    BLOCK_M: int
    """Tokens of a tile, a multiple of 16."""
    ROW_TILES: int
    """64 outputs each, of a warpgroup: 1 or 2."""
    WARPGROUPS: int
    """That compute, beside the one that loads."""
    STAGES: int
    """Steps of 128 weights along K that are in flight."""
    CLUSTER: int = 1
    """Blocks among which K is split for the tiles that are left over: 1, 2, 4 or 8."""
    SLICE: int = 32
    """Columns of x a row of shared memory."""
    L2: int = 2

    @property
    def BLOCK_N(self) -> int:
        return 64 * self.ROW_TILES * self.WARPGROUPS

    @property
    def store_tokens(self) -> int:
        """Tokens that are stored at once: 32, or what 16-byte rows of a part of the tile come to."""
        units = self.ROW_TILES * self.BLOCK_M // 8 // self.CLUSTER
        return 8 * math.gcd(4, units, self.BLOCK_M // 8)

    def shared_bytes(self, planes: int) -> int:
        """Shared memory of a block."""
        stage = self.BLOCK_M * 256 + self.BLOCK_N * 32 * planes + 16
        return self.STAGES * stage + self.WARPGROUPS * 2 * self.store_tokens * 128


def _tensor_map(buffer: Any, box: tuple[int, ...], swizzle: int, l2: int = 2) -> Any:
    """A TMA descriptor of a row-major buffer, for boxes that are given innermost dimension last."""
    shape = list(reversed(buffer.shape))
    strides, stride = (
        [],
        buffer.dtype.bits // 8 if hasattr(buffer.dtype, "bits") else {"uint8": 1}.get(str(buffer.dtype), 2),
    )
    for extent in shape:
        strides.append(T.cast(stride, "int64") if not isinstance(stride, int) else stride)
        stride = stride * extent
    return T.create_tma_descriptor(
        _TMA_DTYPE[str(buffer.dtype)],
        len(shape),
        buffer.data,
        *shape,
        *strides,
        *reversed(box),
        *(1 for _ in shape),
        0,
        _TMA_SWIZZLE[swizzle],
        l2,
        0,
    )


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

    Args:
        layers: of the call, with as many planes each.
        K: in_features.
        g: weights a scale group.
        dtype: of x and y.
        guarded: whether there is a status for each layer.
        tile: how the work is shared out.

    Returns:
        A TileLang prim_func of the arguments of `ternarize.backends.tilelang.layers.call_arguments`.
    """
    planes = layers[0].planes
    shared_bytes = tile.shared_bytes(planes)
    parameters = (K, g, planes, tile.BLOCK_M, tile.ROW_TILES, tile.WARPGROUPS, tile.STAGES, tile.CLUSTER, tile.SLICE)
    operand = {"bfloat16": "ternarize::BFloat16", "float16": "ternarize::Float16"}[dtype]
    function = f"ternarize::linear_wgmma<{operand}, {', '.join(map(str, parameters))}, {shared_bytes}>"
    blocks = CLUSTERS[tile.CLUSTER] * tile.CLUSTER
    packed_box = (tile.BLOCK_N, 32) if planes == 1 else (planes, tile.BLOCK_N, 32)

    def layer_argument(buffers):
        return T.call_extern(
            "handle",
            "ternarize::layer",
            _tensor_map(buffers.T_packed, packed_box, 32, tile.L2),
            _tensor_map(buffers.y, (tile.store_tokens, 64), 128),
            T.access_ptr(buffers.E[0, 0], "r"),
            buffers.E.shape[0],
            *(
                (T.access_ptr(buffers.bias[0], "r"), T.access_ptr(buffers.bias_exponent[0], "r"))
                if buffers.bias is not None
                else ()
            ),
        )

    @T.prim_func
    def ternary_linear_wgmma():
        x, buffers = call_arguments(layers, K, g, dtype, guarded=guarded)
        with T.Kernel(blocks, threads=128 * (tile.WARPGROUPS + 1), cluster_dims=tile.CLUSTER):
            T.import_source(SOURCE)
            shared = T.alloc_shared((shared_bytes,), T.uint8)
            T.call_extern(
                "handle",
                function,
                _tensor_map(x, (tile.BLOCK_M, tile.SLICE), 2 * tile.SLICE),
                x.shape[0],
                T.access_ptr(shared[0], "rw"),
                *[layer_argument(each) for each in buffers],
            )
            # The function has waited already: what TileLang launches as dependent is a kernel in which it sees a wait.
            T.pdl_sync()

    return ternary_linear_wgmma


def choose_wgmma_tile(M: int, layers: Sequence[LayerShape], K: int, g: int, dtype: Dtype) -> Tile:
    """The sizes of linear_wgmma.cuh for M tokens."""
    if M <= 32:
        return Tile(BLOCK_M=32, ROW_TILES=2, WARPGROUPS=2, STAGES=10, CLUSTER=8)
    if M <= 64:
        return Tile(BLOCK_M=64, ROW_TILES=2, WARPGROUPS=2, STAGES=8, CLUSTER=4)
    return Tile(BLOCK_M=128, ROW_TILES=2, WARPGROUPS=2, STAGES=5, CLUSTER=2)
