/*
 * The load: writes to the memory of every device, as a program of patterns says. By MMIO, or by the device's own DMA
 * engine, which fetches from guest memory what it is to write.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arguments.h"
#include "claim.h"
#include "device.h"
#include "engine.h"
#include "line.h"
#include "load.h"
#include "pacer.h"
#include "pattern.h"

/* Trapped accesses between two polls of the command line: about 10 ms. */
#define BURST_ACCESSES 256
/* Written between two readings of the clock. */
#define PIECE_BYTES 512
/* The most writes, and bytes of them, that a device is handed at once by DMA. */
#define BATCH_WRITES 256
#define BATCH_BYTES (1u << 20)
#define MAX_RUNS 64
#define DMA_TIMEOUT_NS (10 * NS_PER_SECOND)

static struct program program;

static struct {
    bool running;
    bool by_dma;
    bool waiting; /* for a batch of DMA */
    uint64_t offset, bytes; /* the part of device memory that is written */
    struct pacer pacer;
    struct writes *writes[MAX_DEVICES]; /* of each phase */
    struct run runs[MAX_RUNS];
    size_t run_count, run_index;
    uint64_t run_done; /* writes of the present run */
    size_t device;     /* which has the present write next */
    uint64_t position; /* bytes of it that this device has */
    uint64_t batch;    /* writes that devices have been handed */
    uint64_t write_count, byte_count; /* done, to all devices */
    uint64_t check_every; /* read one write in this many back at once; 0: never */
    uint64_t tick_ns;     /* heartbeat on the command line; 0: none */
    uint64_t last_tick_ns, ticks;
    uint64_t started_ns, stopped_ns;
    uint64_t busy_ns; /* time spent in the accesses themselves */
    uint64_t max_access_ns;
    uint64_t max_gap_ns; /* longest pause between two bursts of a running load, on the guest's clock */
    uint64_t last_burst_ns;
    uint64_t dma_errors;
} load;

bool load_running(void)
{
    return load.running;
}

/* --- by MMIO ---------------------------------------------------------------------------------------------- */

static void note_access(uint64_t start_ns, uint64_t accesses)
{
    uint64_t took = now_ns() - start_ns;

    load.busy_ns += took;
    if (took / accesses > load.max_access_ns)
        load.max_access_ns = took / accesses;
}

static void check_back(struct device *dev, uint64_t offset)
{
    uint64_t start = now_ns(), word = offset / 8;

    dev->readback_checks++;
    if (dev->memory[word] != dev->journal[word])
        dev->readback_errors++;
    note_access(start, 1);
}

/* A piece of write `n`, or all of it, to the device that has it next; returns the accesses it took. */
static uint64_t write_piece(const struct run *run, uint64_t n)
{
    struct device *dev = &devices[load.device];
    const struct writes *writes = &load.writes[load.device][run->phase];
    uint64_t length = write_length(writes, n), left = length - load.position, accesses, start;
    uint64_t offset = load.offset + write_offset(writes, n);
    uint8_t content[PIECE_BYTES];
    uint64_t count = left < sizeof(content) ? left : sizeof(content);

    write_content(writes, n, load.position, count, content);
    memcpy((uint8_t *)dev->journal + offset + load.position, content, count);
    start = now_ns();
    accesses = write_memory(dev, offset + load.position, content, count);
    note_access(start, accesses);
    load.position += count;
    load.byte_count += count;
    if (load.position == length) {
        load.position = 0;
        load.write_count++;
        if (load.check_every && load.write_count % load.check_every == 0)
            check_back(dev, offset);
        load.device++;
    }
    return accesses;
}

static void run_mmio(void)
{
    uint64_t accesses = 0;

    while (accesses < BURST_ACCESSES && load.run_index < load.run_count) {
        const struct run *run = &load.runs[load.run_index];

        accesses += write_piece(run, run->first + load.run_done);
        if (load.device < device_count)
            continue;
        load.device = 0;
        if (++load.run_done == run->count) {
            load.run_done = 0;
            load.run_index++;
        }
    }
}

/* --- by DMA ----------------------------------------------------------------------------------------------- */

/* Hand the next writes of the present run to device `d`; returns how many, the same for every device. */
static uint64_t submit_batch(size_t d, const struct run *run)
{
    const struct writes *writes = &load.writes[d][run->phase];
    const struct buffer *source = &devices[d].engine.source;
    struct descriptor *table = engine_table(&devices[d]);
    uint64_t count = 0, used = 0;

    while (count < BATCH_WRITES && load.run_done + count < run->count) {
        uint64_t n = run->first + load.run_done + count, length = write_length(writes, n);
        uint64_t offset = load.offset + write_offset(writes, n);

        if (used + length > BATCH_BYTES)
            break;
        write_content(writes, n, 0, length, source->data + used);
        memcpy((uint8_t *)devices[d].journal + offset, source->data + used, length);
        table[count++] = (struct descriptor){
            .op = OP_TO_DEVICE, .address = source->address + used, .offset = offset, .length = length};
        used += length;
    }
    load.byte_count += used;
    engine_submit(&devices[d], (uint32_t)count);
    return count;
}

