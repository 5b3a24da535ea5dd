"""What reads or writes weights, ranges, clips and counters, on a model that two processes shard: as in one process, or refused.

Numbers are fp64, and nothing is random but what all have the same seed for.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import results_of_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from triton_analog import (
    InputRangeCalibrationType,
    TorchInferenceRPUConfig,
    analog_summary,
    calibrate_input_ranges,
    convert_to_analog,
    convert_to_digital,
    restore_analog,
)
from triton_analog.aihwkit_bridge import export_to_aihwkit
from triton_analog.config import WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh, WeightQuantizationType
from triton_analog.convert import CONVERSION_MAP
from triton_analog.distributed import set_parallel
from triton_analog.inference import PCMLikeNoiseModel, evaluate, program
from triton_analog.nn import AnalogExperts, AnalogHFConv1D, AnalogLinear
from triton_analog.nn.base import named_analog_layers
from triton_analog.optim import AnalogOptimizer, attach

RANKS = 2
GAUSSIAN, PER_CHANNEL = WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL
LEARNED, NONE = WeightClipType.LEARNABLE_PER_CHANNEL, WeightClipType.NONE


def config(clip: WeightClipType, quantized: bool = False) -> TorchInferenceRPUConfig:
    made = TorchInferenceRPUConfig()
    made.mapping.max_input_size = 8
    made.forward.inp_res = 254
    made.pre_post.input_range.enable = True
    made.pre_post.input_range.init_from_data = 2
    made.clip.type = clip
    if clip in (GAUSSIAN, PER_CHANNEL):
        made.clip.sigma = 1.0
    if quantized:
        made.modifier.quantization_type, made.modifier.res = WeightQuantizationType.DISCRETIZE, 2**7 - 2
    return made


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(3, 5, 4) * 0.2)
        self.act_fn = nn.SiLU()


class Model(nn.Module):
    """One layer of every kind. Seven outputs are no multiple of the ranks, nor are three experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(20, 7)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.gpt = HFConv1D(7, 20)
        self.experts = Experts()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        images = x.repeat(1, 4)[:, :64].view(-1, 4, 4, 4)
        expert = (1000 * x[:, :1]).abs().long() % 3
        routed = self.experts(x[:, :5], expert, torch.ones_like(x[:, :1]))
        sequence, _ = self.lstm(x.view(-1, 5, 4).transpose(0, 1))
        parts = self.linear(x), self.gpt(x), routed, self.conv(images).flatten(1), sequence.transpose(0, 1).flatten(1)
        return torch.cat(parts, 1)


