"""What `ternarize.bench.linear` lets compete in training: grad_x = grad_y · W, and the whole update of a layer.

The baselines are what dense training calls for the same gradients, cuBLAS on a GPU in the dtype of x: grad_y · W, and
grad_yᵀ · x. An update does more than that baseline, which leaves a gradient that an optimizer has yet to apply: its
integers are staged, and stepped and packed, as one step of training does (`ternarize.optim`, without micro-batches).
"""

import copy
import dataclasses
import functools

import torch
from torch import Tensor

from ternarize import ops
from ternarize.bench.contenders import (
    DENSE,
    DENSE_TOLERANCE,
    TOLERANCE,
    Contender,
    copies_of,
    random_layer,
    refusal_of,
    same,
)
from ternarize.bench.timing import Pass, copies_needed, record
from ternarize.config import TernaryConfig
from ternarize.layer import TernaryLinear
from ternarize.optim import DEFAULT_LR
from ternarize.packing import unpack

#: Of the weights, how many may get other integers than from a gradient summed in float64: where stochastic rounding
#: falls so close to an integer that the order of a float32 sum decides. About 1e-6 of them do, for normal operands.
UPDATE_TOLERANCE = 1e-4


def grad_input_contenders(
    N: int, K: int, config: TernaryConfig, dtype: torch.dtype, kernels: tuple[str, ...], device: torch.device
) -> list[Contender]:
    """grad_y · W, dense and by the kernels; each contender's weight is Wᵀ, [K, N]."""
    layer, weight, _ = random_layer(N, K, config, dtype, device)
    dense = Contender(
        DENSE, DENSE, weight.t(), copies_of(device, weight), torch.mm, same, lambda _: None, DENSE_TOLERANCE
    )
    copies = copies_of(device, layer.T_packed.detach(), layer.E.detach())
    return [dense, *(_grad_input(name, layer, weight, copies) for name in kernels)]


def _grad_input(name: str, layer: TernaryLinear, weight: Tensor, copies: list[tuple[Tensor, ...]]) -> Contender:
    def arguments(grad_y: Tensor, T_packed: Tensor, E: Tensor) -> tuple[object, ...]:
        return ([grad_y], [T_packed], [E], [None], layer.in_features, layer.group_size)

    def multiply(grad_y: Tensor, T_packed: Tensor, E: Tensor) -> Tensor:
        grad_x: Tensor = ops.lowered("grad_input", name)(*arguments(grad_y, T_packed, E))
        return grad_x

    def refusal(grad_y: Tensor) -> str | None:
        return refusal_of("grad_input", name, arguments(grad_y, *copies[0]))

    return Contender(name, DENSE, weight.t(), copies, multiply, same, refusal, TOLERANCE[weight.dtype])


@dataclasses.dataclass(frozen=True)
class Step:
    """What one update starts from, and what it should lead to."""

    grad_y: Tensor
    """[M, N]."""
    x: Tensor
    """[M, K]."""
    before: TernaryLinear
    """The layer, never changed."""
    after: TernaryLinear
    """The layer after an update by the reference, with G summed in float64."""


def random_step(N: int, K: int, M: int, config: TernaryConfig, dtype: torch.dtype, device: torch.device) -> Step:
    """Normal operands; accumulators over their whole range; statistics as of earlier steps."""
    frozen, _, _ = random_layer(N, K, config, dtype, device)
    layer = TernaryLinear(K, N, bias=False, config=config, device=device)
    layer.T_packed.copy_(frozen.T_packed)
    layer.E.copy_(frozen.E)
    generator = torch.Generator(device).manual_seed(M)
    grad_y, x = (torch.randn(M, size, dtype=dtype, device=device, generator=generator) for size in (N, K))
    layer.prepare_training()
    for plane, limit in ((layer.T_accum, 127), (layer.T_momentum, 64)):
        assert plane is not None, "the rule `factored`, int8, has both"
        plane.random_(-limit, limit + 1, generator=generator)
    for log2 in (layer.row_log2, layer.col_log2):
        assert log2 is not None
        # Sums of M products of normal numbers have the variance M.
        log2.fill_(round(256 * float(torch.log2(torch.tensor(float(M))))))
    after = copy.deepcopy(layer)
    update("torch", grad_y.double(), x.double(), after)
    return Step(grad_y, x, layer, after)


