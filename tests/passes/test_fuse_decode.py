import functools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ternarize.activation import dequantize_activation, quantize_activation
from ternarize.backends import select
from ternarize.backends.tilelang import linear as tilelang_linear
from ternarize.backends.torch.update import NONFINITE_OUTPUT
from ternarize.bench.step import Contender, Task
from ternarize.config import TernaryConfig
from ternarize.layer import TernaryLinear, ternary_layers
from ternarize.ops import lowered
from ternarize.passes.fuse_decode import FuseDecodePass
from ternarize.passes.lower_ternary import value_of
from tests.bench_kit import TINY

MakeLayer = Callable[..., TernaryLinear]
Compile = Callable[..., Any]
Fused = list[Counter[str]]

K, N, ROWS = 64, 128, 2

#: Large, so that a result tells whether it was added.
EPS = 0.25


class StandIn:
    """What `ternarize.ops` says of linear_tilelang, in tensor code; layers that are broken write Inf and say so."""

    def __init__(self) -> None:
        self.broken: list[TernaryLinear] = []
        self.rounded = 0

    def __call__(
        self,
        x: Tensor,
        T_packed: Sequence[Tensor],
        *rest: Any,
        rounds: bool = False,
        norm_weight: Tensor | None = None,
        norm_eps: float = 0.0,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> list[Tensor]:
        *weights, status, group_size = rest
        if norm_weight is not None:
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + norm_eps)
            x = (h * norm_weight).to(x.dtype)
        if rounds:
            self.rounded += 1
            x = dequantize_activation(*quantize_activation(x), x.dtype)
        outputs: list[Tensor] = torch.ops.ternarize.linear_torch(x, T_packed, *weights, group_size)
        for packed, y in zip(T_packed, outputs, strict=True):
            if any(packed.data_ptr() == layer.T_packed.data_ptr() for layer in self.broken):
                y.fill_(torch.inf)
        for row, y in zip(status, outputs, strict=bool(status)):
            row[0] |= int(not y.isfinite().all()) * NONFINITE_OUTPUT
        if gated:
            gate, up = outputs
            return [F.silu(gate) * up]
        return outputs if residual is None else [outputs[0] + residual]


