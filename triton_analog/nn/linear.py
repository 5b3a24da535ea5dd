"""A fully connected layer on analog tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from typing_extensions import Self

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.nn.base import the_input, traced_leaf
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.one_forward import OneForward
from triton_analog.nn.settings import refuse_config


class AnalogLinear(AnalogMatrixLayer, nn.Linear):
    """``torch.nn.Linear`` computed on analog tiles.

    Args:
        in_features: Size ``K`` of each input.
        out_features: Size ``N`` of each output.
        bias: Whether to add a (digital) bias ``[N]``.
        device: Where the parameters are created.
        dtype: Their dtype: float32, bfloat16, float16 or float64.
        rpu_config: What to simulate; the layer takes a copy.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
        ValueError: no inputs or no outputs, which torch allows but tiles cannot have.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        rpu_config: TorchInferenceRPUConfig | None = None,
    ) -> None:
        refuse_config(locals())
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name}: got {size}; a tile needs at least 1")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.init_analog(rpu_config)

    def forward(
        self, input: Tensor | None = None, one_forward: OneForward | None = None, *, inp: Tensor | None = None
    ) -> Tensor:
        """``input [..., K]`` to ``[..., N]``; calls with the same ``one_forward`` are one forward with one weight.

        ``inp`` is another name for ``input``.
        """
        if input.__class__ is not Tensor and isinstance(input, Proxy):
            return traced_leaf(self, input)
        if input is None or inp is not None:
            input = the_input(input, inp)
        return self.analog_matmul(input, one_forward)

    def take_shape(self) -> None:
        self.out_features, self.in_features = self.weight.shape

    @classmethod
    def from_digital(cls, module: nn.Linear, rpu_config: TorchInferenceRPUConfig) -> Self:
        """An analog layer with the very parameters of ``module``, in its mode and on its device.

        Raises:
            ConfigError: ``rpu_config`` is not valid.
            TypeError: ``module`` is no ``torch.nn.Linear``.
            ValueError: the weight of ``module`` is computed from other parameters, or empty.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module: got {type(module).__name__}; a torch.nn.Linear is needed")
        layer = cls(module.in_features, module.out_features, device="meta", bias=False, rpu_config=rpu_config)
        layer.take_parameters(module)
        return layer

    @classmethod
    def to_digital(cls, module: AnalogLinear) -> nn.Linear:
        """A torch layer with the very parameters of the analog ``module``, in its mode; ranges and clip are left behind."""
        layer = nn.Linear(module.in_features, module.out_features, device="meta", bias=False)
        own: Any = module._parameters
        layer.weight, layer.bias = own["weight"], own["bias"]
        layer.training = module.training
        return layer
