/*
 * In place of log.c, config.c and interpose.c.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "instead.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "table.h"

struct config config;
int log_fd = 0; /* lines are composed, and nobody reads them */

void log_line(const char *format, ...)
{
    char line[1024];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
}

void say(const char *format, ...)
{
    char line[1024];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    if (getenv("VFU_FUZZ_SAY") != NULL) {
        fprintf(stderr, "vfio-preload: %s\n", line);
    }
}

const char *errno_name(long result)
{
    return result >= 0 ? "ok" : "error";
}

/* The library closes its own descriptors by the symbol that it interposes. */
int fuzz_close(int fd)
{
    if (ours(fd) && table_close(fd) == KEEP_IT) {
        errno = EBADF;
        return -1;
    }
    return close(fd);
}