class HFConv1D(nn.Module):
    """As transformers has it, which need not be imported for it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.randn(nf))


CLASSES = CONVERSION_MAP | {HFConv1D: AnalogHFConv1D, Experts: AnalogExperts}


def analog(made: TorchInferenceRPUConfig) -> Any:
    return convert_to_analog(Model().double(), made, CLASSES)


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layers_of(model: Any) -> list[Any]:
    return [layer for _, layer in named_analog_layers(model)]


def batches(ranks: int, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(8, 20, generator=generator).double()[rank::ranks] for scale in (1, 4, 2)]


# ---- What must be equal -------------------------------------------------------------------------------------------------


def clip(model: Any) -> None:
    model.clip_weights()


def quantize(model: Any) -> None:
    model.quantize_weights()


def reset_clips(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for layer in layers_of(model):
        layer.reset_weight_clip()


def set_ranges(model: Any) -> None:
    for layer in layers_of(model):
        layer.set_input_range(torch.linspace(1, 2, len(layer.input_range), dtype=torch.float64))


def set_ranges_after_a_forward(model: Any) -> None:
    """Which has left whole copies of the parameters."""
    with torch.no_grad():
        model.eval()(batches(1, 0)[0])
    if isinstance(model, FSDPModule):
        model.unshard()
    set_ranges(model)
    clip(model)


def set_weights(model: Any) -> None:
    for layer in layers_of(model):
        shape = layer.weight.shape
        weight = torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)
        layer.set_weights_and_biases(weight, None if layer.bias is None else layer.bias.new_ones(layer.bias.shape))
        assert torch.equal(layer.get_weights_and_biases()[0], weight)


def reset(model: Any) -> None:
    torch.manual_seed(dist.get_rank() if isinstance(model, FSDPModule) else 0)  # the first rank's numbers are for all
    for layer in layers_of(model):
        layer.reset_parameters()


def load_digital(model: Any, **options: Any) -> None:
    file = Model().double().state_dict()
    file = {name: 2 * value for name, value in file.items()}
    if isinstance(model, FSDPModule):
        mine = file if dist.get_rank() == 0 or not options else {}
        set_model_state_dict(model, mine, options=StateDictOptions(full_state_dict=True, strict=False, **options))
    else:
        model.load_state_dict(file, strict=False)


def load_digital_from_one_rank(model: Any) -> None:
    """Torch broadcasts what has the name of a parameter; a layer that saves others says so."""
    if isinstance(model, FSDPModule):
        with pytest.raises(RuntimeError, match=r"lstm\.: the ranks .* were given different keys.* to every rank"):
            load_digital(model, broadcast_from_rank0=True)
        file = Model().double().lstm.state_dict()
        model.lstm.load_state_dict({name: 2 * value for name, value in file.items()}, strict=False)
    else:
        load_digital(model)


def calibrate(kind: str) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
        ranks = dist.get_world_size()
        own = batches(ranks, dist.get_rank()) if isinstance(model, FSDPModule) else batches(1, 0)
        if not isinstance(model, FSDPModule):
            own = [x[rank::ranks] for x in own for rank in range(ranks)]  # a batch is what one rank sees
            set_parallel(model, statistics=None)
        calibrate_input_ranges(model, InputRangeCalibrationType[kind], own, verbose=False)
        if isinstance(model, FSDPModule):
            model.reshard()
        assert parameters == {name: id(parameter) for name, parameter in model.named_parameters()}

    return run


def train(model: Any) -> None:
    sharded = isinstance(model, FSDPModule)
    for layer in layers_of(model):
        layer.rpu_config.pre_post.input_range.init_from_data = 0
        layer.rpu_config.pre_post.input_range.decay = 0.0
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.1)
    for x in batches(dist.get_world_size(), dist.get_rank()) if sharded else batches(1, 0):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def restart(model: Any) -> None:
    """Save, start again on the meta device, and load."""
    if not isinstance(model, FSDPModule):
        return
    state = get_model_state_dict(model)
    other = convert_to_analog(Model().double().to("meta"), config(NONE), CLASSES)
    for layer, own in zip(layers_of(other), layers_of(model), strict=True):
        layer.reconfigure(own.rpu_config)
    other = shard(other)
    other.to_empty(device="cpu")
    set_model_state_dict(other, state)
    for (name, mine), (_, its) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine.to_local(), its.to_local()), name


def start_without_memory(model: Any) -> None:
    """A digital file is all that there is to load; ranges start up."""
    if isinstance(model, FSDPModule):
        other = shard(convert_to_analog(Model().double().to("meta"), layers_of(model)[0].rpu_config, CLASSES))
        other.to_empty(device="cpu")
        load_digital(other)
        load_digital(model)
        assert_equal(whole(other), whole(model))
    else:
        load_digital(model)


def summarise(model: Any) -> None:
    found = analog_summary(model)
    assert found.digital == []
    assert found.on_tiles == 20 * 7 + 6 * 2 * 9 + 20 * 7 + 3 * (8 * 5 + 5 * 4) + 4 * 3 * (4 + 3)


def chips(model: Any) -> None:
    """Bit for bit those of one process, of which each rank has its rows."""
    if not isinstance(model, FSDPModule):
        return
    one, x, pcm = analog(layers_of(model)[0].rpu_config), batches(1, 0)[0], PCMLikeNoiseModel()
    for options in ({}, {"compensation": "per_column", "per_channel": False}):
        mine, its = (program(which, pcm, seed=3, **options) for which in (model, one))
        for time in (None, 1.0, 86400.0, 1.0):
            for chip in (mine, its) if time is not None else ():
                chip.drift_to(time)
            for own, other in zip(layers_of(model), layers_of(its.model), strict=True):
                assert len(own.programmed._tile.to_local()) <= -(-own.tile_shape[0] // RANKS)
                assert torch.equal(own.programmed.held(), other.programmed.held())
            with torch.no_grad():
                assert torch.equal(mine(x), its(x))
        with torch.no_grad():
            assert torch.equal(mine(x.float().double()), its(x.float().double()))
        assert "on a chip already" in outcome(lambda: program(model, pcm))
        mine.release()
        assert "it was released" in outcome(lambda chip=mine: chip(x))
    assert model.training
    found = [
        evaluate(which, lambda net: net(x).square().mean(), noise_model=pcm, times=(1.0, 60.0), seeds=2, verbose=False)
        for which in (model, one)
    ]
    assert found[0].values == found[1].values
    with torch.no_grad():
        assert torch.equal(model.eval()(x), one.eval()(x))  # no longer on a chip
    chip = program(model, pcm)
    with torch.no_grad():
        for parameter in model.linear.parameters():
            parameter.mul_(1.5)
    assert "the weight of 'linear' was changed" in outcome(lambda: chip.drift_to(1.0))
    with torch.no_grad():
        for parameter in model.linear.parameters():
            parameter.div_(1.5)
    chip.release()
    model.reshard()


EQUAL: dict[str, tuple[Callable[[Any], None], TorchInferenceRPUConfig]] = {
    "clip per channel": (clip, config(PER_CHANNEL)),
    "clip": (clip, config(GAUSSIAN)),
    "quantize": (quantize, config(NONE, quantized=True)),
    "quantize and clip": (quantize, config(PER_CHANNEL, quantized=True)),
    "reset_weight_clip": (reset_clips, config(LEARNED)),
    "set_input_range": (set_ranges, config(NONE)),
    "set_input_range after a forward": (set_ranges_after_a_forward, config(PER_CHANNEL)),
    "set_weights": (set_weights, config(LEARNED)),
    "reset_parameters": (reset, config(LEARNED)),
    "load a digital file": (load_digital, config(LEARNED)),
    "load a digital file from one rank": (load_digital_from_one_rank, config(LEARNED)),
    "save and load": (restart, config(LEARNED)),
    "start without memory": (start_without_memory, config(LEARNED)),
    "summary": (summarise, config(LEARNED)),
    "chips": (chips, config(NONE)),
    "chips with learned clips": (chips, config(LEARNED)),
    "calibrate MAX": (calibrate("MAX"), config(LEARNED)),
    "calibrate MOVING_STD": (calibrate("MOVING_STD"), config(NONE)),
    "calibrate MOVING_QUANTILE": (calibrate("MOVING_QUANTILE"), config(NONE)),
    "calibrate CACHE_QUANTILE": (calibrate("CACHE_QUANTILE"), config(NONE, quantized=True)),
    "train, clip per channel": (train, config(PER_CHANNEL)),
    "train, clip": (train, config(GAUSSIAN)),
}


# ---- What cannot be -----------------------------------------------------------------------------------------------------


def drop_ranges(model: Any) -> None:
    made = config(LEARNED)
    made.pre_post.input_range.dynamic = True
    model.linear.reconfigure(made)


def load_other_config(model: Any) -> None:
    made = config(NONE)
    model.linear.load_state_dict({"_extra_state": AnalogLinear(20, 7, rpu_config=made).get_extra_state()}, strict=False)


def convert_again(model: Any) -> None:
    convert_to_analog(shard(Model()), config(NONE), CLASSES)


def restore(model: Any) -> None:
    restore_analog(Model(), model.state_dict())


def program_tensor_parallel(model: Any) -> None:
    parallel, mesh = analog(config(NONE)), init_device_mesh("cpu", (RANKS,))
    parallel.linear.weight = nn.Parameter(distribute_tensor(parallel.linear.weight.detach(), mesh, [Shard(0)]))
    program(parallel, PCMLikeNoiseModel())


def program_flat(model: Any) -> None:
    wrapped = FullyShardedDataParallel(analog(config(NONE)), use_orig_params=True, device_id=torch.device("cpu"))
    program(wrapped, PCMLikeNoiseModel())


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a learned clip is to be dropped": (quantize, "learnable_weight_clip: .* before it is sharded"),
    "ranges are to be dropped": (drop_ranges, "pre_post.input_range: .* convert or reconfigure it first"),
    "a clip is to be dropped": (load_other_config, "clip.type: .* convert or reconfigure it first"),
    "convert_to_analog": (
        convert_again,
        "linear is sharded already .* The order is: .* convert_to_analog, tensor paral",
    ),
    "convert_to_digital": (
        lambda model: convert_to_digital(model, inplace=True),
        "is sharded, and convert_to_digital .*",
    ),
    "program, tensor-parallel": (
        program_tensor_parallel,
        "linear.weight is sharded, and program needs .*full_state_dict=True",
    ),
    "program, flat": (program_flat, "is sharded, and program needs .*full_state_dict=True"),
    "program, read anew": (
        lambda model: program(model, PCMLikeNoiseModel(), read_noise="forward"),
        "read_noise: got 'forward'.* is sharded; take 'time'",
    ),
    "export": (export_to_aihwkit, "is sharded, and export_to_aihwkit needs .* restore_analog"),
    "restore": (restore, "state_dict: .* parts on several ranks .*full_state_dict=True"),
}


def flat(model: Any) -> None:
    """FSDP's first version: nothing has rows."""
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    model.clip_weights() if "GAUSSIAN" in model.linear.rpu_config.clip.type.name else wrapped(batches(1, 0)[0])


