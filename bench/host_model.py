"""A training step of a whole model, started in the ways that torch has: the host's part of it is larger or smaller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bench.host import not_run
from bench.models import SMOLLM2
from bench.peers.base import Peer
from bench.peers.digital import Digital
from bench.peers.ours import Ours
from bench.race import Turn, WrongResultError, distance, take_turns, waiting_turn
from bench.results import Result, failed, fill_times
from bench.training import digital, input_of
from bench.workloads import Workload, model

WORKLOAD = model(SMOLLM2, 8, 1024, torch.bfloat16)
GROUP = "host, model"
DIGITAL, OURS = Digital(), Ours()
FROM_PYTHON = "from Python"
LOSS = 0.05
"""How far the loss of a way may be from the model's own, which noise changes by less."""

TrainingStep = Callable[[], Tensor]
"""Gives the loss."""
Run = Callable[[], Tensor]


def training_step(run: Run, optimizer: torch.optim.Optimizer) -> TrainingStep:
    def step() -> Tensor:
        loss = run()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ---- Ways ------------------------------------------------------------------------------------------------------------


def from_python(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> TrainingStep:
    return training_step(lambda: net(x), optimizer)


def compiled(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> TrainingStep:
    by_inductor = torch.compile(net)
    return training_step(lambda: by_inductor(x), optimizer)


def compiled_into_graphs(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> TrainingStep:
    by_inductor = torch.compile(net, mode="reduce-overhead")

    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return by_inductor(x)

    return training_step(run, optimizer)


def as_graph(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> TrainingStep:
    """The whole step in one graph, captured at the first call."""
    step, graph, loss = from_python(net, x, optimizer), torch.cuda.CUDAGraph(), None

    def replay() -> Tensor:
        nonlocal loss
        if loss is None:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph):
                loss = step()
        graph.replay()
        return loss

    return replay


WAYS = {
    FROM_PYTHON: from_python,
    "one CUDA graph": as_graph,
    "compiled": compiled,
    "compiled, reduce-overhead": compiled_into_graphs,
}
"""Those that take long to compile come last."""

# ---- The race --------------------------------------------------------------------------------------------------------


def prepare(workload: Workload, peer: Peer, way: str, device: torch.device) -> tuple[TrainingStep, float]:
    """A training step, and the seconds that the first one took.

    Raises:
        WrongResultError: its loss is not the model's.
    """
    net = peer.convert(digital(workload, workload.dtype, device), workload.recipe)
    x = input_of(workload, workload.dtype, device)
    step = WAYS[way](net, x, peer.optimizer(net, fused=True, capturable=device.type == "cuda"))
    start = time.perf_counter()
    loss = step().item()  # waits for the device
    first = time.perf_counter() - start
    for _ in range(3):  # graphs of compiled code are recorded in the second or third
        loss = step().item()
    with torch.no_grad():
        off = distance(torch.tensor(loss), net(x))
    if off > LOSS:
        raise WrongResultError(f"the loss is off by {off:.0%}")
    return step, first


def race(way: str, seconds: float, device: torch.device) -> list[Result]:
    """Digital and analog in one way, beside the digital step that Python starts."""
    entry = partial(Result, "host", GROUP, f"{WORKLOAD.name}, {way}", 0, dtype="bfloat16")
    found: dict[str, Result] = {}
    turns: dict[str, Turn] = {}
    for peer, own_way in dict.fromkeys([(DIGITAL, FROM_PYTHON), (DIGITAL, way), (OURS, way)]):
        name = f"{peer.name}, {own_way}"
        result = found[name] = entry(name)
        try:
            step, result.first_seconds = prepare(WORKLOAD, peer, own_way, device)
            turns[name] = waiting_turn(step)
        except Exception as error:  # a contender's failure is a result
            failed(result, error)
    fill_times(found, take_turns(turns, seconds))
    torch._dynamo.reset()  # or its code would hold the models
    return list(found.values())


def races(device: torch.device) -> Iterator[tuple[str, Callable[[float], list[Result]]]]:
    if device.type != "cuda":
        yield GROUP, partial(not_run, GROUP, "there is no GPU")
        return
    for way in WAYS:
        yield f"{GROUP}: {WORKLOAD.name}, {way}", partial(race, way, device=device)
