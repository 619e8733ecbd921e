/*
 * The connection: requests and their replies.
 *
 * Functions, not declarations: a file with a timed loop has them as its own, so that the
 * compiler optimizes the loop together with all that it calls.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef WIRE_H
#define WIRE_H

#include <err.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#include "messages.h"

#define PIECE       (1U << 20)
#define PLACE       (4U << 20)

extern int sock;
extern uint16_t last_id;
extern uint16_t replied; /* the id of the last reply */

/* The window: PLACE bytes for each of the requests that can be under way. NULL: none. */
extern uint8_t *window;
extern uint32_t places_count;

/* What was received: replies from `taken` on, the last one perhaps in part. */
extern uint8_t received[2 * PIECE];
extern size_t taken, have;

static inline int64_t
now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static struct header
header(uint16_t command, size_t size)
{
    return (struct header){ .id = ++last_id, .command = command, .size = size };
}

static void
send_parts(struct iovec *parts, int count)
{
    struct msghdr msg = { .msg_iov = parts, .msg_iovlen = count };

    while (msg.msg_iovlen > 0) {
        ssize_t sent = sendmsg(sock, &msg, MSG_NOSIGNAL);

        if (sent < 0) {
            if (errno == EINTR) {
                continue;
            }
            err(EXIT_FAILURE, "send");
        }
        while (msg.msg_iovlen > 0 && (size_t)sent >= msg.msg_iov->iov_len) {
            sent -= msg.msg_iov->iov_len;
            msg.msg_iov++;
            msg.msg_iovlen--;
        }
        if (msg.msg_iovlen > 0) {
            msg.msg_iov->iov_base = (uint8_t *)msg.msg_iov->iov_base + sent;
            msg.msg_iov->iov_len -= sent;
        }
    }
}

static void
send_all(void *data, size_t size)
{
    struct iovec part = { data, size };

    send_parts(&part, 1);
}

static void
receive(size_t wanted)
{
    while (have - taken < wanted) {
        ssize_t count;

        if (taken > 0) {
            memmove(received, received + taken, have - taken);
            have -= taken;
            taken = 0;
        }
        count = recv(sock, received + have, sizeof(received) - have, 0);
        if (count == 0) {
            errx(EXIT_FAILURE, "the server closed the connection");
        }
        if (count < 0 && errno != EINTR) {
            err(EXIT_FAILURE, "recv");
        }
        have += count > 0 ? count : 0;
    }
}

/* Receives a reply; its payload is there until the next one is received. */
static const uint8_t *
reply(size_t *size)
{
    struct header head;
    const uint8_t *payload;

    receive(sizeof(head));
    memcpy(&head, received + taken, sizeof(head));
    if ((head.flags & TYPE_MASK) != TYPE_REPLY || head.error != 0 ||
        head.size < sizeof(head) || head.size > PIECE + 4096) {
        errx(EXIT_FAILURE, "a reply to command %u with flags %#x, error %u",
             head.command, head.flags, head.error);
    }
    receive(head.size);
    replied = head.id;
    payload = received + taken + sizeof(head);
    taken += head.size;
    *size = head.size - sizeof(head);
    return payload;
}

static void
skip_reply(void)
{
    size_t size;

    (void)reply(&size);
}

#endif
