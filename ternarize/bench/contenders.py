"""What `ternarize.bench.linear` lets multiply: the ternary kernels, and what they are compared with.

All work on one random layer and the same x. Baselines are what PyTorch calls for dense weights, cuBLAS on a GPU: the
dtype of x; int8, torch._int_mm, with an int32 result; and fp8 (e4m3), torch._scaled_mm with one scale a tensor and its
fast accumulation. To bring x to 8 bits, and the int32 result back to floats, is not in the time of the latter two: they
are bounds of what a whole layer takes. GemLite, where it is installed, multiplies by the same weights in 2 bits each.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ternarize import ops
from ternarize.activation import dequantize_activation, quantize_activation
from ternarize.backends import programmatic_launch
from ternarize.backends.select import facts_of, verify
from ternarize.bench.timing import copies_needed
from ternarize.config import Activation, TernaryConfig
from ternarize.errors import one_line
from ternarize.layer import TernaryLinear
from ternarize.packing import ROW, exp2_exact, expand_groups, groups_per_row, largest_level

#: Relative error in the 2-norm that ternary kernels may have, by the dtype that the result is rounded to.
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 5e-4}

#: The same for dense products in the dtype of x. Wider: cuBLAS may add partial sums in that dtype.
DENSE_TOLERANCE = 1e-2

#: Of fp8 with fast accumulation, whose sums keep 14 bits on Hopper (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
FP8_TOLERANCE = 5e-2

#: Exponents of the random layer: results are near 1, far from the ends of float16.
EXPONENTS = (-9, -4)

#: The name of the baseline that times are compared with.
DENSE = "dense"


def same(x: Tensor) -> Tensor:
    """Of a contender that takes x as it is."""
    return x


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute y = x · Wᵀ."""

    name: str
    rate: str
    """Of the baselines, the one whose unit does the arithmetic: its highest rate bounds this contender too."""
    weight: Tensor
    """[N, K]: the result must be rounded operand · weightᵀ, in float64."""
    copies: list[tuple[Tensor, ...]]
    """The weight as ``multiply`` takes it, several times."""
    multiply: Callable[..., Tensor]
    """What is timed: (operand, *copy) to [M, N]."""
    operand: Callable[[Tensor], Tensor]
    """x to the left operand, before the time starts."""
    refusal: Callable[[Tensor], str | None]
    """Why it cannot run for this x, or None."""
    tolerance: float
    rounded: Callable[[Tensor], Tensor] = same
    """What it multiplies in place of the operand if it rounds it on its way, within the time."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy."""
        return sum(tensor.nbytes for tensor in self.copies[0])


def copies_of(device: torch.device, *weight: Tensor) -> list[tuple[Tensor, ...]]:
    """As many copies of a weight as make the cache cold."""
    more = copies_needed(sum(tensor.nbytes for tensor in weight), device) - 1
    return [weight, *(tuple(tensor.clone() for tensor in weight) for _ in range(more))]


def refusal_of(stem: str, kernel: str, arguments: tuple[object, ...]) -> str | None:
    """Why a backend cannot run a call of the lowered op ``stem``, or None."""
    if not hasattr(torch.ops.ternarize, f"{stem}_{kernel}"):
        return f"{kernel} has no kernel for {stem}"
    ok, reason = verify(kernel, stem, facts_of(stem, arguments))
    return None if ok else reason


def _runs_anywhere(_: Tensor) -> str | None:
    return None


def _to_int8(values: Tensor) -> Tensor:
    return (values * (127 / values.abs().max())).round().to(torch.int8)


def _to_fp8(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn)


def _int8_refusal(N: int, x: Tensor) -> str | None:
    M, K = x.shape
    if x.is_cuda and M <= 16:
        return f"torch._int_mm needs more than 16 tokens, got {M}"
    if N % 8 or K % 8:
        return f"torch._int_mm needs multiples of 8, got {N}x{K}"
    return None


def _fp8_refusal(N: int, x: Tensor) -> str | None:
    K = x.shape[-1]
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "fp8 needs compute capability 8.9"
    if N % 16 or K % 16:
        return f"torch._scaled_mm needs multiples of 16, got {N}x{K}"
    return None


