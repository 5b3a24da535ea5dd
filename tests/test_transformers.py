"""Hugging Face models and their Trainer with analog layers; small models of random numbers, nothing is downloaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from triton_analog import AnalogOptimizer, TorchInferenceRPUConfig, analyze, convert_to_analog
from triton_analog.config import WeightClipType
from triton_analog.nn import AnalogHFConv1D, AnalogLinear

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
hugging_face = pytest.importorskip("triton_analog.integrations.transformers", reason="transformers is not installed")

TOKENS = torch.arange(12).reshape(2, 6)


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def recipe() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 8
    config.forward.inp_res = 254
    config.pre_post.input_range.enable = True
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 1.0
    return config


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_an_ideal_model_computes_the_same(make: Any) -> None:
    model = make().eval()
    analog = convert_to_analog(model, TorchInferenceRPUConfig())
    kinds = {type(layer) for layer in analog.analog_layers()}
    assert kinds == ({AnalogHFConv1D, AnalogLinear} if make is gpt2 else {AnalogLinear})
    with torch.no_grad():
        torch.testing.assert_close(analog(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "make", [llama, gpt2, bert, lambda: llama(tied=False)], ids=["llama", "gpt2", "bert", "untied"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_save_pretrained_writes_comes_back(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    source = convert_to_analog(make().to(dtype), recipe(), exclude_modules=[])
    source(TOKENS)  # moves the ranges
    source.eval().save_pretrained(tmp_path)
    again = hugging_face.from_pretrained(type(make()), tmp_path)
    assert not again.training
    assert {p.dtype for p in again.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, source(TOKENS).logits)
    assert [layer.rpu_config for layer in again.analog_layers()] == [
        layer.rpu_config for layer in source.analog_layers()
    ]
    tied = source.config.tie_word_embeddings and not isinstance(source, transformers.BertForSequenceClassification)
    if tied:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_shards_and_auto_classes(tmp_path: Path) -> None:
    source = convert_to_analog(llama(), recipe()).eval()
    source.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = hugging_face.from_pretrained(transformers.AutoModelForCausalLM, tmp_path, dtype=torch.float64)
    assert next(again.parameters()).dtype == torch.float64
    assert len(list(again.analog_layers())) == len(list(source.analog_layers()))


# ---- Other vocabularies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False], ids=["learned clip", "no clip"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tokens", [43, 37])
def test_the_output_layer_stays_analog_for_another_vocabulary(
    tokens: int, tied: bool, clip: bool, tmp_path: Path
) -> None:
    config = recipe()
    if clip:
        config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    model = convert_to_analog(llama(tied), config)
    head = model.lm_head
    ranges, kept = head.input_range.detach().clone(), min(tokens, 40)
    before = head.weight[:kept].detach().clone()
    embeddings = hugging_face.resize_token_embeddings(model, tokens)
    assert embeddings is model.get_input_embeddings()
    assert model.lm_head is head
    assert (head.tile_shape, head.out_features) == ((tokens, 24), tokens)
    assert (head.weight is embeddings.weight) == tied
    assert torch.equal(head.weight[:kept], before)
    assert torch.equal(head.input_range, ranges)
    assert model.eval()(TOKENS).logits.shape == (2, 6, tokens)
    model.save_pretrained(tmp_path)
    again = hugging_face.from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_the_models_own_method_does_not_go_unnoticed(tmp_path: Path) -> None:
    model = convert_to_analog(llama(tied=False), recipe())
    model.resize_token_embeddings(43)
    with pytest.warns(UserWarning, match=r"digital now: lm_head \(Linear\)\. .*resize_token_embeddings"):
        trainer(model, tmp_path, steps=1, callbacks=[hugging_face.AnalogCallback()]).train()
    config = recipe()
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    model = convert_to_analog(llama(), config)
    model.resize_token_embeddings(43)
    with pytest.raises(ValueError, match=r"lm_head: .* \(43, 24\), but its tiles .* \(40, 24\); call its resized"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(43, 24\), but its tiles .* \(40, 24\); call its resized"):
        model(TOKENS)


# ---- The Trainer ------------------------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(6) * (index + 1)) % 40
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module, folder: Path, steps: int = 2, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.05, report_to=[],
        use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Texts(), **options)


def widest(model: Any) -> float:
    """The largest weight of any analog layer, in deviations of its matrix."""
    return max((layer.weight.abs().max() / layer.weight.std()).item() for layer in model.analog_layers())


def test_the_callback_clips_after_each_step_of_the_trainer(tmp_path: Path) -> None:
    plain, clipped = (convert_to_analog(llama(tied=False), recipe()) for _ in range(2))
    trainer(plain, tmp_path / "plain").train()
    trainer(clipped, tmp_path / "clipped", callbacks=[hugging_face.AnalogCallback()]).train()
    assert widest(plain) > 2
    assert widest(clipped) < 1.8  # a clamp to one deviation lowers the deviation


class Watch(transformers.TrainerCallback):
    """Keeps a weight and its gradient from before each step, and the weight after it."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.before, self.after = layer, [], []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.before.append((self.layer.weight.detach().clone(), self.layer.weight.grad.clone()))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.after.append(self.layer.weight.detach().clone())


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", [SGD, AnalogOptimizer])
def test_each_step_of_the_trainer_clips_once(kind: Any, accumulated: int, tmp_path: Path) -> None:
    model = convert_to_analog(llama(), recipe())
    watch, callback = Watch(model.model.layers[0].mlp.down_proj), hugging_face.AnalogCallback()
    given = (SGD, model.analog_layers) if kind is AnalogOptimizer else ()
    optimizer = kind(*given, model.parameters(), lr=0.5)
    run = trainer(model, tmp_path, steps=3, callbacks=[callback, watch], optimizers=(optimizer, None))
    run.args.gradient_accumulation_steps, run.args.max_grad_norm = accumulated, 0.0
    run.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    run.train()
    assert callback.attachment.steps == len(watch.after) == 3
    for (weight, grad), after in zip(watch.before, watch.after, strict=True):
        stepped = weight - 0.5 * grad
        bound = stepped.std()
        assert (stepped.abs() > bound).any()
        torch.testing.assert_close(after, stepped.clamp(-bound, bound))


