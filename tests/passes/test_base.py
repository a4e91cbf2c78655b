from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ternarize.passes.base import mutates


def _pure(x: Tensor, mask: Tensor) -> Tensor:
    # What transformers writes for an attention mask; the functions are operator.and_ and operator.or_.
    return torch.where((mask & mask) | mask, x, 0).__add__(1)


def _method(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill_(mask, 0)


def _operator(x: Tensor, mask: Tensor) -> Tensor:
    x += 1
    return x


def _item(x: Tensor, mask: Tensor) -> Tensor:
    x[0] = 1
    return x


def _out(x: Tensor, mask: Tensor) -> Tensor:
    return torch.add(x, 1, out=x)


def _function(x: Tensor, mask: Tensor) -> Tensor:
    return torch.relu_(x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(_pure, False), (_method, True), (_operator, True), (_item, True), (_out, True), (_function, True)],
)
def test_nodes_that_may_write_to_an_argument_are_found(function: Callable[..., Any], expected: bool) -> None:
    found = []

    def record(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(any(mutates(node) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=record, fullgraph=True)(torch.zeros(3), torch.ones(3, dtype=torch.bool))
    assert found == [expected]
