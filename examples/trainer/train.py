"""A language model, trained with the hardware in the loop by Hugging Face's Trainer.

Trains a causal language model on analog tiles (the recipe of Analog Foundation Models, arXiv 2505.09663: learned input ranges,
8-bit converters, weight noise and clip), or plainly, and prints its perplexity on tiles whose weights are programmed ever less
precisely.

    python train.py                                        a small model of random weights, on this repository's README
    python train.py --digital                              the same trained plainly, and then put on calibrated tiles
    python train.py --model HuggingFaceTB/SmolLM2-135M --text my.txt --steps 1000
    torchrun --nproc-per-node 8 train.py --model ... --deepspeed zero2.json       several processes
    sbatch train.slurm                                     several machines
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from triton_analog.calibrate import InputRangeCalibrationType, calibrate_input_ranges
from triton_analog.config import TorchInferenceRPUConfig, WeightClipType, WeightNoiseInjectionType
from triton_analog.convert import convert_to_analog
from triton_analog.integrations.transformers import AnalogCallback, from_pretrained

NOISE_LEVELS = (0.0, 0.02, 0.05)
CHIPS = 3
"""Draws of the weight noise that a perplexity is the mean of."""


def recipe(start_up: int) -> TorchInferenceRPUConfig:
    """``start_up``: batches that the input ranges learn from before the gradient moves them."""
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 2**8 - 2
    config.forward.out_bound = 14.0
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.03
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    ranges = config.pre_post.input_range
    ranges.enable, ranges.init_from_data, ranges.init_std_alpha = True, start_up, 18.0
    ranges.decay = 0.01
    return config


def on_tiles(model: Any, samples: Tensor) -> Any:
    """``model`` on tiles as in :func:`recipe`, not trained for them: input ranges are the largest inputs in ``samples``."""
    model = convert_to_analog(model, TorchInferenceRPUConfig(), exclude_modules=["lm_head"]).eval()
    calibrate_input_ranges(model, InputRangeCalibrationType.MAX, [((samples,), {})], verbose=False)
    for layer in model.analog_layers():
        layer.rpu_config.forward = recipe(start_up=0).forward
    return model


class Blocks(Dataset):
    """A text in blocks of equal length."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def load(name: str | None, text: str) -> tuple[Any, Tensor]:
    """Model and tokens: of a folder or a name on the Hub, or a small model that reads bytes."""
    if name is not None:
        tokens = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids[0]
        return AutoModelForCausalLM.from_pretrained(name), tokens
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.tensor(list(text.encode()))


@torch.no_grad()
def perplexity(model: Any, blocks: Blocks) -> float:
    model.eval()
    losses = [
        model(input_ids=row[None].to(model.device), labels=row[None].to(model.device)).loss for row in blocks.blocks
    ]
    return math.exp(torch.stack(losses).mean().item())


def perplexity_on_chips(model: Any, blocks: Blocks, noise: float) -> float:
    """Mean over chips whose weights were programmed with an error of ``noise`` times the largest weight of each channel."""
    found = []
    for seed in range(CHIPS if noise > 0 else 1):
        torch.manual_seed(seed)
        chip = copy.deepcopy(model)
        with torch.no_grad():
            for layer in chip.analog_layers():
                largest = layer.weight.abs().amax(1, keepdim=True)
                layer.weight += noise * largest * torch.randn_like(layer.weight)
        found.append(perplexity(chip, blocks))
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, or name on the Hub (default: a small model of random weights)")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[2] / "README.md")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=128, help="tokens of a block")
    parser.add_argument("--batch", type=int, default=8, help="blocks of a process in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--digital", action="store_true", help="train plainly and put the result on tiles")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--deepspeed", help="configuration of DeepSpeed, such as zero2.json")
    parser.add_argument("--out", type=Path, default=Path("out/language_model"))
    options = parser.parse_args()

    set_seed(0)
    model, tokens = load(options.model, options.text.read_text("utf-8"))
    split = len(tokens) * 9 // 10
    train, test = Blocks(tokens[:split], options.length), Blocks(tokens[split:], options.length)
    on_cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(options.out), max_steps=options.steps, per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate, bf16=options.bf16, deepspeed=options.deepspeed, report_to=[],
        use_cpu=on_cpu, ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
        save_strategy="no", logging_steps=max(1, options.steps // 10), lr_scheduler_type="cosine",
    )  # fmt: skip
    before = perplexity(model, test)
    config = recipe(start_up=max(1, options.steps // 10))
    if not options.digital:
        model = convert_to_analog(model, config, exclude_modules=["lm_head"])
    trainer = Trainer(model, arguments, train_dataset=train, callbacks=[] if options.digital else [AnalogCallback()])
    trainer.train()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return

    print(f"perplexity before the training: {before:.2f}")
    if options.digital:
        print(f"after it, digital: {perplexity(trainer.model, test):.2f}")
        trained = on_tiles(trainer.model, train.blocks[:16].to(trainer.model.device))
    else:
        trained = from_pretrained(AutoModelForCausalLM, options.out).to(trainer.model.device)
    for noise in NOISE_LEVELS:
        print(f"on tiles, weights off by {noise:.0%}: {perplexity_on_chips(trained, test, noise):.2f}")


if __name__ == "__main__":
    main()
