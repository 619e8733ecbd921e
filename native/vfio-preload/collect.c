/*
 * Collecting what is written to a migration data descriptor.
 *
 * QEMU writes 32 KiB at a time, and each message is a round trip. So a thread sends, and what is written while it waits
 * for one reply is the next message. Anything else that is asked of the device waits until all of it is sent. So does
 * a message that the same thread sends to somebody else, because it may say that the data is there: QEMU's
 * switchover-ack does.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

struct collector {
    struct collector *next; /* of all, with all_lock */
    unsigned int users; /* who wait for it, with all_lock */
    struct device *device;
    size_t room; /* of each buffer */
    pthread_t sender;
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    char *filling, *sending; /* in the window, if there is one */
    bool in_window;
    size_t filled;
    bool busy; /* a message is under way */
    bool closing;
    int error; /* what became of one; there is no way on after it */
};

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t all_changed = PTHREAD_COND_INITIALIZER;
static struct collector *all;
static __thread bool wrote; /* this thread, since it last waited */

static int send_data(const struct collector *collector, const char *data, size_t size)
{
    struct device *device = collector->device;
    struct vfio_user_mig_data head = { (uint32_t)(sizeof(head) + size), (uint32_t)size };
    struct wire_call call = {
        .command = VFIO_USER_MIG_DATA_WRITE,
        .request = { { &head, sizeof(head) }, { (void *)(uintptr_t)data, size } },
    };
    int result = collector->in_window ? (int)MIN(window_call(device, VFIO_USER_MIG_DATA_WRITE, data, size), 0)
                                      : wire_call(device->wire, &call);

    trace("device %u: MIG_DATA_WRITE of %zu bytes: %s", device->number, size, errno_name(result));
    return result;
}

static void *sender(void *opaque)
{
    struct collector *collector = opaque;

    pthread_mutex_lock(&collector->lock);
    for (;;) {
        char *full;
        size_t size;
        int error;

        while (collector->filled == 0 && !collector->closing) {
            pthread_cond_wait(&collector->changed, &collector->lock);
        }
        if (collector->filled == 0) {
            break;
        }
        full = collector->filling;
        size = collector->filled;
        collector->filling = collector->sending;
        collector->sending = full;
        collector->filled = 0;
        collector->busy = true;
        pthread_cond_broadcast(&collector->changed);
        pthread_mutex_unlock(&collector->lock);
        error = send_data(collector, full, size);
        pthread_mutex_lock(&collector->lock);
        collector->busy = false;
        if (error != 0) {
            collector->error = error;
            collector->filled = 0;
        }
        pthread_cond_broadcast(&collector->changed);
    }
    pthread_mutex_unlock(&collector->lock);
    return NULL;
}

int collector_flush(struct collector *collector)
{
    int error;

    pthread_mutex_lock(&collector->lock);
    while ((collector->filled > 0 || collector->busy) && collector->error == 0) {
        pthread_cond_wait(&collector->changed, &collector->lock);
    }
    error = collector->error;
    pthread_mutex_unlock(&collector->lock);
    return error;
}

/* Wait for those of one device; NULL: of all. */
static void flush_all(const struct device *device)
{
    pthread_mutex_lock(&all_lock);
    for (struct collector *collector = all; collector != NULL; collector = collector->next) {
        if (device == NULL || collector->device == device) {
            collector->users++; /* so it stays on the list */
            pthread_mutex_unlock(&all_lock);
            collector_flush(collector);
            pthread_mutex_lock(&all_lock);
            collector->users--;
            pthread_cond_broadcast(&all_changed);
        }
    }
    pthread_mutex_unlock(&all_lock);
}

void collectors_flush(struct device *device)
{
    if (__atomic_load_n(&device->migration.collecting, __ATOMIC_ACQUIRE)) {
        flush_all(device);
    }
}

void collectors_flush_thread(void)
{
    if (wrote) {
        wrote = false;
        flush_all(NULL);
    }
}

ssize_t collector_write(struct collector *collector, uint64_t from, size_t count)
{
    size_t done = 0;
    int error = 0;

    wrote = true;
    pthread_mutex_lock(&collector->lock);
    while (done < count && error == 0) {
        size_t part;

        while (collector->filled == collector->room && collector->error == 0) {
            pthread_cond_wait(&collector->changed, &collector->lock);
        }
        part = MIN(count - done, collector->room - collector->filled);
        error = collector->error;
        if (error == 0) {
            error = copy_from_user(collector->filling + collector->filled, from + done, part);
        }
        if (error == 0) {
            collector->filled += part;
            done += part;
            pthread_cond_broadcast(&collector->changed);
        }
    }
    pthread_mutex_unlock(&collector->lock);
    return done > 0 ? (ssize_t)done : error;
}

static void release(struct collector *collector)
{
    if (!collector->in_window) {
        free(collector->filling);
        free(collector->sending);
    }
    pthread_cond_destroy(&collector->changed);
    pthread_mutex_destroy(&collector->lock);
    free(collector);
}

int collector_new(struct device *device, struct collector **result)
{
    struct collector *collector = calloc(1, sizeof(*collector));
    sigset_t every, before;
    int error;

    if (collector == NULL) {
        return -ENOMEM;
    }
    pthread_mutex_init(&collector->lock, NULL);
    pthread_cond_init(&collector->changed, NULL);
    collector->device = device;
    error = window_have(device);
    if (error < 0) {
        release(collector);
        return error;
    }
    collector->in_window = error > 0;
    if (collector->in_window) {
        collector->room = device->migration.window.piece;
        collector->filling = window_piece(device, WINDOW_WRITE);
        collector->sending = window_piece(device, WINDOW_WRITE_NEXT);
    } else {
        collector->room = wire_limits(device->wire)->max_xfer;
        collector->filling = malloc(collector->room);
        collector->sending = malloc(collector->room);
    }
    error = ENOMEM;
    if (collector->filling != NULL && collector->sending != NULL) {
        sigfillset(&every);
        pthread_sigmask(SIG_SETMASK, &every, &before);
        error = pthread_create(&collector->sender, NULL, sender, collector);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (error != 0) {
        release(collector);
        return -error;
    }
    __atomic_store_n(&device->migration.collecting, true, __ATOMIC_RELEASE);
    pthread_mutex_lock(&all_lock);
    collector->next = all;
    all = collector;
    pthread_mutex_unlock(&all_lock);
    *result = collector;
    return 0;
}

void collector_end(struct collector *collector)
{
    struct collector **link;

    pthread_mutex_lock(&all_lock);
    while (collector->users > 0) {
        pthread_cond_wait(&all_changed, &all_lock);
    }
    for (link = &all; *link != collector; link = &(*link)->next) {
    }
    *link = collector->next;
    pthread_mutex_unlock(&all_lock);
    pthread_mutex_lock(&collector->lock);
    collector->closing = true;
    pthread_cond_broadcast(&collector->changed);
    pthread_mutex_unlock(&collector->lock);
    pthread_join(collector->sender, NULL);
    release(collector);
}
