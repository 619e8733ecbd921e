/*
 * The window: migration data in memory that the server shares, in place of messages (native/spec).
 *
 * It is made before the first data, so that a device that is not migrated has none, and ends with the connection. It
 * has three pieces: one for what is read, and two for what is written, of which one is filled while the other is sent.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "device.h"

#define PIECES 3

/* Pages that one system call tries. */
#define TRIED 256

/* Memory that cannot lose a page: a descriptor, or -errno. By system call: the functions are newer than our libc. */
static int sealed_memory(size_t size)
{
    int fd = (int)syscall(SYS_memfd_create, "vfio-preload-window", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0) {
        return -errno;
    }
    if (ftruncate(fd, (off_t)size) < 0 ||
        syscall(SYS_fcntl, fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW) < 0) {
        int error = errno;

        close(fd);
        return -error;
    }
    return fd;
}

int window_have(struct device *device)
{
    struct window *window = &device->migration.window;
    size_t most = wire_limits(device->wire)->max_window / PIECES;
    size_t piece = MIN(wire_limits(device->wire)->max_xfer, most) & ~(size_t)(PAGE_BYTES - 1);
    struct vfio_user_mig_data_window request = { sizeof(request), 0, piece * PIECES };
    int fd, result;
    void *base;

    if (window->tried || piece == 0) {
        return window->base != NULL;
    }
    window->tried = true;
    fd = sealed_memory(piece * PIECES);
    base = fd < 0 ? MAP_FAILED : mmap(NULL, piece * PIECES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        if (fd >= 0) {
            close(fd);
        }
        return 0; /* it works without */
    }
    struct wire_call call = {
        .command = VFIO_USER_MIG_DATA_WINDOW,
        .request = { { &request, sizeof(request) } },
        .send_fds = &fd,
        .send_fd_count = 1,
    };
    result = wire_call(device->wire, &call);
    trace("device %u: MIG_DATA_WINDOW of %zu bytes: %s", device->number, piece * PIECES, errno_name(result));
    if (result != 0) {
        munmap(base, piece * PIECES);
        close(fd);
        /* A server that answers has no window then; one that does not is dead. */
        return wire_dead(device->wire) ? -ENOTCONN : 0;
    }
    window->fd = internal_duplicate(fd);
    close(fd);
    window->base = base;
    window->piece = piece;
    return 1;
}

char *window_piece(const struct device *device, unsigned int number)
{
    return device->migration.window.base + number * device->migration.window.piece;
}

ssize_t window_call(struct device *device, uint16_t command, const char *data, size_t size)
{
    uint64_t offset = (uint64_t)(data - device->migration.window.base);
    struct vfio_user_mig_window_data request = { sizeof(request), (uint32_t)size, offset }, reply;
    struct wire_call call = {
        .command = command,
        .request = { { &request, sizeof(request) } },
        .head = &reply,
        .head_room = command == VFIO_USER_MIG_DATA_READ ? sizeof(reply) : 0,
    };
    int result = wire_call(device->wire, &call);

    if (result < 0 || command != VFIO_USER_MIG_DATA_READ) {
        return result < 0 ? result : (ssize_t)size;
    }
    if (call.head_size != sizeof(reply) || reply.size > size || reply.offset != offset) {
        say("%s: the server says that it put %u bytes of migration data where it was not asked to",
            config.sockets[device->number], call.head_size == sizeof(reply) ? reply.size : 0);
        return -EIO;
    }
    return (ssize_t)reply.size;
}

/*
 * Whether the pages of a buffer can be written to: the kernel puts a byte of the window at the beginning of each, as
 * the data that follows does. A page that is not there is EFAULT to the kernel, and would be a crash to us.
 */
static bool writable(const struct window *window, char *to, const char *data, size_t size)
{
    struct iovec bytes[TRIED];
    size_t count = 0, step;

    for (size_t at = 0; at < size; at += step) {
        step = PAGE_BYTES - (ADDRESS(to) + at) % PAGE_BYTES;
        bytes[count++] = (struct iovec){ to + at, 1 };
    }
    return syscall(SYS_preadv, window->fd, bytes, count, (unsigned long)(data - window->base), 0UL) == (long)count;
}

int window_deliver(const struct device *device, uint64_t to, const char *data, size_t size)
{
    const struct window *window = &device->migration.window;
    size_t part;

    /* 21 us for 1 MiB, where copy_to_user() takes 70: it looks up each page, and holds it meanwhile. What it would
     * still notice is a buffer that another thread takes away just now. */
    for (size_t done = 0; done < size; done += part) {
        char *buffer = (char *)(uintptr_t)(to + done);

        part = MIN(size - done, TRIED * PAGE_BYTES - (to + done) % PAGE_BYTES);
        if (!writable(window, buffer, data + done, part)) {
            return copy_to_user(to + done, data + done, size - done);
        }
        memcpy(buffer, data + done, part);
    }
    return 0;
}

void window_drop(struct device *device)
{
    struct window *window = &device->migration.window;

    if (window->base != NULL) {
        munmap(window->base, window->piece * PIECES);
        internal_close(window->fd);
        window->base = NULL;
    }
}
