"""Hugging Face's PEFT: digital adapters on an analog base, made before or after the conversion."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from triton_analog import (
    AnalogOptimizer,
    TorchInferenceRPUConfig,
    convert_to_analog,
    convert_to_digital,
    restore_analog,
)
from triton_analog.config import WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.nn import AnalogHFConv1D, AnalogLinear
from triton_analog.optim import attach

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
hugging_face = pytest.importorskip("triton_analog.integrations.transformers", reason="transformers is not installed")

TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def _others_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        yield


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=24, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def recipe() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 8
    config.forward.inp_res = 254
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 0
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 1.0
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.05
    config.modifier.refresh = WeightNoiseRefresh.STEP
    return config


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules="all-linear", **options)


def adapted(model: Any, order: str = "converted first", config: Any = None, rpu_config: Any = None) -> Any:
    """``model`` with analog layers and digital adapters, made in one order or the other."""
    config, rpu_config = config or lora(), rpu_config or recipe()
    if order == "converted first":
        return peft.get_peft_model(convert_to_analog(model, rpu_config), config)
    with pytest.warns(UserWarning, match=r"left \d+ layer\(s\) of PEFT's adapters digital, such as .*convert_adapters"):
        return convert_to_analog(peft.get_peft_model(model, config), rpu_config)


orders = pytest.mark.parametrize("order", ["converted first", "adapted first"])


def trained(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def moved(model: Any) -> Any:
    """With adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


# ---- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "order", "kind"),
    [
        (llama, "converted first", "AnalogOptimizer"),
        (llama, "adapted first", "SGD"),
        (gpt2, "converted first", "attach"),
        (gpt2, "adapted first", "AnalogOptimizer"),
    ],
)
def test_adapters_learn_through_a_frozen_analog_base(make: Any, order: str, kind: str) -> None:
    model = adapted(make(), order).train()
    layers = list(model.analog_layers())
    assert {type(layer) for layer in layers} == {AnalogLinear} | ({AnalogHFConv1D} if make is gpt2 else set())
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    given = (SGD, model.analog_layers) if kind == "AnalogOptimizer" else ()
    optimizer = (AnalogOptimizer if given else SGD)(*given, trained(model), lr=0.5)
    if kind == "attach":
        attach(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    seeds = [[layer.weight_noise_seed.item() for layer in layers]]
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        assert all(parameter.grad is not None for parameter in trained(model))
        optimizer.step()
        seeds.append([layer.weight_noise_seed.item() for layer in layers])
    assert len({seed for step in seeds for seed in step}) == 3 * len(layers)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_the_trainers_callback_draws_the_noise_over_a_frozen_base(tmp_path: Path) -> None:
    class Texts(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return {"input_ids": TOKENS[0], "labels": TOKENS[0]}

    model = adapted(llama())
    before = [layer.weight_noise_seed.item() for layer in model.analog_layers()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = hugging_face.AnalogCallback()
    transformers.Trainer(model, arguments, train_dataset=Texts(), callbacks=[callback]).train()
    assert callback.attachment.steps == 2
    assert not set(before) & {layer.weight_noise_seed.item() for layer in model.analog_layers()}


def test_adapters_train_in_a_compiled_model() -> None:
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    model = moved(adapted(nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 8)), config=config))
    compiled = torch.compile(model, backend="aot_eager")
    optimizer, x = SGD(trained(model), lr=0.5), torch.randn(3, 24)
    gradients = []
    for run in (model, compiled):
        optimizer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in trained(model)])
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, traced)
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


# ---- What PEFT does with adapters -----------------------------------------------------------------------------------------


@orders
@pytest.mark.parametrize("make", [llama, gpt2])
def test_disabled_adapters_leave_the_analog_base(make: Any, order: str) -> None:
    base = convert_to_analog(make().eval(), recipe())
    model = moved(adapted(make(), order)).eval()
    assert not torch.equal(logits(model), logits(base))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


