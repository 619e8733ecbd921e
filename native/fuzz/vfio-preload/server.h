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

/* What it does, and whether its regions can be mapped and it takes a window for migration data where it is honest, from the next
 * connection on; and the end of that: its thread has ended, its descriptors are closed. */
void server_script(struct input records, bool maps, bool has_window);
void server_end(void);

/* An eventfd that lasts until then. */
int event_fd(void);

#endif
