"""What follows a step: the same as layer by layer, in a few operations, planned once and again when something has changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.nn import AnalogConv2d, AnalogHFConv1D, AnalogLinear, AnalogSequential
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.optim import AnalogOptimizer, after_step, attach
from triton_analog.optim.layers import KnownLayers
from triton_analog.optim.masters import Masters

NONE, LEARNED = WeightClipType.NONE, WeightClipType.LEARNABLE_PER_CHANNEL
WHOLE, PER_CHANNEL = WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL
LR = 0.1


def config(kind: WeightClipType = WHOLE, sigma: float = 0.5, noisy: bool = False) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = kind, sigma
    if noisy:
        config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
        config.modifier.refresh = WeightNoiseRefresh.STEP
    return config


def model(layers: int = 3, **options: Any) -> AnalogSequential:
    return AnalogSequential(*(AnalogLinear(6, 6, rpu_config=config(**options)) for _ in range(layers)))


def all_kinds() -> AnalogSequential:
    """Every kind of layer and clip, noise that lasts and that does not, and a weight that three layers share."""
    net = AnalogSequential(
        AnalogLinear(6, 6, rpu_config=config(WHOLE, noisy=True)),
        AnalogSequential(AnalogLinear(6, 6, rpu_config=config(PER_CHANNEL, 0.7)), nn.ReLU()),
        AnalogLinear(6, 6, rpu_config=config(NONE, noisy=True)),
        AnalogLinear(6, 6, rpu_config=config(LEARNED)),
        AnalogHFConv1D(5, 6, rpu_config=config(PER_CHANNEL, 0.6, noisy=True)),
        AnalogConv2d(2, 3, 3, rpu_config=config(PER_CHANNEL, 0.6)),
        AnalogConv2d(2, 3, 3, rpu_config=config(WHOLE, 0.6)),
        *(AnalogLinear(6, 6, rpu_config=config(WHOLE, sigma)) for sigma in (0.9, 0.9, 0.5)),
        AnalogLinear(1, 1, rpu_config=config(WHOLE)),
        AnalogLinear(1, 4, rpu_config=config(PER_CHANNEL)),
    )
    net[-4].weight = net[-3].weight = net[-5].weight
    net[6].to(memory_format=torch.channels_last)
    return net


def give_gradients(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)


def is_clipped(weight: Tensor, before: Tensor, sigma: float = 0.5) -> bool:
    """Whether ``weight`` is what a step of SGD and then one clip of the whole made of ``before``."""
    assert weight.grad is not None
    stepped = before - LR * weight.grad
    bound = sigma * stepped.std()
    assert (stepped.abs() > bound).any()
    return torch.allclose(weight.detach(), stepped.clamp(-bound, bound), rtol=1e-3, atol=1e-5)


def wrapped(net: Any, how: str, kind: type[Optimizer] = SGD, **options: Any) -> Optimizer:
    """An optimizer of ``net`` that clips, in each of the ways to say what is to be clipped."""
    options = {"lr": LR} | options
    if how == "attach":
        optimizer = kind(net.parameters(), **options)
        attach(net, optimizer)
        return optimizer
    given = {"method": net.analog_layers, "list": list(net.analog_layers()), "function": lambda: net.analog_layers()}
    return AnalogOptimizer(kind, given[how], net.parameters(), **options)


all_ways = pytest.mark.parametrize("how", ["method", "list", "function", "attach"])
ways_that_look = pytest.mark.parametrize("how", ["method", "function", "attach"])


def step(net: Any, optimizer: Optimizer) -> None:
    give_gradients(net)
    optimizer.step()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every plan that is made from now on."""
    made: list[Any] = []

    class Plan(after_step._Plan):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(after_step, "_Plan", Plan)
    return made


# ---- The numbers --------------------------------------------------------------------------------------------------------