def test_a_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    models = [convert_to_analog(llama(), recipe()) for _ in range(2)]
    for model, checkpoint in zip(models, (None, str(tmp_path / "checkpoint-2")), strict=True):
        run = trainer(model, tmp_path, steps=4, callbacks=[hugging_face.AnalogCallback()])
        run.args.weight_decay = 1.0  # which leaves some parameters alone that the trainer would have decay
        run.args.save_strategy, run.args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, 2
        run.train(resume_from_checkpoint=checkpoint)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_trainers_weight_decay_leaves_ranges_alone(tmp_path: Path) -> None:
    config = recipe()
    config.pre_post.input_range.init_from_data, config.pre_post.input_range.init_value = 0, 50.0
    model = convert_to_analog(llama(), config)
    run = trainer(model, tmp_path, callbacks=[hugging_face.AnalogCallback()])
    run.args.weight_decay = 5.0  # a step with it takes a quarter away
    run.train()
    assert min(layer.input_range.min().item() for layer in model.analog_layers()) > 49


def test_what_the_trainer_saves_comes_back(tmp_path: Path) -> None:
    model = convert_to_analog(llama(), recipe())
    run = trainer(model, tmp_path, callbacks=[hugging_face.AnalogCallback()])
    run.train()
    run.save_model()
    again = hugging_face.from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)


