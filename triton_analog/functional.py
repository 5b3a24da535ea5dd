"""The operations composed into one analog linear layer, with explicit autograd.

The forward keeps the input, the stored weight, the ranges, the seed and, with an output converter, one bit per product and
slice. The backward rebuilds the noisy weight from its seed. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triton_analog import ops
from triton_analog.ops import _checks as check
from triton_analog.reference import merge_moments, num_slices

Kind = Literal["none", "per_tensor", "per_channel"]


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

    @property
    def scales_outputs(self) -> bool:
        return self.out_noise > 0 or self.out_bound > 0

    @property
    def changes_weight(self) -> bool:
        return self.weight_quantization != "none" or (self.weight_noise != "none" and self.weight_noise_std > 0)


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
        settings: _Settings,
    ) -> Tensor:
        tile_weight, wmax = _modified_weight(weight, clip, seed, x.dtype, settings)
        noise_wmax = bound_wmax = None
        if settings.scales_outputs:
            wmax = ops.absmax(weight, settings.slices) if wmax is None else wmax
            wmax_slice = wmax.amax(1, keepdim=True)
            noise_wmax = wmax if settings.out_noise_per_channel else wmax_slice
            bound_wmax = wmax if settings.out_bound_per_channel else wmax_slice
        if settings.dynamic_range:
            r: Tensor | None = ops.absmax(x, settings.slices)
        else:  # a copy: the next forward may update the range in place before this one's backward
            r = None if input_range is None else input_range.clone()
        y, mask = ops.matmul(
            x,
            tile_weight,
            bias,
            r,
            settings.slices,
            inp_res=settings.inp_res,
            out_noise=settings.out_noise,
            noise_wmax=noise_wmax,
            out_bound=settings.out_bound,
            bound_wmax=bound_wmax,
            out_res=settings.out_res,
            seed=seed,
        )
        ctx.settings = settings
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, r, clip, seed, mask if settings.out_bound > 0 else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r, clip, seed, mask = ctx.saved_tensors
        settings: _Settings = ctx.settings
        needs_x, needs_weight, needs_bias, needs_range, needs_clip, _, _ = ctx.needs_input_grad
        dx = dw = dbias = drange = dclip = None
        if needs_x or needs_range:
            tile_weight, _ = _modified_weight(weight, clip, seed, x.dtype, settings)
            dx, drange = ops.matmul_dgrad(
                grad,
                tile_weight,
                x,
                None if settings.dynamic_range else r,
                settings.slices,
                mask,
                decay=settings.range_decay,
                input_min_percentage=settings.input_min_percentage,
                fast_mode=settings.fast_mode,
            )
            drange = drange.to(r.dtype) if needs_range else None
        if needs_weight or needs_clip:
            dw = ops.matmul_wgrad(grad, x, r, settings.slices, mask, inp_res=settings.inp_res, dtype=weight.dtype)
            if clip is not None:
                dw, dclip = ops.weight_grad(
                    dw,
                    weight,
                    clip,
                    settings.slices,
                    quantization=settings.weight_quantization,
                    res=settings.weight_res,
                )
                dclip = dclip.to(clip.dtype)
        if needs_bias:
            dbias = grad.sum(0, dtype=check.wide_dtype(grad)).to(ctx.bias_dtype)
        return dx, dw, dbias, drange, dclip, None, None


def draw_seed(device: torch.device | str) -> Tensor:
    """A fresh 63-bit seed on ``device``, from torch's default generator of that device: int64 ``[1]``.

    ``torch.manual_seed``, CUDA graphs and activation checkpointing govern it as they do dropout.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast changes the dtype of ``x``, as it would for ``linear``."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def check_input(x: Tensor, weight: Tensor) -> None:
    """``x`` is an input that :func:`analog_linear` can multiply with ``weight``.

    Raises:
        TypeError: it is no floating-point tensor, or of another dtype than ``weight`` outside autocast.
        ValueError: its last dimension or its device differs from the weight's.
    """
    check.batch("x", x)
    check.matrix("weight", weight)
    check.together("x", x, weight=weight)
    check.require(
        x.shape[-1] == weight.shape[1],
        lambda: (
            f"x: got shape {check.shape_of(x)}; its last dimension must be {weight.shape[1]}, the weight's input features"
        ),
    )
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

    Returns:
        ``[..., N]`` in the dtype of ``x`` (under autocast: of autocast). NaN in a row of ``x`` gives NaN in that row; NaN in
        the weight gives NaN in its channels (and, with per-tensor scales, in the slice's).

    Raises:
        ValueError: a shape, device, number or combination outside the above; the message names the argument and the remedy.
        TypeError: dtypes that do not fit.
    """
    check_input(x, weight)
    check.tensors(bias=bias, input_range=input_range, weight_clip=weight_clip, seed=seed)
    if _autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
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
        check.static_range(input_range, slices)
    check.weight_stage(weight, slices, weight_clip, weight_quantization, weight_res, prefix="weight_")
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
    )
    if seed is None and (settings.out_noise > 0 or (settings.weight_noise != "none" and weight_noise_std > 0)):
        seed = draw_seed(x.device)
    y = _AnalogLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, input_range, weight_clip, seed, settings)
    return y.reshape(*x.shape[:-1], weight.shape[0])


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

    Call it in training before the range is used. All conditions stay on the device, and nothing is read once every slice's
    start-up is over. A forward recomputed in the backward (activation checkpointing) changes nothing.

    Args:
        x: Inputs ``[..., K]``; an empty batch changes nothing.
        input_range: ``[S]``, changed in place.
        count: Integer ``[S]``, batches seen so far, changed in place.
        max_input_size: Rows of a tile, as in :func:`analog_linear`.
        init_from_data: Number of batches to learn from.
        init_std_alpha: Standard deviations that the range spans on either side.
        fast_mode: Track running extreme values instead of standard deviations.
        x_min: ``[S]``, running smallest value for ``fast_mode``, changed in place.
        x_max: ``[S]``, running largest value for ``fast_mode``, changed in place.
        act_range_momentum: Weight of the old extreme values in ``fast_mode``; -1 keeps all-time extremes.
        residual: ``[S]``, dtype of the range, changed in place: what rounding the range to a narrow dtype drops. Keep it from
            batch to batch where the range is bf16 or fp16, or late batches no longer move it.
        process_group: Ranks whose batches count as one; without it each process counts its own.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.batch("x", x)
    x = x.detach().reshape(-1, x.shape[-1])
    slices = num_slices(x.shape[1], max_input_size)
    empty = x.shape[0] == 0  # nothing to learn from, but other ranks may be waiting for this one
    with torch.no_grad():
        if fast_mode:
            if x_min is None or x_max is None:
                raise ValueError("x_min, x_max: missing, but fast_mode tracks the extreme values there; pass both")
            if empty:
                extrema = x.new_tensor([[torch.inf], [-torch.inf]], dtype=check.wide_dtype(x)).expand(2, slices)
            else:
                extrema = ops.extrema(x, slices)
            if process_group is not None:
                low, high = _gather(extrema, process_group).unbind(1)
                extrema = torch.stack([low.amin(0), high.amax(0)])
            ops.input_range_update_fast(
                input_range, count, x_min, x_max, extrema, init_from_data=init_from_data, momentum=act_range_momentum
            )
        else:
            if empty:
                moments = x.new_zeros(slices, 3, dtype=check.wide_dtype(x))
            else:
                moments = ops.moments(x, slices, count < init_from_data)
            if process_group is not None:
                moments = merge_moments(_gather(moments, process_group))
            residual = torch.zeros_like(input_range) if residual is None else residual
            ops.input_range_update(
                input_range, count, residual, moments, init_from_data=init_from_data, init_std_alpha=init_std_alpha
            )
