"""Training on two processes, with whole and with sharded parameters, against one process with the global batch: nothing that the
input ranges learn is lost, their decay is that of the step, and noise is that of the rank.

All that two processes do is done in one start of them.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import results_of_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from triton_analog import TorchInferenceRPUConfig, convert_to_analog
from triton_analog.config import WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.nn import AnalogLinear
from triton_analog.optim import AnalogOptimizer
from triton_analog.seeds import set_noise_rank

RANKS, STEPS, MICRO_BATCHES, ROWS, SIZE, START_UP = 2, 3, 2, 16, 12, 3
CLOSE = 1e-13
CASES = [
    *(("DDP", mode) for mode in ("", "checkpoint", "fast mode")),
    *(
        ("FSDP2", mode)
        for mode in ("", "checkpoint", "reentrant checkpoint", "fast mode", "frozen ranges", "compiled blocks")
    ),
    *(("FSDP2 without resharding", mode) for mode in ("", "reentrant checkpoint", "fast mode")),
]
OTHERS = {"ZeRO 1 of torch": (ZeroRedundancyOptimizer, "DDP"), "plain optimizer": (AdamW, "FSDP2")}


# ---- A model ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, recompute: bool | None) -> None:
        super().__init__()
        self.up, self.down, self.recompute = nn.Linear(SIZE, 17), nn.Linear(17, SIZE), recompute

    def compute(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x) if self.recompute is None else checkpoint(self.compute, x, use_reentrant=self.recompute)


def model(mode: str = "") -> Any:
    """Ranges of 2 and 3 slices, whose start-up ends in the second step, and whose decay most slices meet."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 6
    config.forward.inp_res = 254
    range_ = config.pre_post.input_range
    range_.enable, range_.init_from_data, range_.fast_mode = True, START_UP, mode == "fast mode"
    range_.decay, range_.input_min_percentage, range_.learn_input_range = 0.5, 0.99, mode != "frozen ranges"
    torch.manual_seed(0)
    recompute = {"checkpoint": False, "reentrant checkpoint": True}.get(mode)
    return convert_to_analog(nn.Sequential(Block(recompute), Block(recompute)).double(), config)


