/*
 * The load: writes to device memory at a rate, by a pattern.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <inttypes.h>
#include <string.h>

#include "vfud-load.h"

/* At most this many writes between two looks at the command line: about 10 ms of trapped accesses. */
#define BURST 256
/* Writes that a stall made late are made up for, up to this much time; the rest is counted as missed. */
#define MAX_BACKLOG_NS 250000000ull

enum pattern { PATTERN_UNIFORM, PATTERN_SEQUENTIAL, PATTERN_HOTSET };

struct load {
    bool running;
    enum pattern pattern;
    double rate;         /* writes a second, per device; one write dirties one page */
    double hot_fraction; /* of the pages */
    double hot_share;    /* of the writes */
    uint64_t seed;
    uint64_t check_every; /* read one of so many writes back at once; 0: never */
    uint64_t tick_ns;     /* heartbeat on the command line; 0: none */
    uint64_t started_ns;
    uint64_t due_origin_ns; /* moved forward by what was missed */
    uint64_t sequence;      /* write rounds done (one write to each device) */
    uint64_t rounds;        /* since due_origin_ns */
    uint64_t missed;
    uint64_t last_tick_ns;
    uint64_t ticks;
    uint64_t busy_ns; /* time spent in the write itself */
    uint64_t max_access_ns;
    uint64_t max_gap_ns; /* longest pause between two bursts of a running load, on the guest's clock */
    uint64_t last_burst_ns;
    uint64_t stopped_ns;
};

static struct load load;
static uint64_t random_state;

static uint64_t next_random(void)
{
    random_state += 0x9E3779B97F4A7C15ull;
    return mix(random_state);
}

static double next_fraction(void)
{
    return (double)(next_random() >> 11) * 0x1.0p-53;
}

static uint64_t choose_page(struct device *dev)
{
    uint64_t pages = dev->words / dev->page_words;
    uint64_t hot;

    switch (load.pattern) {
    case PATTERN_SEQUENTIAL:
        return dev->cursor++ % pages;
    case PATTERN_HOTSET:
        hot = (uint64_t)((double)pages * load.hot_fraction);
        if (hot < 1)
            hot = 1;
        if (hot < pages && next_fraction() >= load.hot_share)
            return hot + next_random() % (pages - hot);
        return next_random() % hot;
    case PATTERN_UNIFORM:
    default:
        return next_random() % pages;
    }
}

static void note_access(uint64_t start_ns)
{
    uint64_t took = now_ns() - start_ns;

    load.busy_ns += took;
    if (took > load.max_access_ns)
        load.max_access_ns = took;
}

static void write_once(struct device *dev)
{
    uint64_t word = choose_page(dev) * dev->page_words + next_random() % dev->page_words;
    uint64_t value = mix(load.seed + load.sequence) ^ word;
    uint64_t start = now_ns();

    dev->journal[word] = value;
    dev->memory[word] = value;
    note_access(start);
    if (load.check_every && load.sequence % load.check_every == 0) {
        start = now_ns();
        dev->readback_checks++;
        if (dev->memory[word] != value)
            dev->readback_errors++;
        note_access(start);
    }
}

/* Do the writes that are due; return the nanoseconds until the next one is. */
bool load_running(void)
{
    return load.running;
}

uint64_t run_load(void)
{
    uint64_t now = now_ns(), period = (uint64_t)(1e9 / load.rate), due;

    if (load.last_burst_ns) {
        uint64_t gap = now - load.last_burst_ns;

        if (gap > load.max_gap_ns)
            load.max_gap_ns = gap;
    }
    load.last_burst_ns = now;
    due = (uint64_t)((double)(now - load.due_origin_ns) * load.rate / 1e9);
    if (due > load.rounds && (due - load.rounds) * period > MAX_BACKLOG_NS) {
        uint64_t missed = due - load.rounds - MAX_BACKLOG_NS / period;

        load.missed += missed;
        load.rounds += missed;
    }
    for (int i = 0; i < BURST && load.rounds < due; i++) {
        for (size_t d = 0; d < device_count; d++)
            write_once(&devices[d]);
        load.sequence++;
        load.rounds++;
    }
    if (load.tick_ns && now - load.last_tick_ns >= load.tick_ns) {
        load.last_tick_ns = now;
        reply("{\"event\":\"tick\",\"tick\":%" PRIu64 ",\"writes\":%" PRIu64 "}", ++load.ticks,
              load.sequence * device_count);
    }
    return load.rounds < due ? 0 : period;
}

void command_start(const char *arguments)
{
    uint64_t sequence = load.sequence;
    double rate = number(arguments, "rate", 512);

    if (!(rate > 0) || rate > 1e6) {
        refuse("start", "rate: above 0, at most 1000000 writes a second");
        return;
    }
    memset(&load, 0, sizeof(load));
    load.sequence = sequence;
    load.rate = rate;
    load.pattern = option_is(arguments, "pattern", "sequential") ? PATTERN_SEQUENTIAL
                   : option_is(arguments, "pattern", "hotset")   ? PATTERN_HOTSET
                                                      : PATTERN_UNIFORM;
    load.hot_fraction = number(arguments, "hot_fraction", 0.1);
    load.hot_share = number(arguments, "hot_share", 0.9);
    load.seed = (uint64_t)number(arguments, "seed", 1);
    load.check_every = (uint64_t)number(arguments, "check", 64);
    load.tick_ns = (uint64_t)(number(arguments, "tick_ms", 0) * 1e6);
    random_state = mix(load.seed);
    for (size_t d = 0; d < device_count; d++)
        write_scratch(&devices[d], load.seed);
    load.started_ns = load.due_origin_ns = now_ns();
    load.running = true;
    reply("{\"reply\":\"start\",\"ok\":true,\"rate\":%.1f,\"devices\":%zu}", load.rate, device_count);
}

static void report(const char *name)
{
    uint64_t end = load.running ? now_ns() : load.stopped_ns;
    uint64_t checks = 0, errors = 0;

    for (size_t d = 0; d < device_count; d++) {
        checks += devices[d].readback_checks;
        errors += devices[d].readback_errors;
    }
    reply("{\"reply\":\"%s\",\"ok\":true,\"running\":%s,\"devices\":%zu,\"memory_bytes\":%" PRIu64
          ",\"writes\":%" PRIu64 ",\"missed_writes\":%" PRIu64 ",\"elapsed_ns\":%" PRIu64
          ",\"busy_ns\":%" PRIu64 ",\"max_access_ns\":%" PRIu64 ",\"max_gap_ns\":%" PRIu64
          ",\"readback_checks\":%" PRIu64 ",\"readback_errors\":%" PRIu64 ",\"generation\":%" PRIu64 "}",
          name, load.running ? "true" : "false", device_count, device_count ? devices[0].words * 8 : 0,
          load.sequence * device_count, load.missed, end - load.started_ns, load.busy_ns, load.max_access_ns,
          load.max_gap_ns, checks, errors, device_count ? read64(&devices[0], REG_GENERATION) : 0);
}

void command_stop(const char *arguments)
{
    (void)arguments;
    load.running = false;
    load.stopped_ns = now_ns();
    report("stop");
}

void command_status(const char *arguments)
{
    (void)arguments;
    report("status");
}

