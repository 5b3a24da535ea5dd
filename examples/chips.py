"""Handwritten digits on simulated chips: what is left of the accuracy after a second, a day, a year.

Trains the network of digits.py plainly and with the hardware in the loop, shows what both do on their tiles, programs them
into chips of phase-change memory, and lets time pass.

    python examples/chips.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import BATCH, hardware_aware, load_data, map_to_tiles, plain, train
from tqdm import tqdm

from triton_analog import analyze
from triton_analog.inference import PCMLikeNoiseModel, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description="Handwritten digits on simulated chips, over time.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--chips", type=int, default=10)
    parser.add_argument("--compensation", choices=["none", "global", "per_column"], default="global")
    parser.add_argument("--read-noise", choices=["time", "forward"], default="time", help="when devices are read anew")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the plots and the numbers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    data = load_data()
    steps = given.epochs * len(data.train_x) // BATCH

    def accuracy(model: torch.nn.Module) -> torch.Tensor:
        """Percentage of the test images that are recognised."""
        return (model(data.test_x).argmax(1) == data.test_y).float().mean() * 100

    for name, start in (("plain", plain), ("hardware-aware", hardware_aware)):
        torch.manual_seed(0)
        trainee = start()
        with tqdm(total=steps, desc=f"training, {name}", unit="step") as progress:
            train(trainee, data, steps, progress)
        model = map_to_tiles(trainee[0], data) if name == "plain" else trainee[0]
        analysis = analyze(model, [data.test_x], verbose=False)
        print(f"\n{name}, before it is programmed:\n{analysis}\n")
        analysis.plot(given.out / f"layers-{name}.png")
        found = evaluate(
            model, accuracy, noise_model=PCMLikeNoiseModel(), seeds=given.chips, compensation=given.compensation,
            read_noise=given.read_noise,
        )  # fmt: skip
        print(f"\n{name}: {found}\n")
        (given.out / f"chips-{name}.json").write_text(found.to_json(), "utf-8")
        found.plot(given.out / f"chips-{name}.png")


if __name__ == "__main__":
    main()
