"""A layer that is changed in any way computes what one does that was never called before: no plan or check is used for
another signature than its own. Every change is also tried where it changes nothing."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import needs_interpreter, viewed
from torch import Tensor, nn
from torch.autograd import forward_ad

from triton_analog import TorchInferenceRPUConfig, calls, launch, ops
from triton_analog.config import WeightClipType, WeightNoiseInjectionType, WeightQuantizationType
from triton_analog.functional import analog_linear
from triton_analog.launch import plan
from triton_analog.nn import AnalogConv1d, AnalogLinear
from triton_analog.optim import before_step

ROWS, FEATURES, OUTPUTS, TILE = 6, 24, 8, 12


def config() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = TILE
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 0
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound, config.forward.out_noise = 5.0, 0.1
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.05
    return config


def forget() -> None:
    """As in a new process."""
    plan.forget()
    calls._known.cache_clear()


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    forget()
    yield
    forget()


def outcome(layer: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output and gradients, as a step has them, of noise that is always the same."""
    torch.manual_seed(7)
    for parameter in layer.parameters():
        parameter.grad = None
    x = x.detach().requires_grad_(x.requires_grad)
    y = layer(x)
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype))
        before_step(layer)
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    return len(first) == len(second) and all(
        (a is None) == (b is None) and (a is None or b is None or (a.dtype == b.dtype and torch.equal(a, b)))
        for a, b in zip(first, second, strict=True)
    )


def set_field(path: str, value: Any) -> Callable[[AnalogLinear, Tensor], tuple[AnalogLinear, Tensor]]:
    def change(layer: AnalogLinear, x: Tensor) -> tuple[AnalogLinear, Tensor]:
        section = layer.rpu_config
        *sections, name = path.split(".")
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
        return layer, x

    return change


def replace_section(layer: AnalogLinear, x: Tensor) -> tuple[AnalogLinear, Tensor]:
    layer.rpu_config.forward = copy.deepcopy(layer.rpu_config.forward)
    layer.rpu_config.forward.out_bound = 1.0
    return layer, x


def replace_config(layer: AnalogLinear, x: Tensor) -> tuple[AnalogLinear, Tensor]:
    layer.rpu_config = copy.deepcopy(layer.rpu_config)
    layer.rpu_config.forward.inp_res = 6
    return layer, x


def reconfigure(layer: AnalogLinear, x: Tensor) -> tuple[AnalogLinear, Tensor]:
    changed = copy.deepcopy(layer.rpu_config)
    changed.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    layer.reconfigure(changed)
    return layer, x


def new_storage(layer: AnalogLinear, x: Tensor) -> tuple[AnalogLinear, Tensor]:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    return layer, x


def unaligned(layer: AnalogLinear, x: Tensor) -> tuple[AnalogLinear, Tensor]:
    layer.weight.data = torch.cat([layer.weight.new_zeros(1), layer.weight.detach().flatten()])[1:].view_as(
        layer.weight
    )
    return layer, x


def frozen(layer: AnalogLinear, x: Tensor) -> tuple[AnalogLinear, Tensor]:
    layer.weight.requires_grad_(False)
    return layer, x


CHANGES: dict[str, Callable[[AnalogLinear, Tensor], tuple[AnalogLinear, Tensor]]] = {
    "inp_res": set_field("forward.inp_res", 14),
    "out_res": set_field("forward.out_res", 14),
    "out_bound": set_field("forward.out_bound", 0.5),
    "no bound": lambda layer, x: set_field("forward.out_res", -1)(*set_field("forward.out_bound", 0.0)(layer, x)),
    "out_noise": set_field("forward.out_noise", 0.5),
    "out_noise off": set_field("forward.out_noise", 0.0),
    "out_noise_per_channel": set_field("forward.out_noise_per_channel", True),
    "std_dev": set_field("modifier.std_dev", 0.5),
    "noise_type": set_field("modifier.noise_type", WeightNoiseInjectionType.ADD_NORMAL),
    "noise off": set_field("modifier.noise_type", WeightNoiseInjectionType.NONE),
    "quantization": lambda layer, x: set_field(
        "modifier.quantization_type", WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    )(*set_field("modifier.res", 14)(layer, x)),
    "decay": set_field("pre_post.input_range.decay", 0.5),
    "input_min_percentage": lambda layer, x: set_field("pre_post.input_range.input_min_percentage", 0.0)(
        *set_field("pre_post.input_range.decay", 0.5)(layer, x)
    ),
    "fast_mode": set_field("pre_post.input_range.fast_mode", True),
    "another section": replace_section,
    "another config": replace_config,
    "a learned clip": reconfigure,
    "more rows": lambda layer, x: (layer, torch.cat([x, x[:1]])),
    "three dimensions": lambda layer, x: (layer, x.view(2, 3, FEATURES)),
    "a transposed input": lambda layer, x: (layer, viewed(x, "transposed")),
    "a strided input": lambda layer, x: (layer, viewed(x, "strided")),
    "an unaligned input": lambda layer, x: (layer, viewed(x, "column_sliced")),
    "other inputs": lambda layer, x: (layer, x * 2),
    "an input without gradient": lambda layer, x: (layer, x.detach()),
    "bf16": lambda layer, x: (layer.to(torch.bfloat16), x.to(torch.bfloat16)),
    "fp64": lambda layer, x: (layer.double(), x.double()),
    "another weight": new_storage,
    "an unaligned weight": unaligned,
    "a weight changed in place": lambda layer, x: (layer.weight.data.mul_(2) is None or layer, x),
    "a frozen weight": frozen,
    "a frozen layer": lambda layer, x: (layer.requires_grad_(False), x),
    "no bias": lambda layer, x: (setattr(layer, "bias", None) or layer, x),
    "a range changed in place": lambda layer, x: (layer.input_range.data.mul_(0.1) is None or layer, x),
    "evaluation": lambda layer, x: (layer.eval(), x),
    "a copy": lambda layer, x: (copy.deepcopy(layer), x),
}


