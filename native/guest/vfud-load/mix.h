/*
 * splitmix64 (Steele, Lea, Flood 2014): the FILL pattern, stamps and the values that loads write are made of it.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef MIX_H
#define MIX_H

#include <stdint.h>

#define GOLDEN 0x9E3779B97F4A7C15ull

/* The finaliser. */
static inline uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

#endif
