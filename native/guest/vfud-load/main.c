/*
 * vfud-load: drive every vfu-dev device in this guest, remember what was written, and check it.
 *
 * The lab starts this program from the guest's init and talks to it over a serial port: one command a line
 * ("irq mode=msix"), one JSON object a line back. While it works, the VM may be moved to another host; the journals
 * (what the device's memory and the buffers must hold) live in guest RAM and move with it, so "verify" on the other
 * side compares the device with what the guest knows, not with what a server claims.
 *
 * Registers, identifiers and the FILL pattern are the reference device's (docs/device.md).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "arguments.h"
#include "device.h"
#include "dma.h"
#include "dump.h"
#include "irq.h"
#include "line.h"
#include "load.h"
#include "pacer.h"
#include "pattern.h"
#include "pci.h"
#include "verify.h"
#include "writer.h"

#define GENERATION_POLL_NS 250000000ull
/* Well below CATCH_UP_NS: a load that nobody looked at for that long counts as late, even in its pauses. */
#define MAX_WAIT_NS 50000000ull

static int line_fd = -1;

/* --- commands --------------------------------------------------------------------------------------------- */

/* With the keys that a command has, as judge_arguments() takes them; NULL: it judges its arguments itself. */
static const struct {
    const char *name;
    void (*run)(const char *arguments);
    const char *keys;
} commands[] = {
    {"program", command_program, NULL},
    {"start", command_start, "via=mmio|dma offset# bytes# check# tick_ms. " PHASE_KEYS},
    {"stop", command_stop, ""},
    {"status", command_status, ""},
    {"verify", command_verify, "via=auto|mmio|dma"},
    {"dma", command_dma, "rate# vector# offset# bytes# buffers# buffer_bytes# max_bytes# batch# seed#"},
    {"dma-status", command_dma_status, ""},
    {"dma-stop", command_dma_stop, ""},
    {"writer", command_writer, "buffer# rate# device#"},
    {"writer-check", command_writer_check, "again=0|1"},
    {"reset", command_reset, "kind=kernel|soft device#"},
    {"irq", command_irq, "mode=none|intx|msi|msix vectors#"},
    {"irqs", command_irqs, ""},
    {"irq-raise", command_irq_raise, "vector# count# wait_ms#"},
    {"irq-mask", command_irq_mask, "vector# masked=0|1"},
    {"lspci", command_lspci, "device#"},
    {"dmesg", command_dmesg, "level# match"},
    {"config", command_config, "offset# size=1|2|4 value# device#"},
    {"release", command_release, "device#"},
    {"rescan", command_rescan, ""},
    {"reboot", command_reboot, ""},
};

static void execute(char *line)
{
    char *arguments = strchr(line, ' ');

    if (arguments)
        *arguments++ = '\0';
    else
        arguments = line + strlen(line);
    for (size_t i = 0; i < sizeof(commands) / sizeof(*commands); i++) {
        char problem[1024];

        if (strcmp(line, commands[i].name))
            continue;
        if (commands[i].keys && !judge_arguments(arguments, commands[i].keys, problem, sizeof(problem)))
            refuse(line, "%s", problem);
        else
            commands[i].run(arguments);
        return;
    }
    /* The name goes back into JSON, so that a client that waits for a reply to it gets one. */
    if (line[strspn(line, "abcdefghijklmnopqrstuvwxyz-")])
        line = "unknown";
    reply_part("{\"reply\":\"%s\",\"ok\":false,\"error\":\"commands:", line);
    for (size_t i = 0; i < sizeof(commands) / sizeof(*commands); i++)
        reply_part(" %s", commands[i].name);
    reply_part("\"}");
    reply_end();
}

static void read_commands(void)
{
    static char line[4096];
    static size_t used;
    char buffer[128];
    ssize_t n = read(line_fd, buffer, sizeof(buffer));

    for (ssize_t i = 0; i < n; i++) {
        if (buffer[i] == '\n' || buffer[i] == '\r') {
            line[used] = '\0';
            if (used)
                execute(line);
            used = 0;
        } else if (used < sizeof(line) - 1) {
            line[used++] = buffer[i];
        }
    }
}

static uint64_t soonest(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

int main(int argc, char **argv)
{
    uint64_t last_poll = 0;
    char left[LEFT_BYTES];

    if (argc == 5 && !strcmp(argv[1], "--dump"))
        return dump(strtoull(argv[2], NULL, 0), strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0));
    if (argc != 2) {
        fprintf(stderr, "usage: %s SERIAL | --dump MEMORY_BYTES PAGE_BYTES SEED_OFFSET\n", argv[0]);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    line_fd = open_line(argv[1]);
    find_devices(left, sizeof(left));
    reply("{\"event\":\"ready\",\"devices\":%zu}", device_count);
    for (;;) {
        uint64_t wait_ns = soonest(load_running() ? run_load() : NEVER, dma_running() ? run_dma_load() : NEVER);
        uint64_t now = now_ns();
        struct pollfd waited = {.fd = line_fd, .events = POLLIN};
        struct timespec timeout;

        if (now - last_poll >= GENERATION_POLL_NS) {
            last_poll = now;
            poll_generations();
        }
        if (wait_ns > MAX_WAIT_NS)
            wait_ns = MAX_WAIT_NS;
        timeout.tv_sec = (time_t)(wait_ns / NS_PER_SECOND);
        timeout.tv_nsec = (long)(wait_ns % NS_PER_SECOND);
        if (ppoll(&waited, 1, &timeout, NULL) > 0)
            read_commands();
    }
}
