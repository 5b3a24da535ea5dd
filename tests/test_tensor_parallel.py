"""Layers that tensor parallelism has split over ranks: they compute what one process does, noise included, or say why not.

Numbers are fp64. Every rank also trains the whole model, by itself, and compares. All that two processes do is done in one
start of them, and all that four do in another.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import results_of_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from triton_analog import InputRangeCalibrationType, TorchInferenceRPUConfig, calibrate_input_ranges, convert_to_analog
from triton_analog.analysis import analyze
from triton_analog.config import (
    SavedInput,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightNoiseType,
    WeightQuantizationType,
)
from triton_analog.distributed import AnalogColwise, AnalogRowwise, set_parallel
from triton_analog.nn import (
    AnalogConv2d,
    AnalogExperts,
    AnalogLinear,
    AnalogRNN,
    AnalogSequential,
    AnalogVanillaRNNCell,
)
from triton_analog.nn.one_forward import OneForward
from triton_analog.optim import AnalogOptimizer
from triton_analog.seeds import set_noise_rank

CLOSE = 1e-13
SIZE, HIDDEN, VOCABULARY, BATCH, LENGTH = 32, 64, 64, 4, 6
STEPS, MICRO_BATCHES, START_UP = 2, 2, 3


# ---- A model ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Not quite, but ``q``, ``k`` and ``v`` share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(SIZE, SIZE, bias=bias) for bias in (True, False, False))
        self.o = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.o((3 * self.q(x) * self.k(x)).tanh() + self.v(x))


class Block(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.attention = Attention()
        self.up, self.down = nn.Linear(SIZE, HIDDEN), nn.Linear(HIDDEN, SIZE)
        self.recompute = recompute

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.up(self.norm2(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.compute, x, use_reentrant=False) if self.recompute else self.compute(x)


class Model(nn.Module):
    """Its head is tied to the embedding."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.block, self.norm = nn.Embedding(VOCABULARY, SIZE), Block(recompute), nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, VOCABULARY, bias=False)
        self.tie()

    def tie(self) -> None:
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embedding(tokens))))


def config(**changes: Any) -> TorchInferenceRPUConfig:
    """Inputs of 32 features are two slices, those of 64 four. Ranges clip, and their decay is met by some slices."""
    made = TorchInferenceRPUConfig()
    made.mapping.max_input_size = 16
    # Integers times integers never lie half-way between two steps of this bound.
    made.forward.inp_res, made.forward.out_res, made.forward.out_bound = 254, 254, 3.7
    range_ = made.pre_post.input_range
    range_.enable, range_.init_from_data, range_.init_std_alpha = True, START_UP, 1.0
    range_.decay, range_.input_min_percentage = 0.3, 0.7
    for path, value in changes.items():
        section: Any = made
        *parents, name = path.split("__")
        for parent in parents:
            section = getattr(section, parent)
        setattr(section, name, value)
    return made


def analog(made: TorchInferenceRPUConfig, recompute: bool = False) -> Any:
    model = convert_to_analog(Model(recompute).double(), made)
    model.tie()
    return model


