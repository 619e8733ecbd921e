/*
 * The sending half of a connection.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "wire_private.h"

/* Send one message whole. Returns 0 or -errno; `begun`: part of it is sent, so that the stream is of no use then. */
static int send_all(struct wire *wire, struct iovec *iov, size_t count, const int *fds, size_t fd_count,
                    const struct timespec *deadline, bool *begun)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * WIRE_MAX_FDS)];
    } control;
    struct msghdr message = { .msg_iov = iov, .msg_iovlen = count };

    if (fd_count > 0) {
        struct cmsghdr *header;

        memset(&control, 0, sizeof(control));
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(header), fds, sizeof(int) * fd_count);
    }
    while (message.msg_iovlen > 0) {
        /* Not sendmsg(): that is the one in interpose.c. */
        ssize_t sent = syscall(SYS_sendmsg, wire->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent < 0 && errno == EAGAIN) {
            struct pollfd poll_out = { wire->fd, POLLOUT, 0 };
            int left = wire_ms_until(deadline);

            if (left == 0) {
                return -ETIMEDOUT;
            }
            poll(&poll_out, 1, left);
            continue;
        }
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0) {
            return errno == EPIPE || errno == ECONNRESET ? -ENOTCONN : -errno;
        }
        *begun = true;
        message.msg_control = NULL;
        message.msg_controllen = 0;
        while (message.msg_iovlen > 0 && (size_t)sent >= message.msg_iov->iov_len) {
            sent -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (sent > 0) {
            message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

/* Send what is owed to the server: all of it until `deadline`, or (NULL) what it takes at once. */
static int send_owed(struct wire *wire, const struct timespec *deadline)
{
    for (;;) {
        struct owed *owed;
        ssize_t sent;

        pthread_mutex_lock(&wire->lock);
        owed = wire->owed;
        pthread_mutex_unlock(&wire->lock);
        if (owed == NULL) {
            return 0;
        }
        /* Only the holder of tx_lock takes from the queue, so `owed` stays its first. */
        sent = send(wire->fd, owed->message + owed->sent, owed->size - owed->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            struct pollfd poll_out = { wire->fd, POLLOUT, 0 };

            if (deadline == NULL) {
                return -EAGAIN;
            }
            if (wire_ms_until(deadline) == 0) {
                return -ETIMEDOUT;
            }
            poll(&poll_out, 1, wire_ms_until(deadline));
            continue;
        }
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0) {
            return -ENOTCONN;
        }
        owed->sent += (size_t)sent;
        if (owed->sent == owed->size) {
            pthread_mutex_lock(&wire->lock);
            wire->owed = owed->next;
            wire->owed_bytes -= owed->size;
            if (wire->owed == NULL) {
                wire->owed_tail = &wire->owed;
            }
            pthread_mutex_unlock(&wire->lock);
            free(owed);
        }
    }
}

static bool owes(struct wire *wire)
{
    bool any;

    pthread_mutex_lock(&wire->lock);
    any = wire->owed != NULL;
    pthread_mutex_unlock(&wire->lock);
    return any;
}

int wire_send_request(struct wire *wire, const struct wire_call *call, uint16_t id, uint32_t flags,
                        const struct timespec *deadline)
{
    struct vfio_user_header header = { id, call->command, sizeof(header), flags, 0 };
    struct iovec iov[1 + ARRAY_SIZE(call->request)];
    size_t count = 1;
    bool begun = false;
    int result;

    iov[0] = (struct iovec){ &header, sizeof(header) };
    for (size_t i = 0; i < ARRAY_SIZE(call->request); i++) {
        if (call->request[i].iov_len > 0) {
            iov[count++] = call->request[i];
            header.size += (uint32_t)call->request[i].iov_len;
        }
    }
    pthread_mutex_lock(&wire->tx_lock);
    result = send_owed(wire, deadline); /* one may be sent in part */
    if (result == 0) {
        result = send_all(wire, iov, count, call->send_fds, call->send_fd_count, deadline, &begun);
    }
    pthread_mutex_unlock(&wire->tx_lock);
    /* The receiver may have left a reply meanwhile, as it could not take the lock. */
    while (result == 0 && owes(wire) && pthread_mutex_trylock(&wire->tx_lock) == 0) {
        result = send_owed(wire, deadline);
        pthread_mutex_unlock(&wire->tx_lock);
    }
    /* What else can go wrong before anything is sent is the caller's: a buffer or a descriptor that is not there. */
    if (result == -ETIMEDOUT || result == -ENOTCONN || (result < 0 && begun)) {
        wire_fail(wire, result == -ETIMEDOUT ? "the server takes no messages" : "the server is gone");
    }
    return result;
}

bool wire_send_owed(struct wire *wire)
{
    int result;

    if (!owes(wire) || pthread_mutex_trylock(&wire->tx_lock) != 0) {
        return true; /* the thread that holds the lock sends it */
    }
    result = send_owed(wire, NULL);
    pthread_mutex_unlock(&wire->tx_lock);
    if (result < 0 && result != -EAGAIN) {
        wire_fail(wire, "the server is gone");
    }
    return result != -EAGAIN;
}
