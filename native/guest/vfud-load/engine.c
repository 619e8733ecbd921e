/*
 * The device's DMA engine.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../module/vfud_uapi.h"
#include "device.h"
#include "engine.h"
#include "line.h"

_Static_assert(sizeof(struct descriptor) == 64, "a descriptor is 64 bytes");

#define CTRL_START 1u
/* How often a run whose end does not show in memory is polled for in the registers. */
#define POLL_NS 20000000ull
#define TIMEOUT_NS (10 * NS_PER_SECOND)

const char *buffer_alloc(struct device *dev, uint64_t bytes, struct buffer *buffer)
{
    struct vfud_dma_alloc alloc = {.bytes = bytes};
    void *data;

    if (dev->driver < 0)
        return "the module vfud does not drive this device";
    if (ioctl(dev->driver, VFUD_DMA_ALLOC, &alloc) < 0)
        return strerror(errno);
    data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, dev->driver, (off_t)alloc.handle);
    if (data == MAP_FAILED)
        return strerror(errno);
    buffer->data = data;
    buffer->address = alloc.address;
    buffer->bytes = bytes;
    return NULL;
}

void buffer_forget(struct buffer *buffer)
{
    if (buffer->data)
        munmap(buffer->data, buffer->bytes);
    memset(buffer, 0, sizeof(*buffer));
}

void engine_forget(struct device *dev)
{
    buffer_forget(&dev->engine.table);
    buffer_forget(&dev->engine.bounce[0]);
    buffer_forget(&dev->engine.bounce[1]);
    buffer_forget(&dev->engine.source);
}

const char *engine_open(struct device *dev)
{
    if (dev->engine.table.data)
        return NULL;
    return buffer_alloc(dev, ENGINE_DESCRIPTORS * sizeof(struct descriptor), &dev->engine.table);
}

struct descriptor *engine_table(struct device *dev)
{
    return (struct descriptor *)dev->engine.table.data;
}

void engine_submit(struct device *dev, uint32_t count)
{
    struct engine *engine = &dev->engine;

    for (uint32_t i = 0; i < count; i++) {
        engine_table(dev)[i].status = STATUS_IDLE;
        engine_table(dev)[i].result = 0;
    }
    engine->count = count;
    engine->polled_ns = now_ns();
    __sync_synchronize();
    write64(dev, REG_DMA_TABLE, engine->table.address);
    write32(dev, REG_DMA_COUNT, count);
    write32(dev, REG_DMA_CTRL, CTRL_START);
}

bool engine_busy(struct device *dev)
{
    struct engine *engine = &dev->engine;
    volatile struct descriptor *last = &engine_table(dev)[engine->count - 1];
    uint64_t now;

    if (!engine->count)
        return false;
    if (last->status == STATUS_IDLE) {
        now = now_ns();
        if (now - engine->polled_ns < POLL_NS)
            return true;
        engine->polled_ns = now;
        if (read32(dev, REG_DMA_STATUS) == STATUS_BUSY)
            return true;
        /* The device is through, so what it wrote is there; if not, it got lost. */
        if (last->status == STATUS_IDLE)
            engine->lost_statuses++;
    }
    __sync_synchronize();
    engine->count = 0;
    return false;
}

void engine_begin_copy(struct device *dev, int op, const struct buffer *buffer, uint64_t at, uint64_t offset,
                       uint64_t bytes)
{
    *engine_table(dev) = (struct descriptor){
        .op = (uint32_t)op, .address = buffer->address + at, .offset = offset, .length = bytes};
    engine_submit(dev, 1);
}

const char *engine_end_copy(struct device *dev)
{
    uint64_t start = now_ns();

    while (engine_busy(dev)) {
        if (now_ns() - start > TIMEOUT_NS) {
            dev->engine.count = 0;
            return "the DMA engine does not come to an end";
        }
        usleep(50);
    }
    return engine_table(dev)->status == STATUS_DONE ? NULL : "the DMA engine refused a copy";
}
