/*
 * The device's autonomous writer, and the check of what it wrote (docs/device.md, "The writer").
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "arguments.h"
#include "device.h"
#include "engine.h"
#include "line.h"
#include "mix.h"
#include "writer.h"

#define STAMP_SEED 0x5354414d50ull
#define STAMP_PAGE 4096
#define STOP_NS (10 * NS_PER_SECOND)

static void begin(struct device *dev)
{
    memset(dev->stamps.data, 0, dev->stamps.bytes);
    write64(dev, REG_WRITER_BUFFER, dev->stamps.address);
    write64(dev, REG_WRITER_LENGTH, dev->stamps.bytes);
    write64(dev, REG_WRITER_RATE, dev->stamp_rate);
    write32(dev, REG_WRITER_CTRL, 1);
}

/* Stop it, and wait for what is under way: DMA by message takes longer than these two accesses. */
static void stop(struct device *dev)
{
    uint64_t deadline = now_ns() + STOP_NS;

    write32(dev, REG_WRITER_CTRL, 0);
    while (read32(dev, REG_WRITER_STATUS) == 1 && now_ns() < deadline)
        ;
}

/* The device must not go on writing to memory that is somebody else's then. */
void writer_forget(struct device *dev)
{
    if (!dev->stamps.data)
        return;
    stop(dev);
    buffer_forget(&dev->stamps);
}

/* writer buffer=BYTES rate=BYTES_A_SECOND [device=N]: have it stamp a buffer; all devices if none is named. */
void command_writer(const char *arguments)
{
    uint64_t bytes = integer(arguments, "buffer", 1 << 20), rate = integer(arguments, "rate", 0);
    uint64_t only = integer(arguments, "device", UINT64_MAX);
    uint32_t status = 1;

    if (!rate || !bytes || bytes % STAMP_PAGE || (only != UINT64_MAX && only >= device_count)) {
        refuse("writer", "rate: bytes a second; buffer: bytes, a multiple of 4096; device: one that there is");
        return;
    }
    for (size_t d = 0; d < device_count; d++) {
        struct device *dev = &devices[d];
        const char *problem = NULL;

        if (only != UINT64_MAX && only != d)
            continue;
        if (!dev->stamps.data)
            problem = buffer_alloc(dev, bytes, &dev->stamps);
        else if (dev->stamps.bytes != bytes)
            problem = "buffer: stays what it was";
        if (problem) {
            refuse("writer", "%s", problem);
            return;
        }
        dev->stamp_rate = rate;
        begin(dev);
        status = read32(dev, REG_WRITER_STATUS);
        if (status != 1)
            break;
    }
    if (status == 1)
        reply("{\"reply\":\"writer\",\"ok\":true,\"status\":%u}", status);
    else
        refuse("writer", "the device refused: status %u", status);
}

/* Count the words of the buffer that are not the sums of `stamps` stamps; the first one's page in *first. */
static uint64_t wrong_words(const struct buffer *buffer, uint64_t stamps, uint64_t *sums, uint64_t *first)
{
    uint64_t pages = buffer->bytes / STAMP_PAGE, wrong = 0;

    memset(sums, 0, pages * sizeof(*sums));
    for (uint64_t n = 0; n < stamps; n++)
        sums[n % pages] += mix(STAMP_SEED + (n + 1) * GOLDEN);
    for (uint64_t page = 0; page < pages; page++) {
        const uint64_t *words = (const uint64_t *)(buffer->data + page * STAMP_PAGE);

        for (size_t i = 0; i < STAMP_PAGE / 8; i++) {
            if (words[i] != sums[page]) {
                if (!wrong++)
                    *first = page;
            }
        }
    }
    return wrong;
}

/*
 * writer-check [again=1]: stop the writers and compare each buffer with the stamps that its device counted. With
 * again they begin anew, at stamp 0 on a zeroed buffer.
 */
void command_writer_check(const char *arguments)
{
    uint64_t stamps = 0, wrong = 0, pages = 0, first = UINT64_MAX;
    uint32_t status = 1;
    bool again = integer(arguments, "again", 0);

    for (size_t d = 0; d < device_count; d++) {
        struct device *dev = &devices[d];
        uint64_t count, *sums;
        uint32_t before;

        if (!dev->stamps.data)
            continue;
        before = read32(dev, REG_WRITER_STATUS);
        if (before != 1)
            status = before; /* it gave up */
        stop(dev);
        count = read64(dev, REG_WRITER_COUNT);
        sums = malloc(dev->stamps.bytes / STAMP_PAGE * sizeof(*sums));
        if (!sums) {
            refuse("writer-check", "no memory");
            return;
        }
        wrong += wrong_words(&dev->stamps, count, sums, &first);
        free(sums);
        stamps += count;
        pages += dev->stamps.bytes / STAMP_PAGE;
        if (again)
            begin(dev);
    }
    reply("{\"reply\":\"writer-check\",\"ok\":true,\"stamps\":%" PRIu64 ",\"pages\":%" PRIu64
          ",\"wrong_bytes\":%" PRIu64 ",\"first_page\":%" PRId64 ",\"status\":%u}",
          stamps, pages, wrong * 8, (int64_t)first, status);
}
