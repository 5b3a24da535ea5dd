"""The normal field: a function of the seed and the element, never of a launch (SEMANTICS 9)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WEIGHT_STREAM, OUTPUT_STREAM, USER_STREAM = 0, 1, 2

_COUNTERS_PER_CHUNK = 32_768
"""Few enough for the cache of one core, enough to make the cost of a call small. Threads gain nothing: they queue for the
interpreter's lock between the calls, and share their cores with the threads that torch keeps spinning."""

# Little-endian on every machine: a product's upper half is then its second 32-bit word.
_WORD, _HALF = np.dtype("<u8"), np.dtype("<u4")
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=_WORD)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=_WORD)
_LOW, _UP = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(seed: int, c0: NDArray, c1: NDArray, c2: NDArray, c3: NDArray) -> tuple[NDArray, NDArray]:
    """Philox-4x32-10 (Salmon et al. 2011): the words ``w0, w2`` and ``w1, w3`` of every counter, each ``[2, ...]`` uint32.

    The counters' words are uint64 arrays of 32-bit numbers, which broadcast.
    """
    first = np.array([[seed & 0xFFFFFFFF], [seed >> 32 & 0xFFFFFFFF]], dtype=_WORD)
    keys = [(first + np.uint64(i) * _WEYL) & _LOW for i in range(10)]
    shape = np.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    for k0, k1 in keys[:2]:  # before rows and columns mix
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> _UP) ^ c1 ^ k0, b & _LOW, (a >> _UP) ^ (c3 ^ k1), a & _LOW
    words = np.empty((2, 2, *shape), dtype=_WORD)
    words[0, 0], words[0, 1], words[1, 0], words[1, 1] = c0, c2, c1, c3
    even, odd = words.reshape(2, 2, -1)
    for i in range(2, 10):  # the same in place, in as few passes as there can be
        even *= _MULTIPLIERS
        product = even[::-1]  # that of c2 makes c0 and c1, that of c0 makes c2 and c3
        if i % 2 == 0:  # one pass for two keys: this round uses the upper half, the next the lower
            product ^= (keys[i] << _UP) | keys[i + 1]
        odd.view(_HALF)[:, :-1] ^= product.view(_HALF)[:, 1:]  # upper halves onto lower ones
        odd &= _LOW
        even, odd = odd, product
    return even.astype(np.uint32).reshape(2, *shape), odd.astype(np.uint32).reshape(2, *shape)


def box_muller(w0: NDArray, w1: NDArray) -> tuple[NDArray, NDArray]:
    """Two standard normals from two 32-bit words: radius (at most 6.77) from the first, angle from the second.

    The top bit of ``w1`` is a sign, the next swaps the axes, the other thirty are the angle within a quarter turn: the
    same distribution as an angle from all 32 bits, and kernels need no range reduction for it.
    """
    radius = w0.astype(np.float32)
    radius *= np.float32(2.0**-32)
    radius += np.float32(2.0**-33)
    np.log(radius, out=radius)
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle = (w1 << np.uint32(2)).view(np.int32).astype(np.float32)
    angle *= np.float32(2.0**-33 * np.pi)
    cosine, sine = np.cos(angle), np.sin(angle, out=angle)
    cosine *= radius
    sine *= radius
    # On the bits of the numbers: selecting by a random condition costs more than all of the above.
    a, b = cosine.view(np.uint32), sine.view(np.uint32)
    a ^= w1 & np.uint32(1 << 31)
    swap = ((w1 << np.uint32(1)).view(np.int32) >> np.int32(31)).view(np.uint32)  # the second bit, 32 times
    swap &= a ^ b
    a ^= swap
    b ^= swap
    return cosine, sine


def noise(seed: Tensor, rows: int, cols: int, *, stream: int = USER_STREAM, plane: int = 0) -> Tensor:
    """Standard normals ``[rows, cols]`` in fp32.

    One counter ``(4 * (n // 16) + n % 8 // 2, m, plane, stream)`` serves the four columns of row ``m`` that one thread
    of a tensor core's accumulator holds: lane ``2 * (n // 8 % 2) + n % 2``.
    """
    groups = -(-cols // 16)
    out = np.empty((rows, groups, 2, 4, 2), dtype=np.float32)  # column n = 16 * group + 8 * high + 2 * pair + low
    key = int(seed)
    column = np.arange(4 * groups, dtype=_WORD)[None, :]
    c2, c3 = np.array([plane], dtype=_WORD), np.array([stream], dtype=_WORD)
    run = np.dtype("V32")  # the eight columns of a half group in one piece
    chunk = max(1, _COUNTERS_PER_CHUNK // max(1, column.size))
    for start in range(0, rows, chunk):
        part = out[start : start + chunk]
        row = np.arange(start, start + len(part), dtype=_WORD)[:, None]
        normals = np.empty((2, len(part), groups, 4, 2), dtype=np.float32)
        for low, z in enumerate(box_muller(*philox(key, column, row, c2, c3))):
            normals[..., low] = z.reshape(normals.shape[:-1])
        part.reshape(-1, 16).view(run)[:] = normals.reshape(2, -1, 8).view(run)[..., 0].T
    return torch.from_numpy(out.reshape(rows, 16 * groups)[:, :cols]).contiguous().to(seed.device)