@all_ways
def test_the_work_is_that_of_the_layers_to_the_bit(how: str) -> None:
    net = all_kinds()
    twin = copy.deepcopy(net)
    optimizer, plain = wrapped(net, how), SGD(twin.parameters(), lr=LR)
    for seed in range(3):
        states = []
        for one, own in ((net, optimizer), (twin, plain)):
            torch.manual_seed(seed)
            step(one, own)
            if one is twin:
                twin.clip_weights()
                twin.redraw_weight_noise()
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        for layer, other in zip(net.analog_layers(), twin.analog_layers(), strict=True):
            assert torch.equal(layer.weight, other.weight)
            seeds = layer.weight_noise_seed, other.weight_noise_seed
            assert seeds == (None, None) or torch.equal(*seeds)


def test_kernels_give_the_same(backend: str, device: torch.device) -> None:
    with device:  # kernels cannot read what a layer is first made of on the CPU beside a GPU
        net = all_kinds()
    twin = copy.deepcopy(net)
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=LR)
    for _ in range(3):
        give_gradients(net)
        with torch.no_grad():
            for own, other in zip(net.parameters(), twin.parameters(), strict=True):
                other -= LR * own.grad
        optimizer.step()
        twin.clip_weights()
        for own, other in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own, other)


def test_seeds_are_drawn_for_each_layer_and_stay_the_same_tensors() -> None:
    net = model(20, noisy=True)
    seeds = [layer.weight_noise_seed for layer in net]
    optimizer = wrapped(net, "method")
    seen: set[int] = set()
    for _ in range(3):
        step(net, optimizer)
        assert all(layer.weight_noise_seed is seed for layer, seed in zip(net, seeds, strict=True))
        assert all(seed.shape == (1,) and seed._base is None for seed in seeds)
        seen |= {seed.item() for seed in seeds}
    assert len(seen) == 60
    assert all(0 <= seed < 2**63 - 1 for seed in seen)


def test_a_layer_with_a_way_of_its_own_goes_it() -> None:
    called: list[str] = []

    class Own(AnalogLinear):
        def clip_weights(self, master: Tensor | None = None) -> None:
            called.append("clip")

        def redraw_weight_noise(self) -> None:
            called.append("redraw")

    class Other(AnalogLayerBase):
        def clip_weights(self) -> None:
            called.append("other")

    own = Own(6, 6, rpu_config=config())
    called.clear()
    net = AnalogSequential(own, Other(), AnalogLinear(6, 6, rpu_config=config()))
    optimizer = wrapped(net, "method")
    before = net[2].weight.detach().clone()
    step(net, optimizer)
    assert called == ["clip", "other", "redraw"]
    assert is_clipped(net[2].weight, before)


def test_a_weight_computed_from_others_is_refused_as_by_its_layer() -> None:
    net = model()
    optimizer = wrapped(net, "method")
    step(net, optimizer)
    parametrizations.weight_norm(net[1])
    with pytest.raises(ValueError, match=r"weight: that of this .* is not a parameter but computed from others"):
        step(net, optimizer)


# ---- The work -----------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Keeps the name of every operation, apart from torch's marks for a profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.__name__.startswith("_record_function"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Idle(SGD):
    """An optimizer without any operations of its own."""

    def step(self, closure: Any = None) -> None:
        pass


def operations(net: Any, how: str) -> list[str]:
    """What is dispatched after a step, once it is planned."""
    optimizer = wrapped(net, how, Idle)
    optimizer.step()
    with Count() as count:
        optimizer.step()
    return count.names


@all_ways
def test_many_layers_take_as_many_operations_as_few(how: str) -> None:
    found = [operations(model(layers, kind=PER_CHANNEL, noisy=True), how) for layers in (2, 40)]
    assert found[0] == found[1] == ["clip.default", "random_.from", "_foreach_copy_.default"]


def test_each_kind_of_layer_takes_one_more_and_nothing_waits_for_the_device() -> None:
    net = all_kinds()
    twice = AnalogSequential(*net, *all_kinds())
    found = operations(twice, "method")
    assert found == operations(net, "method")
    waits = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "_to_copy", "masked_select"}
    assert not {name.split(".")[0] for name in found} & waits
    # Whole, by rows and by columns; and whole for another clip of the shared weight.
    assert found == 4 * ["clip.default"] + ["random_.from", "_foreach_copy_.default"]


