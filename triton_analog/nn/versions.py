"""How often a tensor has been changed in place: a number on the host, by which caches know what they were made of."""

from __future__ import annotations

from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """Every change in place raises it. Tensors made under ``torch.inference_mode`` count none: theirs is 0."""
    return 0 if tensor.is_inference() else tensor._version
