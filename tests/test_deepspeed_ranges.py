"""Input ranges under DeepSpeed's ZeRO on two processes, where it is installed, against one process with the global batch."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from helpers import results_of_ranks
from torch import Tensor, nn
from torch.optim import AdamW

from triton_analog import TorchInferenceRPUConfig, convert_to_analog
from triton_analog.optim import attach, parameter_groups

RANKS, STEPS, MICRO_BATCHES, ROWS, SIZE, START_UP = 2, 3, 2, 16, 12, 3
STAGES = (1, 2, 3)
CLOSE = 2e-6
"""Two ranks add fp32 up in another order than one process."""


def model(fast: bool) -> Any:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 6
    config.forward.inp_res = 254
    range_ = config.pre_post.input_range
    range_.enable, range_.init_from_data, range_.fast_mode = True, START_UP, fast
    range_.decay, range_.input_min_percentage = 0.5, 0.99
    torch.manual_seed(0)
    return convert_to_analog(nn.Sequential(nn.Linear(SIZE, 17), nn.ReLU(), nn.Linear(17, SIZE)), config)


def batches() -> Tensor:
    x = torch.randn(STEPS, MICRO_BATCHES, RANKS * ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    x[:, :, ROWS:] *= 3
    return x


def engine_of(net: Any, stage: int) -> tuple[Any, Any]:
    import deepspeed

    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": MICRO_BATCHES}
    settings |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    settings |= {"zero_force_ds_cpu_optimizer": False}
    optimizer = AdamW(parameter_groups(net, 0.1), lr=0.05)
    engine, wrapped, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    return engine, wrapped


def train(stage: int, fast: bool, local: Tensor) -> dict[str, Tensor]:
    import deepspeed

    net = model(fast)
    engine, optimizer = engine_of(net, stage)
    attach(engine, optimizer)
    for step in local:
        for x in step:
            engine.backward(engine(x).square().mean())
            engine.step()
    found = {}
    for name, parameter in net.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[name] = parameter.detach().clone()
    return found


def refusal(stage: int, local: Tensor) -> str:
    engine, _ = engine_of(model(False), stage)
    try:
        engine(local[0, 0])
    except RuntimeError as error:
        return str(error)
    return ""


def one_rank(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    local = batches()[:, :, rank * ROWS : (rank + 1) * ROWS]
    for stage in STAGES:
        for fast in (False, True):
            results[rank, stage, fast] = train(stage, fast, local)
        results[rank, stage, "refusal"] = refusal(stage, local)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> Any:
    """Of both ranks; one start of the processes for all tests."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an optional peer: pip install deepspeed")
    return results_of_ranks(one_rank, RANKS)


@pytest.mark.parametrize("fast", [False, True], ids=["", "fast mode"])
@pytest.mark.parametrize("stage", STAGES)
def test_start_up_and_decay_reach_the_masters(results: Any, stage: int, fast: bool) -> None:
    net = model(fast)
    optimizer = AdamW(parameter_groups(net, 0.1), lr=0.05)
    for step in batches():
        optimizer.zero_grad()
        for x in step:
            (net(x).square().mean() / MICRO_BATCHES).backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        first, second = (results[rank, stage, fast][name] for rank in range(RANKS))
        assert torch.equal(first, second), name
        torch.testing.assert_close(first, parameter.detach(), rtol=0, atol=CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_is_not_attached_is_refused_at_the_first_forward(results: Any, stage: int) -> None:
    assert "triton_analog.optim.attach(engine, optimizer)" in results[0, stage, "refusal"]
