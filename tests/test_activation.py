"""A layer with int8 activations: what it computes and how it trains."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryConfig, TernaryLinear, save_pretrained, ternarize
from ternarize.checkpoint import load_into
from ternarize.errors import ConfigError

W2A8 = TernaryConfig(group_size=16, activation="int8")


def layer_of(config: TernaryConfig, N: int = 6, K: int = 40) -> TernaryLinear:
    torch.manual_seed(0)
    layer = ternarize(nn.Linear(K, N), config)
    assert isinstance(layer, TernaryLinear)
    return layer


def bitnet(x: Tensor) -> Tensor:
    """activation_quant of BitNet b1.58's published training code."""
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


def test_the_forward_is_bitnets() -> None:
    layer, x = layer_of(W2A8), torch.randn(2, 5, 40)
    dense = nn.functional.linear(bitnet(x), layer.weight, layer_of(TernaryConfig(group_size=16))(torch.zeros(40)))
    torch.testing.assert_close(layer(x), dense)
    assert not torch.allclose(layer(x), layer_of(TernaryConfig(group_size=16))(x), rtol=1e-4)


def test_rounding_is_passed_straight_through_in_backward() -> None:
    int8, full = layer_of(W2A8), layer_of(TernaryConfig(group_size=16))
    x = torch.randn(9, 40)
    gradients = []
    for layer, given in ((int8, x), (full, bitnet(x))):
        layer.prepare_training()
        given = given.clone().requires_grad_()
        (layer(given) * torch.arange(6.0)).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)
    # The update sees x as it was multiplied.
    assert int8.stage_row is not None
    assert full.stage_row is not None
    torch.testing.assert_close(int8.stage_row, full.stage_row)
    torch.testing.assert_close(int8.stage, full.stage)


def test_the_weights_are_the_same_bytes_whatever_the_activation() -> None:
    for int8, full in zip(
        layer_of(W2A8).parameters(), layer_of(TernaryConfig(group_size=16)).parameters(), strict=True
    ):
        assert torch.equal(int8, full)


def test_a_checkpoint_and_repr_say_so(tmp_path: Path) -> None:
    model = nn.Sequential(layer_of(W2A8), layer_of(TernaryConfig(group_size=16), 40, 6))
    save_pretrained(model, tmp_path)
    loaded = load_into(nn.Sequential(nn.Linear(40, 6), nn.Linear(6, 40)), tmp_path)
    x = torch.randn(3, 40)
    torch.testing.assert_close(loaded(x), model(x))
    int8, full = loaded.children()
    assert "planes=1, activation=int8" in repr(int8)
    assert "activation" not in repr(full)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation='fp8' is unknown: use one of float, int8"):
        TernaryConfig(activation="fp8")  # type: ignore[arg-type]
