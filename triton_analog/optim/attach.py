"""The work of an analog optimizer, after the steps of an optimizer that exists already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from triton_analog.hints import warn_user
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.outside import check_layers
from triton_analog.optim.after_step import AfterStep, clipped_with, stepped_by
from triton_analog.optim.decay import WithoutDecay
from triton_analog.optim.layers import KnownLayers, layers_of
from triton_analog.optim.masters import Masters, found_masters, given_masters, held, may_step
from triton_analog.optim.optimizer import AnalogOptimizer, before_compiled
from triton_analog.optim.range_masters import RangeMasters


def attach(model: nn.Module, optimizer: Any, master: Mapping[Tensor, Tensor] | None = None) -> Attachment:
    """Do the work of :class:`AnalogOptimizer` after each step of an optimizer that exists already.

    For trainers that build their own. After each step those weights of ``model`` that the optimizer steps are clipped, and
    the weight noise of all its layers is drawn anew where ``modifier.refresh`` makes it last. In its steps the optimizer's weight
    decay leaves input ranges and learned clips alone, as it does not know what they are. Steps that a gradient scaler
    or the accumulation of gradients leaves out count for nothing. A CUDA graph may capture the work together with the step.

    Where the optimizer steps copies of the weights in higher precision (master weights), those are clipped and the weights
    take their values. DeepSpeed's are known (all stages of ZeRO, its bf16 and fp16 optimizers); others are recognised by
    their values if they are whole copies; else pass ``master``. Input ranges that are stepped so take what they have learned
    from data into their masters, and decay there.

    Attaching again changes nothing and returns the same handle. Copies and pickles of the optimizer are not attached.

    Args:
        model: Holds analog layers; it may be wrapped (data parallelism, ``torch.compile``, an engine). Layers that replace
            others later are known too.
        optimizer: A torch optimizer, or what has one as its ``.optimizer``, as Accelerate's and DeepSpeed's wrappers do.
        master: The tensor that is stepped in place of each ``layer.weight`` or ``layer.input_range``, of its shape: a parameter
            of the optimizer, or a view of one.

    Raises:
        TypeError: an argument is something else.
        ValueError: ``model`` has no analog layer; the optimizer steps none of the weights that are to be clipped (or, where
            there is none, as for a frozen analog base with digital adapters, no parameter of the model), nor masters of them;
            a layer's weight was replaced by one of another shape; it is attached to some of the layers only, or with another
            ``master``; a ``master`` does not fit; or masters cannot be told apart.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f"model: this {type(model).__name__} has no analog layers; convert it first, model = convert_to_analog(model, config)"
        )
    check_layers(model)
    *around, inner = _unwrap(optimizer)
    before = _attached_before(inner, layers, master)
    if before is not None:
        return before
    weights = [weight for layer in layers for weight in clipped_with(layer)]
    to_clip = [weight for layer in layers if _clips(layer) for weight in clipped_with(layer) if weight.requires_grad]
    if master is None:
        trained = [weight for weight in weights if weight.requires_grad]
        masters = found_masters(to_clip or trained, model.parameters(), inner)
    else:
        masters = given_masters(master, weights + _trained_ranges(layers), inner)
    _check_steps(inner, masters, to_clip, model)
    _warn_of_ranges(layers, inner, masters)
    attachment = Attachment(model, inner, around[-1] if around else None, masters)
    attachment.start()
    return attachment


class Attachment:
    """What :func:`attach` returns."""

    steps: int
    """Steps after which weights were clipped so far."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, around: Any, masters: Masters | None) -> None:
        self.steps = 0
        self.model, self._optimizer, self.masters = model, optimizer, masters
        self._after_step = AfterStep(KnownLayers(model), optimizer, masters)
        self._ranges = None if masters is None else RangeMasters(KnownLayers(model), masters)
        # What holds masters may step them part by part and copies them to the weights at the end of its own step, so its
        # steps are those that count.
        self._around = around if masters is not None else None
        self._inner_stepped = False

    def start(self) -> None:
        """Watch the optimizer's steps."""
        if isinstance(self._optimizer, AnalogOptimizer):
            self._optimizer._own_hook.remove()  # until remove(), one clip is enough
        self._decay = WithoutDecay(KnownLayers(self.model), self._optimizer)
        self._hook = self._optimizer.register_step_post_hook(self)
        self._pre_hook = self._optimizer.register_step_pre_hook(self._before)
        self._optimizer.has_analog_steps = True  # type: ignore[attr-defined]
        if self._around is not None:
            self._around_step = self._around.step
            self._around.step = self._counted_step

    def remove(self) -> None:
        """End it; a second time does nothing."""
        if self not in _hooks(self._optimizer):
            return
        self._hook.remove()
        self._pre_hook.remove()
        vars(self._optimizer).pop("has_analog_steps", None)
        self._decay.remove()
        if isinstance(self._optimizer, AnalogOptimizer):
            self._optimizer._watch_steps()
        if self._around is not None and vars(self._around).get("step") == self._counted_step:
            self._around.step = self._around_step

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The hook that the optimizer calls before each of its steps."""
        if self._ranges is not None:
            if self._around is None:
                self._ranges.begin()
            self._ranges.prepare(optimizer)
        return before_compiled(optimizer, args, kwargs)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The hook that the optimizer calls after each of its steps."""
        if self._around is None:
            self._work()
        else:
            self._inner_stepped = True

    def _counted_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._ranges is not None:
            self._ranges.begin()
        result = self._around_step(*args, **kwargs)
        if self._inner_stepped:  # not if it skipped the step
            self._inner_stepped = False
            self._work()
        return result

    def _work(self) -> None:
        if self._ranges is not None:
            self._ranges.end()
        self._after_step(self._optimizer)
        self.steps += 1