@orders
@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_are_saved_and_loaded(make: Any, order: str, tmp_path: Path) -> None:
    head = {llama: "lm_head", gpt2: "wte"}[make]
    model = moved(adapted(make(), order, lora(modules_to_save=[head]))).eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(convert_to_analog(make(), recipe()), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("safe", [False, True])
def test_merged_adapters_move_onto_the_tiles_and_off_again(make: Any, safe: bool) -> None:
    """An ideal device computes the same on the tiles and beside them."""
    model = moved(adapted(make(), rpu_config=TorchInferenceRPUConfig())).eval()
    beside, base = logits(model), [layer.weight.clone() for layer in model.analog_layers()]
    model.merge_adapter(safe_merge=safe)
    assert not any(torch.equal(layer.weight, old) for layer, old in zip(model.analog_layers(), base, strict=True)
                   if layer.weight.shape != (40, 24))  # fmt: skip
    torch.testing.assert_close(logits(model), beside, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), beside, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert {type(layer) for layer in merged.analog_layers()} <= {AnalogLinear, AnalogHFConv1D}
    torch.testing.assert_close(logits(merged), beside, rtol=1e-4, atol=1e-4)


def test_a_learned_clip_stays_as_trained_until_it_is_reset() -> None:
    config = TorchInferenceRPUConfig()
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    merged = moved(adapted(llama(), rpu_config=config)).merge_and_unload().eval()
    layer = merged.model.layers[0].mlp.up_proj
    assert (layer.weight.abs().amax(1) > layer.learnable_weight_clip[0]).any()
    clipped = logits(merged)
    for layer in merged.analog_layers():
        layer.reset_weight_clip()
    assert not torch.equal(logits(merged), clipped)
    torch.testing.assert_close(logits(merged), logits(convert_to_digital(merged)))


# ---- Conversion of a model that has adapters ---------------------------------------------------------------------------------

KINDS = {
    "LoRA": lambda: lora(),
    "DoRA": lambda: lora(use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(r=2, init_r=4, total_step=10, target_modules=["c_attn"]),
    "IA3": lambda: peft.IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["c_attn"]),
    "P-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["converted first", "adapted first"])
def test_every_kind_of_adapter_stays_digital_and_learns(kind: str, order: str) -> None:
    analog = recipe()
    analog.modifier.std_dev = 0.0
    if order == "converted first":
        model = peft.get_peft_model(convert_to_analog(gpt2(), analog), KINDS[kind]())
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="convert_to_analog left")
            model = convert_to_analog(peft.get_peft_model(gpt2(), KINDS[kind]()), analog)
    own = {name for name, _ in model.named_analog_layers()}
    assert len(own) == 5
    assert all(re.search(r"(attn|mlp)\.c_\w+(\.base_layer)?$|lm_head(\.base_layer)?$", name) for name in own)
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert trained(model)
    assert all(parameter.grad is not None for parameter in trained(model))


def test_adapters_are_converted_on_request() -> None:
    model = convert_to_analog(peft.get_peft_model(llama(), lora()), recipe(), convert_adapters=True)
    up = model.base_model.model.model.layers[0].mlp.up_proj
    assert {type(up.base_layer), type(up.lora_A["default"]), type(up.lora_B["default"])} == {AnalogLinear}
    assert up.lora_A["default"].input_range.requires_grad
    assert not up.base_layer.input_range.requires_grad
    again = restore_analog(peft.get_peft_model(llama(), lora()), model.state_dict()).eval()
    assert torch.equal(logits(again), logits(model.eval()))


def test_layers_that_are_trained_as_a_whole_are_converted_with_their_copies() -> None:
    model = adapted(llama(), "adapted first", lora(modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head
    assert {type(head.original_module), type(head.modules_to_save["default"])} == {AnalogLinear}
    assert head.modules_to_save["default"].weight.requires_grad
    assert not any(parameter.requires_grad for parameter in head.original_module.parameters())


def test_an_analog_base_below_adapters_stays_as_it_is() -> None:
    model = moved(adapted(llama())).eval()
    with pytest.warns(UserWarning, match="PEFT's adapters"):
        again = convert_to_analog(model, TorchInferenceRPUConfig())
    assert torch.equal(logits(again), logits(model))


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "trainers.md", "exec"), names)
    assert all(parameter.grad is not None for parameter in names["trained"])
