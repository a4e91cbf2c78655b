"""Products of many tokens: a strip of W is written to scratch as bfloat16, where it is exact, and cuBLAS multiplies.

Decoding costs a few bytes a weight whatever the tokens, and a product of many tokens is long: the scratch, reused from
strip to strip, is mostly still in L2 when it is read. Strips are columns of the result, so each element is summed in
one product and rounded once; where something is added to it, the sum stays in float32 until then.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch.linear import dense_bias
from ternarize.backends.triton.launch import ceil_div, launch
from ternarize.backends.triton.packed import group_scale, multiprocessors
from ternarize.packing import ROW, WORKSPACE_BYTES, groups_per_row

#: So many tokens or fewer take the kernels that decode in registers: beyond, their tiles grow (`linear.blocks`). With
#: 64 tokens and 4096x4096 weights those took 108 µs on an H200, cuBLAS 12 µs (docs/figures-training.md); to write 34 MB
#: of weights first takes about 10 µs.
REGISTER_TOKENS = 16

#: The tile of y that cuBLAS most often takes on Hopper: a strip should fill the SMs with a whole number of them.
_CUBLAS_TILE = (128, 256)

#: Strips start at multiples of so many columns, which keeps rows of the scratch and of the result aligned. Along K they
#: start with a tile of `dequantise_kernel`, along N they need not.
_UNIT, _UNIT_OF_ROWS = 128, 64

#: Weights a row and rows that a program decodes.
_BLOCK_K, _BLOCK_N = 128, 32


@triton.jit
def dequantise_kernel(
    T_packed: tl.tensor,
    E: tl.tensor,
    W: tl.tensor,
    n_start: tl.tensor,
    n_stop: tl.tensor,
    k_start: tl.tensor,
    k_stop: tl.tensor,
    K: tl.tensor,
    group_size: tl.tensor,
    groups: tl.tensor,
    blocks_k: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """One tile of W[n_start : n_stop, k_start : k_stop], contiguous; one plane, no mantissa.

    ALIGNED is that of `alignment`: bytes of neighbouring weights that are loaded at once. Above 1 each tile is inside
    of a group, else any weight may be of another.
    """
    n = n_start + tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    first = k_start + tl.program_id(0) % blocks_k * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    mask = (n < n_stop)[:, None] & (k < k_stop)[None, :]
    row = n.to(tl.int64)
    if ALIGNED > 1:
        first = tl.multiple_of(first, ALIGNED)
        group = first // group_size
        place = first - group * group_size + tl.arange(0, BLOCK_K)
        quarter = tl.multiple_of(group_size // 4, ALIGNED)
        scale = group_scale(E, None, n, n_stop, group, groups, 0, 0)[:, None]
        byte = tl.multiple_of(group * quarter, ALIGNED) + place % quarter
        bytes_a_row = tl.multiple_of(K // 4, ALIGNED)
        loaded = (n < n_stop)[:, None]
    else:
        group = k // group_size
        place = k - group * group_size
        # Past the row, where nothing is loaded, at least 1: it divides.
        quarter = tl.maximum((tl.minimum(group_size, K - group * group_size) + 3) // 4, 1)
        exponent = tl.load(E + row[:, None] * groups + group[None, :], mask=mask, other=0).to(tl.int32)
        scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        byte = group * (group_size // 4) + place % quarter
        bytes_a_row = (K + 3) // 4
        loaded = mask
    codes = tl.load(T_packed + row[:, None] * bytes_a_row + byte[None, :], mask=loaded, other=0).to(tl.int32)
    # Two shifts sign-extend a 2-bit code: it is two's complement.
    levels = (codes << (30 - 2 * (place // quarter))[None, :]) >> 30
    out = W + (row - n_start)[:, None] * (k_stop - k_start) + (k - k_start)[None, :]
    tl.store(out, (levels.to(tl.float32) * scale).to(W.dtype.element_ty), mask=mask)


def alignment(size: int, in_features: int) -> tuple[int, int]:
    """ALIGNED and BLOCK_K of `dequantise_kernel` for groups of ``size`` weights."""
    block = math.gcd(size, _BLOCK_K)
    if in_features % size or block < 32:
        return 1, _BLOCK_K
    return math.gcd(size // 4, 16), block


def dequantise(T_packed: Tensor, E: Tensor, n: slice, k: slice, in_features: int, group_size: int, W: Tensor) -> Tensor:
    """Decode a part of a weight.

    Args:
        T_packed: uint8 [N, B], contiguous.
        E: int8 [N, G], contiguous.
        n: its rows, with start and stop.
        k: its columns, likewise; they start at a multiple of 128.
        in_features: K.
        group_size: g, or -1 for whole rows.
        W: scratch for at least as many elements, in a dtype that holds T · 2^E.

    Returns:
        A view of the scratch, [rows, columns].
    """
    rows, columns = n.stop - n.start, k.stop - k.start
    size = in_features if group_size == ROW else min(group_size, in_features)
    ALIGNED, BLOCK_K = alignment(size, in_features)
    blocks_k = ceil_div(columns, BLOCK_K)
    launch(
        dequantise_kernel,
        ceil_div(rows, _BLOCK_N) * blocks_k,
        T_packed,
        E,
        W,
        n.start,
        n.stop,
        k.start,
        k.stop,
        in_features,
        size,
        groups_per_row(in_features, group_size),
        blocks_k,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=BLOCK_K,
        ALIGNED=ALIGNED,
        num_warps=4,
    )
    return W[: rows * columns].view(rows, columns)


def takes(x: Tensor, T_packed: Sequence[Tensor], E_mantissa: Sequence[Tensor | None]) -> bool:
    """Whether products with the rows of x [M, ...] are worth a strip, and bfloat16 holds all weights for any E."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or x.shape[0] <= REGISTER_TOKENS:
        return False
    return all(packed.dim() == 2 for packed in T_packed) and all(mantissa is None for mantissa in E_mantissa)


