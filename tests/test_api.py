"""ternarize, dequantize and freeze on whole models."""

import copy
import gc
import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import ternarize as package
from ternarize import TernaryConfig, TernaryLinear, dequantize, freeze, ternarize
from ternarize.api import is_ternary
from ternarize.errors import ConfigError, ConversionError
from ternarize.layer import ternary_layers
from tests.kit import Block, report_of, skipped, swapped


def tiny_llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def same_output_as_dequantised(model: nn.Module, *inputs: Tensor) -> None:
    dense = dequantize(copy.deepcopy(model))
    assert not is_ternary(dense)
    with torch.no_grad():
        got, expected = model(*inputs), dense(*inputs)
    torch.testing.assert_close(getattr(got, "logits", got), getattr(expected, "logits", expected))


def test_public_name_is_the_function() -> None:
    assert package.ternarize is ternarize
    assert callable(package.ternarize)


def test_swapped_layers_equal_dense_layers_of_the_same_weights() -> None:
    choices: list[dict[str, Any]] = [
        {},
        {"init": "least_squares"},
        {"group_size": 32},
        {"config": TernaryConfig(planes=3)},
    ]
    for options in choices:
        model = nn.Sequential(nn.Linear(70, 24), nn.GELU(), nn.Linear(24, 12, bias=False))
        assert ternarize(model, **options) is model
        assert [type(module) for module in model] == [TernaryLinear, nn.GELU, TernaryLinear]
        same_output_as_dequantised(model, torch.randn(2, 3, 70))
        assert not any(p.is_floating_point() for p in model.parameters())


def test_three_planes_are_close_to_the_dense_model_and_one_plane_is_not() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(256, 64), torch.randn(32, 256)

    def error(**options: Any) -> float:
        with torch.no_grad():
            ternary, exact = ternarize(dense, inplace=False, **options)(x), dense(x)
        return float((ternary - exact).square().mean() / exact.var())

    assert error(config=TernaryConfig(planes=3, group_size=64)) < 0.02
    assert error() > 0.05


def test_defaults_keep_head_router_and_embedding_dense_and_say_so() -> None:
    model = ternarize(Block())
    assert swapped(model) == ["experts.0", "experts.1"]
    assert skipped(model) == {
        "gate": "kept dense by default (gate): name it in include to convert it",
        "lm_head": "kept dense by default (lm_head): name it in include to convert it",
    }
    assert [name for name, _ in ternary_layers(model)] == ["experts.0", "experts.1"]
    assert all(layer.name == name for name, layer in ternary_layers(model))
    same_output_as_dequantised(model, torch.randint(0, 11, (2, 5)))


def test_include_exclude_and_filter_fn_choose_layers() -> None:
    assert swapped(ternarize(Block(), include=["lm_head", r"experts\.0"])) == ["experts.0", "lm_head"]
    assert swapped(ternarize(Block(), exclude=[r"experts\.0"])) == ["experts.1"]
    seen = []

    def only_first(module: nn.Module, fqn: str) -> bool:
        seen.append((type(module), fqn))
        return fqn.endswith(".0")

    model = ternarize(Block(), filter_fn=only_first)
    assert swapped(model) == ["experts.0"]
    assert skipped(model)["experts.1"] == "refused by filter_fn"
    assert seen == [(nn.Linear, "experts.0"), (nn.Linear, "experts.1")]
    with pytest.raises(ConfigError, match="is no regular expression"):
        ternarize(Block(), exclude=["("])


def test_the_model_itself_may_be_the_layer() -> None:
    linear = nn.Linear(16, 8)
    for inplace in (True, False):
        layer = ternarize(linear, inplace=inplace)
        assert isinstance(layer, TernaryLinear)
        assert len(report_of(layer).swapped) == 1
    dense = dequantize(layer)
    assert type(dense) is nn.Linear


