"""Tiles, conversions and multiply-adds of a model, held against what one counts on paper; and that the model stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_analysis import Tied, config, expect_same, state_of
from test_nn_experts import MAP, ROUTES
from test_nn_experts import Net as Mixture
from test_nn_experts import X as TOKENS
from torch import Tensor, nn

from triton_analog import TorchInferenceRPUConfig, analog_summary, convert_to_analog
from triton_analog.summary.products import CountedProducts
from triton_analog.summary.results import short


def of(digital: nn.Module, max_input_size: int = -1, **options: Any) -> nn.Module:
    settings = TorchInferenceRPUConfig()
    settings.mapping.max_input_size = max_input_size
    return convert_to_analog(digital, settings, **options)


def test_a_linear_layer_on_paper() -> None:
    summary = analog_summary(of(nn.Linear(100, 70), 40), torch.randn(6, 5, 100), tile_size=(16, 32))
    (layer,) = summary.layers
    assert layer.slices == (34, 33, 33)
    assert layer.tiles == summary.tiles == 3 * 3 * 3  # 3 down for each of 3 slices, 3 across
    assert layer.utilisation == summary.utilisation == 7000 / (27 * 16 * 32)
    assert layer.vectors == 30
    assert layer.macs == summary.analog_macs == 30 * 7000
    assert layer.dac_conversions == 30 * 100 * 3
    assert layer.adc_conversions == 30 * 70 * 9
    assert (summary.unit, summary.units, summary.digital_macs) == ("sample", 6, 0)


@pytest.mark.parametrize(("limit", "size"), [(-1, (512, 512)), (40, (40, 512))])
def test_a_tile_is_as_the_config_has_it(limit: int, size: tuple[int, int]) -> None:
    (layer,) = analog_summary(of(nn.Linear(600, 700), limit)).layers
    assert layer.tile_size == size
    assert layer.tiles == (600 // 40 if limit > 0 else 2) * 2
    assert (layer.vectors, layer.macs, layer.dac_conversions, layer.adc_conversions) == (None,) * 4


def test_groups_of_a_convolution_have_tiles_of_their_own() -> None:
    model = of(nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)))
    summary = analog_summary(model, torch.randn(2, 8, 10, 10), tile_size=(16, 16))
    (layer,) = summary.layers
    assert (layer.inputs, layer.outputs, layer.groups, layer.tiles) == (18, 12, 4, 4 * 2)
    assert layer.vectors == 2 * 5 * 5
    assert layer.macs == 50 * 18 * 12
    assert (layer.dac_conversions, layer.adc_conversions) == (50 * 4 * 18, 50 * 12 * 2)
    assert "4 * 18 x 3" in str(summary)


def test_a_shared_weight_has_tiles_once() -> None:
    summary = analog_summary(of(Tied()), torch.randn(4, 25))
    assert [layer.shares_tiles_of for layer in summary.layers] == [None, "a"]
    assert summary.tiles == 1
    assert summary.analog_macs == 2 * 4 * 625
    assert "shared" in str(summary)


def test_recurrent_layers_and_experts_count_the_vectors_they_get() -> None:
    rnn = analog_summary(of(nn.LSTM(12, 11)), torch.randn(7, 3, 12))
    assert [layer.vectors for layer in rnn.layers] == [21, 21]
    mixture = analog_summary(of(Mixture(), conversion_map=MAP), TOKENS)
    vectors = {layer.name: layer.vectors for layer in mixture.layers}
    for expert in range(4):
        assert vectors[f"experts.tiles.down_proj.{expert}"] == (ROUTES == expert).sum()


class Mixed(nn.Module):
    """Digital products of every kind beside an analog layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.analog, self.digital, self.lstm = nn.Linear(8, 8), nn.Linear(8, 6), nn.LSTM(8, 5)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.analog(self.table(ids)))
        return self.lstm(x)[0], self.digital(x), x @ x.mT


def test_digital_products_are_counted_by_the_module_that_does_them() -> None:
    model = of(Mixed(), exclude_modules=["digital", "lstm", "encoder"])
    summary = analog_summary(model, torch.randint(9, (4, 7)))
    found = {layer.name: layer.macs for layer in summary.layers if not layer.is_analog}
    tokens = 4 * 7
    assert found == {
        "digital": tokens * 48,
        "lstm": tokens * 4 * 5 * (8 + 5),
        "encoder.self_attn": tokens * 4 * 64 + 2 * 4 * 7 * 7 * 8,
        "encoder.linear1": tokens * 128,
        "encoder.linear2": tokens * 128,
        "(root)": 4 * 7 * 7 * 8,
    }
    assert summary.digital_macs == sum(found.values())
    assert summary.analog_macs == tokens * 64
    assert (summary.unit, summary.units) == ("token", tokens)


