/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * What numpy cannot do to pages in one pass over memory. vfu_dev/memory/kernels.py
 * calls these functions and says what they mean; the tests compare each of them
 * with one in numpy.
 *
 * A page is copied, and hashed right away: it is in the first-level cache then,
 * and memory is touched once.
 *
 * It is compiled twice, see BEST(): of what is in a cache, XXH3 takes 14 us a MiB
 * with AVX2, not 28, and a fingerprint 18, not 41.
 */

#include <string.h>

#include "pages.h"

/*
 * XXH3 prefetches what is that far ahead of where it reads. The processor's own
 * prefetching ends at the page, so this is the way to the page after the next one
 * of the list: 28 us a MiB that is in no cache, not 46 with the distance that XXH3
 * comes with.
 */
static __thread ptrdiff_t prefetch_distance;
#define XXH_PREFETCH_DIST prefetch_distance
#define XXH_INLINE_ALL
#include <xxhash.h>


static uint8_t *
page_at(const struct pages *pages, size_t number)
{
    return pages->base + (size_t)pages->list[number] * pages->size;
}

/* A comparison of pages with their fingerprints, see vfu_changed_pages(). */
struct scan {
    const uint8_t *base;
    size_t size;
    const struct key *key;
    const struct fingerprint *fingerprints;
    const uint8_t *codes;
    uint8_t least;
    int64_t *changed;
    size_t looked;
};

void copy_pages_any(const struct job *job, size_t n);
void copy_pages_avx2(const struct job *job, size_t n);
size_t changed_pages_any(struct scan *scan, size_t first, size_t end);
size_t changed_pages_avx2(struct scan *scan, size_t first, size_t end);

/* As many 64-bit words, or halves of them, as are worked on at once. */
#ifdef VFU_AVX2
#define copy_pages copy_pages_avx2
#define changed_pages changed_pages_avx2
#define LANES_BYTES 32
#else
#define copy_pages copy_pages_any
#define changed_pages changed_pages_any
#define LANES_BYTES 16
#endif
typedef uint64_t words __attribute__((vector_size(LANES_BYTES)));
typedef uint32_t halves __attribute__((vector_size(LANES_BYTES)));

static halves
load(const uint8_t *bytes)
{
    halves found;

    memcpy(&found, bytes, sizeof(found));
    return found;
}

/* Multiply the two halves of each word. */
static words
products(halves pairs)
{
    const words both = (words)pairs;

#if defined(VFU_AVX2)
    return (words)_mm256_mul_epu32((__m256i)both, (__m256i)(both >> 32));
#elif defined(__SSE2__)
    return (words)_mm_mul_epu32((__m128i)both, (__m128i)(both >> 32));
#else
    return (both & UINT32_MAX) * (both >> 32);
#endif
}

static uint64_t
sum(words lanes)
{
    uint64_t total = 0;
    size_t i;

    for (i = 0; i < LANES_BYTES / sizeof(total); i++) {
        total += lanes[i];
    }
    return total;
}

/*
 * The fingerprint of a block, which is that of zeros if the block is: NH of UMAC with
 * words of 32 bits, twice, with the key moved on by two words (Black, Halevi, Krawczyk,
 * Krovetz, Rogaway: UMAC, CRYPTO '99, section 4). Two blocks that differ, whatever they
 * are, have the same one with one key of 2^64. What is @ahead is prefetched.
 */
static struct fingerprint
fingerprint(const uint8_t *block, size_t size, const struct key *key, size_t ahead)
{
    words first = { 0 }, second = { 0 };
    size_t at;

    for (at = 0; at < size; at += LANES_BYTES) {
        const halves data = load(block + at);

        __builtin_prefetch((const void *)((uintptr_t)block + at + ahead));
        first += products(data + load(key->bytes + at));
        second += products(data + load(key->bytes + at + sizeof(uint64_t)));
    }
    return (struct fingerprint) {
        { sum(first) ^ key->zeros.sums[0], sum(second) ^ key->zeros.sums[1] }
    };
}

/* How large the blocks of a page are that have a fingerprint each. */
static size_t
block_bytes(size_t size)
{
    return size < MAX_BLOCK_BYTES ? size : MAX_BLOCK_BYTES;
}

/* Have the start of a page in the cache, as one that is stored to next. */
static void
prefetch_to_write(const uint8_t *page, size_t size)
{
    size_t at;

    for (at = 0; at < size && at < 4096; at += 64) {
        __builtin_prefetch(page + at, 1, 2);
    }
}

