/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* Accesses to a region that is nothing but memory: see vfu_setup_region_memory(). */

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/param.h>
#include <time.h>

#include "common.h"
#include "private.h"
#include "region_memory.h"

static uint64_t
now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * UINT64_C(1000000000) + ts.tv_nsec;
}

static void
count_access(const vfu_region_memory_t *memory, uint64_t *counts, size_t bytes,
             uint64_t took)
{
    uint32_t bucket = 0;

    while (bucket < memory->nr_edges && took > memory->edges[bucket]) {
        bucket++;
    }
    counts[VFU_REGION_COUNTS_ACCESSES]++;
    counts[VFU_REGION_COUNTS_BYTES] += bytes;
    counts[VFU_REGION_COUNTS_NS] += took;
    counts[VFU_REGION_COUNTS_BUCKETS + bucket]++;
}

void
region_memory_access(const vfu_region_memory_t *memory, char *buf, size_t count,
                     uint64_t offset, bool is_write)
{
    uint64_t began = now_ns();
    uint64_t first = satadd_u64(*memory->window, offset);
    size_t inside = 0;

    /* A window may reach beyond the end of the memory, or begin there. */
    if (first < memory->size) {
        inside = MIN(count, memory->size - first);
    }

    if (!is_write) {
        if (inside > 0) {
            memcpy(buf, memory->data + first, inside);
        }
        /* What a bus returns for what nobody answers. */
        memset(buf + inside, 0xff, count - inside);
    } else if (inside > 0) {
        uint64_t page = first >> memory->page_shift;
        uint64_t last = (first + inside - 1) >> memory->page_shift;

        memcpy(memory->data + first, buf, inside);
        memset(memory->marks + page, memory->mark, last - page + 1);
    }

    count_access(memory, is_write ? memory->writes : memory->reads, count,
                 now_ns() - began);
}

EXPORT int
vfu_setup_region_memory(vfu_ctx_t *vfu_ctx, int region_idx,
                        const vfu_region_memory_t *memory)
{
    assert(vfu_ctx != NULL);

    if (region_idx < 0 || region_idx >= (int)vfu_ctx->nr_regions ||
        region_idx == VFU_PCI_DEV_CFG_REGION_IDX) {
        return ERROR_INT(EINVAL);
    }
    if (memory != NULL &&
        (memory->data == NULL || memory->marks == NULL ||
         memory->page_shift >= 64 || memory->window == NULL ||
         memory->running == NULL || memory->reads == NULL ||
         memory->writes == NULL ||
         (memory->edges == NULL && memory->nr_edges > 0))) {
        return ERROR_INT(EINVAL);
    }

    vfu_ctx->reg_info[region_idx].memory = memory;
    return 0;
}
