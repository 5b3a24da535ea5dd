"""The normal field and the uniform one: a function of the seed and the element, never of a launch (SEMANTICS 9)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WEIGHT_STREAM, OUTPUT_STREAM, USER_STREAM = 0, 1, 2
ROUNDING_STREAM, INPUT_STREAM = 2**30 - 2, 2**30 - 1
ROUNDS = 7

_COUNTERS_PER_CHUNK = 32_768
"""Few enough for the cache of one core, enough to make the cost of a call small. Threads gain nothing: they queue for the
interpreter's lock between the calls, and share their cores with the threads that torch keeps spinning."""

# Little-endian on every machine: a product's upper half is then its second 32-bit word.
_WORD, _HALF = np.dtype("<u8"), np.dtype("<u4")
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=_WORD)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=_WORD)
_LOW, _UP = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(seed: int, c0: NDArray, c1: NDArray, c2: NDArray, c3: NDArray) -> tuple[NDArray, NDArray]:
    """Philox-4x32-7 (Salmon et al. 2011): the words ``w0, w2`` and ``w1, w3`` of every counter, each ``[2, ...]`` uint32.

    The counters' words are uint64 arrays of 32-bit numbers, which broadcast.
    """
    first = np.array([[seed & 0xFFFFFFFF], [seed >> 32 & 0xFFFFFFFF]], dtype=_WORD)
    keys = [(first + np.uint64(i) * _WEYL) & _LOW for i in range(ROUNDS)]
    shape = np.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    for k0, k1 in keys[:3]:  # before all words depend on row and column
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> _UP) ^ (c1 ^ k0), b & _LOW, (a >> _UP) ^ (c3 ^ k1), a & _LOW
    words = np.empty((2, 2, *shape), dtype=_WORD)
    words[0, 0], words[0, 1], words[1, 0], words[1, 1] = c0, c2, c1, c3
    even, odd = words.reshape(2, 2, -1)
    for i in range(3, ROUNDS):  # the same in place, in as few passes as there can be
        even *= _MULTIPLIERS
        product = even[::-1]  # that of c2 makes c0 and c1, that of c0 makes c2 and c3
        if i % 2 == 1:  # one pass for two keys: this round uses the upper half, the next the lower
            product ^= (keys[i] << _UP) | keys[i + 1]
        odd.view(_HALF)[:, :-1] ^= product.view(_HALF)[:, 1:]  # upper halves onto lower ones
        odd &= _LOW
        even, odd = odd, product
    return even.astype(np.uint32).reshape(2, *shape), odd.astype(np.uint32).reshape(2, *shape)


def polar(word: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Radius, cosine and sine of each 32-bit word: the radius (at most 5.27) from its low 20 bits, the angle from its high
    23. Radius times cosine and radius times sine are two standard normals (Box and Muller 1958)."""
    radius = (word & np.uint32(0xFFFFF)).astype(np.float32)
    radius *= np.float32(-(2.0**-20))
    radius += np.float32(1)
    np.log(radius, out=radius)
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle = (word >> np.uint32(9)).astype(np.float32)
    angle *= np.float32(2.0**-22 * np.pi)
    return radius, np.cos(angle), np.sin(angle, out=angle)


def is_placed(seed: Tensor | None) -> bool:
    """Whether ``seed [4]`` also says which part of its field a tensor has: first row, first column, first plane."""
    return seed is not None and seed.numel() > 1


def of_inputs(seed: Tensor) -> Tensor:
    """``seed`` for a field of the inputs, whose columns count from the slice's first one: those of its place are outputs."""
    return seed * seed.new_tensor([1, 1, 0, 1]) if is_placed(seed) else seed


def place_of(seed: Tensor) -> tuple[int, int, int, int]:
    """The seed, and the first row, column and plane of its place."""
    numbers = seed.flatten().tolist()
    return tuple(numbers) if is_placed(seed) else (numbers[0], 0, 0, 0)


def noise(seed: Tensor, rows: int, cols: int, *, stream: int = USER_STREAM, plane: int = 0) -> Tensor:
    """Standard normals ``[rows, cols]`` in fp32.

    One counter ``(8 * (m // 16) + m % 8, 4 * (n // 16) + n % 8 // 2, plane, stream)`` serves the eight elements of 16 rows
    and 16 columns that one thread of a tensor core's accumulator holds: word ``2 * (n // 8 % 2) + n % 2``, its cosine for
    the upper eight rows, its sine for the lower.
    """
    row_groups, column_groups = -(-rows // 16), -(-cols // 16)
    key, first_row, first_column, first_plane = place_of(seed)
    column = first_column // 4 + np.arange(4 * column_groups, dtype=_WORD)[None, :]
    c2, c3 = np.array([first_plane + plane], dtype=_WORD), np.array([stream], dtype=_WORD)
    run = np.dtype("V32")  # the eight columns of a half group in one piece
    out = np.empty(
        (row_groups, 2, 8, column_groups, 2), dtype=run
    )  # m = (group, half, row), n = (group, half, pair, low)
    chunk = max(1, _COUNTERS_PER_CHUNK // max(1, 8 * column.size))
    for start in range(0, row_groups, chunk):
        part = out[start : start + chunk]
        row = first_row // 2 + np.arange(8 * start, 8 * (start + len(part)), dtype=_WORD)[:, None]
        normals = np.empty((2, 2, len(part), 8, column_groups, 4, 2), dtype=np.float32)
        for low, words in enumerate(philox(key, row, column, c2, c3)):
            radius, *directions = (v.reshape(normals.shape[1:-1]) for v in polar(words))
            for half, direction in enumerate(directions):
                np.multiply(radius, direction, out=normals[half, ..., low])
        part[:] = normals.reshape(*normals.shape[:-2], 8).view(run)[..., 0].transpose(2, 0, 3, 4, 1)
    field = torch.from_numpy(out.view(np.float32).reshape(16 * row_groups, 16 * column_groups))
    return field[:rows, :cols].contiguous().to(seed.device)


def uniform(seed: Tensor, rows: int, cols: int, *, stream: int, plane: int = 0) -> Tensor:
    """Numbers between 0 and 1, ``[rows, cols]`` in fp32: the middles of ``2**16`` equal parts.

    Counters and words are those of :func:`noise`; the upper eight rows have the low half of a word, the lower the high one.
    """
    row_groups, column_groups = -(-rows // 16), -(-cols // 16)
    key, first_row, first_column, first_plane = place_of(seed)
    column = first_column // 4 + np.arange(4 * column_groups, dtype=_WORD)[None, :]
    c2, c3 = np.array([first_plane + plane], dtype=_WORD), np.array([stream], dtype=_WORD)
    out = np.empty((row_groups, 2, 8, column_groups, 2, 4, 2), dtype=np.float32)
    chunk = max(1, _COUNTERS_PER_CHUNK // max(1, 8 * column.size))
    for start in range(0, row_groups, chunk):
        part = out[start : start + chunk]
        row = first_row // 2 + np.arange(8 * start, 8 * (start + len(part)), dtype=_WORD)[:, None]
        words = np.stack(philox(key, row, column, c2, c3), -1)
        halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)])
        part[:] = halves.reshape(2, 2, len(part), 8, column_groups, 4, 2).transpose(2, 0, 3, 4, 1, 5, 6)
    out += np.float32(0.5)
    out *= np.float32(2.0**-16)
    field = torch.from_numpy(out.reshape(16 * row_groups, 16 * column_groups))
    return field[:rows, :cols].contiguous().to(seed.device)
