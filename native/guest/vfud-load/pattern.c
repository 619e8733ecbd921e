/*
 * Load patterns, as docs/load.md defines them.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arguments.h"
#include "line.h"
#include "mix.h"
#include "pattern.h"

#define DRAWS 4
enum { DRAW_PLACE, DRAW_HOT, DRAW_SLOT, DRAW_CONTENT };

typedef unsigned __int128 wide;

/* --- the program ------------------------------------------------------------------------------------------ */

void program_clear(struct program *program)
{
    for (size_t i = 0; i < program->count; i++)
        free(program->phases[i].rows);
    free(program->phases);
    memset(program, 0, sizeof(*program));
}

static wide divisor(wide a, wide b)
{
    while (b) {
        wide rest = a % b;

        a = b;
        b = rest;
    }
    return a;
}

/* What dirty_rate or write_rate say, as writes a nanosecond of a burst: phase->up / phase->down. */
static const char *rate_of(struct phase *phase, const char *arguments, uint64_t page_bytes)
{
    const char *dirty = option(arguments, "dirty_rate"), *write = option(arguments, "write_rate");
    const char *rate = option(arguments, "rate"); /* the earlier name of both, as a Workload has it */
    uint64_t span = (phase->write_bytes + page_bytes - 1) / page_bytes, amount, parts;
    wide up, down, common;
    bool pages;

    if (!!dirty + !!write + !!rate + !!option(arguments, "up") > 1)
        return "dirty_rate, write_rate, rate, up: one of them";
    if (!dirty && !write && !rate)
        return NULL;
    if (!parse_amount(dirty ? dirty : write ? write : rate, &amount, &parts, &pages) || (write && pages))
        return dirty ? "dirty_rate: pages a second (2000p) or their bytes (8M)"
               : write ? "write_rate: bytes written a second (8M)"
                       : "rate: pages a second (2000p) or bytes written (8M)";
    if (phase->period_ns >> 48 || phase->on_ns > phase->period_ns || !phase->on_ns)
        return "period_ns, on_ns: a period below 78 hours, and the part of it that writes";
    up = (wide)amount * phase->period_ns;
    down = (wide)parts * (pages ? span : dirty ? span * page_bytes : phase->write_bytes);
    common = divisor(up, down);
    up /= common;
    down = down / common * NS_PER_SECOND;
    common = divisor(up, down);
    up /= common;
    down = down / common * phase->on_ns;
    common = divisor(up, down);
    if (up / common >> 62 || down / common >> 62)
        return "a rate that this program cannot count with";
    phase->up = (uint64_t)(up / common);
    phase->down = (uint64_t)(down / common);
    return NULL;
}

