"""The normal field: a function of the seed and the element, never of a launch (SEMANTICS 9)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WEIGHT_STREAM, OUTPUT_STREAM, USER_STREAM = 0, 1, 2

_COUNTERS_PER_CHUNK = 16_384  # keeps the working set in the cache of one core


def philox(seed: int, c0: NDArray, c1: NDArray, c2: NDArray, c3: NDArray) -> tuple[NDArray, ...]:
    """Philox-4x32-10 (Salmon et al. 2011): four uint32 words per counter, held in uint64 arrays that broadcast."""
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def box_muller(w0: NDArray, w1: NDArray) -> tuple[NDArray, NDArray]:
    """Two standard normals from two 32-bit words: radius (at most 6.77) from the first, angle from the second.

    The top bit of ``w1`` is a sign, the next swaps the axes, the other thirty are the angle within a quarter turn: the
    same distribution as an angle from all 32 bits, and kernels need no range reduction for it.
    """
    w1 = w1.astype(np.uint32)
    u = w0.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    radius = np.sqrt(np.float32(-2) * np.log(u))
    angle = (w1 << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(2.0**-33 * np.pi)
    # On the bits of the numbers: selecting by a random condition costs more than all of the above.
    a = (radius * np.cos(angle)).view(np.uint32) ^ (w1 & np.uint32(1 << 31))
    b = (radius * np.sin(angle)).view(np.uint32)
    swap = (a ^ b) & (np.uint32(0) - (w1 >> np.uint32(30) & np.uint32(1)))
    return (a ^ swap).view(np.float32), (b ^ swap).view(np.float32)


def noise(seed: Tensor, rows: int, cols: int, *, stream: int = USER_STREAM, plane: int = 0) -> Tensor:
    """Standard normals ``[rows, cols]`` in fp32.

    One counter ``(4 * (n // 16) + n % 8 // 2, m, plane, stream)`` serves the four columns of row ``m`` that one thread
    of a tensor core's accumulator holds: lane ``2 * (n // 8 % 2) + n % 2``.
    """
    groups = -(-cols // 16)
    out = np.empty((rows, groups, 2, 4, 2), dtype=np.float32)  # column n = 16 * group + 8 * high + 2 * pair + low
    key = int(seed)
    column = np.arange(4 * groups, dtype=np.uint64)[None, :]
    c2, c3 = np.uint64(plane), np.uint64(stream)
    chunk = max(1, _COUNTERS_PER_CHUNK // max(1, 4 * groups))
    for start in range(0, rows, chunk):
        row = np.arange(start, min(start + chunk, rows), dtype=np.uint64)[:, None]
        words = philox(key, column, row, c2, c3)
        for high in range(2):
            for low, z in enumerate(box_muller(words[2 * high], words[2 * high + 1])):
                out[start : start + len(row), :, high, :, low] = z.reshape(len(row), groups, 4)
    return torch.from_numpy(out.reshape(rows, 16 * groups)[:, :cols]).contiguous().to(seed.device)
