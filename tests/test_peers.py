"""The same numbers as AIHWKIT's torch tile and AIHWKIT-Lightning's torch mode, where those are installed; noise off.

One slice of weights spans ``+-wmax``, so AIHWKIT's normalised tile (``weight_scaling_omega = 1``) holds ``W / max|W|``.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import assert_same_up_to_one_step
from torch import nn

from triton_analog.functional import analog_linear

IN, OUT, ROWS = 50, 21, 40


@pytest.fixture
def problem():
    x = 1.5 * torch.randn(ROWS, IN)
    return x, 0.2 * torch.randn(OUT, IN), torch.randn(OUT), torch.randn(ROWS, OUT)


def gradients(layer, x, grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("tile", [-1, 20])
@pytest.mark.parametrize("adc", [False, True])
@pytest.mark.parametrize("dac", [False, True])
def test_aihwkits_torch_tile(problem, tile, adc, dac):
    pytest.importorskip(
        "aihwkit", reason="aihwkit is an optional peer: pip install --only-binary :all: --no-deps aihwkit==1.1.0"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from aihwkit.nn import AnalogLinear
        from aihwkit.simulator.configs import TorchInferenceRPUConfig
        from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType

    x, w, b, grad = problem
    r, bound = 2.0, 3.0
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = 1 / 254 if dac else -1
    config.forward.out_res = 1 / 254 if adc else -1
    config.forward.out_bound = bound if adc else -1
    config.forward.out_noise = config.forward.w_noise = 0.0
    config.forward.noise_management = NoiseManagementType.NONE
    config.forward.bound_management = BoundManagementType.NONE
    config.mapping.max_input_size, config.mapping.max_output_size = tile, 0
    config.mapping.weight_scaling_omega, config.mapping.weight_scaling_columnwise = 1.0, False
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data, config.pre_post.input_range.init_value = 0, r
    layer = AnalogLinear(IN, OUT, rpu_config=config)
    layer.set_weights(w, b)
    layer.remap_analog_weights(1.0)

    slices = 1 if tile < 0 else 3
    settings = {"max_input_size": tile, "inp_res": 254 if dac else -1}
    settings |= {"out_bound": bound, "out_res": 254} if adc else {}
    ranges = torch.full((slices,), r)
    ours = gradients(lambda v: analog_linear(v, w, b, input_range=ranges, **settings), x, grad)
    theirs = gradients(layer, x, grad)
    assert_same_up_to_one_step(ours[0], theirs[0], step=2 * r * bound * w.abs().max() / 254)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "random", [{"inp_sto_round": True}, {"inp_noise": 0.05}, {"inp_noise": 0.05, "inp_sto_round": True}], ids="+".join
)
def test_aihwkits_random_inputs(random):
    """Mean and deviation of each converted input, clipped ones among them, and of a product, in AIHWKIT's torch tile and here."""
    pytest.importorskip(
        "aihwkit", reason="aihwkit is an optional peer: pip install --only-binary :all: --no-deps aihwkit==1.1.0"
    )
    from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType
    from aihwkit.simulator.parameters.io import IOParameters
    from aihwkit.simulator.tiles.analog_mvm import AnalogMVM

    draws, r = 40_000, 2.0
    x = torch.tensor([0.0, 0.11, -0.37, 1.234, -1.999, 2.0, -2.0])
    w = torch.cat([torch.eye(len(x)), torch.ones(1, len(x))])
    theirs = IOParameters(inp_res=1 / 30, out_res=-1, out_bound=0.0, out_noise=0.0, **random)
    theirs.noise_management, theirs.bound_management = NoiseManagementType.NONE, BoundManagementType.NONE
    many = x.expand(draws, -1)
    expected = r * AnalogMVM.matmul(w, many / r, theirs)
    ours = analog_linear(many, w, input_range=torch.tensor([r]), inp_res=30, **random)
    variance = expected.var(0)
    error = (2 * variance / draws).sqrt() + 1e-6
    assert ((ours.mean(0) - expected.mean(0)).abs() < 5 * error).all()
    fourth = ((expected - expected.mean(0)) ** 4).mean(0)
    error = (2 * (fourth - variance**2).clamp(min=0) / draws).sqrt() + 1e-6
    assert ((ours.var(0) - variance).abs() < 5 * error).all()
    assert variance[:-1].max() > 1e-4


