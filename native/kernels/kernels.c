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
 * On x86-64 this file is compiled twice, the second time with VFU_AVX2 and for
 * processors that have it: of what is in a cache, XXH3 takes 14 us a MiB then, not
 * 28, and a fingerprint 18, not 41.
 */

#include <poll.h>
#include <string.h>
#include <sys/types.h>

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
    size_t page = pages->list == NULL ? number : (size_t)pages->list[number];

    return pages->base + page * pages->size;
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

void copy_pages_any(const struct job *job, size_t from, size_t n);
void copy_pages_avx2(const struct job *job, size_t from, size_t n);
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

/* Do the job for its pages from the @from th to before the @n th. */
void
copy_pages(const struct job *job, size_t from, size_t n)
{
    const size_t size = job->source.size, block = block_bytes(size);
    size_t i, at;

    for (i = from; i < n; i++) {
        const size_t ahead = i + 2 < n ? i + 2 : n - 1;
        uint8_t *page = page_at(&job->source, i), *data = page;

        if (job->target.base != NULL) {
            uint8_t *target = page_at(&job->target, i);
            uint8_t *copy = job->scratch != NULL ? job->scratch : target;

            if (copy == target && !job->as_is && i + 1 < n) {
                prefetch_to_write(page_at(&job->target, i + 1), size);
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
            memcpy(page_at(&job->target, i), job->scratch, size);
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

#if defined(__x86_64__) && !defined(VFU_NO_AVX2)
#define BEST(function) \
    (__builtin_cpu_supports("avx2") ? function##_avx2 : function##_any)
#else
#define BEST(function) function##_any
#endif

bool
are_there(const int64_t *list, size_t n, size_t count)
{
    size_t i;

    if (list == NULL) {
        return n <= count;
    }
    for (i = 0; i < n; i++) {
        if (list[i] < 0 || (size_t)list[i] >= count) {
            return false;
        }
    }
    return true;
}

bool
can_read(int fd)
{
    struct pollfd pollfd = { fd, POLLIN, 0 };

    return poll(&pollfd, 1, 0) > 0;
}

void
work_on(const struct job *job, size_t n)
{
    BEST(copy_pages)(job, 0, n);
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

/*
 * Do the job for its first @n pages. With @fd, end early when something can be read
 * there, but not before the first page.
 *
 * Returns how many pages that were, or -1 if a page is not there; nothing was touched
 * then.
 */
static ssize_t
do_job(const struct job *job, size_t n, int fd)
{
    const size_t step = fd < 0 ? n : STEP(job->source.size);
    size_t done = 0;

    if (!are_there(job->source.list, n, job->source.count) ||
        (job->target.base != NULL &&
         !are_there(job->target.list, n, job->target.count))) {
        return -1;
    }
    while (done < n && (done == 0 || !can_read(fd))) {
        const size_t end = n - done < step ? n : done + step;

        BEST(copy_pages)(job, done, end);
        done = end;
    }
    return (ssize_t)done;
}

/*
 * Copy @n pages and hash the copies, or hash them where they are if there is no
 * @to. @zero_hash is that of a page of zeros. What is returned: see do_job().
 */
EXPORT ssize_t
vfu_copy_pages(const uint8_t *from, const int64_t *from_list, size_t from_count,
               uint8_t *to, const int64_t *to_list, size_t to_count,
               size_t size, size_t n, uint64_t zero_hash, uint64_t *hashes)
{
    const struct job job = {
        .source = { (uint8_t *)from, size, from_count, from_list },
        .target = { to, size, to_count, to_list },
        .zero_hash = zero_hash,
        .hashes = hashes,
    };

    return do_job(&job, n, -1);
}

/*
 * Copy @n pages of a memory that a guest may write to, by way of @scratch if others may
 * write to @to; hash the copies, and store their fingerprints among those of the memory.
 */
EXPORT ssize_t
vfu_fingerprint_pages(const uint8_t *from, const int64_t *list, size_t count,
                      uint8_t *to, uint8_t *scratch, size_t size, size_t n,
                      uint64_t zero_hash, uint64_t *hashes, const struct key *key,
                      struct fingerprint *fingerprints, int fd)
{
    const struct job job = {
        .source = { (uint8_t *)from, size, count, list },
        .target = { to, size, n, NULL },
        .scratch = scratch,
        .zero_hash = zero_hash,
        .hashes = hashes,
        .key = key,
        .fingerprints = fingerprints,
    };

    return do_job(&job, n, fd);
}

/* Say for each of @n pages whether it is all zeros; -1 if one is not there. */
EXPORT int
vfu_zero_pages(const uint8_t *base, size_t count, size_t size,
               const int64_t *list, size_t n, bool *zero)
{
    const struct pages pages = { (uint8_t *)base, size, count, list };
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
