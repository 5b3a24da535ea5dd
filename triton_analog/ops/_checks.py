"""What every operation checks before it runs: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triton_analog.hints import did_you_mean
from triton_analog.reference.adc import mask_shape
from triton_analog.reference.grid import MAX_STEPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("none", "per_tensor", "per_channel")


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raise ``ValueError(message())`` unless ``condition``.

    A message is only made when it is needed: a compiler that traced one would make constants of the sizes in it.
    """
    if not condition:
        raise ValueError(message())


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def tensors(**given: object) -> None:
    """All that were given are tensors."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; a torch.Tensor is needed")


def floating(name: str, x: Tensor) -> None:
    """``x`` is a tensor of one of the dtypes that the operations compute in."""
    tensors(**{name: x})
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {x.dtype}; allowed are float32, bfloat16, float16 and float64")


def batch(name: str, x: Tensor) -> None:
    """``x`` is a floating-point tensor ``[..., K]``."""
    floating(name, x)
    require(x.ndim >= 1, lambda: f"{name}: a single number was given; an input of shape [..., K] is needed")


def matrix(name: str, x: Tensor, columns: int | None = None, integers: bool = False) -> None:
    """``x`` is a floating-point matrix (with ``columns`` columns), or an int8 one if ``integers`` are allowed."""
    if not (integers and isinstance(x, Tensor) and x.dtype == torch.int8):
        floating(name, x)
    require(
        x.ndim == 2,
        lambda: f"{name}: got shape {shape_of(x)}; a matrix is needed, flatten leading dimensions with reshape",
    )
    if columns is not None:
        require(x.shape[1] == columns, lambda: f"{name}: got shape {shape_of(x)}; {columns} columns are needed")


def together(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """All ``others`` are tensors on the device of ``reference``."""
    tensors(**others)
    for name, other in others.items():
        if other is not None and other.device != reference.device:
            raise ValueError(
                f"{name}: on {other.device}, but {reference_name} is on {reference.device}; move both to one device"
            )


def same_dtype(reference_name: str, reference: Tensor, **others: Tensor) -> None:
    """All ``others`` have the dtype of ``reference``."""
    for name, other in others.items():
        if other.dtype != reference.dtype:
            raise TypeError(
                f"{name}: dtype {other.dtype}, but {reference_name} is {reference.dtype}; cast one of them "
                "(or use torch.autocast with functional.analog_linear)"
            )


def slice_count(features: int, slices: int) -> None:
    require(
        1 <= slices <= features,
        lambda: f"slices: got {slices} for {features} input features; allowed are 1 to the number of features",
    )


def static_range(input_range: Tensor, slices: int) -> None:
    require(
        shape_of(input_range) == (slices,),
        lambda: f"input_range: got shape {shape_of(input_range)}; one range per slice is needed, ({slices},)",
    )


def range_kind(input_range: Tensor | None, slices: int, rows: int) -> None:
    """None, static ``[S]`` or dynamic ``[S, M]``."""
    if input_range is None or (input_range.ndim == 2 and shape_of(input_range) == (slices, rows)):
        return
    require(
        shape_of(input_range) == (slices,),
        lambda: (
            f"input_range: got shape {shape_of(input_range)}; allowed are ({slices},) for a static range and "
            f"({slices}, {rows}) for a dynamic one"
        ),
    )


def resolution(name: str, res: float) -> None:
    """A number of steps, its inverse, or ``<= 0`` for off."""
    ok = is_finite(res) and (res <= 0 or 2 <= max(res, 1 / res) <= MAX_STEPS)
    require(ok, lambda: f"{name}: got {res}; allowed are 2 to 2**22 steps, the inverse of that, or <= 0 for off")


def is_finite(value: float) -> bool:
    """``math.isfinite``, for numbers that a compiler treats as variables too."""
    return abs(value) < float("inf")


def non_negative(name: str, value: float) -> None:
    require(is_finite(value) and value >= 0, lambda: f"{name}: got {value}; allowed is a finite number >= 0 (0 is off)")


def kind(name: str, value: str) -> None:
    require(
        value in KINDS,
        lambda: (
            f"{name}: got {value!r}; allowed are {', '.join(map(repr, KINDS))}{did_you_mean(str(value), KINDS, '', lead='; ')}"
        ),
    )


def seed_given(seed: Tensor | None, needed: bool, what: str, may_be_placed: bool = True) -> None:
    """``seed`` is one int64 number, or with its place (SEMANTICS 9) four; there if noise is drawn."""
    if seed is None:
        require(not needed, lambda: f"seed: missing, but {what} draws noise; pass an int64 tensor with one element")
        return
    is_seed = seed.numel() == 1 or (may_be_placed and shape_of(seed) == (4,))
    if seed.dtype != torch.int64 or not is_seed:
        also = ", or the four of triton_analog.seeds.placed," if may_be_placed else ""
        raise TypeError(
            f"seed: got {seed.dtype} of shape {shape_of(seed)}; an int64 tensor with one element{also} is needed"
        )


def output_stage(
    input_range: Tensor | None,
    out_noise: float,
    noise_wmax: Tensor | None,
    out_bound: float,
    bound_wmax: Tensor | None,
    out_res: float,
    seed: Tensor | None,
) -> None:
    """Output noise and ADC have what they need."""
    non_negative("out_noise", out_noise)
    require(is_finite(out_bound), lambda: f"out_bound: got {out_bound}; allowed is a finite number (<= 0 is off)")
    resolution("out_res", out_res)
    require(
        out_res <= 0 or out_bound > 0,
        lambda: (
            f"out_res: got {out_res} with out_bound {out_bound}; the ADC's grid spans its bound, so set out_bound > 0"
        ),
    )
    require(
        input_range is not None or (out_noise == 0 and out_bound <= 0),
        lambda: "input_range: missing, but output noise and bound are scaled by it; pass a range or switch both off",
    )
    require(out_noise == 0 or noise_wmax is not None, lambda: "noise_wmax: missing, but out_noise is scaled by it")
    require(out_bound <= 0 or bound_wmax is not None, lambda: "bound_wmax: missing, but out_bound is scaled by it")
    seed_given(seed, out_noise > 0, "out_noise > 0")


def bias(bias: Tensor | None, columns: int) -> None:
    if bias is not None:
        floating("bias", bias)
        require(shape_of(bias) == (columns,), lambda: f"bias: got shape {shape_of(bias)}; ({columns},) is needed")


def weight_stage(
    weight: Tensor, slices: int, clip: Tensor | None, quantization: str, res: float, prefix: str = ""
) -> None:
    """Clip and quantization of a weight have what they need; ``prefix`` completes the caller's names of them."""
    matrix("weight", weight)
    slice_count(weight.shape[1], slices)
    kind(f"{prefix}quantization", quantization)
    resolution(f"{prefix}res", res)
    require(
        quantization == "none" or res > 0,
        lambda: (
            f"{prefix}res: got {res} with {prefix}quantization {quantization!r}; give a number of states or its inverse, "
            "or choose 'none'"
        ),
    )
    if clip is None:
        return
    together("weight", weight, **{f"{prefix}clip": clip})
    expected = (slices, weight.shape[0])
    require(
        shape_of(clip) == expected,
        lambda: f"{prefix}clip: got shape {shape_of(clip)}; one value per slice and channel, {expected}, is needed",
    )
    require(
        quantization != "per_tensor",
        lambda: (
            f"{prefix}quantization: 'per_tensor' with a learned clip, which is per channel; use 'per_channel' or 'none'"
        ),
    )