def baselines(weight: Tensor) -> list[Contender]:
    """Dense products: the dtype of the weight, int8 and fp8.

    Args:
        weight: [N, K], bfloat16 or float16.
    """
    N, dtype, device = weight.shape[0], weight.dtype, weight.device
    one = torch.ones((), device=device)
    int8, fp8 = _to_int8(weight), _to_fp8(weight)

    def multiply_int8(x: Tensor, w: Tensor) -> Tensor:
        return torch._int_mm(x, w.t())

    def multiply_fp8(x: Tensor, w: Tensor) -> Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)

    return [
        Contender(
            DENSE,
            DENSE,
            weight,
            copies_of(device, weight),
            torch.nn.functional.linear,
            same,
            _runs_anywhere,
            DENSE_TOLERANCE,
        ),
        # Sums of int8 products are exact.
        Contender(
            "int8", "int8", int8, copies_of(device, int8), multiply_int8, _to_int8, lambda x: _int8_refusal(N, x), 0.0
        ),
        Contender(
            "fp8",
            "fp8",
            fp8,
            copies_of(device, fp8),
            multiply_fp8,
            _to_fp8,
            lambda x: _fp8_refusal(N, x),
            FP8_TOLERANCE,
        ),
    ]


def _kernel(
    name: str, activation: Activation, layer: TernaryLinear, weight: Tensor, copies: list[tuple[Tensor, ...]]
) -> Contender:
    # The ops, as a compiled graph calls them: in a CUDA graph nothing is left of their dispatch.
    stem = ops.LINEAR_STEM[activation]

    def arguments(x: Tensor, T_packed: Tensor, E: Tensor) -> tuple[object, ...]:
        return (x, [T_packed], [E], [None], [None], [None], layer.group_size)

    def multiply(x: Tensor, T_packed: Tensor, E: Tensor, **besides: bool) -> Tensor:
        op = ops.lowered("linear", name)
        outputs: list[Tensor] = op(*ops.with_status("linear", name, arguments(x, T_packed, E)), **besides)
        return outputs[0]

    def round_and_multiply(x: Tensor, T_packed: Tensor, E: Tensor) -> Tensor:
        if name == "tilelang" and _rounds(x, T_packed, layer.group_size):
            return multiply(x, T_packed, E, rounds=True)
        q, scale = _quantize(x)
        given = (q, scale, *arguments(x, T_packed, E)[1:], x.dtype)
        outputs: list[Tensor] = ops.lowered("linear_int8", name)(*ops.with_status("linear_int8", name, given))
        return outputs[0]

    def refusal(x: Tensor) -> str | None:
        return refusal_of(stem, name, arguments(x, *copies[0]))

    plain = Contender(name, DENSE, weight, copies, multiply, same, refusal, TOLERANCE[weight.dtype])
    if activation == "float":
        return plain
    return dataclasses.replace(
        plain, name=f"{name} int8", rate="int8", multiply=round_and_multiply, rounded=_rounded_to_int8
    )


def _rounds(x: Tensor, T_packed: Tensor, group_size: int) -> bool:
    """Whether TileLang rounds x in its kernel."""
    # TileLang takes a second to import, and is for Linux.
    from ternarize.backends.tilelang.linear import rounds

    return rounds(x, [T_packed], [None], group_size)


