"""Mixtures of experts of Hugging Face's models on tiles; small models of random numbers, nothing is downloaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_analog import (
    AnalogOptimizer,
    TorchInferenceRPUConfig,
    analog_summary,
    convert_to_analog,
    convert_to_digital,
    restore_analog,
)
from triton_analog.config import WeightClipType
from triton_analog.nn import AnalogBatchedExperts, AnalogExperts, AnalogParallelExperts

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
hugging_face = pytest.importorskip("triton_analog.integrations.transformers", reason="transformers is not installed")

TOKENS = torch.arange(12).reshape(2, 6)
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 16, "intermediate_size": 36, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 2, "moe_intermediate_size": 12, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
LLAMA4 = {"head_dim": 12, "intermediate_size_mlp": 36, "num_local_experts": 4, "interleave_moe_layer_step": 1}
MODELS: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", LOCAL, AnalogExperts),
    "Qwen2": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", SHARED | {"shared_expert_intermediate_size": 12}, AnalogExperts),
    "Qwen3": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SHARED | {"head_dim": 12}, AnalogExperts),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", LOCAL | {"head_dim": 12}, AnalogExperts),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT, AnalogExperts),
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", SHARED, AnalogExperts),
    "Granite": ("GraniteMoeForCausalLM", "GraniteMoeConfig", LOCAL, AnalogExperts),
    "Llama 4": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, AnalogBatchedExperts),
    "JetMoe": ("JetMoeForCausalLM", "JetMoeConfig", LOCAL | {"kv_channels": 12}, AnalogParallelExperts),
}


def make(name: str) -> Any:
    model, config, options, _ = MODELS[name]
    built = getattr(transformers, model)(getattr(transformers, config)(**SIZES | options))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # some are made without any values
    return built.eval()


def recipe() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 8
    config.forward.inp_res = 254
    config.pre_post.input_range.enable = True
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 1.0
    return config


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    for part in MODELS[request.param][:2]:
        if not hasattr(transformers, part):
            pytest.skip(f"this transformers has no {part}")
    return request.param


def convert(model: Any, config: TorchInferenceRPUConfig) -> Any:
    routers = [weights.name for weights in analog_summary(model).digital if "outer" in weights.kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # all but the routers is converted
        return convert_to_analog(model, config, exclude_modules=routers)


def test_an_ideal_model_computes_the_same_with_all_experts_on_tiles(name: str) -> None:
    model = make(name)
    analog = convert(model, TorchInferenceRPUConfig())
    assert type(analog) is not type(model)
    assert MODELS[name][3] in {getattr(module, "_base", None) for module in analog.modules()}
    assert analog_summary(analog).share > 0.98
    with torch.no_grad():
        torch.testing.assert_close(analog(TOKENS).logits, model(TOKENS).logits)


def test_it_trains_saves_restores_and_becomes_digital_again(name: str, tmp_path: Path) -> None:
    model = make(name)
    analog = convert(model, recipe()).train()
    optimizer = AnalogOptimizer(torch.optim.SGD, analog.analog_layers, analog.parameters(), lr=0.1)
    before = copy.deepcopy(analog.state_dict())
    analog(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    stack = next(key for key in before if ".input_range_" in key)
    assert not torch.equal(analog.state_dict()[stack], before[stack])
    assert set(model.state_dict()) <= set(before)
    analog.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        logits = analog(TOKENS).logits
        assert torch.equal(hugging_face.from_pretrained(type(model), tmp_path)(TOKENS).logits, logits)
        assert torch.equal(restore_analog(make(name), analog.state_dict()).eval()(TOKENS).logits, logits)
    digital = convert_to_digital(analog)
    assert [type(module) for module in digital.modules()] == [type(module) for module in model.modules()]
    assert list(digital.state_dict()) == list(model.state_dict())


def mamba() -> Any:
    return transformers.MambaModel(
        transformers.MambaConfig(vocab_size=40, hidden_size=24, num_hidden_layers=4, state_size=4)
    )


def wavlm() -> Any:
    config = transformers.WavLMConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=36, conv_dim=(8,),
        conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, layerdrop=0.0,
    )  # fmt: skip
    return transformers.WavLMModel(config)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    ("make", "sample", "names"),
    [
        (mamba, {"input_ids": TOKENS}, ["layers.*.mixer.conv1d", "layers.*.mixer.dt_proj"]),
        (wavlm, torch.randn(1, 64), ["encoder.layers.*.attention.q_proj", "encoder.layers.*.attention.out_proj"]),
    ],
)
def test_layers_whose_weight_is_read_by_their_parent_are_named_once(
    make: Any, sample: Any, names: list[str], checked: bool
) -> None:
    """By the sample, or else by the first training forward."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        analog = convert_to_analog(make(), recipe(), check=sample if checked else None).train()
        output = analog(**sample) if isinstance(sample, dict) else analog(sample)
        output.last_hidden_state.sum().backward()
    (text,) = [str(warning.message) for warning in caught if "called" in str(warning.message)]
    assert text.startswith("check: ") == checked
    for name in names:
        assert name in text