def stage_arguments(grad_y: Tensor, x: Tensor, layer: TernaryLinear) -> tuple[object, ...]:
    """Those of the op `update_stage` for one layer without exponents to train."""
    state: tuple[object, ...] = ([layer.T_packed], [layer.row_log2], [layer.col_log2], [layer.rng], [layer.stage], [])
    return ([grad_y], x, *state, [layer.stage_row], [layer.stage_col], [layer.status], layer.group_size, layer.rule)


@functools.cache
def _refuse_and_lr(device: torch.device) -> tuple[Tensor, Tensor]:
    """What an optimizer has on the device before it commits."""
    return torch.zeros(1, dtype=torch.int32, device=device), torch.full((1,), DEFAULT_LR["int8"], device=device)


def update(kernel: str, grad_y: Tensor, x: Tensor, layer: TernaryLinear) -> Tensor:
    """One step of training of a layer, by the kernels of a backend; returns its trits."""
    ops.lowered("update_stage", kernel)(*stage_arguments(grad_y, x, layer))
    # TileLang leaves the commit to Triton (`ternarize.backends.select`).
    ops.lowered("update_commit", "triton" if kernel == "tilelang" else kernel)(
        layer.T_packed,
        layer.E,
        layer.T_accum,
        layer.T_momentum,
        layer.E_accum,
        layer.row_log2,
        layer.col_log2,
        layer.rng,
        layer.stage,
        layer.stage_E,
        layer.stage_row,
        layer.stage_col,
        layer.status,
        *_refuse_and_lr(layer.T_packed.device),
        1,
        1,
        layer.group_size,
        layer.rule,
    )
    # The optimizer does it once for all layers.
    layer.status.zero_()
    return layer.T_packed


def different(layer: TernaryLinear, expected: TernaryLinear) -> float:
    """The part of the weights whose integers differ; infinite if statistics do by more than their last bit."""
    for log2, other in ((layer.row_log2, expected.row_log2), (layer.col_log2, expected.col_log2)):
        assert log2 is not None
        assert other is not None
        if (log2.int() - other.int()).abs().max() > 1:
            return float("inf")
    assert layer.T_accum is not None
    assert layer.T_momentum is not None
    assert expected.T_accum is not None
    assert expected.T_momentum is not None
    got, wanted = (unpack(each.T_packed, each.in_features, each.group_size) for each in (layer, expected))
    differ = torch.ne(layer.T_accum, expected.T_accum)
    differ |= torch.ne(layer.T_momentum, expected.T_momentum)
    differ |= torch.ne(got, wanted)
    return float(differ.float().mean())


class UpdateEntrant:
    """A contender for the update of one layer: how far it is from right, and the pass to time."""

    def __init__(self, name: str, step: Step) -> None:
        self.name, self._step = name, step

    def refusal(self) -> str | None:
        """Why it cannot run, or None."""
        step = self._step
        if self.name == DENSE:
            return None
        return refusal_of("update_stage", self.name, stage_arguments(step.grad_y, step.x, step.before))

    @property
    def tolerance(self) -> float:
        """Of `error`."""
        return DENSE_TOLERANCE if self.name == DENSE else UPDATE_TOLERANCE

    def error(self) -> float:
        """One call: the relative error of the dense gradient, or what `different` says of the integers."""
        step = self._step
        if self.name == DENSE:
            rows = slice(0, 256)
            exact = step.grad_y[:, rows].double().t() @ step.x.double()
            return float(((step.grad_y.t() @ step.x)[rows].double() - exact).norm() / exact.norm())
        layer = copy.deepcopy(step.before)
        update(self.name, step.grad_y, step.x, layer)
        return different(layer, step.after)

    @property
    def state_bytes(self) -> int:
        """Read or written: the dense gradient, or the integers of the layer."""
        step = self._step
        if self.name == DENSE:
            return step.grad_y.shape[1] * step.x.shape[1] * step.x.element_size()
        return sum(parameter.nbytes for parameter in step.before.parameters())

    def record(self) -> Pass:
        """Calls on as many copies of the state as make the cache cold."""
        step = self._step
        if self.name == DENSE:
            return record([lambda: step.grad_y.t() @ step.x], step.x.device)
        layers = [copy.deepcopy(step.before) for _ in range(copies_needed(self.state_bytes, step.x.device))]
        return record(
            [functools.partial(update, self.name, step.grad_y, step.x, layer) for layer in layers], step.x.device
        )
