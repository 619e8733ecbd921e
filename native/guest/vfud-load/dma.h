/*
 * The DMA load: batches of random descriptors of every operation.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef DMA_H
#define DMA_H

#include <stdbool.h>
#include <stdint.h>

#include "device.h"

void command_dma(const char *arguments);
void command_dma_stop(const char *arguments);
void command_dma_status(const char *arguments);
bool dma_running(void);
void dma_settle(void);
uint64_t dma_mismatched(const struct device *dev); /* bytes of its buffers that are not as the journal says */
void dma_forget(struct device *dev);
uint64_t run_dma_load(void);

#endif
