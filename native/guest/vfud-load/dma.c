/*
 * The DMA load: batches of random descriptors, of every operation, between a part of device memory and buffers in
 * guest memory. A device does them in their order, so what both sides hold in the end is known when a batch is handed
 * over: the journal gets the same done to it at once.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arguments.h"
#include "claim.h"
#include "crc.h"
#include "device.h"
#include "dma.h"
#include "engine.h"
#include "line.h"
#include "mix.h"

#define MAX_BUFFERS 8
#define MAX_BATCH 64
/* Wait for an interrupt after the end of its run; a busy host delays it by seconds. */
#define INTERRUPT_NS (20 * NS_PER_SECOND)
#define RUN_TIMEOUT_NS (20 * NS_PER_SECOND)

static struct {
    bool running;
    int vector; /* -1: polled */
    double rate;
    uint64_t offset, bytes, max_bytes;
    uint32_t batch;
    uint64_t seed;
    uint64_t started_ns, stopped_ns;
} plan;

/* What each device has done, and is doing. */
struct dma_state {
    struct buffer buffers[MAX_BUFFERS];
    uint8_t *journals[MAX_BUFFERS];
    size_t buffer_count;
    uint64_t seed, draws;
    uint32_t submitted; /* descriptors under way */
    uint64_t expected[MAX_BATCH];
    uint64_t submitted_ns, ended_ns;
    uint64_t interrupts; /* counted before this batch */
    uint64_t first_interrupts;
    uint64_t batches, descriptors, moved_bytes;
    uint64_t errors, lost_interrupts;
    char first_error[160];
};

bool dma_running(void)
{
    return plan.running;
}

static uint64_t draw(struct dma_state *state)
{
    return mix(state->seed + ++state->draws * GOLDEN);
}

/* How often the vector was handled; false: it was not taken by `irq`. */
static bool count_interrupts(const struct device *dev, uint64_t *count)
{
    return pread(dev->driver, count, sizeof(*count), plan.vector * (off_t)sizeof(*count)) == sizeof(*count);
}

static uint64_t interrupts_of(const struct device *dev)
{
    uint64_t count = 0;

    if (plan.vector >= 0)
        count_interrupts(dev, &count);
    return count;
}

static void fill(uint8_t *to, uint64_t value, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++)
        to[i] = (uint8_t)(value >> 8 * (i % 8));
}

/* Make up a descriptor and do to the journals what it will do; returns the result it must report. */
static uint64_t make_up(struct dma_state *state, struct device *dev, struct descriptor *descriptor)
{
    size_t b = draw(state) % state->buffer_count;
    uint64_t length = 1 + draw(state) % plan.max_bytes;
    uint64_t at = draw(state) % (state->buffers[b].bytes - length + 1);
    uint64_t offset = plan.offset + draw(state) % (plan.bytes - length + 1);
    uint8_t *guest = state->journals[b] + at, *device = (uint8_t *)dev->journal + offset;

    *descriptor = (struct descriptor){
        .op = OP_TO_DEVICE + (uint32_t)(draw(state) % 6),
        .address = state->buffers[b].address + at,
        .offset = offset,
        .length = length,
        .value = draw(state),
    };
    switch (descriptor->op) {
    case OP_TO_DEVICE:
        memcpy(device, guest, length);
        break;
    case OP_TO_GUEST:
        memcpy(guest, device, length);
        break;
    case OP_FILL_GUEST:
        fill(guest, descriptor->value, length);
        break;
    case OP_FILL_DEVICE:
        fill(device, descriptor->value, length);
        break;
    case OP_CHECKSUM_GUEST:
        return crc32(guest, length);
    case OP_CHECKSUM_DEVICE:
        return crc32(device, length);
    }
    return length;
}

static void submit(struct device *dev)
{
    struct dma_state *state = dev->dma;
    struct descriptor *table = engine_table(dev);

    for (uint32_t i = 0; i < plan.batch; i++) {
        state->expected[i] = make_up(state, dev, &table[i]);
        state->moved_bytes += table[i].length;
    }
    if (plan.vector >= 0) {
        table[plan.batch - 1].flags = FLAG_INTERRUPT;
        table[plan.batch - 1].vector = (uint32_t)plan.vector;
        state->interrupts = interrupts_of(dev);
    }
    state->submitted = plan.batch;
    state->submitted_ns = now_ns();
    state->ended_ns = 0;
    engine_submit(dev, plan.batch);
}

static void note_error(struct dma_state *state, uint32_t i, const struct descriptor *descriptor)
{
    if (!state->errors++)
        snprintf(state->first_error, sizeof(state->first_error),
                 "batch %" PRIu64 ", descriptor %u: op %u, status %u, result %" PRIx64 " instead of %" PRIx64,
                 state->batches, i, descriptor->op, descriptor->status, descriptor->result, state->expected[i]);
}