const char *program_add_phase(struct program *program, const char *arguments, uint64_t page_bytes)
{
    static const char *const names[] = {"idle", "sequential", "uniform", "hotset", "zipf", "trace"};
    struct phase phase = {.pattern = PATTERN_UNIFORM}, *phases;
    uint64_t write_bytes;
    const char *problem;

    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        if (option_is(arguments, "pattern", names[i]))
            phase.pattern = (enum pattern)i;
    phase.duration_ns = integer(arguments, "duration_ns", 0);
    phase.seed = integer(arguments, "seed", 1);
    if (option(arguments, "write_size") && option(arguments, "write_bytes"))
        return "write_size, write_bytes: one of them";
    write_bytes = integer(arguments, "write_size", integer(arguments, "write_bytes", 8));
    if (write_bytes < 1 || write_bytes > 1 << 20)
        return "write_size: 1 to 1M";
    phase.write_bytes = (uint32_t)write_bytes;
    phase.hot_fraction = number(arguments, "hot_fraction", 0.1);
    phase.hot_share = number(arguments, "hot_share", 0.9);
    phase.zipf_exponent = number(arguments, "zipf_exponent", 1.0);
    phase.up = integer(arguments, "up", 0);
    phase.down = integer(arguments, "down", 1);
    phase.on_ns = integer(arguments, "on_ns", 1);
    phase.period_ns = integer(arguments, "period_ns", 1);
    phase.round_ns = integer(arguments, "round_ns", 0);
    problem = rate_of(&phase, arguments, page_bytes);
    if (problem)
        return problem;
    if (phase.pattern != PATTERN_IDLE && phase.pattern != PATTERN_TRACE && !phase.up)
        return "a rate above 0: dirty_rate=2000p, dirty_rate=8M or write_rate=8M";
    if (!(phase.hot_fraction >= 0 && phase.hot_fraction <= 1 && phase.hot_share >= 0 && phase.hot_share <= 1))
        return "hot_fraction, hot_share: 0 to 1";
    if (!(phase.zipf_exponent >= 0 && phase.zipf_exponent <= 10))
        return "zipf_exponent: 0 to 10";
    if (!phase.down || !phase.on_ns || phase.on_ns > phase.period_ns)
        return "rate: up / down writes in a nanosecond, during on_ns of period_ns";
    if (phase.pattern == PATTERN_TRACE && !phase.round_ns)
        return "trace: needs round_ns";
    if (program->count && (!phase.duration_ns || !program->phases[0].duration_ns))
        return "phases: each needs duration_ns";
    if (program->count == MAX_PHASES)
        return "phases: too many";
    phases = realloc(program->phases, (program->count + 1) * sizeof(*phases));
    if (!phases)
        return "no memory for phases";
    program->phases = phases;
    phases[program->count++] = phase;
    return NULL;
}

double program_rate(const struct program *program)
{
    double writes = 0, seconds = 0;

    for (size_t i = 0; i < program->count; i++) {
        const struct phase *phase = &program->phases[i];
        double length = program->count > 1 ? (double)phase->duration_ns / 1e9 : 1;
        double rate = (double)phase->up / (double)phase->down * 1e9 * (double)phase->on_ns / (double)phase->period_ns;

        if (phase->pattern == PATTERN_TRACE)
            rate = (double)phase->row_count / ((double)phase->round_ns / 1e9);
        writes += length * (phase->pattern == PATTERN_IDLE ? 0 : rate);
        seconds += length;
    }
    return seconds > 0 ? writes / seconds : 0;
}

const char *program_add_rows(struct program *program, const char *text)
{
    struct phase *phase = program->count ? &program->phases[program->count - 1] : NULL;

    if (!phase || phase->pattern != PATTERN_TRACE)
        return "rows belong to a trace";
    while (*text) {
        struct row row;
        char *end;

        row.time_ns = strtoull(text, &end, 10);
        row.offset = *end == ',' ? strtoull(end + 1, &end, 10) : 0;
        row.length = *end == ',' ? (uint32_t)strtoul(end + 1, &end, 10) : 0;
        if (!row.length || row.length > 1 << 20 || (*end && *end != ' ') || row.time_ns > phase->round_ns)
            return "rows: time in ns,offset,length with spaces between them";
        if (phase->row_count == phase->row_room) {
            size_t room = phase->row_room ? 2 * phase->row_room : 256;
            struct row *rows = realloc(phase->rows, room * sizeof(*rows));

            if (!rows)
                return "no memory for rows";
            phase->rows = rows;
            phase->row_room = room;
        }
        phase->rows[phase->row_count++] = row;
        text = end + strspn(end, " ");
    }
    return NULL;
}

/* --- which write comes where ------------------------------------------------------------------------------ */

static uint64_t output(uint64_t seed, uint64_t i)
{
    return mix(seed + (i + 1) * GOLDEN);
}

static uint64_t below(uint64_t x, uint64_t bound)
{
    return (x >> 32) * bound >> 32;
}

static double fraction(uint64_t x)
{
    return (double)(x >> 11) * 0x1.0p-53;
}

