"""Optimizers that clip analog weights, and draw new weight noise, after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from triton_analog.masters import Masters, found_masters, given_masters, held, is_partitioned
from triton_analog.nn.base import AnalogLayerBase, named_analog_layers
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.settings import GAUSSIAN_CLIP
from triton_analog.nn.tied import clip_each_weight

Layers = Callable[[], Iterable[AnalogLayerBase]] | list[AnalogLayerBase]


class AnalogOptimizer(Optimizer):
    """``AnalogOptimizer(SGD, model.analog_layers, model.parameters(), lr=0.1)``: an ``SGD`` that clips analog weights.

    The result is an instance of the given optimizer class. After each of its steps, ``clip_weights()`` of every analog
    layer runs; a weight that layers share is clipped once for equal clips. Then ``redraw_weight_noise()`` of every layer
    draws the noise of the next step where ``modifier.refresh`` makes it last. Closures, schedulers, gradient scalers and
    state dicts work as with the given class; a copy or pickle takes the model along.

    Args:
        optimizer_class: A subclass of ``torch.optim.Optimizer``.
        analog_layers: The method ``model.analog_layers``, which is asked in each step and so also knows layers that were
            replaced later; or the layers themselves, ``model.analog_layers()``, which are listed once.
        args: For ``optimizer_class``, the parameters first.
        kwargs: For ``optimizer_class``.

    Raises:
        TypeError: one of the first two arguments is something else.
        ValueError: an iterable without any analog layer, such as a generator that was used up before.
    """

    _analog_layers: Layers
    _wrapped: type[Optimizer]
    _own_hook: Any

    def __new__(cls, optimizer_class: Any, /, *args: Any, **kwargs: Any) -> AnalogOptimizer:
        return super().__new__(_subclass(_check_class(optimizer_class)))

    def __init__(self, optimizer_class: type[Optimizer], /, analog_layers: Any, *args: Any, **kwargs: Any) -> None:
        self._analog_layers = _check_layers(analog_layers)
        super().__init__(*args, **kwargs)
        self._watch_steps()

    def _watch_steps(self) -> None:
        self._own_hook = self.register_step_post_hook(_after_step)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_analog_layers": self._analog_layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_analog_layers" in state:  # a copy or pickle; load_state_dict also comes here, with less
            self._watch_steps()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._wrapped,), self.__getstate__()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    given = optimizer._analog_layers  # type: ignore[attr-defined]
    layers = list(given() if callable(given) else given)
    clip_each_weight(layers)
    _redraw(layers)


def _redraw(layers: Iterable[AnalogLayerBase]) -> None:
    for layer in layers:
        layer.redraw_weight_noise()


def _check_class(optimizer_class: Any) -> type[Optimizer]:
    good = isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)
    if not good or issubclass(optimizer_class, AnalogOptimizer):
        given = getattr(optimizer_class, "__qualname__", repr(optimizer_class))
        raise TypeError(
            f"optimizer_class: got {given}; the class of a torch optimizer is needed, such as torch.optim.SGD"
        )
    return optimizer_class


def _check_layers(layers: Any) -> Layers:
    remedy = "pass the method model.analog_layers (convert_to_analog and AnalogWrapper give every model one)"
    if callable(layers) and not isinstance(layers, nn.Module):  # modules are callable, but give outputs
        return layers
    if isinstance(layers, nn.Module) or not isinstance(layers, Iterable):
        raise TypeError(f"analog_layers: got {type(layers).__name__}; {remedy}")
    listed = list(layers)
    for layer in listed:
        if not isinstance(layer, AnalogLayerBase):
            raise TypeError(f"analog_layers: got an iterable that holds a {type(layer).__name__}; {remedy}")
    if not listed:
        raise ValueError(f"analog_layers: got an iterable without any layer, or one that was used up before; {remedy}")
    return listed


_subclasses: dict[type[Optimizer], type[AnalogOptimizer]] = {}


def _subclass(optimizer_class: type[Optimizer]) -> type[AnalogOptimizer]:
    """The analog version of an optimizer class: made once per class object, with its name."""
    if optimizer_class not in _subclasses:
        body = {
            "__module__": optimizer_class.__module__,
            "__doc__": optimizer_class.__doc__,
            "_wrapped": optimizer_class,
        }
        _subclasses[optimizer_class] = type(optimizer_class.__name__, (AnalogOptimizer, optimizer_class), body)
    return _subclasses[optimizer_class]


def _rebuild(optimizer_class: type[Optimizer]) -> Any:
    """An analog optimizer without state, for copies and pickles."""
    return Optimizer.__new__(_subclass(optimizer_class))


# ---- Optimizers that exist already ---------------------------------------------------------------------------------------


def attach(model: nn.Module, optimizer: Any, master: Mapping[Tensor, Tensor] | None = None) -> Attachment:
    """Do the work of :class:`AnalogOptimizer` after each step of an optimizer that exists already.

    For trainers that build their own. After each step those weights of ``model`` that the optimizer steps are clipped, and
    the weight noise of all its layers is drawn anew where ``modifier.refresh`` makes it last. Steps that a gradient scaler
    or the accumulation of gradients leaves out count for nothing.

    Where the optimizer steps copies of the weights in higher precision (master weights), those are clipped and the weights
    take their values. DeepSpeed's are known (ZeRO stages 1 and 2, its bf16 and fp16 optimizers); others are recognised by
    their values if they are whole copies; else pass ``master``.

    Attaching again changes nothing and returns the same handle. Copies and pickles of the optimizer are not attached.

    Args:
        model: Holds analog layers; it may be wrapped (data parallelism, ``torch.compile``, an engine). Layers that replace
            others later are known too.
        optimizer: A torch optimizer, or what has one as its ``.optimizer``, as Accelerate's and DeepSpeed's wrappers do.
        master: The tensor that is stepped in place of each ``layer.weight``, of its shape: a parameter of the optimizer, or a
            view of one.

    Raises:
        TypeError: an argument is something else.
        ValueError: ``model`` has no analog layer; the optimizer steps none of the weights that are to be clipped (or,
            without a Gaussian clip, no parameter of an analog layer), nor masters of them; it is attached to some of the
            layers only, or with another ``master``; a ``master`` does not fit; or masters are partitioned (ZeRO stage 3) or
            cannot be told apart.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    layers = _layers_of(model)
    if not layers:
        raise ValueError(
            f"model: this {type(model).__name__} has no analog layers; convert it first, model = convert_to_analog(model, config)"
        )
    *around, inner = _unwrap(optimizer)
    before = _attached_before(inner, layers, master)
    if before is not None:
        return before
    weights = [weight for layer in layers for weight in _clipped_with(layer)]
    to_clip = [weight for layer in layers if _clips(layer) for weight in _clipped_with(layer) if weight.requires_grad]
    if master is None:
        masters = found_masters(to_clip or weights, model.parameters(), inner)
    else:
        masters = given_masters(master, weights, inner)
    if any(map(is_partitioned, to_clip)):
        raise ValueError(
            "model: its weights are partitioned by DeepSpeed's ZeRO stage 3, where no rank has a whole weight to clip; use "
            "stage 1 or 2, or a config without a Gaussian clip (clip.type)"
        )
    attachment = Attachment(model, inner, around[-1] if around else None, masters)
    _check_steps(attachment, to_clip, layers)
    attachment.start()
    return attachment


