/*
 * The start of a connection.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef ATTACH_H
#define ATTACH_H

#include <stdint.h>

/* Connects to the server at `path`, with a window of `places` places; 0: without one. */
void attach(const char *path, uint32_t places);

#endif
