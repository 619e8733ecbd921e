/*
 * Interrupts: their eventfds go to the server, which signals them itself.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

long irq_info(struct device *device, void *argument)
{
    struct vfio_irq_info info, reply;
    int result = fetch_argsz(&info, argument, sizeof(info));
    struct wire_call call = {
        .command = VFIO_USER_DEVICE_GET_IRQ_INFO,
        .request = { { &info, sizeof(info) } },
        .head = &reply,
        .head_room = sizeof(reply),
    };

    if (result < 0) {
        return result;
    }
    if (info.index >= device->info.num_irqs) {
        return -EINVAL;
    }
    info.argsz = sizeof(info);
    info.flags = info.count = 0;
    result = wire_call(device->wire, &call);
    if (result < 0) {
        return result;
    }
    if (call.head_size != sizeof(reply) || reply.index != info.index || reply.count > MAX_IRQ_COUNT) {
        say("%s: the server sent impossible information about interrupts of kind %u", config.sockets[device->number],
            info.index);
        return -EIO;
    }
    reply.argsz = sizeof(reply);
    trace("device %u: interrupts of kind %u: %u, flags %#x", device->number, reply.index, reply.count, reply.flags);
    return copy_to_user(ADDRESS(argument), &reply, sizeof(reply));
}

static int send_set(struct device *device, const struct vfio_irq_set *asked, const void *data, size_t size,
                    const int *fds, size_t fd_count)
{
    struct wire_call call = {
        .command = VFIO_USER_DEVICE_SET_IRQS,
        .send_fds = fds,
        .send_fd_count = fd_count,
    };
    struct vfio_irq_set set = *asked;
    int result;

    set.argsz = (uint32_t)(sizeof(set) + size);
    call.request[0] = (struct iovec){ &set, sizeof(set) };
    call.request[1] = (struct iovec){ (void *)(uintptr_t)data, size };
    result = wire_call(device->wire, &call);
    trace("device %u: SET_IRQS kind %u flags %#x [%u, +%u) with %zu descriptors: %s", device->number, set.index,
          set.flags, set.start, set.count, fd_count, errno_name(result));
    return result;
}

/* Eventfds travel beside a message: at most max_fds with one, and -1 for none cannot be among them. */
static int set_eventfds(struct device *device, const struct vfio_irq_set *set, const int *fds)
{
    size_t limit = wire_limits(device->wire)->max_fds;
    int result = 0;

    for (uint32_t done = 0, run; done < set->count && result == 0; done += run) {
        struct vfio_irq_set part = *set;
        bool valid = fds[done] >= 0;

        for (run = 1; done + run < set->count && (fds[done + run] >= 0) == valid && (!valid || run < limit); run++) {
        }
        part.start = set->start + done;
        part.count = run;
        result = send_set(device, &part, NULL, 0, &fds[done], valid ? run : 0);
    }
    return result;
}

/* How INTx is unmasked concerns us alone; that it is taken down concerns both. */
static bool is_resample(const struct vfio_irq_set *set)
{
    return set->index == VFIO_PCI_INTX_IRQ_INDEX && set->start == 0 && set->count == 1 &&
           (set->flags & VFIO_IRQ_SET_DATA_EVENTFD) && (set->flags & VFIO_IRQ_SET_ACTION_UNMASK);
}

static int carry_out(struct device *device, const struct vfio_irq_set *set, const void *data, size_t size)
{
    int result = 0;

    pthread_mutex_lock(&device->irq_lock);
    if (is_resample(set)) {
        int fd = *(const int *)data;

        if (fd < 0) {
            resample_stop(device);
        } else {
            result = resample_start(device, fd);
        }
    } else if (set->flags & VFIO_IRQ_SET_DATA_EVENTFD) {
        result = set_eventfds(device, set, data);
    } else {
        if (set->index == VFIO_PCI_INTX_IRQ_INDEX && set->count == 0) {
            resample_stop(device);
        }
        result = send_set(device, set, data, size, NULL, 0);
    }
    pthread_mutex_unlock(&device->irq_lock);
    return result;
}

static bool one_bit(uint32_t bits)
{
    return bits != 0 && (bits & (bits - 1)) == 0;
}

long irq_set(struct device *device, void *argument)
{
    struct vfio_irq_set set;
    int result = fetch_argsz(&set, argument, sizeof(set));
    uint64_t data_at = ADDRESS(argument) + sizeof(set);
    size_t size = 0;
    char *data;

    if (result < 0) {
        return result;
    }
    /* vfio_set_irqs_validate_and_prepare() of the kernel; the server knows how many of each there are. */
    if (set.index >= device->info.num_irqs || set.count > MAX_IRQ_COUNT || set.start > MAX_IRQ_COUNT ||
        (set.flags & ~(uint32_t)(VFIO_IRQ_SET_DATA_TYPE_MASK | VFIO_IRQ_SET_ACTION_TYPE_MASK)) ||
        !one_bit(set.flags & VFIO_IRQ_SET_DATA_TYPE_MASK) || !one_bit(set.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK)) {
        return -EINVAL;
    }
    if (set.flags & VFIO_IRQ_SET_DATA_BOOL) {
        size = set.count;
    } else if (set.flags & VFIO_IRQ_SET_DATA_EVENTFD) {
        size = set.count * sizeof(int);
    }
    if (set.argsz - sizeof(set) < size || (size == 0 && !(set.flags & VFIO_IRQ_SET_DATA_NONE))) {
        return -EINVAL;
    }
    data = malloc(size + 1);
    if (data == NULL) {
        return -ENOMEM;
    }
    result = copy_from_user(data, data_at, size);
    if (result == 0) {
        result = carry_out(device, &set, data, size);
    }
    free(data);
    /* Interrupts of a dead device stay silent; there is nothing to set up or to take down. */
    return wire_dead(device->wire) ? 0 : result;
}