static bool batch_under_way(void)
{
    if (!load.waiting)
        return false;
    for (size_t d = 0; d < device_count; d++)
        if (engine_busy(&devices[d]))
            return true;
    for (size_t d = 0; d < device_count; d++)
        for (uint64_t i = 0; i < load.batch; i++)
            load.dma_errors += engine_table(&devices[d])[i].status != STATUS_DONE;
    load.waiting = false;
    load.write_count += load.batch * device_count;
    load.run_done += load.batch;
    if (load.run_done == load.runs[load.run_index].count) {
        load.run_done = 0;
        load.run_index++;
    }
    return false;
}

static void run_dma(void)
{
    if (batch_under_way() || load.run_index == load.run_count)
        return;
    for (size_t d = 0; d < device_count; d++)
        load.batch = submit_batch(d, &load.runs[load.run_index]);
    load.waiting = true;
}

void load_settle(void)
{
    uint64_t start = now_ns();

    while (batch_under_way() && now_ns() - start < DMA_TIMEOUT_NS)
        usleep(50);
}

/* --- the load as a whole ---------------------------------------------------------------------------------- */

uint64_t run_load(void)
{
    uint64_t now = now_ns(), next;

    if (load.last_burst_ns && now - load.last_burst_ns > load.max_gap_ns)
        load.max_gap_ns = now - load.last_burst_ns;
    load.last_burst_ns = now;
    if (load.run_index == load.run_count) {
        load.run_index = 0;
        load.run_count = pacer_take(&load.pacer, now, BURST_ACCESSES, load.runs, MAX_RUNS);
    }
    if (load.by_dma)
        run_dma();
    else
        run_mmio();
    if (load.tick_ns && now - load.last_tick_ns >= load.tick_ns) {
        load.last_tick_ns = now;
        reply("{\"event\":\"tick\",\"tick\":%" PRIu64 ",\"writes\":%" PRIu64 "}", ++load.ticks, load.write_count);
    }
    if (load.waiting)
        return 100000;
    if (load.run_index < load.run_count)
        return 0;
    next = pacer_next_ns(&load.pacer);
    now = now_ns();
    return next > now ? next - now : 0;
}

static void close_load(void)
{
    for (size_t d = 0; d < MAX_DEVICES; d++) {
        for (size_t i = 0; load.writes[d] && i < program.count; i++)
            writes_close(&load.writes[d][i]);
        free(load.writes[d]);
        load.writes[d] = NULL;
    }
    pacer_close(&load.pacer);
}

static uint64_t first_page_bytes(void)
{
    return device_count ? devices[0].page_words * 8 : 4096;
}

/* program clear | program phase KEY=VALUE... | program rows T,O,L ...: what `start` is to do. */
void command_program(const char *arguments)
{
    const char *problem = "clear, phase or rows";
    char wrong[1024];

    if (load.running) {
        refuse("program", "a load is running");
        return;
    }
    close_load(); /* which refers to the program */
    if (!strncmp(arguments, "clear", 5)) {
        program_clear(&program);
        problem = NULL;
    } else if (!strncmp(arguments, "phase ", 6)) {
        problem = wrong;
        if (judge_arguments(arguments + 6, PHASE_KEYS, wrong, sizeof(wrong)))
            problem = program_add_phase(&program, arguments + 6, first_page_bytes());
    } else if (!strncmp(arguments, "rows ", 5)) {
        problem = program_add_rows(&program, arguments + 5);
    }
    if (problem)
        refuse("program", "%s", problem);
    else
        reply("{\"reply\":\"program\",\"ok\":true,\"phases\":%zu}", program.count);
}

static const char *open_load(void)
{
    const char *problem = NULL;

    for (size_t d = 0; d < device_count && !problem; d++) {
        struct device *dev = &devices[d];

        if (load.offset > dev->words * 8 || load.bytes > dev->words * 8 - load.offset || !load.bytes ||
            load.offset % (dev->page_words * 8))
            return "offset, bytes: not a part of the memory that begins with a page";
        load.writes[d] = calloc(program.count, sizeof(*load.writes[d]));
        if (!load.writes[d])
            return "no memory for the load";
        /* Device i uses seed + i, so a mix-up between two devices is detected. */
        for (size_t i = 0; i < program.count && !problem; i++)
            problem = writes_open(&load.writes[d][i], &program.phases[i], load.bytes, dev->page_words * 8, d);
        if (!problem && load.by_dma) {
            problem = engine_open(dev);
            if (!problem && !dev->engine.source.data)
                problem = buffer_alloc(dev, BATCH_BYTES, &dev->engine.source);
        }
    }
    return problem;
}