def test_masters_take_as_many_operations_for_many_layers_as_for_few() -> None:
    found = []
    for layers in (2, 30):
        net = model(layers).bfloat16()
        optimizer = Idle([weight.detach().float() for weight in net.parameters()], lr=LR)
        attach(net, optimizer)
        optimizer.step()
        with Count() as count:
            optimizer.step()
        found.append(count.names)
    assert found[0] == found[1] == ["clip.default", "_foreach_copy_.default"]


@all_ways
def test_nothing_is_worked_out_again(how: str, plans: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = all_kinds()
    optimizer = wrapped(net, how)
    for _ in range(3):
        step(net, optimizer)
    assert len(plans) == 1
    if how != "function":
        monkeypatch.setattr(nn.Module, "named_modules", lambda *args, **kwargs: pytest.fail("the tree was walked"))
        optimizer.step()


# ---- What a plan depends on -----------------------------------------------------------------------------------------------


def set_sigma(net: Any) -> None:
    net[0].rpu_config.clip.sigma = 0.3


def set_type(net: Any) -> None:
    net[0].rpu_config.clip.type = NONE


def reconfigure(net: Any) -> None:
    net[0].reconfigure(config(PER_CHANNEL, 0.4, noisy=True))


def load(net: Any) -> None:
    net.load_state_dict(
        copy.deepcopy(
            AnalogSequential(*(AnalogLinear(6, 6, rpu_config=config(PER_CHANNEL, 0.3)) for _ in net)).state_dict()
        )
    )


def replace_weight_data(net: Any) -> None:
    net[0].weight.data = torch.randn(6, 6)


def transpose_weight_data(net: Any) -> None:
    """The same memory."""
    net[0].weight.data = net[0].weight.data.T


def tie(net: Any) -> None:
    net[1].weight = net[0].weight


def move_seed(net: Any) -> None:
    net[0].weight_noise_seed = net[0].weight_noise_seed.clone()


CHANGES = [set_sigma, set_type, reconfigure, load, replace_weight_data, transpose_weight_data, tie, move_seed]


@pytest.mark.parametrize("change", CHANGES)
@all_ways
def test_a_change_makes_another_plan(change: Callable[[Any], None], how: str, plans: list[Any]) -> None:
    net = model(noisy=True)
    optimizer = wrapped(net, how)
    step(net, optimizer)
    change(net)
    twin = copy.deepcopy(net)
    step(net, optimizer)
    for own, other in zip(net.parameters(), twin.parameters(), strict=True):
        other.grad = own.grad
    SGD(twin.parameters(), lr=LR).step()
    twin.clip_weights()
    for own, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)
    before = [layer.weight_noise_seed.clone() for layer in net if layer.weight_noise_seed is not None]
    step(net, optimizer)
    assert len(plans) == 2
    after = [layer.weight_noise_seed for layer in net if layer.weight_noise_seed is not None]
    assert not any(map(torch.equal, before, after))


@ways_that_look
@pytest.mark.parametrize("place", ["top", "nested", "deleted", "appended"])
def test_layers_that_come_and_go_are_known(how: str, place: str, plans: list[Any]) -> None:
    net = AnalogSequential(model(2), AnalogLinear(6, 6, rpu_config=config()))
    optimizer = wrapped(net, how)
    step(net, optimizer)
    new = AnalogLinear(6, 6, rpu_config=config())
    if place == "top":
        net[1] = new
    elif place == "nested":
        net[0][1] = new
    elif place == "deleted":
        del net[1]
        new = net[0][0]
    else:
        net[0].append(new)
    if place != "deleted":
        optimizer.add_param_group({"params": new.parameters()})
    before = new.weight.detach().clone()
    step(net, optimizer)
    assert is_clipped(new.weight, before)
    step(net, optimizer)
    assert len(plans) == 2


def test_a_list_of_layers_stays_what_it_was() -> None:
    net = model(2)
    optimizer = wrapped(net, "list")
    old, new = net[0], AnalogLinear(6, 6, rpu_config=config())
    net[0] = new
    before = new.weight.detach().clone()
    give_gradients(AnalogSequential(old, *net))
    optimizer.step()
    assert torch.equal(new.weight, before)
    assert old.weight.abs().max() < old.weight.std() * 1.5


