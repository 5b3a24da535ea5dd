"""What an analysis counts, held against a plain computation in fp64; and that it leaves a model as it was."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import cut, needs_interpreter
from test_nn_experts import MAP
from test_nn_experts import Net as Mixture
from test_nn_experts import X as TOKENS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from triton_analog import TorchInferenceRPUConfig, analyze, convert_to_analog, launch
from triton_analog.analysis import Analysis, counts
from triton_analog.analysis.counts import bits_set
from triton_analog.config import WeightClipType, WeightNoiseInjectionType, WeightQuantizationType
from triton_analog.inference import PCMLikeNoiseModel, program
from triton_analog.nn import AnalogHFConv1D, AnalogLinear
from triton_analog.reference.adc import pack_bits
from triton_analog.samples import products_as


def config(**kinds: Any) -> TorchInferenceRPUConfig:
    made = TorchInferenceRPUConfig()
    made.mapping.max_input_size = 10
    made.forward.inp_res, made.forward.out_res, made.forward.out_bound = 30, 60, 2.0
    made.pre_post.input_range.enable, made.pre_post.input_range.init_value = True, 1.3
    made.modifier.noise_type, made.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    for path, value in kinds.items():
        *sections, name = path.split("__")
        section: Any = made
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    return made


def quiet(model: nn.Module, batches: Any, **options: Any) -> Analysis:
    return analyze(model, batches, verbose=False, **options)


# ---- By hand --------------------------------------------------------------------------------------------------------


def grid(x: Tensor, bound: Tensor, steps: float) -> Tensor:
    return torch.minimum(torch.maximum((x / bound * steps / 2).round() / (steps / 2) * bound, -bound), bound)


def kurtosis(w: Tensor) -> float:
    deviation = w - w.mean()
    return float(deviation.pow(4).mean() / deviation.square().mean().square())


def decibels(wanted: Tensor, given: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (given - wanted).square().sum()))


def held(w: Tensor, settings: TorchInferenceRPUConfig, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """A slice's weight on its tile, and its largest weights."""
    wmax = w.abs().amax(1, keepdim=True) if clip is None else clip.abs()[:, None]
    if settings.modifier.quantization_type is WeightQuantizationType.DISCRETIZE:
        return grid(w, wmax.amax().expand_as(w), settings.modifier.res), wmax
    return (w if clip is None else torch.minimum(torch.maximum(w, -wmax), wmax)), wmax


def by_hand(layer: Any, rows: Tensor) -> dict[str, Any]:
    """What is to be found of ``layer`` for the input vectors ``rows [M, G * K]``, in fp64."""
    io, G, S = layer.rpu_config.forward, layer.groups, layer.slices
    range_ = layer.rpu_config.pre_post.input_range
    matrix, x_of, w_of = layer.matrix.detach().double(), rows.double().chunk(G, 1), layer.matrix.double().chunk(G)
    clip = None if layer.learnable_weight_clip is None else layer.learnable_weight_clip.detach().double()
    whole = matrix if layer.programmed is None else layer.programmed.held()
    slices, wanted, given = [], [], []
    for g in range(G):
        digital = analog = 0
        for s, (x, w) in enumerate(zip(cut(x_of[g], S), cut(w_of[g].detach(), S), strict=True)):
            r = None
            if range_.enable:
                r = (
                    x.abs().amax(1, keepdim=True)
                    if range_.dynamic
                    else layer.input_range[g * S + s].detach().double().abs()
                )
            on_tile, wmax = held(w, layer.rpu_config, None if clip is None else clip[s].chunk(G)[g])
            if layer.programmed is not None:
                on_tile = cut(layer.programmed.held().double().chunk(G)[g], S)[s]
            y = (x if r is None else grid(x, r.expand_as(x), io.inp_res)) @ on_tile.T
            found = {
                "kurtosis": kurtosis(w if layer.programmed is None else on_tile),
                "largest_input": float(x.abs().max()),
            }
            if io.out_bound > 0:
                bound = io.out_bound * r * (wmax.T if clip is not None else wmax.max())
                found["saturated"] = float(
                    ((y / bound * io.out_res / 2).round().abs() > io.out_res / 2).double().mean()
                )
                y = grid(y, bound.expand_as(y), io.out_res)
            if r is not None:
                found["clipped"] = float((x.abs() > r).double().mean())
                if not range_.dynamic:
                    found["range_ratio"] = float(r / x.abs().max())
            slices.append({"snr_db": decibels(x @ w.T, y), **found})
            digital, analog = digital + x @ w.T, analog + y
        wanted.append(digital)
        given.append(analog)
    return {
        "snr_db": decibels(torch.cat(wanted, 1), torch.cat(given, 1)),
        "kurtosis": kurtosis(whole),
        "slices": slices,
    }


