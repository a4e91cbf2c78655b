# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The program of `linear` and `linear_int8` for a few tokens: linear_decode.cuh, hosted by TileLang."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tilelang.language as T

from ternarize.backends.tilelang.hopper import CLUSTERS, SHARED_BYTES
from ternarize.backends.tilelang.layers import (
    MANTISSA_BYTES,
    Dtype,
    FusedArguments,
    LayerShape,
    call_arguments,
    fused_arguments,
    pointer,
)
from ternarize.config import Activation

#: Weights of a row that a warp takes at once: a cache line.
STEP = 512

#: Most tokens of a call.
MOST_TOKENS = 16

#: Digits that floats are multiplied as, where they are: for so few tokens, and so many rows of all layers a token.
#: Every block makes the digits of x, and each row takes fewer instructions then. On an H200 (docs/figures.md).
_DIGITS, _MOST_DIGIT_TOKENS, _ROWS_A_DIGIT_TOKEN = 3, 2, 4096

#: Elements of x in a block's shared memory from which on it pays to split K, and x with it, over more blocks: of floats
#: beyond so many, on an H100, and of int8 from so many on, on an H200.
_ELEMENTS = 2**15

#: Of int8: from so many tokens on one step ahead is better than two, and for more rows clusters of eight are worse than
#: four, since they leave a fifth of the multiprocessors without work. On an H200 (docs/figures.md).
_ONE_AHEAD_TOKENS, _ROWS_OF_EIGHT = 8, 8192

#: More than 8 tokens of floats and longer rows are for wgmma where there are fewer rows. On an H200 (docs/figures.md).
_LONG_ROW, _MANY_ROWS = 4096, 4096

#: Files of CUDA C++, each after those that it needs.
SOURCES = (
    "numbers.cuh",
    "hopper.cuh",
    "linear_decode_round.cuh",
    "linear_decode_x.cuh",
    "linear_decode_groups.cuh",
    "linear_decode_norm.cuh",
    "linear_decode_call.cuh",
    "linear_decode_rows.cuh",
    "linear_decode.cuh",
)
SOURCE = "".join(Path(__file__).with_name(name).read_text() for name in SOURCES)

#: What the kernel does besides, if it is asked to: bits of Fused in linear_decode_call.cuh.
FUSED = {"norm": 1, "residual": 2, "gated": 4}

