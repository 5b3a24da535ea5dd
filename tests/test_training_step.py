"""What one training step of a layer starts on a GPU, read without one: kernels are recorded instead of started."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import profile
from triton.backends.compiler import GPUTarget

from triton_analog import TorchInferenceRPUConfig, launch
from triton_analog.config import WeightClipType, WeightNoiseInjectionType
from triton_analog.functional import analog_linear, update_input_range
from triton_analog.nn import rnn_cells
from triton_analog.nn.rnn import AnalogRNN
from triton_analog.nn.rnn_cells import AnalogLSTMCell
from triton_analog.optim import before_step

M, N, K, TILE = 256, 128, 256, 64
H100 = GPUTarget("cuda", 90, 32)
NO_WORK = {
    "empty",
    "empty_like",
    "empty_strided",
    "detach",
    "view",
    "as_strided",
    "slice",
    "select",
    "to",
    "expand",
    "reshape",
    "flatten",
}
EVERYTHING = {
    "max_input_size": TILE,
    "inp_res": 254,
    "out_noise": 0.04,
    "out_noise_per_channel": True,
    "out_bound": 10.0,
    "out_bound_per_channel": True,
    "out_res": 254,
    "weight_quantization": "per_channel",
    "weight_res": 254,
    "weight_noise": "per_channel",
    "weight_noise_std": 0.02,
    "range_decay": 0.01,
}


def launches(function):
    """Names of the library's kernels and of torch's operations that ``function`` starts."""
    kernels: list[str] = []
    torch.use_deterministic_algorithms(False)  # the fixture that poisons outputs would be seen too
    with profile() as profiler, launch.recording(lambda kernel, *_: kernels.append(kernel.__name__), H100):
        function()
    names = [
        e.name.removeprefix("aten::") for e in profiler.events() if e.name.startswith("aten::") and not e.cpu_children
    ]
    return kernels, [name for name in names if name not in NO_WORK]


def layer(slices=K // TILE):
    """Input, weight, bias and range; no kernel ever reads them."""
    shapes = ((M, K), (N, K), (N,), (slices,))
    return [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_forward_and_backward_with_everything_on_start_nine_kernels(backend):
    x, w, b, r = layer()
    grad = torch.zeros(M, N, dtype=torch.bfloat16)

    def step():
        analog_linear(x, w, b, input_range=r, **EVERYTHING).backward(grad)

    kernels, others = launches(step)
    assert kernels == [
        "weight_kernel",
        "matmul_prepare_kernel",
        "matmul_kernel",
        "weight_kernel",
        "adc_grad_kernel",
        "matmul_dgrad_kernel",
        "matmul_wgrad_kernel",
        "range_grad_kernel",
    ]
    assert others == ["random_"], "the seed, and nothing else"


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_the_start_up_of_the_range_is_two_kernels(backend):
    x, _, _, r = layer()
    count, residual = torch.zeros(K // TILE, dtype=torch.int64), torch.zeros(K // TILE, dtype=torch.bfloat16)
    kernels, others = launches(lambda: update_input_range(x, r.detach(), count, max_input_size=TILE, residual=residual))
    assert kernels == ["moments_kernel", "input_range_learn_kernel"]
    assert others == []


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_evaluation_starts_three_kernels(backend):
    x, w, b, r = layer()
    with torch.no_grad():
        kernels, others = launches(lambda: analog_linear(x, w, b, input_range=r, training=False, **EVERYTHING))
    assert kernels == ["weight_kernel", "matmul_prepare_kernel", "matmul_kernel"]
    assert others == ["zero_"], "where a row's NaN goes, which integers cannot hold"


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_an_ideal_device_is_one_kernel(backend):
    x, w, b, _ = layer()
    with torch.no_grad():
        assert launches(lambda: analog_linear(x, w, b)) == (["matmul_kernel"], [])


class OneLaunch(torch.autograd.Function):
    """Stands for torch's fused cell, which needs a GPU."""

    @staticmethod
    def forward(ctx, gates_x, gates_h, c):
        ctx.save_for_backward(gates_x, c)
        ctx.set_materialize_grads(False)
        return torch.empty_like(c), torch.negative(c), torch.empty_like(gates_x)

    @staticmethod
    def backward(ctx, *grads):
        gates, c = ctx.saved_tensors
        grad = torch.negative(gates)
        return grad, grad, torch.empty_like(c)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_a_time_step_of_an_lstm_starts_six_kernels_and_five_operations(backend, monkeypatch):
    monkeypatch.setattr(rnn_cells, "is_fused", lambda *_: True)
    monkeypatch.setattr(rnn_cells, "fused_lstm", OneLaunch.apply)
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = TILE
    config.pre_post.input_range.enable, config.pre_post.input_range.init_from_data = True, 0
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_noise, config.forward.out_noise_per_channel, config.forward.out_bound = 0.04, True, 10.0
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.02
    layer = AnalogRNN(AnalogLSTMCell, K, K, dtype=torch.bfloat16, rpu_config=config)

    def of_steps(steps):
        layer.zero_grad()
        before_step(layer)  # so that nothing is left of the other call to add to
        x = torch.zeros(steps, 8, K, dtype=torch.bfloat16, requires_grad=True)

        def step():
            y = layer(x)[0]
            y.backward(y.detach())

        return map(Counter, launches(step))

    (kernels, others), (more_kernels, more_others) = of_steps(2), of_steps(3)
    assert sorted((more_kernels - kernels).elements()) == [
        "adc_grad_kernel",
        "matmul_dgrad_kernel",
        "matmul_kernel",
        "matmul_prepare_kernel",
        "matmul_wgrad_kernel",
        "range_grad_kernel",
    ]
    assert sorted((more_others - others).elements()) == ["add", "add_", "copy_", "neg", "neg"], (
        "the cell forward and backward, and the gradients of the weight, of the state and, in its dtype, of the range"
    )
    assert kernels["weight_kernel"] == more_kernels["weight_kernel"] == 3, "one for all steps, two for the inputs"
    assert others["random_"] == more_others["random_"] == 2
