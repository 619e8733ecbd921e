/*
 * The two halves of the server: server.c (its script) and honest.c (the right replies).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef SERVER_PRIVATE_H
#define SERVER_PRIVATE_H

#include "server.h"
#include "uapi.h"

#define ROOM ((2 << 20) + 4096)
#define MAX_SENT_FDS 20
#define MEMORY_BYTES 65536
#define MIN(a, b) ((a) < (b) ? (a) : (b))

struct message {
    struct vfio_user_header header;
    uint8_t data[ROOM];
};

extern struct message request, reply;
extern int memory_fd; /* of region 0 */

void honest_open(bool region_0_is_mapped, bool has_window);

/* The right reply's data, to a request with data of `size` bytes, in `reply.data`; its size. */
size_t honest(size_t size, int *fds, size_t *fd_count);

#endif