def wmax_shape(name: str, wmax: Tensor | None, slices: int, rows: int) -> None:
    if wmax is not None:
        require(
            shape_of(wmax) in ((slices, rows), (slices, 1)),
            lambda: f"{name}: got shape {shape_of(wmax)}; allowed are ({slices}, {rows}) and ({slices}, 1)",
        )


def slice_wmax(slice_wmax: Tensor | None, slices: int, weight: Tensor) -> None:
    """One number per slice, in the dtype of the statistics of ``weight``."""
    if slice_wmax is not None:
        require(
            shape_of(slice_wmax) == (slices, 1) and slice_wmax.dtype == wide_dtype(weight),
            lambda: (
                f"slice_wmax: got {slice_wmax.dtype} of shape {shape_of(slice_wmax)}; {wide_dtype(weight)} of shape "
                f"({slices}, 1) is needed"
            ),
        )


def range_rule(decay: float, input_min_percentage: float, decay_name: str = "decay") -> None:
    """The numbers of the learned range's gradient."""
    non_negative(decay_name, decay)
    require(
        0 <= input_min_percentage <= 1,
        lambda: f"input_min_percentage: got {input_min_percentage}; allowed is a share in 0 .. 1",
    )


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics of ``x``: fp64 for fp64, otherwise fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def product_operands(x: Tensor, weight: Tensor, slices: int) -> None:
    """Operands of a matrix product ``x [M, K] @ weight [N, K]^T``; either may be int8."""
    matrix("x", x, integers=True)
    matrix("weight", weight, columns=x.shape[1], integers=True)
    slice_count(x.shape[1], slices)
    together("x", x, weight=weight)