SAME_NUMBERS = {
    "a copy", "a transposed input", "a strided input", "an unaligned input", "an unaligned weight", "three dimensions",
}  # fmt: skip
"""Changes of memory and shape alone."""


NUMBERS_OF_THE_CONFIG = {
    "out_res", "out_bound", "out_noise", "out_noise off", "out_noise_per_channel", "std_dev", "noise_type", "noise off", "decay",
    "input_min_percentage", "fast_mode", "another section", "another config", "a frozen layer", "other inputs", "another weight",
    "a weight changed in place", "a range changed in place",
}  # fmt: skip
"""Changes that reach kernels as "inp_res" does, or not at all: they are seen with the reference."""
CASES = [(name, "reference") for name in CHANGES] + [
    (name, "kernel") for name in CHANGES if name not in NUMBERS_OF_THE_CONFIG
]


@needs_interpreter
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_changed_layer_computes_as_a_new_one(name, backend, device):
    layer = AnalogLinear(FEATURES, OUTPUTS, rpu_config=config()).to(device)
    x = torch.randn(ROWS, FEATURES, device=device).requires_grad_()
    first = outcome(layer, x)
    assert same(outcome(layer, x), first)
    layer, x = CHANGES[name](layer, x)
    changed, again = outcome(layer, x), outcome(layer, x)
    forget()
    assert same(changed, outcome(layer, x))
    assert same(again, changed)
    if name not in SAME_NUMBERS:
        assert not same(changed, first)


@needs_interpreter
def test_a_convolution_sees_its_new_padding(backend, device):
    layer = AnalogConv1d(3, 4, 3, padding=1, rpu_config=config()).to(device)
    x = torch.randn(2, 3, 9, device=device).requires_grad_()
    outcome(layer, x)
    layer.padding, layer.stride = (0,), (2,)
    changed = outcome(layer, x)
    assert changed[0].shape == (2, 4, 4)
    forget()
    assert same(changed, outcome(layer, x))


@needs_interpreter
def test_grad_mode_and_autocast_are_part_of_a_call(backend, device):
    layer = AnalogLinear(FEATURES, OUTPUTS, rpu_config=config()).to(device)
    x = torch.randn(ROWS, FEATURES, device=device).requires_grad_()
    with_gradient = outcome(layer, x)
    with torch.no_grad():
        without = outcome(layer, x)
    assert with_gradient[1] is not None
    assert without[1] is None
    assert torch.equal(without[0], with_gradient[0])
    with torch.inference_mode():
        assert torch.equal(outcome(layer, x.clone())[0], without[0])
    with torch.autocast(device.type, torch.bfloat16):
        narrow = outcome(layer, x)
    assert narrow[0].dtype == torch.bfloat16
    assert same(outcome(layer, x), with_gradient)


@needs_interpreter
def test_the_precision_of_fp32_products_is_part_of_a_plan(monkeypatch):
    """torch.set_float32_matmul_precision may be called at any time."""
    asked = []
    monkeypatch.setattr(plan, "input_precision", lambda: asked.append(1) or "ieee")
    with launch.backend("kernel"):
        calls.linear_forward(
            *(torch.randn(2, 4), torch.randn(3, 4)), *[None] * 8, 1, False, -1.0, 0.0, False, 0.0, False, 0.0, False, -1.0,
            "none", 0.0, "none", 0.0, "full", None, False,
        )  # fmt: skip
    assert asked


