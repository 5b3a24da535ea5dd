"""A training step's forward and backward of one layer, against AIHWKIT-Lightning's torch mode and ``torch.nn.Linear``.

A script, as the contenders have to take turns: ``python bench/bench_analog_linear.py [--sizes 1024 2048]``. Everything that
is not ideal is on, and Lightning is left out where it is not installed. CPU, fp32; for each contender the median time, half
the distance between the quartiles, and the median as a multiple of Lightning's (else of ``torch.nn.Linear``'s).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from triton_analog import config as analog
from triton_analog.nn import AnalogLinear

Step = Callable[[], tuple[Tensor, ...]]

RANGE = 3.0
WEIGHT_STATES = 30


def set_up(config: Any, types: Any, quantized: bool, noisy: bool) -> Any:
    """``config``, of either library, with converters, bound, and perhaps weight quantization and noise; ranges at rest."""
    config.mapping.max_input_size = 512
    config.forward.inp_res, config.forward.out_bound, config.forward.out_res = 254, 10.0, 254
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data, config.pre_post.input_range.init_value = 0, RANGE
    if quantized:
        config.modifier.quantization_type = types.WeightQuantizationType.DISCRETIZE_PER_CHANNEL
        config.modifier.res = WEIGHT_STATES
    if noisy:
        config.forward.out_noise = 0.04
        config.modifier.noise_type = types.WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
        config.modifier.std_dev = 0.02
    return config


def layers(size: int, quantized: bool, noisy: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    digital = nn.Linear(size, size)
    found: dict[str, nn.Module] = {
        "triton_analog": AnalogLinear(
            size, size, rpu_config=set_up(analog.TorchInferenceRPUConfig(), analog, quantized, noisy)
        ),
    }
    if find_spec("aihwkit_lightning"):
        from aihwkit_lightning.nn import AnalogLinear as LightningLinear
        from aihwkit_lightning.simulator import configs as lightning

        config = set_up(lightning.TorchInferenceRPUConfig(), lightning, quantized, noisy)
        found["aihwkit_lightning"] = LightningLinear(size, size, rpu_config=config)
    for layer in found.values():
        layer.set_weights_and_biases(digital.weight.detach(), digital.bias.detach())  # type: ignore[operator]
    return {name: layer.train() for name, layer in (found | {"torch.nn.Linear": digital}).items()}


def step_of(layer: nn.Module, x: Tensor, grad: Tensor) -> Step:
    """Output, input gradient and parameter gradients of one step."""
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)

    return step


def steps(size: int, rows: int, quantized: bool, noisy: bool) -> dict[str, Step]:
    x, grad = torch.randn(rows, size, requires_grad=True), torch.randn(rows, size)
    return {name: step_of(layer, x, grad) for name, layer in layers(size, quantized, noisy).items()}


def check(size: int, rows: int, quantized: bool) -> None:
    """Without noise both libraries give the same output, up to steps of a converter; with it everything is finite."""
    for name, step in steps(size, rows, quantized, noisy=True).items():
        assert all(result.isfinite().all() for result in step()), name
    quiet = steps(size, rows, quantized, noisy=False)
    if "aihwkit_lightning" in quiet:
        ours, theirs = quiet["triton_analog"](), quiet["aihwkit_lightning"]()
        assert [r.numel() for r in ours] == [r.numel() for r in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b.reshape(a.shape)).norm() <= 1e-2 * b.norm()


def take_turns(contenders: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step: the contenders run one after the other, ``rounds`` times, after one round that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="features, in and out")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in options.sizes:
        for quantized in (False, True):
            check(size, options.rows, quantized)
            seconds = take_turns(steps(size, options.rows, quantized, noisy=True), options.rounds)
            base = "aihwkit_lightning" if "aihwkit_lightning" in seconds else "torch.nn.Linear"
            print(f"{size} features, {options.rows} rows, weight quantization {'on' if quantized else 'off'}")
            for name, times in seconds.items():
                first, _, third = quantiles(times, n=4)
                ratio = median(times) / median(seconds[base])
                print(
                    f"  {name:18} {1e3 * median(times):8.1f} ms +- {5e2 * (third - first):5.1f}  {ratio:5.2f} of {base}"
                )
            if base != "aihwkit_lightning":
                print("  aihwkit_lightning is not installed")


if __name__ == "__main__":
    main()
