/*
 * A connection to a device server: calls, opening and closing. How it works is in wire_private.h.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "wire_private.h"

#define MAX_VERSION_BYTES (64 << 10)

struct timespec wire_deadline(void)
{
    unsigned int ms = config.timeout_ms;
    struct timespec when;

    clock_gettime(CLOCK_MONOTONIC, &when);
    when.tv_sec += ms / 1000;
    when.tv_nsec += (long)(ms % 1000) * 1000000;
    if (when.tv_nsec >= 1000000000) {
        when.tv_sec++;
        when.tv_nsec -= 1000000000;
    }
    return when;
}

int wire_ms_until(const struct timespec *when)
{
    struct timespec now;
    long long ms;

    clock_gettime(CLOCK_MONOTONIC, &now);
    ms = (when->tv_sec - now.tv_sec) * 1000LL + (when->tv_nsec - now.tv_nsec + 999999) / 1000000;
    return ms < 0 ? 0 : (int)MIN(ms, 3600000);
}

void wire_fail_locked(struct wire *wire, const char *why)
{
    if (wire->dead) {
        return;
    }
    __atomic_store_n(&wire->dead, true, __ATOMIC_RELEASE);
    if (!wire->closing) {
        say("%s: %s; the device is dead: it reads all ones from now on", wire->socket, why);
    }
    shutdown(wire->fd, SHUT_RDWR); /* wakes the threads that poll it */
    for (size_t i = 0; i < MAX_CALLS; i++) {
        struct pending *pending = &wire->pending[i];

        if (pending->call != NULL && !pending->arriving && !pending->done) {
            pending->result = -ENOTCONN;
            pending->done = true;
            pthread_cond_signal(&pending->changed);
        }
    }
}

void wire_fail(struct wire *wire, const char *why)
{
    pthread_mutex_lock(&wire->lock);
    wire_fail_locked(wire, why);
    pthread_mutex_unlock(&wire->lock);
}

bool wire_dead(struct wire *wire)
{
    return __atomic_load_n(&wire->dead, __ATOMIC_ACQUIRE);
}

const struct wire_limits *wire_limits(const struct wire *wire)
{
    return &wire->limits;
}

/* --- calls ------------------------------------------------------------------------------------------------------ */

static struct pending *enlist(struct wire *wire, struct wire_call *call)
{
    struct pending *pending = NULL;
    pthread_condattr_t attributes;

    for (size_t i = 0; i < MAX_CALLS && pending == NULL; i++) {
        if (wire->pending[i].call == NULL) {
            pending = &wire->pending[i];
        }
    }
    if (pending == NULL) {
        return NULL;
    }
    pending->call = call;
    /* The slot is part of the id, which makes it unique among those under way. */
    pending->id = (uint16_t)((wire->next_id++ * MAX_CALLS) | (uint16_t)(pending - wire->pending));
    pending->arriving = pending->done = false;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&pending->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    return pending;
}

int wire_call(struct wire *wire, struct wire_call *call)
{
    struct timespec deadline = wire_deadline();
    struct pending *pending;
    int result;

    call->head_size = call->body_size = call->fd_count = 0;
    pthread_mutex_lock(&wire->lock);
    if (wire->dead) {
        pthread_mutex_unlock(&wire->lock);
        return -ENOTCONN;
    }
    pending = enlist(wire, call);
    pthread_mutex_unlock(&wire->lock);
    if (pending == NULL) {
        return -EAGAIN;
    }
    result = wire_send_request(wire, call, pending->id, 0, &deadline);
    pthread_mutex_lock(&wire->lock);
    if (result < 0 && !wire->dead) {
        pending->done = true; /* never sent */
    }
    while (!pending->done) {
        if (pthread_cond_timedwait(&pending->changed, &wire->lock, &deadline) == ETIMEDOUT && !pending->done) {
            char why[96];

            snprintf(why, sizeof(why), "no reply to command %u within %u ms (stuck, or busy with another client?)",
                     call->command, config.timeout_ms);
            result = -ETIMEDOUT;
            wire_fail_locked(wire, why);
            /* The receiver lets go of our buffers as soon as it sees that. */
            while (!pending->done) {
                pthread_cond_wait(&pending->changed, &wire->lock);
            }
        }
    }
    if (result == 0) {
        result = pending->result;
    }
    pthread_cond_destroy(&pending->changed);
    pending->call = NULL;
    pthread_mutex_unlock(&wire->lock);
    return result;
}