@needs_interpreter
def test_deterministic_outputs_are_filled_by_replays_too(backend, device):
    """Tests rely on it: what a kernel leaves out shows as NaN, also where its plan allocates."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        allocated = plan.Plan()
        for _ in range(2):
            out = allocated.run(torch.empty_like, (torch.ones(3, device=device),), [torch.ones(3, device=device)])
            assert out.isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_share_plans(device):
    """The backward runs in threads, and so do the replicas of DataParallel. (Triton's interpreter knows but one.)"""
    layer = AnalogLinear(FEATURES, OUTPUTS, rpu_config=config()).to(device).eval()
    inputs = [torch.randn(ROWS + index % 3, FEATURES, device=device) for index in range(8)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
    forget()
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[index] = layer(inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, y in enumerate(expected):
        assert torch.equal(found[index], y)


def _forward_of_child(layer: nn.Module, x: Tensor, queue: Any) -> None:
    with torch.no_grad():
        queue.put(layer(x).numpy())


def test_a_forked_process_goes_on_with_the_plans():
    layer = AnalogLinear(FEATURES, OUTPUTS, rpu_config=config()).eval()
    x = torch.randn(ROWS, FEATURES)
    with torch.no_grad():
        expected = layer(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    child = context.Process(target=_forward_of_child, args=(layer, x, queue))
    child.start()
    assert torch.equal(torch.from_numpy(queue.get(timeout=60)), expected)
    child.join()


@needs_interpreter
def test_the_same_tensor_twice_is_not_taken_for_one(device):
    """A plan that was written for one tensor in two places is used for two tensors later."""
    with launch.backend("kernel"):
        for _ in range(2):
            w, x = torch.randn(8, 8, device=device), torch.randn(8, 8, device=device)
            twice, copied = (calls.linear(w, other, *[None] * 7, calls.Numbers()) for other in (w, w.clone()))
            assert torch.equal(twice, copied)
            torch.testing.assert_close(calls.linear(x, w, *[None] * 7, calls.Numbers()), x @ w.T)


@needs_interpreter
def test_numbers_that_are_not_in_memory_as_they_are(backend, device):
    """The imaginary part of a conjugate is a view whose sign only torch's dispatcher knows."""
    w = torch.randn(3, 8, device=device)
    for _ in range(2):
        x = torch.randn(4, 8, dtype=torch.complex64, device=device).conj().imag
        assert x.is_neg()
        assert torch.equal(analog_linear(x, w), analog_linear(x.resolve_neg(), w))
    leaf = torch.randn(4, 8, device=device).requires_grad_()
    grad = torch.randn(4, 3, dtype=torch.complex64, device=device).conj().imag
    negated, resolved = (torch.autograd.grad(analog_linear(leaf, w), leaf, g)[0] for g in (grad, grad.resolve_neg()))
    assert torch.equal(negated, resolved)


@needs_interpreter
def test_a_tangent_is_not_lost(backend, device):
    x, w = torch.randn(4, 8, device=device), torch.randn(3, 8, device=device)
    for lost in (lambda x: analog_linear(x, w), lambda x: ops.dac(x, torch.ones(1, device=device), 1)):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(lost, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            lost(forward_ad.make_dual(x, x))


def test_what_is_allowed_under_autocast_alone_is_refused_outside_again(device):
    x, w = torch.randn(4, 8, device=device, dtype=torch.bfloat16), torch.randn(3, 8, device=device)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16):
            analog_linear(x, w)
        with pytest.raises(TypeError, match=r"x: dtype torch\.bfloat16, but weight is torch\.float32"):
            analog_linear(x, w)


def test_equal_numbers_of_other_types_are_checked_anew():
    x, w = torch.randn(2, 8), torch.randn(3, 8)
    analog_linear(x, w, max_input_size=4)
    with pytest.raises(TypeError, match=r"max_input_size: got 4\.0; an int is needed"):
        analog_linear(x, w, max_input_size=4.0)


def test_the_number_of_remembered_calls_is_bounded():
    assert calls._known.cache_info().maxsize == plan._plan.cache_info().maxsize == plan.PLANS


@needs_interpreter
def test_plans_keep_no_tensors(device):
    with launch.backend("kernel"):
        layer = AnalogLinear(FEATURES, OUTPUTS, rpu_config=config()).to(device)
        for _ in range(2):
            layer(torch.randn(ROWS, FEATURES, device=device)).sum().backward()
    seen = [weakref.ref(parameter) for parameter in layer.parameters()]
    del layer
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
