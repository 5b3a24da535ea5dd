"""Patches of an input as rows of a matrix, and their gradients folded back into one of the input."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_analog.reference import Patches

SIZE = (7, 6, 5)
KERNELS = {  # of every rank: kernel, stride, dilation and padding before and after, dimension by dimension
    "plain": ((3, 2, 2), (1, 1, 1), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "single elements": ((1, 1, 1), (1, 1, 1), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "side by side": ((3, 2, 2), (3, 2, 2), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "with gaps": ((1, 2, 1), (2, 3, 3), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    "dilated": ((3, 3, 2), (1, 2, 1), (2, 1, 3), ((0, 0), (0, 0), (0, 0))),
    "padded": ((3, 4, 2), (2, 1, 1), (1, 1, 1), ((1, 1), (2, 2), (1, 1))),
    "padded unevenly": ((4, 2, 2), (1, 2, 1), (1, 1, 2), ((1, 2), (0, 1), (1, 1))),
    "some dimensions": ((1, 3, 1), (1, 2, 2), (1, 1, 1), ((0, 0), (1, 1), (0, 0))),
}
all_kernels = pytest.mark.parametrize("kernel", KERNELS)
all_ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def patches_of(kernel: str, rank: int) -> Patches:
    sizes, strides, dilations, around = (numbers[:rank] for numbers in KERNELS[kernel])
    return Patches(sizes, strides, dilations, tuple(zeros for pair in reversed(around) for zeros in pair))


def rows_by_torch(patches: Patches, x: Tensor) -> Tensor:
    """A convolution whose every output is one element under the kernel."""
    columns, rank = x.shape[1] * prod(patches.kernel_size), len(patches.kernel_size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    picks = torch.eye(columns, dtype=x.dtype).reshape(columns, x.shape[1], *patches.kernel_size)
    y = convolve(F.pad(x, patches.padding), picks, stride=patches.stride, dilation=patches.dilation)
    return y.movedim(1, -1).reshape(-1, columns)


def inputs(rank: int, batch: int = 2, **kind: Any) -> Tensor:
    return torch.randn(batch, 3, *SIZE[:rank], **{"dtype": torch.float64, **kind})


@all_kernels
@all_ranks
def test_rows_are_what_a_kernel_sees_in_the_order_of_torchs_weights(rank: int, kernel: str) -> None:
    patches, x = patches_of(kernel, rank), inputs(rank)
    assert torch.equal(patches.unfold(x), rows_by_torch(patches, x))
    assert len(patches.unfold(x)) == 2 * prod(patches.places(x.shape))


@all_kernels
@all_ranks
def test_folding_is_the_gradient_of_unfolding(rank: int, kernel: str) -> None:
    patches, x = patches_of(kernel, rank), inputs(rank, requires_grad=True)
    rows = rows_by_torch(patches, x)
    grad = torch.randn_like(rows)
    (expected,) = torch.autograd.grad(rows, x, grad)
    torch.testing.assert_close(patches.fold(grad, x.shape), expected)


@pytest.mark.parametrize("kernel", ["plain", "side by side", "with gaps", "dilated", "padded"])
def test_in_two_dimensions_they_are_torchs_unfold_and_fold(kernel: str) -> None:
    patches, x = patches_of(kernel, 2), inputs(2)
    keywords: dict[str, Any] = {
        "kernel_size": patches.kernel_size,
        "stride": patches.stride,
        "dilation": patches.dilation,
        "padding": patches.padding[::-2],
    }
    columns = F.unfold(x, **keywords)
    assert torch.equal(patches.unfold(x), columns.transpose(1, 2).flatten(0, 1))
    folded = F.fold(columns, x.shape[2:], **keywords)
    torch.testing.assert_close(patches.fold(patches.unfold(x), x.shape), folded)


@pytest.mark.parametrize("layout", ["expanded", "channels last", "every second"])
def test_any_memory_layout_will_do(layout: str) -> None:
    patches, x = patches_of("padded", 2), inputs(2, batch=4)
    if layout == "expanded":
        x = x[:1].expand(4, -1, -1, -1)
    elif layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    else:
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(patches.unfold(x), patches.unfold(x.clone(memory_format=torch.contiguous_format)))
    grad = torch.randn_like(patches.unfold(x))
    assert torch.equal(patches.fold(grad.T.contiguous().T, x.shape), patches.fold(grad, x.shape))


def test_an_empty_batch_has_no_rows() -> None:
    patches, x = patches_of("padded", 2), inputs(2, batch=0)
    rows = patches.unfold(x)
    assert rows.shape == (0, 3 * prod(patches.kernel_size))
    assert patches.fold(rows, x.shape).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_overlapping_gradients_add_up_in_single_precision(dtype: torch.dtype) -> None:
    patches = Patches((16,), (1,), (1,), (15, 15))
    grad = torch.rand(46 * 4, 3 * 16).to(dtype)
    folded = patches.fold(grad, (4, 3, 31))
    assert folded.dtype == dtype
    assert torch.equal(folded, patches.fold(grad.float(), (4, 3, 31)).to(dtype))


def test_integers_have_patches_too() -> None:
    x = torch.arange(2 * 3 * 6, dtype=torch.int8).reshape(2, 3, 6)
    patches = patches_of("padded", 1)
    assert torch.equal(patches.unfold(x), patches.unfold(x.double()).to(torch.int8))


@pytest.mark.parametrize(
    ("shape", "columns", "message"),
    [
        ((2, 3, 7), 18, r"x: got shape \(2, 3, 7\); \[B, 3, \.\.\.\] with 2 more dimensions is needed"),
        ((2, 4, 7, 6), 18, r"x: got shape \(2, 4, 7, 6\); \[B, 3, \.\.\.\]"),
        ((2, 3, 2, 6), 18, r"x: got shape \(2, 3, 2, 6\), which is smaller than a kernel of \(3, 2\).*padding"),
        ((2, 3, 7, 6), 20, r"patches: a kernel of \(3, 2\) has 6 elements per channel, which 20 inputs .* no multiple"),
    ],
    ids=["dimensions", "channels", "size", "weight"],
)
def test_an_input_that_does_not_fit_is_an_error(shape: tuple[int, ...], columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patches_of("plain", 2).check(torch.zeros(shape), columns)
