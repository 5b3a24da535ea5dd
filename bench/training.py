"""A contender on a workload: held against the fp64 reference first, then ready to be timed and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.count import kernel_launches, peak_bytes, saved_bytes
from bench.peers.base import Peer, UnsupportedError
from bench.peers.ours import Ours
from bench.race import Gate, Step, disagreements, distance
from bench.recipes import is_noisy, quiet
from bench.workloads import Workload

GATE_ROWS, GATE_TEXTS = 256, 4
"""What a result is checked on: rows of the input (images, time steps), or sequences of tokens."""
NOISE = 1.25
"""Factor by which the strength of a contender's noise may differ from the reference's."""


@dataclass
class Prepared:
    """A contender that passed the gate."""

    step: Step
    forward: Step
    model: nn.Module
    x: Tensor
    defects: list[str]
    dtype: torch.dtype

    def counts(self) -> dict[str, int | None]:
        there = [self.x, *self.model.parameters(), *self.model.buffers()]
        return {
            "saved_bytes": saved_bytes(self.forward, there),
            "peak_bytes": peak_bytes(self.step, self.x.device),
            "launches": kernel_launches(self.step, self.x.device),
        }


def digital(workload: Workload, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same weights every time, rounded to the workload's own dtype whatever ``dtype`` is."""
    torch.manual_seed(0)
    return workload.build().to(workload.dtype).to(device=device, dtype=dtype)


def input_of(workload: Workload, dtype: torch.dtype, device: torch.device) -> Tensor:
    torch.manual_seed(1)
    x = workload.input().to(device)
    return x.to(workload.dtype).to(dtype).requires_grad_() if x.is_floating_point() else x


def for_gate(x: Tensor) -> Tensor:
    return x[: GATE_ROWS if x.is_floating_point() else GATE_TEXTS].detach()


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """Recurrent layers give their states as well."""
    result = model(x)
    return result[0] if isinstance(result, tuple) else result


def gradient_for(y: Tensor) -> Tensor:
    if y.ndim == 0:
        return torch.ones_like(y)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(y.shape, generator=generator).to(y)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of one step, by name."""
    x = x.detach().requires_grad_(x.is_floating_point())
    y = output_of(model, x)
    y.backward(gradient_for(y))
    found = {"output": y.detach()} | ({} if x.grad is None else {"input": x.grad})
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@dataclass
class Truth:
    """What the fp64 reference computes: without noise, and how much the noise changes its output (of a loss: not stated)."""

    analog: dict[str, Tensor]
    ideal: dict[str, Tensor]
    noise: float


def truth_of(workload: Workload, device: torch.device) -> Truth:
    def exact() -> nn.Module:
        return digital(workload, torch.float64, device)

    x = for_gate(input_of(workload, torch.float64, device))
    ours = Ours()
    analog = results(ours.convert(exact(), quiet(workload.recipe)), x)
    noise = 0.0
    if is_noisy(workload.recipe) and analog["output"].numel() > 1:
        noise = distance(output_of(ours.convert(exact(), workload.recipe), x), analog["output"])
    return Truth(analog, results(exact().train(), x), noise)


def prepare(workload: Workload, peer: Peer, truth: Truth, device: torch.device) -> Prepared:
    """The contender, if its results are right.

    Raises:
        WrongResultError: they are not.
        UnsupportedError: it cannot do this.
    """
    dtype = peer.dtype(workload.dtype)
    x = input_of(workload, dtype, device)
    few = for_gate(x)
    gate = Gate(peer.known_defects)
    right = truth.ideal if peer.ideal else truth.analog
    found = results(peer.convert(digital(workload, dtype, device), quiet(workload.recipe)), few)
    missing = [name for name in ("output", "input") if name in right and name not in found]
    if missing:
        raise UnsupportedError(f"no gradient of {' and '.join(missing)}")
    gate.refuse(disagreements(found, right, workload.tolerance))

    model = peer.convert(digital(workload, dtype, device), workload.recipe)
    if not peer.ideal:
        gate.refuse(noise_defects(model, few, truth, right["output"]))
    gate.refuse(changed_weights(model, few))
    optimizer = peer.optimizer(model) if workload.steps else None
    y = output_of(model, x)
    step = training_step(model, x, gradient_for(y.detach()), optimizer)
    del y
    return Prepared(step, lambda: output_of(model, x), model, x, gate.defects, dtype)


def noise_defects(model: nn.Module, x: Tensor, truth: Truth, right: Tensor) -> dict[str, str]:
    """Noise that is missing, or of another strength."""
    if truth.noise == 0:
        return {}
    noise = distance(output_of(model, x), right)
    if truth.noise / NOISE <= noise <= truth.noise * NOISE:
        return {}
    return {"noise": f"noise moves outputs by {noise:.2%} instead of {truth.noise:.2%}"}


def changed_weights(model: nn.Module, x: Tensor) -> dict[str, str]:
    """No forward may change a parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    output_of(model, x)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    return {"weights": f"a forward changes {', '.join(changed[:3])}"} if changed else {}


def training_step(model: nn.Module, x: Tensor, grad: Tensor, optimizer: Any) -> Callable[[], None]:
    parameters = list(model.parameters())

    def step() -> None:
        output_of(model, x).backward(grad)
        if optimizer is not None:
            optimizer.step()
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    return step