def inputs_of(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, list[Tensor]]:
    """What every analog layer is called with."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, layer in analog_layers(model).items()
    ]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    return seen


def analog_layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "tile_shape")}


def vectors(layer: Any, inputs: list[Tensor]) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        rows = [F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride) for x in inputs]
        return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in rows])
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])


# ---- Models ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(25, 25), nn.Linear(25, 25)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def linear(dtype: torch.dtype = torch.float32, **kinds: Any) -> nn.Module:
    digital = nn.Sequential(nn.Linear(25, 12), nn.Tanh(), nn.Linear(12, 5)).to(dtype)
    return convert_to_analog(digital, config(**kinds))


exactly = partial(linear, torch.float64)


def hf_conv1d() -> nn.Module:
    layer = AnalogHFConv1D(12, 25, dtype=torch.float64, rpu_config=config())
    nn.init.normal_(layer.weight)
    return layer


FLAT, IMAGES, SEQUENCES = (40, 25), (3, 4, 6, 6), (4, 3, 12)
MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (exactly, FLAT),
    "one slice": (lambda: exactly(mapping__max_input_size=-1), FLAT),
    "more dimensions": (exactly, (4, 5, 25)),
    "dynamic range": (lambda: exactly(pre_post__input_range__dynamic=True), FLAT),
    "learned clip": (lambda: exactly(clip__type=WeightClipType.LEARNABLE_PER_CHANNEL), FLAT),
    "quantized": (
        lambda: exactly(modifier__quantization_type=WeightQuantizationType.DISCRETIZE, modifier__res=14),
        FLAT,
    ),
    "no ADC": (lambda: exactly(forward__out_res=-1, forward__out_bound=0.0), FLAT),
    "convolution": (lambda: convert_to_analog(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2)).double(), config()), IMAGES),
    "recurrent": (lambda: convert_to_analog(nn.LSTM(12, 11, bidirectional=True).double(), config()), SEQUENCES),
    "transposed": (hf_conv1d, FLAT),
    "tied": (lambda: convert_to_analog(Tied().double(), config()), FLAT),
    "chip": (lambda: program(exactly(), PCMLikeNoiseModel(), compensation="none").drift_to(1e5), FLAT),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_the_numbers_are_those_of_a_computation_by_hand(make, shape) -> None:
    model = make()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    expect_by_hand(quiet(model, batches), model, lambda model: [model(x) for x in batches])


def test_experts_are_analyzed_one_by_one() -> None:
    model, x = (
        convert_to_analog(Mixture().double(), config(mapping__max_input_size=4), conversion_map=MAP),
        TOKENS.double(),
    )
    with pytest.warns(UserWarning, match=r"no batch reached 2 analog layer\(s\): experts.tiles"):
        found = quiet(model, [x])
    expect_by_hand(found, model, lambda model: model(x))
    idle = [layer for layer in found.layers if layer.vectors == 0]
    assert [layer.name[-2:] for layer in idle] == [".2", ".2"]
    assert all(layer.kurtosis and layer.clipped is layer.snr_db is None for layer in idle)


def expect_by_hand(found: Analysis, model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    seen = inputs_of(copy.deepcopy(model).eval() if model.training else model, run)
    layers = analog_layers(model)
    assert [layer.name for layer in found.layers] == [name or type(model).__name__ for name in layers]
    for name, inputs in seen.items():
        own, rows = found[name or type(model).__name__], vectors(layers[name], inputs)
        wanted = by_hand(layers[name], rows)
        assert own.vectors == len(rows)
        for field, value in wanted.items():
            if field != "slices":
                assert getattr(own, field) == pytest.approx(value, rel=1e-3), (name, field)
        for part, numbers in zip(own.slices, wanted["slices"], strict=True):
            got = {field: getattr(part, field) for field in numbers}
            assert got == pytest.approx(numbers, rel=1e-3, abs=2e-3), name
            assert {field for field in ("saturated", "clipped", "range_ratio") if getattr(part, field) is not None} <= {
                *numbers
            }
        total = sum(part.clipped * part.inputs for part in own.slices) / sum(part.inputs for part in own.slices)
        assert own.clipped == pytest.approx(total)


def test_without_a_range_nothing_is_clipped_or_saturated() -> None:
    model = convert_to_analog(nn.Linear(25, 12), TorchInferenceRPUConfig())
    found = quiet(model, [torch.randn(FLAT)])["AnalogLinear"]
    assert (found.clipped, found.saturated, found.range_ratio) == (None, None, None)
    assert found.snr_db > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = linear().double(), torch.randn(FLAT).to(dtype).double()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.to(dtype))
        model[0].input_range.fill_(1.25)
    wanted = quiet(model, [x])["0"]
    found = quiet(model.to(dtype), [x.to(dtype)])["0"]
    assert found.snr_db == pytest.approx(wanted.snr_db, abs=0.1)
    assert found.clipped == wanted.clipped  # |x| > r, however the range is rounded elsewhere
    assert found.kurtosis == pytest.approx(wanted.kurtosis, rel=1e-4)


def test_under_autocast() -> None:
    model, x = linear(), torch.randn(FLAT)
    with torch.autocast("cpu", torch.bfloat16):
        found = quiet(model, [x])
    assert found["0"].snr_db == pytest.approx(quiet(model, [x])["0"].snr_db, abs=0.2)


@needs_interpreter
def test_kernels_count_what_the_reference_does() -> None:
    model, x = linear(), torch.randn(FLAT)
    found = []
    for backend in ("kernel", "reference"):
        with launch.backend(backend):
            found.append(quiet(model, [x])["0"])
    assert found[0].clipped == found[1].clipped
    assert found[0].saturated == pytest.approx(found[1].saturated, abs=2e-3)
    assert found[0].snr_db == pytest.approx(found[1].snr_db, abs=0.05)


@pytest.mark.parametrize("columns", [1, 31, 128, 200])
def test_bits_of_a_mask_are_counted(columns: int) -> None:
    flags = torch.rand(17, columns) < 0.4
    assert bits_set(pack_bits(flags)) == flags.sum()
    assert bits_set(pack_bits(torch.ones_like(flags))) == flags.numel()


class Reader(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.b.weight)


def test_a_layer_that_nobody_calls_is_named() -> None:
    model = convert_to_analog(Reader(), config())
    with pytest.warns(UserWarning, match=r"no batch reached 1 analog layer\(s\): b"):
        found = quiet(model, [torch.randn(FLAT)])
    assert (found["b"].vectors, found["b"].kurtosis) == (0, found["a"].kurtosis)
    assert str(found).splitlines()[5].split()[:4] == ["b", "-", "-", "-"]


def test_inputs_that_are_no_numbers_show() -> None:
    with pytest.warns(UserWarning, match=r"2 analog layer\(s\) computed infinite numbers or NaN: 0, 2; their shares"):
        found = quiet(linear(), [torch.full(FLAT, torch.nan)])
    assert math.isnan(found["0"].snr_db)
    assert json.loads(found.to_json())["layers"][0]["snr_db"] is None


def test_inputs_of_zeros_have_no_ratio() -> None:
    found = quiet(linear(), [torch.zeros(FLAT)])["0"]
    assert (found.snr_db, found.range_ratio, found.clipped) == (None, None, 0)


def test_empty_batches_count_for_nothing() -> None:
    model, x = linear(), torch.randn(FLAT)
    assert quiet(model, [x[:0], x]).layers == quiet(model, [x]).layers


def test_weights_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = exactly(), torch.randn(FLAT, dtype=torch.float64)
    whole = [layer.kurtosis for layer in quiet(model, [x]).layers]
    monkeypatch.setattr(counts, "AT_ONCE", 30)
    assert [layer.kurtosis for layer in quiet(model, [x]).layers] == pytest.approx(whole)


def test_what_is_kept_of_a_layer_is_small() -> None:
    layer = AnalogLinear(25, 12, rpu_config=config()).eval()
    kept = counts.LayerCounts(layer)
    with torch.no_grad(), products_as([(layer, kept.matmul)]):
        layer(torch.randn(1000, 25))
    assert sum(value.numel() for value in vars(kept).values() if isinstance(value, Tensor)) < 50


def test_a_base_is_analyzed_under_its_adapters() -> None:
    peft = pytest.importorskip("peft", reason="peft is an optional peer")
    model, x = linear(), torch.randn(FLAT)
    expected = quiet(model, [x])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))  # which add nothing yet
    found = quiet(adapted, [x])
    assert [layer.name for layer in found.layers] == ["base_model.model.0.base_layer", "base_model.model.2"]
    assert [layer.slices for layer in found.layers] == [layer.slices for layer in expected.layers]


# ---- The model stays ------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "random": torch.get_rng_state(),
        "hidden": ["analog_matmul" in vars(module) for module in model.modules()],
        "seen": [getattr(module, "_forwards_seen", None) for module in model.modules()],
        "called": [getattr(module, "was_called", None) for module in model.modules()],
    }


def expect_same(before: dict[str, Any], model: nn.Module) -> None:
    after = state_of(model)
    torch.testing.assert_close(after.pop("values"), before.pop("values"), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before


class Trouble(Exception):
    pass


@pytest.mark.parametrize("trouble", [None, Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_what_it_was_whatever_happens(mode, trouble) -> None:
    digital = nn.Sequential(nn.Linear(25, 12), nn.BatchNorm1d(12), nn.Dropout(), nn.Linear(12, 5))
    model = convert_to_analog(digital, config(forward__out_noise=0.1, clip__type=WeightClipType.LEARNABLE_PER_CHANNEL))
    model.train(mode)
    model[2].train()  # a mode of its own
    before = state_of(model)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        F.dropout(batch)
        if trouble is not None:
            raise trouble

    if trouble is None:
        quiet(model, [torch.ones(FLAT)], forward=forward)
    else:
        with pytest.raises(trouble):
            quiet(model, [torch.ones(FLAT)], forward=forward)
    expect_same(before, model)


def test_outputs_are_those_of_the_model() -> None:
    model, x = linear().eval(), torch.randn(FLAT)
    outputs: list[Tensor] = []
    quiet(model, [x], forward=lambda model, batch: outputs.append(model(batch)))
    assert torch.equal(outputs[0], model(x))


def test_a_compiled_model_is_analyzed_uncompiled() -> None:
    model, x = linear(), torch.randn(FLAT)
    compiled = torch.compile(model, backend="eager")
    found = quiet(compiled, [x])
    assert [layer.snr_db for layer in found.layers] == [layer.snr_db for layer in quiet(model, [x]).layers]


def test_nothing_waits_for_the_device_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        own = getattr(Tensor, name)

        def spy(*args: Any, own: Any = own, name: str = name, **options: Any) -> Any:
            waits.append(name)
            return own(*args, **options)

        monkeypatch.setattr(Tensor, name, spy)
    quiet(linear(), [torch.randn(FLAT), torch.randn(FLAT)])
    assert waits == ["tolist"]


# ---- Batches --------------------------------------------------------------------------------------------------------


def test_forms_of_batches() -> None:
    model, x = linear(), torch.randn(FLAT)
    wanted = quiet(model, [x]).layers
    labels = torch.zeros(len(x))
    for batch in ((x, labels), [x], {"input": x}, ({"input": x}, labels), ((x,), {})):
        assert quiet(model, [batch]).layers == wanted
    assert quiet(model, DataLoader(TensorDataset(x, labels), batch_size=len(x))).layers == wanted
    assert quiet(model, [{"image": x}], forward=lambda model, batch: model(batch["image"])).layers == wanted
    assert quiet(model, iter([x, x])).batches == 2


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no module": (lambda x: analyze(3, [x]), TypeError, "model: got int"),  # type: ignore[arg-type]
    "digital": (lambda x: quiet(nn.Linear(3, 3), [x]), ValueError, "no analog layer; convert it with convert_to_analog"),
    "a tensor": (lambda x: quiet(linear(), x), TypeError, r"batches: got a Tensor; several batches .* such as \[batch\]"),
    "a mapping": (lambda x: quiet(linear(), {"input": x}), TypeError, "batches: got a dict"),
    "none": (lambda x: quiet(linear(), []), ValueError, "batches: none given"),
    "no forward": (lambda x: quiet(linear(), [x], forward=3), TypeError, "forward: got 3"),
    "unknown": (lambda x: quiet(linear(), ["text"]), TypeError, "batches: got a batch that is a str"),
    "too wide": (lambda x: quiet(linear(), [x[:, :3]]), ValueError, "last dimension must be 25"),
    "another argument": (lambda x: quiet(linear(), [{"image": x}]), TypeError, "image"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "match"), BAD.values(), ids=BAD)
def test_what_cannot_be_analyzed_is_refused(call, kind, match) -> None:
    with pytest.raises(kind, match=match):
        call(torch.randn(FLAT))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
def test_an_error_of_the_model_names_the_batch() -> None:
    with pytest.raises(ValueError, match="x: got shape") as caught:
        quiet(linear(), [torch.randn(FLAT), torch.randn(4, 3)])
    assert "this was number 1, a Tensor" in caught.value.__notes__[0]


# ---- What is shown --------------------------------------------------------------------------------------------------


def deep(name: str) -> nn.Module:
    return convert_to_analog(nn.ModuleDict({name: nn.Sequential(nn.Linear(25, 12), nn.Linear(12, 5))}), config())


def of_deep(name: str) -> Analysis:
    return quiet(deep(name), [torch.randn(FLAT)], forward=lambda model, x: model[name](x))


@pytest.mark.parametrize("length", [4, 70])
def test_the_table_fits_80_columns(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "x" * length
    lines = str(of_deep(name)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["layer", "(1", "batch)", "clip", "%", "sat", "%", "SNR", "dB", "kurt.", "r/max"]
    assert sum("slice" in line for line in lines) == 3 + 2
    assert "".join(line.split()[0] for line in lines[1:3]).startswith(name)


def test_long_names_go_on_behind_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model: nn.Module = nn.Linear(25, 12)
    for name in reversed(["base_model", "model", "model", "layers", "10", "self_attn", "q_proj", "base_layer"]):
        model = nn.ModuleDict({name: model})
    model = convert_to_analog(model, config())
    found = quiet(model, [torch.randn(FLAT)], forward=lambda model, x: [*model.modules()][-1](x))
    assert [line.split()[0] for line in str(found).splitlines()[1:3]] == [
        "base_model.model.model.layers.10.self_attn.",
        "q_proj.base_layer",
    ]
    monkeypatch.setenv("COLUMNS", "120")
    assert str(found).splitlines()[1].split()[0] == found.layers[0].name


def test_the_table_without_slices_and_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of_deep("layers")
    assert found.table(slices=False).row_count == 2
    rich = str(found)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    plain = str(found)
    words = [text.partition("clip:")[0].split() for text in (rich, plain)]
    assert words[0] == words[1]


def test_many_slices_are_counted_and_not_shown() -> None:
    model = convert_to_analog(nn.Conv2d(40, 40, 3, groups=40), config())
    found = quiet(model, [torch.randn(1, 40, 5, 5)])
    assert len(found.layers[0].slices) == 40
    assert "40 slices: to_json()" in str(found)


def test_json_has_everything() -> None:
    found = of_deep("layers")
    read = json.loads(found.to_json())
    (first, _), own = read["layers"], found["layers.0"]
    assert read["batches"] == 1
    for field in ("name", "kind", "outputs", "vectors", "snr_db", "kurtosis", "clipped", "saturated", "range_ratio"):
        assert first[field] == getattr(own, field)
    assert [part["range_ratio"] for part in first["slices"]] == [part.range_ratio for part in own.slices]


def test_scalars_are_finite_and_named() -> None:
    found = of_deep("layers")
    scalars = found.scalars()
    assert scalars["analog/layers.0/snr_db"] == found["layers.0"].snr_db
    assert len(scalars) == 2 * 5
    assert not quiet(linear(), [torch.zeros(FLAT)]).scalars().keys() & {"analog/0/snr_db", "analog/0/range_ratio"}


def test_layers_are_found_by_name() -> None:
    with pytest.raises(KeyError, match=r"did you mean 'layers.0'"):
        of_deep("layers")["layer.0"]


def test_the_picture_is_saved(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    of_deep("layers").plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 5000


def test_a_single_layer_is_a_model() -> None:
    layer = AnalogLinear(25, 4, rpu_config=config())
    assert [own.name for own in quiet(layer, [torch.randn(FLAT)]).layers] == ["AnalogLinear"]
