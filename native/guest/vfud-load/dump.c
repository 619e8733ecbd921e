/*
 * vfud-load --dump: the patterns without a device, for a test that compares them with those in Python.
 *
 * Lines in: "phase ..." and "rows ..." as after `program`; then "writes PHASE FIRST COUNT" prints offset, length and
 * CRC-32 of the content of each write; "take NOW LIMIT" prints the writes that are due as PHASE:FIRST:COUNT, what is
 * missed, and when to ask again (or "never").
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arguments.h"
#include "crc.h"
#include "dump.h"
#include "pacer.h"
#include "pattern.h"

#define MAX_RUNS 64

static void dump_writes(const struct writes *writes, uint64_t first, uint64_t count)
{
    static uint8_t content[1 << 20];

    for (uint64_t n = first; n < first + count; n++) {
        uint32_t length = write_length(writes, n);
        uint32_t half = length / 2;

        /* In two parts, as a load does that is interrupted. */
        write_content(writes, n, 0, half, content);
        write_content(writes, n, half, length - half, content + half);
        printf("%" PRIu64 " %" PRIu32 " %" PRIu32 "\n", write_offset(writes, n), length, crc32(content, length));
    }
}

static void dump_taken(struct pacer *pacer, uint64_t now, uint64_t limit)
{
    struct run runs[MAX_RUNS];
    uint64_t before, next;
    size_t count;

    do {
        before = pacer->taken;
        count = pacer_take(pacer, now, limit, runs, MAX_RUNS);
        for (size_t i = 0; i < count; i++)
            printf("%zu:%" PRIu64 ":%" PRIu64 " ", runs[i].phase, runs[i].first, runs[i].count);
        limit -= pacer->taken - before;
    } while (count == MAX_RUNS);
    next = pacer_next_ns(pacer);
    printf("missed %" PRIu64 " next ", pacer->missed);
    if (next == NEVER)
        printf("never\n");
    else
        printf("%" PRIu64 "\n", next);
}

int dump(uint64_t memory_bytes, uint64_t page_bytes, uint64_t seed_offset)
{
    static char line[1 << 16];
    struct program program = {0};
    struct pacer pacer = {0};
    struct writes writes;
    uint64_t a, b;
    size_t phase;
    int status = 0;

    while (!status && fgets(line, sizeof(line), stdin)) {
        const char *problem = "phase, rows, writes or take";
        char wrong[1024];

        line[strcspn(line, "\n")] = '\0';
        if (!strncmp(line, "phase ", 6)) {
            problem = wrong;
            if (judge_arguments(line + 6, PHASE_KEYS, wrong, sizeof(wrong)))
                problem = program_add_phase(&program, line + 6, page_bytes);
        } else if (!strncmp(line, "rows ", 5)) {
            problem = program_add_rows(&program, line + 5);
        } else if (sscanf(line, "writes %zu %" SCNu64 " %" SCNu64, &phase, &a, &b) == 3 && phase < program.count) {
            problem = writes_open(&writes, &program.phases[phase], memory_bytes, page_bytes, seed_offset);
            if (!problem)
                dump_writes(&writes, a, b);
            writes_close(&writes);
        } else if (sscanf(line, "take %" SCNu64 " %" SCNu64, &a, &b) == 2 && program.count) {
            problem = pacer.program || pacer_open(&pacer, &program, a) ? NULL : "no memory";
            if (!problem)
                dump_taken(&pacer, a, b);
        }
        if (problem) {
            printf("error: %s\n", problem);
            status = 1;
        }
    }
    pacer_close(&pacer);
    program_clear(&program);
    return status;
}
