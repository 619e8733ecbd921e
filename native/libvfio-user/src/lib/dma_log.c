/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#include <assert.h>
#include <errno.h>
#include <sys/param.h>

#include "common.h"
#include "dma.h"
#include "dma_log.h"
#include "private.h"

/*
 * What <linux/vfio.h> users may ask for starts at 4 KiB. There is no gain in
 * more than 1 GiB, the largest page of any client.
 */
#define MIN_LOG_PGSIZE  (4UL << 10)
#define MAX_LOG_PGSIZE  (1UL << 30)

static bool
is_power_of_2(uint64_t val)
{
    return val != 0 && (val & (val - 1)) == 0;
}

int
dma_log_start(dma_controller_t *dma, uint64_t hint, uint64_t *pgsizep)
{
    uint64_t pgsize = is_power_of_2(hint) ? hint : MIN_LOG_PGSIZE;

    pgsize = MAX(pgsize, MIN_LOG_PGSIZE);
    pgsize = MIN(pgsize, MAX_LOG_PGSIZE);

    /* <linux/vfio.h>: "Another start is not allowed in the meantime." */
    if (dma->dirty_pgsize != 0) {
        vfu_log(dma->vfu_ctx, LOG_ERR, "DMA logging already started");
        return ERROR_INT(EINVAL);
    }

    if (dma_controller_dirty_page_logging_start(dma, pgsize) < 0) {
        return -1;
    }

    *pgsizep = pgsize;
    return 0;
}

uint64_t
dma_log_bitmap_size(uint64_t iova, uint64_t length, uint64_t pgsize)
{
    if (length == 0 || length - 1 > UINT64_MAX - iova ||
        pgsize < MIN_LOG_PGSIZE || !is_power_of_2(pgsize)) {
        return 0;
    }

    return _get_bitmap_size(length, pgsize);
}

/* Bits [first, last] of a bitmap. */
static void
set_bits(uint8_t *bitmap, uint64_t first, uint64_t last)
{
    uint64_t bit;

    for (bit = first; bit <= last; bit++) {
        if (bit_to_u8off(bit) == 0 && last - bit >= CHAR_BIT - 1) {
            bitmap[bit_to_u8(bit)] = UINT8_MAX;
            bit += CHAR_BIT - 1;
        } else {
            bitmap[bit_to_u8(bit)] |= 1 << bit_to_u8off(bit);
        }
    }
}

/* The bits of byte @index that are in [first, last]. */
static uint8_t
byte_mask(uint64_t index, uint64_t first, uint64_t last)
{
    uint8_t mask = UINT8_MAX;

    if (index == bit_to_u8(first)) {
        mask &= UINT8_MAX << bit_to_u8off(first);
    }
    if (index == bit_to_u8(last)) {
        mask &= UINT8_MAX >> (CHAR_BIT - 1 - bit_to_u8off(last));
    }
    return mask;
}

/*
 * Report what is dirty at offsets [@start, @end] of @region. @base is the
 * offset, from the start of the reported range, of the region's first byte; it
 * may be "negative", which the unsigned arithmetic takes care of.
 */
static void
report_region(dma_memory_region_t *region, uint64_t log_pgsize,
              uint64_t start, uint64_t end, uint64_t base, uint64_t pgsize,
              uint8_t *bitmap)
{
    uint64_t region_end = region->info.iova.iov_len - 1;
    uint64_t first = start / log_pgsize;
    uint64_t last = end / log_pgsize;
    uint64_t i;

    for (i = bit_to_u8(first); i <= bit_to_u8(last); i++) {
        uint8_t mask = byte_mask(i, first, last);
        uint8_t clear = mask;
        uint8_t dirty;

        /*
         * Most of memory is clean. Look before writing: that a bit may be set
         * meanwhile is as if it had been set later, for the next report.
         */
        if ((__atomic_load_n(&region->dirty_bitmap[i], __ATOMIC_RELAXED) &
             mask) == 0) {
            continue;
        }

        /* An entry that is not asked for in full still says something. */
        if (i == bit_to_u8(first) && start % log_pgsize != 0) {
            clear &= ~(1 << bit_to_u8off(first));
        }
        if (i == bit_to_u8(last) && end != region_end &&
            (end + 1) % log_pgsize != 0) {
            clear &= ~(1 << bit_to_u8off(last));
        }

        dirty = mask & __atomic_fetch_and(&region->dirty_bitmap[i],
                                          (uint8_t)~clear, __ATOMIC_SEQ_CST);

        while (dirty != 0) {
            uint64_t page = i * CHAR_BIT + __builtin_ctz(dirty);
            uint64_t from = MAX(page * log_pgsize, start);
            uint64_t to = MIN(page * log_pgsize + log_pgsize - 1, end);

            set_bits(bitmap, (base + from) / pgsize, (base + to) / pgsize);
            dirty &= dirty - 1;
        }
    }
}

int
dma_log_report(dma_controller_t *dma, uint64_t iova, uint64_t length,
               uint64_t pgsize, uint8_t *bitmap)
{
    uint64_t last = iova + length - 1;
    int i;

    assert(dma != NULL);
    assert(bitmap != NULL);

    if (dma->dirty_pgsize == 0) {
        vfu_log(dma->vfu_ctx, LOG_ERR, "DMA logging not started");
        return ERROR_INT(EINVAL);
    }

    if (dma_log_bitmap_size(iova, length, pgsize) == 0) {
        vfu_log(dma->vfu_ctx, LOG_ERR,
                "bad DMA log range [%#lx, %#lx], page size %#lx", iova, last,
                pgsize);
        return ERROR_INT(EINVAL);
    }

    for (i = 0; i < dma->nregions; i++) {
        dma_memory_region_t *region = &dma->regions[i];
        uint64_t region_iova = (uint64_t)region->info.iova.iov_base;
        uint64_t region_last = region_iova + region->info.iova.iov_len - 1;
        uint64_t from = MAX(iova, region_iova);
        uint64_t to = MIN(last, region_last);

        if (region->dirty_bitmap == NULL || from > to) {
            continue;
        }

        report_region(region, dma->dirty_pgsize, from - region_iova,
                      to - region_iova, region_iova - iova, pgsize, bitmap);
    }

    return 0;
}
