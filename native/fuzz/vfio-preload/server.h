/*
 * The server that the preloaded library talks to: server.c.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef SERVER_H
#define SERVER_H

#include "check.h"
#include "records.h"

/* What guest memory holds where nothing is mapped: no reply may have it. */
#define OUT_OF_BOUNDS 0xa5

/*
 * From the next connection on: what the server does, and where it is honest whether its regions can be mapped and whether
 * it takes a window for migration data.
 */
void server_script(struct input records, bool maps, bool has_window);
/* Returns when the server's thread has ended and its descriptors are closed. */
void server_end(void);

/* An eventfd that lasts until server_end(). */
int event_fd(void);

#endif
