"""One matrix of many that are stacked in a parameter, on tiles of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.parts import Slot


class AnalogExpertMatrix(AnalogMatrixLayer):
    """The matrix of one expert: a linear layer whose weight and bias are parts of parameters of another module.

    Config, input ranges, clip, noise and their start-up are its own. A range learns from the rows of this expert alone, and
    a forward of the expert is one batch to it; an expert without rows runs none.

    Args:
        owner: Holds the parameters ``stack`` (``[E, N, K]``, or ``[E, K, N]`` if ``transposed``) and perhaps
            ``<stack>_bias [E, N]``.
        stack: Name of the parameter.
        index: Which of the ``E`` matrices.
        transposed: Whether the parameter is stored the other way round.
        rpu_config: What to simulate; the layer takes a copy.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
    """

    weight_index: int
    _owner: nn.Module
    _stack: str
    _given: dict[str, Tensor] | None

    def __init__(
        self,
        owner: nn.Module,
        stack: str,
        index: int,
        transposed: bool,
        rpu_config: TorchInferenceRPUConfig | None,
    ) -> None:
        super().__init__()
        # As plain attributes: the owner is above this layer, not below.
        vars(self).update(_owner=owner, _stack=stack, weight_index=index, CHANNEL_DIM=int(transposed), _given=None)
        self.init_analog(rpu_config)
        self.training = owner.training

    def _part(self, name: str) -> Any:
        if self._given is not None:
            return self._given.get(name)
        whole = getattr(self._owner, name, None)
        return None if whole is None else whole[self.weight_index]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``[N, K]``, or ``[K, N]`` if the parameter is transposed: a view of it."""
        return self._part(self._stack)

    @property
    def bias(self) -> Tensor | None:
        return self._part(f"{self._stack}_bias")

    @property
    def weight_name(self) -> str:
        return self._stack

    @property
    def bias_name(self) -> str:
        return f"{self._stack}_bias"

    def parameter_slots(self) -> list[Slot]:
        return [*super().parameter_slots(), *((self._owner, name) for name in (self.weight_name, self.bias_name))]

    @property
    def weight_source(self) -> nn.Parameter | None:
        return self._owner._parameters.get(self._stack)

    def _weight_sources(self) -> list[Tensor]:
        source = self.weight_source
        return [] if source is None else [source]

    @property
    def matrix(self) -> Tensor:
        """The weight as the tiles see it: ``[N, K]``."""
        return self.weight.T if self.CHANNEL_DIM else self.weight

    @property
    def in_features(self) -> int:
        return self.tile_shape[1]

    @property
    def out_features(self) -> int:
        return self.tile_shape[0]

    def reset_parameters(self) -> None:
        """The analog state anew; the weight is the owner's."""
        self.reset_analog_state()

    def forward(self, x: Tensor, given: dict[str, Tensor] | None = None) -> Tensor:
        """``x [..., K]`` to ``[..., N]``. ``given``: weight and bias by the names of their parameters, cut out by the caller
        for all experts at once: the gradients of all are then put together at once, too."""
        state = vars(self)
        state["_given"] = given
        try:
            return self.analog_matmul(x)
        finally:
            state["_given"] = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
