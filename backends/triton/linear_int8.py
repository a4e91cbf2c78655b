"""y = (q · Wᵀ) · scale + bias with int8 activations: exact int32 sums of a group, then float32."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.triton.launch import ceil_div, launch
from ternarize.backends.triton.linear import blocks
from ternarize.backends.triton.packed import (
    Weight,
    add_bias,
    columns,
    decode,
    group_scale,
    load_codes,
    output_dtype,
    tiling,
)

#: The shortest operand of 8 bits that tensor cores take is 32 columns: 8 packed bytes.
_LEAST_BYTES = 8


@triton.jit
def linear_int8_kernel(
    q: tl.tensor,
    scale: tl.tensor,
    T_packed: tl.tensor,
    E: tl.tensor,
    mantissa: tl.tensor,
    bias: tl.tensor,
    bias_exponent: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    group_size: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    tiles: tl.tensor,
    stride_mantissa_n: tl.tensor,
    stride_mantissa_g: tl.tensor,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One [BLOCK_M, BLOCK_N] tile of y; q, scale and y are contiguous."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = m.to(tl.int64)[:, None]
    token_scale = tl.load(scale + m, mask=m < M, other=0.0)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(tiles):
        group, byte, byte_inside, k, k_inside = columns(tile, K, group_size, chunks, BLOCK_C)
        levels = decode(load_codes(T_packed, n, N, K, byte, byte_inside, PLANES), PLANES)
        a = tl.load(q + m_row * K + k[None, :], mask=(m < M)[:, None] & k_inside[None, :], other=0)
        partial = tl.dot(a, tl.trans(levels.to(tl.int8)), out_dtype=tl.int32)
        weight_scale = group_scale(E, mantissa, n, N, group, groups, stride_mantissa_n, stride_mantissa_g)
        # The scale of the token first: the sum alone, times 2^127, would leave the range of float32.
        accumulator += partial.to(tl.float32) * token_scale[:, None] * weight_scale[None, :]
    sums = add_bias(accumulator, bias, bias_exponent, n, N)
    tl.store(y + m_row * N + n[None, :], sums.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def linear_int8(
    q: Tensor,
    scale: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    group_size: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Linear layers that share their quantised input, one launch each; see `ternarize.ops` for shapes.

    Accumulates a group in int32 and groups in float32, and rounds once, to ``dtype``.
    """
    K = q.shape[-1]
    rows, scale = q.contiguous().view(-1, K), scale.contiguous()
    M = rows.shape[0]
    size, chunks, tiles, block_bytes = tiling(K, group_size)
    BLOCK_M, BLOCK_N, num_warps = blocks(M, dtype)
    outputs = []
    for i, packed in enumerate(T_packed):
        N = packed.shape[-2]
        weight = Weight.of(packed, E[i], E_mantissa[i])
        y = q.new_empty((*q.shape[:-1], N), dtype=output_dtype(dtype))
        with torch.cuda.device_of(q):
            launch(
                linear_int8_kernel,
                ceil_div(M, BLOCK_M) * ceil_div(N, BLOCK_N),
                rows,
                scale,
                weight.T_packed,
                weight.E,
                weight.mantissa,
                bias[i],
                bias_exponent[i],
                y,
                M,
                N,
                K,
                size,
                E[i].shape[-1],
                chunks,
                tiles,
                *weight.strides,
                PLANES=weight.planes,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_C=max(block_bytes, _LEAST_BYTES),
                num_warps=num_warps,
            )
        outputs.append(y.to(dtype))
    return outputs
