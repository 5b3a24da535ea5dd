"""Handwritten digits on noisy analog tiles: what hardware-aware training is worth.

Trains the same small network twice, plainly and with the hardware in the loop, then maps both to analog tiles whose weights
are programmed ever less precisely, and compares the accuracy on the test images.

    python examples/digits.py              the comparison, as a table and a plot
    python examples/digits.py --kernels    a short training on the Triton kernels, held against the torch reference
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from triton_analog import ops
from triton_analog.config import TorchInferenceRPUConfig, WeightClipType, WeightNoiseInjectionType
from triton_analog.convert import convert_to_analog
from triton_analog.functional import draw_seed
from triton_analog.launch import backend
from triton_analog.nn import AnalogLinear
from triton_analog.optim import AnalogOptimizer, parameter_groups

BATCH = 32
LEARNING_RATE = 1e-3
NOISE_LEVELS = (0.0, 0.02, 0.05, 0.10, 0.15, 0.20)  # standard deviation, as a fraction of a tile's largest weight

KERNEL_TOLERANCE = 1e-3
"""Relative. A value on the edge between two steps of a converter may round either way, which later steps then feel: noise of
1e-7 on the initial weights moved the losses of 20 steps by at most 3e-4 in 30 runs. Wrong noise moved them by 3e-3 or more."""

Trainee = tuple[nn.Module, torch.optim.Optimizer]


class Digits(NamedTuple):
    """1797 images of 8 x 8 pixels, three quarters of them for training."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data() -> Digits:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.tensor(part) for part in split)
    return Digits(train_x.float(), train_y, test_x.float(), test_y)


