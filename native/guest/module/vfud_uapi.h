/* SPDX-License-Identifier: GPL-2.0-or-later OR BSD-3-Clause */
/*
 * What /dev/vfudN understands: one such file for each reference device in the guest, made by the module vfud.
 *
 * The device's registers and memory are not here: programs map them from sysfs (resource0, resource2), which works
 * with or without this module. What needs a kernel is here: interrupts and memory that the device may reach.
 *
 * pread(fd, counts, 8 * n, 8 * v)  how often vectors v..v+n-1 were handled since VFUD_IRQ_SETUP, u64 each; with
 *                                  INTx, which is one interrupt, how often each of its 32 causes was acknowledged
 * poll(fd)                         readable when any count changed since the last read of this file
 * mmap(fd, bytes, handle)          the buffer that VFUD_DMA_ALLOC returned as `handle`
 *
 * Copyright (c) the vfu-dev authors.
 */
#ifndef VFUD_UAPI_H
#define VFUD_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define VFUD_IRQ_NONE 0
#define VFUD_IRQ_INTX 1
#define VFUD_IRQ_MSI 2
#define VFUD_IRQ_MSIX 3

#define VFUD_MAX_VECTORS 2048

struct vfud_irq_setup {
    __u32 mode;    /* VFUD_IRQ_*; NONE gives all vectors back */
    __u32 vectors; /* in: how many, 0 for all that there are; out: how many there are now */
};

struct vfud_irq_mask {
    __u32 vector;
    __u32 masked; /* MSI and MSI-X: the vector's mask bit; INTx: "interrupt disable" of the command register */
};

struct vfud_irq_state {
    __u32 mode;
    __u32 vectors;
    __u64 foreign; /* INTx: interrupts of the shared line that were not this device's */
};

struct vfud_dma_alloc {
    __u64 bytes;   /* in: multiple of the page size, at most 4 MiB */
    __u64 address; /* out: what the device calls it */
    __u64 handle;  /* out: offset for mmap */
};

#define VFUD_IRQ_SETUP _IOWR('v', 1, struct vfud_irq_setup)
#define VFUD_IRQ_MASK _IOW('v', 2, struct vfud_irq_mask)
#define VFUD_IRQ_STATE _IOR('v', 3, struct vfud_irq_state)
#define VFUD_DMA_ALLOC _IOWR('v', 4, struct vfud_dma_alloc)

#endif
