/*
 * The command line.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "line.h"

static int line_fd = -1;
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

int open_line(const char *path)
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
    return line_fd;
}