def _compile_quantize(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """Compile a graph as the part of one that `ternarize.backends.compiler` lowers for int8 activations."""
    # Inductor takes seconds to import.
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.virtualized import V

    from ternarize.backends.row_reductions import RowReductions

    with programmatic_launch.protocol(), V.set_choices_handler(RowReductions()):
        return compile_fx(graph_module, list(example_inputs), config_patches=programmatic_launch.PATCHES)


_compiled_quantize = torch.compile(quantize_activation, dynamic=False, backend=_compile_quantize)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """As in a compiled graph, but for what comes before x there: one kernel instead of none.

    Compiled for every shape: a bench has more of them than Dynamo would allow.
    """
    with torch._dynamo.config.patch(recompile_limit=1024):
        q, scale = _compiled_quantize(x)
    return q, scale


def _rounded_to_int8(x: Tensor) -> Tensor:
    return dequantize_activation(*quantize_activation(x), torch.float64)


def _gemlite(layer: TernaryLinear, weight: Tensor, levels: Tensor) -> Contender:
    """GemLite's Triton kernels for 2-bit weights with a scale and a zero a group (github.com/dropbox/gemlite, 0.6).

    Its weight is (code - 1) · 2^E, the same numbers. Which of its kernels runs is its own choice.
    """
    N, K = weight.shape
    group_size = layer.group_size
    # Its kernels that split K add partial sums in the dtype of x, as cuBLAS may.
    contender = Contender(
        "gemlite",
        DENSE,
        weight,
        [],
        _no_product,
        same,
        lambda _: "not installed: pip install gemlite",
        DENSE_TOLERANCE,
    )
    if importlib.util.find_spec("gemlite") is None:
        return contender
    if layer.planes != 1 or group_size == ROW or K % group_size:
        reason = "compared are 2-bit weights: one plane, in groups that divide K"
        return dataclasses.replace(contender, refusal=lambda _: reason)

    scales = exp2_exact(layer.E.detach()).to(weight.dtype).reshape(-1, 1)
    try:
        from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton, forward_functional

        dtype = TORCH_TO_DTYPE[weight.dtype]
        theirs = GemLiteLinearTriton(2, group_size, K, N, input_dtype=dtype, output_dtype=dtype)
        theirs.pack((levels + 1).to(torch.uint8), scales, torch.ones_like(scales))
    except Exception as error:  # a package of others must not end the run of everything else
        reason = f"GemLite did not take the layer: {one_line(error)}"
        return dataclasses.replace(contender, refusal=lambda _: reason)
    facts: list[int] = theirs.get_meta_args()

    def multiply(x: Tensor, *tensors: Tensor) -> Tensor:
        y: Tensor = forward_functional(x, None, list(tensors), facts)
        return y

    copies = copies_of(weight.device, *(tensor.detach() for tensor in theirs.get_tensor_args()))
    return dataclasses.replace(contender, copies=copies, multiply=multiply, refusal=_gemlite_refusal)


def _gemlite_refusal(x: Tensor) -> str | None:
    return None if x.is_cuda else f"GemLite's kernels need cuda, the tensors are on {x.device.type}"


def _no_product(*_: Tensor) -> Tensor:
    raise AssertionError("a contender that is refused is not called")


def random_layer(
    N: int, K: int, config: TernaryConfig, dtype: torch.dtype, device: torch.device
) -> tuple[TernaryLinear, Tensor, Tensor]:
    """A layer of uniform levels, exponents uniform over `EXPONENTS`; its weight in ``dtype``; its levels, int8."""
    generator = torch.Generator(device).manual_seed(0)
    top = largest_level(config.planes)
    levels = torch.randint(-top, top + 1, (N, K), dtype=torch.int8, device=device, generator=generator)
    first, last = EXPONENTS
    groups = (N, groups_per_row(K, config.group_size))
    E = torch.randint(first, last + 1, groups, dtype=torch.int8, device=device, generator=generator)
    layer = TernaryLinear.from_levels(levels, E, config=config)
    # Exact in bfloat16 and float16, so that all contenders but the 8-bit ones have the same result. Formed from the
    # levels: the packed form is what is tested.
    return layer, levels.to(dtype) * expand_groups(exp2_exact(E).to(dtype), K, layer.group_size), levels


def random_contenders(
    N: int,
    K: int,
    config: TernaryConfig,
    dtype: torch.dtype,
    kernels: tuple[str, ...],
    device: torch.device,
    activations: tuple[Activation, ...] = ("float",),
) -> list[Contender]:
    """Baselines, GemLite and the kernels, on the layer of `random_layer`."""
    layer, weight, levels = random_layer(N, K, config, dtype, device)
    copies = copies_of(device, layer.T_packed.detach(), layer.E.detach())
    ours = [_kernel(name, activation, layer, weight, copies) for activation in activations for name in kernels]
    return [*baselines(weight), _gemlite(layer, weight, levels), *ours]
