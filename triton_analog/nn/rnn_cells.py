"""One time step of a recurrent layer on analog tiles."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.nn.containers import AnalogContainerBase
from triton_analog.nn.linear import AnalogLinear
from triton_analog.nn.one_forward import OneForward
from triton_analog.nn.settings import refuse_config

State = tuple[Tensor, ...]
"""The hidden state of a cell, then its cell state if it has one; each ``[B, size]``."""

Shared = Mapping[str, OneForward]
"""What the steps of a sequence share of each product, by its name."""

NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu}


class LSTMState(NamedTuple):
    """The state of any cell: hidden state ``hx [B, H]`` (``[B, P]`` with a projection), and ``cx [B, H]`` of an LSTM."""

    hx: Tensor
    cx: Tensor | None = None


fused_lstm = torch.ops.aten._thnn_fused_lstm_cell.default
fused_gru = torch.ops.aten._thnn_fused_gru_cell.default


def is_fused(gates_x: Tensor, gates_h: Tensor, state: Tensor) -> bool:
    """Whether torch does with the gates all that is left to do in one kernel, and in one more in the backward.

    It has such kernels on GPUs; compilers make their own from the plain operations.
    """
    one_dtype = gates_x.dtype == gates_h.dtype == state.dtype
    return gates_x.is_cuda and one_dtype and gates_x.numel() > 0 and not torch.compiler.is_compiling()


class AnalogRNNCellBase(AnalogContainerBase):
    """A cell of :class:`AnalogRNN`: a step is split into a part for all time steps at once and the recurrent part.

    A subclass creates its products, each an ``AnalogLinear`` called ``weight_...`` as torch calls the matrix, sets
    ``state_sizes``, and defines :meth:`step`; :meth:`project_input` too unless it has a product ``weight_ih``.
    """

    state_sizes: tuple[int, ...]
    """Width of the hidden state, and of the cell state if there is one."""

    weight_ih: AnalogLinear

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.state_sizes = (hidden_size,)

    def project_input(self, input: Tensor) -> Tensor:
        """What of a step does not depend on the state: ``input [rows, I]``, rows of any time steps, to ``[rows, ...]``."""
        return self.weight_ih(input)

    def step(self, projected: Tensor, state: State, shared: Shared) -> State:
        """The state after ``state``, given ``[B, ...]`` of :meth:`project_input`.

        Each product is called with ``shared.get(<its name>)``: in a sequence that holds what is shared by all steps.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def forward(self, input: Tensor, state: LSTMState | tuple[Tensor, Tensor | None]) -> tuple[Tensor, LSTMState]:
        """``input [B, I]`` and the state before it, to the output (the hidden state) and the state after it."""
        known = tuple(part for part in state if part is not None)
        after = LSTMState(*self.step(self.project_input(input), known, {}))
        return after.hx, after

    def get_zero_state(self, batch_size: int) -> LSTMState:
        """A state of zeros for ``batch_size`` rows, in the dtype and on the device of the parameters."""
        like = next(self.parameters())
        return LSTMState(*(like.new_zeros(batch_size, size) for size in self.state_sizes))


class AnalogVanillaRNNCell(AnalogRNNCellBase):
    """The cell of ``torch.nn.RNN``: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    Args:
        input_size: Size ``I`` of each input.
        hidden_size: Size ``H`` of the state.
        bias: Whether both products have a (digital) bias.
        device: Where the parameters are created.
        dtype: Their dtype.
        rpu_config: What both products simulate; each takes a copy.
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
        ValueError: a size or ``nonlinearity`` outside the above.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        rpu_config: TorchInferenceRPUConfig | None = None,
        nonlinearity: str = "tanh",
    ) -> None:
        refuse_config(locals())
        super().__init__(input_size, hidden_size)
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity: got {nonlinearity!r}; allowed are {', '.join(map(repr, NONLINEARITIES))}")
        self.nonlinearity = nonlinearity
        product = partial(AnalogLinear, bias=bias, device=device, dtype=dtype, rpu_config=rpu_config)
        self.weight_ih = product(input_size, hidden_size)
        self.weight_hh = product(hidden_size, hidden_size)

    def step(self, projected: Tensor, state: State, shared: Shared) -> State:
        return (NONLINEARITIES[self.nonlinearity](projected + self.weight_hh(state[0], shared.get("weight_hh"))),)


class AnalogGRUCell(AnalogRNNCellBase):
    """The cell of ``torch.nn.GRU``, with its gates in the order reset, update, new.

    ``r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh)``, ``n = tanh(W_in x + b_in + r * (W_hn h + b_hn))``,
    ``h' = n + z * (h - n)``.

    Args:
        input_size, hidden_size, bias, device, dtype, rpu_config: As for :class:`AnalogVanillaRNNCell`.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
        ValueError: a size below 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        rpu_config: TorchInferenceRPUConfig | None = None,
    ) -> None:
        refuse_config(locals())
        super().__init__(input_size, hidden_size)
        product = partial(AnalogLinear, bias=bias, device=device, dtype=dtype, rpu_config=rpu_config)
        self.weight_ih = product(input_size, 3 * hidden_size)
        self.weight_hh = product(hidden_size, 3 * hidden_size)

    def step(self, projected: Tensor, state: State, shared: Shared) -> State:
        (h,) = state
        hidden = self.weight_hh(h, shared.get("weight_hh"))
        if is_fused(projected, hidden, h):
            return (fused_gru(projected, hidden, h)[0],)
        split = (2 * self.hidden_size, self.hidden_size)
        gates_x, new_x = projected.split(split, dim=1)
        gates_h, new_h = hidden.split(split, dim=1)
        reset, update = torch.sigmoid(gates_x + gates_h).chunk(2, dim=1)
        new = torch.tanh(new_x + reset * new_h)
        return (new + update * (h - new),)


