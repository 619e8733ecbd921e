/*
 * How a target says that something does not hold, and that nothing is left open.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "check.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

/* A new descriptor has the lowest number that is free, so that one left open is among the first. */
#define PROBED 96

static bool open_before[PROBED];

void fault(const char *format, ...)
{
    va_list arguments;

    fprintf(stderr, "FAULT: ");
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    abort();
}

void descriptors_before(void)
{
    for (int fd = 0; fd < PROBED; fd++) {
        open_before[fd] = fcntl(fd, F_GETFD) >= 0;
    }
}

void descriptors_after(void)
{
    for (int fd = 0; fd < PROBED; fd++) {
        if ((fcntl(fd, F_GETFD) >= 0) != open_before[fd]) {
            fault("descriptor %d is %s", fd, open_before[fd] ? "closed" : "left open");
        }
    }
}
