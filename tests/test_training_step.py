"""What one training step of a layer starts on a GPU, read without one: kernels are recorded instead of started."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile
from triton.backends.compiler import GPUTarget

from triton_analog import launch
from triton_analog.functional import analog_linear, update_input_range

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
