"""One linear layer of many shapes: every kernel and baseline, checked against float64, then timed.

Also what training does with a layer: the gradient of its input, and the update of its integers.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ternarize.bench.contenders import DENSE, Contender, random_contenders
from ternarize.bench.timing import Pass, record, time_in_turns
from ternarize.bench.training import UpdateEntrant, grad_input_contenders, random_step
from ternarize.checkpoint.format import PackedLayer
from ternarize.config import Activation, TernaryConfig
from ternarize.errors import one_line
from ternarize.prewarm import plan_call

Op = Literal["linear", "grad-input", "update"]
Status = Literal["ok", "wrong", "failed", "not run"]

#: Tokens of a result that are compared with float64, at most.
CHECKED_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure of a layer, and how."""

    tokens: tuple[int, ...]
    config: TernaryConfig
    """Of the layer: group size and planes."""
    dtype: torch.dtype
    """Of x, bfloat16 or float16."""
    kernels: tuple[str, ...]
    """Backends of the op, for `linear` also of `linear_int8`."""
    op: Op = "linear"
    activations: tuple[Activation, ...] = ("float",)
    """Which of the two."""
    device: torch.device
    seconds_per_cell: float
    """Of timed rounds, for one shape and number of tokens, all contenders together."""


@dataclasses.dataclass(kw_only=True)
class Result:
    """One contender at one shape and number of tokens. Times and errors are None where there are none."""

    out_features: int
    in_features: int
    tokens: int
    contender: str
    status: Status = "ok"
    reason: str = ""
    """Why it is not ok."""
    error: float | None = None
    """Relative, in the 2-norm, against float64; of integers, the part that differs."""
    seconds: float | None = None
    spread: float | None = None
    """Of the samples, see `ternarize.bench.timing.Timing`."""
    rate: str = ""
    """Of `ternarize.bench.ceilings.Ceilings.flops_per_second`, the one that bounds it."""
    bytes: int = 0
    """Weight, x and y, each once."""

    @property
    def flops(self) -> int:
        """Two for each weight and token, also where some of the weights are zero."""
        return 2 * self.tokens * self.out_features * self.in_features


def begin_kernels(shapes: Sequence[tuple[int, int]], plan: Plan) -> None:
    """Begin to compile the TileLang kernels of all layers N x K side by side, where they will run.

    `measure_shape` waits for each when it needs it.
    """
    if plan.op != "linear" or "tilelang" not in plan.kernels or plan.device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(plan.device)
    for (N, K), activation in itertools.product(shapes, plan.activations):
        config = dataclasses.replace(plan.config, activation=activation)
        call = (PackedLayer(config, in_features=K, out_features=N),)
        for program in plan_call(call, plan.tokens, plan.dtype, "auto", capability).programs:
            # TileLang takes a second to import, and is for Linux.
            from ternarize.backends.tilelang import build

            # There is no graph whose flags a guard could raise.
            build.start(dataclasses.replace(program, guarded=False))


def measure_shape(N: int, K: int, plan: Plan) -> Iterator[list[Result]]:
    """Measure one layer; yields the results of one number of tokens at a time.

    Whatever a contender raises becomes a result with the status "failed". If not even the operands can be made, there
    is one such result, of the contender "all", for the whole cell.
    """
    try:
        measure = _measure(N, K, plan)
    except Exception as error:  # out of memory, or a GPU that an earlier kernel has broken
        for M in plan.tokens:
            yield [_failed(N, K, M, error)]
        return
    for M in plan.tokens:
        try:
            yield measure(M)
        except Exception as error:  # as above
            yield [_failed(N, K, M, error)]


def _measure(N: int, K: int, plan: Plan) -> Callable[[int], list[Result]]:
    """Of the operation of the plan: tokens to results."""
    if plan.op == "update":
        return lambda M: measure_update(N, K, M, plan)
    if plan.op == "linear":
        forward = random_contenders(N, K, plan.config, plan.dtype, plan.kernels, plan.device, plan.activations)
        return lambda M: measure_cell(forward, M, plan)
    backward = grad_input_contenders(N, K, plan.config, plan.dtype, plan.kernels, plan.device)

    def measure(M: int) -> list[Result]:
        # Named after the layer, not after the product, whose weight is Wᵀ.
        cell = measure_cell(backward, M, plan)
        return [dataclasses.replace(result, out_features=N, in_features=K) for result in cell]

    return measure


def _failed(N: int, K: int, M: int, error: Exception) -> Result:
    return Result(out_features=N, in_features=K, tokens=M, contender="all", status="failed", reason=one_line(error))


