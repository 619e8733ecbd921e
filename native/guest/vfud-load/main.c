/*
 * The command line, and what all files of this program need.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"
#include "vfud-load.h"

#define GENERATION_POLL_NS 250000000ull
/* Well below CATCH_UP_NS: a load that nobody looked at for that long counts as late, even in its pauses. */
#define MAX_WAIT_NS 50000000ull

static int line_fd = -1;

/* --- the line --------------------------------------------------------------------------------------------- */

static char answer[1 << 16];
static size_t answered;

uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * NS_PER_SECOND + (uint64_t)ts.tv_nsec;
}

void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fprintf(stderr, "vfud-load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static void add(const char *format, va_list arguments)
{
    size_t room = sizeof(answer) - 1 - answered;
    int needed = vsnprintf(answer + answered, room, format, arguments);

    if (needed < 0 || (size_t)needed >= room)
        die("a reply of more than %zu bytes", sizeof(answer));
    answered += (size_t)needed;
}

/* Lines are short, so a blocking write of a whole line is fine. */
void reply_end(void)
{
    size_t done = 0;

    answer[answered++] = '\n';
    while (done < answered) {
        ssize_t n = write(line_fd, answer + done, answered - done);

        if (n < 0 && errno != EINTR && errno != EAGAIN)
            die("writing to the command line: %s", strerror(errno));
        if (n > 0)
            done += (size_t)n;
    }
    answered = 0;
}

void reply_part(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    add(format, arguments);
    va_end(arguments);
}

void reply(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    add(format, arguments);
    va_end(arguments);
    reply_end();
}

void refuse(const char *command, const char *format, ...)
{
    va_list arguments;

    reply_part("{\"reply\":\"%s\",\"ok\":false,\"error\":\"", command);
    va_start(arguments, format);
    add(format, arguments);
    va_end(arguments);
    reply_part("\"}");
    reply_end();
}

/* --- commands --------------------------------------------------------------------------------------------- */

const char *option(const char *arguments, const char *key)
{
    size_t length = strlen(key);

    for (const char *at = arguments; at && *at; at = strchr(at, ' ')) {
        while (*at == ' ')
            at++;
        if (!strncmp(at, key, length) && at[length] == '=')
            return at + length + 1;
    }
    return NULL;
}

bool option_is(const char *arguments, const char *key, const char *word)
{
    const char *text = option(arguments, key);
    size_t length = strlen(word);

    return text && !strncmp(text, word, length) && (text[length] == ' ' || text[length] == '\0');
}

double number(const char *arguments, const char *key, double fallback)
{
    const char *text = option(arguments, key);

    return text ? strtod(text, NULL) : fallback;
}

uint64_t integer(const char *arguments, const char *key, uint64_t fallback)
{
    const char *text = option(arguments, key);

    return text ? strtoull(text, NULL, 0) : fallback;
}

static const struct {
    const char *name;
    void (*run)(const char *arguments);
} commands[] = {
    {"program", command_program},
    {"start", command_start},
    {"stop", command_stop},
    {"status", command_status},
    {"verify", command_verify},
    {"dma", command_dma},
    {"dma-status", command_dma_status},
    {"dma-stop", command_dma_stop},
    {"writer", command_writer},
    {"writer-check", command_writer_check},
    {"reset", command_reset},
    {"irq", command_irq},
    {"irqs", command_irqs},
    {"irq-raise", command_irq_raise},
    {"irq-mask", command_irq_mask},
    {"lspci", command_lspci},
    {"dmesg", command_dmesg},
    {"config", command_config},
    {"release", command_release},
    {"rescan", command_rescan},
    {"reboot", command_reboot},
};

static void execute(char *line)
{
    char *arguments = strchr(line, ' ');

    if (arguments)
        *arguments++ = '\0';
    else
        arguments = line + strlen(line);
    for (size_t i = 0; i < sizeof(commands) / sizeof(*commands); i++) {
        if (!strcmp(line, commands[i].name)) {
            commands[i].run(arguments);
            return;
        }
    }
    /* The name goes back into JSON, so that whoever waits for a reply to it gets one. */
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

static void open_line(const char *path)
{
    struct termios settings;

    line_fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (line_fd < 0)
        die("%s: %s", path, strerror(errno));
    if (tcgetattr(line_fd, &settings) == 0) {
        cfmakeraw(&settings);
        settings.c_cflag |= CLOCAL | CREAD;
        cfsetspeed(&settings, B115200);
        tcsetattr(line_fd, TCSANOW, &settings);
    }
}

static uint64_t soonest(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

int main(int argc, char **argv)
{
    uint64_t last_poll = 0;

    if (argc == 5 && !strcmp(argv[1], "--dump"))
        return dump(strtoull(argv[2], NULL, 0), strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0));
    if (argc != 2) {
        fprintf(stderr, "usage: %s SERIAL | --dump MEMORY_BYTES PAGE_BYTES SEED_OFFSET\n", argv[0]);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    open_line(argv[1]);
    find_devices();
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
