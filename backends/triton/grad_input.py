"""grad_x = sum over layers of grad_y · W, with 2^E on the operand: the sum runs over rows, which differ in E."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.triton import dense
from ternarize.backends.triton.launch import ceil_div, launch
from ternarize.backends.triton.linear import blocks
from ternarize.backends.triton.packed import (
    INTERPRETED,
    Weight,
    columns,
    decode,
    group_scale,
    load_codes,
    output_dtype,
    tiling,
)


@triton.jit
def grad_input_kernel(
    grad_y: tl.tensor,
    T_packed: tl.tensor,
    E: tl.tensor,
    mantissa: tl.tensor,
    previous: tl.tensor,
    grad_x: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    group_size: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    tiles: tl.tensor,
    stride_gm: tl.tensor,
    stride_gn: tl.tensor,
    stride_mantissa_n: tl.tensor,
    stride_mantissa_g: tl.tensor,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One tile of grad_x, [BLOCK_M, 4 * BLOCK_C]; float32 ``previous`` is added. Both are contiguous."""
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    group, byte, byte_inside, k, k_inside = columns(tl.program_id(0) % tiles, K, group_size, chunks, BLOCK_C)
    m_row = m.to(tl.int64)[:, None]
    out = m_row * K + k[None, :]
    mask = (m < M)[:, None] & k_inside[None, :]
    accumulator = tl.zeros((BLOCK_M, 4 * BLOCK_C), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        levels = decode(load_codes(T_packed, n, N, K, byte, byte_inside, PLANES), PLANES)
        scale = group_scale(E, mantissa, n, N, group, groups, stride_mantissa_n, stride_mantissa_g)
        weight = levels.to(tl.float32) * scale[:, None]
        g = tl.load(
            grad_y + m_row * stride_gm + n.to(tl.int64)[None, :] * stride_gn,
            mask=(m < M)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if UPCAST or g.dtype == tl.float32 or mantissa is not None:
            accumulator = tl.dot(g.to(tl.float32), weight, accumulator, input_precision="ieee")
        elif g.dtype == tl.bfloat16:
            accumulator = tl.dot(g, weight.to(tl.bfloat16), accumulator)
        else:
            # float16 cannot hold 2^E. bfloat16 can, and two of them hold a float16: 8 + 8 >= 11 bits, both exact.
            high = g.to(tl.bfloat16)
            low = (g.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
            accumulator = tl.dot(high, weight.to(tl.bfloat16), accumulator)
            accumulator = tl.dot(low, weight.to(tl.bfloat16), accumulator)
    if previous is not None:
        accumulator += tl.load(previous + out, mask=mask, other=0.0)
    tl.store(grad_x + out, accumulator.to(grad_x.dtype.element_ty), mask=mask)


def grad_input(
    grad_y: Sequence[Tensor],
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    in_features: int,
    group_size: int,
) -> Tensor:
    """Gradient of the shared input of some layers, one after the other; see `ternarize.ops` for shapes.

    Accumulates in float32 and rounds once, to the dtype of grad_y. Many tokens are multiplied by cuBLAS, see `dense`.
    """
    dtype = grad_y[0].dtype
    M = grad_y[0].numel() // grad_y[0].shape[-1]
    shape = (*grad_y[0].shape[:-1], in_features)
    gradients = [gradient.reshape(-1, gradient.shape[-1]) for gradient in grad_y]
    if dense.takes(gradients[0], T_packed, E_mantissa):
        with torch.cuda.device_of(gradients[0]):
            return dense.grad_input(gradients, T_packed, E, in_features, group_size).view(shape)
    size, chunks, tiles, BLOCK_C = tiling(in_features, group_size)
    BLOCK_M, BLOCK_N, num_warps = blocks(M, dtype)
    total: Tensor | None = None
    for i, packed in enumerate(T_packed):
        N = packed.shape[-2]
        rows = gradients[i]
        weight = Weight.of(packed, E[i], E_mantissa[i])
        out = rows.new_empty(shape, dtype=output_dtype(dtype) if i == len(T_packed) - 1 else torch.float32)
        with torch.cuda.device_of(rows):
            launch(
                grad_input_kernel,
                ceil_div(M, BLOCK_M) * tiles,
                rows,
                weight.T_packed,
                weight.E,
                weight.mantissa,
                total,
                out,
                M,
                N,
                in_features,
                size,
                E[i].shape[-1],
                chunks,
                tiles,
                *rows.stride(),
                *weight.strides,
                PLANES=weight.planes,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_C=BLOCK_C,
                UPCAST=INTERPRETED,
                num_warps=num_warps,
            )
        total = out
    assert total is not None, "grad_input needs at least one layer"
    return total.to(dtype)
