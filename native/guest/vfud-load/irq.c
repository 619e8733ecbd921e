/*
 * Interrupts: ask the module for them, count them, raise and mask them.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "arguments.h"
#include "../module/vfud_uapi.h"
#include "device.h"
#include "irq.h"
#include "line.h"

static const char *const mode_names[] = {"none", "intx", "msi", "msix"};

/* The device that is meant, if the module drives it; NULL after a refusal. */
static struct device *driven_device(const char *command, const char *arguments)
{
    struct device *dev = chosen_device(command, arguments);

    if (dev && dev->driver < 0) {
        refuse(command, "the module vfud does not drive %s", dev->address);
        return NULL;
    }
    return dev;
}

/*
 * irq mode=none|intx|msi|msix [vectors=N] [device=N]: give back what was taken, then take N vectors; without N, all
 * that there are.
 */
void command_irq(const char *arguments)
{
    struct device *dev = driven_device("irq", arguments);
    struct vfud_irq_setup setup = {.mode = UINT32_MAX, .vectors = (uint32_t)integer(arguments, "vectors", 0)};

    if (!dev)
        return;
    for (uint32_t mode = 0; mode < sizeof(mode_names) / sizeof(*mode_names); mode++)
        if (option_is(arguments, "mode", mode_names[mode]))
            setup.mode = mode;
    if (setup.mode == UINT32_MAX) {
        refuse("irq", "mode: none, intx, msi or msix");
        return;
    }
    if (ioctl(dev->driver, VFUD_IRQ_SETUP, &setup) < 0) {
        refuse("irq", "%s: %s", mode_names[setup.mode], strerror(errno));
        return;
    }
    reply("{\"reply\":\"irq\",\"ok\":true,\"mode\":\"%s\",\"vectors\":%u}", mode_names[setup.mode], setup.vectors);
}

/* irqs [device=N]: what was counted since `irq`, by vector. */
void command_irqs(const char *arguments)
{
    static uint64_t counts[VFUD_MAX_VECTORS];
    struct device *dev = driven_device("irqs", arguments);
    struct vfud_irq_state state;
    uint64_t total = 0;

    if (!dev)
        return;
    if (ioctl(dev->driver, VFUD_IRQ_STATE, &state) < 0 ||
        pread(dev->driver, counts, sizeof(counts), 0) != (ssize_t)(state.vectors * sizeof(*counts))) {
        refuse("irqs", "%s", strerror(errno));
        return;
    }
    reply_part("{\"reply\":\"irqs\",\"ok\":true,\"mode\":\"%s\",\"foreign\":%" PRIu64 ",\"counts\":[",
               mode_names[state.mode], (uint64_t)state.foreign);
    for (uint32_t i = 0; i < state.vectors; i++) {
        reply_part("%s%" PRIu64, i ? "," : "", counts[i]);
        total += counts[i];
    }
    reply_part("],\"total\":%" PRIu64 ",\"raised\":%u}", total, read32(dev, REG_IRQ_COUNT));
    reply_end();
}

static uint64_t counted(const struct device *dev, uint64_t vector)
{
    uint64_t count = 0;

    if (dev->driver < 0 || pread(dev->driver, &count, sizeof(count), (off_t)(vector * sizeof(count))) < 0)
        return 0;
    return count;
}

/*
 * irq-raise [vector=N] [count=N] [wait_ms=N] [device=N]: have the device raise a vector, by its register. Interrupts
 * that come faster than they are taken become one, as they do in real hardware; with wait_ms, each one has that long
 * to be counted before the next is raised.
 */
void command_irq_raise(const char *arguments)
{
    struct device *dev = chosen_device("irq-raise", arguments);
    uint64_t vector = integer(arguments, "vector", 0), count = integer(arguments, "count", 1);
    uint64_t wait_ns = integer(arguments, "wait_ms", 0) * 1000000, lost = 0;

    if (!dev)
        return;
    if (count > 1000000) {
        refuse("irq-raise", "count: at most 1000000");
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t before = counted(dev, vector), start = now_ns();

        write32(dev, REG_IRQ_RAISE, (uint32_t)vector);
        while (wait_ns && counted(dev, vector) == before) {
            if (now_ns() - start > wait_ns) {
                lost++;
                break;
            }
            usleep(200);
        }
    }
    reply("{\"reply\":\"irq-raise\",\"ok\":true,\"raised\":%u,\"lost\":%" PRIu64 "}", read32(dev, REG_IRQ_COUNT),
          lost);
}

/* irq-mask [vector=N] masked=0|1 [device=N]: the vector's mask bit; with INTx, "interrupt disable". */
void command_irq_mask(const char *arguments)
{
    struct device *dev = driven_device("irq-mask", arguments);
    struct vfud_irq_mask mask = {
        .vector = (uint32_t)integer(arguments, "vector", 0),
        .masked = (uint32_t)integer(arguments, "masked", 1),
    };

    if (!dev)
        return;
    if (ioctl(dev->driver, VFUD_IRQ_MASK, &mask) < 0) {
        refuse("irq-mask", "vector %u: %s", mask.vector, strerror(errno));
        return;
    }
    reply("{\"reply\":\"irq-mask\",\"ok\":true,\"vector\":%u,\"masked\":%u}", mask.vector, mask.masked);
}