int wire_post(struct wire *wire, struct wire_call *call)
{
    struct timespec deadline = wire_deadline();
    uint16_t id;

    pthread_mutex_lock(&wire->lock);
    if (wire->dead) {
        pthread_mutex_unlock(&wire->lock);
        return -ENOTCONN;
    }
    id = wire->next_id++;
    pthread_mutex_unlock(&wire->lock);
    return wire_send_request(wire, call, id, VFIO_USER_FLAG_NO_REPLY, &deadline);
}

/* --- opening and closing ---------------------------------------------------------------------------------------- */

static int negotiate(struct wire *wire)
{
    static const struct vfio_user_version version = { 0, 0 };
    struct wire_call call = {
        .command = VFIO_USER_VERSION,
        .request = { { (void *)&version, sizeof(version) },
                     { (void *)version_proposal, strlen(version_proposal) + 1 } },
    };
    const char *why;
    int result;

    call.head_room = MAX_VERSION_BYTES;
    call.head = malloc(call.head_room);
    if (call.head == NULL) {
        return -ENOMEM;
    }
    result = wire_call(wire, &call);
    if (result == 0 && (result = version_parse(call.head, call.head_size, &wire->limits, &why)) != 0) {
        say("%s: the server sent %s", wire->socket, why);
    }
    free(call.head);
    return result;
}

static int start(struct wire *wire)
{
    sigset_t all, before;
    int error;

    /* The program's signals are for the program's threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&wire->receiver, NULL, wire_receiver, wire);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -error;
}

static void release(struct wire *wire)
{
    close(wire->fd);
    while (wire->owed != NULL) {
        struct owed *owed = wire->owed;

        wire->owed = owed->next;
        free(owed);
    }
    pthread_mutex_destroy(&wire->lock);
    pthread_mutex_destroy(&wire->tx_lock);
    free(wire->payload);
    free(wire->socket);
    free(wire);
}

int wire_open(struct wire **result, const char *socket_path, wire_handler *handler, void *opaque)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct wire *wire;
    int error;

    if (strlen(socket_path) >= sizeof(address.sun_path)) {
        say("%s: too long for the name of a socket", socket_path);
        return -ENAMETOOLONG;
    }
    strcpy(address.sun_path, socket_path);
    wire = calloc(1, sizeof(*wire));
    if (wire == NULL) {
        return -ENOMEM;
    }
    wire->socket = strdup(socket_path);
    wire->payload = malloc(sizeof(struct vfio_user_dma_access) + WIRE_XFER_BYTES);
    wire->handler = handler;
    wire->opaque = opaque;
    wire->owed_tail = &wire->owed;
    pthread_mutex_init(&wire->lock, NULL);
    pthread_mutex_init(&wire->tx_lock, NULL);
    wire->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (wire->fd < 0 || wire->socket == NULL || wire->payload == NULL ||
        connect(wire->fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        error = errno;
        say("%s: cannot connect: %s%s", socket_path, strerror(error),
            error == ECONNREFUSED || error == ENOENT ? " (is the device server running?)" : "");
        release(wire);
        return -error;
    }
    error = start(wire);
    if (error != 0) {
        release(wire);
        return error;
    }
    error = negotiate(wire);
    if (error != 0) {
        wire_close(wire);
        return error;
    }
    *result = wire;
    return 0;
}

void wire_close(struct wire *wire)
{
    pthread_mutex_lock(&wire->lock);
    wire->closing = true;
    wire_fail_locked(wire, "closed");
    pthread_mutex_unlock(&wire->lock);
    pthread_join(wire->receiver, NULL);
    release(wire);
}
