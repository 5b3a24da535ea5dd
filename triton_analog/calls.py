"""One call of the analog layer: its arguments checked once for each signature, its gradient, and how compilers see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from triton_analog.launch.plan import PLANS
from triton_analog.ops import _checks as check
from triton_analog.ops._operator import composite
from triton_analog.ops._transforms import Gradient, is_transforming, needs_gradient
from triton_analog.ops.linear import linear_backward, linear_forward
from triton_analog.reference import Patches, num_slices
from triton_analog.reference.noise import is_placed
from triton_analog.seeds import mix_rank

Kind = Literal["none", "per_tensor", "per_channel"]
SaveInput = Literal["full", "int8"]


class Numbers(NamedTuple):
    """All arguments of :func:`triton_analog.functional.analog_linear` but its tensors; and ``clips_gradient``: False leaves the
    gradient of the input as it is behind the converter, where the range clips too, and the range without one, for who adds up
    the gradients of the parts of a layer first."""

    dynamic_input_range: bool = False
    max_input_size: int = -1
    inp_res: float = -1.0
    inp_noise: float = 0.0
    inp_sto_round: bool = False
    out_noise: float = 0.0
    out_noise_per_channel: bool = False
    out_bound: float = 0.0
    out_bound_per_channel: bool = False
    out_res: float = -1.0
    weight_quantization: Kind = "none"
    weight_res: float = 0.0
    weight_noise: Kind = "none"
    weight_noise_std: float = 0.0
    range_decay: float = 0.0
    input_min_percentage: float = 0.95
    fast_mode: bool = False
    training: bool = True
    save_input: SaveInput = "full"
    clips_gradient: bool = True
    groups: int = 1
    patches: Patches | None = None

    @property
    def disturbs_weight(self) -> bool:
        """Whether the weight has noise."""
        return self.training and self.weight_noise != "none" and self.weight_noise_std > 0

    @property
    def draws_signals(self) -> bool:
        """Whether chance decides something of the inputs or the outputs."""
        rounds = self.inp_sto_round and self.inp_res > 0
        return rounds or self.inp_noise > 0 or (self.training and self.out_noise > 0)


class _Forward(NamedTuple):
    """The numbers of :func:`ops.linear.linear_forward`, in its order."""

    slices: int
    dynamic_range: bool
    inp_res: float
    inp_noise: float
    inp_sto_round: bool
    out_noise: float
    out_noise_per_channel: bool
    out_bound: float
    out_bound_per_channel: bool
    out_res: float
    weight_quantization: str
    weight_res: float
    weight_noise: str
    weight_noise_std: float
    save_input: str
    patches: tuple[int, ...] | None


class _Backward(NamedTuple):
    """The numbers of :func:`ops.linear.linear_backward`, in its order."""

    slices: int
    inp_res: float
    inp_noise: float
    inp_sto_round: bool
    weight_quantization: str
    weight_res: float
    weight_noise: str
    weight_noise_std: float
    decay: float
    input_min_percentage: float
    fast_mode: bool
    clips_gradient: bool
    patches: tuple[int, ...] | None


class _Settings(NamedTuple):
    """What one call of :func:`analog_linear` does, once its arguments were checked."""

    dtype: torch.dtype
    """Of the inputs, cast as autocast wants it."""
    draws_signals: bool
    draws_weight: bool
    forward: _Forward
    backward: _Backward
    tallied: _Backward
    """With a tally, which leaves the range's decay to who adds tallies up."""


