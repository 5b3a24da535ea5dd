"""DeepSpeed on two processes, where it is installed: its fp32 master weights are clipped, whichever rank holds their parts."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from helpers import results_of_ranks
from torch import nn

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType
from triton_analog.convert import convert_to_analog
from triton_analog.optim import AnalogOptimizer, attach

RANKS, STEPS, SIGMA, LR = 2, 3, 0.5, 0.1
SCHEMES = [(0, "bf16"), (1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")]


def engine_of(stage: int, dtype: str, kind: Any = None, ranges: bool = False) -> tuple[Any, Any, list[nn.Parameter]]:
    """A small model in DeepSpeed's engine, the optimizer that this makes, and the analog weights."""
    import deepspeed

    torch.manual_seed(0)
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, SIGMA
    config.pre_post.input_range.enable, config.pre_post.input_range.decay = ranges, 0.0
    net = convert_to_analog(nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)), config)
    groups = [{"params": list(layer.parameters())} for layer in net.analog_layers()]
    stepped = torch.optim.SGD(groups, lr=LR) if kind is None else kind(net.analog_layers, groups, lr=LR)
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.0}
    settings |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    settings |= {"zero_force_ds_cpu_optimizer": False, **({} if dtype == "fp32" else {dtype: {"enabled": True}})}
    engine, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=stepped, config=settings)
    return engine, optimizer, [layer.weight for layer in net.analog_layers()]


def train(stage: int, dtype: str, rank: int) -> list[list[list[torch.Tensor]]]:
    """In each step every weight, its master, and what the gradient made of the master before it was clipped."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    engine, optimizer, weights = engine_of(stage, dtype)
    handle = attach(engine, optimizer)
    assert handle.masters is not None
    torch.manual_seed(rank)
    rounds = []
    for _ in range(STEPS):
        x = torch.randn(3, 6, dtype=weights[0].dtype)
        engine.backward(engine(x).float().square().sum())
        stepped = [handle.masters.read(w) - LR * safe_get_full_grad(w).float() for w in weights]
        engine.step()
        masters = [handle.masters.read(w) for w in weights]
        with deepspeed.zero.GatheredParameters(weights):
            rounds.append([[value.detach().clone() for value in values] for values in (weights, masters, stepped)])
    assert handle.steps == STEPS
    return rounds


def changes(stage: int) -> list[torch.Tensor]:
    """Weights and ranges that were set, after a step of the masters whose gradient is 0."""
    engine, optimizer, _ = engine_of(stage, "bf16", ranges=True)
    for layer in engine.module.analog_layers():
        layer.rpu_config.clip.type = WeightClipType.NONE
    attach(engine, optimizer)
    for layer in engine.module.analog_layers():
        layer.set_weights(torch.full(layer.tile_shape, 0.75))
        layer.set_input_range(torch.full((1,), 2.5))
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    engine.backward(0 * engine(x).float().sum())
    engine.step()
    found = []
    for layer in engine.module.analog_layers():
        with layer.whole("weight", "input_range"):
            found += [layer.weight.float().clone(), layer.input_range.float().clone()]
    return found


def refusal() -> str:
    """Of an analog optimizer that nobody told of the masters."""
    engine, _, _ = engine_of(3, "bf16", partial(AnalogOptimizer, torch.optim.SGD))
    engine.backward(engine(torch.randn(3, 6, dtype=torch.bfloat16)).float().square().sum())
    try:
        engine.step()
    except ValueError as error:
        return str(error)
    return ""


def one_rank(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    for scheme in SCHEMES:
        results[(rank, *scheme)] = train(*scheme, rank)
    for stage in (2, 3):
        results["kept", stage, rank] = changes(stage)
    results["refusal", rank] = refusal()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> Any:
    """Of both ranks; one start of the processes for all tests."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an optional peer: pip install deepspeed")
    return results_of_ranks(one_rank, RANKS)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(("stage", "dtype"), SCHEMES)
def test_masters_are_clipped_once_after_each_step_and_the_weights_follow(
    results: Any, stage: int, dtype: str, rank: int
) -> None:
    for one_round in results[rank, stage, dtype]:
        for weight, master, stepped in zip(*one_round, strict=True):
            bound = SIGMA * stepped.std()
            assert (stepped.abs() > bound).any()
            torch.testing.assert_close(master, stepped.clamp(-bound, bound))
            assert torch.equal(weight, master.to(weight.dtype))


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_set_outlasts_the_next_step(results: Any, stage: int, rank: int) -> None:
    for weight, ranges in zip(*[iter(results["kept", stage, rank])] * 2, strict=True):
        assert torch.equal(weight, torch.full_like(weight, 0.75))
        assert torch.equal(ranges, torch.full_like(ranges, 2.5))


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_clip_that_masters_would_undo_is_refused(results: Any, rank: int) -> None:
    assert "call triton_analog.optim.attach(engine, optimizer)" in results["refusal", rank]
