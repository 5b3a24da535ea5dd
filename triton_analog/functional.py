"""The operations composed into one analog linear layer, with explicit autograd.

The forward keeps the input, the stored weight, the ranges, the seed and, with an output converter, one bit per product and
slice. The backward rebuilds the noisy weight from its seed, and the patches of a convolution from the input. Nothing waits
for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triton_analog import ops
from triton_analog.launch import runs_kernel
from triton_analog.ops import _checks as check
from triton_analog.patches import Patches
from triton_analog.reference import merge_moments, num_slices
from triton_analog.reference.grid import half_steps

Kind = Literal["none", "per_tensor", "per_channel"]
SaveInput = Literal["full", "int8"]


class _Settings(NamedTuple):
    """The numbers of one call; hashable, so that compilers can treat them as constants."""

    slices: int
    dynamic_range: bool
    inp_res: float
    out_noise: float
    out_noise_per_channel: bool
    out_bound: float
    out_bound_per_channel: bool
    out_res: float
    weight_quantization: Kind
    weight_res: float
    weight_noise: Kind
    weight_noise_std: float
    range_decay: float
    input_min_percentage: float
    fast_mode: bool
    save_input: SaveInput
    needs_grad: bool
    patches: Patches | None

    @property
    def scales_outputs(self) -> bool:
        return self.out_noise > 0 or self.out_bound > 0

    @property
    def changes_weight(self) -> bool:
        return self.weight_quantization != "none" or self.disturbs_weight

    @property
    def disturbs_weight(self) -> bool:
        return self.weight_noise != "none" and self.weight_noise_std > 0

    @property
    def is_integer_product(self) -> bool:
        """Inputs and weights are steps of grids that int8 holds."""
        return (
            self.weight_quantization != "none"
            and not self.disturbs_weight
            and 0 < half_steps(self.weight_res) <= 127
            and 0 < half_steps(self.inp_res) <= 127
        )


def _modified_weight(
    weight: Tensor, clip: Tensor | None, seed: Tensor | None, dtype: torch.dtype, settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    """The weight of this forward, the same again in its backward, and ``wmax [S, N]`` if it was found on the way."""
    if clip is None and not settings.changes_weight:
        return weight.to(dtype), None
    return ops.weight(
        weight,
        settings.slices,
        clip=clip,
        quantization=settings.weight_quantization,
        res=settings.weight_res,
        noise_type=settings.weight_noise,
        std_dev=settings.weight_noise_std,
        seed=seed,
        dtype=dtype,
    )


class _AnalogLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_range: Tensor | None,
        clip: Tensor | None,
        seed: Tensor | None,
        weight_seed: Tensor | None,
        tile_weight: Tensor | None,
        tile_wmax: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        weight_seed = seed if weight_seed is None else weight_seed
        kept, patches = x, settings.patches
        if patches is not None:
            x = patches.unfold(x)
        int8 = settings.is_integer_product and not settings.needs_grad and runs_kernel(x) and tile_weight is None
        if tile_weight is None:
            w, wmax = _modified_weight(weight, clip, weight_seed, torch.int8 if int8 else x.dtype, settings)
        else:
            w, wmax = tile_weight, tile_wmax
        if wmax is None and settings.scales_outputs:
            wmax = ops.absmax(weight, settings.slices)

        def scale(per_channel: bool) -> Tensor | None:
            return wmax if per_channel or wmax is None else wmax.amax(1, keepdim=True)

        r = ops.absmax(x, settings.slices) if settings.dynamic_range else input_range
        y, mask = ops.matmul(
            x,
            w,
            bias,
            r,
            settings.slices,
            inp_res=settings.inp_res,
            out_noise=settings.out_noise,
            noise_wmax=scale(settings.out_noise_per_channel) if settings.out_noise > 0 else None,
            out_bound=settings.out_bound,
            bound_wmax=scale(settings.out_bound_per_channel) if settings.out_bound > 0 else None,
            out_res=settings.out_res,
            seed=seed,
            weight_wmax=scale(settings.weight_quantization == "per_channel") if int8 else None,
            weight_res=settings.weight_res,
            needs_mask=settings.needs_grad,
        )
        ctx.settings = settings
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.input_shape = kept.shape
        clipped = None
        # Ten bits per element instead of x, unless the patches of a convolution overlap so much that x is smaller.
        is_smaller = 5 * x.numel() < 4 * kept.numel() * kept.element_size()
        if settings.save_input == "int8" and settings.needs_grad and is_smaller:
            assert r is not None
            kept, clipped = ops.dac_steps(x, r, settings.slices, settings.inp_res)
        ctx.save_for_backward(
            kept, clipped, weight, r, clip, weight_seed, tile_weight, mask if settings.out_bound > 0 else None
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clipped, weight, r, clip, weight_seed, tile_weight, mask = ctx.saved_tensors
        settings: _Settings = ctx.settings
        needs_x, needs_weight, needs_bias, needs_range, needs_clip = ctx.needs_input_grad[:5]
        dx: Any = None
        dw: Any = None
        dbias = drange = dclip = None
        static = r is not None and not settings.dynamic_range
        patches = settings.patches
        if patches is not None and x.dtype != torch.int8:
            x = patches.unfold(x)
        needs_input, needs_matrix = needs_x or needs_range, needs_weight or needs_clip or needs_bias
        rule: dict[str, Any] = {
            "decay": settings.range_decay,
            "input_min_percentage": settings.input_min_percentage,
            "fast_mode": settings.fast_mode,
        }
        results: dict[str, Any] = {"dtype": weight.dtype, "bias_dtype": ctx.bias_dtype if needs_bias else None}
        if needs_input and tile_weight is None:
            tile_weight, _ = _modified_weight(weight, clip, weight_seed, grad.dtype, settings)
        if needs_input and needs_matrix:
            dx, drange, dw, dbias = ops.matmul_backward(
                grad,
                tile_weight,
                x,
                r,
                settings.slices,
                mask,
                clipped=clipped,
                inp_res=settings.inp_res,
                **rule,
                **results,
            )
        elif needs_input:
            dx, drange, _ = ops.matmul_dgrad(
                grad, tile_weight, x, r if static else None, settings.slices, mask, clipped=clipped, **rule
            )
        elif needs_matrix:
            converted = x.dtype == torch.int8
            dw, dbias = ops.matmul_wgrad(
                grad, x, r, settings.slices, mask, inp_res=settings.inp_res, converted=converted, **results
            )
        if patches is not None and needs_x:
            dx = patches.fold(dx, ctx.input_shape)
        if needs_matrix and clip is not None:
            dw, dclip = ops.weight_grad(
                dw,
                weight,
                clip,
                settings.slices,
                quantization=settings.weight_quantization,
                res=settings.weight_res,
            )
            dclip = dclip.to(clip.dtype)
        return (
            dx if needs_x else None,
            dw if needs_weight else None,
            dbias if needs_bias else None,
            drange if needs_range else None,
            dclip,
            *(None,) * 5,
        )


def modified_weight(
    weight: Tensor,
    *,
    max_input_size: int = -1,
    weight_clip: Tensor | None = None,
    weight_quantization: Kind = "none",
    weight_res: float = 0.0,
    weight_noise: Kind = "none",
    weight_noise_std: float = 0.0,
    groups: int = 1,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight as the tiles hold it, ``[N, K]`` in ``dtype``, and its scale ``wmax [S, N]``; for ``tile_weight``.

    Several calls of :func:`analog_linear` can share it, one per micro-batch of a step: the noise is then drawn once, and no
    call makes a pass over the weight; it costs the memory of one more weight. Gradients reach ``weight`` (and the clip)
    through :func:`analog_linear`, not from here.

    Args:
        weight, max_input_size, weight_clip, weight_quantization, weight_res, weight_noise, weight_noise_std, groups: As in
            :func:`analog_linear`, with ``training=True``.
        seed: int64 ``[1]``; None draws one.
        dtype: That of the inputs it will meet; default that of ``weight``.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    if seed is None and weight_noise != "none" and weight_noise_std > 0:
        seed = draw_seed(weight.device)
    check.matrix("weight", weight)
    _check_groups(groups, weight.shape[0], "outputs of the weight")
    with torch.no_grad():
        made = [
            ops.weight(
                part,
                num_slices(weight.shape[1], max_input_size),
                clip=clip,
                quantization=weight_quantization,
                res=weight_res,
                noise_type=weight_noise,
                std_dev=weight_noise_std,
                seed=own_seed,
                dtype=dtype,
            )
            for part, clip, own_seed in zip(
                _parts(weight, groups), _parts(weight_clip, groups, 1), _seeds(seed, groups), strict=True
            )
        ]
    weights, scales = zip(*made, strict=True)
    return _joined(weights, 0), _joined(scales, 1)


def _parts(tensor: Tensor | None, groups: int, dim: int = 0) -> list[Any]:
    """The part of every group; None is None for each."""
    if tensor is None or groups == 1:
        return [tensor] * groups
    return list(tensor.chunk(groups, dim))


def _seeds(seed: Tensor | None, groups: int) -> list[Any]:
    """A seed for every group, so that their noise differs; the first has the one that was given."""
    return [seed if seed is None or group == 0 else seed + group for group in range(groups)]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def draw_seed(device: torch.device | str) -> Tensor:
    """A fresh 63-bit seed on ``device``, from torch's default generator of that device: int64 ``[1]``.

    ``torch.manual_seed``, CUDA graphs and activation checkpointing govern it as they do dropout.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def input_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which :func:`analog_linear` takes ``x``: its own, except under autocast."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _autocasts(x: Tensor) -> bool:
    """Whether autocast changes the dtype of ``x``, as it would for ``linear``."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def _check_groups(groups: int, size: int, what: str) -> None:
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
    _check_groups(groups, weight.shape[0], "outputs of the weight")
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


def analog_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_range: Tensor | None = None,
    dynamic_input_range: bool = False,
    weight_clip: Tensor | None = None,
    max_input_size: int = -1,
    inp_res: float = -1.0,
    out_noise: float = 0.0,
    out_noise_per_channel: bool = False,
    out_bound: float = 0.0,
    out_bound_per_channel: bool = False,
    out_res: float = -1.0,
    weight_quantization: Kind = "none",
    weight_res: float = 0.0,
    weight_noise: Kind = "none",
    weight_noise_std: float = 0.0,
    range_decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
    training: bool = True,
    seed: Tensor | None = None,
    weight_seed: Tensor | None = None,
    tile_weight: tuple[Tensor, Tensor | None] | None = None,
    save_input: SaveInput = "full",
    groups: int = 1,
    patches: Patches | None = None,
) -> Tensor:
    """``torch.nn.functional.linear`` on analog tiles (SEMANTICS 3 to 6).

    Every default is the ideal device, so that the call then equals ``linear``. Under ``torch.autocast`` inputs and weight
    are cast as ``linear`` casts them; the weight's cast costs nothing extra where the weight is modified anyway.

    Args:
        x: Inputs ``[..., K]``; fp32, bf16, fp16 or fp64, any strides, empty batches too.
        weight: ``[N, K]``, of the dtype of ``x`` except under autocast. Never changed.
        bias: ``[N]`` or None; added digitally, in fp32.
        input_range: ``[S]``, a learned range per slice; its absolute value is used.
        dynamic_input_range: Use each row's largest magnitude per slice instead.
        weight_clip: ``[S, N]``, a learned clip per slice and channel; it replaces the weight's largest magnitude.
        max_input_size: Rows of a tile: ``S = ceil(K / max_input_size)`` slices of nearly equal width; ``<= 0``: one slice.
        inp_res: Input converter: number of steps over ``-r .. r`` (> 1) or its inverse; ``<= 0`` is off. Needs a range.
        out_noise: Output noise, a fraction of ``r * max|w|``, over all slices together; training only. Needs a range.
        out_noise_per_channel: Scale the output noise by each channel's largest weight instead of the slice's.
        out_bound: Output converter's bound as a multiple of ``r * max|w|``; ``<= 0`` is off. Needs a range.
        out_bound_per_channel: Scale the bound by each channel's largest weight instead of the slice's.
        out_res: Output converter: number of steps or its inverse; ``<= 0`` does not round. Needs ``out_bound``.
        weight_quantization: ``"none"``, ``"per_tensor"`` (one scale per slice) or ``"per_channel"``.
        weight_res: Number of weight states or its inverse.
        weight_noise: ``"none"``, ``"per_tensor"`` or ``"per_channel"``; training only.
        weight_noise_std: Weight noise as a fraction of the largest weight.
        range_decay: Pull of a learned range towards 0 where almost nothing clips.
        input_min_percentage: Share of unclipped inputs above which ``range_decay`` acts.
        fast_mode: Give ``input_range`` the plain gradient of a clamp instead of the learned-range rule.
        training: Noise is drawn only in training; converters, bounds and quantization stay on.
        seed: int64 ``[1]`` on the device of ``x``; None draws one (:func:`draw_seed`). The same seed gives the same noise.
        weight_seed: Seed of the weight noise alone, to keep one noise over several calls; default ``seed``.
        tile_weight: What :func:`modified_weight` gave for the same weight and settings, to use it in several calls.
        save_input: What the backward keeps of ``x``: ``"full"`` is ``x`` itself (no copy), ``"int8"`` the converter's integers
            and two flags per element, five eighths of the bytes of bf16 for one more read of ``x``; gradients are the same. It
            needs ``inp_res`` of at most 254 steps.
        groups: Cut inputs and outputs into so many equal parts and multiply each part of the inputs with its own part of the
            weight, ``[N / groups, K]``, on tiles of its own: ``x`` is ``[..., groups * K]``, ``input_range``
            ``[groups * S]`` group by group, and what is per slice elsewhere is per slice of a group. One product is launched
            after the other; a given ``seed`` is that of the first group, and each further one adds 1.
        patches: Multiply the patches of ``x [B, C, *size]`` instead, a convolution: its rows are those of
            :meth:`Patches.unfold`, and ``groups * K`` is ``C * prod(kernel_size)``. The backward keeps ``x`` and takes its
            patches again; with ``"int8"`` it keeps the integers of the patches where they take less memory than ``x``.

    Returns:
        ``[..., N]`` (with ``patches``: ``[B, *places, N]``) in the dtype of ``x`` (under autocast: of autocast). NaN in a row
        of ``x`` gives NaN in that row; NaN in the weight gives NaN in its channels (and, with per-tensor scales, in the
        slice's).

    Raises:
        ValueError: a shape, device, number or combination outside the above; the message names the argument and the remedy.
        TypeError: dtypes that do not fit.
    """
    check_input(x, weight, groups, patches)
    check.tensors(bias=bias, input_range=input_range, weight_clip=weight_clip, seed=seed)
    x = x.to(input_dtype(x))
    check.require(
        not (dynamic_input_range and input_range is not None),
        lambda: (
            "input_range: given together with dynamic_input_range, which finds the range itself; pass one of the two"
        ),
    )
    if not isinstance(max_input_size, int):
        raise TypeError(f"max_input_size: got {max_input_size!r}; an int is needed")
    slices = num_slices(weight.shape[1], max_input_size)
    if input_range is not None:
        check.static_range(input_range, groups * slices)
    check.weight_stage(weight, slices, weight_clip, weight_quantization, weight_res, prefix="weight_")
    check.bias(bias, weight.shape[0])
    check.kind("weight_noise", weight_noise)
    check.non_negative("weight_noise_std", weight_noise_std)
    check.non_negative("out_noise", out_noise)
    check.range_rule(range_decay, input_min_percentage, "range_decay")
    ranged = dynamic_input_range or input_range is not None
    for name, value in (("inp_res", inp_res), ("out_noise", out_noise), ("out_bound", out_bound)):
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
    differentiable = (x, weight, bias, input_range, weight_clip)
    settings = _Settings(
        slices=slices,
        dynamic_range=dynamic_input_range,
        inp_res=inp_res,
        out_noise=out_noise if training else 0.0,
        out_noise_per_channel=out_noise_per_channel,
        out_bound=out_bound,
        out_bound_per_channel=out_bound_per_channel,
        out_res=out_res,
        weight_quantization=weight_quantization,
        weight_res=weight_res,
        weight_noise=weight_noise if training else "none",
        weight_noise_std=weight_noise_std,
        range_decay=range_decay,
        input_min_percentage=input_min_percentage,
        fast_mode=fast_mode,
        save_input=save_input,
        needs_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable),
        patches=patches,
    )
    draws_weight = settings.disturbs_weight and weight_seed is None and tile_weight is None
    if seed is None and (settings.out_noise > 0 or draws_weight):
        seed = draw_seed(x.device)
    places = x.shape[:-1] if patches is None else (x.shape[0], *patches.places(x.shape))
    if patches is None:
        x = x.reshape(-1, x.shape[-1])
    tile, tile_wmax = tile_weight or (None, None)
    operands = zip(
        _parts(x, groups, 1),
        _parts(weight, groups),
        _parts(bias, groups),
        _parts(input_range, groups),
        _parts(weight_clip, groups, 1),
        _seeds(seed, groups),
        _seeds(weight_seed, groups),
        _parts(tile, groups),
        _parts(tile_wmax, groups, 1),
        strict=True,
    )
    y = _joined([_AnalogLinear.apply(*operand, settings) for operand in operands], -1)
    return y.reshape(*places, weight.shape[0])


def _gather(part: Tensor, process_group: Any) -> Tensor:
    """``part`` of every rank, ``[ranks, ...]``; compilers trace the call."""
    everyone = [torch.empty_like(part) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, part.contiguous(), group=process_group)
    return torch.stack(everyone)


def update_input_range(
    x: Tensor,
    input_range: Tensor,
    count: Tensor,
    *,
    max_input_size: int = -1,
    groups: int = 1,
    init_from_data: int = 100,
    init_std_alpha: float = 3.0,
    fast_mode: bool = False,
    x_min: Tensor | None = None,
    x_max: Tensor | None = None,
    act_range_momentum: float = 0.95,
    residual: Tensor | None = None,
    process_group: Any = None,
) -> None:
    """Learn ``input_range`` from the first ``init_from_data`` batches of data, in place (SEMANTICS 7).

    Call it in training before the range is used. Where several forwards come before one backward, give each of them a
    ``input_range.clone()``, as the next update changes the range that the last one's backward needs. All conditions stay on
    the device, and nothing is read once every slice's start-up is over. A forward recomputed in the backward (activation
    checkpointing) changes nothing.

    Args:
        x: Inputs ``[..., groups * K]``; an empty batch changes nothing.
        input_range: ``[groups * S]``, group by group, as are all of those below; changed in place.
        count: Integer ``[groups * S]``, batches seen so far, changed in place.
        max_input_size: Rows of a tile, as in :func:`analog_linear`.
        groups: Equal parts of the inputs with tiles of their own, as in :func:`analog_linear`.
        init_from_data: Number of batches to learn from.
        init_std_alpha: Standard deviations that the range spans on either side.
        fast_mode: Track running extreme values instead of standard deviations.
        x_min: ``[groups * S]``, running smallest value for ``fast_mode``, changed in place.
        x_max: ``[groups * S]``, running largest value for ``fast_mode``, changed in place.
        act_range_momentum: Weight of the old extreme values in ``fast_mode``; -1 keeps all-time extremes.
        residual: ``[groups * S]``, dtype of the range, changed in place: what rounding the range to a narrow dtype drops. Keep
            it from batch to batch where the range is bf16 or fp16, or late batches no longer move it.
        process_group: Ranks whose batches count as one; without it each process counts its own.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.batch("x", x)
    _check_groups(groups, x.shape[-1], "input features")
    x = x.detach().reshape(-1, x.shape[-1])
    parts = _parts(x, groups, 1)
    slices = num_slices(parts[0].shape[1], max_input_size)
    check.static_range(input_range, groups * slices)
    empty = x.shape[0] == 0  # nothing to learn from, but other ranks may be waiting for this one
    with torch.no_grad():
        if fast_mode:
            if x_min is None or x_max is None:
                raise ValueError("x_min, x_max: missing, but fast_mode tracks the extreme values there; pass both")
            if empty:
                extrema = x.new_tensor([[torch.inf], [-torch.inf]], dtype=check.wide_dtype(x)).expand(
                    2, groups * slices
                )
            else:
                extrema = _joined([ops.extrema(part, slices) for part in parts], 1)
            if process_group is not None:
                low, high = _gather(extrema, process_group).unbind(1)
                extrema = torch.stack([low.amin(0), high.amax(0)])
            ops.input_range_update_fast(
                input_range, count, x_min, x_max, extrema, init_from_data=init_from_data, momentum=act_range_momentum
            )
        elif process_group is None and groups == 1:
            if not empty:
                ops.input_range_learn(
                    x,
                    input_range,
                    count,
                    residual,
                    slices,
                    init_from_data=init_from_data,
                    init_std_alpha=init_std_alpha,
                )
        else:
            if empty:
                moments = x.new_zeros(groups * slices, 3, dtype=check.wide_dtype(x))
            else:
                active = _parts(count < init_from_data, groups)
                moments = _joined([ops.moments(part, slices, on) for part, on in zip(parts, active, strict=True)], 0)
            if process_group is not None:
                moments = merge_moments(_gather(moments, process_group))
            residual = torch.zeros_like(input_range) if residual is None else residual
            ops.input_range_update(
                input_range, count, residual, moments, init_from_data=init_from_data, init_std_alpha=init_std_alpha
            )
