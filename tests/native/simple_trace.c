/*
 * Writes events of hw/vfio/trace-events by QEMU's own simple backend: trace/simple.c and what tracetool generates from
 * the pinned tree. Debian's QEMUs and ours are built without it.
 *
 *     simple-trace FILE <EVENTS         each line: nanoseconds, event, device, then its arguments
 *
 * The dispatcher, one branch for each event, is generated too (test_simple_trace.py).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "qemu/osdep.h"

#include "qemu/module.h"
#include "qemu/timer.h"
#include "trace/control.h"
#include "trace/simple.h"
#include "trace/trace-hw_vfio.h"

/* --- what the rest of QEMU is to the backend --- */

int use_rt_clock = 1;
int64_t clock_start;
int trace_events_enabled_count = 1;

static TraceEvent **events;
static void (*begin[4])(void);
static int begin_count;

void register_module_init(void (*function)(void), module_init_type type)
{
    begin[begin_count++] = function;
}

void trace_event_register_group(TraceEvent **group)
{
    uint32_t id = 0;

    events = group;
    for (TraceEvent **event = group; *event != NULL; event++) {
        (*event)->id = id++;
        *(*event)->dstate = 1;
    }
}

void trace_event_iter_init_all(TraceEventIter *iter)
{
    memset(iter, 0, sizeof(*iter));
}

void trace_event_iter_init_group(TraceEventIter *iter, size_t group_id)
{
    trace_event_iter_init_all(iter);
}

TraceEvent *trace_event_iter_next(TraceEventIter *iter)
{
    return events[iter->event] == NULL ? NULL : events[iter->event++];
}

void error_report(const char *format, ...)
{
    abort();
}

void warn_report(const char *format, ...)
{
    abort();
}

int qemu_printf(const char *format, ...)
{
    return 0;
}

/* The clock is that of the line. */
static struct timespec now;

int clock_gettime(clockid_t clock, struct timespec *time)
{
    *time = now;
    return 0;
}

/* --- lines --- */

static char *words[16];

static uint64_t number(int index)
{
    return strtoull(words[index], NULL, 0);
}

static void emit(void)
{
    const char *name = words[1], *device = words[2];

#include "dispatch.inc"
    abort(); /* no such event */
}

int main(int argc, char **argv)
{
    char line[1024];

    for (int i = 0; i < begin_count; i++) {
        begin[i]();
    }
    if (argc != 2 || !st_init()) {
        return 2;
    }
    st_set_trace_file(argv[1]);
    st_set_trace_file_enabled(true);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        int count = 0;
        uint64_t at;

        for (char *word = strtok(line, " \n"); word != NULL && count < 16; word = strtok(NULL, " \n")) {
            words[count++] = word;
        }
        at = number(0);
        now.tv_sec = (time_t)(at / 1000000000);
        now.tv_nsec = (long)(at % 1000000000);
        emit();
        st_flush_trace_buffer(); /* or it would drop events: nobody waits for its thread here */
    }
    st_flush_trace_buffer();
    return 0;
}