def test_tiny_llama_swaps_every_projection_and_keeps_the_head() -> None:
    model = ternarize(tiny_llama(tie_word_embeddings=False))
    assert len(swapped(model)) == 14
    assert list(skipped(model)) == ["lm_head"]
    same_output_as_dequantised(model, torch.randint(0, 50, (2, 6)))


def test_layer_tied_to_an_embedding_is_skipped_even_if_included() -> None:
    model = ternarize(tiny_llama(tie_word_embeddings=True), include=["lm_head", "mlp"])
    assert skipped(model)["lm_head"] == "shares its weight with 'model.embed_tokens.weight', which stays dense"
    assert len(swapped(model)) == 6
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_gpt2_conv1d_layers_are_swapped() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    ternarize(model)
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert swapped(model) == [f"transformer.h.0.{name}" for name in names]
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (24, 72)
    expected = ternarize(_linear_of(weight.t()))
    assert isinstance(expected, TernaryLinear)
    assert torch.equal(layer.T_packed, expected.T_packed)
    same_output_as_dequantised(model, torch.randint(0, 50, (1, 6)))


def _linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    return linear


def test_strict_allows_what_the_caller_and_the_defaults_keep_dense() -> None:
    assert swapped(ternarize(Block(), strict=True, exclude=[r"experts\.1"])) == ["experts.0"]


def test_torch_encoder_runs_its_layers_in_eval_mode() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)
    ternarize(encoder)
    assert swapped(encoder) == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    trained = encoder(x, src_key_padding_mask=mask)
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=mask), trained)


def test_ternary_layers_are_left_alone() -> None:
    model = ternarize(Block(), include=[r"experts\.0"])
    first = model.get_submodule("experts.0")
    ternarize(model)
    assert model.get_submodule("experts.0") is first
    assert skipped(model)["experts.0"] == "already ternary"
    assert swapped(model) == ["experts.1"]
    ternarize(model)
    assert swapped(model) == []


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Sequential(), {}, "nothing to make ternary: this Sequential has no linear layer"),
        (lambda: nn.Conv2d(1, 1, 1), {}, "this Conv2d has no linear layer"),
        (Block, {"include": ["nothing"]}, "all 4 linear layers are skipped: 4 x not in include"),
        (Block, {"exclude": ["experts"]}, "4 linear layers are skipped: 2 x excluded by 'experts'; 1 x kept dense"),
        (lambda: {"weight": torch.zeros(4, 4)}, {}, "cannot make a dict ternary: pass an nn.Module"),
    ],
)
def test_nothing_to_convert_is_an_error_that_counts_the_reasons(
    make: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=re.escape(message)):
        ternarize(make(), **options)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_not_finite_are_named_and_the_model_stays_as_it_was(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].get_parameter(name).view(-1)[-1] = torch.nan
    with pytest.raises(ConversionError, match=rf"the {name} of '1' holds NaN"):
        ternarize(model)
    assert not is_ternary(model)


