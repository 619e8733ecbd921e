/*
 * The receiving half of a connection: it runs in the connection's own thread.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "wire_private.h"

#define MAX_OWED_BYTES (16 << 20)

/*
 * Fill `buffer`. A message that has begun has to go on: false when it does not, and the connection has failed. When the
 * caller's buffer is not there, which sets `fault`, the rest is read past.
 */
static bool receive(struct wire *wire, void *buffer, size_t size, bool *fault)
{
    struct timespec deadline = { 0, 0 };
    char scratch[512];

    while (size > 0) {
        ssize_t count = recv(wire->fd, *fault ? scratch : buffer, *fault ? MIN(size, sizeof(scratch)) : size,
                             MSG_DONTWAIT);

        if (count < 0 && errno == EAGAIN) {
            struct pollfd poll_in = { wire->fd, POLLIN, 0 };

            if (deadline.tv_sec == 0) {
                deadline = wire_deadline();
            }
            if (wire_ms_until(&deadline) == 0) {
                wire_fail(wire, "the server stopped in the middle of a message");
                return false;
            }
            poll(&poll_in, 1, wire_ms_until(&deadline));
            continue;
        }
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count < 0 && errno == EFAULT && !*fault) {
            *fault = true;
            continue;
        }
        if (count <= 0) {
            wire_fail(wire, "the server closed the connection in the middle of a message");
            return false;
        }
        buffer = *fault ? buffer : (char *)buffer + count;
        size -= (size_t)count;
    }
    return true;
}

/* Receive a header and the descriptors that come with its first byte. */
static bool receive_header(struct wire *wire, struct vfio_user_header *header, int *fds, size_t *fd_count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * WIRE_MAX_FDS)];
    } control;
    struct iovec iov = { header, sizeof(*header) };
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
    };
    ssize_t count = recvmsg(wire->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    bool fault = false;

    *fd_count = 0;
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
        return true; /* with header->size as the caller left it: nothing there */
    }
    if (count <= 0) {
        wire_fail(wire, "the server closed the connection");
        return false;
    }
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part != NULL; part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS) {
            *fd_count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(part), *fd_count * sizeof(int));
        }
    }
    if (message.msg_flags & MSG_CTRUNC) {
        wire_fail(wire, "the server sent more descriptors than a message may have");
        return false;
    }
    return receive(wire, (char *)header + count, sizeof(*header) - (size_t)count, &fault);
}

static void receive_reply(struct wire *wire, const struct vfio_user_header *header, int *fds, size_t *fd_count)
{
    struct pending *pending = &wire->pending[header->id % MAX_CALLS];
    size_t size = header->size - sizeof(*header);
    struct wire_call *call;
    bool whole = true, fault = false;
    int result = 0;

    pthread_mutex_lock(&wire->lock);
    call = pending->call;
    if (wire->dead) {
        pthread_mutex_unlock(&wire->lock);
        return;
    }
    if (call == NULL || pending->done || pending->id != header->id || call->command != header->command) {
        wire_fail_locked(wire, "the server sent a reply to what it was not asked");
    } else if ((header->flags & VFIO_USER_FLAG_ERROR) && size > 0) {
        wire_fail_locked(wire, "the server sent an error with data");
    } else if (size > call->head_room + call->body_room) {
        wire_fail_locked(wire, "the server sent a longer reply than there is room for");
    } else if (*fd_count > call->fd_room) {
        wire_fail_locked(wire, "the server sent descriptors that were not asked for");
    } else {
        pending->arriving = true;
    }
    pthread_mutex_unlock(&wire->lock);
    if (wire_dead(wire)) {
        return;
    }

    if (header->flags & VFIO_USER_FLAG_ERROR) {
        result = header->error > 0 && header->error < 4096 ? -(int)header->error : -EIO;
    } else {
        call->head_size = MIN(size, call->head_room);
        call->body_size = size - call->head_size;
        whole = receive(wire, call->head, call->head_size, &fault) &&
                receive(wire, call->body, call->body_size, &fault);
        if (fault) {
            result = -EFAULT;
        } else if (whole && *fd_count > 0) {
            memcpy(call->fds, fds, *fd_count * sizeof(int));
            call->fd_count = *fd_count;
            *fd_count = 0;
        }
    }
    pthread_mutex_lock(&wire->lock);
    pending->arriving = false;
    pending->result = whole ? result : -ENOTCONN;
    pending->done = true;
    pthread_cond_signal(&pending->changed);
    pthread_mutex_unlock(&wire->lock);
}

/* Leave a reply in the queue: the receiver sends it next, or the thread that is sending now. */
static void reply(struct wire *wire, const struct vfio_user_header *request, int error, size_t size)
{
    struct vfio_user_header header = { request->id, request->command, sizeof(header), VFIO_USER_FLAG_REPLY, 0 };
    struct owed *owed;

    if (error != 0) {
        header.flags |= VFIO_USER_FLAG_ERROR;
        header.error = (uint32_t)-error;
        size = 0;
    }
    header.size += (uint32_t)size;
    owed = malloc(sizeof(*owed) + header.size);
    if (owed == NULL) {
        wire_fail(wire, "there is no memory for a reply to the server");
        return;
    }
    owed->next = NULL;
    owed->size = header.size;
    owed->sent = 0;
    memcpy(owed->message, &header, sizeof(header));
    memcpy(owed->message + sizeof(header), wire->payload, size);
    pthread_mutex_lock(&wire->lock);
    *wire->owed_tail = owed;
    wire->owed_tail = &owed->next;
    wire->owed_bytes += owed->size;
    if (wire->owed_bytes > MAX_OWED_BYTES) {
        wire_fail_locked(wire, "the server asks without taking the answers");
    }
    pthread_mutex_unlock(&wire->lock);
}

static void receive_request(struct wire *wire, const struct vfio_user_header *header)
{
    size_t room = sizeof(struct vfio_user_dma_access) + WIRE_XFER_BYTES;
    size_t size = header->size - sizeof(*header);
    bool fault = false;
    int error;

    if (size > room) {
        wire_fail(wire, "the server sent a request that is too long");
        return;
    }
    if (!receive(wire, wire->payload, size, &fault)) {
        return;
    }
    error = wire->handler(wire->opaque, header->command, wire->payload, &size, room);
    if (!(header->flags & VFIO_USER_FLAG_NO_REPLY)) {
        reply(wire, header, error, size);
    }
}

static void receive_message(struct wire *wire)
{
    struct vfio_user_header header = { .size = 0 };
    int fds[WIRE_MAX_FDS];
    size_t fd_count = 0;

    if (receive_header(wire, &header, fds, &fd_count) && header.size != 0) {
        uint32_t type = header.flags & VFIO_USER_FLAG_TYPE;

        if (header.size < sizeof(header) || type > VFIO_USER_FLAG_REPLY) {
            wire_fail(wire, "the server sent what is no message");
        } else if (type == VFIO_USER_FLAG_REPLY) {
            receive_reply(wire, &header, fds, &fd_count);
        } else {
            receive_request(wire, &header);
        }
    }
    while (fd_count > 0) {
        close(fds[--fd_count]);
    }
}

void *wire_receiver(void *opaque)
{
    struct wire *wire = opaque;
    bool waits = false; /* for the server to take a reply */

    while (!wire_dead(wire)) {
        struct pollfd events = { wire->fd, (short)(POLLIN | (waits ? POLLOUT : 0)), 0 };

        if (poll(&events, 1, -1) >= 0 && (events.revents & ~POLLOUT)) {
            receive_message(wire);
        }
        waits = !wire_send_owed(wire);
    }
    return NULL;
}
