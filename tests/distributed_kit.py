"""What two ranks do in the tests of data parallel training: one process each, over gloo, all scenarios in turn."""

import copy
import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ternarize import TernaryOptimizer, build_optimizer, distributed, ternarize
from ternarize.distributed import Replicas
from ternarize.errors import ConfigError, NonFiniteError
from ternarize.layer import Apply
from tests.optim_kit import FORMS, make_layer

RANKS = 2

#: Ranks that do not agree about what comes next would wait for each other.
LIMIT = datetime.timedelta(seconds=60)
STEPS = 4

#: Every step moves trits.
OPTIONS: dict[str, Any] = {"lr": 1.0, "threshold": 1, "exponent_threshold": 1, "seed": 9}


def make_model(form: str = "int8") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(make_layer(16, 32, form), nn.ReLU(), make_layer(32, 16, form))


def batch(step: int, rank: int, micro: int = 0) -> Tensor:
    """Small integers."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randint(-2, 3, (6, 16), generator=generator).float()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x).square().sum()
    return loss


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def steps_of(form: str, mode: Apply, micro_batches: int) -> Callable[[int], Any]:
    def run(rank: int) -> Any:
        model = make_model(form)
        if rank:
            # A rank that starts elsewhere gets the first one's layers.
            for parameter in model.parameters():
                parameter.zero_()
        optimizer = TernaryOptimizer(model, apply=mode, **OPTIONS)
        for step in range(STEPS):
            for micro in range(micro_batches):
                loss_of(model, batch(step, rank, micro)).backward()
            optimizer.step()
        return state(model), optimizer.state_dict()["state"]

    return run


def nonfinite_on_one_rank(rank: int) -> Any:
    """Rank 1 has a NaN in its loss, then in one gradient, then only in the loss that it gives to the step."""
    model = make_model()
    optimizer = TernaryOptimizer(model, **OPTIONS)
    loss_of(model, batch(0, rank)).backward()
    optimizer.step()
    before, messages = state(model), []
    for bad in ("loss", "gradient", "given"):
        broken = bad if rank == 1 else ""
        with torch.enable_grad():
            y = model[1](model[0](batch(1, rank)))
            if broken == "gradient":
                y.register_hook(lambda gradient: gradient * torch.nan)
            loss = model[2](y).square().sum() * (torch.nan if broken == "loss" else 1.0)
        loss.backward()
        try:
            optimizer.step(loss=torch.nan if broken == "given" else 1.0)
        except NonFiniteError as error:
            messages.append(str(error))
    refused = state(model)
    loss_of(model, batch(2, rank)).backward()
    optimizer.step()
    return before, messages, refused, state(model), optimizer.skipped_steps


def skipped_on_one_rank(rank: int) -> Any:
    model = make_model("sign")
    optimizer = TernaryOptimizer(model, skip_nonfinite=True, **OPTIONS)
    (loss_of(model, batch(0, rank)) * (torch.inf if rank == 0 else 1.0)).backward()
    before = state(model)
    optimizer.step()
    return before, state(model), optimizer.skipped_steps


class Mixed(nn.Module):
    """Float parameters and a buffer around a linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.layer = layer
        self.norm = nn.LayerNorm(16)
        self.register_buffer("offset", torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(self.embed(x) + self.offset))
        return y


