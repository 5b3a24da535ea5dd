"""The formulas written down in plain torch and compiled by Inductor: what one would do without any library."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.base import Peer, UnsupportedError
from bench.recipes import Recipe
from triton_analog import reference


class _InputConverter(torch.autograd.Function):
    """Clamp and round; the range's gradient asks for more range only, and decays while few inputs are clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, res: float, decay: float) -> Tensor:
        ctx.save_for_backward(x, r)
        ctx.decay = decay
        step = 2 * r / res
        return (x.clamp(-r, r) / step).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, r = ctx.saved_tensors
        wider = (
            torch.where(x >= r, grad.clamp(max=0), 0).float().sum()
            - torch.where(x <= -r, grad.clamp(min=0), 0).float().sum()
        )
        inside = (x.abs() < r).float().mean()
        dr = r * (wider + ctx.decay * (inside > 0.95))
        return grad * (x.abs() <= r), dr.to(r.dtype), None, None


class PlainAnalogLinear(nn.Linear):
    """A static range per slice, DAC, weight noise, output noise and ADC, as SEMANTICS states them."""

    def __init__(self, digital: nn.Linear, recipe: Recipe) -> None:
        super().__init__(digital.in_features, digital.out_features, device="meta")
        self.weight, self.bias = digital.weight, digital.bias
        self.recipe = dict(recipe)
        self.sizes = reference.split_sizes(self.in_features, recipe.get("mapping.max_input_size", -1))
        initial = recipe["pre_post.input_range.init_value"]
        self.input_range = nn.Parameter(torch.full((len(self.sizes),), initial, device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        get, total = self.recipe.get, 0.0
        parts = zip(
            input.split(self.sizes, -1), self.weight.split(self.sizes, 1), self.input_range.unbind(), strict=True
        )
        for x, w, r in parts:
            r = r.to(x.dtype)
            x = _InputConverter.apply(x, r, get("forward.inp_res"), get("pre_post.input_range.decay", 0.001))
            channel_max = w.detach().abs().amax(1)
            if get("modifier.noise_type", "NONE") != "NONE":
                scale = channel_max[:, None] if "PER_CHANNEL" in get("modifier.noise_type") else channel_max.amax()
                w = w + get("modifier.std_dev") * scale * torch.randn_like(w)
            y = x @ w.T
            if get("forward.out_noise", 0) > 0:
                scale = channel_max if get("forward.out_noise_per_channel", False) else channel_max.amax()
                y = y + get("forward.out_noise") / sqrt(len(self.sizes)) * r.detach() * scale * torch.randn_like(y)
            if get("forward.out_bound", 0) > 0:
                scale = channel_max if "PER_CHANNEL" in get("clip.type", "") else channel_max.amax()
                bound = get("forward.out_bound") * r.detach() * scale
                step = 2 * bound / get("forward.out_res")
                y = y + ((y / step).round() * step - y).detach()
                y = y.clamp(-bound, bound)
            total = total + y
        return total + self.bias


class Compiled(Peer):
    """It does not clip weights after a step."""

    name = "plain torch, compiled"

    def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
        if not isinstance(digital, nn.Linear):
            raise UnsupportedError("written for linear layers only")
        torch.compiler.reset()  # or the shapes before would count towards its limit of recompilations
        layer = PlainAnalogLinear(digital, recipe).train()
        layer.compile(dynamic=False)
        return layer
