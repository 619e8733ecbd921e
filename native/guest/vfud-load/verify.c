/*
 * The check: device memory, read by the CPU, against the journal.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <inttypes.h>
#include <stdio.h>

#include "vfud-load.h"

void command_verify(const char *arguments)
{
    uint64_t compared = 0, mismatched = 0, checks = 0, errors = 0, total = 0, next_report;
    uint64_t first_offset = 0, first_expected = 0, first_found = 0, start = now_ns();
    size_t first_device = 0;
    unsigned int scratch = 0;
    bool verified;
    char first[160] = "null";

    (void)arguments;
    for (size_t d = 0; d < device_count; d++)
        total += devices[d].words * 8;
    next_report = total / 20;
    for (size_t d = 0; d < device_count; d++) {
        struct device *dev = &devices[d];

        for (uint64_t i = 0; i < dev->words; i++) {
            uint64_t found = dev->memory[i], expected = dev->journal[i];

            compared += 8;
            if (found != expected) {
                if (!mismatched) {
                    first_device = d;
                    first_offset = i * 8;
                    first_expected = expected;
                    first_found = found;
                }
                for (uint64_t difference = found ^ expected; difference; difference >>= 8)
                    mismatched += (difference & 0xff) != 0;
            }
            if (compared >= next_report) {
                reply("{\"event\":\"progress\",\"compared_bytes\":%" PRIu64 ",\"total_bytes\":%" PRIu64 "}",
                      compared, total);
                next_report += total / 20;
            }
        }
        scratch += scratch_errors(dev);
        checks += dev->readback_checks;
        errors += dev->readback_errors;
    }
    if (mismatched)
        snprintf(first, sizeof(first),
                 "{\"device\":%zu,\"offset\":%" PRIu64 ",\"expected\":\"%016" PRIx64 "\",\"found\":\"%016" PRIx64 "\"}",
                 first_device, first_offset, first_expected, first_found);
    verified = device_count && !mismatched && !errors && !scratch;
    reply("{\"reply\":\"verify\",\"ok\":true,\"verified\":%s,\"compared_bytes\":%" PRIu64
          ",\"mismatched_bytes\":%" PRIu64 ",\"first_mismatch\":%s,\"scratch_errors\":%u,\"readback_checks\":%" PRIu64
          ",\"readback_errors\":%" PRIu64 ",\"generation\":%" PRIu64 ",\"verify_ns\":%" PRIu64 "}",
          verified ? "true" : "false", compared, mismatched, first, scratch, checks, errors,
          device_count ? read64(&devices[0], REG_GENERATION) : 0, now_ns() - start);
}