@all_ways
def test_a_weight_that_was_replaced(how: str, plans: list[Any]) -> None:
    net = model(2)
    optimizer = wrapped(net, how)
    step(net, optimizer)
    old, net[0].weight = net[0].weight, nn.Parameter(torch.randn(6, 6))
    optimizer.add_param_group({"params": [net[0].weight]})
    old.grad = None
    before, kept = net[0].weight.detach().clone(), old.detach().clone()
    step(net, optimizer)
    assert is_clipped(net[0].weight, before)
    assert torch.equal(old, kept)
    assert len(plans) == 2


@all_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_was_cast(how: str, dtype: torch.dtype, plans: list[Any]) -> None:
    net = model(2)
    optimizer = wrapped(net, how)
    step(net, optimizer)
    net.to(dtype)
    before = net[0].weight.detach().clone()
    step(net, optimizer)
    stepped = before - LR * net[0].weight.grad
    bound = 0.5 * (stepped if dtype == torch.float64 else stepped.float()).std()
    torch.testing.assert_close(net[0].weight.detach(), stepped.clamp(-bound, bound).to(dtype), rtol=1e-2, atol=1e-3)
    assert len(plans) == 2


def test_a_model_that_was_cast_is_found_by_the_kernels(device: torch.device, backend: str) -> None:
    net = model(2, kind=PER_CHANNEL).to(device)
    optimizer = wrapped(net, "method")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        net.to(dtype)
        before = [layer.weight.detach().clone() for layer in net]
        step(net, optimizer)
        for layer, old in zip(net, before, strict=True):
            stepped = (old - LR * layer.weight.grad).float()
            bound = 0.5 * stepped.std(dim=1, keepdim=True)
            torch.testing.assert_close(
                layer.weight.detach().float(), stepped.clamp(-bound, bound), rtol=1e-2, atol=1e-3
            )


def test_weights_that_are_untied_again_are_clipped_one_by_one() -> None:
    net = model(2)
    net[1].weight = net[0].weight
    optimizer = wrapped(net, "method")
    step(net, optimizer)
    net[1].weight = nn.Parameter(torch.randn(6, 6))
    optimizer.add_param_group({"params": [net[1].weight]})
    before = [layer.weight.detach().clone() for layer in net]
    step(net, optimizer)
    assert all(is_clipped(layer.weight, old) for layer, old in zip(net, before, strict=True))


def test_a_weight_that_is_frozen_is_not_clipped_by_what_is_attached(plans: list[Any]) -> None:
    net = model(2)
    optimizer = wrapped(net, "attach")
    step(net, optimizer)
    net[0].weight.requires_grad_(False)
    net[0].weight.data.copy_(torch.randn(6, 6))
    before = net[0].weight.detach().clone()
    give_gradients(net)
    net[0].weight.grad = None
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    net[0].weight.requires_grad_()
    step(net, optimizer)
    assert is_clipped(net[0].weight, before)
    assert len(plans) == 3


def test_parameters_that_the_optimizer_is_given_later_are_clipped_then(plans: list[Any]) -> None:
    net = model(2)
    optimizer = SGD(net[0].parameters(), lr=LR)
    attach(net, optimizer)
    before = net[1].weight.detach().clone()
    step(net, optimizer)
    assert torch.equal(net[1].weight, before)
    optimizer.add_param_group({"params": net[1].parameters()})
    step(net, optimizer)
    assert is_clipped(net[1].weight, before)
    assert len(plans) == 2


def test_masters_whose_memory_changes_are_found(device: torch.device, backend: str) -> None:
    net = model(2).bfloat16().to(device)
    masters = [weight.detach().float() for weight in net.parameters()]
    optimizer = SGD(masters, lr=LR)
    attach(net, optimizer)
    for _ in range(2):
        for master in masters:
            master.grad = torch.randn_like(master)
        before = [master.clone() for master in masters]
        optimizer.step()
        for weight, master, old in zip(net.parameters(), masters, before, strict=True):
            if weight.ndim == 2:
                stepped = old - LR * master.grad
                bound = 0.5 * stepped.std()
                torch.testing.assert_close(master, stepped.clamp(-bound, bound))
                assert torch.equal(weight, master.bfloat16())
        for master in masters:
            master.data = torch.randn_like(master)


