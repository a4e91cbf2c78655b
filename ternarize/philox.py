"""Counter-based random bits for stochastic rounding: the same on every device, whatever the tiling.

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3 and
table 2), the generator of ``triton.language.philox``. A block of four words has counter (block, step, stream), the
block's number in 64 bits, and key (seed, layer).

A number that is rounded is in units of 2^-16, an integer, and gets 16 random bits added before the lower 16 are
dropped: `round_off`. That is unbiased on this grid; a value between its points is off by 2^-17 at most.
"""

import torch
from torch import Tensor

from ternarize.errors import ShapeError

#: Both roundings of a commit draw from one stream.
COMMIT_STREAM = 0
#: Micro-batch i of a step draws from stream GRADIENT_STREAM + i.
GRADIENT_STREAM = 1

#: Random bits of a rounding, and those of a fixed-point number behind the point.
FRACTION_BITS = 16

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ten rounds of Philox-4x32.

    Args:
        counter: four int64 tensors that broadcast together, each holding 32 bits.
        key: two int64 tensors, likewise.

    Returns:
        Four int64 tensors of 32 random bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap; their low 64 bits are those of the unsigned product, all that is needed.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def words(rng: Tensor, stream: int | Tensor, rows: slice, blocks: int) -> Tensor:
    """The words of some rows of blocks, numbered row by row.

    Args:
        rng: int64 [3]: seed (32 bits), layer, step. Stays on its device: nothing here synchronises.
        stream: which of the step's streams; an int or an integer tensor of one element.
        rows: the rows, with start and stop.
        blocks: blocks a row.

    Returns:
        int64 [rows, blocks, 4] of 32 random bits.
    """
    if rng.shape != (3,) or rng.dtype != torch.int64:
        raise ShapeError(f"rng is {rng.dtype} {list(rng.shape)}, need int64 [3]: seed, layer, step")
    row = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=rng.device)[:, None]
    block = row * blocks + torch.arange(blocks, dtype=torch.int64, device=rng.device)
    seed, layer, step = rng.unbind()
    streams = torch.as_tensor(stream, dtype=torch.int64, device=rng.device)
    counter = (block & _MASK, block >> 32, step & _MASK, streams)
    return torch.stack(philox(counter, (seed & _MASK, layer & _MASK)), -1)


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper 16 of 32 random bits, int32."""
    return (values & 0xFFFF).to(torch.int32), (values >> 16).to(torch.int32)


def commit_bits(rng: Tensor, rows: slice, in_features: int) -> tuple[Tensor, Tensor]:
    """16 bits for the momentum and 16 for the accumulator of each element of some rows of a layer's weight.

    They are the lower and the upper half of word k mod 4 of block k div 4 of the row, which has ceil(K / 4).

    Args:
        rng: int64 [3], as in `words`.
        rows: the rows.
        in_features: K.

    Returns:
        Twice int32 [rows, K].
    """
    return halves(words(rng, COMMIT_STREAM, rows, -(-in_features // 4)).flatten(-2)[:, :in_features])


def gradient_bits(rng: Tensor, micro_batch: int | Tensor, rows: slice, in_features: int) -> Tensor:
    """16 bits for each element of some rows of a layer's gradient.

    A block serves 8 elements, in the order of a wgmma accumulator (PTX ISA 9.7.16.5.1.1), so that a thread draws for
    what it holds. Four blocks serve 32 columns: block t those with t = (k mod 8) div 2, word j of it those with
    j = (k mod 32) div 8, its lower half the even and its upper half the odd one. A row has 4 · ceil(K / 32) blocks.

    Args:
        rng: int64 [3], as in `words`.
        micro_batch: which one of the step; an int or an integer tensor of one element.
        rows: the rows.
        in_features: K.

    Returns:
        int32 [rows, K].
    """
    runs = -(-in_features // 32)
    drawn = words(rng, GRADIENT_STREAM + micro_batch, rows, 4 * runs).unflatten(1, (runs, 4))
    in_order = torch.stack(halves(drawn.transpose(2, 3)), -1)
    return in_order.flatten(1)[:, :in_features]


def to_fixed(values: Tensor) -> Tensor:
    """float32 below 2^15 to int32 in units of 2^-16, to nearest, ties to even."""
    return (values * 2.0**FRACTION_BITS).round().to(torch.int32)


def round_off(fixed: Tensor, bits: Tensor) -> Tensor:
    """Stochastic rounding of int32 in units of 2^-16 to int32: floor(value + uniform[0, 1)), exact on that grid."""
    return (fixed + bits) >> FRACTION_BITS
