/*
 * The check: device memory against the journal. Read by the CPU, or copied to guest memory by the device's DMA engine,
 * which is some thousand times faster where every access of the CPU is a message to the device's server.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "arguments.h"
#include "device.h"
#include "dma.h"
#include "engine.h"
#include "line.h"
#include "load.h"
#include "verify.h"

#define BOUNCE_BYTES (1u << 20)
/* A trapped access takes tens of microseconds, one of mapped memory well below one. */
#define MAPPED_NS 2000
#define SAMPLES 16

static struct {
    uint64_t compared, total, next_report;
    uint64_t mismatched;
    size_t first_device;
    uint64_t first_offset, first_expected, first_found;
} check;

static void compare(size_t d, uint64_t offset, const uint64_t *found, uint64_t bytes)
{
    const uint64_t *expected = devices[d].journal + offset / 8;

    check.compared += bytes;
    if (memcmp(found, expected, bytes)) {
        for (uint64_t i = 0; i < bytes / 8; i++) {
            uint64_t difference = found[i] ^ expected[i];

            if (difference && !check.mismatched) {
                check.first_device = d;
                check.first_offset = offset + i * 8;
                check.first_expected = expected[i];
                check.first_found = found[i];
            }
            for (; difference; difference >>= 8)
                check.mismatched += (difference & 0xff) != 0;
        }
    }
    if (check.compared >= check.next_report) {
        reply("{\"event\":\"progress\",\"compared_bytes\":%" PRIu64 ",\"total_bytes\":%" PRIu64 "}", check.compared,
              check.total);
        check.next_report = check.compared + check.total / 20;
    }
}

static void verify_by_cpu(size_t d)
{
    struct device *dev = &devices[d];
    uint64_t found[512];

    for (uint64_t word = 0; word < dev->words;) {
        uint64_t count = dev->words - word < 512 ? dev->words - word : 512;

        for (uint64_t i = 0; i < count; i++)
            found[i] = dev->memory[word + i];
        compare(d, word * 8, found, count * 8);
        word += count;
    }
}

static const char *open_bounce(struct device *dev)
{
    const char *problem = engine_open(dev);

    for (int i = 0; i < 2 && !problem; i++)
        if (!dev->engine.bounce[i].data)
            problem = buffer_alloc(dev, BOUNCE_BYTES, &dev->engine.bounce[i]);
    return problem;
}

/* Two buffers: the device fills one while the other is compared. */
static const char *verify_by_dma(size_t d)
{
    struct device *dev = &devices[d];
    uint64_t bytes = dev->words * 8, fetched = 0, compared = 0, length[2];
    const char *problem = open_bounce(dev);

    for (int turn = 0; !problem && compared < bytes; turn ^= 1) {
        if (fetched == compared) {
            length[turn] = bytes - fetched < BOUNCE_BYTES ? bytes - fetched : BOUNCE_BYTES;
            engine_begin_copy(dev, OP_TO_GUEST, &dev->engine.bounce[turn], 0, fetched, length[turn]);
            fetched += length[turn];
        }
        problem = engine_end_copy(dev);
        if (!problem && fetched < bytes) {
            length[turn ^ 1] = bytes - fetched < BOUNCE_BYTES ? bytes - fetched : BOUNCE_BYTES;
            engine_begin_copy(dev, OP_TO_GUEST, &dev->engine.bounce[turn ^ 1], 0, fetched, length[turn ^ 1]);
            fetched += length[turn ^ 1];
        }
        if (!problem) {
            compare(d, compared, (const uint64_t *)dev->engine.bounce[turn].data, length[turn]);
            compared += length[turn];
        }
    }
    return problem;
}

static bool mapped(const struct device *dev)
{
    uint64_t best = UINT64_MAX;

    /* Several reads each time: the clock itself may be a trapped access. */
    for (int attempt = 0; attempt < 3; attempt++) {
        uint64_t start = now_ns(), took;

        for (int i = 0; i < SAMPLES; i++)
            (void)dev->memory[i];
        took = now_ns() - start;
        if (took < best)
            best = took;
    }
    return best < SAMPLES * MAPPED_NS;
}

/*
 * verify [via=auto|mmio|dma]: compare all device memory, the registers' scratch area and the buffers of the DMA load
 * with the journals. auto reads memory that is mapped, and has the device copy it where that is not so.
 */
void command_verify(const char *arguments)
{
    uint64_t checks = 0, errors = 0, buffers = 0, start = now_ns();
    const char *via = "mmio", *problem = NULL;
    unsigned int scratch = 0;
    bool verified;

    memset(&check, 0, sizeof(check));
    load_settle();
    dma_settle();
    for (size_t d = 0; d < device_count; d++)
        check.total += devices[d].words * 8;
    check.next_report = check.total / 20;
    for (size_t d = 0; d < device_count && !problem; d++) {
        struct device *dev = &devices[d];
        bool by_dma = option_is(arguments, "via", "dma") ||
                      (!option_is(arguments, "via", "mmio") && dev->driver >= 0 && !mapped(dev));

        if (by_dma)
            problem = verify_by_dma(d);
        else
            verify_by_cpu(d);
        via = by_dma ? "dma" : "mmio";
        buffers += dma_mismatched(dev);
        scratch += scratch_errors(dev);
        checks += dev->readback_checks;
        errors += dev->readback_errors;
    }
    if (problem) {
        refuse("verify", "%s", problem);
        return;
    }
    verified = device_count && !check.mismatched && !errors && !scratch && !buffers;
    reply_part("{\"reply\":\"verify\",\"ok\":true,\"verified\":%s,\"via\":\"%s\",\"compared_bytes\":%" PRIu64
               ",\"mismatched_bytes\":%" PRIu64 ",\"first_mismatch\":",
               verified ? "true" : "false", via, check.compared, check.mismatched);
    if (check.mismatched)
        reply_part("{\"device\":%zu,\"offset\":%" PRIu64 ",\"expected\":\"%016" PRIx64 "\",\"found\":\"%016" PRIx64
                   "\"}",
                   check.first_device, check.first_offset, check.first_expected, check.first_found);
    else
        reply_part("null");
    reply_part(",\"buffer_mismatched_bytes\":%" PRIu64 ",\"scratch_errors\":%u,\"readback_checks\":%" PRIu64
               ",\"readback_errors\":%" PRIu64 ",\"generation\":%" PRIu64 ",\"verify_ns\":%" PRIu64 "}",
               buffers, scratch, checks, errors, device_count ? read64(&devices[0], REG_GENERATION) : 0,
               now_ns() - start);
    reply_end();
}