class Log(transformers.TrainerCallback):
    """What reporters such as TensorBoard's get, by the number of the step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if any(name.startswith("analog/") for name in logs):
            self.seen[state.global_step] = dict(logs)


def test_the_trainer_logs_an_analysis_and_trains_as_without(tmp_path: Path) -> None:
    states, log, batch = [], Log(), {"input_ids": TOKENS}
    for analyzed in (False, True):
        model = convert_to_analog(llama(tied=False), recipe())
        run = trainer(model, tmp_path / str(analyzed), steps=5, callbacks=[log])
        if analyzed:
            callback = hugging_face.AnalysisCallback(run, [batch], interval=2)
            run.add_callback(callback)
        run.train()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert list(log.seen) == list(callback.analyses) == [2, 4, 5]
    found = analyze(model, [batch], verbose=False)["model.layers.0.mlp.up_proj"]
    assert log.seen[5]["analog/model.layers.0.mlp.up_proj/snr_db"] == found.snr_db
    assert callback.analyses[2].layers != callback.analyses[5].layers


def test_an_analysis_that_could_not_be_logged_is_refused(tmp_path: Path) -> None:
    run, batch = trainer(llama(), tmp_path), {"input_ids": TOKENS}
    for arguments, kind, match in (
        (([batch], run), TypeError, "trainer: got list"),
        ((run, batch), TypeError, "batches: got a dict"),
        ((run, iter([batch])), TypeError, r"only once; give list\(batches\)"),
        ((run, []), ValueError, "batches: none given"),
        ((run, [batch], 0), ValueError, "interval: got 0"),
    ):
        with pytest.raises(kind, match=match):
            hugging_face.AnalysisCallback(*arguments)
    run.add_callback(hugging_face.AnalysisCallback(run, [batch]))
    with pytest.raises(ValueError, match="no analog layer"):
        run.train()


def test_an_analog_optimizer_goes_on_by_itself(tmp_path: Path) -> None:
    model = convert_to_analog(llama(tied=False), recipe())
    optimizer = AnalogOptimizer(SGD, model.analog_layers, model.parameters(), lr=0.05)
    trainer(model, tmp_path, callbacks=[hugging_face.AnalogCallback()], optimizers=(optimizer, None)).train()
    assert widest(model) < 1.8


def test_an_optimizer_of_other_parameters_ends_the_training(tmp_path: Path) -> None:
    model = convert_to_analog(llama(), recipe())
    copies = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    run = trainer(model, tmp_path, callbacks=[hugging_face.AnalogCallback()], optimizers=(SGD(copies, lr=0.1), None))
    with pytest.raises(ValueError, match="optimizer: SGD steps none of the 15 weights that are to be clipped"):
        run.train()


class Idle(SGD):
    """Counts as an optimizer, and its steps as steps, but none is taken."""

    def step(self, closure: Any = None) -> None:
        pass

    step.hooked = True  # type: ignore[attr-defined]


def test_an_optimizer_that_takes_no_steps_ends_the_training(tmp_path: Path) -> None:
    model = convert_to_analog(llama(), recipe())
    idle = Idle(model.parameters(), lr=0.1)
    run = trainer(model, tmp_path, steps=5, callbacks=[hugging_face.AnalogCallback()], optimizers=(idle, None))
    with pytest.raises(RuntimeError, match="the analog weights were not clipped after step 1: "):
        run.train()


def test_a_digital_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: this LlamaForCausalLM has no analog layers"):
        trainer(llama(), tmp_path, callbacks=[hugging_face.AnalogCallback()]).train()


@pytest.mark.parametrize("arguments", [[], ["--digital"]], ids=["analog", "digital"])
def test_the_example_trains_a_language_model(arguments: list[str], tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "examples" / "trainer" / "train.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, "--steps", "3", "--length", "256", "--out", tmp_path / "model", *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: float(value) for name, value in re.findall(r"^(.*): ([\d.]+)$", done.stdout, re.MULTILINE)}
    on_tiles = [value for name, value in found.items() if name.startswith("on tiles")]
    assert len(on_tiles) == 3
    assert max(on_tiles) < found["perplexity before the training"]