def int8_weight(weight: Tensor, weight_wmax: Tensor | None, weight_res: float, slices: int, inp_res: float) -> None:
    """An int8 ``weight`` holds steps of a known size and meets int8 inputs."""
    require(weight_wmax is not None, lambda: "weight_wmax: missing, but an int8 weight is in steps of weight_wmax / Q")
    wmax_shape("weight_wmax", weight_wmax, slices, weight.shape[0])
    int8_steps("weight_res", weight_res)
    int8_steps("inp_res", inp_res)


def int8_steps(name: str, res: float) -> None:
    """A resolution whose numbers of steps fit int8."""
    resolution(name, res)
    require(
        res > 0 and max(res, 1 / res) <= 254,
        lambda: f"{name}: got {res}; int8 holds at most 254 steps, so 2 to 254 or the inverse of that are allowed",
    )


def clip_bits(x: Tensor, clipped: Tensor | None) -> None:
    """The flags that :func:`triton_analog.ops.dac_steps` keeps beside an int8 input."""
    if x.dtype != torch.int8:
        return
    expected = (2, x.shape[0], -(-x.shape[1] // 8))
    require(
        clipped is not None and clipped.dtype == torch.uint8 and shape_of(clipped) == expected,
        lambda: (
            f"clipped: got {None if clipped is None else shape_of(clipped)}; an int8 x with a range needs the uint8 flags "
            f"{expected} of dac_steps"
        ),
    )
    together("x", x, clipped=clipped)


def product_grad(grad: Tensor, x: Tensor, columns: int, slices: int, mask: Tensor | None) -> None:
    """Gradient ``[M, N]`` of a product, and its saturation mask or the gradients ``[S, M, N]`` that it lets pass."""
    matrix("grad", grad, columns=columns)
    rows = x.shape[0]
    require(grad.shape[0] == rows, lambda: f"grad: got shape {shape_of(grad)}; {rows} rows are needed, as x has")
    together("x", x, grad=grad)
    if x.dtype != torch.int8:
        same_dtype("x", x, grad=grad)
    if mask is not None and mask.is_floating_point():  # what it lets pass
        require(
            shape_of(mask) == (slices, rows, columns),
            lambda: f"mask: got gradients of shape {shape_of(mask)}; {(slices, rows, columns)} is needed",
        )
        same_dtype("grad", grad, mask=mask)
    elif mask is not None:
        saturation_mask(mask, mask_shape(slices, rows, columns))
    together("x", x, mask=mask)


def saturation_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    require(
        mask.dtype == torch.int32 and shape_of(mask) == shape and mask.is_contiguous(),
        lambda: (
            f"mask: got {mask.dtype} of shape {shape_of(mask)}; a contiguous int32 tensor of shape {shape} is needed"
        ),
    )


def input_converter(inp_res: float, input_range: Tensor | None, x: Tensor) -> None:
    """The input converter has a range to span, and its integers do not overflow the dtype they are multiplied in."""
    resolution("inp_res", inp_res)
    require(
        inp_res <= 0 or input_range is not None,
        lambda: f"inp_res: got {inp_res} without input_range; the converter's grid spans the range, so pass one",
    )
    if x.dtype == torch.float16 and inp_res > 0:
        require(
            max(inp_res, 1 / inp_res) <= 2**16,
            lambda: (
                f"inp_res: {max(inp_res, 1 / inp_res):g} steps overflow float16; use at most 2**16 steps, bfloat16 or float32"
            ),
        )


def random_input(
    inp_noise: float, inp_sto_round: bool, inp_res: float, input_range: Tensor | None, seed: Tensor | None
) -> None:
    """Input noise and stochastic rounding have what they need."""
    non_negative("inp_noise", inp_noise)
    require(
        inp_noise == 0 or input_range is not None,
        lambda: f"inp_noise: got {inp_noise} without input_range, which scales it; pass a range or 0",
    )
    require(
        not inp_sto_round or inp_res > 0,
        lambda: (
            f"inp_sto_round: True, but inp_res is {inp_res} and nothing is rounded; give the converter's resolution"
        ),
    )
    what = "inp_noise > 0" if inp_noise > 0 else "inp_sto_round"
    seed_given(seed, inp_noise > 0 or inp_sto_round, what)
