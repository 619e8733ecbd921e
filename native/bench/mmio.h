/*
 * Accesses to regions, timed.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef MMIO_H
#define MMIO_H

#include <stdbool.h>
#include <stdint.h>

#include "messages.h"

/* What a command says of its accesses. */
struct places {
    uint32_t index;
    uint64_t offset;
    uint32_t bytes;
    uint64_t stride;
    uint32_t count;
};

struct places parse_places(const char *text);
struct region_access region_access(const struct places *places, bool is_write,
                                   uint32_t number);
void time_calls(const struct places *places, uint32_t count, bool is_write);
void time_posted(const struct places *places, uint32_t count);

#endif
