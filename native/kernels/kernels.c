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
 * processors that have it, for which XXH3 of what is in a cache is 15 us a MiB
 * faster.
 */

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

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

#define EXPORT __attribute__((visibility("default")))

/*
 * Pages in a memory of @count pages of @size bytes each.
 *
 * @list names the pages, in order; without it they are the first ones.
 */
struct pages {
    uint8_t *base;
    size_t size;
    size_t count;
    const int64_t *list;
};

static uint8_t *
page_at(const struct pages *pages, size_t number)
{
    size_t page = pages->list == NULL ? number : (size_t)pages->list[number];

    return pages->base + page * pages->size;
}

void
copy_pages_any(const struct pages *source, const struct pages *target, bool as_is,
               size_t from, size_t n, uint64_t zero_hash, uint64_t *hashes);
void
copy_pages_avx2(const struct pages *source, const struct pages *target, bool as_is,
                size_t from, size_t n, uint64_t zero_hash, uint64_t *hashes);

#ifdef VFU_AVX2
#define copy_pages copy_pages_avx2
#else
#define copy_pages copy_pages_any
#endif

/* Have the start of a page in the cache, as one that is stored to next. */
static void
prefetch_to_write(const uint8_t *page, size_t size)
{
    size_t at;

    for (at = 0; at < size && at < 4096; at += 64) {
        __builtin_prefetch(page + at, 1, 2);
    }
}

/*
 * Copy the pages from the @from th to before the @n th and hash the copies, or hash
 * them where they are: without a target, or with @as_is, where somebody else may
 * write to the copies.
 */
void
copy_pages(const struct pages *source, const struct pages *target, bool as_is,
           size_t from, size_t n, uint64_t zero_hash, uint64_t *hashes)
{
    size_t i;

    for (i = from; i < n; i++) {
        const size_t ahead = i + 2 < n ? i + 2 : n - 1;
        const uint8_t *page = page_at(source, i);

        if (target->base != NULL) {
            uint8_t *copy = page_at(target, i);

            if (!as_is && i + 1 < n) {
                prefetch_to_write(page_at(target, i + 1), source->size);
            }
            memcpy(copy, page, source->size);
            page = as_is ? page : copy;
        }
        prefetch_distance = (intptr_t)page_at(source, ahead) - (intptr_t)page;
        hashes[i] = XXH3_64bits(page, source->size) ^ zero_hash;
    }
}

#ifndef VFU_AVX2

/* Whether all of the @n pages that @list names are there. */
static bool
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

/* How many pages are copied between two looks at a file descriptor: 128 KiB, some 7 us. */
#define STEP(size) ((size) >= 128U << 10 ? 1 : (128U << 10) / (size))

static bool
can_read(int fd)
{
    struct pollfd pollfd = { fd, POLLIN, 0 };

    return poll(&pollfd, 1, 0) > 0;
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
 * Copy @n pages and hash the copies, or hash them where they are if there is no
 * @to, or with @as_is. @zero_hash is that of a page of zeros. With @fd, end early
 * when something can be read there.
 *
 * Returns how many pages that were, or -1 if a page is not there; nothing was touched
 * then.
 */
EXPORT ssize_t
vfu_copy_pages(const uint8_t *from, const int64_t *from_list, size_t from_count,
               uint8_t *to, const int64_t *to_list, size_t to_count, bool as_is,
               size_t size, size_t n, uint64_t zero_hash, uint64_t *hashes, int fd)
{
    const struct pages source = { (uint8_t *)from, size, from_count, from_list };
    const struct pages target = { to, size, to_count, to_list };
    const size_t step = fd < 0 ? n : STEP(size);
    size_t done = 0;

    if (!are_there(from_list, n, from_count) ||
        (to != NULL && !are_there(to_list, n, to_count))) {
        return -1;
    }
    while (done < n && (done == 0 || !can_read(fd))) {
        const size_t end = n - done < step ? n : done + step;

#ifdef __x86_64__
        if (__builtin_cpu_supports("avx2")) {
            copy_pages_avx2(&source, &target, as_is, done, end, zero_hash, hashes);
            done = end;
            continue;
        }
#endif
        copy_pages_any(&source, &target, as_is, done, end, zero_hash, hashes);
        done = end;
    }
    return (ssize_t)done;
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
 * Compare the pages from @first to before @end that have a code of at least
 * @least: @live with @sent. The numbers of those that differ go to @changed.
 *
 * Returns how many differ; *@looked is set to how many were compared.
 */
EXPORT size_t
vfu_changed_pages(const uint8_t *live, const uint8_t *sent, size_t size,
                  const uint8_t *codes, uint8_t least, size_t first, size_t end,
                  int64_t *changed, size_t *looked)
{
    size_t page, found = 0;

    *looked = 0;
    for (page = first; page < end; page++) {
        /* A page that nobody wrote must not be read: it would be allocated. */
        if (codes[page] < least) {
            continue;
        }
        (*looked)++;
        if (memcmp(live + page * size, sent + page * size, size) != 0) {
            changed[found++] = page;
        }
    }
    return found;
}

/* An address and a length, as in struct iovec. */
struct vector {
    uint64_t address;
    uint64_t size;
};

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
