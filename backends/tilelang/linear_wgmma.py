# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def, no-untyped-call"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `ternarize.backends.tilelang.linear` on wgmma, for any number of tokens: linear_wgmma.cuh."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import CLUSTERS, SHARED_BYTES
from ternarize.backends.tilelang.layers import MANTISSA_BYTES, Dtype, LayerShape, call_arguments, pointer

SOURCE = "".join(
    Path(__file__).with_name(name).read_text()
    for name in ("hopper.cuh", "numbers.cuh", "wgmma.cuh", "linear_wgmma.cuh")
)

#: Of cuTensorMapEncodeTiled: CUtensorMapDataType with the bytes of an element, the swizzles of 32, 64 and 128 bytes,
#: and the promotion of what is missing in L2 to 128 bytes.
_TMA_TYPE = {"uint8": (0, 1), "float16": (6, 2), "bfloat16": (9, 2)}
_TMA_SWIZZLE = {32: 1, 64: 2, 128: 3}
_TMA_L2_128_BYTES = 2

#: Steps in flight, at most.
MOST_STAGES = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How linear_wgmma.cuh shares out the work; its template arguments, in their order."""

    BLOCK_M: int
    """Tokens of a tile, a multiple of 16."""
    ROW_TILES: int
    """64 outputs each, of a warpgroup: 1 or 2."""
    WARPGROUPS: int
    """That compute, beside the one that loads: 2, 3 or 4."""
    STAGES: int
    """Steps of 128 weights along K that are in flight."""
    CLUSTER: int = 1
    """Blocks among which K is split for the tiles that are left over: 1, 2, 4 or 8."""

    @property
    def stored_tokens(self) -> int:
        """Tokens that a warpgroup stores at once: STORED of the kernel."""
        units = max(self.ROW_TILES * self.BLOCK_M // 8 // self.CLUSTER, 1)
        return 8 * math.gcd(4, units, self.BLOCK_M // 8)

    def shared_bytes(self, planes: int) -> int:
        """Shared memory of a block: stages with their barriers, and two buffers of y a warpgroup."""
        stage = self.BLOCK_M * 256 + 64 * self.ROW_TILES * self.WARPGROUPS * 32 * planes + 16
        return self.STAGES * stage + self.WARPGROUPS * 2 * self.stored_tokens * 128


def _tensor_map(buffer: Any, box: tuple[int, ...], swizzle: int) -> Any:
    """A TMA descriptor of a row-major buffer, whose last dimension TMA counts first.

    Args:
        buffer: of TileLang.
        box: what is copied at once, its shape.
        swizzle: bytes, those of a row of the box.
    """
    tma_type, stride = _TMA_TYPE[str(buffer.dtype)]
    strides = []
    for extent in reversed(buffer.shape):
        strides.append(stride)
        stride *= extent
    return T.create_tma_descriptor(
        tma_type,
        len(box),
        buffer.data,
        *reversed(buffer.shape),
        *strides,
        *reversed(box),
        *(1 for _ in box),
        0,
        _TMA_SWIZZLE[swizzle],
        _TMA_L2_128_BYTES,
        0,
    )


def wgmma_program(layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype, *, guarded: bool, tile: Tile) -> Any:
    """The program for any number of tokens.

    Args:
        layers: of the call, with as many planes and the same mantissa each.
        K: in_features, a multiple of 64.
        g: weights a scale group: 32 or 64 if that divides K, a multiple of 128, or K.
        dtype: of x and y.
        guarded: whether values that are not finite are reported in the status of their layer.
        tile: how the work is shared out.

    Returns:
        A TileLang prim_func of the arguments of `ternarize.backends.tilelang.layers.call_arguments`.
    """
    planes = layers[0].planes
    shared_bytes = tile.shared_bytes(planes)
    parameters = (
        "__nv_bfloat16" if dtype == "bfloat16" else "__half",
        K,
        g,
        planes,
        MANTISSA_BYTES[layers[0].mantissa],
        str(guarded).lower(),
        *dataclasses.astuple(tile),
        shared_bytes,
    )
    function = f"ternarize::linear_wgmma<{', '.join(map(str, parameters))}>"
    # Columns of x that are neighbours, in a row of shared memory: ROW_COLUMNS of the kernel.
    row_columns = 64 if g <= 128 and K % g == 0 else 32
    packed_box = (64 * tile.ROW_TILES, 32) if planes == 1 else (planes, 64 * tile.ROW_TILES, 32)

    def layer_argument(layer, tensors):
        # TMA stores rows that are a multiple of 16 bytes.
        y_boxes = _tensor_map(tensors.y, (tile.stored_tokens, 64), 128) if layer.N % 8 == 0 else 0
        return T.call_extern(
            "handle",
            "ternarize::layer",
            _tensor_map(tensors.T_packed, packed_box, 32),
            y_boxes,
            layer.N,
            pointer(tensors.E, "r"),
            pointer(tensors.E_mantissa, "r"),
            pointer(tensors.bias, "r"),
            pointer(tensors.bias_exponent, "r"),
            pointer(tensors.status, "rw"),
            pointer(tensors.y, "w"),
        )

    @T.prim_func
    def ternary_linear_wgmma():
        x, buffers = call_arguments(layers, K, g, dtype, guarded=guarded)
        with T.Kernel(
            CLUSTERS[tile.CLUSTER] * tile.CLUSTER, threads=128 * (tile.WARPGROUPS + 1), cluster_dims=tile.CLUSTER
        ):
            T.import_source(SOURCE)
            shared = T.alloc_shared((shared_bytes,), T.uint8)
            T.call_extern(
                "handle",
                function,
                _tensor_map(x, (tile.BLOCK_M, row_columns), 2 * row_columns),
                x.shape[0],
                T.access_ptr(shared[0], "rw"),
                *(layer_argument(layer, tensors) for layer, tensors in zip(layers, buffers, strict=True)),
            )
            # The function has waited already: what TileLang launches as dependent is a kernel in which it sees a wait.
            T.pdl_sync()

    return ternary_linear_wgmma


def scales_operand(layers: tuple[LayerShape, ...], dtype: Dtype) -> bool:
    """Whether 2^E is multiplied into the operand, SCALED of the kernel: else the sums take twice the registers."""
    return dtype == "bfloat16" and layers[0].mantissa is None


def wgmma_tile(
    layers: tuple[LayerShape, ...], *, BLOCK_M: int, ROW_TILES: int = 2, WARPGROUPS: int = 2, CLUSTER: int = 1
) -> Tile:
    """A tile with as many stages as fit shared memory, and as a loader keeps in flight."""
    tile = Tile(BLOCK_M=BLOCK_M, ROW_TILES=ROW_TILES, WARPGROUPS=WARPGROUPS, STAGES=0, CLUSTER=CLUSTER)
    rest = SHARED_BYTES - tile.shared_bytes(layers[0].planes)
    stage = dataclasses.replace(tile, STAGES=1).shared_bytes(layers[0].planes) - tile.shared_bytes(layers[0].planes)
    return dataclasses.replace(tile, STAGES=min(rest // stage, MOST_STAGES))


def choose_wgmma_tile(M: int, layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype) -> Tile:
    """The sizes of linear_wgmma.cuh for M tokens."""
    if M <= 32:
        return wgmma_tile(layers, BLOCK_M=32, CLUSTER=8)
    if M <= 64 or not scales_operand(layers, dtype):
        return wgmma_tile(layers, BLOCK_M=64, CLUSTER=4)
    return wgmma_tile(layers, BLOCK_M=128, CLUSTER=2)
