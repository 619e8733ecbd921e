/*
 * Accesses to regions, timed.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <inttypes.h>
#include <stdio.h>

#include "answer.h"
#include "mmio.h"
#include "wire.h"

/* Odd, so that multiples of it visit every place; the golden ratio of 2^32. */
#define SCATTER     2654435769U

static int64_t *
numbers(size_t count)
{
    int64_t *values = calloc(count, sizeof(*values));

    if (values == NULL) {
        err(EXIT_FAILURE, "%zu results", count);
    }
    return values;
}

struct places
parse_places(const char *text)
{
    struct places places;

    if (sscanf(text, "%" SCNu32 " %" SCNu64 " %" SCNu32 " %" SCNu64 " %" SCNu32,
               &places.index, &places.offset, &places.bytes, &places.stride,
               &places.count) != 5 || places.count == 0 ||
        (places.count & (places.count - 1)) != 0 || places.bytes == 0 ||
        places.bytes > MAX_BYTES) {
        errx(EXIT_FAILURE, "INDEX OFFSET BYTES STRIDE PLACES: %s", text);
    }
    return places;
}

struct region_access
region_access(const struct places *places, bool is_write, uint32_t number)
{
    size_t size = offsetof(struct region_access, data) +
                  (is_write ? places->bytes : 0);
    uint32_t place = (number * SCATTER) & (places->count - 1);
    struct region_access access = {
        .header = header(is_write ? REGION_WRITE : REGION_READ, size),
        .offset = places->offset + place * places->stride,
        .index = places->index,
        .count = places->bytes,
        .data = { 0, 1, 2, 3, 4, 5, 6, 7 },
    };

    return access;
}

void
time_calls(const struct places *places, uint32_t count, bool is_write)
{
    int64_t *times = numbers(count);
    uint32_t number;

    for (number = 0; number < count; number++) {
        struct region_access access = region_access(places, is_write, number);
        int64_t began = now_ns();

        send_all(&access, access.header.size);
        skip_reply();
        times[number] = now_ns() - began;
    }
    answer(times, count);
    free(times);
}

void
time_posted(const struct places *places, uint32_t count)
{
    int64_t began = now_ns(), took;
    struct region_access access;
    uint32_t number;

    for (number = 0; number < count; number++) {
        access = region_access(places, true, number);
        access.header.flags = NO_REPLY;
        send_all(&access, access.header.size);
    }
    access = region_access(places, false, 0);
    send_all(&access, access.header.size);
    skip_reply();
    took = now_ns() - began;
    answer(&took, 1);
}
