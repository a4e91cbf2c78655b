"""Kernels of Inductor that are launched programmatically: where they trigger and wait."""

import pytest
from torch._inductor import config
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer

from ternarize.backends import programmatic_launch

TRIGGER, WAIT = TritonKernel.GDC_LAUNCH, TritonKernel.GDC_WAIT


class Kernel:
    """What is asked of a TritonKernel."""

    GDC_LAUNCH, GDC_WAIT = TRIGGER, WAIT

    def __init__(self, *, programmatic: bool) -> None:
        self._programmatic = programmatic

    def _enable_pdl_codegen(self) -> bool:
        return self._programmatic


@pytest.mark.parametrize("between", [(), (WAIT, TRIGGER, WAIT, TRIGGER)], ids=["stores-only", "loads"])
def test_a_kernel_triggers_and_waits_before_all_else(between: tuple[str, ...]) -> None:
    body = IndentedBuffer()
    body.writeline("xindex = tl.arange(0, XBLOCK)")
    with body.indent():
        body.writelines(between)
    body.writeline("tl.store(out_ptr0 + xindex, 1.0)")
    programmatic_launch.trigger_and_wait_first(Kernel(programmatic=True), body)
    assert body.getvalue().splitlines() == [
        TRIGGER,
        WAIT,
        "xindex = tl.arange(0, XBLOCK)",
        "tl.store(out_ptr0 + xindex, 1.0)",
    ]


def test_other_kernels_stay_as_they_are() -> None:
    body = IndentedBuffer()
    body.writeline("tl.store(out_ptr0, 1.0)")
    programmatic_launch.trigger_and_wait_first(Kernel(programmatic=False), body)
    assert body.getvalue() == "tl.store(out_ptr0, 1.0)\n"


def test_inductor_has_what_is_replaced() -> None:
    original = TritonKernel._filter_pdl
    with programmatic_launch.protocol():
        assert TritonKernel._filter_pdl is programmatic_launch.trigger_and_wait_first
    assert TritonKernel._filter_pdl is original
    with config.patch(programmatic_launch.PATCHES):
        assert config.triton.enable_pdl
    assert not config.triton.enable_pdl
