"""What only a GPU can show: many samples of its generator, and a small transformer through Inductor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from triton_analog import AnalogOptimizer, TorchInferenceRPUConfig, analyze, convert_to_analog, ops, reference
from triton_analog.analysis import run as analysis_run
from triton_analog.config import WeightClipType, WeightNoiseInjectionType, WeightNoiseType
from triton_analog.inference import PCMLikeNoiseModel, program

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


def test_cuda_graphs_of_inductor_learn_ranges_and_draw_noise_anew() -> None:
    """``torch.compile(mode="reduce-overhead")`` replays: every replay has noise of its own, the start-up of the ranges goes
    on and ends, and gradients reach them."""
    model = convert_to_analog(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)), everything()).cuda()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    inputs = [torch.randn(32, 256, device="cuda") * (1 + step) for step in range(6)]
    for x in inputs:
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()  # gradients lie in the graph's memory, which the next replay writes again
        compiled(x).sum().backward()
        eager(x).sum().backward()
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for ours, theirs in zip(model.analog_layers(), eager.analog_layers(), strict=True):
        assert ours.input_range_update_idx.tolist() == [3] * ours.slices
        assert theirs.input_range_update_idx.tolist() == [3] * ours.slices
        assert ours.input_range.grad is not None
    # The first layer's inputs do not depend on noise.
    torch.testing.assert_close(model[0].input_range, eager[0].input_range)
    outputs = []
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        outputs.append(compiled(inputs[0]).clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_a_captured_training_step_goes_on_learning() -> None:
    """Forward, backward, optimizer and clip in one CUDA graph: the loss falls, the weights stay clipped, and no two replays
    have the same noise."""
    config = everything()
    config.pre_post.input_range.init_from_data = 0
    model = convert_to_analog(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16)), config).cuda()
    optimizer = AnalogOptimizer(
        torch.optim.AdamW, model.analog_layers, model.parameters(), lr=3e-3, fused=True, capturable=True
    )
    x, target = torch.randn(256, 64, device="cuda"), torch.randn(256, 16, device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(60):
        graph.replay()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert len(set(losses)) == len(losses)
    for layer in model.analog_layers():
        deviation = layer.weight.float().std(dim=1, keepdim=True)
        assert (layer.weight.abs() <= 2.6 * deviation).all(), "clipped to 2.5 deviations of before the clip"


def test_an_analysis_waits_once_and_finds_what_it_finds_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, x = everything(), torch.randn(64, 16, 200)
    settings.forward.out_bound = 1.5
    model = convert_to_analog(Block(200), settings)
    expected = analyze(model, [x], verbose=False)
    collect = analysis_run._to_host

    def to_host(found: list[Tensor]) -> list[list[float]]:
        torch.cuda.set_sync_debug_mode("default")
        return collect(found)

    def forward(model: nn.Module, batch: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error")
        model(batch)

    analyze(model.cuda(), [x.cuda()], verbose=False)  # kernels are compiled
    monkeypatch.setattr(analysis_run, "_to_host", to_host)
    before = torch.cuda.get_rng_state()
    try:
        found = analyze(model, [x.cuda()] * 2, forward=forward, verbose=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours.snr_db == pytest.approx(theirs.snr_db, abs=0.1)
        assert ours.clipped == pytest.approx(theirs.clipped, abs=1e-3)
        assert ours.saturated == pytest.approx(theirs.saturated, abs=1e-3)
        assert ours.kurtosis == pytest.approx(theirs.kurtosis, rel=1e-4)


@pytest.mark.parametrize("read_noise", ["time", "forward"])
def test_a_captured_forward_in_evaluation_reads_anew_and_never_waits(read_noise) -> None:
    """Read noise of the configs, and of the devices of a chip: no two replays are the same, and torch's seed repeats them."""
    config = everything()
    config.forward.w_noise, config.forward.w_noise_type = 0.02, WeightNoiseType.PCM_READ
    model = convert_to_analog(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)), config).cuda().eval()
    chip = program(model, PCMLikeNoiseModel(), read_noise=read_noise).drift_to(3600.0)
    x = torch.randn(32, 256, device="cuda")
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                chip(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chip(x)
        outputs = []
        for seed in (0, None, 0):
            if seed is not None:
                torch.manual_seed(seed)
            graph.replay()
            outputs.append(y.clone())
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert 1e-3 < (outputs[0] - outputs[1]).norm() / outputs[0].norm() < 0.5
