"""AnalogRNN: torch's recurrent layers on analog tiles, its forms of states, what noise and ranges see, and its state dict."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from triton_analog import AnalogOptimizer, convert_to_analog, convert_to_digital, reference
from triton_analog.config import (
    ConfigError,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightQuantizationType,
)
from triton_analog.functional import modified_weight
from triton_analog.nn import matrix as matrix_layer
from triton_analog.nn import rnn_cells
from triton_analog.nn.one_forward import OneForward
from triton_analog.nn.rnn import AnalogRNN
from triton_analog.nn.rnn_cells import (
    AnalogGRUCell,
    AnalogLSTMCell,
    AnalogLSTMCellCombinedWeight,
    AnalogVanillaRNNCell,
    LSTMState,
)

IN, H, T, B = 5, 4, 6, 3
CELLS = [AnalogVanillaRNNCell, AnalogLSTMCell, AnalogLSTMCellCombinedWeight, AnalogGRUCell]
KINDS = ["RNN", "relu", "LSTM", "projected", "combined", "projected combined", "GRU"]
all_cells = pytest.mark.parametrize("cell", CELLS)
all_kinds = pytest.mark.parametrize("kind", KINDS)


def ideal() -> TorchInferenceRPUConfig:
    return TorchInferenceRPUConfig()


def ranged() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    return config


def noisy(refresh: WeightNoiseRefresh = WeightNoiseRefresh.FORWARD) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    config.modifier.refresh = refresh
    return config


def everything() -> TorchInferenceRPUConfig:
    """Slices, converters, both noises, a learned range and a learned clip with quantization."""
    config = ranged()
    config.mapping.max_input_size = 3
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound, config.forward.out_noise = 10.0, 0.02
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE_PER_CHANNEL, 254
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.02
    return config


def digital(kind: str, **options: Any) -> Any:
    """A torch layer in fp64, for tolerances that leave no doubt."""
    options = {"dtype": torch.float64, **options}
    if kind in ("RNN", "relu"):
        return nn.RNN(IN, H, nonlinearity="relu" if kind == "relu" else "tanh", **options)
    if kind == "GRU":
        return nn.GRU(IN, H, **options)
    return nn.LSTM(IN, H, proj_size=2 if "projected" in kind else 0, **options)


def analog(layer: Any, kind: str = "", config: TorchInferenceRPUConfig | None = None) -> AnalogRNN:
    cell = AnalogLSTMCellCombinedWeight if "combined" in kind else None
    return AnalogRNN.from_digital(layer, ideal() if config is None else config, cell)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a nested result."""
    if isinstance(value, PackedSequence):
        return [value.data, value.batch_sizes]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in tensors(part)]
    return [] if value is None else [value]


def initial_states(layer: Any, batch: int | None = B) -> Any:
    """In torch's form."""
    cells, middle = layer.num_layers * (1 + layer.bidirectional), () if batch is None else (batch,)
    like: Any = {"dtype": torch.float64, "requires_grad": True}
    h0 = torch.randn(cells, *middle, getattr(layer, "proj_size", 0) or H, **like)
    return (h0, torch.randn(cells, *middle, H, **like)) if isinstance(layer, nn.LSTM) else h0


