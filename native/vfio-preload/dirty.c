/*
 * Which pages a device wrote to by message: a bitmap in chunks, since few of many are ever written to.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "iova.h"

#define CHUNK_WORDS 8
#define CHUNK_PAGES (CHUNK_WORDS * 64)
#define CHUNK_BYTES (CHUNK_PAGES * PAGE_BYTES)

struct dirty_chunk {
    uint64_t number; /* of the chunk, plus one; 0: unused */
    uint64_t bits[CHUNK_WORDS];
};

void dirty_init(struct dirty_log *log)
{
    memset(log, 0, sizeof(*log));
    pthread_mutex_init(&log->lock, NULL);
}

static void clear(struct dirty_log *log)
{
    free(log->chunks);
    log->chunks = NULL;
    log->count = log->room = 0;
    log->overflowed = false;
}

void dirty_destroy(struct dirty_log *log)
{
    clear(log);
    pthread_mutex_destroy(&log->lock);
}

static void turn(struct dirty_log *log, bool on)
{
    pthread_mutex_lock(&log->lock);
    clear(log);
    __atomic_store_n(&log->on, on, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&log->lock);
}

void dirty_start(struct dirty_log *log)
{
    turn(log, true);
}

void dirty_stop(struct dirty_log *log)
{
    turn(log, false);
}

bool dirty_is_on(struct dirty_log *log)
{
    return __atomic_load_n(&log->on, __ATOMIC_ACQUIRE);
}

static struct dirty_chunk *slot(struct dirty_chunk *chunks, size_t room, uint64_t number)
{
    size_t at = (size_t)((number * 0x9e3779b97f4a7c15ULL) >> 32) & (room - 1);

    while (chunks[at].number != 0 && chunks[at].number != number) {
        at = (at + 1) & (room - 1);
    }
    return &chunks[at];
}

static struct dirty_chunk *chunk(struct dirty_log *log, uint64_t number)
{
    struct dirty_chunk *found;

    if (log->count * 2 >= log->room) {
        size_t room = log->room == 0 ? 64 : log->room * 2;
        struct dirty_chunk *chunks = calloc(room, sizeof(*chunks));

        if (chunks == NULL) {
            log->overflowed = true;
            return NULL;
        }
        for (size_t i = 0; i < log->room; i++) {
            if (log->chunks[i].number != 0) {
                *slot(chunks, room, log->chunks[i].number) = log->chunks[i];
            }
        }
        free(log->chunks);
        log->chunks = chunks;
        log->room = room;
    }
    found = slot(log->chunks, log->room, number);
    if (found->number == 0) {
        found->number = number;
        log->count++;
    }
    return found;
}

void dirty_mark(struct dirty_log *log, uint64_t iova, uint64_t size)
{
    uint64_t last_page = (iova + size - 1) / PAGE_BYTES;

    if (!dirty_is_on(log) || size == 0) {
        return;
    }
    pthread_mutex_lock(&log->lock);
    for (uint64_t page = iova / PAGE_BYTES; page <= last_page; page++) {
        struct dirty_chunk *found = chunk(log, page / CHUNK_PAGES + 1);

        if (found == NULL) {
            break;
        }
        found->bits[page % CHUNK_PAGES / 64] |= 1ULL << (page % 64);
    }
    pthread_mutex_unlock(&log->lock);
}

/* OR what is dirty of the chunk into the caller's bitmap, and forget it. */
static int report_chunk(struct dirty_chunk *chunk, uint64_t iova, uint64_t last, uint64_t page_size, uint64_t bitmap)
{
    uint64_t first_page = (chunk->number - 1) * CHUNK_PAGES;
    uint64_t first_word = (MAX(first_page * PAGE_BYTES, iova) - iova) / page_size / 64;
    uint64_t last_word = (MIN((first_page + CHUNK_PAGES) * PAGE_BYTES - 1, last) - iova) / page_size / 64;
    uint64_t words[CHUNK_WORDS + 1]; /* one more where the range begins within a word of ours */
    size_t size = (size_t)(last_word - first_word + 1) * sizeof(words[0]);

    if (copy_from_user(words, bitmap + first_word * sizeof(words[0]), size) != 0) {
        return -EFAULT;
    }
    for (unsigned int i = 0; i < CHUNK_PAGES; i++) {
        uint64_t address = (first_page + i) * PAGE_BYTES, bit;

        if ((chunk->bits[i / 64] & 1ULL << (i % 64)) && address + PAGE_BYTES - 1 >= iova && address <= last) {
            bit = (MAX(address, iova) - iova) / page_size - first_word * 64;
            words[bit / 64] |= 1ULL << (bit % 64);
            chunk->bits[i / 64] &= ~(1ULL << (i % 64));
        }
    }
    return copy_to_user(bitmap + first_word * sizeof(words[0]), words, size);
}

/* There was no memory to remember: all that is asked for is dirty. */
static int report_all(uint64_t length, uint64_t page_size, uint64_t bitmap)
{
    uint64_t bits = (length - 1) / page_size + 1;

    for (uint64_t bit = 0; bit < bits; bit += 64) {
        uint64_t word = bits - bit >= 64 ? ~0ULL : (1ULL << (bits - bit)) - 1;
        uint64_t before;

        if (copy_from_user(&before, bitmap + bit / 8, sizeof(before)) != 0) {
            return -EFAULT;
        }
        word |= before;
        if (copy_to_user(bitmap + bit / 8, &word, sizeof(word)) != 0) {
            return -EFAULT;
        }
    }
    return 0;
}

int dirty_report(struct dirty_log *log, uint64_t iova, uint64_t length, uint64_t page_size, uint64_t bitmap)
{
    uint64_t last = iova + length - 1;
    int result = 0;

    pthread_mutex_lock(&log->lock);
    if (log->overflowed) {
        result = report_all(length, page_size, bitmap);
    }
    for (size_t i = 0; i < log->room && result == 0; i++) {
        struct dirty_chunk *found = &log->chunks[i];

        if (found->number != 0 && (found->number - 1) * CHUNK_BYTES <= last &&
            found->number * CHUNK_BYTES - 1 >= iova) {
            result = report_chunk(found, iova, last, page_size, bitmap);
        }
    }
    pthread_mutex_unlock(&log->lock);
    return result;
}
