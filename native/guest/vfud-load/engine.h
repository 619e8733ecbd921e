/*
 * The device's DMA engine: memory that it may reach, and runs of descriptors (docs/device.md, "DMA").
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "device.h"

enum { OP_TO_DEVICE = 1, OP_TO_GUEST, OP_FILL_GUEST, OP_FILL_DEVICE, OP_CHECKSUM_GUEST, OP_CHECKSUM_DEVICE };
enum { STATUS_IDLE = 0, STATUS_BUSY = 1, STATUS_DONE = 2 };
#define FLAG_INTERRUPT 1u

struct descriptor {
    uint32_t op;
    uint32_t flags;
    uint64_t address;
    uint64_t offset;
    uint64_t length;
    uint64_t value;
    uint32_t vector;
    uint32_t reserved;
    uint32_t status;
    uint32_t reserved2;
    uint64_t result;
};

/* NULL or what is wrong; the second time it does nothing. */
const char *engine_open(struct device *dev);
const char *buffer_alloc(struct device *dev, uint64_t bytes, struct buffer *buffer);
/* The module frees it when the device is gone. */
void buffer_forget(struct buffer *buffer);
void engine_forget(struct device *dev);

struct descriptor *engine_table(struct device *dev);
/* Begin a run of the first `count` descriptors of the table; none may be under way. */
void engine_submit(struct device *dev, uint32_t count);
bool engine_busy(struct device *dev);
/* Device memory to `buffer` at `at`, or back; engine_end_copy() returns NULL or what is wrong. */
void engine_begin_copy(struct device *dev, int op, const struct buffer *buffer, uint64_t at, uint64_t offset,
                       uint64_t bytes);
const char *engine_end_copy(struct device *dev);

#endif