@pytest.fixture
def stand_in(tilelang_chosen: None, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    kernel = StandIn()
    monkeypatch.setattr(tilelang_linear, "linear", kernel)
    # All that a call can take, for as few rows as are normalised.
    monkeypatch.setattr(tilelang_linear, "_LEAST_RESIDUAL_TOKENS", 1)
    return kernel


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Fused:
    """What was put into the calls of each inference graph; counts and metadata are checked on the way."""
    seen: Fused = []
    original = FuseDecodePass.rewrite

    def record(self: FuseDecodePass, graph: fx.Graph) -> int:
        before = str(graph)
        count = original(self, graph)
        found: Counter[str] = Counter()
        for call in graph.find_nodes(op="call_function", target=lowered("linear", "tilelang")):
            given = call.kwargs
            found.update(norm="norm_weight" in given, residual="residual" in given, gated=bool(given.get("gated")))
            values = call.target(*value_of(call.args), **{name: value_of(kwarg) for name, kwarg in given.items()})
            for value, noted in zip(values, call.meta["val"], strict=True):
                assert (value.shape, value.dtype, value.stride()) == (noted.shape, noted.dtype, noted.stride())
        seen.append(+found)
        assert count == found.total()
        assert count or str(graph) == before
        return count

    monkeypatch.setattr(FuseDecodePass, "rewrite", record)
    return seen


def norm_of(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """An RMSNorm of K features with random weights."""
    norm = kind(K, eps=EPS)
    nn.init.uniform_(norm.get_parameter("weight"), 0.5, 1.5)
    return norm.to(dtype)


class Mlp(nn.Module):
    """The second half of a block of a Llama; which layer, factor and addend comes first is a choice."""

    def __init__(self, make_layer: MakeLayer, norm: nn.Module, *, up_first: bool, silu_first: bool) -> None:
        super().__init__()
        self.norm, self.up_first, self.silu_first = norm, up_first, silu_first
        self.gate, self.up, self.down = (make_layer(*sizes, group_size=64) for sizes in ((K, N), (K, N), (N, K)))
        # The two layers differ in more than numbers.
        self.up.bias = nn.Parameter(torch.randint(-9, 9, (N,), dtype=torch.int32), requires_grad=False)
        self.up.bias_exponent = nn.Parameter(torch.tensor([-3], dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.up_first:
            up, gate = self.up(h), self.gate(h)
        else:
            gate, up = self.gate(h), self.up(h)
        y: Tensor = self.down(F.silu(gate) * up if self.silu_first else up * F.silu(gate))
        return x + y if self.silu_first else y + x


@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    [
        (LlamaRMSNorm, torch.bfloat16, (ROWS, 1, K)),
        (nn.RMSNorm, torch.bfloat16, (1, ROWS, K)),
        (nn.RMSNorm, torch.float16, (ROWS, K)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("silu_first", [False, True])
def test_numbers_equal_eager(
    make_layer: MakeLayer,
    compile_fresh: Compile,
    stand_in: StandIn,
    fused: Fused,
    kind: type[nn.Module],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    up_first: bool,
    silu_first: bool,
) -> None:
    model = Mlp(make_layer, norm_of(kind, dtype), up_first=up_first, silu_first=silu_first)
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        # Eager rounds what it has normalised before the product with the weight, too.
        torch.testing.assert_close(compile_fresh(model)(x), model(x), rtol=2e-2, atol=2e-2)
    assert fused == [Counter(norm=1, gated=1, residual=1)]


@pytest.fixture
def int8_layers(tilelang_chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with int8 activations get TileLang too."""
    original = select.choose

    def choose(stem: str, *rest: Any, **options: Any) -> Any:
        return original("linear" if stem == "linear_int8" else stem, *rest, **options)

    monkeypatch.setattr("ternarize.passes.lower_ternary.choose", choose)


def test_a_few_tokens_are_rounded_in_the_call_which_fuses_what_others_do(
    make_layer: MakeLayer, compile_fresh: Compile, stand_in: StandIn, int8_layers: None, fused: Fused
) -> None:
    int8 = functools.partial(make_layer, activation="int8")
    model = Mlp(int8, norm_of(LlamaRMSNorm, torch.bfloat16), up_first=False, silu_first=True)
    x = torch.randn(ROWS, 1, K, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(compile_fresh(model)(x), model(x), rtol=2e-2, atol=5e-2)
    assert fused == [Counter(norm=1, gated=1, residual=1)]
    assert stand_in.rounded == 2


def test_what_a_call_does_not_round_is_rounded_before_it(
    make_layer: MakeLayer,
    compile_fresh: Compile,
    stand_in: StandIn,
    int8_layers: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(K, N, group_size=64, activation="int8")
    rounded_before = []

    def linear_int8(q: Tensor, scale: Tensor, *rest: Any) -> list[Tensor]:
        rounded_before.append(len(q))
        T_packed, E, mantissa, bias, exponent, _, group_size, dtype = rest
        args = (q, scale, T_packed, E, mantissa, bias, exponent, group_size, dtype)
        outputs: list[Tensor] = torch.ops.ternarize.linear_int8_torch(*args)
        return outputs

    monkeypatch.setattr("ternarize.backends.tilelang.linear_int8.linear_int8", linear_int8)
    with torch.no_grad():
        for rows in (2, 3):
            x = torch.randn(rows, K, dtype=torch.bfloat16)
            torch.testing.assert_close(compile_fresh(layer)(x), layer(x), rtol=2e-2, atol=2e-2)
    assert (stand_in.rounded, rounded_before) == (1, [3])


def test_a_decoding_llama_is_right_and_all_of_it_is_fused(
    compile_fresh: Compile, stand_in: StandIn, fused: Fused, lowered_graphs: Fused
) -> None:
    layers = 2
    task = Task(
        work="decode",
        config=TINY | {"hidden_size": K, "intermediate_size": N, "num_hidden_layers": layers},
        ternary=TernaryConfig(group_size=64),
        kernels="auto",
        batch=2,
        prompt=5,
        new_tokens=3,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    ready = Contender(task).prepare()
    assert ready.fault == ""
    assert ready.kernels == {"tilelang": 7 * layers}
    assert lowered_graphs == [Counter(linear_tilelang=4 * layers)]
    assert fused == [Counter(norm=2 * layers, residual=2 * layers, gated=layers)]


def test_the_layer_that_wrote_inf_is_named_also_after_two_have_changed_places(
    make_layer: MakeLayer, compile_fresh: Compile, stand_in: StandIn, fused: Fused
) -> None:
    model = Mlp(make_layer, norm_of(nn.RMSNorm, torch.bfloat16), up_first=True, silu_first=True)
    model.gate.name = "mlp.gate"
    x = torch.randn(ROWS, K, dtype=torch.bfloat16)
    compiled = compile_fresh(model)
    with torch.no_grad():
        compiled(x)
        stand_in.broken = [model.gate]
        with pytest.warns(RuntimeWarning, match=r"TileLang wrote NaN or Inf from finite input.*: mlp\.gate \[128x64\]"):
            compiled(x)
    assert [name for name, layer in ternary_layers(model) if not layer.tilelang] == ["gate"]
    assert fused[0] == Counter(norm=1, gated=1, residual=1)


class Held(nn.Module):
    """Two layers on K features and what may go with them, for a function to use."""

    def __init__(self, make_layer: MakeLayer, run: Callable[..., Any], features: int = K) -> None:
        super().__init__()
        self.run = run
        self.a, self.b = make_layer(K, K, group_size=64), make_layer(K, features, group_size=64)
        self.norm = norm_of(LlamaRMSNorm, torch.bfloat16)
        self.row, self.float_row, self.eps = torch.randn(K).bfloat16(), torch.randn(K), torch.tensor(EPS)
        self.half_x = torch.randn(ROWS, K).half()
        self.like_x, self.transposed = torch.randn(ROWS, K).bfloat16(), torch.randn(K, ROWS).bfloat16().t()

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def rounded_norm(x: Tensor, weight: Tensor, *, dim: int = -1, eps: Any = EPS) -> Tensor:
    """As transformers' Llama has it, but for what an argument makes different."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(dim, keepdim=True) + eps)).to(x.dtype)


def float_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As torch.nn.RMSNorm becomes in a graph."""
    h = x.float()
    root = torch.rsqrt(torch.ops.aten.add.Scalar(h.pow(2).mean(-1, keepdim=True), EPS))
    return (h * root * weight).bfloat16()


@pytest.mark.parametrize("norm", [rounded_norm, float_norm])
def test_the_norms_of_these_tests_are_fused_where_nothing_is_different(
    make_layer: MakeLayer, compile_fresh: Compile, stand_in: StandIn, fused: Fused, norm: Callable[..., Tensor]
) -> None:
    model = Held(make_layer, lambda m, x: m.a(norm(x, m.row)))
    with torch.no_grad():
        compile_fresh(model)(torch.randn(ROWS, K, dtype=torch.bfloat16))
    assert fused == [Counter(norm=1)]


#: What stays as it is, though something much like it is fused.
LEFT_ALONE: dict[str, Callable[[Any, Tensor], Any]] = {
    "a norm that is read elsewhere": lambda m, x: (h := m.norm(x), m.a(h)),
    "a norm without a weight": lambda m, x: m.a(F.rms_norm(x, [K])),
    "a norm with a weight of another dtype": lambda m, x: m.a(float_norm(x, m.float_row)),
    "a norm with a matrix for a weight": lambda m, x: m.a(rounded_norm(x, m.like_x)),
    "a norm of another dtype": lambda m, x: m.a(float_norm(m.half_x, m.row)),
    "a norm of another dimension": lambda m, x: m.a(rounded_norm(x, m.row, dim=0)),
    "a norm with a tensor for eps": lambda m, x: m.a(rounded_norm(x, m.row, eps=m.eps)),
    "a gate that is read elsewhere": lambda m, x: (gate := m.a(x), F.silu(gate) * m.b(x)),
    "a gated value that is read elsewhere": lambda m, x: (up := m.b(x), F.silu(m.a(x)) * up),
    "a gate of another function": lambda m, x: F.relu(m.a(x)) * m.b(x),
    "a gate of another dtype": lambda m, x: F.silu(m.a(x)).half() * m.b(x),
    "a gate that is no layer": lambda m, x: (F.silu(m.like_x) * m.b(x), m.a(x)),
    "a residual that comes later": lambda m, x: m.a(x) + x.cos(),
    "a residual that is broadcast": lambda m, x: m.a(x) + m.row,
    "a residual of other strides": lambda m, x: m.a(x) + m.transposed,
    "a residual that is a number": lambda m, x: m.a(x) + 1.0,
    "a residual that is the output": lambda m, x: (y := m.a(x)) + y,
    "a multiple of the output": lambda m, x: torch.add(x, m.a(x), alpha=2),
    "a difference": lambda m, x: x - m.a(x),
    "an output that is read elsewhere": lambda m, x: (y := m.a(x), x + y),
    "two layers with a residual each": lambda m, x: (x + m.a(x), x + m.b(x)),
}


@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")
@pytest.mark.parametrize("run", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_not_quite_it_stays_as_it_is(
    make_layer: MakeLayer, compile_fresh: Compile, stand_in: StandIn, fused: Fused, run: Callable[[Any, Tensor], Any]
) -> None:
    with torch.no_grad():
        compile_fresh(Held(make_layer, run))(torch.randn(ROWS, K, dtype=torch.bfloat16))
    assert fused == [Counter()]


def test_two_layers_that_are_gated_take_no_residual(
    make_layer: MakeLayer, compile_fresh: Compile, stand_in: StandIn, fused: Fused
) -> None:
    model = Held(make_layer, lambda m, x: x + F.silu(m.a(x)) * m.b(x))
    with torch.no_grad():
        compile_fresh(model)(torch.randn(ROWS, K, dtype=torch.bfloat16))
    assert fused == [Counter(gated=1)]


def test_layers_of_different_sizes_make_no_gate(
    make_layer: MakeLayer, compile_fresh: Compile, stand_in: StandIn, fused: Fused
) -> None:
    model = Held(make_layer, lambda m, x: F.silu(m.a(x)) * m.b(x), features=1)
    with torch.no_grad():
        compile_fresh(model)(torch.randn(ROWS, K, dtype=torch.bfloat16))
    assert fused == [Counter()]


@pytest.mark.parametrize(
    ("rows", "dtype", "dynamic"),
    [(ROWS, torch.float32, False), (17, torch.bfloat16, False), (ROWS, torch.bfloat16, True)],
    ids=["float32", "more tokens than few", "symbolic"],
)
def test_what_the_kernel_for_few_tokens_does_not_run_stays_as_it_is(
    make_layer: MakeLayer,
    compile_fresh: Compile,
    stand_in: StandIn,
    fused: Fused,
    rows: int,
    dtype: torch.dtype,
    dynamic: bool,
) -> None:
    model = Mlp(make_layer, norm_of(nn.RMSNorm, dtype), up_first=False, silu_first=True)
    compiled = compile_fresh(model, dynamic=dynamic)
    with torch.no_grad():
        compiled(torch.randn(rows, K, dtype=dtype))
        if dynamic:
            # One graph for all: no size was looked at.
            for others in (1 + rows, 8, 16, 17, 40):
                compiled(torch.randn(others, K, dtype=dtype))
    assert fused == [Counter()]


def test_symbolic_strides_are_not_looked_at(stand_in: StandIn) -> None:
    # By hand: where Dynamo traces such a tensor, PyTorch itself has looked at its strides before.
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        x = torch.empty(ROWS, K, dtype=torch.bfloat16)
        packed, E = torch.empty(K, K // 4, dtype=torch.uint8), torch.empty(K, 1, dtype=torch.int8)
        stride = shapes.create_unbacked_symint()
        strided = torch.empty_strided((ROWS, K), (stride, 1), dtype=torch.bfloat16)
    graph = fx.Graph()
    values = {"x": x, "packed": packed, "E": E, "strided": strided}
    given = [graph.placeholder(name) for name in values]
    call = graph.call_function(
        lowered("linear", "tilelang"), (given[0], [given[1]], [given[2]], [None], [None], [None], [], -1)
    )
    item = graph.call_function(operator.getitem, (call, 0))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (item, given[3])))
    for node, value in zip([*given, call, item], [*values.values(), [x], x], strict=True):
        node.meta["val"] = value
    assert FuseDecodePass()(graph) == 0
    assert not shapes.guards


def test_graphs_of_training_stay_as_they_are(
    make_layer: MakeLayer, compile_fresh: Compile, fused: Fused, lowered_graphs: Fused
) -> None:
    model = Mlp(make_layer, norm_of(nn.RMSNorm, torch.bfloat16), up_first=False, silu_first=True)
    compile_fresh(model)(torch.randn(ROWS, K, dtype=torch.bfloat16)).sum().backward()
    assert len(lowered_graphs) == 2
    assert fused == []