#: Most tokens that are normalised: the code for more costs calls that do not use it half a microsecond. And values of x
#: that a thread can normalise: BATCH pieces of linear_decode_x.cuh.
_MOST_NORM_TOKENS, _NORM_VALUES = 2, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """How linear_decode.cuh shares out the work; its template arguments, in their order."""

    TOKENS: int
    """Tokens a call has at most: 1, 2, 4, 8 or 16."""
    TILES: int
    """mma tiles of 16 rows in a row block."""
    STAGES: int
    """Steps along K that a warp copies ahead."""
    WARPS: int
    """Warps a block."""
    K_WARPS: int
    """Warps of a block among which K is split; the others take other row blocks."""
    CLUSTER: int
    """Blocks among which K is split."""
    CLUSTERS: int
    """Clusters, among which the row blocks are shared out: at most as many as there are row blocks."""
    DIGITS: int
    """Digits of int8 that floats are multiplied as (linear_decode_x.cuh): 3; 1, rounded; or 0, as they are."""

    def row_blocks(self, layers: tuple[LayerShape, ...]) -> int:
        """Row blocks; the last of a layer overlaps the one before it if N is no multiple of their size."""
        return sum(-(-layer.N // (16 * self.TILES)) for layer in layers)

    def shared_bytes(self, layers: tuple[LayerShape, ...], K: int, g: int, activation: Activation) -> int:
        """Shared memory of a block: the rings, its part of x, and the parts of the sums that it adds up."""
        rows, first = 16 * self.TILES, layers[0]
        scale_bytes = _ring_bytes(1, K, g) + _ring_bytes(MANTISSA_BYTES[first.mantissa], K, g)
        ring_bytes = self.WARPS * self.STAGES * rows * (first.planes * STEP // 4 + scale_bytes)
        columns = self.TOKENS * max(1, self.DIGITS)
        tile_columns = -(-columns // 8) * 8
        step_bytes = STEP * columns * (1 if self.DIGITS or activation == "int8" else 2)
        if self.DIGITS == _DIGITS:
            # A unit for each column of a chunk.
            step_bytes += STEP // 128 * tile_columns * 4
        # Of gated layers each has a block's share of the same row blocks.
        halves = (1, 2) if gateable(layers) else (1,)
        blocks = self.row_blocks(layers)
        slots = max(half * _divided(blocks // half, self.CLUSTERS, self.CLUSTER) for half in halves)
        # Those of a token's digits are added up first: a value for each half of a tile's rows in every lane.
        part_bytes = 256 * self.TILES if self.DIGITS == _DIGITS else rows * tile_columns * 4
        parts_bytes = slots * self.CLUSTER * self.K_WARPS * part_bytes
        # TokenScales of linear_decode_round.cuh.
        scales_bytes = (self.TOKENS + 2 * self.WARPS) * 4 if self.DIGITS == 1 else 0
        return ring_bytes + -(-_steps(K) // self.CLUSTER) * step_bytes + scales_bytes + parts_bytes

    def normalises(self, K: int) -> bool:
        """Whether the kernel can normalise x: RootMeanSquare of linear_decode_norm.cuh."""
        values = _steps(K) * STEP * self.TOKENS
        return self.CLUSTER == 1 and self.TOKENS <= _MOST_NORM_TOKENS and values <= _NORM_VALUES * 32 * self.WARPS


def gateable(layers: tuple[LayerShape, ...]) -> bool:
    """Whether one result may be made of two layers, silu(y_0) · y_1."""
    return len(layers) == 2 and layers[0].N == layers[1].N


def _divided(number: int, *parts: int) -> int:
    """The most that a part has of a number of things, shared out to parts, and there again."""
    return functools.reduce(lambda left, part: -(-left // part), parts, number)


def _steps(K: int) -> int:
    return -(-K // STEP)


def _ring_bytes(value_bytes: int, K: int, g: int) -> int:
    """Bytes of a row and step that its exponents or mantissas take in a ring: GroupValues of linear_decode.cuh."""
    if value_bytes == 0:
        return 0
    groups = -(-K // g)
    per_chunk = max(1, 128 // g)
    aligned = g <= 128 and groups * value_bytes % 4 == 0
    return 4 * (per_chunk * value_bytes if aligned else (4 * per_chunk * value_bytes + 7 - value_bytes) // 4)


def decode_function(
    layers: tuple[LayerShape, ...],
    K: int,
    g: int,
    dtype: Dtype,
    *,
    guarded: bool,
    tile: DecodeTile,
    activation: Activation = "float",
) -> str:
    """The instance of linear_decode.cuh for a call; arguments as of `decode_program`."""
    y_type = "__nv_bfloat16" if dtype == "bfloat16" else "__half"
    parameters = (
        "int8_t" if activation == "int8" else y_type,
        y_type,
        *dataclasses.astuple(tile),
        K,
        g,
        layers[0].planes,
        MANTISSA_BYTES[layers[0].mantissa],
        str(guarded).lower(),
    )
    return f"ternarize::linear_decode<{', '.join(map(str, parameters))}>"


def decode_program(
    layers: tuple[LayerShape, ...],
    K: int,
    g: int,
    dtype: Dtype,
    *,
    guarded: bool,
    tile: DecodeTile,
    activation: Activation = "float",
) -> Any:
    """The program for a call of up to tile.TOKENS tokens.

    Args:
        layers: of the call, with as many planes and the same mantissa each.
        K: in_features, a multiple of 64.
        g: weights a scale group: 64, a multiple of 128, or K.
        dtype: of y, and of x unless that is int8.
        guarded: whether values that are not finite are reported in the status of their layer.
        tile: how the work is shared out.
        activation: int8 for x in int8, with a scale for each token.

    Returns:
        A TileLang prim_func of the arguments of `ternarize.backends.tilelang.layers.call_arguments`, and of floats
        those of `fused_arguments`.
    """
    function = decode_function(layers, K, g, dtype, guarded=guarded, tile=tile, activation=activation)
    shared_bytes = tile.shared_bytes(layers, K, g, activation)

    @T.prim_func
    def ternary_linear_decode():
        x, scale, buffers = call_arguments(layers, K, g, dtype, activation, guarded=guarded)
        fused = fused_arguments(layers, x, dtype) if activation == "float" else FusedArguments()
        with T.Kernel(tile.CLUSTER * tile.CLUSTERS, threads=32 * tile.WARPS, cluster_dims=tile.CLUSTER):
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(1)
            shared = T.alloc_shared((shared_bytes,), T.uint8)
            T.call_extern(
                "handle",
                function,
                pointer(x, "r"),
                pointer(scale, "r"),
                T.access_ptr(shared[0], "rw"),
                x.shape[0],
                T.call_extern(
                    "handle",
                    "ternarize::fused",
                    pointer(fused.norm_weight, "r"),
                    pointer(fused.residual, "r"),
                    fused.norm_eps,
                    fused.what,
                ),
                *(
                    T.call_extern(
                        "handle",
                        "ternarize::layer",
                        layer.N,
                        pointer(tensors.T_packed, "r"),
                        *tensors.pointers(),
                    )
                    for layer, tensors in zip(layers, buffers, strict=True)
                ),
            )
            # The function has waited already: what TileLang launches as dependent is a kernel in which it sees a wait.
            T.pdl_sync()

    return ternary_linear_decode


def choose_decode_tile(
    M: int,
    layers: tuple[LayerShape, ...],
    K: int,
    g: int,
    activation: Activation = "float",
    *,
    rounds: bool = False,
) -> DecodeTile | None:
    """The first of `decode_tiles`, or None for a call that linear_decode.cuh does not serve."""
    return next(decode_tiles(M, layers, K, g, activation, rounds=rounds), None)


def decode_tiles(
    M: int,
    layers: tuple[LayerShape, ...],
    K: int,
    g: int,
    activation: Activation = "float",
    *,
    rounds: bool = False,
) -> Iterator[DecodeTile]:
    """The sizes of linear_decode.cuh that fit a call of a few tokens, the preferred ones first.

    It serves rows that are a multiple of 16 packed bytes, groups that are whole rows, 64 or a multiple of 128, and
    layers that agree in planes and mantissa.

    Args:
        M: tokens.
        layers: of the call.
        K: in_features.
        g: weights a scale group.
        activation: int8 for x in int8, with a scale for each token.
        rounds: whether the kernel is to round floats to int8, for layers of one plane without mantissas.
    """
    first, rows = layers[0], sum(layer.N for layer in layers)
    plain = (first.planes, first.mantissa) == (1, None)
    if (
        M > MOST_TOKENS
        or (activation == "float" and not rounds and M > 8 and K > _LONG_ROW and rows < _MANY_ROWS)
        or K % 64 != 0
        or (g != 64 and g % 128 != 0 and g != K)
        or any((layer.planes, layer.mantissa) != (first.planes, first.mantissa) for layer in layers)
        or (rounds and not plain)
    ):
        return
    tokens = next(tokens for tokens in (1, 2, 4, 8, 16) if tokens >= M)
    digits = 0
    if rounds:
        digits = 1
    elif activation == "float" and plain and tokens <= _MOST_DIGIT_TOKENS and rows >= tokens * _ROWS_A_DIGIT_TOKEN:
        digits = _DIGITS

    def preference(cluster: int) -> tuple[int, ...]:
        elements = cluster * _ELEMENTS
        if activation == "float":
            return (tokens * K > elements, cluster)
        crowded = tokens * K >= elements
        return (cluster == 8 and rows > _ROWS_OF_EIGHT, crowded, -cluster if crowded else cluster)

    ahead = (1, 2) if activation == "int8" and tokens >= _ONE_AHEAD_TOKENS else (2, 1)
    for stages, cluster in itertools.product(ahead, sorted((1, 2, 4, 8), key=preference)):
        tile = _shared_out(
            DecodeTile(
                TOKENS=tokens,
                TILES=1,
                STAGES=stages,
                # Several planes of 16 rows take more registers than 16 warps have.
                WARPS=16 if first.planes == 1 else 8,
                K_WARPS=1,
                CLUSTER=cluster,
                CLUSTERS=1,
                DIGITS=digits,
            ),
            layers,
            K,
            g,
            activation,
        )
        if tile is not None:
            yield tile


def _shared_out(
    tile: DecodeTile, layers: tuple[LayerShape, ...], K: int, g: int, activation: Activation
) -> DecodeTile | None:
    """The tile with its clusters and the K_WARPS that leave the fewest warps without work; None if it does not fit."""
    row_blocks = tile.row_blocks(layers)
    clusters = min(row_blocks, CLUSTERS[tile.CLUSTER])
    blocks = -(-row_blocks // clusters)
    splits = [k for k in (1, 2, 4, 8, 16) if k <= tile.WARPS and tile.CLUSTER * k <= _steps(K)]
    # First what the busiest warp has to do, in rows of K; then no warp should be without a row block.
    for k_warps in sorted(splits, key=lambda k: (-(-blocks * k // tile.WARPS) / k, blocks * k < tile.WARPS, k)):
        shared_out = dataclasses.replace(tile, CLUSTERS=clusters, K_WARPS=k_warps)
        if shared_out.shared_bytes(layers, K, g, activation) <= SHARED_BYTES:
            return shared_out
    return None
