"""The columns of a slice, moved 16 bytes at a time even where a slice starts anywhere. Helpers of the kernels beside it."""

import triton
import triton.language as tl

from triton_analog.lang import cast, slice_bounds


@triton.jit
def slice_span(s, K, S, ALIGNED: tl.constexpr):
    """``origin, start, end`` of slice ``s``: its columns are ``start .. end``, and tiles of it begin at ``origin``.

    ``origin`` is the last multiple of 16 that is not past ``start``. ``ALIGNED`` as ``launch.aligned``.
    """
    start, width = slice_bounds(s, K, S, ALIGNED)
    if ALIGNED:
        return start, start, start + width
    return start // 16 * 16, start, start + width


@triton.jit
def column_masks(k, start, end, K, ALIGNED: tl.constexpr):
    """Which of the columns ``k`` to load and which of those belong to the slice.

    The first mask changes only every 16 columns, where the second would force loads of single numbers.
    """
    if ALIGNED:
        return k < end, k < end
    return (k // 16 * 16 < end) & (k < K), (k >= start) & (k < end)


@triton.jit
def load_tile(x_ptr, n, k, stride_n, stride_k, N, loaded):
    """Rows ``n`` and columns ``k`` in fp32; 0 past row ``N`` and where a column is not to be ``loaded``."""
    address = n[:, None] * stride_n + k[None, :].to(tl.int64) * stride_k
    return tl.load(x_ptr + address, mask=(n < N)[:, None] & loaded[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(out_ptr, value, n, k, N, K, start, end, ALIGNED: tl.constexpr):
    """Store rows ``n`` and those of the columns ``k`` that belong to the slice into a contiguous ``out [N, K]``."""
    address = out_ptr + (n[:, None] * K + k[None, :])
    value = cast(value, out_ptr.dtype.element_ty)
    if ALIGNED:
        tl.store(address, value, mask=(n < N)[:, None] & (k < end)[None, :])
    else:  # in groups of eight columns, then what is left of the slice on either side of them
        group = k // 8 * 8
        whole = (n < N)[:, None] & ((group >= start) & (group + 8 <= end))[None, :]
        tl.store(address, value, mask=whole)
        rest = (n < N)[:, None] & ((k >= start) & (k < end))[None, :] & (whole == 0)
        tl.store(address, value, mask=rest)