def assert_same(layer: Any, other: Any, x: Any, hx: Any = None) -> None:
    """Equal outputs, final states, and gradients of inputs and initial states."""
    leaves = [x.data if isinstance(x, PackedSequence) else x, *tensors(hx)]
    results = []
    for module in (layer, other):
        result = tensors(module(x, hx))
        floating = [tensor for tensor in result if tensor.is_floating_point()]
        loss = sum((tensor * (1 + index)).square().sum() for index, tensor in enumerate(floating))
        results.append((result, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


# ---- The same as torch's layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@all_kinds
def test_the_default_config_computes_what_torch_does(
    kind: str, bidirectional: bool, batch_first: bool, bias: bool
) -> None:
    layer = digital(kind, num_layers=2, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    x = torch.randn((B, T, IN) if batch_first else (T, B, IN), dtype=torch.float64, requires_grad=True)
    assert_same(layer, analog(layer, kind), x)
    assert_same(layer, analog(layer, kind), x, initial_states(layer))


@all_kinds
def test_parameters_get_the_gradients_of_torch(kind: str) -> None:
    layer = digital(kind, num_layers=2, bidirectional=True)
    ours, x = analog(copy.deepcopy(layer), kind), torch.randn(T, B, IN, dtype=torch.float64)
    for module in (layer, ours):
        module(x)[0].square().sum().backward()
    if "combined" in kind:
        grad = ours.cells["l1"].weight.weight.grad
        torch.testing.assert_close(grad, torch.cat([layer.weight_ih_l1.grad, layer.weight_hh_l1.grad], 1))
        torch.testing.assert_close(ours.cells["l1"].weight.bias.grad, layer.bias_ih_l1.grad)
    else:
        back = AnalogRNN.to_digital(ours)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(back.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("batch_first", [True, False])
@all_kinds
def test_a_sequence_without_a_batch_gives_results_without_one(kind: str, batch_first: bool) -> None:
    layer = digital(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(T, IN, dtype=torch.float64, requires_grad=True)
    assert_same(layer, analog(layer, kind), x)
    assert_same(layer, analog(layer, kind), x, initial_states(layer, None))


@pytest.mark.parametrize("lengths", [[6, 4, 1], [2, 6, 4], [3, 3, 3]], ids=["sorted", "unsorted", "equal"])
@pytest.mark.parametrize("bidirectional", [True, False])
@all_kinds
def test_packed_sequences(kind: str, bidirectional: bool, lengths: list[int]) -> None:
    layer = digital(kind, num_layers=2, bidirectional=bidirectional)
    padded = torch.randn(T, B, IN, dtype=torch.float64)
    packed = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)
    packed = packed._replace(data=packed.data.requires_grad_())
    ours = analog(layer, kind)
    assert_same(layer, ours, packed)
    assert_same(layer, ours, packed, initial_states(layer))
    torch.testing.assert_close(pad_packed_sequence(ours(packed)[0]), pad_packed_sequence(layer(packed)[0]))


def test_dropout_acts_between_layers_in_training_only() -> None:
    layer = digital("LSTM", num_layers=2, dropout=1.0)
    ours, x = analog(layer), torch.randn(T, B, IN, dtype=torch.float64)
    dropped = ours(x)[0]
    torch.testing.assert_close(dropped, layer(x)[0])  # all of it is dropped
    torch.testing.assert_close(ours.eval()(x)[0], layer.eval()(x)[0])
    assert not torch.allclose(ours(x)[0], dropped)
    with pytest.warns(UserWarning, match=r"dropout: got 0.5, .* num_layers is 1"):
        AnalogRNN(AnalogGRUCell, IN, H, dropout=0.5, rpu_config=ideal())


@pytest.mark.parametrize("kind", ["LSTM", "projected", "GRU"])
def test_the_kernels_compute_the_same(kind: str, backend: str, device: torch.device) -> None:
    layer = digital(kind, dtype=torch.float32).to(device)
    x = torch.randn(2, 2, IN).to(device).requires_grad_()
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert_same(layer, analog(copy.deepcopy(layer), kind), x)


@all_cells
def test_a_cell_is_one_step(cell: Any) -> None:
    layer = AnalogRNN(cell, IN, H, rpu_config=ideal())
    x, (state,) = torch.randn(2, B, IN), layer.get_zero_state(B)
    outputs = []
    for part in x:
        output, state = layer.cells["l0"](part, state)
        outputs.append(output)
    y, (final,) = layer(x)
    torch.testing.assert_close(torch.stack(outputs), y)
    assert isinstance(state, LSTMState)
    torch.testing.assert_close(state.hx, final.hx)
    assert (state.cx is None) == (cell in (AnalogVanillaRNNCell, AnalogGRUCell))


# ---- States ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [B, None])
@pytest.mark.parametrize("bidir", [True, False])
@all_cells
def test_listed_states_come_back_as_a_list_that_can_be_passed_again(cell: Any, bidir: bool, batch: int | None) -> None:
    layer = AnalogRNN(cell, IN, H, num_layers=2, bidir=bidir, rpu_config=ideal())
    x = torch.randn(2, IN) if batch is None else torch.randn(2, batch, IN)
    first, states = layer(x[:1])
    second, after = layer(x[1:], states)
    both, expected = layer(x)
    assert isinstance(after, list)
    assert len(after) == 2
    if not bidir:  # backwards, a sequence in two parts is another one
        torch.testing.assert_close(torch.cat([first, second]), both)
        torch.testing.assert_close(tensors(after), tensors(expected))
    state = after[0][0] if bidir else after[0]
    assert state.hx.shape == (*x.shape[1:-1], H)
    plain = [tuple(tuple(part) for part in entry) for entry in states] if bidir else [tuple(entry) for entry in states]
    torch.testing.assert_close(layer(x[1:], plain)[0], second)


def test_without_states_the_origin_of_the_layer_decides_on_the_form() -> None:
    x = torch.randn(T, B, IN, dtype=torch.float64)
    _, (h, c) = analog(digital("LSTM", num_layers=2))(x)
    assert h.shape == c.shape == (2, B, H)
    layer = AnalogRNN(AnalogLSTMCell, IN, H, num_layers=2, dtype=torch.float64, rpu_config=ideal())
    assert all(isinstance(state, LSTMState) for state in layer(x)[1])
    layer.lists_states = False
    torch.testing.assert_close(
        layer(x)[1][0], torch.stack([state.hx for state in layer(x, layer.get_zero_state(B))[1]])
    )


@pytest.mark.parametrize(
    ("cell", "hx", "error", "message"),
    [
        (AnalogLSTMCell, torch.zeros(2, B, H), ValueError, r"hx: got a tensor; this cell needs a tuple \(h0, c0\)"),
        (AnalogGRUCell, (torch.zeros(2, B, H),) * 2, ValueError, "hx: got 2 tensors; this cell needs a tensor h0"),
        (AnalogGRUCell, torch.zeros(1, B, H), ValueError, r"hx, h0: got shape \(1, 3, 4\); \(2, 3, 4\) is needed"),
        (AnalogGRUCell, torch.zeros(2, B, H).double(), TypeError, "hx, h0: dtype torch.float64, but the input"),
        (AnalogGRUCell, [LSTMState(torch.zeros(B, H))], ValueError, "hx: got 1 states; a list of 2, one per layer"),
        (AnalogGRUCell, [(torch.zeros(B, H),) * 2] * 2, ValueError, r"hx: got a state with 2 tensors; .*\(hx, None\)"),
        (AnalogGRUCell, [(torch.zeros(2, H), None)] * 2, ValueError, r"hx, hx of state 0: got shape \(2, 4\)"),
        (AnalogGRUCell, [(0.0, None)] * 2, TypeError, "hx, hx of state 0: got float"),
        (AnalogGRUCell, [0.0] * 2, TypeError, "hx: got a list that holds float"),
        (AnalogGRUCell, 0.0, TypeError, "hx: got float"),
    ],
)
def test_wrong_states_are_named(cell: Any, hx: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        AnalogRNN(cell, IN, H, num_layers=2, rpu_config=ideal())(torch.randn(T, B, IN), hx)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.randn(T, B, IN + 1),
            ValueError,
            r"input: got shape \(6, 3, 6\); its last dimension must be input_size = 5",
        ),
        (torch.randn(IN), ValueError, r"input: got shape \(5,\); \[T, B, I\]"),
        (torch.randn(0, B, IN), ValueError, "at least one time step"),
        ([1.0], TypeError, "input: got list"),
    ],
)
def test_wrong_inputs_are_named(x: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        AnalogRNN(AnalogGRUCell, IN, H, rpu_config=ideal())(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cell": nn.LSTMCell}, TypeError, "cell: got LSTMCell; the class of an analog cell"),
        ({"hidden_size": 0}, ValueError, "hidden_size: got 0"),
        ({"num_layers": 0}, ValueError, "num_layers: got 0"),
        ({"dropout": 1.5}, ValueError, "dropout: got 1.5"),
        ({"proj_size": 2}, ValueError, "proj_size: got 2, but AnalogGRUCell has no projection"),
        ({"cell": AnalogLSTMCell, "proj_size": H}, ValueError, r"proj_size: got 4; allowed are 0 \(none\) to .* 3"),
        ({"nonlinearity": "relu"}, ValueError, "nonlinearity: got 'relu', but only AnalogVanillaRNNCell"),
        ({"cell": AnalogVanillaRNNCell, "nonlinearity": "sin"}, ValueError, "nonlinearity: got 'sin'; allowed"),
        ({"rpu_config": None}, ConfigError, "rpu_config: got nothing"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: Any, message: str) -> None:
    arguments = {"cell": AnalogGRUCell, "input_size": IN, "hidden_size": H, "rpu_config": ideal(), **options}
    with pytest.raises(error, match=message):
        AnalogRNN(**arguments)


# ---- Noise and ranges -------------------------------------------------------------------------------------------------------


def steps_without_a_past(layer: AnalogRNN, product: str) -> Tensor:
    """Outputs for equal inputs at all steps, where no step knows the last one except through a noisy ``product``."""
    cell, h = layer.cells["l0"], torch.ones(1, H)
    for name, other in cell.named_children():
        if name != product:
            other.reconfigure(ideal())
            other.weight.data.zero_()
    projected = cell.project_input(torch.ones(T, IN)).split(1)
    shared = {name: OneForward(T) for name, _ in cell.named_children()}
    return torch.cat([cell.step(part, (h,), shared)[0] for part in projected]).detach()


@pytest.mark.parametrize("product", ["weight_ih", "weight_hh"])
@pytest.mark.parametrize("refresh", WeightNoiseRefresh)
def test_weight_noise_lasts_for_a_sequence_or_for_a_step_of_the_optimizer(refresh: Any, product: str) -> None:
    layer = AnalogRNN(AnalogVanillaRNNCell, IN, H, rpu_config=noisy(refresh))
    first, second = (steps_without_a_past(layer, product) for _ in range(2))
    torch.testing.assert_close(first, first[:1].expand_as(first))
    torch.testing.assert_close(second, second[:1].expand_as(second))
    assert torch.allclose(first, second) == (refresh is WeightNoiseRefresh.STEP)


def test_output_noise_is_new_in_every_step() -> None:
    config = ranged()
    config.forward.out_noise = 0.1
    config.pre_post.input_range.init_from_data = 0
    layer = AnalogRNN(AnalogVanillaRNNCell, IN, H, rpu_config=config)
    assert len(steps_without_a_past(layer, "weight_hh").unique(dim=0)) == T


@all_cells
def test_a_cell_on_its_own_draws_noise_in_every_call(cell: Any) -> None:
    layer = AnalogRNN(cell, IN, H, rpu_config=noisy())
    x, (state,) = torch.randn(B, IN), layer.get_zero_state(B)
    assert not torch.equal(layer.cells["l0"](x, state)[0], layer.cells["l0"](x, state)[0])


@all_kinds
def test_a_sequence_computes_what_its_steps_do(kind: str) -> None:
    config = everything()
    config.modifier.noise_type = WeightNoiseInjectionType.NONE
    config.forward.out_noise = 0.0
    config.forward.out_res = -1  # sums of steps of a grid may be ties, which rounding errors then decide
    config.pre_post.input_range.decay = 0.0  # which looks at all rows of a product
    config.pre_post.input_range.init_from_data, config.pre_post.input_range.init_value = 0, 1.0
    layer, x = analog(digital(kind), kind, config), torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    layer.lists_states = True
    (state,), outputs = layer.get_zero_state(B), []
    for part in x:
        output, state = layer.cells["l0"](part, state)
        outputs.append(output)
    leaves, weights = [x, *layer.parameters()], torch.randn(T, B, outputs[0].shape[1], dtype=torch.float64)
    results = [(y, torch.autograd.grad((y * weights).sum(), leaves)) for y in (torch.stack(outputs), layer(x)[0])]
    torch.testing.assert_close(*results)


@all_kinds
def test_gradients_are_those_of_the_noisy_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = digital(kind)
    ours = analog(copy.deepcopy(theirs), kind, noisy())
    cell, made = ours.cells["l0"], []
    if "combined" not in kind:
        cell.weight_ih.reconfigure(ideal())

    def made_once(*args: Any, **options: Any) -> Any:
        made.append(modified_weight(*args, **options))
        return made[-1]

    monkeypatch.setattr(matrix_layer, "modified_weight", made_once)
    x, hx = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True), initial_states(theirs)
    leaves = [x, *tensors(hx)]
    y = ours(x, hx)[0]
    tiles = {} if "combined" in kind else {"weight_ih": cell.weight_ih.weight}
    names = [name for name, _ in cell.named_children() if name != "weight_ih"]
    tiles |= {name: tile for name, (tile, _) in zip(names, made, strict=True)}
    if "combined" in kind:
        tiles["weight_ih"], tiles["weight_hh"] = tiles.pop("weight").split((IN, y.shape[2]), dim=1)
    with torch.no_grad():
        for name, tile in tiles.items():
            assert name == "weight_ih" or not torch.equal(theirs.get_parameter(f"{name}_l0"), tile)
            theirs.get_parameter(f"{name}_l0").copy_(tile)
    expected = theirs(x, hx)[0]
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.square().sum(), [*leaves, *(product.weight for product in cell.children())])
    parameters = [theirs.get_parameter(f"{name}_l0") for name in ("weight_ih", "weight_hh")]
    if "projected" in kind:
        parameters.append(theirs.weight_hr_l0)
    right = list(torch.autograd.grad(expected.square().sum(), [*leaves, *parameters]))
    if "combined" in kind:
        ih = len(leaves)
        right[ih : ih + 2] = [torch.cat(right[ih : ih + 2], dim=1)]
    by_shape = sorted(grads, key=lambda grad: str(grad.shape)), sorted(right, key=lambda grad: str(grad.shape))
    for grad, other in zip(*by_shape, strict=True):
        torch.testing.assert_close(grad, other)
    assert len(made) == len(names), "not once more in the backward"


def test_the_same_seed_gives_the_same_noise_and_so_does_recomputing() -> None:
    config = everything()
    config.pre_post.input_range.init_from_data = 0
    layer, x = AnalogRNN(AnalogLSTMCell, IN, H, bidir=True, rpu_config=config), torch.randn(T, B, IN)
    results = []
    for recompute in (False, False, True):
        torch.manual_seed(1)
        y = checkpoint(lambda: layer(x)[0], use_reentrant=False) if recompute else layer(x)[0]
        results.append((y, torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    assert not torch.allclose(layer(x)[0], results[0][0])


@pytest.mark.parametrize("kind", ["LSTM", "projected", "GRU"])
def test_gates_meet_torchs_kernels_in_their_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lstm(gates_x: Tensor, gates_h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, f, g, o = (gates_x + gates_h).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c, gates_x

    def gru(gates_x: Tensor, gates_h: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        (rx, zx, nx), (rh, zh, nh) = gates_x.chunk(3, 1), gates_h.chunk(3, 1)
        n = (nx + (rx + rh).sigmoid() * nh).tanh()
        return n + (zx + zh).sigmoid() * (h - n), gates_x

    monkeypatch.setattr(rnn_cells, "is_fused", lambda *_: True)
    monkeypatch.setattr(rnn_cells, "fused_lstm", lstm)
    monkeypatch.setattr(rnn_cells, "fused_gru", gru)
    layer, x = digital(kind), torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    assert_same(layer, analog(layer, kind), x, initial_states(layer))


def test_noise_is_for_training() -> None:
    layer = AnalogRNN(AnalogGRUCell, IN, H, rpu_config=noisy())
    x = torch.randn(T, B, IN)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_ranges_see_a_sequence_of_inputs_as_one_batch_and_hidden_states_step_by_step() -> None:
    layer, x = AnalogRNN(AnalogLSTMCell, IN, H, rpu_config=ranged()), torch.randn(T, B, IN)
    layer(x)
    cell = layer.cells["l0"]
    assert cell.weight_ih.input_range_update_idx.tolist() == [1]
    torch.testing.assert_close(cell.weight_ih.input_range.detach(), 3 * reference.std(x.reshape(-1, IN), 1))
    assert cell.weight_hh.input_range_update_idx.tolist() == [T - 1]  # the first hidden state is all zero


def test_padding_is_no_part_of_the_statistics() -> None:
    layer, x = AnalogRNN(AnalogLSTMCell, IN, H, rpu_config=ranged()), torch.randn(T, B, IN)
    padded = x.clone()
    padded[2:, 1] = padded[5:, 2] = 1e6
    packed = pack_padded_sequence(padded, torch.tensor([6, 2, 5]), enforce_sorted=False)
    layer(packed)
    rows = torch.cat([x[:6, 0], x[:2, 1], x[:5, 2]])
    torch.testing.assert_close(layer.cells["l0"].weight_ih.input_range.detach(), 3 * reference.std(rows, 1))
    assert layer.cells["l0"].weight_hh.input_range < 3


# ---- Training ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@all_cells
def test_every_dtype_trains(cell: Any, dtype: torch.dtype) -> None:
    layer = AnalogRNN(cell, IN, H, num_layers=2, bidir=True, dtype=dtype, rpu_config=everything())
    y, states = layer(torch.randn(2, B, IN, dtype=dtype))
    y.float().square().sum().backward()
    assert {tensor.dtype for tensor in [y, *tensors(states)]} == {dtype}
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@all_cells
def test_autocast_gives_the_dtype_of_autocast(cell: Any) -> None:
    layer = AnalogRNN(cell, IN, H, rpu_config=everything())
    with torch.autocast("cpu", torch.bfloat16):
        y, states = layer(torch.randn(T, B, IN))
        y, states = layer(torch.randn(T, B, IN), [LSTMState(*(part.float() for part in tensors(states)))])
    assert {tensor.dtype for tensor in [y, *tensors(states)]} == {torch.bfloat16}
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_an_optimizer_step_clips_every_matrix() -> None:
    config = ideal()
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 1.0
    layer = AnalogRNN(AnalogLSTMCell, IN, H, num_layers=2, bidir=True, rpu_config=config)
    optimizer = AnalogOptimizer(torch.optim.SGD, layer.analog_layers, layer.parameters(), lr=0.0)
    expected = [product.weight.clamp(-product.weight.std(), product.weight.std()) for product in layer.analog_layers()]
    layer(torch.randn(T, B, IN))[0].sum().backward()
    optimizer.step()
    assert len(expected) == 8
    for product, weight in zip(layer.analog_layers(), expected, strict=True):
        torch.testing.assert_close(product.weight, weight)


def test_every_matrix_is_quantized_for_good() -> None:
    config = ideal()
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE, 6
    layer, x = AnalogRNN(AnalogGRUCell, IN, H, num_layers=2, rpu_config=config), torch.randn(T, B, IN)
    before = layer(x)[0]
    layer.quantize_weights()
    torch.testing.assert_close(layer(x)[0], before)
    assert all(len(product.weight.unique()) <= 7 for product in layer.analog_layers())


def test_redrawing_noise_reaches_every_product() -> None:
    layer = AnalogRNN(AnalogGRUCell, IN, H, rpu_config=noisy(WeightNoiseRefresh.STEP))
    x = torch.randn(T, B, IN)
    before = layer(x)[0]
    torch.testing.assert_close(layer(x)[0], before)
    layer.redraw_weight_noise()
    assert not torch.allclose(layer(x)[0], before)


@pytest.mark.parametrize("training", [True, False])
@all_cells
def test_one_graph_is_compiled(cell: Any, training: bool) -> None:
    layer = AnalogRNN(cell, IN, H, rpu_config=ranged() if training else everything()).train(training)
    twin, x = copy.deepcopy(layer), torch.randn(2, B, IN)
    y, states = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close((y, states), twin(x))
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles_compute_and_save_the_same(copied: Any) -> None:
    layer = AnalogRNN(AnalogLSTMCell, IN, H, rpu_config=everything()).eval()
    other, x = copied(layer), torch.randn(T, B, IN)
    torch.testing.assert_close(other(x), layer(x))
    assert other.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("xavier", [True, False])
def test_initialisation(xavier: bool) -> None:
    layer = AnalogRNN(AnalogLSTMCell, IN, 100, xavier=xavier, device="meta", rpu_config=everything())
    layer.to_empty(device="cpu").reset_parameters(xavier)
    product = layer.cells["l0"].weight_hh
    bound = (6 / 500) ** 0.5 if xavier else 0.1
    assert 0.95 * bound < product.weight.abs().max() <= bound
    assert product.bias.any() != xavier
    assert (product.input_range == 3).all()
    assert torch.equal(product.learnable_weight_clip, reference.absmax(product.weight.detach(), product.slices))


# ---- From and to torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RNN", "relu", "LSTM", "projected", "GRU"])
def test_parameters_are_the_very_same_there_and_back(kind: str) -> None:
    layer = digital(kind, num_layers=2, bidirectional=True, dropout=0.25).eval()
    layer.weight_hh_l1.requires_grad_(False)
    state = torch.get_rng_state()
    ours = analog(layer, config=ranged())
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.cells["l1_reverse"].weight_hh.weight is layer.weight_hh_l1_reverse
    assert ours.cells["l0"].weight_ih.bias is layer.bias_ih_l0
    assert ours.cells["l0"].weight_ih.input_range.dtype == torch.float64
    assert not any(module.training for module in ours.modules())
    back = AnalogRNN.to_digital(ours)
    assert repr(back) == repr(layer)
    assert not back.training
    own = dict(layer.named_parameters())
    assert all(parameter is own.pop(name) for name, parameter in back.named_parameters())
    assert not own


@pytest.mark.parametrize("kind", ["combined", "projected combined"])
def test_the_combined_cell_makes_new_parameters_and_cuts_them_again(kind: str) -> None:
    layer = digital(kind, bidirectional=True)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        layer.get_parameter(name).requires_grad_(False)
    ours = analog(layer, kind)
    product = ours.cells["l0"].weight
    assert torch.equal(product.weight, torch.cat([layer.weight_ih_l0, layer.weight_hh_l0], 1))
    assert torch.equal(product.bias, layer.bias_ih_l0 + layer.bias_hh_l0)
    assert not product.weight.requires_grad
    assert product.bias.requires_grad
    back, x = AnalogRNN.to_digital(ours), torch.randn(T, B, IN, dtype=torch.float64)
    torch.testing.assert_close(back(x), layer(x))
    assert not back.weight_hh_l0.requires_grad
    assert not back.bias_hh_l0.any()


def test_only_torchs_layers_convert() -> None:
    with pytest.raises(TypeError, match=r"module: got Linear; a torch\.nn\.RNN, LSTM or GRU"):
        analog(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="cell: got AnalogLSTMCellCombinedWeight; allowed for GRU are AnalogGRUCell"):
        analog(digital("GRU"), "combined")
    with pytest.raises(ValueError, match="weight_hh_l0: that of this ParametrizedLSTM is not a parameter but computed"):
        analog(weight_norm(digital("LSTM"), "weight_hh_l0"))


class Tagger(nn.Module):
    """A model that uses its recurrent layer as torch's documentation does."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(IN, H, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        output, (h, c) = self.rnn(x)
        return output.sum(1) + h[-1] + c[-1]


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_converts_and_runs_unchanged(inplace: bool) -> None:
    model, x = Tagger(), torch.randn(B, T, IN)
    expected, names = model(x), set(model.state_dict())
    ours = convert_to_analog(model, ideal(), conversion_map={nn.LSTM: AnalogRNN}, inplace=inplace)
    torch.testing.assert_close(ours(x), expected)
    assert [name for name, _ in ours.named_analog_layers()] == [
        f"rnn.cells.l{layer}.weight_{matrix}" for layer in range(2) for matrix in ("ih", "hh")
    ]
    back = convert_to_digital(ours, inplace=inplace)
    torch.testing.assert_close(back(x), expected)
    assert set(back.state_dict()) == names


def test_a_layer_that_was_converted_can_be_emptied() -> None:
    layer = digital("LSTM")
    ours = analog(layer)
    AnalogRNN.move_to_meta(layer)
    assert all(parameter.is_meta for parameter in [*layer.parameters(), *layer._flat_weights])
    assert ours(torch.randn(T, B, IN, dtype=torch.float64))[0].isfinite().all()


# ---- State ----------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A recurrent layer below others, beside a module whose names look like its own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.ModuleDict({"rnn": layer}))
        self.cells_l0 = nn.Linear(2, 2)
        self.weight_ih_l0 = nn.Parameter(torch.randn(3))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "projected", "GRU"])
def test_state_dicts_have_torchs_names_and_go_both_ways(kind: str) -> None:
    theirs = Model(digital(kind, num_layers=2, bidirectional=True))
    ours = Model(analog(digital(kind, num_layers=2, bidirectional=True)))
    ours.load_state_dict(theirs.state_dict())
    state = {name: value for name, value in ours.state_dict().items() if "_extra_state" not in name}
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    Model(digital(kind, num_layers=2, bidirectional=True)).load_state_dict(state)


@pytest.mark.parametrize("kind", ["combined", "projected combined"])
def test_the_combined_cell_loads_what_torch_saved(kind: str) -> None:
    layer = digital(kind, num_layers=2, bidirectional=True)
    ours = Model(analog(digital(kind, num_layers=2, bidirectional=True), kind))
    ours.load_state_dict(Model(layer).state_dict())
    x = torch.randn(T, B, IN, dtype=torch.float64)
    torch.testing.assert_close(ours.deep[0]["rnn"](x), layer(x))


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("bidir", [True, False])
@all_cells
def test_everything_that_is_analog_survives_a_file(cell: Any, bidir: bool, assign: bool) -> None:
    def make(config: TorchInferenceRPUConfig) -> Model:
        return Model(AnalogRNN(cell, IN, H, num_layers=2, bidir=bidir, rpu_config=config))

    source, plain = make(everything()), ideal()
    plain.mapping.max_input_size = 3
    source.deep[0]["rnn"](torch.randn(T, B, IN))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = make(plain)
    target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert all(torch.equal(target.state_dict()[name], value) for name, value in source.state_dict().items())
    assert all(layer.rpu_config == everything() for layer in target.deep[0]["rnn"].analog_layers())


def test_analog_state_is_named_as_torch_names_weights() -> None:
    layer = AnalogRNN(AnalogLSTMCell, IN, H, bidir=True, rpu_config=ranged())
    names = ["weight", "bias", "input_range", "input_range_update_idx", "x_min", "x_max", "_extra_state"]
    assert set(layer.state_dict()) == {
        f"{name}_{matrix}_l0{way}" for name in names for matrix in ("ih", "hh") for way in ("", "_reverse")
    }
    combined = AnalogRNN(AnalogLSTMCellCombinedWeight, IN, H, rpu_config=ideal())
    assert set(combined.state_dict()) == {"weight_l0", "bias_l0", "_extra_state_l0"}


@pytest.mark.parametrize(("cell", "matrices"), [(AnalogGRUCell, ["ih", "hh"]), (AnalogLSTMCellCombinedWeight, ["ht"])])
def test_state_dicts_of_the_predecessor_load_strictly(cell: Any, matrices: list[str]) -> None:
    layer = AnalogRNN(cell, IN, H, rpu_config=ranged())
    state = {}
    for matrix, product in zip(matrices, layer.analog_layers(), strict=True):
        own = product.state_dict()
        del own["_extra_state"]
        own["input_range_update_idx"] = torch.tensor([7.0])
        state |= {
            f"{name}_{matrix}_l0": torch.rand_like(value) if value.ndim == 2 else value for name, value in own.items()
        }
    layer.load_state_dict(state)
    product = next(layer.analog_layers())
    assert torch.equal(product.weight, state[f"weight_{matrices[0]}_l0"])
    assert product.input_range_update_idx.tolist() == [7]


def test_missing_and_unknown_names_are_errors() -> None:
    layer = AnalogRNN(AnalogGRUCell, IN, H, rpu_config=ranged())
    with pytest.raises(RuntimeError, match=r"Missing key.*cells.l0.weight_ih.input_range"):
        layer.load_state_dict(nn.GRU(IN, H).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_ih_l1"):
        layer.load_state_dict(nn.GRU(IN, H, num_layers=2).state_dict())


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch_gives_an_empty_sequence(batch_first):
    digital = nn.LSTM(5, 6, batch_first=batch_first)
    analog = convert_to_analog(digital, TorchInferenceRPUConfig())
    x = torch.randn(0, 3, 5) if batch_first else torch.randn(3, 0, 5)
    (ours, states), (theirs, _) = analog(x), digital(x)
    assert ours.shape == theirs.shape
    assert [state.shape for state in states] == [(1, 0, 6), (1, 0, 6)]
