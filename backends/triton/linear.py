"""y = x · Wᵀ + bias: the operand is the integer level, 2^E goes onto the float32 sum of its group."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.triton import dense
from ternarize.backends.triton.launch import ceil_div, launch
from ternarize.backends.triton.packed import (
    INTERPRETED,
    Weight,
    add_bias,
    columns,
    decode,
    group_scale,
    load_codes,
    output_dtype,
    tiling,
)


@triton.jit
def linear_kernel(
    x: tl.tensor,
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
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_mantissa_n: tl.tensor,
    stride_mantissa_g: tl.tensor,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One [BLOCK_M, BLOCK_N] tile of y; y is contiguous."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = m.to(tl.int64)[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(tiles):
        group, byte, byte_inside, k, k_inside = columns(tile, K, group_size, chunks, BLOCK_C)
        levels = decode(load_codes(T_packed, n, N, K, byte, byte_inside, PLANES), PLANES)
        a = tl.load(
            x + m_row * stride_xm + k.to(tl.int64)[None, :] * stride_xk,
            mask=(m < M)[:, None] & k_inside[None, :],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
        partial = tl.dot(a, tl.trans(levels.to(a.dtype)), input_precision="ieee")
        scale = group_scale(E, mantissa, n, N, group, groups, stride_mantissa_n, stride_mantissa_g)
        accumulator += partial * scale[None, :]
    sums = add_bias(accumulator, bias, bias_exponent, n, N)
    tl.store(y + m_row * N + n[None, :], sums.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def blocks(tokens: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps of `linear` and `grad_input`.

    Few tokens: the smallest operand that tensor cores take, and narrow tiles, so that many programs share the reading
    of the weight. float32 runs without tensor cores, from registers, and wants smaller tiles.
    """
    if tokens <= 16:
        return 16, 32, 4
    if tokens <= 64 or dtype == torch.float32:
        return 64, 64, 4
    return 128, 64, 8


def linear(
    x: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    group_size: int,
) -> list[Tensor]:
    """Linear layers that share their input, one after the other; see `ternarize.ops` for shapes.

    Accumulates in float32 and rounds once, to the dtype of x. Many tokens are multiplied by cuBLAS, see `dense`.
    """
    K = x.shape[-1]
    rows = x.reshape(-1, K)
    M = rows.shape[0]
    size, chunks, tiles, BLOCK_C = tiling(K, group_size)
    BLOCK_M, BLOCK_N, num_warps = blocks(M, x.dtype)
    outputs = []
    for i, packed in enumerate(T_packed):
        N = packed.shape[-2]
        if dense.takes(rows, [packed], [E_mantissa[i]]):
            b, exponent = bias[i], bias_exponent[i]
            given = None if b is None or exponent is None else (b, exponent)
            with torch.cuda.device_of(x):
                outputs.append(dense.linear(rows, packed, E[i], given, group_size).view(*x.shape[:-1], N))
            continue
        weight = Weight.of(packed, E[i], E_mantissa[i])
        y = x.new_empty((*x.shape[:-1], N), dtype=output_dtype(x.dtype))
        with torch.cuda.device_of(x):
            launch(
                linear_kernel,
                ceil_div(M, BLOCK_M) * ceil_div(N, BLOCK_N),
                rows,
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
                *rows.stride(),
                *weight.strides,
                PLANES=weight.planes,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_C=BLOCK_C,
                UPCAST=INTERPRETED,
                num_warps=num_warps,
            )
        outputs.append(y.to(x.dtype))
    return outputs
