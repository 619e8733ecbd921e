"""Initial content of the reference device's memory: a function of seed and position, verifiable anywhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

MAX_SEED = (1 << 64) - 1

# 256 KiB of words: the five passes over a chunk stay in the L2 cache.
_CHUNK_WORDS = 32 * 1024


def fill_words(words: npt.NDArray[np.uint64], seed: int, first: int = 0) -> None:
    """Set each of `words` to the output of splitmix64 at its position.

    Word i is the finaliser of z = seed + (i + 1) * 0x9E3779B97F4A7C15, all modulo 2**64 (Steele, Lea, Flood:
    Fast splittable pseudorandom number generators, 2014).

    Args:
        words: shape (n,), changed in place.
        first: position of words[0].
    """
    scratch = np.empty(_CHUNK_WORDS, dtype=np.uint64)
    steps = np.arange(1, _CHUNK_WORDS + 1, dtype=np.uint64) * _GOLDEN
    for start in range(0, len(words), _CHUNK_WORDS):
        z = words[start : start + _CHUNK_WORDS]
        shifted = scratch[: len(z)]
        base = (seed + (first + start) * int(_GOLDEN)) & 0xFFFF_FFFF_FFFF_FFFF
        np.add(steps[: len(z)], np.uint64(base), out=z)
        for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
            np.right_shift(z, np.uint64(shift), out=shifted)
            np.bitwise_xor(z, shifted, out=z)
            np.multiply(z, factor, out=z)
        np.right_shift(z, np.uint64(31), out=shifted)
        np.bitwise_xor(z, shifted, out=z)
