"""Which linear layers of a model are swapped, which share one ternary layer, and which are skipped and why."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from ternarize import TernaryLinear, dequantize, ternarize
from ternarize.errors import ConversionError
from tests.kit import report_of, skipped, swapped


def test_output_embedding_of_a_transformers_model_is_kept_whatever_its_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scores = nn.Linear(8, 8), nn.Linear(8, 8)

        def get_output_embeddings(self) -> nn.Module:
            return self.scores

    model = nn.Sequential(Named())
    assert swapped(ternarize(model, inplace=False)) == ["0.body"]
    assert skipped(ternarize(model, inplace=False)) == {
        "0.scores": "kept dense by default (output embedding): name it in include to convert it"
    }
    assert swapped(ternarize(model, inplace=False, include=["scores"])) == ["0.scores"]


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    return model


@pytest.mark.parametrize("inplace", [True, False])
def test_layers_that_share_weight_and_bias_become_one_shared_layer_and_stay_shared(inplace: bool) -> None:
    model = ternarize(tied(), inplace=inplace)
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], TernaryLinear)
    assert model[0] is model[2]
    assert model[0] is not model[3]
    first, second, _ = report_of(model).layers
    assert (second.tied_to, second.bytes_before, second.bytes_after) == (first.name, 0, 0)
    assert len(list(model.parameters())) == 2 * len(list(model[0].parameters()))
    dense = dequantize(model)
    assert isinstance(dense, nn.Sequential)
    assert dense[0] is dense[2]


def test_one_module_under_two_names_stays_one_module() -> None:
    linear = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": linear, "b": linear})
    assert swapped(ternarize(model, inplace=False)) == ["a"]
    assert ternarize(model) is model
    assert model["a"] is model["b"]
    assert isinstance(model["b"], TernaryLinear)
    # Under one name it would be swapped, under the other not: it cannot be both.
    with pytest.raises(ConversionError, match="excluded by 'b'"):
        ternarize(nn.ModuleDict({"a": linear, "b": linear}), exclude=["b"])


def test_shared_weight_with_another_bias_or_an_excluded_partner_is_skipped() -> None:
    model = tied()
    model[2].bias = nn.Parameter(torch.zeros(8))
    assert skipped(ternarize(model)) == dict.fromkeys(["0", "2"], "shares its weight with '0', but not its bias")
    assert skipped(ternarize(tied(), exclude=["2"])) == {
        "0": "shares its weight with '2', which stays dense",
        "2": "excluded by '2'",
    }


class Sub(nn.Linear):
    pass


def _with_hook() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda *_: None)
    return linear


def _with_forward() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.__dict__["forward"] = torch.relu
    return linear


def _integer() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Sub(8, 8), "Sub is a subclass of nn.Linear and may do something else"),
        (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), "is a subclass of nn.Linear"),
        (lambda: nn.LazyLinear(8), "LazyLinear is a subclass of nn.Linear"),
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "parametrized: remove the parametrization first"),
        (lambda: prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5), "it has hooks .* remove them first"),
        (_with_hook, "it has hooks"),
        (_with_forward, "its forward was replaced on the instance"),
        (_integer, "its weight is torch.int8, not floating-point"),
    ],
)
def test_linear_layers_that_are_more_than_a_weight_are_skipped(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "odd": make()})
    before = model["odd"]
    ternarize(model)
    assert swapped(model) == ["plain"]
    assert re.search(reason, skipped(model)["odd"] or "")
    assert model["odd"] is before
    with pytest.raises(ConversionError, match=rf"strict=True and layers cannot be swapped: odd: .*{reason}"):
        ternarize(nn.ModuleDict({"plain": nn.Linear(8, 8), "odd": make()}), strict=True)
    assert swapped(ternarize(nn.ModuleDict({"plain": nn.Linear(8, 8), "odd": make()}), exclude=["odd"], strict=True))