def flat_optimizer(model: Any) -> None:
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, wrapped.parameters(), lr=0.1)
    wrapped.eval()(batches(1, 0)[0]).sum().backward()
    optimizer.step()


def of_before(model: Any) -> None:
    """An optimizer that was built before the model was sharded."""
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.1)
    shard(model)
    model(batches(1, 0)[0]).sum().backward()
    optimizer.step()


def attached_before(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    shard(model)
    model(batches(1, 0)[0]).sum().backward()
    optimizer.step()


BEFORE = {"AnalogOptimizer": of_before, "attach": attached_before}


def noise_of_a_plain_optimizer() -> list[str]:
    """What a sharded layer says whose noise is to last for a step, of steps after which nobody draws the next one."""
    made = config(NONE)
    made.modifier.noise_type, made.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.01
    made.modifier.refresh = WeightNoiseRefresh.STEP
    model = shard(analog(made))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(15):
            model(batches(1, 0)[0]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(one.message) for one in said if "with one weight noise" in str(one.message)]


FLAT = {"clip_weights": (flat, PER_CHANNEL), "a forward": (flat, NONE), "a step": (flat_optimizer, GAUSSIAN)}


# ---- Two processes ------------------------------------------------------------------------------------------------------


def whole(model: Any) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=0, atol=1e-13, msg=lambda said, name=name: f"{name}: {said}"
        )


