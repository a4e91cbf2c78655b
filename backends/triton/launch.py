"""Launches of Triton kernels at a low price for the host.

``kernel[grid](...)`` binds its arguments by name, derives again what to specialise for and compares the globals that
the kernel reads: 20 us of Python a launch, of which a training step has a thousand. What such a call compiled is kept
here, and called with the arguments as they are, as Triton's own tutorial 02 (fused softmax) does it.
"""

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ternarize.backends.triton.packed import INTERPRETED

#: By kernel, device, options and `specialisation`: the compiled kernel, and its constants in their order.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up. `triton.cdiv` is a function of kernels too, and takes 7 us."""
    return -(-a // b)


def specialisation(args: Sequence[Any]) -> tuple[Any, ...]:
    """All that Triton may compile differently for: dtypes, alignment to 16, integers that are 1 or need 64 bits."""
    key: list[Any] = []
    for arg in args:
        if isinstance(arg, int):
            key.append((arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31))
        elif isinstance(arg, Tensor):
            key.append((arg.dtype, arg.data_ptr() % 16 == 0))
        elif isinstance(arg, TensorDescriptor):
            key.append((arg.base.dtype, *arg.block_shape))
        else:
            key.append(type(arg))
    return tuple(key)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run a kernel on the current stream of the current device.

    Args:
        kernel: a function decorated by triton.jit. Its constants are its last parameters.
        programs: how many, along the first axis of the grid.
        args: what is not constant: tensors, tensor descriptors, numbers and None.
        options: the constants, and options of the compiler.
    """
    if INTERPRETED:
        kernel[(programs,)](*args, **options)
        return
    device = triton.runtime.driver.active.get_current_device()
    key = (kernel.fn, device, *options.items(), *specialisation(args))
    if (found := _compiled.get(key)) is None:
        compiled = kernel.run(*args, grid=(programs,), warmup=False, **options)
        _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, constants = found
    compiled[(programs, 1, 1)](*args, *constants)