/*
 * start [via=mmio|dma] [offset=N] [bytes=N] [check=N] [tick_ms=N] [KEY=VALUE of a phase...]: carry the program out on
 * this part of every device's memory, all of it if none is named. With keys of a phase, that phase is the program.
 */
void command_start(const char *arguments)
{
    const char *problem = NULL;

    if (load.running || !device_count) {
        refuse("start", load.running ? "a load is running" : "no device");
        return;
    }
    close_load();
    if (has_any(arguments, PHASE_KEYS)) {
        program_clear(&program);
        problem = program_add_phase(&program, arguments, first_page_bytes());
    }
    if (!problem && !program.count)
        problem = "nothing to write: say dirty_rate=256p, or a program first";
    if (problem) {
        refuse("start", "%s", problem);
        return;
    }
    memset(&load, 0, sizeof(load));
    load.by_dma = option_is(arguments, "via", "dma");
    load.offset = integer(arguments, "offset", 0);
    load.bytes = integer(arguments, "bytes", devices[0].words * 8 - load.offset);
    load.check_every = load.by_dma ? 0 : integer(arguments, "check", 64);
    load.tick_ns = (uint64_t)(number(arguments, "tick_ms", 0) * 1e6);
    problem = load.by_dma && claims_engine(CLAIM_DMA) ? "dma: the engine is in use" : open_load();
    if (!problem && claims_memory(CLAIM_DMA, load.offset, load.bytes))
        problem = "dma: uses some of this memory";
    load.started_ns = now_ns();
    if (!problem && !pacer_open(&load.pacer, &program, load.started_ns))
        problem = "no memory for the load";
    if (problem) {
        close_load();
        refuse("start", "%s", problem);
        return;
    }
    for (size_t d = 0; d < device_count; d++)
        write_scratch(&devices[d], program.phases[0].seed + d);
    load.running = true;
    claim(CLAIM_LOAD, load.by_dma, load.offset, load.bytes);
    reply("{\"reply\":\"start\",\"ok\":true,\"devices\":%zu,\"via\":\"%s\",\"writes_per_second\":%.10g}",
          device_count, load.by_dma ? "dma" : "mmio", program_rate(&program));
}

static void report(const char *name)
{
    uint64_t end = load.running ? now_ns() : load.stopped_ns;
    uint64_t checks = 0, errors = 0;

    for (size_t d = 0; d < device_count; d++) {
        checks += devices[d].readback_checks;
        errors += devices[d].readback_errors;
    }
    reply("{\"reply\":\"%s\",\"ok\":true,\"running\":%s,\"devices\":%zu,\"driver\":%s,\"memory_bytes\":%" PRIu64
          ",\"page_bytes\":%" PRIu64 ",\"writes\":%" PRIu64 ",\"written_bytes\":%" PRIu64 ",\"missed_writes\":%" PRIu64
          ",\"dma_errors\":%" PRIu64 ",\"elapsed_ns\":%" PRIu64 ",\"busy_ns\":%" PRIu64 ",\"max_access_ns\":%" PRIu64
          ",\"max_gap_ns\":%" PRIu64 ",\"readback_checks\":%" PRIu64 ",\"readback_errors\":%" PRIu64
          ",\"generation\":%" PRIu64 "}",
          name, load.running ? "true" : "false", device_count,
          device_count && devices[0].driver >= 0 ? "true" : "false", device_count ? devices[0].words * 8 : 0,
          device_count ? devices[0].page_words * 8 : 0, load.write_count, load.byte_count,
          load.pacer.missed * device_count,
          load.dma_errors, load.started_ns ? end - load.started_ns : 0, load.busy_ns, load.max_access_ns,
          load.max_gap_ns, checks, errors, device_count ? read64(&devices[0], REG_GENERATION) : 0);
}

void command_status(const char *arguments)
{
    (void)arguments;
    report("status");
}

void command_stop(const char *arguments)
{
    (void)arguments;
    if (load.running) {
        struct run none;

        load_settle();
        load.running = false;
        claim_release(CLAIM_LOAD);
        load.stopped_ns = now_ns();
        /* Hands nothing out: it counts what was missed since the last time. */
        pacer_take(&load.pacer, load.stopped_ns, 0, &none, 1);
    }
    report("stop");
}