def plain(model: Any, mesh: Any) -> Any:
    """Between the layers are ordinary tensors, whole or of this rank's features."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        **{f"block.attention.{name}": AnalogColwise() for name in "qkv"},
        "block.attention.o": AnalogRowwise(),
        "block.up": AnalogColwise(),
        "block.down": AnalogRowwise(),
        "head": AnalogColwise(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    model.tie()
    return model


def sequence(model: Any, mesh: Any) -> Any:
    """Between the layers each rank has some of the tokens, as DTensors or as ordinary ones."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "block.norm1": SequenceParallel(),
        "block.attention": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        **{f"block.attention.{name}": AnalogColwise() for name in "qkv"},
        "block.attention.o": AnalogRowwise(output_layouts=Shard(1)),
        "block.norm2": SequenceParallel(use_local_output=True),
        "block.up": AnalogColwise(input_layouts=Shard(1), use_local_output=False),
        "block.down": AnalogRowwise(output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(),
        "head": AnalogColwise(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    model.block.down.register_forward_hook(lambda module, args, out: out.to_local())
    parallelize_module(model, mesh, plan)
    model.tie()
    return model


PLANS = {"plain": plain, "sequence": sequence}


def batches(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (STEPS, MICRO_BATCHES, BATCH, LENGTH), generator=generator)


def sgd(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranges and clips decay here, which must see what they have learned
        options = {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1}
        return AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), **options)


def whole_of(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def loss_of(y: Tensor, tokens: Tensor) -> Tensor:
    return 20 * nn.functional.cross_entropy(y.flatten(0, 1), tokens.flatten()) / MICRO_BATCHES


def train(model: Any, optimizer: Any, steps: Tensor, seed: int = 5) -> list[Tensor]:
    """Outputs and gradients of every step, whole."""
    found = []
    for number, step in enumerate(steps):
        torch.manual_seed(seed + number)
        optimizer.zero_grad()
        for tokens in step:
            y = model(tokens)
            loss_of(y, tokens).backward()
            found.append(y.detach())
        found += [whole_of(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
    return found


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: whole_of(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_close(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        pairs = [(name, value, second[name]) for name, value in first.items()]
    else:
        pairs = list(zip(range(len(first)), first, second, strict=True))
    for name, one, other in pairs:
        size = max(1.0, other.double().abs().max().item())
        torch.testing.assert_close(
            one, other, rtol=0, atol=CLOSE * size, msg=lambda said, name=name: f"{name}: {said}"
        )  # fmt: skip


# ---- What must be equal -------------------------------------------------------------------------------------------------

NORMAL = WeightNoiseInjectionType.ADD_NORMAL
PER_CHANNEL_NOISE = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
noisy = {"forward__out_noise": 0.1, "modifier__std_dev": 0.05, "modifier__noise_type": PER_CHANNEL_NOISE}
quantized = {"modifier__quantization_type": WeightQuantizationType.DISCRETIZE_PER_CHANNEL, "modifier__res": 30}
per_channel = {
    **noisy, "forward__out_noise_per_channel": True, "clip__sigma": 1.5,
    "clip__type": WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL,
}  # fmt: skip
per_tensor = {
    **noisy, "modifier__noise_type": NORMAL, "modifier__quantization_type": WeightQuantizationType.DISCRETIZE,
    "modifier__res": 30, "clip__type": WeightClipType.LAYER_GAUSSIAN, "clip__sigma": 1.5,
}  # fmt: skip
learned = {**noisy, **quantized, "clip__type": WeightClipType.LEARNABLE_PER_CHANNEL}
without_converter = {"forward__out_res": -1, "forward__out_bound": 0.0}

EQUAL: dict[str, tuple[str, TorchInferenceRPUConfig]] = {
    "scales per slice, recomputed": ("plain", config(**per_tensor)),
    "learned clip": ("plain", config(**learned)),
    "random inputs, frozen ranges": (
        "plain",
        config(forward__inp_noise=0.02, forward__inp_sto_round=True, pre_post__input_range__learn_input_range=False),
    ),
    "noise per step, int8 inputs": (
        "plain",
        config(**noisy, modifier__refresh=WeightNoiseRefresh.STEP, forward__save_input=SavedInput.INT8),
    ),
    "no ranges": ("plain", config(**without_converter, forward__inp_res=-1, pre_post__input_range__enable=False)),
    "tokens cut, scales per channel": ("sequence", config(**per_channel)),
    "tokens cut, int8 inputs": ("sequence", config(forward__save_input=SavedInput.INT8, **learned)),
    "tokens cut, fast mode, recomputed": ("sequence", config(pre_post__input_range__fast_mode=True)),
    "tokens cut, dynamic ranges": ("sequence", config(**noisy, pre_post__input_range__dynamic=True)),
}


def both(plan: str, made: TorchInferenceRPUConfig, mesh: Any, recompute: bool = False) -> tuple[Any, Any]:
    """The whole model, and one that is split."""
    one, split = analog(made, recompute), PLANS[plan](analog(made, recompute), mesh)
    for model in (one, split):
        set_parallel(model, statistics=None, tp=mesh)
    return one, split


def equal_training(name: str, mesh: Any) -> None:
    plan, made = EQUAL[name]
    one, split = both(plan, made, mesh, "recomputed" in name)
    optimizers = [sgd(model) for model in (one, split)]
    expected, found = (train(model, opt, batches()) for model, opt in zip((one, split), optimizers, strict=True))
    assert_close(found, expected)
    assert_close(state_of(split), state_of(one))
    assert all(layer.was_called for layer in split.analog_layers())
    tokens = batches(2)[0, 0]
    with torch.no_grad():
        outputs = []
        for model in (one, split):
            torch.manual_seed(3)
            outputs.append(model.eval()(tokens))
    assert_close(outputs[1:], outputs[:1])


def one_layer(
    mesh: Any, style: Any, made: TorchInferenceRPUConfig, features: int = SIZE, outputs: int = HIDDEN
) -> tuple[Any, Any]:
    torch.manual_seed(0)
    layer = AnalogLinear(features, outputs, rpu_config=made, dtype=torch.float64)
    split = parallelize_module(AnalogSequential(copy.deepcopy(layer)), mesh, {"0": style})
    for model in (layer, split):
        set_parallel(model, statistics=None, tp=mesh)
    return layer, split


def same_noise(mesh: Any) -> None:
    """Bit for bit: what comes out is the weight, or the noise of the output alone."""
    only_weights = config(**without_converter, **noisy, forward__inp_res=-1, pre_post__input_range__enable=False)
    only_weights.forward.out_noise = 0.0
    only_outputs = config(**without_converter, forward__out_noise=0.1, forward__inp_res=-1)
    only_outputs.pre_post.input_range.init_from_data = 0
    converted = copy.deepcopy(only_outputs)
    converted.forward.out_bound, converted.forward.out_res = 4.0, 254
    eye, nothing = torch.eye(SIZE, dtype=torch.float64), torch.zeros(50, SIZE, dtype=torch.float64)
    for kind in (AnalogColwise, AnalogRowwise):
        for made, x in ((only_weights, eye), (only_outputs, nothing), (converted, nothing)):
            if kind is AnalogRowwise and made is only_outputs:
                continue  # has noise of its own
            style = kind(
                output_layouts=Replicate(), **({"input_layouts": Replicate()} if kind is AnalogRowwise else {})
            )
            layer, split = one_layer(mesh, style, made)
            with torch.no_grad():
                layer.bias.zero_()
                split[0].bias.zero_()
            outputs = []
            for model in (layer, split):
                torch.manual_seed(9)
                outputs.append(model(x).detach())
            assert outputs[0].std() > 0.001
            assert torch.equal(*outputs), (kind, (outputs[0] - outputs[1]).abs().max())


def noise_without_converters(mesh: Any) -> None:
    """Parts of the slices draw for themselves, and together no more than the whole."""
    made = config(**without_converter, forward__out_noise=0.1, forward__inp_res=-1)
    made.pre_post.input_range.init_from_data = 0
    layer, split = one_layer(mesh, AnalogRowwise(), made)
    x = torch.zeros(4000, SIZE // 2, dtype=torch.float64)
    torch.manual_seed(9)
    share = split(x).detach() - split[0].bias.to_local().detach()
    torch.manual_seed(9)
    expected = (layer(torch.zeros(4000, SIZE, dtype=torch.float64)) - layer.bias).detach()
    assert abs(share.std() / expected.std() - 1) < 0.01
    assert abs((share * expected).mean() / expected.var() - 0.5**0.5) < 0.01  # the first rank has the whole's numbers


def uneven_outputs(mesh: Any) -> None:
    """Where nothing is random, ranks may have different numbers of outputs."""
    layer, split = one_layer(mesh, AnalogColwise(output_layouts=Replicate()), config(), outputs=31)
    x = torch.randn(20, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    outputs = [model(x) for model in (layer, split)]
    for y in outputs:
        y.square().sum().backward()
    assert_close(outputs[1:], outputs[:1])
    assert_close([whole_of(p.grad) for p in split.parameters()], [p.grad for p in layer.parameters()])


def layouts(mesh: Any) -> None:
    """Inputs and outputs in any layout, as ordinary tensors or DTensors."""
    generator = torch.Generator().manual_seed(4)
    x, grad = (torch.randn(4, 6, size, dtype=torch.float64, generator=generator) for size in (SIZE, HIDDEN))
    pairs = [
        (given, wanted)
        for given in (Replicate(), Shard(0), Shard(1), Shard(-1))
        for wanted in (Replicate(), Shard(1), Shard(2))
    ]
    expected: list[Tensor] = []
    for style in (AnalogColwise, AnalogRowwise):
        for number, (given, wanted) in enumerate(pairs):
            local = number % 2 == 0
            made = style(input_layouts=given, output_layouts=wanted, use_local_output=local)
            layer, split = one_layer(mesh, made, config())
            own = DTensor.from_local(x, mesh, [Replicate()]).redistribute(placements=[given])
            own = (own.to_local() if local else own).detach().clone().requires_grad_()
            y = split(own)
            if local:
                y = DTensor.from_local(y, mesh, [wanted])
            (y.full_tensor() * grad).sum().backward()
            dx = DTensor.from_local(own.grad, mesh, [given]) if local else own.grad
            found = [y.full_tensor().detach(), dx.full_tensor(), *(whole_of(p.grad) for p in split.parameters())]
            if not expected:
                whole_x = x.clone().requires_grad_()
                out = layer(whole_x)
                (out * grad).sum().backward()
                expected = [out.detach(), whole_x.grad, *(p.grad for p in layer.parameters())]
            assert_close(found, expected)


def frozen_part(mesh: Any) -> None:
    """Only the range is trained, and the input has no gradient."""
    for style in (AnalogColwise(output_layouts=Replicate()), AnalogRowwise(input_layouts=Replicate())):
        layer, split = one_layer(mesh, style, config())
        x = 2 * torch.randn(20, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        grads = []
        for model, own in ((layer, layer), (split, split[0])):
            own.weight.requires_grad_(False)
            own.bias.requires_grad_(False)
            model(x).square().sum().backward()
            grads.append(whole_of(own.input_range.grad))
        assert grads[0].abs().min() > 0
        assert_close(grads[1:], grads[:1])


def utilities(mesh: Any) -> None:
    made = config(clip__type=WeightClipType.LEARNABLE_PER_CHANNEL)
    one, split = both("plain", made, mesh)
    for model in (one, split):
        for layer in model.analog_layers():
            layer.set_input_range(torch.linspace(1, 2, layer.slices, dtype=torch.float64))
            shape = layer.weight.shape
            layer.set_weights(torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape))
        with torch.no_grad():
            for layer in model.analog_layers():
                layer.weight.mul_(1.5)
                layer.reset_weight_clip()
    assert_close(state_of(split), state_of(one))
    for kind in (WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL):
        made = config(clip__type=kind, clip__sigma=1.0, **quantized)
        one, split = both("plain", made, mesh)
        for model in (one, split):
            model.clip_weights()
            model.quantize_weights()
        assert_close(state_of(split), state_of(one))


def calibrations(mesh: Any) -> None:
    for kind, plan in (("MAX", "plain"), ("MOVING_STD", "sequence"), ("CACHE_QUANTILE", "plain")):
        one, split = both(plan, config(**per_tensor), mesh)
        for model in (one, split):
            data = list(batches()[0])
            calibrate_input_ranges(model, InputRangeCalibrationType[kind], data, verbose=False, max_samples=10**6)
        assert_close(state_of(split), state_of(one))


def slices_of_zeros(mesh: Any) -> None:
    """One rank sees nothing in its slices: they keep the range they had."""
    x = torch.randn(20, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x[:, : SIZE // 2] = 0
    layer, split = one_layer(mesh, AnalogRowwise(input_layouts=Replicate()), config())
    for model in (AnalogSequential(layer), split):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calibrate_input_ranges(model, InputRangeCalibrationType.MAX, [x], verbose=False)
    assert_close([whole_of(split[0].input_range)], [layer.input_range.detach()])


def files(mesh: Any) -> None:
    """In the middle of a start-up: one process goes on with the file of two, and two with that of one."""
    made = config(**learned)
    one, split = both("plain", made, mesh)
    for model in (one, split):
        train(model, sgd(model), batches()[:1])
    full = get_model_state_dict(split, options=StateDictOptions(full_state_dict=True))
    assert_close(full, {name: value for name, value in one.state_dict().items() if isinstance(value, Tensor)})
    fresh, other = both("plain", made, mesh)
    fresh.load_state_dict(full)
    other.load_state_dict({name: value.clone() for name, value in split.state_dict().items()})
    on_meta = plain(convert_to_analog(Model().double().to("meta"), made), mesh)
    set_parallel(on_meta, statistics=None, tp=mesh)
    on_meta.to_empty(device="cpu")
    on_meta.tie()
    first = one.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(on_meta, first, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    expected = train(one, sgd(one), batches()[1:])
    for model in (fresh, other, on_meta):
        assert_close(train(model, sgd(model), batches()[1:]), expected)
        assert_close(state_of(model), state_of(one))


def digital_file(mesh: Any) -> None:
    one, split = both("plain", config(**learned), mesh)
    file = {name: 2 * value for name, value in Model().double().state_dict().items()}
    one.load_state_dict(file, strict=False)
    set_model_state_dict(split, file, options=StateDictOptions(full_state_dict=True, strict=False))
    assert_close(state_of(split), state_of(one))


def compiled(mesh: Any) -> None:
    """In one graph, with all that a training forward does; what is eager is the truth."""
    x = torch.randn(3, 4, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    style = AnalogColwise(input_layouts=Shard(1), output_layouts=Shard(1))
    _, net = one_layer(mesh, style, config(**per_tensor))
    found = []
    for own in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        net[0].reset_analog_state()
        torch.manual_seed(7)
        y = own(x.clone().requires_grad_())
        y.square().sum().backward()
        found.append([y.detach(), *(whole_of(p.grad) for p in net.parameters()), *state_of(net).values()])
    assert_close(*found)


CHECKS: dict[str, Callable[[Any], None]] = {
    "noise, bit for bit": same_noise,
    "noise without converters": noise_without_converters,
    "uneven outputs": uneven_outputs,
    "layouts": layouts,
    "only ranges are trained": frozen_part,
    "utilities": utilities,
    "calibrations": calibrations,
    "slices of zeros": slices_of_zeros,
    "files": files,
    "a digital file": digital_file,
    "compiled": compiled,
}


# ---- What cannot be -----------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 5)), nn.Parameter(torch.randn(3, 5, 4))
        self.act_fn = nn.SiLU()


def styled(layer: Any, style: Any) -> Callable[[Any], Any]:
    return lambda mesh: parallelize_module(AnalogSequential(layer()), mesh, {"0": style})


def first_forward(style: Any, features: int = SIZE, **changes: Any) -> Callable[[Any], Any]:
    def run(mesh: Any) -> None:
        _, split = one_layer(mesh, style, config(**changes), features, outputs=24)
        torch.manual_seed(1)
        split(torch.randn(4, features, dtype=torch.float64))

    return run


def linear(features: int = 48, size: int = 16) -> Any:
    return AnalogLinear(features, 8, rpu_config=config(mapping__max_input_size=size))


def unsaid(mesh: Any) -> None:
    plain(analog(config()), mesh)(batches()[0, 0])


def seeded_differently(mesh: Any) -> None:
    _, split = both("plain", config(**noisy), mesh)
    torch.manual_seed(dist.get_rank())
    split(batches()[0, 0])


def ranks_of_their_own(mesh: Any) -> None:
    _, split = both("plain", config(**noisy), mesh)
    set_noise_rank(None)
    torch.manual_seed(1)
    split(batches()[0, 0])


def torchs_style(mesh: Any) -> None:
    model = AnalogSequential(AnalogLinear(SIZE, 8, rpu_config=config()))
    set_parallel(model, statistics=None)
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    model[0].train()
    model(torch.randn(4, SIZE))


def sharded_first(mesh: Any) -> None:
    model = AnalogSequential(AnalogLinear(SIZE, 8, rpu_config=config()))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    parallelize_module(model, mesh, {"0": AnalogColwise()})


def twice(mesh: Any) -> None:
    model = AnalogSequential(linear())
    for _ in range(2):
        parallelize_module(model, mesh, {"0": AnalogColwise()})


def of_weight_norm() -> Any:
    layer = linear()
    torch.nn.utils.parametrizations.weight_norm(layer)
    return layer


def shared_forward(mesh: Any) -> None:
    _, split = one_layer(mesh, AnalogColwise(), config())
    split[0](torch.randn(4, SIZE, dtype=torch.float64), OneForward(2))


def read_noise(mesh: Any) -> None:
    made = config(forward__w_noise=0.1, forward__w_noise_type=WeightNoiseType.ADDITIVE_CONSTANT)
    _, split = one_layer(mesh, AnalogColwise(), made)
    split.eval()(torch.randn(4, SIZE, dtype=torch.float64))


def analysis(mesh: Any) -> None:
    _, split = both("plain", config(), mesh)
    analyze(split, [batches()[0, 0]], verbose=False)


def another_mesh(mesh: Any) -> None:
    _, split = one_layer(mesh, AnalogColwise(), config())
    other = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("a", "b"))["b"]
    split(DTensor.from_local(torch.randn(4, SIZE, dtype=torch.float64), other, [Replicate()]))


def whole_weight(mesh: Any) -> None:
    layer, split = one_layer(mesh, AnalogColwise(), config())
    split[0].weight = layer.weight
    split.eval()(torch.randn(4, SIZE, dtype=torch.float64))


ONLY_LINEAR = "only AnalogLinear can be split over ranks; leave this one out of the plan"
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "convolutions": (
        styled(lambda: AnalogConv2d(4, 4, 3, rpu_config=config()), AnalogColwise()),
        f"AnalogConv2d, and {ONLY_LINEAR}",
    ),
    "cells": (
        styled(lambda: AnalogVanillaRNNCell(4, 4, rpu_config=config()), AnalogRowwise()),
        f"AnalogVanillaRNNCell, and {ONLY_LINEAR}",
    ),
    "recurrent layers": (
        lambda mesh: parallelize_module(
            nn.Sequential(AnalogRNN.from_digital(nn.LSTM(4, 3), config())), mesh, {"0": AnalogColwise()}
        ),
        f"AnalogRNN, and {ONLY_LINEAR}",
    ),
    "experts": (
        lambda mesh: parallelize_module(
            nn.Sequential(AnalogExperts.from_digital(Experts(), config())), mesh, {"0": AnalogRowwise()}
        ),
        f"AnalogExperts, and {ONLY_LINEAR}.*experts may be shared out whole",
    ),
    "a border in a tile": (
        styled(linear, AnalogRowwise()),
        r"16 cuts 48 inputs into 3 slices of 16, which 2 ranks cannot share.*Ranks that fit: 1, 3\.",
    ),
    "unequal slices": (styled(lambda: linear(50, 26), AnalogRowwise()), None),  # 2 slices of 25
    "slices of two widths": (
        styled(lambda: linear(51, 26), AnalogRowwise()),
        "51 inputs into 2 slices of 26 or 25, which 2 ranks .* no number of ranks but 1",
    ),
    "fewer outputs than ranks": (
        styled(lambda: AnalogLinear(SIZE, 1, rpu_config=config()), AnalogColwise()),
        "out_features: 1 outputs leave some of 2 ranks without any",
    ),
    "outputs in parts of 12 with noise": (
        first_forward(AnalogColwise(), **noisy),
        "parts of 12 outputs, .* in groups of 16; .* or switch the noise off",
    ),
    "inputs in parts of 8 with noise": (
        first_forward(AnalogRowwise(input_layouts=Replicate()), **noisy, features=16, mapping__max_input_size=8),
        "parts of 8 inputs, .* in groups of 16; choose slices .* or switch the noise off",
    ),
    "outputs in parts of 12 with random inputs": (first_forward(AnalogColwise(), forward__inp_noise=0.1), None),
    "inputs in parts of 8 with output noise": (
        first_forward(
            AnalogRowwise(input_layouts=Replicate()), features=16, mapping__max_input_size=8, forward__out_noise=0.1
        ),
        None,
    ),
    "the group was not said": (unsaid, "process_group: .*set_parallel"),
    "other seeds": (seeded_differently, "seed: the ranks .* torch.manual_seed"),
    "other noise ranks": (ranks_of_their_own, r"seed: the ranks .*set_parallel\(model, statistics="),
    "torch's own style": (torchs_style, "weight: .* use AnalogColwise or AnalogRowwise"),
    "sharded before": (sharded_first, "are sharded already; convert first, then parallelize_module"),
    "split before": (twice, "was split before; name it once"),
    "weight_norm": (styled(of_weight_norm, AnalogColwise()), "computed from other parameters .*; remove that"),
    "a partial layout": (
        styled(linear, AnalogColwise(input_layouts=Partial())),
        r"input_layouts: got P.*Replicate\(\) or",
    ),
    "calls that share a forward": (shared_forward, "one_forward: given to a layer that tensor parallelism has split"),
    "read noise": (read_noise, r"forward.w_noise: .* restore_analog\(digital_model, state_dict\)"),
    "analysis": (analysis, "tensor parallelism has split .*, of which no rank has all; take the whole state dict"),
    "an input on another mesh": (another_mesh, "input: a DTensor on .*, but this layer was split on"),
    "a whole weight": (whole_weight, "weight: .* was split over ranks, but is a Parameter now"),
}


def outcome(check: Callable[[], Any]) -> str:
    """What it raised."""
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error} {error.__cause__ or ''}"
    return ""


@contextlib.contextmanager
def group(rank: int, port: int, ranks: int) -> Any:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    yield
    dist.destroy_process_group()


def one_of_two(rank: int, port: int, results: Any) -> None:
    with group(rank, port, 2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        for name in EQUAL:
            results["equal", name, rank] = outcome(lambda name=name: equal_training(name, mesh))
        for name, check in CHECKS.items():
            results["check", name, rank] = outcome(lambda check=check: check(mesh))
        for name, (check, _) in REFUSED.items():
            results["refused", name, rank] = outcome(lambda check=check: check(mesh))


@pytest.fixture(scope="module")
def two() -> dict[Any, Any]:
    return results_of_ranks(one_of_two, 2)


@pytest.mark.parametrize("name", EQUAL)
def test_training_is_that_of_one_process(two: dict[Any, Any], name: str) -> None:
    assert [two["equal", name, rank] for rank in range(2)] == ["", ""]


@pytest.mark.parametrize("name", CHECKS)
def test_a_split_layer_does_what_a_whole_one_does(two: dict[Any, Any], name: str) -> None:
    assert [two["check", name, rank] for rank in range(2)] == ["", ""]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_says_so(two: dict[Any, Any], name: str) -> None:
    wanted = REFUSED[name][1]
    for rank in range(2):
        said = two["refused", name, rank]
        assert said == "" if wanted is None else re.search(wanted, said), said


# ---- FSDP2 on top, on four processes ------------------------------------------------------------------------------------


def sharded(model: Any, mesh: Any, plan: str = "plain") -> Any:
    """In the order that the documentation gives."""
    PLANS[plan](model, mesh["tp"])
    fully_shard(model.block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    set_parallel(model, statistics=mesh["dp"], tp=mesh["tp"])
    return model


def of_replica(steps: Tensor, mesh: Any) -> Tensor:
    """What the replica of this rank sees of global batches."""
    return steps.chunk(2, 2)[mesh["dp"].get_local_rank()]


def shards_of_parts(plan: str, made: TorchInferenceRPUConfig) -> Callable[[Any, str], None]:
    """Training on global batches, and what was trained as a whole file: for one process, and for four."""

    def run(mesh: Any, folder: str) -> None:
        one = analog(made)
        set_parallel(one, statistics=None)
        split = sharded(analog(made), mesh, plan)
        expected, found = train(one, sgd(one), batches()), train(split, sgd(split), of_replica(batches(), mesh))
        for own, other in zip(found, expected, strict=True):
            if own.shape == other.shape:  # gradients; outputs are those of a part of the batch
                assert_close([own], [other])
            else:
                assert_close([own], [other.chunk(2)[mesh["dp"].get_local_rank()]])
        assert_close(state_of(split), state_of(one))
        full = get_model_state_dict(split, options=StateDictOptions(full_state_dict=True))
        fresh, other = analog(made), sharded(analog(made), mesh, plan)
        fresh.load_state_dict(full)
        assert_close(state_of(fresh), state_of(one))
        first = full if dist.get_rank() == 0 else {}
        set_model_state_dict(other, first, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        assert_close(state_of(other), state_of(one))

    return run


def resumed(mesh: Any, folder: str) -> None:
    """Saved in the middle of the start-up, and gone on with in a model that was on the meta device."""
    made = config(**learned)
    split = sharded(analog(made), mesh)
    optimizer = sgd(split)
    train(split, optimizer, of_replica(batches(), mesh)[:1])
    model_state, optimizer_state = get_state_dict(split, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train(split, optimizer, of_replica(batches(), mesh)[1:], seed=6)
    fresh = sharded(convert_to_analog(Model().double().to("meta"), made), mesh)
    fresh.to_empty(device="cpu")
    optimizer = sgd(fresh)
    model_state, optimizer_state = get_state_dict(fresh, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(fresh, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(fresh, optimizer, of_replica(batches(), mesh)[1:], seed=6)
    expected = state_of(split)
    for name, value in state_of(fresh).items():
        assert torch.equal(value, expected[name]), name


def noise_of_replicas(mesh: Any, folder: str) -> None:
    """Ranks of one replica draw the noise of a whole layer, the first replica that of one process, the other another."""
    made = config(**per_tensor)
    made.pre_post.input_range.init_from_data = 0
    one, split = analog(made), sharded(analog(made), mesh)
    tokens, outputs = batches()[0, 0], []
    for model in (one, split):
        torch.manual_seed(3)
        if model is one:
            set_noise_rank(0)
        else:
            set_parallel(split, statistics=mesh["dp"], tp=mesh["tp"])
        with torch.no_grad():
            outputs.append(model(tokens))
    is_first = mesh["dp"].get_local_rank() == 0
    assert ((outputs[0] - outputs[1]).abs().max() < 1e-12) == is_first
    everyone = [torch.empty_like(outputs[1]) for _ in range(4)]
    dist.all_gather(everyone, outputs[1])
    first, second, third, fourth = everyone
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert (first - third).abs().mean() > 0.01


FOUR: dict[str, Callable[[Any, str], None]] = {
    "clip": shards_of_parts("sequence", config(clip__type=WeightClipType.LAYER_GAUSSIAN, clip__sigma=1.5)),
    "learned clip": shards_of_parts("plain", config(clip__type=WeightClipType.LEARNABLE_PER_CHANNEL, **quantized)),
    "resumed": resumed,
    "noise": noise_of_replicas,
}


def one_of_four(rank: int, port: int, folder: str, results: Any) -> None:
    with group(rank, port, 4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        for name, check in FOUR.items():
            results[name, rank] = outcome(lambda check=check: check(mesh, folder))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return results_of_ranks(one_of_four, 4, str(tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.parametrize("name", FOUR)
def test_fully_shard_goes_on_top(four: dict[Any, Any], name: str) -> None:
    assert [four[name, rank] for rank in range(4)] == [""] * 4
