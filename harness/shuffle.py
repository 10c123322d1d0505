"""The order of the training windows: a keyed permutation that is computed, never stored.

A generalized Feistel cipher (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002): a number below a·b is a
pair (high, low); every round adds a hash of one half to the other, modulo its size, which can be undone, so that the
whole is a permutation. With a = ⌈√N⌉ and b = ⌈N/a⌉ for N windows, a·b exceeds N by less than a; the few results beyond
the last window are enciphered again until they fall inside ("cycle walking"), which keeps it a permutation.
"""

import math

import numpy as np
from numpy.typing import NDArray

_Words = NDArray[np.uint64]

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def window_index(position: NDArray[np.int64], num_windows: int, seed: int) -> NDArray[np.int64]:
    """Return which window stands at each position of the endless stream of `seed`.

    Positions [e · num_windows, (e + 1) · num_windows) are epoch e: every window once, in an order of that epoch's own.
    Only 64-bit integer arithmetic: the same on every machine and numpy version.
    """
    assert num_windows > 0
    assert position.min(initial=0) >= 0
    epoch, start = np.divmod(position.astype(np.uint64).ravel(), np.uint64(num_windows))
    keys = _round_keys(epoch, seed)
    a, b = _sides(num_windows)
    window = _encipher(start, a, b, keys)
    rounds_left = a * b - num_windows
    while (outside := np.flatnonzero(window >= num_windows)).size:
        assert rounds_left > 0, "a permutation passes each of the a·b - N outside numbers once at most"
        rounds_left -= 1
        window[outside] = _encipher(window[outside], a, b, keys[:, outside])
    return window.astype(np.int64).reshape(position.shape)


def _sides(num_windows: int) -> tuple[int, int]:
    a = math.isqrt(num_windows - 1) + 1
    return a, -(-num_windows // a)


def _encipher(number: _Words, a: int, b: int, keys: _Words) -> _Words:
    sizes = np.uint64(a), np.uint64(b)
    halves: list[_Words] = [number // sizes[1], number % sizes[1]]
    for turn, key in enumerate(keys):
        side = turn % 2
        halves[side] = (halves[side] + _hash(halves[1 - side] + key) % sizes[side]) % sizes[side]
    high, low = halves
    return high * sizes[1] + low


def _round_keys(epoch: _Words, seed: int) -> _Words:
    """Return keys of shape (rounds, positions)."""
    stream = _hash(_hash(np.array([seed], np.uint64) + _GOLDEN) + epoch)
    return _hash(stream + np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * _GOLDEN)


def _hash(x: _Words) -> _Words:
    """Mix 64 bits. Source: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
