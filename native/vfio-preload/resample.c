/*
 * Unmasking INTx by an eventfd, which KVM signals when the guest says that it has served the interrupt.
 *
 * The kernel's vfio-pci listens to it; a vfio-user server may or may not. A thread here does, and unmasks by message.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "device.h"

struct resampler {
    struct device *device;
    pthread_t thread;
    int fd; /* our own of the caller's */
    int stop;
};

/* Take the signal, if there is one. It is the caller's open file: somebody else may read it too, and it may block. */
static bool take(int fd)
{
    uint64_t value;
    struct iovec iov = { &value, sizeof(value) };

    return syscall(SYS_preadv2, fd, &iov, 1UL, -1L, -1L, RWF_NOWAIT) == sizeof(value);
}

static void *listen_to(void *opaque)
{
    struct resampler *resampler = opaque;
    struct pollfd events[] = { { resampler->fd, POLLIN, 0 }, { resampler->stop, POLLIN, 0 } };
    const struct vfio_irq_set unmask = {
        .argsz = sizeof(unmask),
        .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK,
        .index = VFIO_PCI_INTX_IRQ_INDEX,
        .count = 1,
    };

    for (;;) {
        if (poll(events, ARRAY_SIZE(events), -1) < 0) {
            continue;
        }
        if (events[1].revents != 0) {
            return NULL;
        }
        if ((events[0].revents & POLLIN) && take(resampler->fd)) {
            int result = device_call(resampler->device, VFIO_USER_DEVICE_SET_IRQS, &unmask, sizeof(unmask));

            trace("device %u: unmasked by eventfd: %s", resampler->device->number, errno_name(result));
        } else if (events[0].revents & ~POLLIN) {
            return NULL;
        }
    }
}

static void release(struct resampler *resampler)
{
    close(resampler->fd);
    close(resampler->stop);
    free(resampler);
}

void resample_stop(struct device *device)
{
    const uint64_t one = 1;

    if (device->resampler != NULL) {
        (void)!write(device->resampler->stop, &one, sizeof(one));
        pthread_join(device->resampler->thread, NULL);
        release(device->resampler);
        device->resampler = NULL;
    }
}

int resample_start(struct device *device, int fd)
{
    struct resampler *resampler = calloc(1, sizeof(*resampler));
    sigset_t every, before;
    int error;

    resample_stop(device);
    if (resampler == NULL) {
        return -ENOMEM;
    }
    resampler->device = device;
    resampler->stop = eventfd(0, EFD_CLOEXEC);
    resampler->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (resampler->fd < 0 || resampler->stop < 0) {
        error = -errno;
        release(resampler);
        return error;
    }
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    error = pthread_create(&resampler->thread, NULL, listen_to, resampler);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) {
        release(resampler);
        return -error;
    }
    device->resampler = resampler;
    return 0;
}
