/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* What the files of this library share. */

#ifndef VFU_KERNELS_PAGES_H
#define VFU_KERNELS_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/*
 * Which of two functions this processor is to run, the one that ends in _any or the one
 * in _avx2. On x86-64 their file is compiled twice, the second time with VFU_AVX2.
 */
#if defined(__x86_64__) && !defined(VFU_NO_AVX2)
#define BEST(function) \
    (__builtin_cpu_supports("avx2") ? function##_avx2 : function##_any)
#else
#define BEST(function) function##_any
#endif

/* The Python side has all of these in 64 bits. */
_Static_assert(sizeof(size_t) == 8 && sizeof(void *) == 8, "64-bit processors alone");

/* Pages of @size bytes each: those that @list names, in order, of the memory at @base. */
struct pages {
    uint8_t *base;
    size_t size;
    const int64_t *list;
};

/* An address and a length, as in struct iovec. */
struct vector {
    uint64_t address;
    uint64_t size;
};

/* A page has one fingerprint, or if it is larger than this one for each block. */
#define MAX_BLOCK_BYTES 4096

struct fingerprint {
    uint64_t sums[2];
};

/* The bytes are random; @zeros is the fingerprint that they give a block of zeros. */
struct key {
    struct fingerprint zeros;
    uint8_t bytes[MAX_BLOCK_BYTES + sizeof(uint64_t)];
};

/*
 * What is done to pages: copied from @source to @copies, one behind the other, if those
 * are not NULL, and hashed.
 *
 * The hash is that of the copy, or with @as_is, where somebody else may write to the
 * copy, that of the page. With @scratch somebody else may write to either: a page is
 * copied there, hashed, and copied on. With @key, @fingerprints, which are in the
 * order of the memory that @source is of, get those of what was hashed.
 */
struct job {
    struct pages source;
    uint8_t *copies;
    bool as_is;
    uint8_t *scratch;
    uint64_t zero_hash;
    uint64_t *hashes;
    const struct key *key;
    struct fingerprint *fingerprints;
};

/* Do the job for its first @n pages. */
void
work_on(const struct job *job, size_t n);

/* Whether all of the @n pages that @list names are there, in a memory of @count. */
bool
are_there(const int64_t *list, size_t n, size_t count);

#endif
