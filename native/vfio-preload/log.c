/*
 * What the library says: to the user on stderr, and to VFU_DEV_PRELOAD_LOG about each call.
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
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

int log_fd = -1;

/* One write() a line, through no function that this library interposes: lines of threads do not mix. */
static void write_line(int fd, const char *line, int length, size_t room)
{
    size_t size = length < 0 ? 0 : MIN((size_t)length, room - 1);

    (void)!syscall(SYS_write, fd, line, size);
}

void log_line(const char *format, ...)
{
    int saved = errno;
    struct timespec now;
    char line[1024];
    va_list arguments;
    int length;

    clock_gettime(CLOCK_REALTIME, &now);
    length = snprintf(line, sizeof(line), "%lld.%06ld %ld ", (long long)now.tv_sec, now.tv_nsec / 1000,
                      syscall(SYS_gettid));
    va_start(arguments, format);
    length += vsnprintf(line + length, sizeof(line) - 1 - (size_t)length, format, arguments);
    va_end(arguments);
    length = MIN(length, (int)sizeof(line) - 2);
    line[length++] = '\n';
    write_line(log_fd, line, length, sizeof(line));
    errno = saved;
}

void say(const char *format, ...)
{
    int saved = errno;
    char line[1024];
    va_list arguments;
    int length;

    length = snprintf(line, sizeof(line), "vfio-preload: ");
    va_start(arguments, format);
    length += vsnprintf(line + length, sizeof(line) - 1 - (size_t)length, format, arguments);
    va_end(arguments);
    length = MIN(length, (int)sizeof(line) - 2);
    line[length] = '\0';
    trace("says: %s", line + strlen("vfio-preload: "));
    line[length++] = '\n';
    write_line(STDERR_FILENO, line, length, sizeof(line));
    errno = saved;
}

int append_to(const char *variable, const char *otherwise)
{
    const char *path = getenv(variable);
    int fd, high;

    if (path == NULL || *path == '\0') {
        return -1;
    }
    fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0) {
        say("%s=%s: %s; %s", variable, path, strerror(errno), otherwise);
        return -1;
    }
    high = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, INTERNAL_FROM);
    if (high < 0) {
        return fd;
    }
    syscall(SYS_close, fd);
    return high;
}

void log_open(void)
{
    log_fd = append_to("VFU_DEV_PRELOAD_LOG", "there is no log");
}

/* "ok", or the name of the error; strerrorname_np() is younger than the C libraries to run with. */
const char *errno_name(long result)
{
    static const struct {
        int number;
        const char *name;
    } names[] = {
#define NAME(number) { number, #number }
        NAME(EPERM), NAME(ENOENT), NAME(EIO), NAME(ENXIO), NAME(E2BIG), NAME(EBADF), NAME(EAGAIN), NAME(ENOMEM),
        NAME(EFAULT), NAME(EBUSY), NAME(EEXIST), NAME(ENODEV), NAME(EINVAL), NAME(EMFILE), NAME(ENOTTY),
        NAME(ENOSPC), NAME(ESPIPE), NAME(ENOMSG), NAME(EPROTO), NAME(EOVERFLOW), NAME(EMSGSIZE), NAME(EOPNOTSUPP),
        NAME(ENOTCONN), NAME(ETIMEDOUT), NAME(ECONNREFUSED), NAME(ECONNRESET), NAME(ENOSYS), NAME(EACCES),
#undef NAME
    };
    static __thread char other[32];

    if (result >= 0) {
        return "ok";
    }
    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        if (names[i].number == -result) {
            return names[i].name;
        }
    }
    snprintf(other, sizeof(other), "error %ld", -result);
    return other;
}
