"""What a layer keeps for its backward, beside ``nn.Linear``: counted in bytes, on the CPU's reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_analog.config import SavedInput, TorchInferenceRPUConfig, WeightNoiseInjectionType
from triton_analog.nn import AnalogLinear

M, K, N, SLICES = 4096, 2048, 2048, 4


def noisy(adc: bool, save_input: SavedInput) -> TorchInferenceRPUConfig:
    """DAC, both noises, learned ranges in their start-up, and perhaps an ADC; not the noise of the outputs, which is slow."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = K // SLICES
    config.pre_post.input_range.enable = True
    config.forward.inp_res, config.forward.save_input = 254, save_input
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.03
    if adc:
        config.forward.out_bound, config.forward.out_res = 10.0, 254
    return config


def saved_for_backward(layer: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Every tensor that a forward saves."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return saved


def kept_bytes(saved: list[Tensor], layer: nn.Module) -> int:
    """The bytes behind them, each storage once, without the parameters, which are there anyway."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in saved}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)


@pytest.fixture(scope="module")
def linear_bytes(x: Tensor) -> int:
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    return kept_bytes(saved_for_backward(linear, x), linear)


@pytest.mark.parametrize("adc", [False, True], ids=["no ADC", "ADC"])
@pytest.mark.parametrize(("save_input", "share"), [(SavedInput.FULL, 1.05), (SavedInput.INT8, 0.65)])
def test_the_backward_keeps_no_more_than_linear_and_one_bit_per_product_and_slice(
    x: Tensor, linear_bytes: int, save_input: SavedInput, share: float, adc: bool
) -> None:
    assert linear_bytes == 2 * M * K
    layer: Any = AnalogLinear(K, N, dtype=torch.bfloat16, rpu_config=noisy(adc, save_input))
    saved = saved_for_backward(layer, x)
    assert kept_bytes(saved, layer) <= share * linear_bytes + (SLICES * M * N / 8 if adc else 0)
    assert not any(tensor.numel() >= M * K and tensor.dtype in (torch.float32, torch.bool) for tensor in saved)
    weights = [tensor for tensor in saved if tensor.shape in ((N, K), (K, N))]
    assert all(tensor.data_ptr() == layer.weight.data_ptr() for tensor in weights)