class _LSTMCell(AnalogRNNCellBase):
    """What both LSTM cells do with their gates."""

    weight_hr: AnalogLinear | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        rpu_config: TorchInferenceRPUConfig | None = None,
        proj_size: int = 0,
    ) -> None:
        refuse_config(locals())
        super().__init__(input_size, hidden_size)
        if not 0 <= proj_size < hidden_size:
            raise ValueError(f"proj_size: got {proj_size}; allowed are 0 (none) to hidden_size - 1 = {hidden_size - 1}")
        self.proj_size = proj_size
        self.state_sizes = (proj_size or hidden_size, hidden_size)
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype, "rpu_config": rpu_config}
        self.create_products(self.state_sizes[0], **options)
        self.weight_hr = AnalogLinear(hidden_size, proj_size, **{**options, "bias": False}) if proj_size else None

    def create_products(self, recurrent_size: int, **options: Any) -> None:
        """Create the products that make the gates, from ``I`` inputs and ``recurrent_size`` hidden ones."""
        raise NotImplementedError

    def update(self, gates: Tensor, c: Tensor) -> State:
        """``[B, H]`` of the output before its projection and of the next cell state, from gates ``[B, 4 * H]`` in torch's order:
        input, forget, cell, output."""
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def project_output(self, h: Tensor, c: Tensor, shared: Shared) -> State:
        """The next state, of what :meth:`update` gave."""
        return (h if self.weight_hr is None else self.weight_hr(h, shared.get("weight_hr")), c)


class AnalogLSTMCell(_LSTMCell):
    """The cell of ``torch.nn.LSTM``, with its gates in the order input, forget, cell, output.

    ``i, f, g, o = W_ih x + b_ih + W_hh h + b_hh``, ``c' = sigmoid(f) * c + sigmoid(i) * tanh(g)``,
    ``h' = sigmoid(o) * tanh(c')``; with ``proj_size``, a third product ``W_hr`` (without bias) follows: ``h' = W_hr h'``.

    Args:
        input_size, hidden_size, bias, device, dtype, rpu_config: As for :class:`AnalogVanillaRNNCell`.
        proj_size: Size ``P < H`` of the hidden state after its projection; 0: no projection.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
        ValueError: a size outside the above.
    """

    def create_products(self, recurrent_size: int, **options: Any) -> None:
        self.weight_ih = AnalogLinear(self.input_size, 4 * self.hidden_size, **options)
        self.weight_hh = AnalogLinear(recurrent_size, 4 * self.hidden_size, **options)

    def step(self, projected: Tensor, state: State, shared: Shared) -> State:
        h, c = state
        hidden = self.weight_hh(h, shared.get("weight_hh"))
        if is_fused(projected, hidden, c):
            h, c, _ = fused_lstm(projected, hidden, c)
        else:
            h, c = self.update(projected + hidden, c)
        return self.project_output(h, c, shared)


class AnalogLSTMCellCombinedWeight(_LSTMCell):
    """:class:`AnalogLSTMCell` with one matrix ``weight`` for input and hidden state, ``[4 * H, I + H]``, and one bias.

    Input and hidden state then share the tiles and their input ranges, and the whole product is computed step by step.

    Args:
        input_size, hidden_size, bias, device, dtype, rpu_config, proj_size: As for :class:`AnalogLSTMCell`; the matrix is
            ``[4 * H, I + P]`` with a projection.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
        ValueError: a size outside the above.
    """

    def create_products(self, recurrent_size: int, **options: Any) -> None:
        self.weight = AnalogLinear(self.input_size + recurrent_size, 4 * self.hidden_size, **options)

    def project_input(self, input: Tensor) -> Tensor:
        """``input`` itself: nothing of the product can do without the hidden state."""
        return input

    def step(self, projected: Tensor, state: State, shared: Shared) -> State:
        h, c = state
        h, c = self.update(self.weight(torch.cat((projected, h), dim=1), shared.get("weight")), c)
        return self.project_output(h, c, shared)