PRODUCTS = {
    "matrices": (lambda a, b: a @ b, 5 * 7 * 6),
    "vector": (lambda a, b: a @ b[:, 0], 5 * 7),
    "vectors": (lambda a, b: a[0].dot(b[:, 0]), 7),
    "batches": (lambda a, b: torch.bmm(a.expand(3, 5, 7), b.expand(3, 7, 6)), 3 * 5 * 7 * 6),
    "einsum": (lambda a, b: torch.einsum("ik,kj->ij", a, b), 5 * 7 * 6),
    "bias": (lambda a, b: nn.functional.linear(a, b.T, b[0]), 5 * 7 * 6),
    "attention": (lambda a, b: nn.functional.scaled_dot_product_attention(*[a.expand(2, 3, 5, 7)] * 3), 6 * 25 * 14),
    "none": (lambda a, b: a.sum() + b.softmax(0).exp().sum(), 0),
}


@pytest.mark.parametrize(("product", "macs"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_of_torch_are_counted(product: Any, macs: int) -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 6)
    with torch.no_grad(), CountedProducts() as counter:
        result = product(a, b)
    assert counter.macs == macs
    torch.testing.assert_close(result, product(a, b))


IDS = torch.zeros(2, 5, dtype=torch.int64)
UNITS: dict[str, tuple[Any, tuple[str, int]]] = {
    "tokens": (IDS, ("token", 10)),
    "mapping": ({"attention_mask": IDS[:, :2], "input_ids": IDS}, ("token", 10)),
    "embeddings": ({"inputs_embeds": torch.zeros(2, 5, 3)}, ("token", 10)),
    "samples": (torch.zeros(3, 5, 4), ("sample", 3)),
    "labels": ((torch.zeros(3, 5), torch.zeros(3)), ("sample", 3)),
    "arguments": (((torch.zeros(3, 5),), {}), ("sample", 3)),
    "keywords": (((), {"x": torch.zeros(3, 5)}), ("sample", 3)),
    "packed": (nn.utils.rnn.pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)]), ("sample", 2)),
    "other": ("text", ("batch", 1)),
}


@pytest.mark.parametrize(("batch", "units"), UNITS.values(), ids=UNITS)
def test_what_a_batch_has_several_of(batch: Any, units: tuple[str, int]) -> None:
    summary = analog_summary(of(nn.Linear(3, 2)), batch, forward=lambda model, batch: model(torch.zeros(4, 3)))
    assert (summary.unit, summary.units) == units


@pytest.mark.parametrize("trouble", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_what_it_was_whatever_happens(trouble: Any) -> None:
    model = convert_to_analog(nn.Sequential(nn.Linear(25, 12), nn.BatchNorm1d(12), nn.Dropout()), config()).train()
    before, fast = state_of(model), torch.backends.mha.get_fastpath_enabled()

    def forward(model: nn.Module, batch: Tensor) -> None:
        nn.functional.dropout(model(batch))
        if trouble is not None:
            raise trouble

    if trouble is None:
        analog_summary(model, torch.ones(4, 25), forward=forward)
    else:
        with pytest.raises(trouble):
            analog_summary(model, torch.ones(4, 25), forward=forward)
    expect_same(before, model)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model[1:].modules())


@pytest.mark.parametrize("length", [4, 70])
def test_the_table_fits_80_columns(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "x" * length
    wide = of(nn.Sequential(nn.Linear(8192, 28672)).to("meta"))
    model = of(nn.ModuleDict({name: nn.Linear(25, 12), "own": nn.Linear(5, 5)}), exclude_modules=["own"])
    text = str(analog_summary(model, torch.randn(4, 25), forward=lambda model, x: model[name](x)))
    lines = [*text.splitlines(), *str(analog_summary(wide, tile_size=(512, 512))).splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0] == "92.3 % of 325 weights are on tiles"
    assert any(
        line.split() == ["layer", "in", "x", "out", "tiles", "used", "%", "MACs", "DAC", "ADC"] for line in lines
    )
    assert "MACs and conversions: per sample, of 4." in text


def test_json_has_everything() -> None:
    summary = analog_summary(of(Mixed(), exclude_modules=["digital", "lstm", "encoder"]), IDS)
    read = json.loads(summary.to_json())
    (analog,) = read["analog_layers"]
    assert analog["dac_conversions"] == summary.dac_conversions == 80
    assert {own["name"] for own in read["digital_products"]} >= {"lstm", "(root)"}
    assert {own["name"] for own in read["digital_weights"]} >= {"lstm", "digital"}
    assert (read["unit"], read["units"], read["share"]) == ("token", 10, summary.share)


def test_counts_are_shown_short() -> None:
    assert [short(count) for count in (0, 7, 999, 1000, 12345, 999_600, 4.56e9)] == [
        "0", "7", "999", "1 k", "12.3 k", "1 M", "4.56 G",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [512, (512,), (0, 5), ("a", "b"), (True, 5)])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="tile_size: got"):
        analog_summary(nn.Linear(3, 3), tile_size=size)


def test_a_batch_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(TypeError, match="batch: got a batch that is a str"):
        analog_summary(of(nn.Linear(3, 3)), "text")
    with pytest.raises(ValueError, match="last dimension must be 3"):
        analog_summary(of(nn.Linear(3, 3)), torch.zeros(4, 4))
    with pytest.raises(TypeError, match="forward: got 5"):
        analog_summary(of(nn.Linear(3, 3)), torch.zeros(4, 3), forward=5)  # type: ignore[arg-type]
