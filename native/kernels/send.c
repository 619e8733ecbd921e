/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * A record of pages on its way out, see vfu_dev/memory/sending.py: all that is done to
 * its bytes, in one call for each reply.
 */

#include <endian.h>
#include <poll.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "pages.h"

/* sendmsg(2) handles each vector by itself: for smaller ones a copy is cheaper. */
#define MIN_VECTOR_BYTES 2048

/* Vectors of a reply beside those of whole pages: first and last bytes, two parts of pages. */
#define OTHER_VECTORS 4

/* Pages copied between two polls of a file descriptor: 128 KiB, some 7 us. */
#define STEP(size) ((size) >= 128U << 10 ? 1 : (128U << 10) / (size))

/* All members have 64 bits: vfu_dev/memory/sending.py lists them in this order. */
struct record {
    /* The memory: what it holds, and of each page its code and the hash of what was sent. */
    uint8_t *base;
    size_t size;
    size_t page_count;
    uint8_t *codes;
    uint64_t *hashes;
    uint64_t zero_hash;
    uint64_t sent_code; /* of a page that was handed out */
    uint8_t *parts;     /* room for two pages */

    /* Of a memory that a guest may write to, or NULL; then also room for one page. */
    const struct key *key;
    struct fingerprint *fingerprints;
    uint8_t *scratch;

    /*
     * @first_size bytes, then @n pages, then @last_size bytes: the checksum of the first
     * bytes and of the pages' hashes, which lie in @covered one behind the other.
     */
    uint8_t *covered;
    size_t first_size;
    const int64_t *list; /* ascending */
    size_t n;
    size_t last_size;
    uint64_t seed;
    const int64_t *again; /* pages that keep their codes, ascending */
    size_t again_n;

    size_t at;   /* bytes handed out */
    size_t done; /* pages hashed; more is handed out of them than of the others */
    size_t again_at;
    size_t part; /* which of the two was used last */
};

/* What one reply consists of, and room for what has to be copied for it. */
struct reply {
    struct vector *vectors;
    size_t most;
    size_t n;
    uint8_t *pool;
    size_t pool_size;
    size_t pool_used;
};

static size_t
least(size_t one, size_t other)
{
    return one < other ? one : other;
}

/* Whether something can be read there at once. */
static bool
can_read(int fd)
{
    struct pollfd pollfd = { fd, POLLIN, 0 };

    return poll(&pollfd, 1, 0) > 0;
}

static void
refer(struct reply *reply, const uint8_t *data, size_t size)
{
    const uint64_t address = (uintptr_t)data;
    struct vector *next = reply->vectors + reply->n;

    if (reply->n > 0 && next[-1].address + next[-1].size == address) {
        next[-1].size += size;
        return;
    }
    *next = (struct vector) { address, size };
    reply->n++;
}

/* Hand out what will not change: copied to @out, or as a vector. Returns @size. */
static size_t
hand_out(struct record *record, struct reply *reply, uint8_t *out, const uint8_t *data,
         size_t size)
{
    if (out != NULL) {
        memcpy(out, data, size);
    } else if (size > 0) {
        refer(reply, data, size);
    }
    record->at += size;
    return size;
}

static uint64_t *
covered_hashes(const struct record *record)
{
    return (uint64_t *)(record->covered + record->first_size);
}

/*
 * Hash the next @n pages, or copies that are made of them. With @shared somebody else
 * may write to the copies.
 */
static void
take(struct record *record, size_t n, uint8_t *copies, bool shared)
{
    const int64_t *list = record->list + record->done;
    uint64_t *hashes = covered_hashes(record) + record->done;
    const struct job job = {
        .source = { record->base, record->size, list },
        .copies = copies,
        .as_is = shared && record->key == NULL,
        .scratch = shared && record->key != NULL ? record->scratch : NULL,
        .zero_hash = record->zero_hash,
        .hashes = hashes,
        .key = record->key,
        .fingerprints = record->fingerprints,
    };
    size_t i;

    work_on(&job, n);
    for (i = 0; i < n; i++) {
        const int64_t page = list[i];

        record->hashes[page] = hashes[i];
        hashes[i] = htole64(hashes[i]);
        while (record->again_at < record->again_n &&
               record->again[record->again_at] < page) {
            record->again_at++;
        }
        if (record->again_at == record->again_n ||
            record->again[record->again_at] != page) {
            record->codes[page] = (uint8_t)record->sent_code;
        }
    }
    record->done += n;
}

