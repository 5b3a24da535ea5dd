"""Data parallelism on two processes: ranges come from the global batch, so the ranks' parameters stay equal; noise does not."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from triton_analog.config import TorchInferenceRPUConfig, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.nn import AnalogLinear
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


def one_rank(rank: int, port: int, layer: AnalogLinear, results: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    local = batches()[:, rank * ROWS : (rank + 1) * ROWS]
    layer = copy.deepcopy(layer)  # what a spawned process receives lies in memory that the ranks share
    results[rank] = train(DistributedDataParallel(layer), layer, local)
    results["noise", rank] = noise_of_steps(rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("fast_mode", [False, True])
def test_ranks_agree_with_each_other_and_with_one_process_on_the_whole_batch(fast_mode):
    torch.manual_seed(0)
    layer = AnalogLinear(IN, OUT, rpu_config=config(fast_mode))
    alone = copy.deepcopy(layer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(one_rank, (port, layer, results), nprocs=RANKS)
        first, second = results[0], results[1]
        noise = torch.stack([results["noise", rank] for rank in range(RANKS)])
    whole = train(alone, alone, batches())
    assert first.keys() == second.keys() == whole.keys()
    assert first["input_range_update_idx"].tolist() == [3, 3, 3]
    for name in first:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], whole[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(noise[:, :, 0], noise[:, :, 1])  # micro-batches of a step
    for one, other in ((noise[0], noise[1]), (noise[:, 0], noise[:, 1])):  # ranks, steps
        assert (one - other).abs().max() > 1e-3
