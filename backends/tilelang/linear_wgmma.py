# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def, no-untyped-call"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `linear` and `linear_int8` on wgmma, for any number of tokens: linear_wgmma.cuh."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import CLUSTERS, SHARED_BYTES
from ternarize.backends.tilelang.layers import MANTISSA_BYTES, Dtype, LayerShape, call_arguments, pointer
from ternarize.config import Activation

#: What the kernel is made of beside the instructions of hopper.cuh and wgmma.cuh.
PARTS = (
    "numbers.cuh",
    "linear_wgmma_tiles.cuh",
    "linear_wgmma_stages.cuh",
    "linear_wgmma_weights.cuh",
    "linear_wgmma_float.cuh",
    "linear_wgmma_int8.cuh",
    "linear_wgmma_store.cuh",
    "linear_wgmma.cuh",
)

SOURCE = "".join(Path(__file__).with_name(name).read_text() for name in ("hopper.cuh", "wgmma.cuh", *PARTS))

#: Of cuTensorMapEncodeTiled: CUtensorMapDataType with the bytes of an element, the swizzles of 32, 64 and 128 bytes,
#: and the promotion of what is missing in L2 to 128 bytes.
_TMA_TYPE = {"uint8": (0, 1), "int8": (0, 1), "float16": (6, 2), "bfloat16": (9, 2)}
_TMA_SWIZZLE = {32: 1, 64: 2, 128: 3}
_TMA_L2_128_BYTES = 2

