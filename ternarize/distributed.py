"""Data parallel training of integer weights: what replicas on several processes tell each other in a step.

Each rank normalises its gradient by the same statistics and rounds it with random bits of its own, so that what is
summed are small integers; then every rank applies the same sums with the same random bits. Integers add up alike in any
order: replicas stay equal bit for bit without ever being sent again.

A sum of int8 on the wire would wrap where it does not fit. So each rank is sent its share of everyone's stages, adds it
up in 32 bits, limits it to ±127 as a stage of one process is, and sends the sums round: 2 · (R - 1) / R bytes a weight
from each of R ranks, what an all-reduce of int8 sends. Four bits would do for the first half while a step has one
micro-batch, and save a quarter of the bytes; they are not used, because packing takes two more passes over the stage.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ternarize.backends.torch.update import NONFINITE_GRADIENT, NONFINITE_LOSS, NONFINITE_OUTPUT
from ternarize.errors import ConfigError
from ternarize.layer import TernaryLinear, ternary_layers

#: Bytes of one exchange. Two are under way, each sent from one buffer and received into another: 32 MiB together.
PIECE = 8 * 2**20

#: The word of ``rng`` that tells layers apart holds the layer in its low half and the rank in its high one.
RANK_SHIFT = 16

#: Of `Replicas.union`.
_BITS = (NONFINITE_OUTPUT, NONFINITE_GRADIENT, NONFINITE_LOSS)


def keep_out_of_ddp(model: nn.Module) -> None:
    """Have DistributedDataParallel, when it wraps ``model``, leave ternary layers alone.

    It would broadcast what it wraps, and neither gloo nor NCCL knows int16. `Replicas.broadcast` does it instead.
    """
    names = {f"{name}.{part}" for name, layer in ternary_layers(model) for part, _ in layer.named_parameters()}
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *(name.lstrip(".") for name in names)}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


class Replicas:
    """The processes that train copies of one model.

    Args:
        group: of torch.distributed; None: its default group, or this process alone where there is none.

    Raises:
        ConfigError: if this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        self._given = group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.size, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        if self.rank < 0:
            raise ConfigError("this process is not in process_group: make the optimizer on its ranks only")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replicas":
        """The same processes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a pickle: a default group is that of the process that loads it, any other cannot be pickled."""
        return Replicas, (self._given,)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors what they are on the first rank."""
        if self.size > 1:
            for tensor in tensors:
                # As bytes: gloo knows no int16.
                dist.broadcast(tensor.detach().view(torch.uint8), group=self._group, group_src=0)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Make floating-point tensors of one dtype and device the means of those of all ranks."""
        if self.size > 1 and tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat, group=self._group)
            for tensor, mean in zip(tensors, (flat / self.size).split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set on any rank; every rank waits for all others here.

        Args:
            flag: of this rank.
            device: that the group's backend works on.
        """
        if self.size == 1:
            return flag
        return bool(self.union(torch.full((1,), int(flag), dtype=torch.int32, device=device)))

    def union(self, bits: Tensor) -> Tensor:
        """The bits that are set on any rank, of an int32 tensor of them."""
        if self.size == 1:
            return bits
        apart = torch.stack([(bits & bit).ne(0) for bit in _BITS]).to(torch.int32)
        dist.all_reduce(apart, dist.ReduceOp.MAX, group=self._group)
        return torch.stack([part * bit for part, bit in zip(apart, _BITS, strict=True)]).sum(0, dtype=torch.int32)

    def own(self, rng: Tensor) -> None:
        """Make a layer's ``rng`` that of this rank."""
        rng[1:2] += self.rank << RANK_SHIFT

    def shared(self, rng: Tensor) -> Tensor:
        """What a layer's ``rng`` is without its rank, the same everywhere."""
        if self.size == 1:
            return rng
        return torch.stack([rng[0], rng[1] % 2**RANK_SHIFT, rng[2]])

    def summed(self, layers: Iterable[TernaryLinear]) -> Iterator[TernaryLinear]:
        """Layers, each when its stage, statistics and count of micro-batches are the sums of those of all ranks.

        While a layer is used, the stages of the next ones are on the wire.
        """
        if self.size == 1:
            yield from layers
            return
        for _, of_device in itertools.groupby(layers, lambda layer: layer.T_packed.device):
            earlier: _Exchange | None = None
            for views, complete in _pieces(of_device):
                exchange = _Exchange(self._group, self.size, views, complete)
                if earlier is not None:
                    yield from earlier.finish()
                earlier = exchange
            if earlier is not None:
                yield from earlier.finish()


def _pieces(layers: Iterable[TernaryLinear]) -> Iterator[tuple[list[Tensor], list[TernaryLinear]]]:
    """Stages cut into pieces of up to `PIECE` bytes, each with the layers whose last byte it holds."""
    views: list[Tensor] = []
    complete: list[TernaryLinear] = []
    room = PIECE
    for layer in layers:
        if layer.stage is not None:
            # Without a micro-batch it holds what an earlier step left.
            layer.stage.masked_fill_(layer.status[1] == 0, 0)
        for stage in (layer.stage_E, layer.stage):
            rest = torch.empty(0) if stage is None else stage.view(-1)
            while rest.numel():
                if not room:
                    yield views, complete
                    views, complete, room = [], [], PIECE
                views.append(rest[:room])
                rest = rest[room:]
                room -= views[-1].numel()
        complete.append(layer)
    yield views, complete


class _Exchange:
    """One piece on its way: sent when made, added up when finished."""

    def __init__(self, group: Any, size: int, views: list[Tensor], complete: list[TernaryLinear]) -> None:
        self._group, self._size, self._views, self._complete = group, size, views, complete
        self._vectors = [
            vector
            for layer in complete
            for vector in (layer.stage_row, layer.stage_col, layer.status[1:])
            if vector is not None
        ]
        # Every rank is sent a share of the same length.
        padding = views[0].new_zeros(-sum(view.numel() for view in views) % size)
        self._sent = torch.cat([*views, padding])
        self._received = torch.empty_like(self._sent)
        self._works = [dist.all_to_all_single(self._received, self._sent, group=group, async_op=True)]
        if self._vectors:
            # Counts are small integers, exact as float32.
            self._sums = torch.cat([vector.to(torch.float32) for vector in self._vectors])
            self._works.append(dist.all_reduce(self._sums, group=group, async_op=True))

    def finish(self) -> Iterator[TernaryLinear]:
        """The layers that are complete with this piece."""
        for work in self._works:
            work.wait()
        totals = self._received.view(self._size, -1).sum(0, dtype=torch.int32).clamp_(-127, 127).to(torch.int8)
        dist.all_gather(list(self._sent.chunk(self._size)), totals, group=self._group)
        _scatter(self._sent, self._views)
        if self._vectors:
            _scatter(self._sums, self._vectors)
        yield from self._complete


def _scatter(flat: Tensor, into: list[Tensor]) -> None:
    start = 0
    for tensor in into:
        tensor.copy_(flat[start : start + tensor.numel()])
        start += tensor.numel()
