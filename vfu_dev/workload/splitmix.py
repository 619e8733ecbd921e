"""Random numbers that need no state: number i of a seed is a function of both, in any order, in any language.

Output i of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014) is the
finaliser of seed + (i + 1) * 0x9E3779B97F4A7C15, all modulo 2**64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# 256 KiB of words: the five passes over a chunk stay in the L2 cache.
_CHUNK_WORDS = 32 * 1024


def finalise(z: Words, scratch: Words) -> None:
    """Replace each of `z` by what splitmix64's finaliser makes of it; `scratch` has the same shape."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        np.right_shift(z, np.uint64(shift), out=scratch)
        np.bitwise_xor(z, scratch, out=z)
        np.multiply(z, factor, out=z)
    np.right_shift(z, np.uint64(31), out=scratch)
    np.bitwise_xor(z, scratch, out=z)


def outputs(seed: int, first: int, count: int, step: int = 1) -> Words:
    """Return the outputs `first`, `first` + `step`, ... of `seed`, shape (count,)."""
    z = np.arange(count, dtype=np.uint64)
    np.multiply(z, np.uint64(step * GOLDEN & _MASK), out=z)
    np.add(z, np.uint64(seed + (first + 1) * GOLDEN & _MASK), out=z)
    finalise(z, np.empty_like(z))
    return z


def below(numbers: Words, bound: int) -> Words:
    """Return each number's upper half scaled to 0 ... bound - 1; `bound` is at most 2**32."""
    return ((numbers >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)


def fractions(numbers: Words) -> npt.NDArray[np.float64]:
    """Return each number's upper 53 bits as a fraction from 0, below 1."""
    scaled: npt.NDArray[np.float64] = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return scaled


def fill_words(words: Words, seed: int, first: int = 0) -> None:
    """Set each of `words` to the output of `seed` at its position: initial content, verifiable anywhere.

    Args:
        words: shape (n,), changed in place.
        first: position of words[0].
    """
    scratch = np.empty(_CHUNK_WORDS, dtype=np.uint64)
    steps = np.arange(1, _CHUNK_WORDS + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    for start in range(0, len(words), _CHUNK_WORDS):
        z = words[start : start + _CHUNK_WORDS]
        np.add(steps[: len(z)], np.uint64((seed + (first + start) * GOLDEN) & _MASK), out=z)
        finalise(z, scratch[: len(z)])
