/*
 * The inside of a connection: wire.c (calls, opening, closing), send.c and receive.c.
 *
 * A thread of its own receives: replies, for the callers that wait for them, and the server's requests, which it
 * answers. It never waits to send. The thread that holds `tx_lock` sends; a reply to the server that cannot be sent at
 * once is left in `owed`, and the thread that holds the lock sends it before it lets go. So a server that waits for a
 * reply gets it whatever else is under way, and the thread that reads never waits for a server that does not.
 *
 * Nothing the server says about a length is believed before it is compared with the room there is. A stream that cannot
 * be trusted any more is closed, and stays closed: the device is dead then.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef WIRE_PRIVATE_H
#define WIRE_PRIVATE_H

#include <pthread.h>
#include <time.h>

#include "wire.h"

#define MAX_CALLS 1024 /* at a time; a thread has at most one */

struct pending {
    struct wire_call *call; /* NULL: free */
    uint16_t id;
    bool arriving; /* the receiver is filling the caller's buffers */
    bool done;
    int result;
    pthread_cond_t changed;
};

struct owed {
    struct owed *next;
    size_t size, sent;
    char message[];
};

struct wire {
    int fd;
    char *socket;
    struct wire_limits limits;
    wire_handler *handler;
    void *opaque;
    pthread_t receiver;
    char *payload; /* of the server's request */

    pthread_mutex_t lock; /* what follows */
    bool dead, closing;
    uint16_t next_id;
    struct pending pending[MAX_CALLS];
    struct owed *owed, **owed_tail;
    size_t owed_bytes;

    pthread_mutex_t tx_lock; /* held while a message is sent; taken before `lock` */
};

struct timespec wire_deadline(void);
int wire_ms_until(const struct timespec *when);

/* The device is dead. The first reason is the reason; everybody who waits is woken. `_locked`: with `lock`. */
void wire_fail(struct wire *wire, const char *why);
void wire_fail_locked(struct wire *wire, const char *why);

/* --- send.c --- */

/* Send a request of ours. Returns 0 or -errno. */
int wire_send_request(struct wire *wire, const struct wire_call *call, uint16_t id, uint32_t flags,
                      const struct timespec *deadline);

/* Send what is owed to the server, if it takes it at once and nobody else is sending. False: it does not take it. */
bool wire_send_owed(struct wire *wire);

/* --- receive.c --- */

/* The thread that receives: `opaque` is the connection. */
void *wire_receiver(void *opaque);

#endif