def test_masters_of_which_there_are_only_copies_are_read_and_written() -> None:
    net = model(3).bfloat16()
    net[2].reconfigure(config(NONE))
    masters = {id(layer.weight): torch.randn(6, 6) for layer in net}
    expected = [master.clamp(-0.5 * master.std(), 0.5 * master.std()) for master in masters.values()]
    copies = Masters(
        has=lambda weight: id(weight) in masters,
        read=lambda weight: masters[id(weight)].clone(),
        write=lambda weight, changed: masters.update({id(weight): changed}),
        lasting=False,
    )
    unclipped = net[2].weight.detach().clone()
    optimizer = SGD(net.parameters())
    after_step.AfterStep(KnownLayers(net), optimizer, copies)(optimizer)
    for layer, truth in zip(net[:2], expected, strict=False):
        torch.testing.assert_close(masters[id(layer.weight)], truth)
        assert torch.equal(layer.weight, truth.bfloat16())
    assert torch.equal(net[2].weight, unclipped)


# ---- Copies, and what comes and goes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True], ids=["the method", "its result"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_has_a_plan_of_its_own(copied: Any, called: bool, plans: list[Any]) -> None:
    net = model(2, noisy=True)
    optimizer = wrapped(net, "list" if called else "method")
    step(net, optimizer)
    other_net, other = copied((net, optimizer))
    own, seeds = net[0].weight.detach().clone(), [layer.weight_noise_seed.clone() for layer in net]
    before = other_net[0].weight.detach().clone()
    step(other_net, other)
    assert is_clipped(other_net[0].weight, before)
    assert torch.equal(net[0].weight, own)
    assert all(torch.equal(layer.weight_noise_seed, seed) for layer, seed in zip(net, seeds, strict=True))
    assert len(plans) == 2


def test_attach_and_remove_again_and_again() -> None:
    net = model(2)
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=LR)
    for _ in range(3):
        for removed in (False, True):
            handle = attach(net, optimizer)
            if removed:
                handle.remove()
            before = net[0].weight.detach().clone()
            step(net, optimizer)
            assert is_clipped(net[0].weight, before)


def test_layers_that_are_replaced_are_let_go() -> None:
    net = model(2)
    optimizer = wrapped(net, "method")
    step(net, optimizer)
    net[0] = AnalogLinear(6, 6, rpu_config=config())
    step(net, optimizer)
    plan = optimizer._after_step._plan  # type: ignore[attr-defined]
    assert {layer for layer, *_ in plan._alive} == set(net)


# ---- On a GPU -----------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def kinds_on_gpu() -> AnalogSequential:
    """What a forward can run through, with both deviations, both layouts and noise that lasts."""
    layers: list[nn.Module] = []
    for kind, sigma in ((WHOLE, 1.0), (PER_CHANNEL, 1.2), (PER_CHANNEL, 0.9), (NONE, 1.0)):
        layers.append(AnalogLinear(64, 64, rpu_config=config(kind, sigma, noisy=True)))
        layers.append(AnalogHFConv1D(64, 64, rpu_config=config(kind, sigma, noisy=True)))
    return AnalogSequential(*layers).cuda()