@pytest.mark.parametrize("tile", [-1, 20])
@pytest.mark.parametrize(
    ("quantization", "clip"),
    [
        ("NONE", "NONE"),
        ("DISCRETIZE", "NONE"),
        ("DISCRETIZE_PER_CHANNEL", "NONE"),
        ("NONE", "LEARNABLE_PER_CHANNEL"),
        ("DISCRETIZE_PER_CHANNEL", "LEARNABLE_PER_CHANNEL"),
    ],
)
@pytest.mark.parametrize("ranged", ["static", "dynamic", "fast"])
def test_aihwkit_lightnings_torch_mode(problem, tile, quantization, clip, ranged):
    """Values and every gradient, range and learned clip included, of a layer with the same state; one config each."""
    pytest.importorskip(
        "aihwkit_lightning", reason="the predecessor is an optional peer: pip install aihwkit-lightning"
    )
    from aihwkit_lightning.nn import AnalogLinear as LightningLinear
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig as LightningConfig
    from aihwkit_lightning.simulator.configs import WeightClipType, WeightQuantizationType

    from triton_analog import config as ours_config
    from triton_analog.nn import AnalogLinear

    x, w, b, grad = problem

    def build(layer_type, config, clip_types, quantization_types) -> nn.Module:
        config.mapping.max_input_size = tile
        config.forward.inp_res, config.forward.out_bound, config.forward.out_res = 254, 3.0, 254
        config.pre_post.input_range.enable = True
        config.pre_post.input_range.dynamic = ranged == "dynamic"
        config.pre_post.input_range.fast_mode = ranged == "fast"
        config.pre_post.input_range.init_from_data = 0
        config.pre_post.input_range.init_value = 2.0
        config.modifier.quantization_type = getattr(quantization_types, quantization)
        config.modifier.res = 30 if quantization != "NONE" else 0.0
        config.clip.type = getattr(clip_types, clip)
        layer = layer_type(IN, OUT, rpu_config=config)
        layer.set_weights_and_biases(w, b)
        if clip != "NONE":
            with torch.no_grad():
                layer.learnable_weight_clip.mul_(0.7)
        return layer.train()

    theirs = build(LightningLinear, LightningConfig(), WeightClipType, WeightQuantizationType)
    ours = build(
        AnalogLinear,
        ours_config.TorchInferenceRPUConfig(),
        ours_config.WeightClipType,
        ours_config.WeightQuantizationType,
    )
    results = [gradients(layer, x, grad) for layer in (ours, theirs)]
    widest = 2 * x.abs().max() * 3.0 * w.abs().max() / 254
    assert_same_up_to_one_step(results[0][0], results[1][0], step=widest)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            peer = parameters[name].grad.reshape(parameter.shape)
            torch.testing.assert_close(parameter.grad, peer, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranged", ["static", "dynamic"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_aihwkit_lightnings_convolutions(rank, ranged):
    """Slices of the patches, in the same order: values and every gradient."""
    lightning = pytest.importorskip(
        "aihwkit_lightning.nn", reason="the predecessor is an optional peer: pip install aihwkit-lightning"
    )
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig as LightningConfig

    import triton_analog.nn as ours_nn
    from triton_analog import TorchInferenceRPUConfig

    def build(library, config) -> nn.Module:
        config.mapping.max_input_size = 7
        config.forward.inp_res, config.forward.out_bound, config.forward.out_res = 254, 3.0, 254
        config.pre_post.input_range.enable = True
        config.pre_post.input_range.dynamic = ranged == "dynamic"
        config.pre_post.input_range.init_from_data = 0
        config.pre_post.input_range.init_value = 2.0
        layer = getattr(library, f"AnalogConv{rank}d")(3, 5, 2, stride=2, padding=1, rpu_config=config)
        return layer.train()

    theirs, ours = build(lightning, LightningConfig()), build(ours_nn, TorchInferenceRPUConfig())
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.view_as(theirs.weight))
        theirs.bias.copy_(ours.bias)
    x = 1.5 * torch.randn(4, 3, *[6] * rank)
    grad = torch.randn_like(ours(x))
    results = [gradients(layer, x, grad) for layer in (ours, theirs)]
    assert_same_up_to_one_step(
        results[0][0], results[1][0], step=2 * x.abs().max() * 3.0 * ours.weight.abs().max() / 254
    )
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        peer = parameters[name].grad.reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad, peer, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
