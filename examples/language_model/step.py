"""A step of the training: started from Python, or as one CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import recipe
import torch
from teacher import blocks_of
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

WAYS = ("python", "compiled", "graph", "compiled-graph")
"""``compiled``: Inductor fuses what is digital in the blocks of both models. ``graph``: nothing waits for Python."""
EAGER_STEPS = 3
"""Before a capture, as torch asks for: kernels are compiled and optimizer states made there."""


@dataclass
class Step:
    """Forwards of teacher and student, the backward, and what the optimizer does.

    Args:
        student: As it is trained, spread over processes or not.
        autocast: Whether both compute in bf16, with parameters in fp32.
        way: One of :data:`WAYS`.
    """

    student: Any
    teacher: Any
    optimizer: Optimizer
    autocast: bool
    way: str

    losses: Tensor = field(init=False)
    """Sum of the losses since it was last set to 0, on the device."""
    graph: torch.cuda.CUDAGraph | None = None
    until_capture: int = EAGER_STEPS

    def __post_init__(self) -> None:
        self.device = next(self.student.parameters()).device
        self.losses = torch.zeros((), device=self.device)
        self.distillation = recipe.distillation
        if self.way.startswith("compiled"):
            self.distillation = torch.compile(recipe.distillation)
            for block in (*blocks_of(getattr(self.student, "module", self.student)), *blocks_of(self.teacher)):
                block.compile()

    def __call__(self, tokens: Tensor, rate: float) -> None:
        """``tokens [B, length]``, of one shape in all steps, and the learning rate."""
        recipe.set_learning_rate(self.optimizer, rate)
        if not self.way.endswith("graph"):
            self._run(tokens.to(self.device, non_blocking=True))
            return
        if self.until_capture == EAGER_STEPS:
            self.tokens = tokens.to(self.device)
        self.tokens.copy_(tokens, non_blocking=True)
        if self.until_capture > 0:
            self.until_capture -= 1
            self._run_aside()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._run(self.tokens)
        self.graph.replay()

    def start_up_is_over(self, trained: Any) -> None:
        """Capture anew, where a graph has the start-up of input ranges in it, and would launch it for ever after."""
        if self.graph is not None:
            trained.load_state_dict(trained.state_dict())  # by which layers see it: they count no replays
            self.graph, self.until_capture = None, EAGER_STEPS

    def _run_aside(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run(self.tokens)
        torch.cuda.current_stream().wait_stream(aside)

    def _run(self, tokens: Tensor) -> None:
        self.optimizer.zero_grad()
        # Without the cache of casts, which a graph would fill from outside; every weight is used once anyway.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            with torch.no_grad():
                wanted = self.teacher(input_ids=tokens, use_cache=False).logits
            loss = self.distillation(self.student(input_ids=tokens, use_cache=False).logits, wanted)
        loss.backward()
        clip_grad_norm_(self.student.parameters(), recipe.LARGEST_GRADIENT)
        self.optimizer.step()
        self.losses += loss.detach()