#: Bytes of an element of x.
_X_BYTES = {"float": 2, "int8": 1}


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
    def BLOCK_N(self) -> int:
        """Outputs of a tile."""
        return 64 * self.ROW_TILES * self.WARPGROUPS

    @property
    def stored_tokens(self) -> int:
        """Tokens that a warpgroup stores at once: STORED of the kernel."""
        return 8 * math.gcd(4, self.own_units, self.BLOCK_M // 8)

    @property
    def own_units(self) -> int:
        """Units of 8 tokens of a warpgroup that a block of a cluster adds up and stores: OWN of the kernel."""
        units = self.ROW_TILES * self.BLOCK_M // 8
        return next(own for own in range(-(-units // self.CLUSTER), units + 1) if units % own == 0)

    @property
    def parts_bytes(self) -> int:
        """Shared memory for the sums that a block of a cluster adds up, in place of its stages."""
        return self.CLUSTER * self.own_units * 8 * 64 * self.WARPGROUPS * 4 if self.CLUSTER > 1 else 0

    def x_box(self, K: int, g: int, activation: Activation = "float") -> tuple[int, int]:
        """Tokens and columns of x that TMA loads at once; the columns are X_ROW_COLUMNS of the kernel."""
        return self.BLOCK_M, 128 // _X_BYTES[activation] if g <= 128 and K % g == 0 else 32

    def packed_box(self, planes: int) -> tuple[int, ...]:
        """Planes, if several, rows and bytes of T_packed that TMA loads at once."""
        return (64 * self.ROW_TILES, 32) if planes == 1 else (planes, 64 * self.ROW_TILES, 32)

    def y_box(self) -> tuple[int, int]:
        """Tokens and outputs of y that TMA stores at once."""
        return self.stored_tokens, 64

    def shared_bytes(self, planes: int, activation: Activation = "float") -> int:
        """Shared memory of a block: its stages; for each warpgroup two buffers of y, and the scales of int8 tokens."""
        of_warpgroup = 2 * self.stored_tokens * 128 + (self.BLOCK_M * 4 if activation == "int8" else 0)
        return self.STAGES * self.stage_bytes(planes, activation) + self.WARPGROUPS * of_warpgroup

    def stage_bytes(self, planes: int, activation: Activation = "float") -> int:
        """Of a step: x, packed trits and two barriers."""
        return self.BLOCK_M * 128 * _X_BYTES[activation] + self.BLOCK_N * 32 * planes + 16


def tensor_map(buffer: Any, box: tuple[int, ...]) -> Any:
    """A TMA descriptor of a row-major buffer, whose last dimension TMA counts first.

    Args:
        buffer: of TileLang.
        box: what is copied at once, its shape; it is swizzled by the bytes of its rows: 32, 64 or 128.
    """
    tma_type, stride = _TMA_TYPE[str(buffer.dtype)]
    swizzle = _TMA_SWIZZLE[box[-1] * stride]
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
        swizzle,
        _TMA_L2_128_BYTES,
        0,
    )


def wgmma_function(
    layers: tuple[LayerShape, ...],
    K: int,
    g: int,
    dtype: Dtype,
    *,
    guarded: bool,
    tile: Tile,
    activation: Activation = "float",
) -> str:
    """The instance of linear_wgmma.cuh for a call; arguments as of `wgmma_program`."""
    y_type = "__nv_bfloat16" if dtype == "bfloat16" else "__half"
    parameters = (
        "int8_t" if activation == "int8" else y_type,
        y_type,
        K,
        g,
        layers[0].planes,
        MANTISSA_BYTES[layers[0].mantissa],
        str(guarded).lower(),
        *dataclasses.astuple(tile),
        tile.shared_bytes(layers[0].planes, activation),
    )
    return f"ternarize::linear_wgmma<{', '.join(map(str, parameters))}>"


def wgmma_program(
    layers: tuple[LayerShape, ...],
    K: int,
    g: int,
    dtype: Dtype,
    *,
    guarded: bool,
    tile: Tile,
    activation: Activation = "float",
) -> Any:
    """The program for any number of tokens.

    Args:
        layers: of the call, with as many planes and the same mantissa each; with one plane and none for int8.
        K: in_features, a multiple of 64.
        g: weights a scale group: 32 or 64 if that divides K, a multiple of 128, or K.
        dtype: of y, and of x unless that is int8.
        guarded: whether values that are not finite are reported in the status of their layer.
        tile: how the work is shared out.
        activation: int8 for x in int8, with a scale for each token.

    Returns:
        A TileLang prim_func of the arguments of `ternarize.backends.tilelang.layers.call_arguments`.
    """
    planes = layers[0].planes
    shared_bytes = tile.shared_bytes(planes, activation)
    function = wgmma_function(layers, K, g, dtype, guarded=guarded, tile=tile, activation=activation)

    def layer_argument(layer, tensors):
        # TMA stores rows that are a multiple of 16 bytes.
        y_boxes = tensor_map(tensors.y, tile.y_box()) if layer.N % 8 == 0 else 0
        return T.call_extern(
            "handle",
            "ternarize::layer",
            tensor_map(tensors.T_packed, tile.packed_box(planes)),
            y_boxes,
            layer.N,
            *tensors.pointers(),
        )

    @T.prim_func
    def ternary_linear_wgmma():
        x, scale, buffers = call_arguments(layers, K, g, dtype, activation, guarded=guarded)
        with T.Kernel(
            CLUSTERS[tile.CLUSTER] * tile.CLUSTER, threads=128 * (tile.WARPGROUPS + 1), cluster_dims=tile.CLUSTER
        ):
            T.import_source(SOURCE)
            shared = T.alloc_shared((shared_bytes,), T.uint8)
            T.call_extern(
                "handle",
                function,
                tensor_map(x, tile.x_box(K, g, activation)),
                x.shape[0],
                T.access_ptr(shared[0], "rw"),
                pointer(scale, "r"),
                *(layer_argument(layer, tensors) for layer, tensors in zip(layers, buffers, strict=True)),
            )
            # The function has waited already: what TileLang launches as dependent is a kernel in which it sees a wait.
            T.pdl_sync()

    return ternary_linear_wgmma


#: Microseconds that a block takes for a step along K, by BLOCK_M, ROW_TILES and WARPGROUPS. Least squares on an H200
#: (docs/figures.md): over 195 timings of 10 layers, 32 to 512 tokens, 5 % of each; of int8 over 110 of 8, 6 %.
_STEP: dict[Activation, dict[tuple[int, int, int], float]] = {
    "float": {
        (16, 1, 2): 0.37,
        (16, 1, 4): 0.66,
        (16, 2, 2): 0.61,
        (16, 2, 4): 1.11,
        (32, 1, 2): 0.38,
        (32, 2, 2): 0.68,
        (64, 1, 2): 0.46,
        (64, 1, 3): 0.72,
        (64, 1, 4): 1.02,
        (64, 2, 2): 0.85,
        (80, 1, 2): 0.52,
        (96, 1, 2): 0.54,
        (96, 1, 3): 0.83,
        (128, 1, 2): 0.66,
        (128, 1, 3): 0.98,
        (160, 1, 2): 0.78,
        (176, 1, 2): 0.87,
        (192, 1, 3): 1.44,
        (208, 1, 2): 1.05,
        (256, 1, 2): 1.22,
    },
    "int8": {
        (16, 1, 2): 0.27,
        (16, 2, 2): 0.47,
        (32, 1, 2): 0.28,
        (32, 2, 2): 0.50,
        (64, 1, 2): 0.33,
        (64, 1, 3): 0.48,
        (64, 1, 4): 0.69,
        (64, 2, 2): 0.59,
        (64, 2, 3): 0.88,
        (96, 1, 2): 0.36,
        (128, 1, 2): 0.39,
        (128, 1, 3): 0.60,
        (128, 2, 2): 0.73,
        (160, 1, 2): 0.42,
        (192, 1, 3): 0.74,
        (208, 1, 2): 0.54,
        (256, 1, 2): 0.62,
    },
}

#: Of the same fits: those of a launch; of a tile of 128 tokens and row tiles, besides its steps; and of adding up such
#: a tile, for each block of the cluster that shares it.
_LAUNCH_TILE_PART: dict[Activation, tuple[float, float, float]] = {"float": (2.9, 1.0, 0.35), "int8": (3.1, 1.0, 0.46)}

#: Sums that a thread has room for where those of groups are kept apart, by WARPGROUPS.
_MOST_SUMS = {2: 160, 3: 96, 4: 48}

#: Steps in flight, at most; and at least, to hide the latency of memory.
_MOST_STAGES, _LEAST_STAGES = 12, 3


def wgmma_tiles(layers: tuple[LayerShape, ...], dtype: Dtype, activation: Activation = "float") -> Iterator[Tile]:
    """The sizes of linear_wgmma.cuh that fit the shared memory and the registers of a block, whatever the tokens."""
    planes = layers[0].planes
    # SCALED of linear_wgmma_float.cuh; int8 sums are not kept apart either.
    scaled = activation == "int8" or (dtype == "bfloat16" and layers[0].mantissa is None)
    for BLOCK_M, ROW_TILES, WARPGROUPS in _STEP[activation]:
        sums = BLOCK_M // 2 * (ROW_TILES + 2)
        if not scaled and sums > _MOST_SUMS[WARPGROUPS]:
            continue
        for CLUSTER in CLUSTERS:
            tile = Tile(BLOCK_M=BLOCK_M, ROW_TILES=ROW_TILES, WARPGROUPS=WARPGROUPS, STAGES=0, CLUSTER=CLUSTER)
            rest = SHARED_BYTES - tile.shared_bytes(planes, activation)
            STAGES = min(rest // tile.stage_bytes(planes, activation), _MOST_STAGES)
            # Sums lie where x and packed trits were.
            fits = STAGES * (tile.stage_bytes(planes, activation) - 16) >= tile.parts_bytes
            if STAGES >= _LEAST_STAGES and fits:
                yield dataclasses.replace(tile, STAGES=STAGES)


def choose_wgmma_tile(
    M: int, layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype, activation: Activation = "float"
) -> Tile:
    """The sizes of linear_wgmma.cuh for M tokens: those with the least `estimated_microseconds`."""
    return min(
        wgmma_tiles(layers, dtype, activation),
        key=lambda tile: estimated_microseconds(tile, M, layers, K, g, activation),
    )


def estimated_microseconds(
    tile: Tile, M: int, layers: tuple[LayerShape, ...], K: int, g: int, activation: Activation = "float"
) -> float:
    """How long a call takes: rounds of whole tiles, then tiles whose steps a cluster shares, as the kernel does it.

    Only to compare tiles: for many tokens clocks fall, and all take longer.
    """
    tiles = sum(-(-layer.N // tile.BLOCK_N) for layer in layers) * -(-M // tile.BLOCK_M)
    clusters = CLUSTERS[tile.CLUSTER]
    rounds, left = divmod(tiles, clusters * tile.CLUSTER)
    if left > (tile.CLUSTER - 1) * clusters:
        rounds, left = rounds + 1, 0
    shared_rounds = -(-left // clusters)
    # A last group that is smaller has steps of its own.
    steps = K // g * -(-g // 128) + -(-(K % g) // 128) if g >= 128 else -(-K // 128)
    step = _STEP[activation][tile.BLOCK_M, tile.ROW_TILES, tile.WARPGROUPS]
    size = tile.BLOCK_M * tile.ROW_TILES / 128
    launch, ends, part = _LAUNCH_TILE_PART[activation]
    return (
        launch
        + rounds * (steps * step + size * ends)
        + shared_rounds * (-(-steps // tile.CLUSTER) * step + size * (ends + tile.CLUSTER * part))
    )
