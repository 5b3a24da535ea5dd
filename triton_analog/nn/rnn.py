"""Recurrent layers on analog tiles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Self

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.functional import input_dtype
from triton_analog.nn import rnn_digital as digital
from triton_analog.nn import rnn_states as forms
from triton_analog.nn.base import the_input, traced_leaf
from triton_analog.nn.containers import AnalogContainerBase
from triton_analog.nn.linear import AnalogLinear
from triton_analog.nn.parts import uneven_files
from triton_analog.nn.rnn_cells import AnalogRNNCellBase, State
from triton_analog.nn.rnn_layers import ModularRNN, arranged
from triton_analog.nn.rnn_names import inner_name, load_torch_names, save_torch_names
from triton_analog.nn.rnn_sequence import in_form_of, rows_of, run, run_reverse
from triton_analog.nn.settings import refuse_config


class AnalogRNN(AnalogContainerBase):
    """``torch.nn.RNN``, ``LSTM`` or ``GRU``, after the class of its cells, with all products on analog tiles.

    Every matrix is an ``AnalogLinear`` of its own, ``rnn.cells["l0_reverse"].weight_hh`` for example, named as torch names
    layers. Their forwards decide what noise and statistics see:

    - A sequence is one forward: the weight of each matrix is clipped, quantized and disturbed once per call, and all time
      steps meet the same one, in the backward too. Output noise is new in each step.
    - The input projection ``weight_ih`` is one product for all time steps: the start-up of its input range counts a call as
      one batch, of ``T * B`` rows.
    - The hidden projection ``weight_hh`` (with ``proj_size`` also ``weight_hr``, and the one matrix of the combined cell) is a
      product per time step, and each step counts as a batch. Hidden states that are all zero, as the first of a sequence
      mostly is, teach a range nothing.

    A cell called on its own is a forward of its own. ``modifier.refresh = WeightNoiseRefresh.STEP`` keeps the weight noise
    from call to call. Rows that a packed sequence does not have are neither computed nor counted.

    Where the weight that the steps share differs from the stored one it takes memory from the forward of the sequence to the
    end of its backward: one more weight for each matrix but ``weight_ih``, in the dtype of the inputs.

    ``torch.compile`` makes one graph of a call, with the loop over its ``T`` steps unrolled, so that each ``T`` is compiled
    anew; a packed sequence, whose lengths are data, breaks the graph.

    The state dict has torch's names: ``weight_ih_l0``, ``bias_hh_l1_reverse``, ``weight_hr_l0``; whatever else a product saves
    is named alike, such as ``input_range_ih_l0`` and its config ``_extra_state_ih_l0`` (and ``weight_l0``, ``bias_l0``,
    ``input_range_l0`` for the combined cell). State dicts of torch's layers load, into the combined cell too, and those of
    AIHWKIT-Lightning.

    Args:
        cell: ``AnalogVanillaRNNCell``, ``AnalogLSTMCell``, ``AnalogLSTMCellCombinedWeight`` or ``AnalogGRUCell``.
        input_size: Size ``I`` of each input.
        hidden_size: Size ``H`` of the state.
        num_layers: Layers on top of each other.
        bias: Whether products have a (digital) bias.
        batch_first: Whether inputs and outputs are ``[B, T, ...]`` instead of ``[T, B, ...]``; states are not concerned.
        bidir: Whether a second cell in each layer runs backwards; outputs are concatenated.
        dropout: Probability of dropout on the outputs of every layer but the last; training only.
        proj_size: Size ``P < H`` of the projected hidden state of LSTM cells; 0: no projection.
        xavier: Initialise weights by Xavier's rule and biases with 0, instead of uniformly in ``+- 1 / sqrt(H)``.
        device: Where the parameters are created.
        dtype: Their dtype: float32, bfloat16, float16 or float64.
        rpu_config: What to simulate; every product takes a copy.
        nonlinearity: ``"tanh"`` or ``"relu"``, for the vanilla cell.

    Raises:
        ConfigError: ``rpu_config`` is missing or not valid.
        TypeError: ``cell`` is something else.
        ValueError: a size or probability outside the above, or an option that the cell does not have.
    """

    def __init__(
        self,
        cell: type[AnalogRNNCellBase],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidir: bool = False,
        dropout: float = 0.0,
        proj_size: int = 0,
        xavier: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        rpu_config: TorchInferenceRPUConfig | None = None,
        *,
        nonlinearity: str = "tanh",
    ) -> None:
        refuse_config(locals())
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if size < 1:
                raise ValueError(f"{name}: got {size}; at least 1 is needed")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: got {dropout!r}; a probability in 0 .. 1 is needed")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout: got {dropout}, which acts between layers, but num_layers is 1; set dropout = 0, or add layers",
                stacklevel=2,
            )
        self.input_size, self.hidden_size, self.proj_size = input_size, hidden_size, proj_size
        self.num_layers, self.bidirectional, self.bias = num_layers, bidir, bias
        self.batch_first, self.dropout = batch_first, float(dropout)
        self.lists_states = True
        make: Any = partial(cell, **digital.cell_options(cell, proj_size, nonlinearity))
        self.cells = nn.ModuleDict()
        for layer in range(num_layers):
            width = input_size if layer == 0 else self.directions * (proj_size or hidden_size)
            for suffix in ("", "_reverse")[: self.directions]:
                self.cells[f"l{layer}{suffix}"] = make(width, hidden_size, bias, device, dtype, rpu_config)
        self.reset_parameters(xavier)
        self.register_state_dict_post_hook(save_torch_names)

    @property
    def rnn(self) -> ModularRNN:
        """The cells as AIHWKIT-Lightning arranges them: ``rnn.layers[0].cell``, or ``.directions[0].cell`` if bidirectional."""
        return arranged(list(self._cells()), self.directions)

    @property
    def directions(self) -> int:
        """2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    def reset_parameters(self, xavier: bool = False) -> None:
        """Initialise weights and biases as the constructor does, and the analog state anew."""
        if xavier:
            self.init_layers(nn.init.xavier_uniform_, nn.init.zeros_)
        else:
            bound = 1 / math.sqrt(self.hidden_size)
            self.init_layers(lambda tensor: tensor.uniform_(-bound, bound))
        for layer in self.analog_layers():
            if isinstance(layer, AnalogLinear):
                layer.reset_analog_state()

    @torch.no_grad()
    def init_layers(
        self, weight_init_fn: Callable[[Tensor], Any], bias_init_fn: Callable[[Tensor], Any] | None = None
    ) -> None:
        """Change every weight by ``weight_init_fn`` and every bias by ``bias_init_fn`` (default: the same), in place.

        Learned clips start anew from the new weights.
        """
        for layer in self.analog_layers():
            if isinstance(layer, AnalogLinear):
                with layer.whole("weight", "bias", write=True, of_first=True):
                    weight_init_fn(layer.weight)
                    if layer.bias is not None:
                        (bias_init_fn or weight_init_fn)(layer.bias)
                layer.reset_weight_clip()

    def get_zero_state(self, batch_size: int) -> list[Any]:
        """States of zeros in the list form, for ``batch_size`` sequences."""
        states = [cell.get_zero_state(batch_size) for cell in self._cells()]
        return states if self.directions == 1 else list(zip(states[::2], states[1::2], strict=True))

    def flatten_parameters(self) -> None:
        """Nothing to do: for models that call it on torch's layers."""

    # ---- Forward ------------------------------------------------------------------------------------------------------

    def forward(
        self, input: Tensor | PackedSequence | None = None, hx: Any = None, *, inp: Any = None, states: Any = None
    ) -> tuple[Any, Any]:
        """The outputs of the last layer for every time step, and the state of every layer after the last one.

        With ``D`` directions, ``L`` layers, and ``P = proj_size or H``, states have one of two forms:

        - Torch's: ``h0 [L * D, B, P]``, and for LSTM cells the tuple ``(h0, c0)`` with ``c0 [L * D, B, H]``.
        - AIHWKIT-Lightning's list: one ``LSTMState(hx, cx)`` or tuple per layer, a pair of them if bidirectional, with
          ``hx [B, P]`` and ``cx [B, H]``, which is None for other cells.

        States come back in the form that was passed, fit to be passed again. If none were passed they are zero and come
        back in torch's form from a layer that :meth:`from_digital` made, so that its model need not change, and as a list
        from others; the attribute ``lists_states`` says which, and may be set.

        Args:
            input: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]`` for a sequence without a batch, whose outputs
                and states have none either, or a ``PackedSequence`` as torch's layers take it, sorted or not.
            hx: The states before the first time step, or None.
            inp, states: Other names for ``input`` and ``hx``.

        Returns:
            ``[T, B, D * P]``, or as the input is, in its dtype (under autocast: of autocast), and the states.

        Raises:
            TypeError, ValueError: dtypes, devices or shapes outside the above.
        """
        if input.__class__ is not Tensor and isinstance(input, Proxy):
            return traced_leaf(self, input, *(() if hx is None else (hx,)))
        if input is None or inp is not None:
            input = the_input(input, inp)
        if states is not None:
            if hx is not None:
                raise TypeError("hx: given, and states too, which is another name for it; pass one of the two")
            hx = states
        self._check_input(input)
        rows = rows_of(input, self.batch_first)
        shape = forms.StateShape(
            self.num_layers,
            self.directions,
            next(self._cells()).state_sizes,
            None if isinstance(input, Tensor) and input.ndim == 2 else rows.sizes[0],
            input_dtype(rows.data),
            rows.data.device,
            rows.data.dtype != torch.float64 and torch.is_autocast_enabled(rows.data.device.type),
        )
        as_torch = not self.lists_states if hx is None else forms.is_torch_form(hx)
        if hx is None:
            before = forms.zero_states(shape)
        else:
            before = forms.from_torch(hx, shape) if as_torch else forms.from_list(hx, shape)
        if isinstance(input, PackedSequence) and input.sorted_indices is not None:
            before = [tuple(part.index_select(0, input.sorted_indices) for part in state) for state in before]
        final: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0:
                rows = rows._replace(data=nn.functional.dropout(rows.data, self.dropout, self.training))
            outputs = []
            for name, pass_over in ((f"l{layer}", run), (f"l{layer}_reverse", run_reverse))[: self.directions]:
                data, state = pass_over(self._cell(name), rows, before[len(final)])
                outputs.append(data)
                final.append(state)
            rows = rows._replace(data=outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))
        if isinstance(input, PackedSequence) and input.unsorted_indices is not None:
            final = [tuple(part.index_select(0, input.unsorted_indices) for part in state) for state in final]
        output = in_form_of(input, rows.data, self.batch_first)
        return output, forms.to_torch(final, shape) if as_torch else forms.to_list(final, shape)

    def _check_input(self, input: Any) -> None:
        data = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(data, Tensor):
            raise TypeError(f"input: got {type(data).__name__}; a torch.Tensor or PackedSequence is needed")
        if data is input and data.ndim not in (2, 3):
            order = "[B, T, I]" if self.batch_first else "[T, B, I]"
            raise ValueError(f"input: got shape {tuple(data.shape)}; {order} or, without a batch, [T, I] is needed")
        if data.shape[-1] != self.input_size:
            raise ValueError(
                f"input: got shape {tuple(data.shape)}; its last dimension must be input_size = {self.input_size}"
            )
        if data is input and data.shape[1 if self.batch_first and data.ndim == 3 else 0] == 0:
            raise ValueError(f"input: got shape {tuple(data.shape)}; at least one time step is needed")

    def _cell(self, name: str) -> AnalogRNNCellBase:
        cell = self.cells[name]
        assert isinstance(cell, AnalogRNNCellBase)
        return cell

    def _cells(self) -> Iterator[AnalogRNNCellBase]:
        """Every cell, layer by layer and direction by direction."""
        return (self._cell(name) for name in self.cells)

    # ---- From and to torch --------------------------------------------------------------------------------------------

    @classmethod
    def from_digital(
        cls,
        module: nn.RNN | nn.LSTM | nn.GRU,
        rpu_config: TorchInferenceRPUConfig,
        cell: type[AnalogRNNCellBase] | None = None,
    ) -> Self:
        """An analog layer with the very parameters of ``module``, in its mode and on its device.

        ``AnalogLSTMCellCombinedWeight`` for ``cell`` makes new parameters from those of an ``nn.LSTM``: the weights side by
        side, and the sum of the biases. A new one takes gradients if one of those that it is made of does.

        Args:
            module: The layer to convert.
            rpu_config: What to simulate; every product takes a copy.
            cell: Class of the cells; default: the one that computes what ``module`` does.

        Raises:
            ConfigError: ``rpu_config`` is not valid.
            TypeError: ``module`` is none of the three, or has another kind of cell than ``cell``.
            ValueError: a weight of ``module`` is computed from other parameters.
        """
        kind = digital.check_module(module, cell)
        layer = cls(
            kind,
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.bidirectional,
            0.0,
            module.proj_size,
            device="meta",
            rpu_config=rpu_config,
            nonlinearity=getattr(module, "nonlinearity", "tanh"),
        )
        layer.dropout = module.dropout  # whatever there is to warn about, torch has
        layer.lists_states = False
        for name in layer.cells:
            digital.take_parameters(layer._cell(name), module, name)
        return layer.train(module.training)

    @classmethod
    def to_digital(cls, module: AnalogRNN) -> nn.RNN | nn.LSTM | nn.GRU:
        """A torch layer with the very parameters of the analog ``module``, in its mode; ranges and clips are left behind.

        The matrix of the combined cell is cut into new parameters, and its bias becomes ``bias_ih``, beside a ``bias_hh`` of 0.

        Raises:
            TypeError: its cell is no cell of torch's layers.
        """
        layer = digital.empty_layer(module)
        for name in module.cells:
            digital.give_parameters(module._cell(name), layer, name)
        layer.flatten_parameters()
        return layer.train(module.training)

    @classmethod
    def move_to_meta(cls, module: nn.Module) -> None:
        """As for other layers; torch's recurrent layers hold their parameters in a second place too."""
        super().move_to_meta(module)
        for name, parameter in list(module._parameters.items()):
            setattr(module, name, parameter)

    # ---- State --------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Torch's names too, ``weight_ih_l0`` and its like, which those of the state dict are."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            path = inner_name(self, name) if "cells" in self._modules else None
            if path is None:
                raise
            return attrgetter(path)(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        uneven = uneven_files(self.parameters(), state_dict, prefix)
        if uneven is not None:
            args[-1].append(uneven)  # the messages of all errors
            return
        load_torch_names(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        for name, default in (("bias", True), ("batch_first", False), ("dropout", 0.0), ("proj_size", 0)):
            value = getattr(self, name)
            text += f", {name}={value}" if value != default else ""
        return text + (", bidirectional=True" if self.bidirectional else "")