class _AnalogLinear(Gradient):
    """Of the tensors of :func:`linear_forward`, a tally, and their settings. Gives what :func:`linear_forward` gives, the output
    first."""

    NAME = "analog_linear"

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, _, settings = args
        return tuple(linear_forward(*tensors, *settings.forward, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _remember(ctx, inputs, output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, clipped, weight, ranges, clip, seed, weight_seed, tile_weight, slice_wmax, mask = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_range, needs_clip = ctx.needs_input_grad[:5]
        needs_input, needs_matrix = needs_x or needs_range, needs_weight or needs_bias or needs_clip
        bias_dtype = ctx.bias_dtype if needs_bias else None
        gradients = linear_backward(
            grad, x, clipped, weight, ranges, clip, seed, weight_seed, tile_weight, slice_wmax, mask, *ctx.numbers,
            ctx.input_shape, bias_dtype, needs_input, needs_matrix,
        )  # fmt: skip
        found = iter(gradients)
        dx = next(found) if needs_input else None
        has_range = needs_input and ctx.clips_gradient and ranges is not None and ranges.ndim == 1
        drange = next(found) if has_range else None
        tally = None
        if drange is not None and drange.ndim == 2:
            drange, tally = drange[0], drange[1:]
        dw = next(found) if needs_matrix else None
        dbias = next(found) if bias_dtype is not None else None
        dclip = next(found, None)
        return (
            dx if needs_x else None,
            dw if needs_weight else None,
            dbias,
            drange if needs_range else None,
            dclip if needs_clip else None,
            *(None,) * 5,
            tally,
            None,
        )


class _EagerAnalogLinear(torch.autograd.Function):
    """Keeps what only the backward needs from autograd's eyes, which would look at it in every step."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, _, settings = args
        y, *kept = linear_forward(*tensors, *settings.forward, True)
        _remember(ctx, args, kept)
        return y

    backward = staticmethod(_AnalogLinear.backward)
    jvp = _AnalogLinear.jvp


def _remember(ctx: Any, args: Sequence[Any], kept: Sequence[Tensor]) -> None:
    """Keep what the backward needs of the arguments and of what the forward made beside its output."""
    x, weight, bias, input_range, clip, seed, weight_seed, tile_weight, _, slice_wmax, tally, settings = args
    kept, numbers = list(kept), settings.forward
    ctx.numbers = settings.backward if tally is None else settings.tallied
    ctx.clips_gradient = ctx.numbers.clips_gradient
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.input_shape = x.shape
    mask = kept.pop(0) if numbers.out_bound > 0 else None
    ranges = kept.pop(0) if numbers.dynamic_range else input_range
    x, clipped = kept or (x, None)
    seed = seed if numbers.inp_noise > 0 or numbers.inp_sto_round else None
    ctx.save_for_backward(x, clipped, weight, ranges, clip, seed, weight_seed, tile_weight, slice_wmax, mask)


def parts_of(tensor: Tensor | None, groups: int, dim: int = 0) -> list[Any]:
    """The part of every group; None is None for each."""
    if tensor is None or groups == 1:
        return [tensor] * groups
    return list(tensor.chunk(groups, dim))


def seeds_of(seed: Tensor | None, groups: int) -> list[Any]:
    """A seed for every group, so that their noise differs; the first has the one that was given."""
    if seed is None or groups == 1:
        return [seed] * groups
    place = seed[1:]  # empty, unless the seed is placed
    return [seed if group == 0 else torch.cat([seed[:1] + group, place]) for group in range(groups)]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def draw_seed(device: torch.device | str) -> Tensor:
    """A fresh 63-bit seed on ``device``, from torch's default generator of that device: int64 ``[1]``.

    ``torch.manual_seed``, CUDA graphs and activation checkpointing govern it as they do dropout. Data-parallel ranks that are
    seeded alike draw different ones (:func:`triton_analog.seeds.set_noise_rank`).
    """
    return mix_rank(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device))


def input_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which :func:`analog_linear` takes ``x``: its own, except under autocast."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _autocasts(x: Tensor) -> bool:
    """Whether autocast changes the dtype of ``x``, as it would for ``linear``."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def check_groups(groups: int, size: int, what: str) -> None:
    check.require(
        isinstance(groups, int) and groups >= 1 and size % groups == 0,
        lambda: f"groups: got {groups!r}; a number >= 1 that divides the {size} {what} is needed",
    )


def check_input(x: Tensor, weight: Tensor, groups: int = 1, patches: Patches | None = None) -> None:
    """``x`` is an input that :func:`analog_linear` can multiply with ``weight``.

    Raises:
        TypeError: it is no floating-point tensor, or of another dtype than ``weight`` outside autocast.
        ValueError: its features (with ``patches``: its dimensions, channels or size) or its device do not fit the weight.
    """
    check.batch("x", x)
    check.matrix("weight", weight)
    check.together("x", x, weight=weight)
    check_groups(groups, weight.shape[0], "outputs of the weight")
    if patches is None:
        needed = groups * weight.shape[1]
        check.require(
            x.shape[-1] == needed,
            lambda: (
                f"x: got shape {check.shape_of(x)}; its last dimension must be {needed}, the weight's input features"
            ),
        )
    else:
        patches.check(x, groups * weight.shape[1])
    if x.dtype != weight.dtype and not _autocasts(x):
        raise TypeError(
            f"x: dtype {x.dtype}, but weight is {weight.dtype}; cast one of them or run under torch.autocast"
        )


# ---- Checks ---------------------------------------------------------------------------------------------------------


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    weight_clip: Tensor | None,
    seed: Tensor | None,
    weight_seed: Tensor | None,
    tile_weight: Tensor | None,
    tile_wmax: Tensor | None,
    numbers: Numbers,
) -> _Settings:
    """The arguments fit each other; what they ask for."""
    (
        dynamic_input_range, max_input_size, inp_res, inp_noise, inp_sto_round, out_noise, out_noise_per_channel, out_bound,
        out_bound_per_channel, out_res, weight_quantization, weight_res, weight_noise, weight_noise_std, range_decay,
        input_min_percentage, fast_mode, training, save_input, clips_gradient, groups, patches,
    ) = numbers  # fmt: skip
    check_input(x, weight, groups, patches)
    check.tensors(bias=bias, input_range=input_range, weight_clip=weight_clip, seed=seed, weight_seed=weight_seed)
    dtype = input_dtype(x)
    check.require(
        not (dynamic_input_range and input_range is not None),
        lambda: (
            "input_range: given together with dynamic_input_range, which finds the range itself; pass one of the two"
        ),
    )
    slices = num_slices(weight.shape[1], max_input_size)
    if input_range is not None:
        check.static_range(input_range, groups * slices)
    check.weight_stage(weight, slices, weight_clip, weight_quantization, weight_res, prefix="weight_")
    check.bias(bias, weight.shape[0])
    check.kind("weight_noise", weight_noise)
    check.non_negative("weight_noise_std", weight_noise_std)
    check.non_negative("inp_noise", inp_noise)
    check.non_negative("out_noise", out_noise)
    check.range_rule(range_decay, input_min_percentage, "range_decay")
    ranged = dynamic_input_range or input_range is not None
    scaled = {"inp_res": inp_res, "inp_noise": inp_noise, "out_noise": out_noise, "out_bound": out_bound}
    for name, value in scaled.items():
        if value > 0 and not ranged:
            raise ValueError(
                f"{name}: got {value} without an input range, which scales it; pass input_range or "
                "dynamic_input_range=True"
            )
    check.require(
        save_input in ("full", "int8"), lambda: f"save_input: got {save_input!r}; allowed are 'full' and 'int8'"
    )
    if save_input == "int8":
        check.int8_steps("inp_res", inp_res)
    found = x if dynamic_input_range else input_range  # stands for what is found on the way
    check.input_converter(inp_res, found, x.new_empty(0, dtype=dtype))
    check.output_stage(found, 0.0, None, out_bound, found, out_res, seed)
    check.seed_given(weight_seed, False, "weight noise")
    check.require(
        not (is_placed(seed) and weight_seed is None and numbers.disturbs_weight and tile_weight is None),
        lambda: (
            "weight_seed: missing, but seed is that of a part of the product, which says nothing of the weight's place; pass "
            "triton_analog.seeds.placed(seed, first_row, first_column) of the weight"
        ),
    )
    check.together(
        "x", x, bias=bias, input_range=input_range, weight_clip=weight_clip, seed=seed, weight_seed=weight_seed,
        tile_weight=tile_weight, tile_wmax=tile_wmax,
    )  # fmt: skip
    if tile_weight is not None:
        check.require(
            tile_weight.shape == weight.shape and tile_weight.dtype == dtype,
            lambda: (
                f"tile_weight: got {tile_weight.dtype} of shape {check.shape_of(tile_weight)}; {dtype} of shape "
                f"{check.shape_of(weight)} is needed, as modified_weight(weight, dtype={dtype}) gives it"
            ),
        )
    check.wmax_shape("tile_weight[1]", tile_wmax, slices, weight.shape[0])
    if not training:
        out_noise, weight_noise = 0.0, "none"
    inp_sto_round = inp_sto_round and inp_res > 0
    packed = None if patches is None else patches.numbers()
    backward = _Backward(
        slices, float(inp_res), float(inp_noise), inp_sto_round, weight_quantization, float(weight_res), weight_noise,
        float(weight_noise_std), float(range_decay), float(input_min_percentage), fast_mode,
        clips_gradient, packed,
    )  # fmt: skip
    return _Settings(
        dtype,
        draws_signals=numbers.draws_signals,
        draws_weight=numbers.disturbs_weight and tile_weight is None,
        forward=_Forward(
            slices, dynamic_input_range, float(inp_res), float(inp_noise), inp_sto_round, float(out_noise),
            out_noise_per_channel, float(out_bound), out_bound_per_channel, float(out_res), weight_quantization,
            float(weight_res), weight_noise, float(weight_noise_std), save_input, packed,
        ),
        backward=backward,
        tallied=backward._replace(decay=-1.0),
    )  # fmt: skip


class _Known:
    """What is remembered of a signature: its settings, once its arguments were checked."""

    settings: _Settings | None = None


@lru_cache(maxsize=PLANS)
def _known(numbers: Numbers, autocast: torch.dtype | None, *tensors: Any) -> _Known:
    return _Known()


def _settings_of(tensors: tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any], numbers: Numbers) -> _Settings:
    """:func:`_checked`, once for each signature."""
    try:
        autocast = torch.get_autocast_dtype(tensors[0].device.type) if _autocasts(tensors[0]) else None
        known = _known(numbers, autocast, *[None if x is None else (x.shape, x.dtype, x.device) for x in tensors])
    except (TypeError, AttributeError):  # sizes that are symbols, or arguments that the checks refuse
        return _checked(*tensors, numbers)
    if known.settings is None:
        known.settings = _checked(*tensors, numbers)
    return known.settings


# ---- The call -------------------------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    weight_clip: Tensor | None,
    seed: Tensor | None,
    weight_seed: Tensor | None,
    tile_weight: Tensor | None,
    tile_wmax: Tensor | None,
    numbers: Numbers,
    range_tally: Tensor | None = None,
    slice_wmax: Tensor | None = None,
) -> Tensor:
    """:func:`triton_analog.functional.analog_linear`, of arguments that were sorted before.

    With ``range_tally [2, groups * S]``, whose values do not matter, the range's gradient is without its decay. The gradient of
    the tally is how many inputs did not clip, and how many there were. (Under a transform of ``torch.func`` it has none.)

    ``slice_wmax [S, 1]`` is each slice's largest ``wmax`` where ``weight`` has only some outputs of a layer without groups.
    ``tile_wmax`` without ``tile_weight`` spares a pass over a weight that the tiles hold as it is.
    """
    tensors = (
        x, weight, bias, input_range, weight_clip, seed, weight_seed, tile_weight, tile_wmax, slice_wmax, range_tally,
    )  # fmt: skip
    if torch.compiler.is_compiling():  # then one call is traced, and none of the checks
        *others, patches = numbers
        packed = None if patches is None else patches.numbers()
        return _traced(*tensors[:9], *others, packed, range_tally, slice_wmax)
    return _linear(tensors, numbers)


