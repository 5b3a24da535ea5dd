"""Data parallelism on two processes: ranges come from the global batch, so the ranks' parameters stay equal; noise does not.

Experts that only one of them has rows for start up alike on both, and none is without a gradient.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from triton_analog.config import TorchInferenceRPUConfig, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.nn import AnalogExperts, AnalogLinear
from triton_analog.optim import AnalogOptimizer

STEPS, ROWS, IN, OUT, RANKS = 6, 16, 20, 7, 2


def config(fast_mode: bool) -> TorchInferenceRPUConfig:
    made = TorchInferenceRPUConfig()
    made.mapping.max_input_size = 8
    made.forward.inp_res = 254
    made.pre_post.input_range.enable = True
    made.pre_post.input_range.fast_mode = fast_mode
    made.pre_post.input_range.init_from_data = 3
    return made


def batches() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, RANKS * ROWS, IN, generator=generator)
    x[:, ROWS:] *= 3  # the second rank sees larger inputs
    return x


def train(model, layer, inputs: Tensor) -> dict[str, Tensor]:
    optimizer = AnalogOptimizer(torch.optim.SGD, layer.analog_layers, model.parameters(), lr=0.1)
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {k: v.clone() for k, v in layer.state_dict().items() if isinstance(v, Tensor)}


def noise_of_steps(rank: int) -> Tensor:
    """The weight noise of two micro-batches in each of two steps, ``[2, 2, OUT, IN]``."""
    torch.manual_seed(rank)
    made = TorchInferenceRPUConfig()
    made.modifier.noise_type, made.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    made.modifier.refresh = WeightNoiseRefresh.STEP
    layer = AnalogLinear(IN, OUT, bias=False, rpu_config=made)
    model = DistributedDataParallel(layer)
    optimizer = AnalogOptimizer(torch.optim.SGD, layer.analog_layers, model.parameters(), lr=0.1)
    noise = []
    for _ in range(2):
        for _ in range(2):
            y = model(torch.eye(IN))
            y.sum().backward()
            noise.append(y.detach().T - layer.weight.detach())
        optimizer.step()
    return torch.stack(noise).unflatten(0, (2, 2))


class Experts(nn.Module):
    """As many as columns in ``ROUTES`` say."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2 * OUT, IN) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(4, IN, OUT) * 0.2)
        self.act_fn = nn.SiLU()


class Routed(nn.Module):
    """Rows of the first rank go to experts 0 and 1, later 0 and 2, those of the second to 0 and 3; recomputed in the backward."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tensor([0, 1 if self.step < 3 else 2]).expand(ROWS, 2)
        index = torch.cat([first, torch.tensor([0, 3]).expand(ROWS, 2)])
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.step += 1
        index = index[rank * ROWS :][: len(x)]
        return checkpoint(self.experts, x, index, torch.full(index.shape, 0.5), use_reentrant=False)


def routed() -> Routed:
    made = config(fast_mode=False)
    made.forward.inp_res = -1.0
    made.pre_post.input_range.decay = 0.0  # each rank with rows adds it, so that its mean is over all ranks
    torch.manual_seed(0)
    return Routed(AnalogExperts.from_digital(Experts(), made))


def one_rank(rank: int, port: int, layer: AnalogLinear, results: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    local = batches()[:, rank * ROWS : (rank + 1) * ROWS]
    layer = copy.deepcopy(layer)  # what a spawned process receives lies in memory that the ranks share
    results[rank] = train(DistributedDataParallel(layer), layer, local)
    results["noise", rank] = noise_of_steps(rank)
    experts = routed()
    results["experts", rank] = train(DistributedDataParallel(experts), experts.experts, local)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[False, True])
def ranks(request: pytest.FixtureRequest) -> Iterator[tuple[AnalogLinear, dict[Any, Any]]]:
    """A layer, and what both ranks found."""
    torch.manual_seed(0)
    layer = AnalogLinear(IN, OUT, rpu_config=config(request.param))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(one_rank, (port, copy.deepcopy(layer), results), nprocs=RANKS)
        yield layer, dict(results)


def assert_equal(ranks: list[dict[str, Tensor]], whole: dict[str, Tensor]) -> None:
    first, second = ranks
    assert first.keys() == second.keys() == whole.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], whole[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_ranks_agree_with_each_other_and_with_one_process_on_the_whole_batch(ranks):
    layer, results = ranks
    first, second = results[0], results[1]
    assert first["input_range_update_idx"].tolist() == [3, 3, 3]
    assert_equal([first, second], train(layer, layer, batches()))


def test_micro_batches_of_a_step_share_their_noise_and_ranks_do_not(ranks):
    noise = torch.stack([ranks[1]["noise", rank] for rank in range(RANKS)])
    torch.testing.assert_close(noise[:, :, 0], noise[:, :, 1])  # micro-batches of a step
    for one, other in ((noise[0], noise[1]), (noise[:, 0], noise[:, 1])):  # ranks, steps
        assert (one - other).abs().max() > 1e-3


def test_experts_agree_though_only_one_rank_has_rows_for_them(ranks):
    experts = routed()
    whole = train(experts, experts.experts, batches())
    assert whole["input_range_update_idx_gate_up_proj"][:, 0].tolist() == [3, 3, 3, 3]
    assert_equal([ranks[1]["experts", rank] for rank in range(RANKS)], whole)
