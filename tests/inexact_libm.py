"""Elementary functions of torch on the CPU miss the nearest number by one unit in the last place now and then, square roots
included, as those of some mathematical libraries do on some CPUs.

What is replaced are the dispatcher's kernels, so that functions, methods, optimizers and autograd all meet the new ones; NumPy,
and with it Triton's interpreter, keeps its own. Equal numbers still have equal results, and round ones are exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FUNCTIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def misrounded(exact: NDArray, dtype: type[np.floating]) -> NDArray:
    """fp64 ``exact`` rounded to ``dtype``, a quarter of it one unit up or down. What fp32 holds exactly stays."""
    nearest = exact.astype(dtype)
    lot = nearest.astype(np.float64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(61)
    neighbour = np.nextafter(nearest, np.where(lot == 0, np.inf, -np.inf).astype(dtype))
    moves = (lot < 2) & (exact != exact.astype(np.float32)) & np.isfinite(nearest)
    return np.where(moves, neighbour, nearest)


def inexact(function: Callable[[NDArray], NDArray], x: Tensor) -> Tensor:
    """16-bit numbers go through fp32, and integers become floating-point numbers, as in torch."""
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    with np.errstate(all="ignore"):
        y = misrounded(function(x.detach().double().numpy()), np.float64 if dtype == torch.float64 else np.float32)
    return torch.empty_like(x, dtype=dtype).copy_(torch.from_numpy(y))


def install() -> Callable[[], None]:
    """Replace torch's functions; what is returned brings them back."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # that kernels are replaced
        for name, function in FUNCTIONS.items():

            def new(x: Tensor, function: Callable[[NDArray], NDArray] = function) -> Tensor:
                return inexact(function, x)

            library.impl(name, new, "CPU")
            library.impl(f"{name}_", lambda x, new=new: x.copy_(new(x)), "CPU")
            library.impl(f"{name}.out", lambda x, *, out, new=new: out.resize_(x.shape).copy_(new(x)), "CPU")
    return library._destroy
