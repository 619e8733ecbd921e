/*
 * Migration states and data, timed.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef MIGRATION_H
#define MIGRATION_H

#include <stdint.h>

#include "mmio.h"

/* A MIG_DATA_READ, and a write `delay` ns later; negative: right behind it. */
void time_behind(const struct places *places, int64_t delay);

void set_state(uint32_t state);

/* Reads all data that is there now; `path`: the file for it, empty for none. */
void drain(const char *path);

/* Writes the file's data, from RESUMING to STOP. */
void feed(const char *path);

#endif
