"""Whole models in plain torch, built from their dimensions with random weights: nothing to download, the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Transformer:
    """Dimensions of a decoder (Llama's block) or of an encoder of sentences."""

    name: str
    width: int
    inner: int
    blocks: int
    heads: int
    key_heads: int
    vocabulary: int
    decoder: bool

    def build(self) -> nn.Module:
        return LanguageModel(self) if self.decoder else SentenceEncoder(self)

    def flops(self, batch: int, length: int) -> float:
        """Of the matrix products in forward and backward, attention's included."""
        kv = self.width * self.key_heads // self.heads
        ffn = (3 if self.decoder else 2) * self.width * self.inner
        weights = self.blocks * (2 * self.width**2 + 2 * self.width * kv + ffn)
        weights += self.width * self.vocabulary if self.decoder else 0
        return 6.0 * batch * length * weights + 12.0 * self.blocks * batch * length**2 * self.width


SMOLLM2 = Transformer("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, decoder=True)
ENCODER = Transformer("MiniLM-L6", 384, 1536, 6, 12, 12, 30522, decoder=False)
SMALL_DECODER = Transformer("SmolLM2-135M, 2 of 30 blocks", 576, 1536, 2, 9, 3, 1024, decoder=True)
SMALL_ENCODER = Transformer("MiniLM-L6, 2 of 6 blocks", 384, 1536, 2, 12, 12, 1024, decoder=False)


class Attention(nn.Module):
    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.shape, self.head_width = shape, shape.width // shape.heads
        kv = shape.key_heads * self.head_width
        self.query = nn.Linear(shape.width, shape.width, bias=not shape.decoder)
        self.key = nn.Linear(shape.width, kv, bias=not shape.decoder)
        self.value = nn.Linear(shape.width, kv, bias=not shape.decoder)
        self.out = nn.Linear(shape.width, shape.width, bias=not shape.decoder)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        repeats = self.shape.heads // self.shape.key_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=self.shape.decoder).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.inner, bias=False)
        self.up = nn.Linear(shape.width, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Norms come first, in the encoder too."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.decoder else nn.LayerNorm
        self.norm_1, self.norm_2 = norm(shape.width), norm(shape.width)
        self.attention = Attention(shape)
        self.feed_forward: nn.Module
        if shape.decoder:
            self.feed_forward = GatedFeedForward(shape)
        else:
            widen, narrow = nn.Linear(shape.width, shape.inner), nn.Linear(shape.inner, shape.width)
            self.feed_forward = nn.Sequential(widen, nn.GELU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


class LanguageModel(nn.Module):
    """Token numbers ``[B, T]`` to the loss of predicting each next one. Positions play no part in what is measured."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(self.norm(x))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class SentenceEncoder(nn.Module):
    """Token numbers ``[B, T]`` to the contrastive loss between the two halves of the batch."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        first, second = normalize(x.mean(1), dim=-1).chunk(2)
        return cross_entropy(20 * first @ second.T, torch.arange(len(first), device=tokens.device))
