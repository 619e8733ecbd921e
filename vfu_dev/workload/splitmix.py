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