/* Whether the device's batch has come to its end, its interrupt included; what it left is looked at once. */
static bool ended(struct device *dev)
{
    struct dma_state *state = dev->dma;
    const struct descriptor *table = engine_table(dev);
    uint64_t now;

    if (!state->submitted)
        return true;
    if (engine_busy(dev)) {
        if (now_ns() - state->submitted_ns < RUN_TIMEOUT_NS)
            return false;
        dev->engine.count = 0;
    }
    now = now_ns();
    if (!state->ended_ns)
        state->ended_ns = now;
    if (plan.vector >= 0 && interrupts_of(dev) == state->interrupts) {
        if (now - state->ended_ns < INTERRUPT_NS)
            return false;
        state->lost_interrupts++;
    }
    for (uint32_t i = 0; i < state->submitted; i++)
        if (table[i].status != STATUS_DONE || table[i].result != state->expected[i])
            note_error(state, i, &table[i]);
    state->batches++;
    state->descriptors += state->submitted;
    state->submitted = 0;
    return true;
}

uint64_t run_dma_load(void)
{
    uint64_t wait = NS_PER_SECOND, now = now_ns();

    for (size_t d = 0; d < device_count; d++) {
        struct device *dev = &devices[d];
        uint64_t due = plan.started_ns + (uint64_t)((double)dev->dma->moved_bytes / plan.rate * 1e9);

        if (!ended(dev)) {
            wait = 200000;
        } else if (due <= now) {
            submit(dev);
            wait = 100000;
        } else if (due - now < wait) {
            wait = due - now;
        }
    }
    return wait;
}

void dma_settle(void)
{
    for (size_t d = 0; d < device_count; d++)
        while (plan.running && !ended(&devices[d]))
            usleep(100);
}

uint64_t dma_mismatched(const struct device *dev)
{
    uint64_t mismatched = 0;

    for (size_t b = 0; dev->dma && b < dev->dma->buffer_count; b++) {
        const struct buffer *buffer = &dev->dma->buffers[b];
        const uint8_t *journal = dev->dma->journals[b];

        if (memcmp(buffer->data, journal, buffer->bytes))
            for (uint64_t i = 0; i < buffer->bytes; i++)
                mismatched += buffer->data[i] != journal[i];
    }
    return mismatched;
}

void dma_forget(struct device *dev)
{
    for (size_t b = 0; dev->dma && b < dev->dma->buffer_count; b++) {
        buffer_forget(&dev->dma->buffers[b]);
        free(dev->dma->journals[b]);
    }
    free(dev->dma);
    dev->dma = NULL;
}

static const char *open_buffer(struct device *dev, uint64_t bytes)
{
    struct dma_state *state = dev->dma;
    struct buffer *buffer = &state->buffers[state->buffer_count];
    uint8_t *journal = malloc(bytes);
    const char *problem = journal ? buffer_alloc(dev, bytes, buffer) : "no memory for a journal";

    if (problem) {
        free(journal);
        return problem;
    }
    for (uint64_t i = 0; i < bytes; i += 8) {
        uint64_t word = draw(state);

        memcpy(buffer->data + i, &word, 8);
        memcpy(journal + i, &word, 8);
    }
    state->journals[state->buffer_count++] = journal;
    return NULL;
}

static const char *open_state(struct device *dev, uint64_t seed, size_t buffers, uint64_t bytes)
{
    const char *problem = engine_open(dev);

    if (!dev->dma)
        dev->dma = calloc(1, sizeof(*dev->dma));
    if (!problem && !dev->dma)
        problem = "no memory";
    if (!problem)
        dev->dma->seed = seed;
    while (!problem && dev->dma->buffer_count < buffers)
        problem = open_buffer(dev, bytes);
    return problem;
}

static const char *problem_of_plan(size_t buffers, uint64_t bytes)
{
    if (!(plan.rate > 0))
        return "rate: bytes a second, above 0";
    if (buffers < 1 || buffers > MAX_BUFFERS || bytes < 4096 || bytes % 4096)
        return "buffers: 1 to 8, of buffer_bytes, a multiple of 4096";
    if (plan.batch < 1 || plan.batch > MAX_BATCH)
        return "batch: 1 to 64 descriptors";
    for (size_t d = 0; d < device_count; d++) {
        uint64_t count;

        if (plan.vector >= 0 && !count_interrupts(&devices[d], &count))
            return "vector: not one that was taken by irq, on each device";
        if (plan.offset > devices[d].words * 8 || plan.bytes > devices[d].words * 8 - plan.offset || !plan.bytes)
            return "offset, bytes: not a part of the memory";
        if (devices[d].dma && devices[d].dma->buffer_count && devices[d].dma->buffers[0].bytes != bytes)
            return "buffer_bytes: stays what it was";
    }
    if (plan.max_bytes < 1 || plan.max_bytes > bytes || plan.max_bytes > plan.bytes)
        return "max_bytes: at most a buffer, and that part of device memory";
    if (claims_engine(CLAIM_LOAD) || claims_memory(CLAIM_LOAD, plan.offset, plan.bytes))
        return "a load uses the engine or this memory";
    return NULL;
}

