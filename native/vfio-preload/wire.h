/*
 * A connection to a device server: requests and their replies, from any thread, and the server's own requests.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef WIRE_H
#define WIRE_H

#include <sys/uio.h>

#include "common.h"
#include "uapi.h"

/* What we accept of a server: QEMU's limits (hw/vfio-user/protocol.h). */
#define WIRE_XFER_BYTES (1024 * 1024)
#define WIRE_MAX_FDS 16
#define WIRE_WINDOW_BYTES (3 * WIRE_XFER_BYTES) /* what version.c proposes */

struct wire;

/* What the server answered to VERSION, within our own limits. */
struct wire_limits {
    size_t max_xfer; /* bytes of data in one message */
    size_t max_fds; /* that it accepts with one message */
    size_t max_window; /* the largest window for migration data; 0: it takes none */
};

/*
 * One request. The reply's fixed part goes to `head`, what follows it to `body`; the server's reply may be shorter
 * than the room for it, but never longer. Descriptors that come with it are the caller's from then on.
 */
struct wire_call {
    uint16_t command;
    struct iovec request[3];
    const int *send_fds;
    size_t send_fd_count;
    void *head;
    size_t head_room, head_size;
    void *body;
    size_t body_room, body_size;
    int *fds;
    size_t fd_room, fd_count;
};

/*
 * Answers a request of the server's: `payload` is its data, and the reply's data takes its place, `size` bytes of it.
 * Runs in the connection's own thread, which also receives the replies to every call: it must wait for none of them.
 * Returns 0 or -errno.
 */
typedef int wire_handler(void *opaque, uint16_t command, void *payload, size_t *size, size_t room);

/* Connect and negotiate. Returns 0 or -errno; the reason has been said. */
int wire_open(struct wire **wire, const char *socket, wire_handler *handler, void *opaque);

/* Nothing else may use it any more. */
void wire_close(struct wire *wire);

const struct wire_limits *wire_limits(const struct wire *wire);

/* Whether the server is gone, for good. */
bool wire_dead(struct wire *wire);

/* Send a request and wait for the reply. Returns 0, the server's error or one of ours (ENOTCONN: it is gone). */
int wire_call(struct wire *wire, struct wire_call *call);

/* Send a request that is not replied to. */
int wire_post(struct wire *wire, struct wire_call *call);

/* version.c: what to propose, and what to make of the answer. Returns 0, or -EPROTO with `why`. */
extern const char version_proposal[];
int version_parse(const char *data, size_t size, struct wire_limits *limits, const char **why);

#endif
