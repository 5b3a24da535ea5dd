"""Four processes: hybrid and full sharding against one process, pipelines, and which ranks merge statistics."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import results_of_ranks
from test_sharded import EQUAL, analog, assert_equal, config, outcome, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, distribute_tensor

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType
from triton_analog.distributed import set_parallel, start_up_paused
from triton_analog.nn import AnalogLinear

RANKS, MICRO, STEPS = 4, 2, 3
CHECKS = (
    *("clip per channel", "clip", "quantize", "reset_weight_clip", "reset_parameters"),
    *("set_weights", "calibrate MOVING_STD", "train, clip"),
)
MESHES = {"full": (4,), "hybrid": (2, 2)}


def shard(model: Any, mesh: Any) -> Any:
    for child in model.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# ---- Pipelines ------------------------------------------------------------------------------------------------------------


def ranged(init_from_data: int) -> TorchInferenceRPUConfig:
    made = config(WeightClipType.NONE)
    made.pre_post.input_range.init_from_data = init_from_data
    made.pre_post.input_range.decay = 0.0
    return made


def stages(init_from_data: int) -> list[AnalogLinear]:
    torch.manual_seed(0)
    made = ranged(init_from_data)
    return [AnalogLinear(20, 6, rpu_config=made).double(), AnalogLinear(6, 5, rpu_config=made).double()]


def data(step: int) -> Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * (1 + step)


def state_of(stage: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stage.state_dict().items()}


def pipeline(mesh: Any, said: bool) -> dict[str, Tensor]:
    """The stage of this rank after some steps of two stages on two data-parallel ranks each, and its gradients."""
    place, part = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    stage = stages(STEPS * MICRO)[place]
    if said:
        set_parallel(stage, statistics=mesh["dp"])
    run = ScheduleGPipe(
        PipelineStage(stage, place, 2, torch.device("cpu"), group=mesh.get_group("pp")),
        MICRO,
        lambda y, _: y.square().mean(),
    )
    for step in range(STEPS):
        own = data(step)[part::2]
        run.step(own) if place == 0 else run.step(target=own)
    return state_of(stage)


def one_process() -> list[dict[str, Tensor]]:
    """Both stages, trained on batches of all ranks."""
    both = stages(STEPS * MICRO)
    set_parallel(nn.ModuleList(both), statistics=None)
    for step in range(STEPS):
        first, second = (data(step)[part::2].chunk(MICRO) for part in range(2))
        for micro in zip(first, second, strict=True):
            both[1](both[0](torch.cat(micro)))
    return [state_of(stage) for stage in both]


# ---- Groups ---------------------------------------------------------------------------------------------------------------


def unsaid_submesh(mesh: Any) -> None:
    """Sharded over a part of the ranks, and nothing said of the others."""
    model = shard(analog(ranged(2)), mesh["dp"])
    model(data(0))


def unsaid_tensors(mesh: Any) -> None:
    layer = stages(2)[0]
    for name, parameter in list(layer.named_parameters()):
        layer._parameters[name] = nn.Parameter(distribute_tensor(parameter.detach(), mesh["dp"], [Replicate()]))
    layer._statistics_group()


def beside(mesh: Any) -> None:
    set_parallel(stages(2)[0], statistics=mesh["pp", "dp"], tp=mesh["dp"])


def world(mesh: Any) -> None:
    set_parallel(stages(2)[0], statistics="world", tp=mesh["dp"])


def other_ranks(mesh: Any) -> None:
    groups = [dist.new_group([rank]) for rank in range(RANKS)]
    set_parallel(stages(2)[0], statistics=groups[(dist.get_rank() + 1) % RANKS])


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a mesh of a part": (unsaid_submesh, "sharded over 2 of 4 ranks, .*set_parallel"),
    "tensors on a mesh": (unsaid_tensors, "its parameters are DTensors, .*set_parallel"),
    "ranks with the same data": (beside, r"statistics: it holds the ranks \[\d\], which by tp see the same data"),
    "every rank": (world, r"statistics: it holds the ranks \[\d\], which by tp see the same data"),
    "others": (other_ranks, r"statistics: rank \d is not in it"),
    "a number": (lambda mesh: set_parallel(stages(2)[0], statistics=3), "statistics: got 3; a DeviceMesh"),
    "a digital model": (
        lambda mesh: set_parallel(nn.Linear(2, 2), statistics=None),
        "model: this Linear has no analog",
    ),
}


# ---- Four processes -------------------------------------------------------------------------------------------------------


def one_rank(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), RANKS, rank)
    for kind, shape in MESHES.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for name in CHECKS:
            run, made = EQUAL[name]
            one, sharded = analog(made), shard(analog(made), mesh)

            def check(run: Any = run, one: Any = one, sharded: Any = sharded) -> None:
                run(one)
                run(sharded)
                assert_equal(whole(sharded), one.state_dict())

            results["equal", kind, name, rank] = outcome(check)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    results["pipeline", rank] = mesh.get_local_rank("pp"), pipeline(mesh, said=True)
    for name, (run, _) in REFUSED.items():
        results["refused", name, rank] = outcome(lambda run=run: run(mesh))
    results["waits", rank] = outcome(
        lambda: pipeline(mesh, said=False)
    )  # the last, as the second stage has no input then


@pytest.fixture(scope="module")
def results() -> dict[Any, Any]:
    """Of all ranks; one start of the processes for all tests."""
    return results_of_ranks(one_rank, RANKS)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("kind", MESHES)
def test_four_ranks_do_what_one_process_does(results: dict[Any, Any], kind: str, name: str) -> None:
    assert [results["equal", kind, name, rank] for rank in range(RANKS)] == [""] * RANKS


def test_stages_of_a_pipeline_start_up_with_the_ranks_that_run_them(results: dict[Any, Any]) -> None:
    """The forward that finds shapes is no batch."""
    expected = one_process()
    for rank in range(RANKS):
        place, state = results["pipeline", rank]
        assert state["input_range_update_idx"].unique().tolist() == [STEPS * MICRO]
        assert_equal(state, expected[place])


def test_a_pipeline_of_which_nothing_was_said_does_not_wait_for_ever(results: dict[Any, Any]) -> None:
    for rank in (0, 1):
        assert re.search("other ranks run other stages .*set_parallel", results["waits", rank])


@pytest.mark.parametrize("name", REFUSED)
def test_ranks_that_do_not_fit_are_refused(results: dict[Any, Any], name: str) -> None:
    for rank in range(RANKS):
        assert re.search(REFUSED[name][1], results["refused", name, rank])


def test_a_dry_run_is_no_batch() -> None:
    layer = stages(2)[0]
    before = state_of(layer)
    with start_up_paused():
        layer(data(3))
    assert_equal(state_of(layer), before)
    layer(data(3))
    assert layer.input_range_update_idx.unique().tolist() == [1]