def on_a_side_stream(work: Callable[[], Any]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


@needs_gpu
@pytest.mark.parametrize("how", ["method", "attach"])
def test_a_captured_training_step_clips_and_redraws_in_every_replay(how: str) -> None:
    net, x = kinds_on_gpu(), torch.randn(16, 64, device="cuda")
    optimizer = wrapped(net, how, AdamW, lr=1e-2, capturable=True)

    def training_step() -> None:
        optimizer.zero_grad(set_to_none=False)
        net(x).square().mean().backward()
        optimizer.step()

    on_a_side_stream(lambda: [training_step() for _ in range(3)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training_step()
    seen: set[int] = set()
    for _ in range(4):
        with torch.no_grad():
            for layer in net:
                layer.weight.normal_()  # beyond every bound, so that a clip shows
        graph.replay()
        for layer in net:
            seen.add(layer.weight_noise_seed.item())
            bound = layer.gaussian_clip()
            if bound is None:
                continue
            sigma, channel_dim = bound
            weight = layer.weight.detach()
            deviation = weight.std() if channel_dim is None else weight.std(dim=1 - channel_dim, keepdim=True)
            largest = weight.abs().amax() if channel_dim is None else weight.abs().amax(1 - channel_dim, keepdim=True)
            assert (largest < 1.9 * sigma * deviation).all()  # a clamp lowers the deviation
            counts = (
                (weight.abs() == largest).sum()
                if channel_dim is None
                else (weight.abs() == largest).sum(1 - channel_dim)
            )
            assert (counts > 1).all()  # many numbers lie at the bound itself
    assert len(seen) == 4 * len(net)


@needs_gpu
def test_a_captured_training_step_equals_an_eager_one() -> None:
    """Of weights with a clip and without noise, which two ways would draw differently."""
    eager = AnalogSequential(
        AnalogLinear(64, 64, rpu_config=config(WHOLE, 1.0)),
        AnalogHFConv1D(64, 64, rpu_config=config(PER_CHANNEL, 1.2)),
        AnalogLinear(64, 64, rpu_config=config(PER_CHANNEL, 1.2)),
    ).cuda()
    captured, x = copy.deepcopy(eager), torch.randn(16, 64, device="cuda")
    steps = []
    for net in (eager, captured):
        optimizer = AnalogOptimizer(AdamW, net.analog_layers, net.parameters(), lr=1e-2, capturable=True)

        def training_step(net: Any = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)
            net(x).square().mean().backward()
            optimizer.step()

        on_a_side_stream(lambda training_step=training_step: [training_step() for _ in range(3)])
        steps.append(training_step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps[1]()
    for _ in range(5):
        steps[0]()
        graph.replay()
    for own, other in zip(eager.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@needs_gpu
def test_a_step_that_is_captured_before_any_other_clips_too() -> None:
    """Without a table, as none can be made in a capture."""
    net = model(4, kind=PER_CHANNEL, noisy=True).cuda()
    optimizer = wrapped(net, "method", Idle)
    other = copy.deepcopy(net)  # with which torch's own kernels are loaded
    other.clip_weights()
    wrapped(other, "method", Idle).step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    with torch.no_grad():
        for layer in net:
            layer.weight.normal_()
    expected = copy.deepcopy(net)
    expected.clip_weights()
    graph.replay()
    for layer, other in zip(net, expected, strict=True):
        torch.testing.assert_close(layer.weight, other.weight)
    optimizer.step()


@needs_gpu
def test_a_graph_outlives_the_plan_that_it_was_captured_with() -> None:
    net = model(4, kind=PER_CHANNEL, noisy=True).cuda()
    optimizer = wrapped(net, "method", Idle)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for sigma in (0.4, 0.3, 0.2):
        for layer in net:
            layer.rpu_config.clip.sigma = sigma
        optimizer.step()
    rubbish = [torch.full((64, 5), -1, device="cuda") for _ in range(50)]
    with torch.no_grad():
        for layer in net:
            layer.weight.normal_()
            layer.rpu_config.clip.sigma = 0.5
    expected = copy.deepcopy(net)
    expected.clip_weights()
    graph.replay()
    for layer, other in zip(net, expected, strict=True):
        torch.testing.assert_close(layer.weight, other.weight)
    del rubbish


@needs_gpu
@pytest.mark.parametrize("how", ["method", "attach"])
def test_no_step_waits_for_the_device_not_even_one_that_plans(how: str) -> None:
    net = kinds_on_gpu()
    give_gradients(net)
    optimizer = wrapped(net, how, AdamW, lr=1e-2, capturable=True)
    optimizer.step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        net[0].rpu_config.clip.sigma = 0.7
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_many_layers_take_as_many_launches_as_few() -> None:
    counts = []
    for layers in (2, 40):
        net = model(layers, kind=PER_CHANNEL, noisy=True).cuda()
        optimizer = wrapped(net, "method", Idle)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        counts.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))
    assert counts[0] == counts[1]
