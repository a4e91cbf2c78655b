"""Counter-based random bits for stochastic rounding: the same on every device, whatever the tiling.

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3 and
table 2), the generator of ``triton.language.philox``. Element k of row n of a layer, in one stream of one step, gets
word k mod 4 of the block with counter (n · ceil(K / 4) + k div 4, step, stream) and key (seed, layer).
"""

import torch
from torch import Tensor

from ternarize.errors import ShapeError

MOMENTUM_STREAM = 0
ACCUMULATOR_STREAM = 1
#: Micro-batch i of a step draws from stream GRADIENT_STREAM + i.
GRADIENT_STREAM = 2

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


def uniform(rng: Tensor, stream: int | Tensor, rows: slice, in_features: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, for some rows of a layer's weight.

    Args:
        rng: int64 [3]: seed (32 bits), layer, step. Stays on its device: nothing here synchronises.
        stream: which of the step's streams; an int or an integer tensor of one element.
        rows: the rows, with start and stop.
        in_features: K.

    Returns:
        float32 [rows, K].
    """
    if rng.shape != (3,) or rng.dtype != torch.int64:
        raise ShapeError(f"rng is {rng.dtype} {list(rng.shape)}, need int64 [3]: seed, layer, step")
    blocks = -(-in_features // 4)
    row = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=rng.device)[:, None]
    block = row * blocks + torch.arange(blocks, dtype=torch.int64, device=rng.device)
    seed, layer, step = rng.unbind()
    streams = torch.as_tensor(stream, dtype=torch.int64, device=rng.device)
    words = philox((block & _MASK, block >> 32, step & _MASK, streams), (seed & _MASK, layer & _MASK))
    return (torch.stack(words, -1).flatten(-2)[:, :in_features] >> 8).to(torch.float32) * 2.0**-24
