"""The linear layer of GPT-2 and its kin, which Hugging Face calls Conv1D, on analog tiles."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from typing_extensions import Self

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.nn.base import traced_leaf
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.settings import refuse_config


class AnalogHFConv1D(AnalogMatrixLayer, nn.Module):
    """``transformers.pytorch_utils.Conv1D`` computed on analog tiles: a linear layer with a transposed weight.

    Its ``weight [nx, nf]`` stays as it is stored, so that checkpoints and ties keep fitting; the tiles see its transpose. It is
    an instance of Hugging Face's class, by which other libraries choose what to do with a layer, wherever that has been imported.

    Args:
        nf: Size ``N`` of each output.
        nx: Size ``K`` of each input.
        device: Where the parameters are created.
        dtype: Their dtype: float32, bfloat16, float16 or float64.
        rpu_config: What to simulate; the layer takes a copy.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
        ValueError: no inputs or no outputs.
    """

    CHANNEL_DIM = 1

    def __init__(
        self,
        nf: int,
        nx: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        rpu_config: TorchInferenceRPUConfig | None = None,
    ) -> None:
        refuse_config(locals())
        for name, size in (("nf", nf), ("nx", nx)):
            if size < 1:
                raise ValueError(f"{name}: got {size}; a tile needs at least 1")
        _become_hugging_faces()
        nn.Module.__init__(self)  # Hugging Face's would make parameters of its own
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(nf, device=device, dtype=dtype))
        self.init_analog(rpu_config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight normal with deviation 0.02 and the bias 0, and the analog state anew."""
        with self.whole("weight", "bias", write=True, of_first=True):
            nn.init.normal_(self.weight, std=0.02)
            nn.init.zeros_(self.bias)
        self.reset_analog_state()

    @property
    def matrix(self) -> Tensor:
        """The weight as the tiles see it: ``[N, K]``."""
        return self.weight.T

    @property
    def in_features(self) -> int:
        """``nx``"""
        return self.nx

    @property
    def out_features(self) -> int:
        """``nf``"""
        return self.nf

    def take_shape(self) -> None:
        self.nx, self.nf = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., nx]`` to ``[..., nf]``."""
        if x.__class__ is not Tensor and isinstance(x, Proxy):
            return traced_leaf(self, x)
        return self.analog_matmul(x)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _become_hugging_faces()
        super().__setstate__(state)

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"

    @classmethod
    def from_digital(cls, module: Any, rpu_config: TorchInferenceRPUConfig) -> Self:
        """An analog layer with the very parameters of ``module``, in its mode and on its device.

        Raises:
            ConfigError: ``rpu_config`` is not valid.
            TypeError: ``module`` has no ``weight [nx, nf]`` and ``bias [nf]``.
            ValueError: the weight of ``module`` is computed from other parameters, or empty.
        """
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not (isinstance(weight, Tensor) and isinstance(bias, Tensor) and bias.shape == weight.shape[1:]):
            raise TypeError(f"module: got {type(module).__name__}; a transformers.pytorch_utils.Conv1D is needed")
        nx, nf = weight.shape
        layer = cls(nf, nx, device="meta", rpu_config=rpu_config)
        layer.take_parameters(module)
        return layer

    @classmethod
    def to_digital(cls, module: AnalogHFConv1D) -> nn.Module:
        """Hugging Face's layer with the very parameters of the analog ``module``, in its mode.

        Raises:
            ImportError: ``transformers`` is not installed.
        """
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D.__new__(Conv1D)
        nn.Module.__init__(layer)
        layer.nf, layer.nx = module.nf, module.nx
        own: Any = module._parameters
        layer.weight, layer.bias = own["weight"], own["bias"]
        layer.training = module.training
        return layer


def _become_hugging_faces() -> None:
    """Make Hugging Face's class a base of the one here, if anything has imported it.

    Only then can anything ask for it; to import it would take seconds, and may not be possible. A subclass of both for such
    processes would be another class than the one that other processes know and pickle.
    """
    hugging_face: Any = sys.modules.get("transformers.pytorch_utils")
    if hugging_face is not None and not issubclass(AnalogHFConv1D, hugging_face.Conv1D):
        AnalogHFConv1D.__bases__ = (AnalogMatrixLayer, hugging_face.Conv1D)
