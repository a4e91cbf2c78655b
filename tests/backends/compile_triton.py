"""Compiles the Triton kernels for sm_90, which needs no GPU; run by test_compile.py, without the interpreter."""

import inspect
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ternarize.backends.triton import grad_input, linear, update

_SIZES = ("M", "N", "K", "group_size", "groups", "chunks", "tiles", "bar", "theta", "unit")
_STRIDES = ("stride_xm", "stride_xk", "stride_gm", "stride_gn", "stride_mantissa_n", "stride_mantissa_g")
_INTEGERS = dict.fromkeys((*_SIZES, *_STRIDES), "i32")
_FLOATS = dict.fromkeys(("step", "limit", "gain"), "fp32")
_STATE = {
    "T_packed": "*u8",
    "E": "*i8",
    "bias": "*i32",
    "bias_exponent": "*i8",
    "row_factor": "*fp32",
    "col_factor": "*fp32",
    "rng": "*i64",
    "stage": "*i8",
    "stage_E": "*i8",
    "slope": "*fp32",
    "stage_row": "*fp32",
    "stage_col": "*fp32",
    "status": "*i32",
    "refuse": "*i32",
    "lr": "*fp32",
    "T_accum": "*i8",
    "T_momentum": "*i8",
}


def activations(dtype: str) -> dict[str, Any]:
    return dict.fromkeys(("x", "y", "grad_y", "grad_x"), dtype)


def build(kernel: Any, num_warps: int = 4, enable_fp_fusion: bool = True, **given: Any) -> None:
    """Compile a kernel; ``given`` holds its constants, None for a tensor that is absent, and types that differ."""
    types = {**_INTEGERS, **_FLOATS, **_STATE, **activations("*bf16"), "mantissa": "*i16", "previous": "*fp32"}
    types |= {name: value for name, value in given.items() if isinstance(value, str)}
    constants = {name: value for name, value in given.items() if not isinstance(value, str)}
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): c for n, c in constants.items()})
    options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


large: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_C": 32, "UPCAST": False, "num_warps": 8}
small: dict[str, Any] = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_C": 8, "UPCAST": False}
build(linear.linear_kernel, PLANES=1, mantissa=None, **large)
build(linear.linear_kernel, PLANES=3, bias=None, bias_exponent=None, **small, **activations("*fp16"))
build(grad_input.grad_input_kernel, PLANES=1, mantissa=None, **large)
build(grad_input.grad_input_kernel, PLANES=1, mantissa=None, previous=None, **small, **activations("*fp16"))
build(grad_input.grad_input_kernel, PLANES=2, **small, **activations("*fp32"))

stage: dict[str, Any] = {**large, "BLOCK_M": 64, "enable_fp_fusion": False}
build(update.stage_kernel, WORDS_TOGETHER=True, stage_E=None, slope=None, **stage)
without: dict[str, Any] = dict.fromkeys(("row_factor", "col_factor", "stage_row", "stage_col"))
build(update.stage_kernel, WORDS_TOGETHER=False, slope=None, **without, **stage)

commit: dict[str, Any] = {"BLOCK_N": 8, "BLOCK_C": 32, "enable_fp_fusion": False}
build(update.commit_kernel, FACTORED=True, WORDS_TOGETHER=True, **commit)
build(update.commit_kernel, FACTORED=True, WORDS_TOGETHER=False, T_momentum=None, **commit)
build(update.commit_kernel, FACTORED=False, WORDS_TOGETHER=True, T_momentum=None, **commit)


def build_ones(kernel: Any, **given: Any) -> None:
    """Triton turns an integer argument that is 1 into a constant: another program, with other types."""
    names = set(inspect.signature(kernel.fn).parameters) & {*_SIZES, *_STRIDES}
    build(kernel, **given, **dict[str, Any](dict.fromkeys(names, 1)))


tiny = small | {"BLOCK_C": 4}
build_ones(linear.linear_kernel, PLANES=2, **tiny)
build_ones(grad_input.grad_input_kernel, PLANES=2, previous=None, **tiny)
build_ones(update.stage_kernel, WORDS_TOGETHER=False, slope=None, **tiny)
build_ones(update.commit_kernel, FACTORED=True, WORDS_TOGETHER=False, BLOCK_N=64, BLOCK_C=4)
print("compiled")
