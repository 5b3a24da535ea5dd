"""Counting the multiply-adds of torch's own operators while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _vectors(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    return _vectors(q) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


_OTHERS: dict[str, Callable[..., int]] = {
    "mv": lambda matrix, *_: matrix.numel(),
    "addmv": lambda _, matrix, *__: matrix.numel(),
    "dot": lambda a, *_: a.numel(),
    "_grouped_mm": lambda a, b, *_: a.numel() * b.shape[-1],
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_: _attention(q, k, v),
    "mkldnn_rnn_layer": lambda x, w_ih, w_hh, *_: _vectors(x) * (w_ih.numel() + w_hh.numel()),
    "_cudnn_rnn": lambda x, weights, *_: _vectors(x) * sum(w.numel() for w in weights if w.ndim > 1),
    "miopen_rnn": lambda x, weights, *_: _vectors(x) * sum(w.numel() for w in weights if w.ndim > 1),
}
"""Multiply-adds of operators that torch has no formula for, of their arguments."""


class CountedProducts(TorchDispatchMode):
    """While it lasts, ``macs`` grows by the multiply-adds of every product: of matrices, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        packets = ((getattr(torch.ops.aten, name, None), formula) for name, formula in _OTHERS.items())
        self._others = {packet: formula for packet, formula in packets if packet is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in self._others:
            with self:  # of what it consists of, if that is other operators
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        if packet in flop_registry:
            self.macs += flop_registry[packet](*args, **kwargs, out_val=result) // 2
        else:
            self.macs += self._others[packet](*args)
        return result
