"""Programmatic dependent launch of Inductor's Triton kernels, as TileLang's kernels are launched.

In a decoding step most of Inductor's kernels take a microsecond or two, and the TileLang kernel after each could fetch
weights meanwhile. Launched programmatically, a kernel starts once every block of the one before it has triggered that,
and waits for the one before to be complete (CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization"). TileLang's trigger first, and wait before any access but to weights. If all kernels do, a complete
kernel means that those before it are complete too.

Inductor's do not by themselves (``triton.enable_pdl``). They wait only for what the kernel before wrote: one that loads
nothing may not wait at all, and then the kernel after it starts before what came earlier is complete. And they trigger
after their last load, when the next kernel could have begun long before.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

#: Of Inductor's config.
PATCHES: dict[str, Any] = {"triton.enable_pdl": True}


@contextlib.contextmanager
def protocol() -> Iterator[None]:
    """While this is open, Inductor writes kernels that keep the protocol, if it makes them programmatic."""
    from torch._inductor.codegen.triton import TritonKernel

    # Called on the finished body of each kernel. Inductor's own keeps the first wait and the last trigger.
    with mock.patch.object(TritonKernel, "_filter_pdl", trigger_and_wait_first):
        yield


def trigger_and_wait_first(kernel: Any, body: Any) -> None:
    """Begin a kernel with its trigger and its wait, if it is a programmatic one, and drop all others.

    Args:
        kernel: TritonKernel.
        body: IndentedBuffer, changed in place.
    """
    if kernel._enable_pdl_codegen():
        both = [kernel.GDC_LAUNCH, kernel.GDC_WAIT]
        body._lines = both + [line for line in body._lines if not (isinstance(line, str) and line.strip() in both)]
