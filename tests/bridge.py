"""What the tests of both directions of the bridge to AIHWKIT share: models with everything on, and their comparison."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from triton_analog import export_to_aihwkit
from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.convert import convert_to_analog
from triton_analog.nn.matrix import AnalogMatrixLayer

IN, HIDDEN, OUT, ROWS = 50, 21, 9, 40


def make_config(changes: dict[str, Any] | None = None) -> TorchInferenceRPUConfig:
    """Everything that acts in evaluation is on, except for what ``changes`` says by path."""
    config = TorchInferenceRPUConfig()
    defaults = {
        "mapping.max_input_size": 20,
        "forward.inp_res": 30,
        "forward.out_bound": 2.1234,  # so that no product lies half-way between two steps of the ADC
        "forward.out_res": 30,
        "pre_post.input_range.enable": True,
        "clip.sigma": 2.5,
    }
    return change(config, defaults | (changes or {}))


def change(config: Any, changes: dict[str, Any]) -> Any:
    """``config``, of either library, with the fields of ``changes``, by path; enums also by name."""
    for path, value in changes.items():
        *sections, field = path.split(".")
        section = config
        for name in sections:
            section = getattr(section, name)
        now = getattr(section, field)
        setattr(section, field, type(now)[value] if isinstance(value, str) else value)
    return config


IDEAL = {
    "forward.inp_res": -1,
    "forward.out_bound": 0.0,
    "forward.out_res": -1,
    "pre_post.input_range.enable": False,
}


def make_model(config: TorchInferenceRPUConfig, **options: Any) -> Any:
    """Two layers in evaluation, each slice with a range of its own, each learned clip in the midst of the weights."""
    digital = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=False))
    return disturb(convert_to_analog(digital, config, **options))


def disturb(model: Any) -> Any:
    for layer in model.modules():
        if isinstance(layer, AnalogMatrixLayer):
            with torch.no_grad():
                if layer.input_range is not None:
                    layer.input_range.uniform_(0.8, 2.0).mul_(torch.randn(layer.slices).sign())
                if layer.learnable_weight_clip is not None:
                    layer.learnable_weight_clip.mul_(torch.empty(layer.slices, layer.tile_shape[0]).uniform_(0.4, 1.2))
    return model.eval()


@torch.no_grad()
def assert_same_outputs(model: Any, exported: Any, x: Tensor | None = None) -> None:
    x = 1.5 * torch.randn(ROWS, IN) if x is None else x
    ours, theirs = model(x), exported(x)
    assert ours.shape == theirs.shape
    assert ours.std() > 0.05
    # Scaling in another order moves a value across a tie now and then, which the layers behind it see: one row in twenty.
    difference = (ours - theirs).abs().reshape(-1, ours.shape[-1]).amax(1)
    assert (difference > 1e-4 * ours.abs().max()).sum() <= len(difference) // 20
    assert difference.max() < 0.2 * ours.abs().max()


def quietly(model: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export_to_aihwkit(model, *args, **options)


def tiles_of(layer: Any) -> list[list[Any]]:
    return [list(row) for row in layer.analog_module.array]
