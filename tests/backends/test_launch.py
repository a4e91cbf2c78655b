"""How Triton kernels are launched: what was compiled once is called again, unless Triton would compile another."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from ternarize.backends.triton import launch as module
from ternarize.backends.triton.launch import ceil_div, launch, specialisation


class Kernel:
    """Counts what is compiled, and keeps what is launched."""

    arg_names = ("x", "size", "BLOCK", "ALIGNED")

    def __init__(self) -> None:
        self.fn = object()
        self.compiled = 0
        self.launches: list[tuple[Any, ...]] = []

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> "Kernel":
        assert not warmup
        self.compiled += 1
        self.launches.append((grid[0], *args, options["BLOCK"], options["ALIGNED"]))
        return self

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.launches.append((grid[0], *args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_compiled", {})
    device = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr("triton.runtime.driver", device)
    return Kernel()


def test_a_second_launch_calls_what_the_first_compiled(kernel: Kernel) -> None:
    x, y = torch.zeros(4), torch.ones(4)
    # Constants in another order than the kernel has them.
    launch(kernel, 3, x, 32, ALIGNED=16, BLOCK=8, num_warps=4)
    launch(kernel, 5, y, 48, ALIGNED=16, BLOCK=8, num_warps=4)
    assert kernel.compiled == 1
    assert [(programs, *rest) for programs, _, *rest in kernel.launches] == [(3, 32, 8, 16), (5, 48, 8, 16)]
    assert kernel.launches[1][1] is y


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((torch.zeros(4, dtype=torch.bfloat16), 32), {}),
        ((torch.zeros(5)[1:], 32), {}),
        ((None, 32), {}),
        ((torch.zeros(4), 1), {}),
        ((torch.zeros(4), 33), {}),
        ((torch.zeros(4), 2**31), {}),
        ((torch.zeros(4), 32), {"BLOCK": 16}),
        ((torch.zeros(4), 32), {"num_warps": 8}),
    ],
    ids=["dtype", "alignment", "absent", "one", "odd", "64 bits", "constant", "warps"],
)
def test_what_triton_compiles_for_is_compiled_again(kernel: Kernel, args: Any, options: dict[str, int]) -> None:
    usual = {"BLOCK": 8, "ALIGNED": 16, "num_warps": 4}
    launch(kernel, 1, torch.zeros(4), 32, **usual)
    launch(kernel, 1, *args, **usual | options)
    assert kernel.compiled == 2


def test_each_device_has_its_own(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (0, 1, 0):
        active = SimpleNamespace(get_current_device=lambda device=device: device)
        monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=active))
        launch(kernel, 1, torch.zeros(4), 32, BLOCK=8, ALIGNED=16)
    assert kernel.compiled == 2


def test_descriptors_of_other_blocks_are_told_apart() -> None:
    x = torch.zeros(64, 64)
    small, large = (TensorDescriptor.from_tensor(x, [16, block]) for block in (16, 32))
    assert specialisation([small]) != specialisation([large])
    assert specialisation([small]) == specialisation([TensorDescriptor.from_tensor(x.clone(), [16, 16])])


def test_numbers_that_are_not_integers_are_told_by_their_type() -> None:
    assert specialisation([1.0]) == specialisation([2.5])
    assert specialisation([1.0]) != specialisation([1])


@pytest.mark.parametrize(("a", "b", "quotient"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_ceil_div(a: int, b: int, quotient: int) -> None:
    assert ceil_div(a, b) == quotient
