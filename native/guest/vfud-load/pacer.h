/*
 * When writes are due: vfu_dev.workload.Pacer, which is the same in Python.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef PACER_H
#define PACER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pattern.h"

/* Turns a clock into writes that are due, and counts those that nobody had time for. */
struct pacer {
    const struct program *program;
    uint64_t *starts;
    uint64_t *next;
    uint64_t cycle;
    uint64_t clock;
    uint64_t origin;
    uint64_t taken;
    uint64_t missed;
};

struct run {
    size_t phase;
    uint64_t first;
    uint64_t count;
};

#define NEVER UINT64_MAX

bool pacer_open(struct pacer *pacer, const struct program *program, uint64_t now_ns); /* false: no memory */
void pacer_close(struct pacer *pacer);
/* The writes that are due, at most `limit` writes in at most `room` runs; returns the number of runs. */
size_t pacer_take(struct pacer *pacer, uint64_t now_ns, uint64_t limit, struct run *runs, size_t room);
/* When (on the clock of pacer_take) to ask again; NEVER if nothing will ever be due. */
uint64_t pacer_next_ns(const struct pacer *pacer);

#endif