@functools.cache
def strip_width(tokens: int, width: int, most: int, processors: int, unit: int = _UNIT) -> int:
    """Columns of the result a strip: of a layer of more than one unit never all, for that would be a dense weight.

    Args:
        tokens: M.
        width: columns of the result.
        most: that the scratch has room for.
        processors: SMs, each of which multiplies a tile at a time.
        unit: that the width of a strip is a multiple of.

    Returns:
        The width, at most half of all columns, with which all strips together take the fewest waves of tiles, and of
        several the widest; one unit where half of the columns are less.
    """
    rows = ceil_div(tokens, _CUBLAS_TILE[0])

    def waves(columns: int) -> int:
        return ceil_div(rows * ceil_div(columns, _CUBLAS_TILE[1]), processors)

    def of_all(step: int) -> int:
        return width // step * waves(step) + waves(width % step)

    # Half of the columns, rounded up to units: the last strip may be narrower.
    half = ceil_div(width, 2 * unit) * unit
    fits = range(unit, max(unit, min(most, half)) + 1, unit)
    return min(reversed(fits), key=of_all)


def strips(width: int, step: int) -> Iterator[slice]:
    """0 to width in steps."""
    for start in range(0, width, step):
        yield slice(start, min(width, start + step))


@contextlib.contextmanager
def float32_sums() -> Iterator[None]:
    """Keep cuBLAS from adding partial sums in bfloat16, which torch allows it by default."""
    matmul, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    allowed = getattr(matmul, name)
    # Newer versions of torch keep two switches under this name.
    split_k = getattr(matmul, f"{name}_split_k", None)
    setattr(matmul, name, False)
    try:
        yield
    finally:
        setattr(matmul, name, allowed if split_k is None else (allowed, split_k))


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a · b to ``out``, or add it; to float32 ``out`` without rounding to the dtype of a and b."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def columns_at_once(rows: int, element_size: int, *, sums: bool) -> int:
    """Columns of a strip that the workspace has room for, a multiple of the unit.

    Args:
        rows: of the strip, along the sum of a product.
        element_size: bytes of a weight.
        sums: whether float32 sums take half of the workspace.
    """
    part = WORKSPACE_BYTES // 2 if sums else WORKSPACE_BYTES
    return max(1, part // (rows * element_size) // _UNIT) * _UNIT


def tokens_at_once(tokens: int, columns: int, *, sums: bool) -> int:
    """How many tokens are multiplied with a strip at a time: all, or equal parts for whose float32 sums there is room.

    Args:
        tokens: M.
        columns: of the strip.
        sums: whether they take half of the workspace.
    """
    if not sums:
        return tokens
    parts = ceil_div(tokens, max(1, WORKSPACE_BYTES // 2 // (4 * columns)))
    return ceil_div(tokens, parts)


@torch.no_grad()
def linear(x: Tensor, T_packed: Tensor, E: Tensor, bias: tuple[Tensor, Tensor] | None, group_size: int) -> Tensor:
    """One layer, x · Wᵀ + bias.

    Args:
        x: [M, K] that `takes` accepts.
        T_packed: uint8 [N, B].
        E: int8 [N, G].
        bias: int32 [N] and its exponent, int8 [1].
        group_size: g.

    Returns:
        [M, N], of the dtype of x.
    """
    (M, K), N = x.shape, T_packed.shape[0]
    added = None if bias is None else dense_bias(*bias)
    most = columns_at_once(K, x.element_size(), sums=added is not None)
    step = min(N, strip_width(M, N, most, multiprocessors(x.device), _UNIT_OF_ROWS))
    tokens = tokens_at_once(M, step, sums=added is not None)
    T_packed, E = T_packed.contiguous(), E.contiguous()
    scratch = x.new_empty(step * K)
    y = x.new_empty(M, N)
    sums = None if added is None else x.new_empty(tokens * step, dtype=torch.float32)
    with float32_sums():
        for n in strips(N, step):
            W = dequantise(T_packed, E, n, slice(0, K), K, group_size, scratch)
            for m in strips(M, tokens):
                if added is None or sums is None:
                    multiply(x[m], W.t(), y[m, n])
                    continue
                total = sums[: (m.stop - m.start) * W.shape[0]].view(-1, W.shape[0])
                multiply(x[m], W.t(), total)
                torch.add(total, added[n], out=y[m, n])
    return y


@torch.no_grad()
def grad_input(
    grad_y: Sequence[Tensor], T_packed: Sequence[Tensor], E: Sequence[Tensor], in_features: int, group_size: int
) -> Tensor:
    """Sum over layers of grad_y · W.

    Args:
        grad_y: [M, N] each, that `takes` accepts.
        T_packed: uint8 [N, B] each.
        E: int8 [N, G] each.
        in_features: K.
        group_size: g.

    Returns:
        [M, K], of the dtype of grad_y.
    """
    first, K = grad_y[0], in_features
    M, most_rows = first.shape[0], max(gradient.shape[1] for gradient in grad_y)
    several = len(grad_y) > 1
    most = columns_at_once(most_rows, first.element_size(), sums=several)
    step = min(K, strip_width(M, K, most, multiprocessors(first.device)))
    tokens = tokens_at_once(M, step, sums=several)
    packed, exponents = [each.contiguous() for each in T_packed], [each.contiguous() for each in E]
    scratch = first.new_empty(most_rows * step)
    grad_x = first.new_empty(M, K)
    sums = first.new_empty(tokens * step, dtype=torch.float32) if several else None
    with float32_sums():
        for k in strips(K, step):
            for m in strips(M, tokens):
                width = k.stop - k.start
                total = grad_x[m, k] if sums is None else sums[: (m.stop - m.start) * width].view(-1, width)
                for i, gradient in enumerate(grad_y):
                    W = dequantise(packed[i], exponents[i], slice(0, packed[i].shape[0]), k, K, group_size, scratch)
                    multiply(gradient[m], W, total, add=i > 0)
                if sums is not None:
                    grad_x[m, k].copy_(total)
    return grad_x