def batches() -> Tensor:
    x = torch.randn(
        STEPS, MICRO_BATCHES, RANKS * ROWS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    x[:, :, ROWS:] *= 3  # the second rank sees larger inputs
    return x


def adamw(net: Any, kind: Any = AnalogOptimizer) -> Any:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weight decay of ranges is wanted here: it must see what they have learned
        if kind is AnalogOptimizer:
            return AnalogOptimizer(AdamW, net.analog_layers, net.parameters(), **options)
        if kind is ZeroRedundancyOptimizer:
            return ZeroRedundancyOptimizer(net.parameters(), AdamW, **options)
        return AdamW(net.parameters(), **options)


def backward(net: nn.Module, step: Tensor, scale: float = 1.0) -> None:
    for x in step:
        (net(x.requires_grad_()).square().mean() * scale / len(step)).backward()


def train(net: nn.Module, optimizer: Any, steps: Tensor) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for name, v in tensors.items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


# ---- On two processes -------------------------------------------------------------------------------------------------


def parallel(net: Any, kind: str) -> Any:
    if kind == "DDP":
        return DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in (*net, net):
        fully_shard(part, mesh=mesh, reshard_after_forward=kind == "FSDP2")
    return net


def matrix(local: Tensor) -> dict[Any, Any]:
    found = {}
    for kind, mode in CASES:
        net = model(mode)
        if mode == "compiled blocks":
            for block in net:
                block.compile(fullgraph=True, backend="aot_eager")
        train(parallel(net, kind), adamw(net), local)
        found[kind, mode] = whole(net.state_dict())
    for kind, (optimizer, wrapped) in OTHERS.items():
        net = model()
        train(parallel(net, wrapped), adamw(net, optimizer), local)
        found[kind, ""] = whole(net.state_dict())
    return found


def resumed(local: Tensor, folder: str) -> dict[Any, Any]:
    """A start-up that is saved in its middle: after a step, and between a backward and its step."""
    net = model()
    sharded = parallel(net, "FSDP2")
    optimizer = adamw(net)
    train(sharded, optimizer, local[:1])
    state, optimizer_state = get_state_dict(sharded, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    again = model()
    parallel(again, "FSDP2")
    other = adamw(again)
    state, optimizer_state = get_state_dict(again, other)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(again, other, model_state_dict=state, optim_state_dict=optimizer_state)
    train(again, other, local[1:])
    optimizer.zero_grad()
    backward(sharded, local[1])
    between = {"sharded": whole(get_model_state_dict(net)), "plain": whole(net.state_dict())}
    net.eval()
    between["output"] = {"": net(local[0, 0].detach()).detach()}
    return {"resumed": whole(again.state_dict()), **between}


def scaled(local: Tensor, kind: str) -> dict[str, Tensor]:
    net = model()
    ranks = parallel(net, kind)
    optimizer = adamw(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in local:
        optimizer.zero_grad()
        for x in step:
            scaler.scale(ranks(x).square().mean() / len(step)).backward()
        scaler.step(optimizer)
        scaler.update()
    return whole(net.state_dict())


def noisy(refresh: WeightNoiseRefresh, out_noise: float = 0.0) -> AnalogLinear:
    config = TorchInferenceRPUConfig()
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    config.modifier.refresh = refresh
    if out_noise > 0:
        config.modifier.std_dev, config.forward.out_noise = 0.0, out_noise
        config.pre_post.input_range.enable = config.pre_post.input_range.dynamic = True
    return AnalogLinear(SIZE, SIZE, bias=False, rpu_config=config)


def noise_of_steps() -> Tensor:
    """Of two micro-batches in each of two steps, where every forward gathers the weight."""
    torch.manual_seed(0)
    net = nn.Sequential(noisy(WeightNoiseRefresh.STEP), nn.Identity())
    layer: Any = net[0]
    weight = layer.weight.detach().clone()
    optimizer = AnalogOptimizer(SGD, lambda: [layer], parallel(net, "FSDP2").parameters(), lr=0.0)
    noise = []
    for _ in range(2):
        for _ in range(2):
            y = net(torch.eye(SIZE))
            y.sum().backward()
            noise.append(y.detach().T - weight)
            assert layer._kept_noise._tile is None
        optimizer.step()
    return torch.stack(noise).unflatten(0, (2, 2))


def noise_of_seeds() -> dict[str, Tensor]:
    """Of ranks that are seeded alike."""
    found = {}
    for rank in (None, 0):
        set_noise_rank(rank)
        torch.manual_seed(0)
        for refresh, out_noise in (
            (WeightNoiseRefresh.FORWARD, 0.0),
            (WeightNoiseRefresh.STEP, 0.0),
            (WeightNoiseRefresh.FORWARD, 0.1),
        ):
            layer = noisy(refresh, out_noise)
            found[f"{rank} {refresh.name} {out_noise}"] = (layer(torch.eye(SIZE)).T - layer.weight).detach()
    set_noise_rank(None)
    return found


def warned_of_the_clip(steps: int, optimizer: Any) -> int:
    """Warnings of a sharded model that is never clipped, in steps of three forwards."""
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 2.0
    net = parallel(convert_to_analog(nn.Sequential(nn.Linear(SIZE, SIZE)), config), "FSDP2")
    own = optimizer(net.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            backward(net, torch.randn(3, 2, SIZE))
            own.step()
    return sum("never" in str(w.message) or "without clip_weights()" in str(w.message) for w in caught)


def refusals() -> dict[str, str]:
    found = {}
    for original in (True, False):
        net = FullyShardedDataParallel(model(), use_orig_params=original, device_id=torch.device("cpu"))
        try:
            net(torch.ones(2, SIZE, dtype=torch.float64))
        except (RuntimeError, ValueError) as error:
            found[f"FSDP1 {original}"] = str(error)
    return found


def one_rank(rank: int, port: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    local = batches()[:, :, rank * ROWS : (rank + 1) * ROWS]
    results[rank] = {
        **matrix(local),
        **resumed(local, folder),
        **{("scaled", kind): scaled(local, kind) for kind in ("DDP", "FSDP2")},
        "noise of steps": noise_of_steps(),
        "noise of seeds": noise_of_seeds(),
        "warnings": [warned_of_the_clip(steps, SGD) for steps in (60, 110)],
        "refusals": refusals(),
    }
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank found."""
    results = results_of_ranks(one_rank, RANKS, str(tmp_path_factory.mktemp("checkpoint")))
    return [results[rank] for rank in range(RANKS)]


# ---- Against one ------------------------------------------------------------------------------------------------------


@cache
def alone(mode: str = "") -> dict[str, Tensor]:
    net = model(mode)
    train(net, adamw(net), batches())
    return whole(net.state_dict())


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_ranks_equal_one_process_with_the_global_batch(ranks: Any, kind: str, mode: str) -> None:
    one = alone(mode)
    assert one["0.up.input_range_update_idx"].tolist() == [START_UP] * 2
    assert difference(ranks[0][kind, mode], one) <= CLOSE
    assert difference(ranks[0][kind, mode], ranks[1][kind, mode]) == 0


@pytest.mark.parametrize("kind", OTHERS)
def test_other_optimizers_find_what_waits_for_them_too(ranks: Any, kind: str) -> None:
    assert difference(ranks[0][kind, ""], alone()) <= CLOSE


def test_a_start_up_that_is_resumed_in_its_middle_is_the_same(ranks: Any) -> None:
    assert difference(ranks[0]["resumed"], ranks[0]["FSDP2", ""]) == 0


def test_what_waits_for_a_step_is_in_state_dicts_and_in_evaluation(ranks: Any) -> None:
    net = model()
    optimizer = adamw(net)
    train(net, optimizer, batches()[:1])
    optimizer.zero_grad()
    backward(net, batches()[1])
    state = whole(net.state_dict())
    assert "0.up.input_range_shift" not in state
    for kind in ("sharded", "plain"):
        assert difference(ranks[0][kind], state) <= CLOSE
    output = net.eval()(batches()[0, 0])
    parts = torch.cat([ranks[rank]["output"][""] for rank in range(RANKS)])
    assert (parts - output).abs().max() <= CLOSE


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_a_loss_scale_leaves_the_decay_alone(ranks: Any, kind: str) -> None:
    assert difference(ranks[0]["scaled", kind], alone()) <= CLOSE


def test_noise_of_a_gathered_weight_lasts_for_a_step(ranks: Any) -> None:
    noise = ranks[0]["noise of steps"]
    torch.testing.assert_close(noise[:, 0], noise[:, 1])
    assert (noise[0] - noise[1]).abs().max() > 1e-3


def test_ranks_that_are_seeded_alike_draw_different_noise_unless_told_otherwise(ranks: Any) -> None:
    first, second = (found["noise of seeds"] for found in ranks)
    for name in first:
        assert torch.equal(first[name], second[name]) == name.startswith("0"), name
        assert torch.equal(first[name], first[name.replace("None", "0")])  # what one process draws
    assert first.keys() == second.keys()
    assert len(first) == 6


def test_the_warning_of_a_missing_clip_counts_steps(ranks: Any) -> None:
    assert ranks[0]["warnings"] == [0, 1]


@pytest.mark.parametrize("original", [True, False])
def test_flat_parameters_are_refused(ranks: Any, original: bool) -> None:
    assert "flat parameter of FullyShardedDataParallel" in ranks[0]["refusals"][f"FSDP1 {original}"]
    assert "fully_shard" in ranks[0]["refusals"][f"FSDP1 {original}"]


def test_the_decay_of_ranges_acts_here() -> None:
    """Without it the above would say nothing of it."""
    decayed, net = alone(), model()
    for layer in net.analog_layers():
        layer.rpu_config.pre_post.input_range.decay = 0.0
    train(net, adamw(net), batches())
    assert difference(decayed, whole(net.state_dict())) > 1e-3
