/*
 * VFU_DEV_PRELOAD_CALLS: when each call about migration begins and ends, of devices made up here and of real ones.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef CALLS_H
#define CALLS_H

#include "common.h"
#include "uapi.h"

/* Descriptors from here on are not followed; a program has lower ones first. */
#define CALLS_MAX_FD 4096

extern int calls_fd; /* -1: nothing is recorded */
extern uint8_t calls_data[CALLS_MAX_FD]; /* descriptor of migration data -> number of its device + 1 */

void calls_open(void);

/* Whether an ioctl() is one to record, and a read() or write(): asked of every call of the program. */
static inline bool calls_have_ioctl(unsigned long request)
{
    return __builtin_expect(calls_fd >= 0, 0) &&
           (request == VFIO_DEVICE_FEATURE || request == VFIO_MIG_GET_PRECOPY_INFO || request == VFIO_DEVICE_RESET);
}

static inline bool calls_have_data(int fd)
{
    return __builtin_expect(calls_fd >= 0, 0) && (unsigned int)fd < CALLS_MAX_FD &&
           __atomic_load_n(&calls_data[fd], __ATOMIC_RELAXED) != 0;
}

/* Make the call by `next`, and record it. */
int calls_ioctl(int (*next)(int, unsigned long, void *), int fd, unsigned long request, void *argument);
ssize_t calls_read(ssize_t (*next)(int, void *, size_t), int fd, void *buffer, size_t size);
ssize_t calls_write(ssize_t (*next)(int, const void *, size_t), int fd, const void *buffer, size_t size);

#endif
