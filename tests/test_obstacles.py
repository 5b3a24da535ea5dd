"""What a conversion leaves digital is named with a reason, and with the remedy that fits it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from triton_analog import TorchInferenceRPUConfig, convert_to_analog
from triton_analog.nn import AnalogLinear


def left(model: nn.Module, **options: Any) -> tuple[Any, str]:
    """The converted model, and the one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = convert_to_analog(model, TorchInferenceRPUConfig(), **options)
    (warning,) = [w for w in caught if "convert_to_analog" in str(w.message)]
    return net, str(warning.message)


def parametrized(layer: nn.Linear) -> nn.Module:
    return parametrizations.orthogonal(layer)


def patched(layer: nn.Linear) -> nn.Module:
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def of_integers(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


class Linear4bit(nn.Linear):
    __module__ = "bitsandbytes.nn.modules"


class QuantLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))


class FSDPLinear(nn.Linear):
    __module__ = "torch.distributed.fsdp._fully_shard._fully_shard"


class Own(nn.Linear):
    pass


CASES = {
    "parametrization": (
        parametrized,
        "its weight is computed by a parametrization",
        "parametrize.remove_parametrizations",
    ),
    "weight norm": (weight_norm, "its weight is computed by a hook", "remove_weight_norm"),
    "pruning": (lambda layer: prune.identity(layer, "weight"), "its weight is computed by a hook", "prune.remove"),
    "forward": (patched, "its forward was replaced on the instance", "del layer.forward"),
    "lazy": (lambda layer: nn.LazyLinear(4), "LazyLinear has no weight yet", "Run the model once"),
    "integers": (of_integers, r"its weight is quantized (int8)", "Load the model without quantization"),
    "bitsandbytes": (lambda layer: Linear4bit(4, 4), "Linear4bit stores its weight quantized", "without quantization"),
    "GPTQ": (lambda layer: QuantLinear(), "QuantLinear stores its weight quantized", "without quantization"),
    "FSDP2": (
        lambda layer: FSDPLinear(4, 4),
        "it is sharded by fully_shard",
        "Convert the model first, and shard the analog one",
    ),
    "scripted": (torch.jit.script, "it is a TorchScript module", "Convert the model first, and script or trace"),
    "compiled": (torch.compile, "this OptimizedModule is compiled", "Convert the model first, and compile"),
    "subclass": (lambda layer: Own(4, 4), "Own is a subclass", "Add their classes to conversion_map"),
    "attention": (
        lambda layer: nn.MultiheadAttention(4, 2),
        "MultiheadAttention calls its projections",
        "Add their classes to conversion_map",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_remedy_fits_the_reason(kind: str) -> None:
    make, reason, remedy = CASES[kind]
    model = nn.ModuleDict({"fine": nn.Linear(4, 4), "odd": make(nn.Linear(4, 4))})
    net, said = left(model, inplace=True)
    assert "left 1 module(s) digital, and " in said
    assert f"odd: {reason}" in said
    assert remedy in said
    assert ("conversion_map" in said) == ("conversion_map" in remedy)
    assert "exclude_modules" in said
    assert type(net["fine"]) is AnalogLinear
    assert net["odd"] is model["odd"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_analog(model, TorchInferenceRPUConfig(), exclude_modules=["odd"], inplace=True)


def test_what_is_partitioned_already_is_refused_with_the_order() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.ds_id = 3
    with pytest.raises(ValueError, match=r"module: 1 is sharded already .* order is: .* convert_to_analog, tensor"):
        convert_to_analog(model, TorchInferenceRPUConfig())
    assert type(model[0]) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(convert_to_analog(model, TorchInferenceRPUConfig(), exclude_modules=["1"])[0]) is AnalogLinear


def test_each_remedy_is_said_once() -> None:
    _, said = left(
        nn.Sequential(Own(4, 4), Own(4, 4), Linear4bit(4, 4), prune.identity(nn.Linear(4, 4), "weight")), inplace=True
    )
    assert (
        said.count("Add their classes") == said.count("without quantization") == said.count("remove_weight_norm") == 1
    )


@pytest.mark.parametrize("wrap", [torch.compile, torch.jit.script])
def test_a_root_that_must_be_wrapped_later_comes_back_as_it_is(wrap: Any) -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4)))
    net, said = left(model)
    assert net is model
    assert "(root): " in said
    assert "Convert the model first" in said


def test_a_layer_compiled_in_place_is_not_left_with_the_old_code() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].compile(backend="eager")
    net, said = left(model, inplace=True)
    assert "0: it is compiled by layer.compile()" in said
    assert type(net[0]) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(convert_to_analog(copy.deepcopy(model), TorchInferenceRPUConfig())[0]) is AnalogLinear