def outcome(check: Callable[[], Any]) -> str:
    """What it raised."""
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error} {error.__cause__ or ''}"
    return ""


def one_rank(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    for name, (run, made) in EQUAL.items():
        one, sharded = analog(made), shard(analog(made))

        def check(run: Any = run, one: Any = one, sharded: Any = sharded) -> None:
            run(one)
            run(sharded)
            assert_equal(whole(sharded), one.state_dict())

        results["equal", name, rank] = outcome(check)
    saved = io.BytesIO()
    one, sharded = analog(config(LEARNED)), shard(analog(config(LEARNED)))
    torch.save(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)), saved)
    results["saved", rank] = saved.getvalue()
    for name, (run, _) in REFUSED.items():
        results["refused", name, rank] = outcome(lambda run=run: run(sharded))
        results["unchanged", name, rank] = outcome(lambda: assert_equal(whole(sharded), one.state_dict()))
    for name, (run, kind) in FLAT.items():
        results["flat", name, rank] = outcome(lambda run=run, kind=kind: run(analog(config(kind))))
    for name, run in BEFORE.items():
        results["before", name, rank] = outcome(lambda run=run: run(analog(config(GAUSSIAN))))
    results["noise", rank] = noise_of_a_plain_optimizer()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> dict[Any, Any]:
    """Of both ranks; one start of the processes for all tests."""
    return results_of_ranks(one_rank, RANKS)


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_do_what_one_process_does(results: dict[Any, Any], name: str) -> None:
    assert [results["equal", name, rank] for rank in range(RANKS)] == ["", ""]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_on_every_rank_and_changes_nothing(results: dict[Any, Any], name: str) -> None:
    for rank in range(RANKS):
        assert re.search(REFUSED[name][1], results["refused", name, rank])
        assert results["unchanged", name, rank] == ""


def test_a_saved_model_is_restored_in_one_process(results: dict[Any, Any]) -> None:
    state = torch.load(io.BytesIO(results["saved", 0]), weights_only=True)
    model = analog(config(LEARNED))
    model.load_state_dict(state)
    assert_equal(model.state_dict(), state)


@pytest.mark.parametrize("name", FLAT)
def test_flat_parameters_are_refused(results: dict[Any, Any], name: str) -> None:
    for rank in range(RANKS):
        assert re.search("flat parameter of FullyShardedDataParallel.*fully_shard", results["flat", name, rank])


@pytest.mark.parametrize("name", BEFORE)
def test_an_optimizer_of_before_the_model_was_sharded_is_refused(results: dict[Any, Any], name: str) -> None:
    for rank in range(RANKS):
        assert re.search("optimizer: .* none of its .* after fully_shard", results["before", name, rank])


def test_noise_that_nobody_draws_anew_is_warned_of_once(results: dict[Any, Any]) -> None:
    assert [len(results["noise", rank]) for rank in range(RANKS)] == [1, 1]