def test_config_and_arguments_that_disagree_are_refused() -> None:
    linear = nn.Linear(64, 8)
    with pytest.raises(ConfigError, match=r"group_size=32 and config.group_size=64 differ"):
        ternarize(linear, TernaryConfig(group_size=64), group_size=32)
    with pytest.raises(ConfigError, match=r"init='least_squares' and config.init='absmean' differ"):
        ternarize(linear, TernaryConfig(), init="least_squares")
    layer = ternarize(linear, TernaryConfig(group_size=32, rule="sign"), group_size=32)
    assert isinstance(layer, TernaryLinear)
    assert (layer.group_size, layer.rule) == (32, "sign")
    with pytest.raises(ConfigError, match="init='median' is unknown"):
        ternarize(linear, init="median")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"planes": 4}, "planes=4 is unknown: use one of 1, 2, 3"),
        ({"rule": "adam"}, "rule='adam' is unknown: use one of factored, sign"),
        ({"accumulator": "int2"}, "accumulator='int2' is unknown: use one of int8, int4"),
        ({"rule": "sign", "accumulator": "int4"}, "accumulator='int4' is a form of the 'factored' rule"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TernaryConfig(**fields)


def test_trainable_is_kept_per_layer_and_several_planes_are_for_inference() -> None:
    linear = nn.Linear(64, 8)
    for config, trainable, expected in (
        (TernaryConfig(), True, True),
        (TernaryConfig(), False, False),
        (TernaryConfig(planes=2), True, False),
    ):
        layer = ternarize(linear, config, trainable=trainable, inplace=False)
        assert isinstance(layer, TernaryLinear)
        assert layer.trainable is expected


def test_mode_and_dtype_of_the_dense_layer_are_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16).eval(), nn.Linear(8, 8))
    ternarize(model)
    assert [layer.training for _, layer in ternary_layers(model)] == [False, True]
    assert [layer.dtype for _, layer in ternary_layers(model)] == [torch.bfloat16, torch.float32]
    dense = dequantize(copy.deepcopy(model))
    assert [p.dtype for p in dense.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert [module.training for module in dense.children()] == [False, True]
    assert {p.dtype for p in dequantize(model, torch.float16).parameters()} == {torch.float16}


def test_meta_model_becomes_a_meta_ternary_model() -> None:
    with torch.device("meta"):
        model = Block()
    ternarize(model)
    layer = model.get_submodule("experts.0")
    assert isinstance(layer, TernaryLinear)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert report_of(model).swapped[0].weight_error is None
    model.to_empty(device="cpu")
    model.load_state_dict(ternarize(Block()).state_dict())
    assert model(torch.randint(0, 11, (1, 3))).isfinite().all()


def test_device_moves_the_swapped_layers() -> None:
    model = ternarize(Block(), device="meta")
    assert all(p.is_meta == name.startswith("experts") for name, p in model.named_parameters())


def test_inplace_frees_each_dense_layer_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    original = TernaryLinear.from_levels

    def counting(*args: Any, **kwargs: Any) -> TernaryLinear:
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return original(*args, **kwargs)

    monkeypatch.setattr(TernaryLinear, "from_levels", counting)
    ternarize(model)
    assert alive == [4, 3, 2, 1]


def test_inplace_false_copies_all_but_the_swapped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block()
    before = copy.deepcopy(model.state_dict())
    copied = []
    original: Callable[[nn.Parameter, dict[int, Any]], Any] = nn.Parameter.__deepcopy__

    def counting(self: nn.Parameter, memo: dict[int, Any]) -> Any:
        copied.append(id(self))
        return original(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", counting)
    ternary = ternarize(model, inplace=False)
    assert id(model.experts[0].weight) not in copied
    assert id(model.lm_head.weight) in copied
    assert not is_ternary(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for (_, a), (_, b) in itertools.product(model.named_parameters(), ternary.named_parameters()):
        assert a.data_ptr() != b.data_ptr()
    assert torch.equal(ternary.get_parameter("lm_head.weight"), model.lm_head.weight)
    assert not hasattr(model, "ternary_report")


def test_freeze_drops_training_state_everywhere() -> None:
    model = ternarize(Block())
    assert freeze(model) is model
    left = {name for _, layer in ternary_layers(model) for name, _ in layer.named_parameters()}
    assert left == {"T_packed", "E", "bias", "bias_exponent"}


def test_dequantised_layers_can_be_made_ternary_again_with_the_same_weights() -> None:
    torch.manual_seed(0)
    layer = ternarize(nn.Linear(64, 8), TernaryConfig(group_size=32, init="least_squares", planes=2))
    assert isinstance(layer, TernaryLinear)
    dense = dequantize(copy.deepcopy(layer))
    again = ternarize(dense, TernaryConfig(group_size=32, init="least_squares", planes=2))
    assert isinstance(again, TernaryLinear)
    assert torch.equal(again.weight, layer.weight)


def test_ternary_model_compiles_without_a_graph_break() -> None:
    model = ternarize(Block())
    tokens = torch.randint(0, 11, (2, 5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