def linear_and_masks(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """What :func:`linear` gives, without a gradient, and for every group its ADC's mask of saturated products (see
    :func:`triton_analog.ops.matmul`); no masks without a bound."""
    *tensors, numbers = arguments[:10]
    slice_wmax = arguments[11] if len(arguments) > 11 else None
    masks: list[Tensor] = []

    def product(settings: _Settings, *tensors: Any) -> Tensor:
        y, *kept = linear_forward(*tensors[:10], *settings.forward, True)
        if settings.forward.out_bound > 0:
            masks.append(kept[0])
        return y

    return _linear((*tensors, slice_wmax, None), numbers, product), masks


def _linear(tensors: tuple[Any, ...], numbers: Numbers, product: Callable[..., Tensor] | None = None) -> Tensor:
    product = product or _product
    *others, slice_wmax, tally = tensors
    settings = _settings_of(tensors[:9], numbers)
    x, weight, bias, input_range, weight_clip, seed, weight_seed, tile_weight, tile_wmax = others
    groups, patches = numbers.groups, numbers.patches
    if x.dtype != settings.dtype:
        x = x.to(settings.dtype)
    if seed is None and (settings.draws_signals or (settings.draws_weight and weight_seed is None)):
        seed = draw_seed(x.device)
    if weight_seed is None:
        weight_seed = seed
    rows = x if patches is not None or x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if groups == 1:
        y = product(
            settings, rows, weight, bias, input_range, weight_clip, seed, weight_seed, tile_weight, tile_wmax, slice_wmax, tally
        )  # fmt: skip
    else:
        parts = zip(
            parts_of(rows, groups, 1), parts_of(weight, groups), parts_of(bias, groups), parts_of(input_range, groups),
            parts_of(weight_clip, groups, 1), seeds_of(seed, groups), seeds_of(weight_seed, groups),
            parts_of(tile_weight, groups), parts_of(tile_wmax, groups, 1), parts_of(slice_wmax, groups),
            parts_of(tally, groups, 1), strict=True,
        )  # fmt: skip
        y = torch.cat([product(settings, *part) for part in parts], -1)
    if patches is not None:
        return y.reshape(x.shape[0], *patches.places(x.shape), weight.shape[0])
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _product(settings: _Settings, *tensors: Any) -> Tensor:
    if is_transforming():
        if needs_gradient(tensors[:5]):
            *others, tally = tensors
            return _AnalogLinear.apply(*others, None if tally is None else tally.detach(), settings)[0]
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:5]):
        return _EagerAnalogLinear.apply(*tensors, settings)
    return linear_forward(*tensors[:-1], *settings.forward, False)[0]


def _from_operator(*arguments: Any) -> Tensor:
    *others, patches = arguments[9 : 9 + len(Numbers._fields)]
    numbers = Numbers(*others, None if patches is None else Patches.of(patches))  # type: ignore[call-arg]
    tally, slice_wmax = (*arguments[9 + len(Numbers._fields) :], None, None)[:2]
    return _linear((*arguments[:9], slice_wmax, tally), numbers)


_traced = composite(
    "analog_linear",
    linear,
    _from_operator,
    {"Kind": "str", "SaveInput": "str", "Patches | None": "SymInt[]?"},
    {"Numbers": Numbers},
)
