/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef LIB_VFIO_USER_REGION_MEMORY_H
#define LIB_VFIO_USER_REGION_MEMORY_H

#include "libvfio-user.h"

/* Whether the next access is served here, and not by the region's callback. */
static inline bool
region_memory_serves(const vfu_region_memory_t *memory)
{
    return memory != NULL && memory->enabled != 0 && *memory->running != 0;
}

/*
 * Serve an access, which lies in the region. It cannot fail.
 */
void
region_memory_access(const vfu_region_memory_t *memory, char *buf, size_t count,
                     uint64_t offset, bool is_write);

#endif /* LIB_VFIO_USER_REGION_MEMORY_H */