def _trained_ranges(layers: list[AnalogLayerBase]) -> list[Tensor]:
    ranges = [layer._parameters.get("input_range") for layer in layers]
    return [range_ for range_ in ranges if range_ is not None and range_.requires_grad]


def _warn_of_ranges(layers: list[AnalogLayerBase], optimizer: Optimizer, masters: Masters | None) -> None:
    """Where weights have masters, ranges may have some that cannot be told apart by their values."""
    own = {id(parameter) for parameter in held(optimizer)}
    lost = [r for r in _trained_ranges(layers) if masters is not None and id(r) not in own and not masters.has(r)]
    if lost:
        warn_user(
            f"master: the optimizer steps copies of weights, but {len(lost)} input range(s) neither as they are nor by a known "
            "copy: what they learn from data may be overwritten by one, and they do not decay. Pass master={layer.weight: "
            "its copy, layer.input_range: its copy, ...}, or freeze the ranges (learn_input_range = False)"
        )


def _clips(layer: AnalogLayerBase) -> bool:
    """Whether the config of ``layer`` wants its weight clipped after each step."""
    return isinstance(layer, AnalogMatrixLayer) and layer.gaussian_clip() is not None


def _unwrap(optimizer: Any) -> list[Any]:
    """``optimizer``, what it wraps, and so on to the optimizer of torch inside."""
    chain = [optimizer]
    while not any(chain[-1] is outer for outer in chain[:-1]) and getattr(chain[-1], "optimizer", None) is not None:
        chain.append(chain[-1].optimizer)
    if not isinstance(chain[-1], Optimizer):
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}; a torch.optim.Optimizer is needed, or a wrapper with one as .optimizer"
        )
    return chain


def _hooks(optimizer: Optimizer) -> list[Any]:
    return list(optimizer._optimizer_step_post_hooks.values())


def _attached_before(optimizer: Optimizer, layers: list[AnalogLayerBase], master: Any) -> Attachment | None:
    """The attachment of just these layers, or of more.

    Raises:
        ValueError: one of some of the layers, or with another ``master``.
    """
    wanted = set(layers)
    if isinstance(optimizer, AnalogOptimizer):
        given = optimizer._analog_layers
        if not wanted.issuperset(given() if callable(given) else given):
            raise ValueError("model: this AnalogOptimizer clips layers that are not in it; attach to the whole model")
    for hook in _hooks(optimizer):
        if isinstance(hook, Attachment) and not wanted.isdisjoint(attached := set(layers_of(hook.model))):
            if not wanted <= attached:
                raise ValueError("model: some of its layers are attached already, but not all; remove() that first")
            for weight, copy in (master or {}).items():
                if hook.masters is None or not hook.masters.has(weight) or hook.masters.read(weight) is not copy:
                    raise ValueError("master: attached already with another one, or none; remove() that first")
            return hook
    return None


def _check_steps(optimizer: Optimizer, masters: Masters | None, to_clip: list[Tensor], model: nn.Module) -> None:
    if to_clip:
        what, concerned = "weights that are to be clipped", to_clip
    else:  # there is only noise to draw after its steps, whatever they train
        what, concerned = "trained parameters of the model", [p for p in model.parameters() if p.requires_grad]
        if may_step(optimizer, concerned):
            return
    if not any(map(stepped_by(optimizer, masters), concerned)):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} steps none of the {len(concerned)} {what}; build it from the "
            "parameters of the converted model. Where it steps copies of them, pass master={layer.weight: its copy, ...}"
        )
