"""What only a GPU can show: many samples of its generator, and a small transformer through Inductor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from triton_analog import AnalogOptimizer, TorchInferenceRPUConfig, convert_to_analog, ops, reference
from triton_analog.config import WeightClipType, WeightNoiseInjectionType

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_moments_of_many_normals() -> None:
    """Of 2^28 samples; bounds are five standard errors."""
    n = 2**28
    z = ops.noise(torch.tensor([5], device="cuda"), 2**14, 2**14).double().flatten()
    moments = [z.pow(k).mean().item() for k in range(1, 5)]
    for moment, expected, deviation in zip(moments, (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5), strict=True):
        assert abs(moment - expected) < 5 * deviation / n**0.5
    for bound, beyond in ((1.0, 0.31731), (3.0, 0.0026998), (5.0, 5.733e-7)):
        share = (z.abs() > bound).double().mean().item()
        assert abs(share - beyond) < 5 * (beyond / n) ** 0.5 + 1e-5 * beyond
    pairs = z.view(-1, 2**14)
    for a, b in ((pairs[:, :-1], pairs[:, 1:]), (pairs[:-1], pairs[1:]), (pairs[:, :-4], pairs[:, 4:])):
        assert abs((a * b).mean().item()) < 5 / n**0.5


def test_a_seed_gives_the_normals_of_the_reference() -> None:
    seed = torch.tensor([2**62 + 12345])
    for plane, stream in ((0, 0), (3, 1)):
        ours = ops.noise(seed.cuda(), 1000, 777, plane=plane, stream=stream).cpu()
        expected = reference.noise(seed, 1000, 777, plane=plane, stream=stream)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)  # the GPU's logarithm is approximate near 1


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def everything() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 128
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound, config.forward.out_noise = 12.0, 0.02
    config.pre_post.input_range.enable, config.pre_post.input_range.init_from_data = True, 3
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.02
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    return config


@pytest.mark.parametrize("noisy", [False, True])
def test_a_transformer_trains_through_inductor(noisy: bool) -> None:
    config = everything()
    if not noisy:
        config.forward.out_noise = config.modifier.std_dev = 0.0
    eager = convert_to_analog(nn.Sequential(*(Block(256) for _ in range(2))), config).cuda()
    compiled_model = copy.deepcopy(eager)
    compiled = torch.compile(compiled_model, fullgraph=True)
    x = torch.randn(4, 64, 256, device="cuda")
    losses = []
    for model, run in ((eager, eager), (compiled_model, compiled)):
        optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=1e-3)
        own = []
        for _ in range(6):
            with torch.autocast("cuda", torch.bfloat16):
                loss = (run(x) - x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(loss.item())
        assert own[-1] < own[0]
        losses.append(own)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
