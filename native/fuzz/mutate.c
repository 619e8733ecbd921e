/*
 * Mutating inputs that are lists of records.
 *
 * Mutating bytes alone would break the list nearly always, and a message that comes three records after another is
 * found by moving records, not bytes. Within a record libFuzzer's own mutations do their work.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "records.h"

#include <string.h>

#define MAX_RECORDS 128
#define MAX_BODY 0xffffu
#define MIN(a, b) ((a) < (b) ? (a) : (b))

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned int seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *data, size_t size, const uint8_t *other, size_t other_size,
                                 uint8_t *out, size_t room, unsigned int seed);

struct list {
    const uint8_t *setup;
    struct record records[MAX_RECORDS];
    size_t count;
};

/* xorshift32: which mutation it is has to depend on the seed alone. */
static uint32_t draw(uint32_t *state, size_t below)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return below > 0 ? *state % (uint32_t)below : 0;
}

static bool parse(struct list *list, const uint8_t *data, size_t size)
{
    struct input input = { data, data + size };

    if (size < setup_bytes) {
        return false;
    }
    list->setup = data;
    input.at += setup_bytes;
    list->count = 0;
    while (list->count < MAX_RECORDS && take_record(&input, &list->records[list->count])) {
        list->count++;
    }
    return true;
}

/* Put the list together; what does not fit is left out. `out` must not be where its records are. */
static size_t join(const struct list *list, uint8_t *out, size_t room)
{
    size_t at = setup_bytes;

    memcpy(out, list->setup, setup_bytes);
    for (size_t i = 0; i < list->count; i++) {
        const struct record *record = &list->records[i];
        size_t size = left(&record->body);

        if (at + RECORD_HEAD + size > room) {
            break;
        }
        out[at] = record->kind;
        out[at + 1] = (uint8_t)size;
        out[at + 2] = (uint8_t)(size >> 8);
        if (size > 0) {
            memcpy(out + at + RECORD_HEAD, record->body.at, size);
        }
        at += RECORD_HEAD + size;
    }
    return at;
}

static void insert(struct list *list, size_t at, struct record record)
{
    if (list->count == MAX_RECORDS) {
        list->count--;
    }
    at = MIN(at, list->count);
    memmove(&list->records[at + 1], &list->records[at], (list->count - at) * sizeof(record));
    list->records[at] = record;
    list->count++;
}

static void cut_out(struct list *list, size_t at)
{
    list->count--;
    memmove(&list->records[at], &list->records[at + 1], (list->count - at) * sizeof(list->records[0]));
}

/* A whole number in a record becomes one of those that programs get wrong. */
static void put_number(uint8_t *body, size_t size, uint32_t *state)
{
    static const uint64_t numbers[] = {
        0, 1, 2, 7, 8, 16, 24, 0x7f, 0xff, 0x100, 0xfff, 0x1000, 0x1001, 0xffff, 0x100000, 0x100010, 0x7fffffff,
        0x80000000, 0xffffffff, 0x100000000, 0x7fffffffffffffff, 0x8000000000000000, 0xfffffffffffff000, UINT64_MAX,
    };
    static const size_t widths[] = { 1, 2, 4, 8 };
    uint64_t number = numbers[draw(state, sizeof(numbers) / sizeof(numbers[0]))];
    size_t width = widths[draw(state, 4)];

    if (size >= width) {
        memcpy(body + draw(state, size - width + 1), &number, width);
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned int seed)
{
    static uint8_t body[MAX_BODY], joined[1 << 20];
    uint32_t state = seed * 2654435761u + 1;
    struct list list;
    size_t result, at, count;

    room = MIN(room, sizeof(joined));
    if (!parse(&list, data, size) || list.count == 0 || draw(&state, 50) == 0) {
        return LLVMFuzzerMutate(data, size, room);
    }
    at = draw(&state, list.count);
    switch (draw(&state, 12)) {
    case 0:
        insert(&list, draw(&state, list.count + 1), list.records[at]);
        break;
    case 1:
        cut_out(&list, at);
        break;
    case 2: {
        struct record moved = list.records[at];

        cut_out(&list, at);
        insert(&list, draw(&state, list.count + 1), moved);
        break;
    }
    case 3:
        list.records[at].kind = (uint8_t)draw(&state, 16);
        break;
    case 4:
        memcpy(body, data, setup_bytes);
        list.setup = body;
        body[draw(&state, setup_bytes)] ^= (uint8_t)(1u << draw(&state, 8));
        break;
    case 5:
    case 6:
    case 7:
        count = MIN(left(&list.records[at].body), sizeof(body));
        memcpy(body, list.records[at].body.at, count);
        put_number(body, count, &state);
        list.records[at].body = (struct input){ body, body + count };
        break;
    default:
        count = MIN(left(&list.records[at].body), sizeof(body));
        memcpy(body, list.records[at].body.at, count);
        count = LLVMFuzzerMutate(body, count, MIN(sizeof(body), count + 64));
        list.records[at].body = (struct input){ body, body + count };
    }
    result = join(&list, joined, room);
    memcpy(data, joined, result);
    return result;
}

size_t LLVMFuzzerCustomCrossOver(const uint8_t *data, size_t size, const uint8_t *other, size_t other_size,
                                 uint8_t *out, size_t room, unsigned int seed)
{
    static struct list mine, theirs;
    uint32_t state = seed * 2654435761u + 1;
    size_t from, count, at;

    if (!parse(&mine, data, size) || !parse(&theirs, other, other_size) || theirs.count == 0) {
        count = MIN(size, room);
        memcpy(out, data, count);
        return count;
    }
    from = draw(&state, theirs.count);
    count = 1 + draw(&state, theirs.count - from);
    at = draw(&state, mine.count + 1);
    if (draw(&state, 2) == 0) {
        mine.count = at; /* their end in place of mine */
        count = theirs.count - from;
    }
    for (size_t i = 0; i < count; i++) {
        insert(&mine, at + i, theirs.records[from + i]);
    }
    return join(&mine, out, room);
}
