"""A compiled inference graph whose TileLang kernels report what is not finite, and what is done about it.

Kernels raise a flag of their layer when they write NaN or Inf; `ternarize.passes.insert_finite_guard` says where. That
alone proves nothing: x may have held it, or y may be too large for its dtype. So the flags are where a look begins:

- A graph that writes to none of its inputs is looked at before its call returns, and run again if a flag is up, without
  TileLang. That is the result. On the way each layer with a flag is tried in TileLang on the same x: where x and the
  other kernel's y are finite and TileLang's y is not, the kernel is at fault.
- A graph that writes to its inputs, as a step of decoding does to its KV cache, cannot be run again, and its result
  stands. So nothing waits for it: its flags are copied behind it, and read at the start of a later call. NaN spreads,
  so of the layers with a flag the first is at fault. What the graph writes to keeps the NaN, which raises flags again:
  as long as that is so, no other layer is blamed.

A graph that the caller records in a CUDA graph of their own is looked at in the next call that is none.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ternarize import guard, ops
from ternarize.backends.torch.update import NONFINITE_OUTPUT
from ternarize.config import Kernels
from ternarize.layer import TernaryLinear
from ternarize.passes.base import mutates
from ternarize.passes.insert_finite_guard import STATUS

Compiled = Callable[..., Any]


#: Tensors that were not finite after a layer had been blamed for it: the inputs of graphs that write to them.
_tainted: Any = WeakTensorKeyDictionary()


class GuardedGraph:
    """Calls a compiled graph and looks at its flags.

    Args:
        compiled: the graph, whose kernels write to ``flags``.
        original: the same before its compilation.
        flags: int32 [layers, 2], one for each device.
        layers: those that the rows of ``flags`` stand for, in the order of the graph.
        policy: which kernels were asked for.
    """

    def __init__(
        self,
        compiled: Compiled,
        original: fx.GraphModule,
        flags: Sequence[Tensor],
        layers: Iterable[TernaryLinear],
        policy: Kernels,
    ) -> None:
        self._compiled = compiled
        self._original = original
        self._flags = [_Flags(tensor) for tensor in flags]
        # A layer may be dropped while Dynamo still holds its graphs.
        self._layers = [weakref.ref(layer) for layer in layers]
        self._forced = policy == "tilelang"
        #: Whether copies of the flags are under way, or there and not read yet.
        self._copying = False
        self._repeatable = not any(mutates(node) for node in original.graph.nodes)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        if not self._repeatable:
            self._look_back(args)
        outputs = self._compiled(*args)
        if any(flags.being_recorded() for flags in self._flags):
            return outputs
        if not self._repeatable:
            if not self._copying:
                for flags in self._flags:
                    flags.copy()
                self._copying = True
            return outputs
        flagged = self._flagged([flags.tensor.tolist() for flags in self._flags])
        return self._repeat(flagged, args) if flagged else outputs

    def _flagged(self, rows: list[list[list[int]]]) -> list[TernaryLinear]:
        """Layers whose output bit is set in what was read of each device's flags; the flags are cleared if any is."""
        raised = [bool(row[0] & NONFINITE_OUTPUT) for of_device in rows for row in of_device]
        if not any(raised):
            return []
        for flags in self._flags:
            flags.tensor.zero_()
        layers = [layer() for layer, up in zip(self._layers, raised, strict=True) if up]
        return [layer for layer in layers if layer is not None]

    def _repeat(self, flagged: list[TernaryLinear], args: Sequence[Any]) -> Any:
        rows = [row for flags in self._flags for row in flags.tensor]
        layers = {row.data_ptr(): layer() for row, layer in zip(rows, self._layers, strict=True)}
        with _Trial({address: layer for address, layer in layers.items() if layer in flagged}) as trial:
            outputs = fx.Interpreter(self._original).run(*args)
        if trial.guilty:
            guard.take_off_tilelang(trial.guilty, forced=self._forced, shape=trial.shape)
        return outputs

    def _look_back(self, args: Sequence[Any]) -> None:
        """Act on the flags of an earlier call, once their copies are there."""
        if not self._copying or not all(flags.arrived() for flags in self._flags):
            return
        self._copying = False
        flagged = self._flagged([flags.host.tolist() for flags in self._flags])
        if not flagged and not _tainted:
            return
        carried = [arg for arg in args if _is_activation(arg)]
        if not flagged:
            for tensor in carried:
                _tainted.pop(tensor, None)
        elif not any(tensor in _tainted for tensor in carried):
            _tainted.update({tensor: None for tensor in carried if not tensor.isfinite().all()})
            guard.take_off_tilelang(flagged[:1], forced=self._forced, shape=None)


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, nn.Parameter)


class _Flags:
    """The flags of one device, and a copy of them that the host reads without waiting."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        on_gpu = tensor.device.type == "cuda"
        with torch.inference_mode(False):
            self.host = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None

    def copy(self) -> None:
        """Copy the flags when all that was launched until now has run."""
        self.host.copy_(self.tensor, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.tensor.device))

    def arrived(self) -> bool:
        """Whether `host` holds what was copied last."""
        return self._copied is None or self._copied.query()

    def being_recorded(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph."""
        return self._copied is not None and torch.cuda.is_current_stream_capturing()


class _Trial(TorchDispatchMode):
    """Runs `linear` without TileLang, and finds out which of the suspects' TileLang kernels are at fault.

    Args:
        suspects: layers by the address of their status.
    """

    def __init__(self, suspects: dict[int, TernaryLinear]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._suspects = suspects
        self.guilty: list[TernaryLinear] = []
        #: Of x in the first call of a guilty layer.
        self.shape: list[int] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.ternarize.linear.default:
            return func(*args, **(kwargs or {}))
        outputs = ops.linear_now("auto", *args)
        x, statuses = args[0], args[STATUS[torch.ops.ternarize.linear]]
        suspects = [self._suspects.get(status.data_ptr()) for status in statuses]
        if any(suspects):
            finite = x.isfinite().all(-1, keepdim=True)
            again = ops.linear_now("tilelang", *args)
            for layer, y, suspect in zip(suspects, outputs, again, strict=True):
                at_fault = (finite & y.isfinite() & ~suspect.isfinite()).any()
                if layer is not None and layer not in self.guilty and at_fault:
                    self.guilty.append(layer)
                    self.shape = self.shape or list(x.shape)
        return outputs
