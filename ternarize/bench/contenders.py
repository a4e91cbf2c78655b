"""What `ternarize.bench.linear` lets multiply: the ternary kernels, and the dense products that they are compared with.

All work on one random layer and the same x. Baselines are what PyTorch calls for dense weights, cuBLAS on a GPU: the
dtype of x; int8, torch._int_mm, with an int32 result; and fp8 (e4m3), torch._scaled_mm with one scale a tensor and its
fast accumulation. To bring x to 8 bits, and the int32 result back to floats, is not in the time of the latter two: they
are bounds of what a whole layer takes.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ternarize import ops
from ternarize.backends.select import facts_of, verify
from ternarize.bench.timing import copies_needed
from ternarize.config import TernaryConfig
from ternarize.layer import TernaryLinear
from ternarize.packing import exp2_exact, expand_groups, groups_per_row, largest_level

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


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute y = x · Wᵀ."""

    name: str
    rate: str
    """Of the baselines, the one whose unit does the arithmetic: its highest rate bounds this contender too."""
    weight: Tensor
    """[N, K]: the result must be operand · weightᵀ, in float64."""
    copies: list[tuple[Tensor, ...]]
    """The weight as ``multiply`` takes it, several times."""
    multiply: Callable[..., Tensor]
    """What is timed: (operand, *copy) to [M, N]."""
    operand: Callable[[Tensor], Tensor]
    """x to the left operand, before the time starts."""
    refusal: Callable[[Tensor], str | None]
    """Why it cannot run for this x, or None."""
    tolerance: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy."""
        return sum(tensor.nbytes for tensor in self.copies[0])


def _copies(device: torch.device, *weight: Tensor) -> list[tuple[Tensor, ...]]:
    more = copies_needed(sum(tensor.nbytes for tensor in weight), device) - 1
    return [weight, *(tuple(tensor.clone() for tensor in weight) for _ in range(more))]


def _same(x: Tensor) -> Tensor:
    return x


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
            _copies(device, weight),
            torch.nn.functional.linear,
            _same,
            _runs_anywhere,
            DENSE_TOLERANCE,
        ),
        # Sums of int8 products are exact.
        Contender(
            "int8", "int8", int8, _copies(device, int8), multiply_int8, _to_int8, lambda x: _int8_refusal(N, x), 0.0
        ),
        Contender(
            "fp8", "fp8", fp8, _copies(device, fp8), multiply_fp8, _to_fp8, lambda x: _fp8_refusal(N, x), FP8_TOLERANCE
        ),
    ]


def _kernel(name: str, layer: TernaryLinear, weight: Tensor, copies: list[tuple[Tensor, ...]]) -> Contender:
    # The op, as a compiled graph calls it: in a CUDA graph nothing is left of its dispatch.
    op = ops.lowered("linear", name)

    def arguments(x: Tensor, T_packed: Tensor, E: Tensor) -> tuple[object, ...]:
        return (x, [T_packed], [E], [None], [None], [None], layer.group_size)

    def multiply(x: Tensor, T_packed: Tensor, E: Tensor) -> Tensor:
        outputs: list[Tensor] = op(*ops.with_status("linear", name, arguments(x, T_packed, E)))
        return outputs[0]

    def refusal(x: Tensor) -> str | None:
        ok, reason = verify(name, "linear", facts_of("linear", arguments(x, *copies[0])))
        return None if ok else reason

    return Contender(name, DENSE, weight, copies, multiply, _same, refusal, TOLERANCE[weight.dtype])


def random_contenders(
    N: int, K: int, config: TernaryConfig, dtype: torch.dtype, kernels: tuple[str, ...], device: torch.device
) -> list[Contender]:
    """The baselines and the kernels, on one random layer: uniform levels, exponents uniform over `EXPONENTS`."""
    generator = torch.Generator(device).manual_seed(0)
    top = largest_level(config.planes)
    levels = torch.randint(-top, top + 1, (N, K), dtype=torch.int8, device=device, generator=generator)
    first, last = EXPONENTS
    groups = (N, groups_per_row(K, config.group_size))
    E = torch.randint(first, last + 1, groups, dtype=torch.int8, device=device, generator=generator)
    layer = TernaryLinear.from_levels(levels, E, config=config)
    # Exact in bfloat16 and float16, so that all contenders but the 8-bit ones have the same result. Formed from the
    # levels: the packed form is what is tested.
    weight = levels.to(dtype) * expand_groups(exp2_exact(E).to(dtype), K, layer.group_size)
    copies = _copies(device, layer.T_packed.detach(), layer.E.detach())
    return [*baselines(weight), *(_kernel(name, layer, weight, copies) for name in kernels)]