def beside_ddp(rank: int, *, optimizer_first: bool) -> Any:
    """Each rank starts elsewhere; micro-batches are accumulated without synchronisation."""
    torch.manual_seed(rank)
    if optimizer_first:
        model: nn.Module = Mixed(make_layer(16, 16))
        optimizer = build_optimizer(model, lr=1e-2, ternary=OPTIONS)
        parallel = DistributedDataParallel(model)
    else:
        model = ternarize(Mixed(nn.Linear(16, 16)), include=["layer"])
        parallel = DistributedDataParallel(model)
        optimizer = build_optimizer(parallel, lr=1e-2, ternary=OPTIONS)
    start = state(model)
    for step in range(STEPS):
        with parallel.no_sync():
            loss_of(parallel, batch(step, rank, 0)).backward()
        loss_of(parallel, batch(step, rank, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return start, state(model)


def under_fsdp(rank: int) -> Any:
    """Float parameters are sharded, ternary layers are left whole."""
    torch.manual_seed(0)
    model = Mixed(make_layer(16, 16))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), ignored_params=set(model.layer.parameters()))
    optimizer = build_optimizer(model, lr=1e-2, ternary=OPTIONS)

    def whole() -> list[Tensor]:
        weights: list[Any] = [model.embed.weight, model.norm.weight]
        return [weight.full_tensor().detach().clone() for weight in weights]

    start = whole()
    for step in range(STEPS):
        loss_of(model, batch(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    floats, before = whole(), state(model.layer)
    try:
        (loss_of(model, batch(0, rank)) * (torch.nan if rank else 1.0)).backward()
        optimizer.step()
    except NonFiniteError as error:
        return start, floats, before, state(model.layer), str(error)
    return start, floats, before, state(model.layer), ""


def sharded_by_fsdp(rank: int) -> str:
    model = Mixed(make_layer(16, 16))
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    except RuntimeError as error:
        # Older versions of torch shard no integers.
        return str(error)
    return refusal_of(lambda: build_optimizer(model))


def refusal_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


def scaled(rank: int) -> Any:
    """Only the ternary gradient of rank 1 overflows."""
    model = make_model()
    optimizer = TernaryOptimizer(model, **OPTIONS)
    scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=4.0)
    before, scales = state(model), []
    for factor in (torch.inf if rank == 1 else 1.0, 1.0):
        scaler.scale(loss_of(model, batch(0, rank)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return before, scales, state(model)


def sums_of_one_rank(rank: int) -> Any:
    """Of a layer that had no micro-batch on the second rank, where an earlier step left something in its stage."""
    layer = make_layer(16, 4, "sign")
    layer.prepare_training()
    assert layer.stage is not None
    layer.stage.fill_(3 - rank)
    layer.status[1] = 1 - rank
    list(Replicas().summed([layer]))
    return layer.stage, layer.status


def saturated_sums(rank: int) -> Any:
    """Sums beyond int8, in pieces that end inside layers and at their ends."""
    layers = [make_layer(16, 4, "sign"), make_layer(7, 3, "sign"), make_layer(16, 8, "int8")]
    for i, layer in enumerate(layers):
        layer.prepare_training()
        assert layer.stage is not None
        layer.stage.fill_(100 if i == 0 else -100)
        layer.stage.view(-1)[i] = 3 - 5 * rank
        layer.status[1] = 1 + rank
    vectors = (layers[2].stage_row, layers[2].stage_col)
    for vector in vectors:
        assert vector is not None
        vector.copy_(torch.arange(vector.numel()) + rank)
    given, distributed.PIECE = distributed.PIECE, 34
    done = [layers.index(layer) for layer in Replicas().summed(layers)]
    distributed.PIECE = given
    return done, [layer.stage for layer in layers], [layer.status for layer in layers], vectors


def in_a_group_of_its_own(rank: int) -> Any:
    groups = [dist.new_group([other]) for other in range(RANKS)]
    model = make_model()
    optimizer = TernaryOptimizer(model, process_group=groups[rank], **OPTIONS)
    loss_of(model, batch(0, rank)).backward()
    optimizer.step()
    return state(model), refusal_of(lambda: TernaryOptimizer(model, process_group=groups[1 - rank]))


SCENARIOS: dict[str, Callable[[int], Any]] = {
    **{f"steps {form}": steps_of(form, "step", 1) for form in FORMS},
    "accumulated sign": steps_of("sign", "step", 2),
    "accumulated int8": steps_of("int8", "step", 2),
    "hooks int8": steps_of("int8", "hooks", 2),
    "nonfinite": nonfinite_on_one_rank,
    "skipped": skipped_on_one_rank,
    "ddp": functools.partial(beside_ddp, optimizer_first=False),
    "optimizer, ddp": functools.partial(beside_ddp, optimizer_first=True),
    "fsdp": under_fsdp,
    "scaled": scaled,
    "sums": saturated_sums,
    "sums of one rank": sums_of_one_rank,
    "group": in_a_group_of_its_own,
    "sharded": sharded_by_fsdp,
    "backward": lambda rank: refusal_of(lambda: TernaryOptimizer(make_model(), apply="backward")),
}


def run_rank(rank: int, folder: str) -> None:
    """All scenarios, as one of the ranks; what they return goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=LIMIT)
    results = {name: scenario(rank) for name, scenario in SCENARIOS.items()}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
