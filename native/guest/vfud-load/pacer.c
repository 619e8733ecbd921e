/*
 * When writes are due, as docs/load.md defines it.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <stdlib.h>
#include <string.h>

#include "line.h"
#include "pacer.h"

/* A load that nobody looked at for longer is late: what was due before counts as missed. */
#define CATCH_UP_NS (NS_PER_SECOND / 4)

typedef unsigned __int128 wide;

/* How many writes of a phase are due until `time_ns` of its own clock. */
static uint64_t due_until(const struct phase *phase, uint64_t time_ns)
{
    uint64_t active;

    if (phase->pattern == PATTERN_TRACE) {
        uint64_t rest = time_ns % phase->round_ns;
        size_t low = 0, high = phase->row_count;

        while (low < high) {
            size_t middle = low + (high - low) / 2;

            if (phase->rows[middle].time_ns <= rest)
                low = middle + 1;
            else
                high = middle;
        }
        return time_ns / phase->round_ns * phase->row_count + low;
    }
    if (phase->pattern == PATTERN_IDLE || !phase->up)
        return 0;
    active = time_ns;
    if (phase->on_ns < phase->period_ns) {
        uint64_t rest = time_ns % phase->period_ns;

        active = time_ns / phase->period_ns * phase->on_ns + (rest < phase->on_ns ? rest : phase->on_ns);
    }
    return (uint64_t)((wide)active * phase->up / phase->down);
}

/* The first moment at which `writes` (at least one) are due. */
static uint64_t moment_of(const struct phase *phase, uint64_t writes)
{
    wide active;

    if (phase->pattern == PATTERN_TRACE)
        return (writes - 1) / phase->row_count * phase->round_ns + phase->rows[(writes - 1) % phase->row_count].time_ns;
    if (phase->pattern == PATTERN_IDLE || !phase->up)
        return NEVER;
    active = ((wide)writes * phase->down + phase->up - 1) / phase->up;
    if (phase->on_ns < phase->period_ns)
        active = (active - 1) / phase->on_ns * phase->period_ns + (active - 1) % phase->on_ns + 1;
    return active < NEVER ? (uint64_t)active : NEVER;
}

bool pacer_open(struct pacer *pacer, const struct program *program, uint64_t now)
{
    memset(pacer, 0, sizeof(*pacer));
    pacer->program = program;
    pacer->starts = calloc(program->count, sizeof(*pacer->starts));
    pacer->next = calloc(program->count, sizeof(*pacer->next));
    if (!pacer->starts || !pacer->next) {
        pacer_close(pacer);
        return false;
    }
    for (size_t i = 0; i < program->count; i++) {
        pacer->starts[i] = pacer->cycle;
        pacer->cycle += program->phases[i].duration_ns;
    }
    pacer->origin = now;
    return true;
}

void pacer_close(struct pacer *pacer)
{
    free(pacer->starts);
    free(pacer->next);
    pacer->starts = pacer->next = NULL;
}

/* The phase at the load's clock, where its part until `target` ends, and that end on the phase's own clock. */
static size_t segment(const struct pacer *pacer, uint64_t target, uint64_t *end, uint64_t *own_end)
{
    uint64_t rounds, rest, begin, duration;
    size_t phase = 0;

    if (!pacer->cycle) {
        *end = *own_end = target == NEVER ? pacer->clock : target;
        return 0;
    }
    rounds = pacer->clock / pacer->cycle;
    rest = pacer->clock % pacer->cycle;
    while (phase + 1 < pacer->program->count && pacer->starts[phase + 1] <= rest)
        phase++;
    duration = pacer->program->phases[phase].duration_ns;
    begin = rounds * pacer->cycle + pacer->starts[phase];
    *end = begin + duration < target ? begin + duration : target;
    *own_end = rounds * duration + *end - begin;
    return phase;
}

/* How many writes of all phases are due until `time_ns` of the load's clock. */
static uint64_t total_until(const struct pacer *pacer, uint64_t time_ns)
{
    uint64_t total = 0, rounds, rest;

    if (!pacer->cycle)
        return due_until(&pacer->program->phases[0], time_ns);
    rounds = time_ns / pacer->cycle;
    rest = time_ns % pacer->cycle;
    for (size_t i = 0; i < pacer->program->count; i++) {
        const struct phase *phase = &pacer->program->phases[i];
        uint64_t part = rest > pacer->starts[i] ? rest - pacer->starts[i] : 0;

        total += due_until(phase, rounds * phase->duration_ns +
                                      (part < phase->duration_ns ? part : phase->duration_ns));
    }
    return total;
}

size_t pacer_take(struct pacer *pacer, uint64_t now, uint64_t limit, struct run *runs, size_t room)
{
    uint64_t target = now > pacer->origin ? now - pacer->origin : 0;
    size_t count = 0;

    if (target < pacer->clock)
        target = pacer->clock;
    if (target - pacer->clock > CATCH_UP_NS) {
        uint64_t late = target - pacer->clock - CATCH_UP_NS;

        pacer->missed += total_until(pacer, target) - total_until(pacer, target - late);
        pacer->origin += late;
        target -= late;
    }
    for (;;) {
        uint64_t end, own_end, due, now_due;
        size_t phase = segment(pacer, target, &end, &own_end);

        due = due_until(&pacer->program->phases[phase], own_end) - pacer->next[phase];
        now_due = due <= limit ? due : limit;
        if (now_due) {
            if (count == room)
                return count; /* the clock stands where this part begins: the next call goes on here */
            runs[count++] = (struct run){phase, pacer->next[phase], now_due};
            pacer->next[phase] += now_due;
            pacer->taken += now_due;
        }
        if (due > limit) {
            /* Behind: the clock is where the last of them was due. */
            if (limit) {
                uint64_t moment = end - (own_end - moment_of(&pacer->program->phases[phase], pacer->next[phase]));

                if (moment > pacer->clock)
                    pacer->clock = moment;
            }
            return count;
        }
        limit -= now_due;
        pacer->clock = end;
        if (end >= target)
            return count;
    }
}

uint64_t pacer_next_ns(const struct pacer *pacer)
{
    uint64_t end, own_end, moment;
    size_t phase = segment(pacer, NEVER, &end, &own_end);

    moment = moment_of(&pacer->program->phases[phase], pacer->next[phase] + 1);
    if (!pacer->cycle)
        return moment == NEVER ? NEVER : pacer->origin + moment;
    if (moment == NEVER || moment > own_end)
        return pacer->origin + end;
    return pacer->origin + end - (own_end - moment);
}