/* Copy the next @n pages to @out until something can be read from @fd; returns how many. */
static size_t
copy_whole(struct record *record, uint8_t *out, size_t n, int fd)
{
    const size_t step = fd < 0 ? n : STEP(record->size);
    size_t copied = 0;

    while (copied < n && (copied == 0 || !can_read(fd))) {
        const size_t count = least(step, n - copied);

        take(record, count, out + copied * record->size, true);
        copied += count;
    }
    return copied;
}

/* Have the reply refer to the next @n pages, or to copies: of small ones, and of what may change. */
static void
refer_whole(struct record *record, struct reply *reply, size_t n)
{
    const int64_t *list = record->list + record->done;
    const size_t size = record->size;
    size_t i, runs = n > 0;

    for (i = 1; i < n; i++) {
        runs += list[i] != list[i - 1] + 1;
    }
    if (record->key != NULL || runs * MIN_VECTOR_BYTES > n * size) {
        uint8_t *copies = reply->pool + reply->pool_used;

        take(record, n, copies, false);
        refer(reply, copies, n * size);
        reply->pool_used += n * size;
        return;
    }
    take(record, n, NULL, false);
    for (i = 0; i < n; i++) {
        refer(reply, record->base + (size_t)list[i] * size, size);
    }
}

/*
 * Begin the record of the @n pages that @list names: @header and their numbers, of 32
 * bits, come first. @covered has room for those, the hashes and the checksum.
 *
 * Returns 0, or -1 if a page is not there; the record before is left as it was then.
 */
EXPORT int
vfu_begin_record(struct record *record, const uint8_t *header, size_t header_size,
                 uint8_t *covered, const int64_t *list, size_t n, uint64_t seed)
{
    uint8_t *numbers = covered + header_size;
    size_t i;

    if (!are_there(list, n, record->page_count)) {
        return -1;
    }
    memcpy(covered, header, header_size);
    for (i = 0; i < n; i++) {
        const uint32_t number = htole32((uint32_t)list[i]);

        memcpy(numbers + i * sizeof(number), &number, sizeof(number));
    }
    record->covered = covered;
    record->first_size = header_size + n * sizeof(uint32_t);
    record->list = list;
    record->n = n;
    record->last_size = sizeof(uint64_t);
    record->seed = seed;
    record->again_n = record->again_at = 0;
    record->at = record->done = 0;
    return 0;
}

/*
 * Hand out the next bytes of the record, @room at most: as vectors of the reply, or
 * copied to @out, where somebody else may write to them. With @fd, end early when
 * something can be read there.
 *
 * A page is hashed and noted as sent when its first byte is handed out. Of one that is
 * split the rest is kept.
 *
 * Returns how many bytes that were: less than @room and than what is left with @fd
 * alone, and 0 if the reply has no room for what @room bytes may need.
 */
EXPORT size_t
vfu_send(struct record *record, struct reply *reply, uint8_t *out, size_t room, int fd)
{
    const size_t size = record->size, pages_end = record->first_size + record->n * size;
    const size_t covered_size = record->first_size + record->n * sizeof(uint64_t);
    uint8_t *checksum = record->covered + covered_size;
    size_t in_page, whole, sent = 0;

    if (out == NULL && (reply->most - reply->n < room / MIN_VECTOR_BYTES + OTHER_VECTORS ||
                        reply->pool_size - reply->pool_used < room)) {
        return 0;
    }
#define NEXT(data, size) \
    (sent += hand_out(record, reply, out == NULL ? NULL : out + sent, data, size))
    if (record->at < record->first_size) {
        NEXT(record->covered + record->at, least(room, record->first_size - record->at));
    }
    if (record->at >= record->first_size && record->at < pages_end) {
        in_page = (record->at - record->first_size) % size;
        if (in_page > 0) {
            NEXT(record->parts + record->part * size + in_page,
                 least(room - sent, size - in_page));
        }
        whole = least(record->n - record->done, (room - sent) / size);
        if (whole > 0) {
            size_t copied = whole;

            if (out != NULL) {
                copied = copy_whole(record, out + sent, whole, fd);
            } else {
                refer_whole(record, reply, whole);
            }
            record->at += copied * size;
            sent += copied * size;
            if (copied < whole) {
                return sent;
            }
        }
        if (record->done < record->n && sent < room) {
            uint8_t *part = record->parts + (record->part ^= 1) * size;

            take(record, 1, part, false);
            NEXT(part, room - sent);
        }
    }
    if (record->at >= pages_end && sent < room && record->last_size > 0) {
        if (record->at == pages_end) {
            const uint64_t found = htole64(
                XXH3_64bits_withSeed(record->covered, covered_size, record->seed));

            memcpy(checksum, &found, sizeof(found));
        }
        NEXT(checksum + (record->at - pages_end),
             least(room - sent, pages_end + record->last_size - record->at));
    }
#undef NEXT
    return sent;
}