def batches(data: Digits, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of training images, over and over."""
    waiting: list[Tensor] = []
    for _ in range(steps):
        waiting = waiting or list(torch.randperm(len(data.train_x)).split(BATCH))
        index = waiting.pop()
        yield data.train_x[index], data.train_y[index]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


# ---- The hardware -------------------------------------------------------------------------------------------------------


def hardware() -> TorchInferenceRPUConfig:
    """Tiles of 32 inputs with 8-bit converters on both sides; the layers then have 2, 4 and 2 slices."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 32
    config.forward.inp_res = 2**8 - 2
    config.forward.out_res = 2**8 - 2
    config.forward.out_bound = 12.0
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 30
    return config


def hardware_in_training() -> TorchInferenceRPUConfig:
    """The same tiles, with noise on the weights in every training step and weights clipped after each."""
    config = hardware()
    config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL
    config.modifier.std_dev = 0.10
    config.clip.type = WeightClipType.LAYER_GAUSSIAN
    config.clip.sigma = 2.0
    return config


def program(model: nn.Module, noise: float) -> nn.Module:
    """A copy of the model on a chip of its own.

    Programming a chip misses every weight once and for good. So the noise is drawn here and stored, and the model runs in
    eval mode, where converters and ranges act but nothing is drawn; the noise of training mode is new in every forward.
    """
    chip = copy.deepcopy(model).eval()
    for layer in chip.modules():
        if isinstance(layer, AnalogLinear):
            seed = draw_seed(layer.weight.device)
            weight, _ = ops.weight(layer.weight, layer.slices, noise_type="per_tensor", std_dev=noise, seed=seed)
            layer.set_weights(weight)
    return chip


# ---- Training and evaluation --------------------------------------------------------------------------------------------


def plain() -> Trainee:
    model = network()
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def hardware_aware() -> Trainee:
    model = convert_to_analog(network(), hardware_in_training())
    parameters = parameter_groups(model, weight_decay=0.01)  # AdamW's own, but not of input ranges
    return model, AnalogOptimizer(torch.optim.AdamW, model.analog_layers, parameters, lr=LEARNING_RATE)


def train(trainee: Trainee, data: Digits, steps: int, progress: tqdm) -> list[float]:
    """Returns the loss of every step."""
    model, optimizer = trainee
    losses = []
    for images, labels in batches(data, steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        progress.update()
    return losses


def map_to_tiles(model: nn.Module, data: Digits) -> nn.Module:
    """The plainly trained network on the same tiles, with input ranges estimated from the training images."""
    analog = convert_to_analog(model, hardware())
    with torch.no_grad():
        for images, _ in batches(data, hardware().pre_post.input_range.init_from_data):
            analog(images)
    return analog


@torch.no_grad()
def accuracies(model: nn.Module, data: Digits, noise: float, seeds: int, progress: tqdm) -> Tensor:
    """Percentage of test images recognised on each of ``seeds`` chips."""
    percent = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        predicted = program(model, noise)(data.test_x).argmax(1)
        percent.append((predicted == data.test_y).float().mean() * 100)
    progress.update()
    return torch.stack(percent)


def compare(epochs: int, seeds: int, seed: int, out: Path, quiet: bool) -> None:
    data = load_data()
    steps = epochs * math.ceil(len(data.train_x) / BATCH)
    models = {}
    with tqdm(total=2 * steps, desc="training", unit="step", disable=quiet) as progress:
        for name, start in (("plain", plain), ("hardware-aware", hardware_aware)):
            torch.manual_seed(seed)
            trainee = start()
            train(trainee, data, steps, progress)
            models[name] = trainee[0]
    models["plain"] = map_to_tiles(models["plain"], data)
    with tqdm(total=len(models) * len(NOISE_LEVELS), desc="evaluation", unit="level", disable=quiet) as progress:
        results = {
            name: [accuracies(model, data, noise, seeds, progress) for noise in NOISE_LEVELS]
            for name, model in models.items()
        }
    print_table(results, seeds)
    plot(results, seeds, out)
    print(f"plot: {out}")


def print_table(results: dict[str, list[Tensor]], seeds: int) -> None:
    print(f"Accuracy on the test images in %, mean +- standard deviation over {seeds} programmed chips")
    print(f"{'weight noise':>12s}" + "".join(f"{name:>18s}" for name in results))
    for noise, *row in zip(NOISE_LEVELS, *results.values(), strict=True):
        print(f"{noise:12.0%}" + "".join(f"{percent.mean():11.1f} +- {percent.std():3.1f}" for percent in row))


def plot(results: dict[str, list[Tensor]], seeds: int, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    levels = [100 * noise for noise in NOISE_LEVELS]
    for name, rows in results.items():
        axes.errorbar(
            levels, [row.mean() for row in rows], [row.std() for row in rows], marker="o", capsize=3, label=name
        )
    axes.set_title(f"Digits recognised on {seeds} noisy analog chips,\nmean and standard deviation")
    axes.set_xlabel("weight noise (% of a tile's largest weight)")
    axes.set_ylabel("test accuracy (%)")
    axes.legend()
    axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


# ---- Kernels against reference ------------------------------------------------------------------------------------------


def compare_kernels(seed: int, steps: int, quiet: bool) -> None:
    """Train from the same seed through the reference and through the kernels, and hold the losses against each other.

    Exits with a message if they differ by more than ``KERNEL_TOLERANCE``.
    """
    data = load_data()
    curves = {}
    for name in ("reference", "kernel"):
        with backend(name), tqdm(total=steps, desc=name, unit="step", disable=quiet) as progress:
            torch.manual_seed(seed)
            curves[name] = train(hardware_aware(), data, steps, progress)
    print(f"{'step':>4s}{'reference':>12s}{'kernel':>12s}{'difference':>12s}")
    largest = 0.0
    for step, (expected, loss) in enumerate(zip(curves["reference"], curves["kernel"], strict=True), 1):
        difference = abs(loss - expected) / expected
        largest = max(largest, difference)
        print(f"{step:4d}{expected:12.6f}{loss:12.6f}{difference:12.1e}")
    print(f"largest relative difference {largest:.1e}, allowed {KERNEL_TOLERANCE:.0e}")
    if not largest <= KERNEL_TOLERANCE:
        sys.exit("The kernels do not train as the reference does.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="noisy chips per noise level (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="the plot (default %(default)s)")
    parser.add_argument("--kernels", action="store_true", help="compare the Triton kernels with the reference instead")
    parser.add_argument("--steps", type=int, default=20, help="training steps of --kernels (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are too small to be shared between cores
    if not args.kernels:
        compare(args.epochs, args.seeds, args.seed, args.out, args.quiet)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        compare_kernels(args.seed, args.steps, args.quiet)
    else:  # Triton reads the variable while it is imported, so start again with it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})


if __name__ == "__main__":
    main()
