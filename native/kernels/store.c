/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * Pages that arrive: stored and hashed, with all that is kept about them, in one
 * call for each piece of the stream. vfu_dev/memory/kernels.py (`Arriving`) calls
 * it. It is compiled twice, see BEST().
 */

#include <string.h>
#include <sys/mman.h>

#ifdef VFU_AVX2
#include <immintrin.h>
#endif

/* What XXH3 reads here was read right before. */
#define XXH_NO_PREFETCH
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "pages.h"

/* <asm-generic/mman-common.h> of Linux 5.14 */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* All members have 64 bits: vfu_dev/memory/kernels.py lists them in this order. */
struct arriving {
    /* The memory: without a @base its pages are hashed only. */
    uint8_t *base;
    size_t page_count;
    size_t size; /* of a page */
    size_t os_page;
    /* Which pages come, in order, and how many of them have come. */
    const int64_t *list;
    size_t list_count;
    size_t stored;
    /* Of the pages that have come, in order; and of all pages of the memory. */
    uint64_t *hashes;
    uint64_t *page_hashes;
    uint64_t zero_hash;
    /* Of all pages: the code, and whether what was there before is still there. */
    uint8_t *codes;
    bool *old;
    uint64_t code_never;
    uint64_t code_data;
};

static uint8_t *
target_of(const struct arriving *arriving, size_t number)
{
    return arriving->base + (size_t)arriving->list[number] * arriving->size;
}

void
store_any(const struct arriving *arriving, const uint8_t *data, size_t n);
void
store_avx2(const struct arriving *arriving, const uint8_t *data, size_t n);

#ifdef VFU_AVX2

/* Pages up to this size are hashed in the first-level cache. */
#define STAGE_BYTES 16384U
#define LINE 64U

/*
 * Copy a page to where it belongs, past the caches, and to @stage. Nobody reads it
 * soon where it belongs, and a cache would first read what was there before.
 *
 * Each byte is read once: its sender may still write to it, and what is hashed
 * is what was stored. What comes @ahead bytes later is prefetched: the processor's
 * own prefetching ends at the page.
 */
static void
copy_twice(uint8_t *to, uint8_t *stage, const uint8_t *from, size_t size,
           size_t ahead)
{
    size_t at;

    for (at = 0; at < size; at += LINE) {
        __m256i low = _mm256_loadu_si256((const __m256i *)(from + at));
        __m256i high = _mm256_loadu_si256((const __m256i *)(from + at + LINE / 2));

        __builtin_prefetch(from + ahead + at);
        /* The compiler must not load them again. */
        __asm__ volatile("" : "+x"(low), "+x"(high));
        _mm256_stream_si256((__m256i *)(to + at), low);
        _mm256_stream_si256((__m256i *)(to + at + LINE / 2), high);
        _mm256_store_si256((__m256i *)(stage + at), low);
        _mm256_store_si256((__m256i *)(stage + at + LINE / 2), high);
    }
}

void
store_avx2(const struct arriving *arriving, const uint8_t *data, size_t n)
{
    const size_t size = arriving->size;
    uint64_t *hashes = arriving->hashes + arriving->stored;
    uint8_t stage[STAGE_BYTES] __attribute__((aligned(LINE)));
    size_t i;

    if (arriving->base == NULL || size > STAGE_BYTES || size % LINE != 0 ||
        (uintptr_t)arriving->base % LINE != 0) {
        store_any(arriving, data, n);
        return;
    }
    for (i = 0; i < n; i++) {
        const size_t ahead = i + 2 < n ? 2 : n - 1 - i;

        copy_twice(target_of(arriving, arriving->stored + i), stage,
                   data + i * size, size, ahead * size);
        hashes[i] = XXH3_64bits(stage, size) ^ arriving->zero_hash;
    }
    _mm_sfence();
}

#else /* VFU_AVX2 */

void
store_any(const struct arriving *arriving, const uint8_t *data, size_t n)
{
    const size_t size = arriving->size;
    uint64_t *hashes = arriving->hashes + arriving->stored;
    size_t i;

    for (i = 0; i < n; i++) {
        const uint8_t *page = data + i * size;

        if (arriving->base != NULL) {
            uint8_t *copy = target_of(arriving, arriving->stored + i);

            memcpy(copy, page, size);
            page = copy;
        }
        hashes[i] = XXH3_64bits(page, size) ^ arriving->zero_hash;
    }
}

/*
 * Have the kernel provide the pages that were never written, in as few steps as
 * they have gaps, instead of one fault for each. What it cannot provide faults when
 * it is stored to.
 */
static void
populate(const struct arriving *arriving, size_t n)
{
    const int64_t *list = arriving->list + arriving->stored;
    size_t i = 0;

    while (i < n) {
        uintptr_t begin, end;
        size_t run = 0;

        while (i + run < n && list[i + run] == list[i] + (int64_t)run &&
               arriving->codes[list[i + run]] == arriving->code_never &&
               !arriving->old[list[i + run]]) {
            run++;
        }
        if (run == 0) {
            i++;
            continue;
        }
        begin = (uintptr_t)arriving->base + (size_t)list[i] * arriving->size;
        end = begin + run * arriving->size;
        begin &= ~(arriving->os_page - 1);
        end = (end + arriving->os_page - 1) & ~(arriving->os_page - 1);
        if (end - begin > arriving->os_page) {
            (void)madvise((void *)begin, end - begin, MADV_POPULATE_WRITE);
        }
        i += run;
    }
}

/*
 * Store and hash the next @n pages, which are at @data.
 *
 * Returns 0, or -1 if a page is not there, or not expected; nothing was touched
 * then.
 */
EXPORT int
vfu_store_pages(struct arriving *arriving, const uint8_t *data, size_t n)
{
    const int64_t *list = arriving->list + arriving->stored;
    const uint64_t *hashes = arriving->hashes + arriving->stored;
    size_t i;

    if (n > arriving->list_count - arriving->stored ||
        !are_there(list, n, arriving->page_count)) {
        return -1;
    }
    if (arriving->base != NULL) {
        populate(arriving, n);
    }
    BEST(store)(arriving, data, n);
    for (i = 0; i < n; i++) {
        arriving->page_hashes[list[i]] = hashes[i];
        if (arriving->base != NULL) {
            arriving->codes[list[i]] = (uint8_t)arriving->code_data;
            arriving->old[list[i]] = false;
        }
    }
    arriving->stored += n;
    return 0;
}

#endif /* VFU_AVX2 */