class Attachment:
    """What :func:`attach` returns."""

    steps: int
    """Steps after which weights were clipped so far."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, around: Any, masters: Masters | None) -> None:
        self.steps = 0
        self.model, self._optimizer, self.masters = model, optimizer, masters
        # What holds masters may step them part by part and copies them to the weights at the end of its own step, so its
        # steps are those that count.
        self._around = around if masters is not None else None
        self._inner_stepped = False

    def start(self) -> None:
        """Watch the optimizer's steps."""
        if isinstance(self._optimizer, AnalogOptimizer):
            self._optimizer._own_hook.remove()  # until remove(), one clip is enough
        self._hook = self._optimizer.register_step_post_hook(self)
        if self._around is not None:
            self._around_step = self._around.step
            self._around.step = self._counted_step

    def remove(self) -> None:
        """End it; a second time does nothing."""
        if self not in _hooks(self._optimizer):
            return
        self._hook.remove()
        if isinstance(self._optimizer, AnalogOptimizer):
            self._optimizer._watch_steps()
        if self._around is not None and vars(self._around).get("step") == self._counted_step:
            self._around.step = self._around_step

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The hook that the optimizer calls after each of its steps."""
        if self._around is None:
            self._work()
        else:
            self._inner_stepped = True

    def _counted_step(self, *args: Any, **kwargs: Any) -> Any:
        result = self._around_step(*args, **kwargs)
        if self._inner_stepped:  # not if it skipped the step
            self._inner_stepped = False
            self._work()
        return result

    def _work(self) -> None:
        layers, is_stepped = _layers_of(self.model), self.stepped()
        clip_each_weight([layer for layer in layers if any(map(is_stepped, _clipped_with(layer)))], self.masters)
        _redraw(layers)
        self.steps += 1

    def stepped(self) -> Callable[[Tensor], bool]:
        """Which parameters the optimizer steps, as they are or by a master."""
        own, masters = {id(parameter) for parameter in held(self._optimizer)}, self.masters
        return lambda parameter: (
            parameter.requires_grad and (id(parameter) in own or (masters is not None and masters.has(parameter)))
        )


def _layers_of(model: nn.Module) -> list[AnalogLayerBase]:
    return [layer for _, layer in named_analog_layers(model)]


def _clipped_with(layer: AnalogLayerBase) -> list[Tensor]:
    """The weight of ``layer``; where it is no parameter, all that it may be made of."""
    weight = layer._parameters.get("weight") if isinstance(layer, AnalogMatrixLayer) else None
    return list(layer.parameters()) if weight is None else [weight]


def _clips(layer: AnalogLayerBase) -> bool:
    """Whether the config of ``layer`` wants its weight clipped after each step."""
    return isinstance(layer, AnalogMatrixLayer) and layer.rpu_config.clip.type in GAUSSIAN_CLIP


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
        if isinstance(hook, Attachment) and not wanted.isdisjoint(attached := set(_layers_of(hook.model))):
            if not wanted <= attached:
                raise ValueError("model: some of its layers are attached already, but not all; remove() that first")
            for weight, copy in (master or {}).items():
                if hook.masters is None or not hook.masters.has(weight) or hook.masters.read(weight) is not copy:
                    raise ValueError("master: attached already with another one, or none; remove() that first")
            return hook
    return None


def _check_steps(attachment: Attachment, to_clip: list[Tensor], layers: list[AnalogLayerBase]) -> None:
    what = "weights that are to be clipped" if to_clip else "parameters of analog layers"
    concerned = to_clip or [parameter for layer in layers for parameter in layer.parameters()]
    if not any(map(attachment.stepped(), concerned)):
        raise ValueError(
            f"optimizer: {type(attachment._optimizer).__name__} steps none of the {len(concerned)} {what}; build it from the "
            "parameters of the converted model. Where it steps copies of them, pass master={layer.weight: its copy, ...}"
        )
