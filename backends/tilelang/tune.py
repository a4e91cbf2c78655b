"""Time the tiles that a call can run on, on this GPU."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ternarize import ops
from ternarize.activation import dequantize_activation, quantize_activation
from ternarize.backends.tilelang.build import Kernel, Program, start
from ternarize.backends.tilelang.host import NOTHING
from ternarize.backends.tilelang.layers import Dtype, LayerShape
from ternarize.backends.tilelang.linear import heuristic_tile
from ternarize.backends.tilelang.linear_decode import decode_tiles
from ternarize.backends.tilelang.linear_wgmma import Tile, estimated_microseconds, wgmma_tiles
from ternarize.backends.tilelang.tuned import AnyTile, Key, bucket
from ternarize.bench.contenders import EXPONENTS, TOLERANCE
from ternarize.bench.linear import sample_rows
from ternarize.bench.timing import Pass, copies_needed, record, time_in_turns
from ternarize.checkpoint.format import PackedLayer
from ternarize.config import Activation
from ternarize.layer import TernaryLinear
from ternarize.packing import largest_level

#: A tile that is faster than the heuristic's by less than this share is noise, and one more kernel to compile.
LEAST_GAIN = 0.03

#: Tiles of the wgmma kernel that are timed: estimates are right within 15 %.
MOST_WGMMA_TILES = 8

#: Of timing, for one call and number of tokens, all tiles together.
SECONDS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """The fastest tile of a call for a number of tokens."""

    key: Key
    tile: AnyTile
    seconds: float
    heuristic_seconds: float | None
    """Of the heuristic's tile; None if that one failed or was wrong."""

    @property
    def gains(self) -> bool:
        """Whether the tile is worth an entry in the table."""
        return self.heuristic_seconds is None or self.seconds < (1 - LEAST_GAIN) * self.heuristic_seconds


def candidates(
    M: int, layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype, activation: Activation = "float"
) -> list[AnyTile]:
    """Tiles for M tokens, the heuristic's first: all that fit of the decode kernel, the most promising of the other."""

    def estimate(tile: Tile) -> float:
        return estimated_microseconds(tile, M, layers, K, g, activation)

    wgmma = sorted(wgmma_tiles(layers, dtype, activation), key=estimate)[:MOST_WGMMA_TILES]
    decode = decode_tiles(M, layers, K, g, activation)
    return list(dict.fromkeys((heuristic_tile(M, layers, K, g, dtype, activation), *decode, *wgmma)))


def tuning_programs(program: Program, tokens: Iterable[int]) -> dict[int, list[Program]]:
    """What is to be timed for a call, by number of tokens: the largest of each bucket that ``tokens`` meet.

    Args:
        program: of the call, with any tile.
        tokens: numbers of tokens that the call will have.
    """
    call = (program.layers, program.K, program.g, program.dtype, program.activation)
    return {
        M: [dataclasses.replace(program, tile=tile) for tile in candidates(M, *call)]
        for M in sorted({bucket(M) for M in tokens})
    }


def tune_call(
    call: Sequence[PackedLayer], programs: Mapping[int, Sequence[Program]], device: torch.device
) -> Iterator[Tuned]:
    """Check tiles against float64, then time those that are right, in turns, with weights read from memory.

    Args:
        call: layers that share their input.
        programs: from `tuning_programs`.
        device: to time them on.

    Yields:
        The fastest for each number of tokens; nothing where no tile is right.
    """
    generator = torch.Generator(device).manual_seed(0)
    layers = [_random_layer(layer, generator) for layer in call]
    copies = copies_needed(sum(layer.T_packed.nbytes for layer in layers), device)
    weights = [layers, *(copy.deepcopy(layers) for _ in range(copies - 1))]
    for M, of_call in programs.items():
        x = torch.randn(M, of_call[0].K, dtype=getattr(torch, of_call[0].dtype), device=device, generator=generator)
        inputs, exact_x = [x], x.double()
        if of_call[0].activation == "int8":
            q, scale = quantize_activation(x)
            inputs, exact_x = [q, scale.view(-1)], dequantize_activation(q, scale, torch.float64)
        rows = sample_rows(M, device)
        reference: list[Tensor] = ops.lowered("linear", "torch")(exact_x[rows], *_columns(layers), layers[0].group_size)
        passes: dict[Program, Pass] = {}
        for program in of_call:
            # Whatever a tile's compilation or launch raises takes it out of the race.
            with contextlib.suppress(Exception):
                kernel = start(program).result()
                calls = [functools.partial(_run, program, kernel, inputs, each) for each in weights]
                if _right(calls[0](), reference, M, rows):
                    passes[program] = record(calls, device)
        timings = time_in_turns(list(passes.values()), SECONDS)
        # One call that runs into the next is an error that shows only here.
        seconds = {
            program: timing.seconds
            for (program, timed), timing in zip(passes.items(), timings, strict=True)
            if _right(timed.output, reference, M, rows)
        }
        if seconds:
            best = min(seconds, key=lambda program: seconds[program])
            key = Key(layers=best.layers, K=best.K, g=best.g, dtype=best.dtype, activation=best.activation, tokens=M)
            yield Tuned(key=key, tile=best.tile, seconds=seconds[best], heuristic_seconds=seconds.get(of_call[0]))