const char *writes_open(struct writes *writes, const struct phase *phase, uint64_t memory_bytes,
                        uint64_t page_bytes, uint64_t seed_offset)
{
    uint64_t write_bytes = phase->write_bytes;

    memset(writes, 0, sizeof(*writes));
    writes->phase = phase;
    writes->seed = phase->seed + seed_offset;
    writes->page_bytes = page_bytes;
    if (phase->pattern == PATTERN_IDLE)
        return NULL;
    if (phase->pattern == PATTERN_TRACE) {
        if (!phase->row_count)
            return "trace: no rows";
        for (size_t i = 0; i < phase->row_count; i++)
            if (phase->rows[i].offset + phase->rows[i].length > memory_bytes)
                return "trace: a row ends beyond the memory";
        return NULL;
    }
    writes->span = (write_bytes + page_bytes - 1) / page_bytes;
    writes->places = memory_bytes / page_bytes / writes->span;
    writes->slots = page_bytes / write_bytes;
    if (!writes->places)
        return "write_bytes: larger than the memory";
    if (writes->places > 1ull << 32)
        return "more than 2^32 places";
    writes->hot = (uint64_t)((double)writes->places * phase->hot_fraction);
    if (writes->hot < 1)
        writes->hot = 1;
    if (phase->pattern == PATTERN_ZIPF) {
        double sum = 0;

        if (writes->places > 1 << 24)
            return "zipf: more than 2^24 places";
        writes->sums = malloc(writes->places * sizeof(double));
        if (!writes->sums)
            return "zipf: no memory for the table";
        for (uint64_t r = 0; r < writes->places; r++)
            writes->sums[r] = sum += pow((double)(r + 1), -phase->zipf_exponent);
    }
    return NULL;
}

void writes_close(struct writes *writes)
{
    free(writes->sums);
    writes->sums = NULL;
}

static uint64_t zipf_place(const struct writes *writes, uint64_t x)
{
    double sought = fraction(x) * writes->sums[writes->places - 1];
    uint64_t low = 0, high = writes->places;

    while (low < high) {
        uint64_t middle = low + (high - low) / 2;

        if (writes->sums[middle] <= sought)
            low = middle + 1;
        else
            high = middle;
    }
    return low < writes->places ? low : writes->places - 1;
}

static uint64_t place_of(const struct writes *writes, uint64_t n)
{
    uint64_t x = output(writes->seed, DRAWS * n + DRAW_PLACE);

    switch (writes->phase->pattern) {
    case PATTERN_SEQUENTIAL:
        return n % writes->places;
    case PATTERN_HOTSET:
        if (writes->hot >= writes->places ||
            fraction(output(writes->seed, DRAWS * n + DRAW_HOT)) < writes->phase->hot_share)
            return below(x, writes->hot < writes->places ? writes->hot : writes->places);
        return writes->hot + below(x, writes->places - writes->hot);
    case PATTERN_ZIPF:
        return zipf_place(writes, x);
    default:
        return below(x, writes->places);
    }
}

uint64_t write_offset(const struct writes *writes, uint64_t n)
{
    const struct phase *phase = writes->phase;
    uint64_t offset;

    if (phase->pattern == PATTERN_TRACE)
        return phase->rows[n % phase->row_count].offset;
    offset = place_of(writes, n) * writes->span * writes->page_bytes;
    if (writes->slots > 1)
        offset += below(output(writes->seed, DRAWS * n + DRAW_SLOT), writes->slots) * phase->write_bytes;
    return offset;
}

uint32_t write_length(const struct writes *writes, uint64_t n)
{
    const struct phase *phase = writes->phase;

    return phase->pattern == PATTERN_TRACE ? phase->rows[n % phase->row_count].length : phase->write_bytes;
}

void write_content(const struct writes *writes, uint64_t n, uint64_t from, uint64_t count, uint8_t *to)
{
    uint64_t start = output(writes->seed, DRAWS * n + DRAW_CONTENT);

    for (uint64_t done = 0; done < count;) {
        uint64_t at = from + done, word = start + at / 8 * GOLDEN, piece = 8 - at % 8;

        if (piece > count - done)
            piece = count - done;
        memcpy(to + done, (uint8_t *)&word + at % 8, piece); /* x86: little endian */
        done += piece;
    }
}
