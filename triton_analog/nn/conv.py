"""Convolutions on analog tiles, which multiply the patches of their input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd
from typing_extensions import Self

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.nn.base import the_input, traced_leaf
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.settings import refuse_config
from triton_analog.reference import Patches

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _AnalogConv(AnalogMatrixLayer):
    """What the convolutions of one, two and three dimensions share.

    The tiles of each group hold a matrix of ``in_features = in_channels / groups * prod(kernel_size)`` inputs, in the order of
    torch's weight, and ``out_channels / groups`` outputs; every place of the kernel is a row of inputs. Padding is part of
    the rows. The backward keeps what that of torch's layer keeps, not the rows.
    """

    DIGITAL: ClassVar[type[_ConvNd]]
    """The torch layer of the same rank."""
    RANK: ClassVar[int]

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[int, ...]
    padding_mode: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        rpu_config: TorchInferenceRPUConfig | None = None,
    ) -> None:
        refuse_config(locals())
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 1:
                raise ValueError(f"{name}: got {channels}; a tile needs at least 1")
            if groups < 1 or channels % groups:
                raise ValueError(f"groups: got {groups}; a number >= 1 that divides {name}, {channels}, is needed")
        self._check_sizes("kernel_size", kernel_size, least=1)
        self._check_sizes("stride", stride, least=1)
        self._check_sizes("dilation", dilation, least=1)
        if not isinstance(padding, str):
            self._check_sizes("padding", padding, least=0)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.init_analog(rpu_config)

    @classmethod
    def _check_sizes(cls, name: str, given: Any, least: int) -> None:
        sizes = tuple(given) if isinstance(given, tuple | list) else (given,) * cls.RANK
        if len(sizes) != cls.RANK or not all(isinstance(size, int) and size >= least for size in sizes):
            raise ValueError(f"{name}: got {given!r}; an int >= {least} or a tuple of {cls.RANK} of them is needed")

    @property
    def in_features(self) -> int:
        """Inputs of one group's tiles: ``in_channels / groups * prod(kernel_size)``."""
        return self.tile_shape[1]

    @property
    def out_features(self) -> int:
        """Outputs of all groups: ``out_channels``."""
        return self.tile_shape[0]

    @property
    def patches(self) -> Patches:
        """What the kernel sees of an input to which padding other than zeros was added."""
        padding = self._padding() if self.padding_mode == "zeros" else (0, 0) * self.RANK
        return Patches(self.kernel_size, self.stride, self.dilation, padding)

    def _padding(self) -> tuple[int, ...]:
        """Padding before and after each dimension, the last dimension first."""
        if self.padding == "valid":
            return (0, 0) * self.RANK
        pairs = []
        for dim in reversed(range(self.RANK)):
            if isinstance(self.padding, str):  # "same": an odd one goes to the end
                total = self.dilation[dim] * (self.kernel_size[dim] - 1)
                pairs += [total // 2, total - total // 2]
            else:
                pairs += [self.padding[dim]] * 2
        return tuple(pairs)

    def tile_rows(self, x: Tensor) -> Tensor:
        """The patches of ``x [B, in_channels, *size]``: rows ``[B * places, in_channels * prod(kernel_size)]``."""
        return self.patches.unfold(x)

    def take_shape(self) -> None:
        outputs, inputs, *kernel = self.weight.shape
        if tuple(kernel) != self.kernel_size or outputs % self.groups:
            raise ValueError(
                f"weight: got shape {tuple(self.weight.shape)}; a kernel of {self.kernel_size} and a number of outputs that the "
                f"{self.groups} group(s) divide are needed"
            )
        self.out_channels, self.in_channels = outputs, inputs * self.groups

    def forward(self, input: Tensor | None = None, *, inp: Tensor | None = None) -> Tensor:
        """``input [B, in_channels, *size]`` to ``[B, out_channels, *size]``, both also without ``B``; ``inp`` is another name.

        Raises:
            TypeError: ``input`` is no floating-point tensor, or of another dtype than the weight outside autocast.
            ValueError: another number of dimensions or channels, or an input that is too small.
        """
        if input.__class__ is not Tensor and isinstance(input, Proxy):
            return traced_leaf(self, input)
        if input is None or inp is not None:
            input = the_input(input, inp)
        batched = input.ndim != self.RANK + 1
        x = input if batched else input.unsqueeze(0)
        if self.padding_mode != "zeros" and x.ndim == self.RANK + 2:  # any other input is refused below
            x = F.pad(x, self._padding(), mode=self.padding_mode)
        y = self.analog_matmul(x).movedim(-1, 1)
        # The memory layout that torch's layer would choose: a view(batch, -1) of the output is common.
        if x.is_contiguous() or not x.is_contiguous(memory_format=_CHANNELS_LAST.get(x.ndim, torch.contiguous_format)):
            y = y.contiguous()
        return y if batched else y.squeeze(0)

    @classmethod
    def from_digital(cls, module: _ConvNd, rpu_config: TorchInferenceRPUConfig) -> Self:
        """An analog layer with the very parameters of ``module``, in its mode and on its device.

        Raises:
            ConfigError: ``rpu_config`` is not valid.
            TypeError: ``module`` is no torch convolution of this rank.
            ValueError: the weight of ``module`` is computed from other parameters, or empty.
        """
        if not isinstance(module, cls.DIGITAL):
            raise TypeError(f"module: got {type(module).__name__}; a torch.nn.{cls.DIGITAL.__name__} is needed")
        layer = cls(**_arguments(module), rpu_config=rpu_config)
        layer.take_parameters(module)
        return layer

    @classmethod
    def to_digital(cls, module: _AnalogConv) -> Any:
        """A torch layer with the very parameters of the analog ``module``, in its mode; ranges and clip are left behind."""
        layer = cls.DIGITAL(**_arguments(module))
        own: Any = module._parameters
        layer.weight, layer.bias = own["weight"], own["bias"]
        layer.training = module.training
        return layer


def _arguments(module: Any) -> dict[str, Any]:
    """What makes a convolution like ``module``, on no device and without a bias."""
    names = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    )
    return {name: getattr(module, name) for name in names} | {"bias": False, "device": "meta"}


class AnalogConv1d(_AnalogConv, nn.Conv1d):
    """``torch.nn.Conv1d`` computed on analog tiles.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: As torch's. ``padding``
            is also ``"same"`` or ``"valid"``, ``padding_mode`` also ``"reflect"``, ``"replicate"`` or ``"circular"``. Each
            group has tiles, and input ranges, of its own, whose products are launched one after the other.
        device: Where the parameters are created.
        dtype: Their dtype: float32, bfloat16, float16 or float64.
        rpu_config: What to simulate; the layer takes a copy. ``mapping.max_input_size`` counts elements of patches.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
        ValueError: no channels or kernel, which torch allows but tiles cannot have, or numbers outside the above.
    """

    DIGITAL, RANK = nn.Conv1d, 1


class AnalogConv2d(_AnalogConv, nn.Conv2d):
    """``torch.nn.Conv2d`` computed on analog tiles; arguments and errors are those of :class:`AnalogConv1d`."""

    DIGITAL, RANK = nn.Conv2d, 2


class AnalogConv3d(_AnalogConv, nn.Conv3d):
    """``torch.nn.Conv3d`` computed on analog tiles; arguments and errors are those of :class:`AnalogConv1d`."""

    DIGITAL, RANK = nn.Conv3d, 3
