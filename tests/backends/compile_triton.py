"""Compiles the Triton kernels for sm_90, which needs no GPU; run by test_compile.py, without the interpreter."""

import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ternarize.backends.triton import dense, grad_input, linear, update, update_plain, update_tma, update_vectors

_SIZES = ("M", "N", "K", "group_size", "groups", "chunks", "tiles", "bar", "theta", "unit", "limit")
_RANGES = ("n_start", "n_stop", "k_start", "k_stop", "blocks_k", "row_tiles", "col_tiles", "exponents")
_STRIDES = ("stride_xm", "stride_xk", "stride_gm", "stride_gn", "stride_mantissa_n", "stride_mantissa_g")
_INTEGERS = dict.fromkeys((*_SIZES, *_RANGES, *_STRIDES, "exponent_threshold", "vectors"), "i32")
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
    "row_parts": "*fp32",
    "col_parts": "*fp32",
    "row_log2": "*i16",
    "col_log2": "*i16",
    "E_accum": "*i8",
    "W": "*bf16",
    "status": "*i32",
    "refuse": "*i32",
    "lr": "*fp32",
    "rate": "fp32",
    "T_accum": "*i8",
    "T_momentum": "*i8",
}


def activations(dtype: str) -> dict[str, Any]:
    return dict.fromkeys(("x", "y", "grad_y", "grad_x"), dtype)


def build(kernel: Any, options: dict[str, Any] | None = None, aligned: tuple[str, ...] = (), **given: Any) -> str:
    """Compile a kernel and disassemble it.

    Args:
        kernel: a function decorated by triton.jit.
        options: of the compiler.
        aligned: arguments that are multiples of 16; so are all pointers then, as those of torch are.
        given: its constants, None for a tensor that is absent, and types that differ.

    Returns:
        The resources and the machine code, as cuobjdump prints them.
    """
    types = {**_INTEGERS, **_STATE, **activations("*bf16"), "mantissa": "*i16", "previous": "*fp32"}
    types |= {name: value for name, value in given.items() if isinstance(value, str)}
    constants = {name: value for name, value in given.items() if not isinstance(value, str)}
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    multiples = [n for n in names if n in aligned or (aligned and signature[n].startswith("*"))]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): c for n, c in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in multiples},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **(options or {})})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spilled_bytes(code: str) -> int:
    """Local memory of a thread: what did not fit its registers."""
    (stack,) = re.findall(r"STACK:(\d+)", code)
    return int(stack)


large: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_C": 32, "UPCAST": False, "options": {"num_warps": 8}}
small: dict[str, Any] = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_C": 8, "UPCAST": False}
build(linear.linear_kernel, PLANES=1, mantissa=None, **large)
build(linear.linear_kernel, PLANES=3, bias=None, bias_exponent=None, **small, **activations("*fp16"))
build(grad_input.grad_input_kernel, PLANES=1, mantissa=None, **large)
build(grad_input.grad_input_kernel, PLANES=1, mantissa=None, previous=None, **small, **activations("*fp16"))
build(grad_input.grad_input_kernel, PLANES=2, **small, **activations("*fp32"))

exact = {"enable_fp_fusion": False}
stage: dict[str, Any] = {**large, "BLOCK_M": 64, "options": {"num_warps": 8, **exact}}
build(update_plain.stage_kernel, RUNS_OF_32=True, stage_E=None, slope=None, **stage)
without: dict[str, Any] = dict.fromkeys(("row_factor", "col_factor", "row_parts", "col_parts"))
build(update_plain.stage_kernel, RUNS_OF_32=False, slope=None, **without, **stage)

commit: dict[str, Any] = {
    "RUNS": update.COMMIT_RUNS,
    "BLOCK": update_vectors.BLOCK,
    "options": {"num_warps": update.COMMIT_WARPS, **exact},
}
whole: dict[str, Any] = {"QUARTER": 32, "aligned": ("K", "group_size")}
fixed: dict[str, Any] = dict.fromkeys(("E_accum", "stage_E"))
no_statistics: dict[str, Any] = dict.fromkeys(("row_log2", "col_log2", "stage_row", "stage_col"))
for LANES in (False, True):
    assert spilled_bytes(build(update.commit_kernel, FACTORED=True, LANES=LANES, **fixed, **whole, **commit)) == 0
    code = build(update.commit_kernel, FACTORED=True, LANES=LANES, **fixed, **no_statistics, **whole, **commit)
    # Nothing is loaded or stored by single bytes.
    assert ".U8" not in "".join(line for line in code.splitlines() if "LDG" in line or "STG" in line)
    # All is loaded before the first of it is waited for, and no thread hands anything to another.
    before, after = code.split("BAR.SYNC")
    assert before.count("LDG") > 12
    assert "LDG" not in after
# Both weights of a word are clamped at once.
assert "VIADDMNMX.S16x2.RELU" in code
build(update.commit_kernel, FACTORED=True, LANES=True, **fixed, **commit, QUARTER=4, aligned=("K",))
commit["LANES"] = False
build(update.commit_kernel, FACTORED=True, T_momentum=None, **whole, **commit)
build(update.commit_kernel, FACTORED=True, QUARTER=0, T_momentum=None, **commit)
build(update.commit_kernel, FACTORED=False, T_momentum=None, **no_statistics, **whole, **commit)

for tile in update_tma.TILES:
    code = build(
        update_tma.stage_tma_kernel,
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages, **exact},
        aligned=("N", "K"),
        grad_y=f"tensordesc<bf16[{tile.BLOCK_M}, {tile.BLOCK_N}]>",
        x=f"tensordesc<bf16[{tile.BLOCK_M}, {tile.BLOCK_K}]>",
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        SLICES=tile.SLICES,
        PANEL=tile.PANEL,
        WARPS=tile.num_warps,
    )
    # Loads by the tensor memory accelerator, warp-group products of operands in shared memory.
    assert "UTMALDG.2D" in code
    assert "HGMMA" in code
    # A few words where the columns are cut. Whole tiles would spill several hundred bytes.
    assert spilled_bytes(code) <= 128, spilled_bytes(code)

sums: dict[str, Any] = {"BLOCK": 64}
build(update_vectors.normalisers_kernel, BLOCK=512, ADDED=16384, options={"num_warps": 16})
build(update_vectors.finish_stage_kernel, **sums)
build(
    update_vectors.finish_stage_kernel,
    **sums,
    **dict[str, Any](dict.fromkeys(("stage_row", "stage_col", "row_parts", "col_parts"))),
)

decoded: dict[str, Any] = {"BLOCK_N": 32, "BLOCK_K": 128}
code = build(dense.dequantise_kernel, ALIGNED=16, aligned=("K", "group_size", "k_start", "k_stop"), **decoded)
assert "STG.E.128" in code
build(dense.dequantise_kernel, ALIGNED=1, **decoded)


def build_ones(kernel: Any, **given: Any) -> None:
    """Triton turns an integer argument that is 1 into a constant: another program, with other types."""
    names = set(inspect.signature(kernel.fn).parameters) & {*_SIZES, *_STRIDES}
    build(kernel, **given, **dict[str, Any](dict.fromkeys(names, 1)))


tiny = small | {"BLOCK_C": 4}
build_ones(linear.linear_kernel, PLANES=2, **tiny)
build_ones(grad_input.grad_input_kernel, PLANES=2, previous=None, **tiny)
build_ones(update_plain.stage_kernel, RUNS_OF_32=False, slope=None, **tiny)
build_ones(update.commit_kernel, FACTORED=True, QUARTER=0, **commit)
print("compiled")