/*
 * dma rate=BYTES_A_SECOND [vector=N] [offset=N] [bytes=N] [buffers=N] [buffer_bytes=N] [max_bytes=N] [batch=N] [seed=N]: start the
 * DMA load on every device. With a vector each batch ends with an interrupt, which has to come; else it is polled for.
 */
void command_dma(const char *arguments)
{
    size_t buffers = integer(arguments, "buffers", 4);
    uint64_t bytes = integer(arguments, "buffer_bytes", 65536), half;
    const char *problem;

    if (plan.running || !device_count) {
        refuse("dma", plan.running ? "it is running" : "no device");
        return;
    }
    half = devices[0].words * 4;
    plan.rate = (double)integer(arguments, "rate", 0);
    plan.vector = option(arguments, "vector") ? (int)integer(arguments, "vector", 0) : -1;
    plan.offset = integer(arguments, "offset", half);
    plan.bytes = integer(arguments, "bytes", half);
    plan.max_bytes = integer(arguments, "max_bytes", 16384);
    plan.batch = (uint32_t)integer(arguments, "batch", 8);
    plan.seed = integer(arguments, "seed", 1);
    problem = problem_of_plan(buffers, bytes);
    for (size_t d = 0; d < device_count && !problem; d++)
        problem = open_state(&devices[d], plan.seed + d * 0x10001, buffers, bytes);
    if (problem) {
        refuse("dma", "%s", problem);
        return;
    }
    for (size_t d = 0; d < device_count; d++) {
        struct dma_state *state = devices[d].dma;

        state->moved_bytes = state->batches = state->descriptors = 0;
        state->first_interrupts = interrupts_of(&devices[d]);
    }
    plan.started_ns = now_ns();
    plan.running = true;
    claim(CLAIM_DMA, true, plan.offset, plan.bytes);
    reply("{\"reply\":\"dma\",\"ok\":true,\"devices\":%zu}", device_count);
}

static void report(const char *name)
{
    uint64_t batches = 0, descriptors = 0, bytes = 0, errors = 0, lost = 0, lost_statuses = 0, came = 0, mismatched = 0;
    uint64_t end = plan.running ? now_ns() : plan.stopped_ns;
    const char *first = "";

    for (size_t d = 0; d < device_count; d++) {
        const struct dma_state *state = devices[d].dma;

        if (!state)
            continue;
        batches += state->batches;
        descriptors += state->descriptors;
        bytes += state->moved_bytes;
        errors += state->errors;
        lost += state->lost_interrupts;
        lost_statuses += devices[d].engine.lost_statuses;
        came += interrupts_of(&devices[d]) - state->first_interrupts;
        if (!plan.running)
            mismatched += dma_mismatched(&devices[d]);
        if (!*first)
            first = state->first_error;
    }
    reply("{\"reply\":\"%s\",\"ok\":true,\"running\":%s,\"batches\":%" PRIu64 ",\"descriptors\":%" PRIu64
          ",\"moved_bytes\":%" PRIu64 ",\"errors\":%" PRIu64 ",\"first_error\":\"%s\",\"interrupts\":%" PRIu64
          ",\"lost_interrupts\":%" PRIu64 ",\"lost_statuses\":%" PRIu64 ",\"mismatched_bytes\":%" PRIu64
          ",\"elapsed_ns\":%" PRIu64 "}",
          name, plan.running ? "true" : "false", batches, descriptors, bytes, errors, first, came, lost,
          lost_statuses, mismatched, end - plan.started_ns);
}

/* dma-status: how far it is; mismatches are counted when it is stopped. */
void command_dma_status(const char *arguments)
{
    (void)arguments;
    report("dma-status");
}

/* dma-stop: let the batches under way end, and compare the buffers with the journal. */
void command_dma_stop(const char *arguments)
{
    (void)arguments;
    dma_settle();
    if (plan.running)
        plan.stopped_ns = now_ns();
    plan.running = false;
    claim_release(CLAIM_DMA);
    report("dma-stop");
}
