/*
 * Closing, duplicating and sending descriptors.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device.h"
#include "symbols.h"

#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC (1U << 2)
#endif

EXPORT int close(int fd)
{
    if (ours(fd)) {
        symbol_count(SYM_close);
        if (table_close(fd) == KEEP_IT) {
            errno = EBADF;
            return -1;
        }
    }
    return NEXT(close, int, int)(fd);
}

/* Close what is ours in a range; call `rest` for each part of it that has nothing in it that stays open. */
static int close_parts(unsigned int first, unsigned int last, int flags)
{
    int result = 0;

    for (unsigned int fd = first; fd <= last && fd < TABLE_SIZE; fd++) {
        if (ours((int)fd) && table_close((int)fd) == KEEP_IT) {
            if (fd > first) {
                result |= (int)syscall(SYS_close_range, first, fd - 1, flags);
            }
            first = fd + 1;
        }
    }
    return first > last ? result : result | (int)syscall(SYS_close_range, first, last, flags);
}

EXPORT int close_range(unsigned int first, unsigned int last, int flags)
{
    if (active && first <= last && !(flags & (int)CLOSE_RANGE_CLOEXEC)) {
        symbol_count(SYM_close_range);
        return close_parts(first, last, flags);
    }
    return NEXT(close_range, int, unsigned int, unsigned int, int)(first, last, flags);
}

EXPORT void closefrom(int first)
{
    if (active && close_parts(first < 0 ? 0 : (unsigned int)first, UINT32_MAX, 0) == 0) {
        symbol_count(SYM_closefrom);
        return;
    }
    NEXT(closefrom, void, int)(first);
}

EXPORT int dup(int fd)
{
    int copy = NEXT(dup, int, int)(fd);

    if (ours(fd) && copy >= 0) {
        symbol_count(SYM_dup);
        table_copy(fd, copy);
    }
    return copy;
}

/* dup2() and dup3() close what was there. */
static int duplicated(enum symbol symbol, int from, int to, int result)
{
    if (result >= 0 && from != to && (ours(from) || ours(to))) {
        symbol_count(symbol);
        table_close(to);
        table_copy(from, to);
    }
    return result;
}

static bool taken(int fd)
{
    if (!ours(fd) || table_is_file(fd)) {
        return false;
    }
    errno = EBUSY; /* in use here; the program does not know of it */
    return true;
}

EXPORT int dup2(int from, int to)
{
    return taken(to) ? -1 : duplicated(SYM_dup2, from, to, NEXT(dup2, int, int, int)(from, to));
}

EXPORT int dup3(int from, int to, int flags)
{
    return taken(to) ? -1 : duplicated(SYM_dup3, from, to, NEXT(dup3, int, int, int, int)(from, to, flags));
}

#define FCNTL(name) \
    EXPORT int name(int fd, int command, ...) \
    { \
        va_list arguments; \
        void *argument; \
        int result; \
\
        va_start(arguments, command); \
        argument = va_arg(arguments, void *); \
        va_end(arguments); \
        result = NEXT(name, int, int, int, ...)(fd, command, argument); \
        if (ours(fd) && result >= 0 && (command == F_DUPFD || command == F_DUPFD_CLOEXEC)) { \
            symbol_count(SYM_##name); \
            table_copy(fd, result); \
        } \
        return result; \
    }

FCNTL(fcntl)
FCNTL(fcntl64)

/* What is sent elsewhere is an open /dev/null there. And a message may say that migration data has arrived. */
EXPORT ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    collectors_flush_thread();
    for (struct cmsghdr *part = active ? CMSG_FIRSTHDR(message) : NULL; part != NULL;
         part = CMSG_NXTHDR((struct msghdr *)(uintptr_t)message, part)) {
        size_t size = part->cmsg_len - CMSG_LEN(0);

        bool rights = part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS;

        for (size_t i = 0; rights && i < size / sizeof(int); i++) {
            int sent;

            memcpy(&sent, CMSG_DATA(part) + i * sizeof(sent), sizeof(sent));
            if (table_is_file(sent)) {
                symbol_count(SYM_sendmsg);
                say("descriptor %d is a made-up VFIO file, which works in this process only: it is not sent", sent);
                errno = EOPNOTSUPP;
                return -1;
            }
        }
    }
    return NEXT(sendmsg, ssize_t, int, const struct msghdr *, int)(fd, message, flags);
}