void
copy_pages(const struct job *job, size_t n)
{
    const size_t size = job->source.size, block = block_bytes(size);
    size_t i, at;

    for (i = 0; i < n; i++) {
        const size_t ahead = i + 2 < n ? i + 2 : n - 1;
        uint8_t *page = page_at(&job->source, i), *data = page;

        if (job->copies != NULL) {
            uint8_t *target = job->copies + i * size;
            uint8_t *copy = job->scratch != NULL ? job->scratch : target;

            if (copy == target && !job->as_is && i + 1 < n) {
                prefetch_to_write(target + size, size);
            }
            memcpy(copy, page, size);
            data = job->as_is ? page : copy;
        }
        prefetch_distance = (intptr_t)page_at(&job->source, ahead) - (intptr_t)data;
        job->hashes[i] = XXH3_64bits(data, size) ^ job->zero_hash;
        if (job->key != NULL) {
            size_t number = (size_t)(page - job->source.base) / block;

            for (at = 0; at < size; at += block) {
                job->fingerprints[number++] = fingerprint(data + at, block, job->key, 0);
            }
        }
        if (job->scratch != NULL) {
            memcpy(job->copies + i * size, job->scratch, size);
        }
    }
}

/* See vfu_changed_pages(). */
size_t
changed_pages(struct scan *scan, size_t first, size_t end)
{
    const size_t size = scan->size, block = block_bytes(size);
    size_t page, at, found = 0;

    for (page = first; page < end; page++) {
        const uint8_t *live = scan->base + page * size;
        const struct fingerprint *sent = scan->fingerprints + page * (size / block);

        /* A page that nobody wrote must not be read: it would be allocated. */
        if (scan->codes[page] < scan->least) {
            continue;
        }
        scan->looked++;
        for (at = 0; at < size; at += block) {
            /* Two pages ahead, as in copy_pages(). */
            const struct fingerprint now =
                fingerprint(live + at, block, scan->key, (size_t)2 * MAX_BLOCK_BYTES);

            if (memcmp(&now, sent++, sizeof(now)) != 0) {
                scan->changed[found++] = page;
                break;
            }
        }
    }
    return found;
}

#ifndef VFU_AVX2

bool
are_there(const int64_t *list, size_t n, size_t count)
{
    size_t i;

    for (i = 0; i < n; i++) {
        if (list[i] < 0 || (size_t)list[i] >= count) {
            return false;
        }
    }
    return true;
}

void
work_on(const struct job *job, size_t n)
{
    BEST(copy_pages)(job, n);
}

static bool
is_zero(const uint8_t *page, size_t size)
{
    const uint64_t *words = (const uint64_t *)page;
    size_t i, j;

    for (i = 0; i < size / sizeof(*words); i += 8) {
        uint64_t any = 0;

        for (j = 0; j < 8; j++) {
            any |= words[i + j];
        }
        if (any != 0) {
            return false;
        }
    }
    return true;
}

/* Hash the @n pages that @list names where they are; -1 if one is not there. */
EXPORT int
vfu_hash_pages(const uint8_t *base, size_t count, size_t size, const int64_t *list,
               size_t n, uint64_t zero_hash, uint64_t *hashes)
{
    const struct job job = {
        .source = { (uint8_t *)base, size, list },
        .zero_hash = zero_hash,
        .hashes = hashes,
    };

    if (!are_there(list, n, count)) {
        return -1;
    }
    work_on(&job, n);
    return 0;
}

/* Have a new @key say what fingerprint it gives a block of zeros of a page of @size. */
EXPORT void
vfu_prepare_key(struct key *key, size_t size)
{
    static const uint8_t zeros[MAX_BLOCK_BYTES];

    key->zeros = (struct fingerprint) { { 0, 0 } };
    key->zeros = fingerprint(zeros, block_bytes(size), key, 0);
}

/* Say for each of @n pages whether it is all zeros; -1 if one is not there. */
EXPORT int
vfu_zero_pages(const uint8_t *base, size_t count, size_t size,
               const int64_t *list, size_t n, bool *zero)
{
    const struct pages pages = { (uint8_t *)base, size, list };
    size_t i;

    if (!are_there(list, n, count)) {
        return -1;
    }
    for (i = 0; i < n; i++) {
        zero[i] = is_zero(page_at(&pages, i), size);
    }
    return 0;
}

/*
 * Compare the pages from @first to before @end that have a code of at least @least with
 * their @fingerprints. The numbers of those that differ go to @changed.
 *
 * Returns how many differ; *@looked is set to how many were compared.
 */
EXPORT size_t
vfu_changed_pages(const uint8_t *base, size_t size, const struct key *key,
                  const struct fingerprint *fingerprints, const uint8_t *codes,
                  uint8_t least, size_t first, size_t end, int64_t *changed,
                  size_t *looked)
{
    struct scan scan = { base, size, key, fingerprints, codes, least, changed, 0 };
    const size_t found = BEST(changed_pages)(&scan, first, end);

    *looked = scan.looked;
    return found;
}

/* Copy what @n vectors refer to, one behind the other. */
EXPORT void
vfu_join_vectors(const struct vector *vectors, size_t n, uint8_t *out)
{
    size_t i;

    for (i = 0; i < n; i++) {
        memcpy(out, (const void *)(uintptr_t)vectors[i].address,
               vectors[i].size);
        out += vectors[i].size;
    }
}

#endif /* VFU_AVX2 */