def measure_cell(contenders: list[Contender], M: int, plan: Plan) -> list[Result]:
    """Check every contender, then time those that are right in turns, then check what the timed calls left behind."""
    generator = torch.Generator(plan.device).manual_seed(M)
    K = contenders[0].weight.shape[1]
    x = torch.randn(M, K, dtype=plan.dtype, device=plan.device, generator=generator)
    rows = sample_rows(M, plan.device)
    entrants = [_Entrant(contender, x, rows) for contender in contenders]
    running = [(entrant, entrant.timed) for entrant in entrants if entrant.timed is not None]
    timings = time_in_turns([timed for _, timed in running], plan.seconds_per_cell)
    for (entrant, timed), timing in zip(running, timings, strict=True):
        # One call running into the next is an error that shows only here.
        if entrant.check(timed.output, "in the timed calls"):
            entrant.result.seconds, entrant.result.spread = timing.seconds, timing.spread
    return [entrant.result for entrant in entrants]


def measure_update(N: int, K: int, M: int, plan: Plan) -> list[Result]:
    """The same for updates, whose results are integers: each is checked by a call of its own, before and after."""
    step = random_step(N, K, M, plan.config, plan.dtype, plan.device)
    results, running = [], []
    for name in (DENSE, *plan.kernels):
        result = Result(out_features=N, in_features=K, tokens=M, contender=name, rate=DENSE)
        results.append(result)
        entrant = UpdateEntrant(name, step)
        try:
            refusal = entrant.refusal()
            if refusal is not None:
                result.status, result.reason = "not run", refusal
            elif _right(result, entrant.error(), entrant.tolerance, "in the first call"):
                result.bytes = entrant.state_bytes + step.grad_y.nbytes + step.x.nbytes
                running.append((entrant, result, entrant.record()))
        except Exception as error:  # whatever a kernel or its compiler raises is the finding
            result.status, result.reason = "failed", one_line(error)
    timings = time_in_turns([timed for _, _, timed in running], plan.seconds_per_cell)
    for (entrant, result, _), timing in zip(running, timings, strict=True):
        if _right(result, entrant.error(), entrant.tolerance, "after the timed calls"):
            result.seconds, result.spread = timing.seconds, timing.spread
    return results


def _right(result: Result, error: float, tolerance: float, when: str) -> bool:
    """Note the error, and whether it is within what is allowed."""
    result.error = error
    # Written so that NaN fails.
    right = error <= tolerance
    if not right:
        result.status = "wrong"
        result.reason = f"relative error {error:.1e} {when}, allowed is {tolerance:.1e}"
    return right


class _Entrant:
    """A contender in one cell: its result so far, and the pass to time unless it cannot run or is wrong."""

    def __init__(self, contender: Contender, x: Tensor, rows: Tensor) -> None:
        (M, K), N = x.shape, contender.weight.shape[0]
        self.result = Result(out_features=N, in_features=K, tokens=M, contender=contender.name, rate=contender.rate)
        self.timed: Pass | None = None
        self._tolerance, self._rows = contender.tolerance, rows
        try:
            refusal = contender.refusal(x)
            if refusal is None:
                self.timed = self._prepare(contender, x)
            else:
                self.result.status, self.result.reason = "not run", refusal
        except Exception as error:  # whatever a kernel or its compiler raises is the finding
            self.result.status, self.result.reason = "failed", one_line(error)

    def _prepare(self, contender: Contender, x: Tensor) -> Pass | None:
        operand = contender.operand(x)
        self._exact = _float64(contender.rounded(operand))[self._rows] @ _float64(contender.weight).t()
        # Where the result will probably lie: what an earlier call left there would hide what is not written.
        x.new_full((x.shape[0], contender.weight.shape[0]), torch.nan)
        y = contender.multiply(operand, *contender.copies[0])
        self.result.bytes = contender.weight_bytes + operand.nbytes + y.nbytes
        if not self.check(y, "in the first call"):
            return None
        return record([functools.partial(contender.multiply, operand, *copy) for copy in contender.copies], x.device)

    def check(self, y: Tensor, when: str) -> bool:
        """Compare the sampled rows of a result with float64."""
        error = float((y[self._rows].double() - self._exact).norm() / self._exact.norm())
        return _right(self.result, error, self._tolerance, when)


def _float64(values: Tensor) -> Tensor:
    # Float8 surely converts to float32 only.
    return values.double() if values.dtype == torch.float64 else values.to(torch.float32).double()


def sample_rows(M: int, device: torch.device) -> Tensor:
    """Up to `CHECKED_TOKENS` rows, one at random from each equal part, so that no tile of as many rows is missed."""
    parts = min(M, CHECKED_TOKENS)
    starts = torch.arange(parts + 1, device=device) * M // parts
    lengths = starts.diff()
    return starts[:-1] + (torch.rand(parts, device=device) * lengths).long().minimum(lengths - 1)


def dense_seconds(cell: list[Result]) -> float | None:
    """The time of the baseline in the dtype of x."""
    return next((result.seconds for result in cell if result.contender == DENSE), None)
