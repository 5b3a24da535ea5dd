"""The weights of a model: those on tiles, and those that stay digital, with a reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from triton_analog.hints import names_of
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.parts import numbers_in, shape_of
from triton_analog.nn.settings import UNDECAYED
from triton_analog.surroundings.obstacles import ADD_THE_CLASS, Obstacle

_TABLE = re.compile(
    r"(^|_)(pos|position|positions|pe|rpb|emb|embed|embeds|embedding|embeddings|encoding|token|tokens|cls|table|prompt|prompts|"
    r"bias|norm|scale|gamma|beta|alpha|mask|log)(_?\d+)?$"
)
"""How names of parameters end that are looked up, added or multiplied element by element."""
_NORM = re.compile(r"Norm(\dd|Nd)?$")
_EMBEDDING = re.compile(r"(Word|Token|Vocab|Position)\w*Embeddings?$")
"""Classes, beside torch's own, whose weights are looked up."""


class DigitalWeights(NamedTuple):
    """Weights of one module that are not on tiles."""

    name: str
    """Of the module in the model."""
    kind: str
    """Its class."""
    size: int
    """Numbers in its weights."""
    reason: str
    remedy: str


class Coverage(NamedTuple):
    """What of the weights of a model is on tiles: matrices, convolution kernels and stacks of them."""

    on_tiles: int
    """Numbers in weights on tiles."""
    total: int
    """Numbers in all weights."""
    digital: list[DigitalWeights]
    """Modules with weights that are not on tiles, each once."""

    @property
    def share(self) -> float:
        """The part of the weights that is on tiles, in 0 .. 1; 1 where there are none."""
        return self.on_tiles / self.total if self.total else 1.0

    @property
    def percentage(self) -> str:
        return f"{100 * self.share:.1f} % of {self.total:,} weights are on tiles"

    def __str__(self) -> str:
        return "\n".join([self.percentage, *(f"  {line}" for line in describe(self.digital))])


_LAYERS = (nn.Linear, _ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Layers of torch that multiply with all parameters of two or more dimensions."""


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``module`` itself that look like matrices, convolution kernels or stacks of them, by name.

    Embeddings, norms and biases are none, nor is what by its shape or name is a vector or a table: whether a parameter is
    multiplied is not known before a forward.
    """
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and name not in UNDECAYED and not is_lazy(parameter) and len(shape_of(parameter)) >= 2
        if _multiplies(module, name, shape_of(parameter))
    }


def _multiplies(module: nn.Module, name: str, shape: torch.Size) -> bool:
    kind = type(module).__name__
    if isinstance(module, _LAYERS):
        return not _TABLE.search(name)
    is_table = len(shape) > 2 and shape[0] == 1  # added to every sample of a batch
    is_vector = sum(size > 1 for size in shape) < 2
    is_digital = isinstance(module, nn.EmbeddingBag | nn.Embedding) or _NORM.search(kind)
    is_embedding = name == "weight" and _EMBEDDING.search(kind)
    return not (is_table or is_vector or is_digital or is_embedding or _TABLE.search(name.lower()))


def weights_on_tiles(model: nn.Module) -> list[Tensor]:
    """The parameters of analog layers in ``model`` that hold their weights; one that is shared may come more than once."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, AnalogMatrixLayer):
            found += module._weight_sources()
        elif isinstance(module, AnalogLayerBase) and not module.IS_CONTAINER:
            found += own_weights(module).values()
    return found


def measure(
    model: nn.Module,
    prefix: str,
    converted: Iterable[nn.Module],
    left: Mapping[str, Obstacle],
    silent: Iterable[int] = (),
) -> Coverage:
    """The weights of ``model``.

    Args:
        model: Its modules' names start with ``prefix``.
        prefix: Name of ``model`` itself.
        converted: Digital modules to take for analog ones.
        left: Why modules of these names, with all below them, are not on tiles.
        silent: Ids of modules whose weights count, but are not listed.
    """
    on_tiles = {id(weight): weight for weight in weights_on_tiles(model)}
    for module in converted:
        on_tiles |= {id(weight): weight for weight in own_weights(module).values()}
    quiet, seen, digital = set(silent), set(on_tiles), []
    counted = sum(map(numbers_in, on_tiles.values()))
    total = counted

    def count_new(weights: Iterable[Tensor]) -> int:
        new = {id(weight): weight for weight in weights if id(weight) not in seen}
        seen.update(new)
        return sum(map(numbers_in, new.values()))

    for name, module in model.named_modules(prefix=prefix):
        kind, obstacle = type(module).__name__, left.get(name)
        below = [weight for part in module.modules() for weight in own_weights(part).values()] if obstacle else []
        own = own_weights(module)
        count = count_new(below or own.values())
        total += count
        if id(module) in quiet:
            continue
        if obstacle is not None:
            digital.append(DigitalWeights(name, kind, count, *obstacle))
        elif count:
            names = ", ".join(own_name for own_name, weight in own.items() if id(weight) not in on_tiles)
            known = isinstance(module, _LAYERS)
            reason = f"no analog class for {kind}" if known else f"{kind} computes with its own {names}"
            digital.append(DigitalWeights(name, kind, count, reason, ADD_THE_CLASS))
    return Coverage(counted, total, digital)


def describe(digital: Iterable[DigitalWeights]) -> list[str]:
    """Names and reasons, those of one class and reason together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for weights in digital:
        groups.setdefault((weights.kind, weights.reason), []).append(weights.name or "(root)")
    return [f"{names_of(names)}: {reason}" for (_, reason), names in groups.items()]
