# mypy: disable-error-code="valid-type, untyped-decorator, no-untyped-def"
# TileLang is untyped, and its kernels are annotated with buffers, which are values.
"""The TileLang program of `ternarize.backends.tilelang.linear`."""

from typing import Any, Literal

import tilelang.language as T

#: What TileLang compiles for. wgmma needs the "a" of sm_90a.
TARGET = {"kind": "cuda", "arch": "sm_90a"}

#: Bits of 1.0 in float16.
HALF_ONE = 0x3C00


def _biased(exponent: Any) -> Any:
    """The exponent field of 2^exponent in float32 and in bfloat16; for integers in [-126, 127]."""
    return T.cast(exponent, T.int32) + 127


def _exp2(exponent: Any) -> Any:
    """2^exponent as float32, exact for integers in [-126, 127]."""
    return T.reinterpret(_biased(exponent) << 23, T.float32)


def scale_bits(exponent: Any) -> Any:
    """The bits of 2^exponent in bfloat16, int32, for integers in [-126, 127]."""
    return _biased(exponent) << 7


def trit_bits(packed: Any, p: Any, one: Any) -> Any:
    """The bits of trit ``p`` of a packed byte as a 16-bit float.

    Args:
        packed: uint8, four trits (`ternarize.packing`).
        p: which one, 0 to 3.
        one: int32, the bits of +1, or of +2^E.

    Returns:
        uint16: ``one`` for +1, ``one`` and the sign bit for -1, 0 for 0.
    """
    code = T.cast(packed, T.int32) >> (2 * p)
    return T.cast(((code & 2) << 14) | ((code & 1) * one), T.uint16)


def linear_program(
    N: int,
    K: int,
    g: int,
    dtype: Literal["bfloat16", "float16"],
    *,
    has_bias: bool,
    BLOCK_M: int,
    BLOCK_N: int,
    stages: int,
) -> Any:
    """The program for layers of one shape and any number of tokens.

    It computes yᵀ = W · xᵀ: the trits are decoded in registers, straight into the A operand of wgmma, so no decoded
    weight is ever written to memory. One step along K is one scale group. bfloat16 holds T · 2^E for every E in
    [-126, 127], so the operand is the weight itself; float16 does not, so there the operand is T, and 2^E multiplies
    the float32 sum of its group.

    TMA fills what lies beyond M and N with zeros and drops it on the way back. Where the rows of a tensor are no
    multiple of 16 bytes (T_packed if K is no multiple of 64, y if N is no multiple of 8), and for the 8-byte groups of
    g = 32, TileLang copies with ordinary, predicated loads and stores instead.

    Args:
        N: out_features.
        K: in_features, a multiple of g.
        g: weights a scale group, one of 32, 64, 128 and 256.
        dtype: of x and y.
        has_bias: whether the program takes bias and bias_exponent, after E.
        BLOCK_M: tokens a block computes, a multiple of 16.
        BLOCK_N: outputs a block computes: 64 for each warpgroup.
        stages: steps along K that are in flight.

    Returns:
        A TileLang prim_func of x [M, K], T_packed uint8 [N, K / 4], E int8 [N, K / g], bias int32 [N] and bias_exponent
        int8 [1] if there is a bias, and y [M, N], which it writes.
    """
    M = T.dynamic("M")
    bytes_per_group = g // 4
    folds_scale = dtype == "bfloat16"

    @T.macro
    def block(x, T_packed, E, bias, bias_exponent, y):
        with T.Kernel(T.ceildiv(N, BLOCK_N), T.ceildiv(M, BLOCK_M), threads=2 * BLOCK_N) as (block_n, block_m):
            n0, m0 = block_n * BLOCK_N, block_m * BLOCK_M
            s_x = T.alloc_shared((BLOCK_M, g), dtype)
            s_packed = T.alloc_shared((BLOCK_N, bytes_per_group), T.uint8)
            s_y = T.alloc_shared((BLOCK_M, BLOCK_N), dtype)
            weight = T.alloc_fragment((BLOCK_N, g), dtype)
            accumulator = T.alloc_fragment((BLOCK_N, BLOCK_M), T.float32)
            if not folds_scale:
                group_sum = T.alloc_fragment((BLOCK_N, BLOCK_M), T.float32)
                scale = T.alloc_fragment((BLOCK_N,), T.float32)
            if has_bias:
                b = T.alloc_fragment((BLOCK_N,), T.float32)

            T.clear(accumulator)
            for k in T.Pipelined(K // g, num_stages=stages):
                T.copy(x[m0, k * g], s_x)
                T.copy(T_packed[n0, k * bytes_per_group], s_packed)
                for n, c in T.Parallel(BLOCK_N, bytes_per_group):
                    one = scale_bits(E[n0 + n, k]) if folds_scale else HALF_ONE
                    for p in T.unroll(4):
                        bits = trit_bits(s_packed[n, c], p, one)
                        weight[n, p * bytes_per_group + c] = T.reinterpret(bits, dtype)
                if folds_scale:
                    T.gemm(weight, s_x, accumulator, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                else:
                    T.gemm(weight, s_x, group_sum, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
                    for n in T.Parallel(BLOCK_N):
                        scale[n] = _exp2(E[n0 + n, k])
                    for n, m in T.Parallel(BLOCK_N, BLOCK_M):
                        accumulator[n, m] += group_sum[n, m] * scale[n]

            if has_bias:
                for n in T.Parallel(BLOCK_N):
                    # bias_exponent reaches -128, where 2^bias_exponent is subnormal: two normal factors instead.
                    half = T.cast(bias_exponent[0], T.int32) >> 1
                    b[n] = T.cast(bias[n0 + n], T.float32) * _exp2(half) * _exp2(bias_exponent[0] - half)
                for n, m in T.Parallel(BLOCK_N, BLOCK_M):
                    accumulator[n, m] += b[n]
            for n, m in T.Parallel(BLOCK_N, BLOCK_M):
                s_y[m, n] = accumulator[n, m]
            T.copy(s_y, y[m0, n0])

    if has_bias:

        @T.prim_func
        def ternary_linear(
            x: T.Tensor((M, K), dtype),
            T_packed: T.Tensor((N, K // 4), T.uint8),
            E: T.Tensor((N, K // g), T.int8),
            bias: T.Tensor((N,), T.int32),
            bias_exponent: T.Tensor((1,), T.int8),
            y: T.Tensor((M, N), dtype),
        ):
            block(x, T_packed, E, bias, bias_exponent, y)

    else:

        @T.prim_func
        def ternary_linear(
            x: T.Tensor((M, K), dtype),
            T_packed: T.Tensor((N, K // 4), T.uint8),
            E: T.Tensor((N, K // g), T.int8),
            y: T.Tensor((M, N), dtype),
        ):
            block(x, T_packed, E, None, None, y)

    return ternary_linear
