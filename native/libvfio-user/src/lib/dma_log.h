/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef LIB_VFIO_USER_DMA_LOG_H
#define LIB_VFIO_USER_DMA_LOG_H

#include <stddef.h>
#include <stdint.h>

#include "dma.h"

/*
 * Start logging with a granularity near @hint bytes; 0 leaves the choice to the
 * library. @pgsizep receives the granularity that was chosen.
 *
 * Returns 0, or -1 with errno set; EINVAL if logging had been started already.
 */
int
dma_log_start(dma_controller_t *dma, uint64_t hint, uint64_t *pgsizep);

/*
 * Collect and clear the log of [@iova, @iova + @length), in units of @pgsize
 * bytes, into @bitmap. The latter must be zeroed, and have the size that
 * dma_log_bitmap_size() says.
 *
 * The range need not agree with any DMA regions: what is not in a region, or in
 * one that is not mapped, cannot have been written through this process and is
 * clean. The granularity need not be that of the log. A log entry that extends
 * beyond the range is reported but not cleared.
 *
 * Returns 0, or -1 with errno set.
 */
int
dma_log_report(dma_controller_t *dma, uint64_t iova, uint64_t length,
               uint64_t pgsize, uint8_t *bitmap);

/*
 * The size in bytes of the bitmap for a range, or 0 if there cannot be one:
 * the range is empty or wraps around, or the page size is not a power of two of
 * at least 4 KiB.
 */
uint64_t
dma_log_bitmap_size(uint64_t iova, uint64_t length, uint64_t pgsize);

#endif /* LIB_VFIO_USER_DMA_LOG_H */
