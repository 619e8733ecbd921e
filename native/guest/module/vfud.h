/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the parts of the driver share: one device, and its interrupts.
 *
 * Copyright (c) the vfu-dev authors.
 */
#ifndef VFUD_H
#define VFUD_H

#include <linux/kref.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/wait.h>

#include "vfud_uapi.h"

struct vfud_vector {
    struct vfud *vfud;
    u64 count;
    bool masked;
};

/* Lives as long as the driver is bound or a file is open, whichever ends last. */
struct vfud {
    struct kref kref;
    struct pci_dev *pdev;
    struct miscdevice misc;
    int number;
    void __iomem *registers;
    struct mutex lock; /* all below but the counts */
    bool gone;
    u32 mode;
    unsigned int vectors;  /* that are counted: of INTx, its causes */
    unsigned int requested; /* interrupts of the kernel's; of INTx, one */
    struct vfud_vector *vector;
    struct list_head buffers;
    u64 next_handle;
    u64 foreign;
    atomic64_t total;
    wait_queue_head_t changed;
};

/* irq.c; the caller of these holds the lock. */
void vfud_irq_free(struct vfud *vfud);
int vfud_irq_setup(struct vfud *vfud, struct vfud_irq_setup *setup);
int vfud_irq_mask(struct vfud *vfud, const struct vfud_irq_mask *mask);

#endif
