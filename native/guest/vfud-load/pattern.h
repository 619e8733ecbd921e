/*
 * Load patterns: which write comes where, with what content; docs/load.md is the definition; a test
 * compares this with vfu_dev/workload, which is the same in Python.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef PATTERN_H
#define PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_PHASES 1000

enum pattern { PATTERN_IDLE, PATTERN_SEQUENTIAL, PATTERN_UNIFORM, PATTERN_HOTSET, PATTERN_ZIPF, PATTERN_TRACE };

struct row {
    uint64_t time_ns;
    uint64_t offset;
    uint32_t length;
};

/* One phase of a load; a load without phases is one phase that lasts for ever. */
struct phase {
    enum pattern pattern;
    uint64_t duration_ns; /* 0: for ever */
    uint64_t seed;
    uint32_t write_bytes;
    double hot_fraction;
    double hot_share;
    double zipf_exponent;
    /* up / down writes in each nanosecond of a burst, which lasts on_ns of each period_ns. 0: never. */
    uint64_t up, down;
    uint64_t on_ns, period_ns;
    /* The recording: rows that write something, repeated every round_ns. */
    struct row *rows;
    size_t row_count, row_room;
    uint64_t round_ns;
};

struct program {
    struct phase *phases;
    size_t count;
};

/* The keys of a phase, as judge_arguments() takes them. */
#define PHASE_KEYS                                                                                                     \
    "pattern=idle|sequential|uniform|hotset|zipf|trace dirty_rate write_rate rate write_size# write_bytes# seed# "     \
    "hot_fraction. hot_share. zipf_exponent. duration_ns# up# down# on_ns# period_ns# round_ns#"

void program_clear(struct program *program);
/*
 * "pattern=uniform dirty_rate=256p ...": adds a phase, for devices with such pages. Other keys than PHASE_KEYS are
 * somebody else's. Returns NULL or what is wrong.
 */
const char *program_add_phase(struct program *program, const char *arguments, uint64_t page_bytes);
/* Writes a second to each device, over all phases. */
double program_rate(const struct program *program);
/* "0,4096,8 1000,8192,8 ...": rows (ns, offset, length) of the last phase's recording. NULL or what is wrong. */
const char *program_add_rows(struct program *program, const char *text);

/* The writes of one phase to one memory. */
struct writes {
    const struct phase *phase;
    uint64_t seed;
    uint64_t page_bytes;
    uint64_t span;   /* pages of a place */
    uint64_t places;
    uint64_t slots;  /* in a page */
    uint64_t hot;    /* places */
    double *sums;    /* zipf */
};

/* NULL or what is wrong. `seed_offset` is added to the phase's seed. */
const char *writes_open(struct writes *writes, const struct phase *phase, uint64_t memory_bytes,
                        uint64_t page_bytes, uint64_t seed_offset);
void writes_close(struct writes *writes);
uint64_t write_offset(const struct writes *writes, uint64_t n);
uint32_t write_length(const struct writes *writes, uint64_t n);
/* Bytes from..from+count-1 of what write n writes. */
void write_content(const struct writes *writes, uint64_t n, uint64_t from, uint64_t count, uint8_t *to);

#endif
