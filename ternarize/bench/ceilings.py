"""What a device reaches, measured: the bandwidth of its memory and the rates of its matrix units."""

import dataclasses

import torch
from torch import Tensor

from ternarize.bench.contenders import baselines
from ternarize.bench.linear import Plan, Result, measure_cell
from ternarize.bench.timing import record, time_in_turns

#: Shape of the bfloat16 or float16 matrix whose reading measures bandwidth (1 GiB, 18 times the L2 cache of an H200),
#: and side of the square product that measures a rate. What the CPU gets only keeps the columns filled.
MATRIX = {"cuda": (65536, 8192), "cpu": (512, 8192)}
SIDE = {"cuda": 8192, "cpu": 64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this device reaches, measured in the same run."""

    read_bytes_per_second: float
    """Of reading a large matrix: its sum, or its product with one token, whichever is faster."""
    copy_bytes_per_second: float
    """Of a kernel that reads one buffer and writes another, both counted."""
    flops_per_second: dict[str, float]
    """Of a large square product by each baseline that runs here."""

    @property
    def bytes_per_second(self) -> float:
        """The faster of reading and copying."""
        return max(self.read_bytes_per_second, self.copy_bytes_per_second)

    def floor(self, result: Result) -> float | None:
        """The least seconds that a result's bytes and arithmetic take, the larger of the two; None if not known."""
        rate = self.flops_per_second.get(result.rate)
        return None if rate is None else max(result.bytes / self.bytes_per_second, result.flops / rate)


def measure_ceilings(plan: Plan) -> Ceilings:
    """Measure bandwidth and the rates of the baselines; a baseline that cannot run has none."""
    device = plan.device
    read, copy = _measure_bandwidth(plan)
    side = SIDE[device.type]
    weight = torch.randn(side, side, dtype=plan.dtype, device=device)
    products = measure_cell(baselines(weight), side, plan)
    return Ceilings(
        read_bytes_per_second=read,
        copy_bytes_per_second=copy,
        flops_per_second={
            result.contender: result.flops / result.seconds for result in products if result.seconds is not None
        },
    )


def _measure_bandwidth(plan: Plan) -> tuple[float, float]:
    """Bytes a second of reading and of copying.

    All by kernels: in a CUDA graph, ``copy_`` is a node that the driver runs as it likes, on an H200 at 2.7 TB/s.
    """
    matrix = torch.randn(MATRIX[plan.device.type], dtype=plan.dtype, device=plan.device)
    # The loads of a sum are widest for 4-byte elements. Two halves of a float are a float.
    words = matrix.view(torch.float32)
    destination = torch.empty_like(words)
    token = torch.randn(1, matrix.shape[1], dtype=plan.dtype, device=plan.device)

    def product() -> Tensor:
        return torch.nn.functional.linear(token, matrix)

    def copy() -> Tensor:
        return torch.neg(words, out=destination)

    passes = [record([call], plan.device) for call in (words.sum, product, copy)]
    sum_time, product_time, copy_time = time_in_turns(passes, plan.seconds_per_cell)
    reading = min(sum_time.seconds, product_time.seconds)
    return matrix.nbytes / reading, 2 * matrix.nbytes / copy_time.seconds