def _run(program: Program, kernel: Kernel, inputs: Sequence[Tensor], layers: Sequence[TernaryLinear]) -> Tensor:
    """Call a kernel with x, or q and its scale; the outputs of all layers lie in the result, see `_outputs`."""
    x, *_ = arguments = list(inputs)
    for layer, *given in zip(layers, *_columns(layers), strict=True):
        arguments += [tensor for tensor in given if tensor is not None]
        if program.guarded:
            arguments.append(layer.status)
    elements = sum(_padded(len(x) * layer.out_features) for layer in layers)
    y = x.new_empty(elements, dtype=getattr(torch, program.dtype))
    outputs = _outputs(y, len(x), [layer.out_features for layer in layers])
    kernel(*arguments, *outputs, *NOTHING.arguments(program, x, outputs))
    return y


def _outputs(y: Tensor, M: int, widths: Sequence[int]) -> list[Tensor]:
    """[M, N] of each layer."""
    parts = y.split([_padded(M * N) for N in widths])
    return [part[: M * N].view(M, N) for part, N in zip(parts, widths, strict=True)]


def _padded(elements: int) -> int:
    """So many that the next output starts at a multiple of 16 bytes, which TMA needs."""
    return -(-elements // 8) * 8


def _right(y: Tensor, reference: Sequence[Tensor], M: int, rows: Tensor) -> bool:
    """Whether every output is within `TOLERANCE` of float64; not if anything is NaN."""
    outputs = _outputs(y, M, [exact.shape[1] for exact in reference])
    errors = [
        (ours[rows].double() - exact).norm() / exact.norm() for ours, exact in zip(outputs, reference, strict=True)
    ]
    return all(bool(error <= TOLERANCE[y.dtype]) for error in errors)


def _random_layer(shape: PackedLayer, generator: torch.Generator) -> TernaryLinear:
    """Uniform levels, and exponents uniform over `EXPONENTS`."""
    top = largest_level(shape.config.planes)
    first, last = EXPONENTS
    layer = shape.empty(device=generator.device)

    def integers(low: int, high: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high + 1, size, dtype=dtype, device=generator.device, generator=generator)

    bias = layer.bias is not None
    return TernaryLinear.from_levels(
        integers(-top, top, (shape.out_features, shape.in_features), torch.int8),
        integers(first, last, tuple(layer.E.shape), torch.int8),
        config=shape.config,
        # As programs take it, in full.
        E_mantissa=None if shape.mantissa is None else integers(64, 127, tuple(layer.E.shape), shape.mantissa.dtype),
        bias=integers(-100, 100, (shape.out_features,), torch.int32) if bias else None,
        bias_exponent=torch.full((1,), -6, dtype=torch.int8, device=generator.device) if bias else None,
    )


def _columns(layers: Sequence[TernaryLinear]) -> list[list[Tensor | None]]:
    """T_packed, E, E_mantissa, bias and bias_exponent, each of all layers, as the ops take them."""
    rows = [(layer.T_packed, layer.E, layer.E_mantissa, layer.bias, layer.bias_exponent) for layer in layers]
    return [list(column) for column in zip(*rows, strict=True)]
