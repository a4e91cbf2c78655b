"""The stage of the rule `factored` on Hopper, equal to `ternarize.backends.torch.update` bit for bit where G is exact.

Its tiles are a kernel of TileLang (update_wgmma.cuh). What is [N] or [K] sized, and the commit, is of memory's speed
whatever it is written in: those are the kernels of `ternarize.backends.triton`.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ternarize.backends.tilelang import build
from ternarize.backends.tilelang.host import aligned
from ternarize.backends.tilelang.layers import dtype_name
from ternarize.backends.tilelang.update_wgmma import parts_shapes
from ternarize.backends.torch import update as reference
from ternarize.backends.triton.update import update_commit
from ternarize.backends.triton.update_vectors import finish_stage, normalisers


def stage_factored(
    grad_y: Tensor,
    x: Tensor,
    row_factor: Tensor,
    col_factor: Tensor,
    rng: Tensor,
    stage: Tensor,
    status: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Add the integers of one micro-batch to a layer's stage.

    Where G is not finite, `status` says so, and what is staged there has no meaning: the step is refused.

    Args:
        grad_y: [M, N] in bfloat16 or float16, contiguous and aligned, as is x.
        x: [M, K].
        row_factor: float32 [N] of `normalisers`.
        col_factor: float32 [K].
        rng: int64 [3].
        stage: int8 [N, K].
        status: int32 [2].

    Returns:
        Sums of G² of the shapes of `parts_shapes`; None of no tokens.
    """
    (M, N), K = grad_y.shape, x.shape[1]
    if M == 0:
        stage.masked_fill_(status[1] == 0, 0)
        return None
    row_parts, col_parts = (stage.new_empty(shape, dtype=torch.float32) for shape in parts_shapes(N, K))
    # TileLang makes the device of its arguments the current one, and leaves it so.
    with torch.cuda.device(x.device):
        kernel = build.start(build.UpdateProgram(dtype=dtype_name(x.dtype))).result()
        kernel(grad_y, x, row_factor, col_factor, rng, stage, row_parts, col_parts, status)
    return row_parts, col_parts


def update_stage(
    grad_y: Sequence[Tensor],
    x: Tensor,
    _T_packed: Sequence[Tensor],
    row_log2: Sequence[Tensor],
    col_log2: Sequence[Tensor],
    rng: Sequence[Tensor],
    stage: Sequence[Tensor],
    _stage_E: Sequence[Tensor],
    stage_row: Sequence[Tensor],
    stage_col: Sequence[Tensor],
    status: Sequence[Tensor],
    _group_size: int,
    _rule: str,
) -> None:
    """Add one micro-batch's integers to the stage of some layers that share x.

    See `ternarize.ops` for shapes, and `verify` for what is accepted: the rule is "factored", and exponents are fixed.
    """
    inputs = aligned(x.reshape(-1, x.shape[-1]))
    for i, gradient in enumerate(grad_y):
        rows = aligned(gradient.reshape(-1, gradient.shape[-1]))
        with torch.cuda.device_of(x):
            factors = normalisers(row_log2[i], col_log2[i])
            parts = stage_factored(rows, inputs, *factors, rng[i], stage[i], status[i])
            # After the tiles: all of them draw from the stream of the same count.
            finish_stage(status[i], (stage_row[i], stage_col[i]), parts)


update_apply = functools.partial(reference.update_apply, halves=(update_stage, update_commit))
