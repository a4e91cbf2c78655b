"""`SwapLinearPass` on Dynamo graphs: weights of ternary layers that a model uses functionally."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternarize.layer import TernaryLinear

MakeLayer = Callable[..., TernaryLinear]
Graphs = list[Counter[str]]


class Functional(nn.Module):
    """Reads the weight of its layer, as tied heads do."""

    def __init__(self, layer: TernaryLinear, bias: bool) -> None:
        super().__init__()
        self.layer = layer
        self.bias = nn.Parameter(torch.randn(8)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.bias)


def test_numbers_equal_eager(make_layer: MakeLayer, compile_fresh: Callable[..., Any]) -> None:
    for bias in (False, True):
        model = Functional(make_layer(32, 8), bias)
        x, y = (torch.ones(3, 32, requires_grad=True) for _ in range(2))
        compiled, eager = compile_fresh(model)(x), model(y)
        torch.testing.assert_close(compiled, eager)
        compiled.sum().backward()
        eager.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_the_dense_weight_is_not_formed(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], dynamo_graphs: Graphs
) -> None:
    compile_fresh(Functional(make_layer(32, 8), True))(torch.randn(3, 32))
    assert dynamo_graphs == [Counter(linear=1)]


def test_other_uses_of_the_weight_stay(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], dynamo_graphs: Graphs
) -> None:
    model = Functional(make_layer(32, 8), False)
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compile_fresh(model)(x), model(x))
    assert dynamo_graphs == [Counter(dequantize=1)]

    class Norm(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer.weight.mT

    compile_fresh(Norm(make_layer(32, 8), False))(x)
    assert dynamo_graphs[1:] == [Counter(dequantize=1)]
