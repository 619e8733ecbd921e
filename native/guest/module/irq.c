// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The device's interrupts, counted by vector in whichever mode is asked for: INTx, MSI, MSI-X.
 *
 * Copyright (c) the vfu-dev authors.
 */

#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/slab.h>

#include "vfud.h"

#ifndef PCI_IRQ_INTX /* its name since Linux 6.8 */
#define PCI_IRQ_INTX PCI_IRQ_LEGACY
#endif

/* BAR0: what INTx is asserted for, one bit a cause; writing ones acknowledges them. */
#define REG_INTX_CAUSES 0x48
#define CAUSES 32

static void vfud_count(struct vfud_vector *vector)
{
    WRITE_ONCE(vector->count, vector->count + 1);
    atomic64_inc(&vector->vfud->total);
    wake_up_interruptible(&vector->vfud->changed);
}

static irqreturn_t vfud_message(int irq, void *data)
{
    vfud_count(data);
    return IRQ_HANDLED;
}

static irqreturn_t vfud_line(int irq, void *data)
{
    struct vfud_vector *first = data;
    struct vfud *vfud = first->vfud;
    u32 causes = ioread32(vfud->registers + REG_INTX_CAUSES);
    unsigned int i;

    /* All ones: the device is gone. */
    if (!causes || causes == ~0U) {
        vfud->foreign++;
        return IRQ_NONE;
    }
    iowrite32(causes, vfud->registers + REG_INTX_CAUSES);
    for (i = 0; i < CAUSES; i++)
        if (causes & BIT(i))
            vfud_count(&first[i]);
    return IRQ_HANDLED;
}

void vfud_irq_free(struct vfud *vfud)
{
    unsigned int i;

    for (i = 0; i < vfud->requested; i++) {
        struct vfud_vector *vector = &vfud->vector[i];
        int irq = pci_irq_vector(vfud->pdev, i);

        if (vector->masked && vfud->mode != VFUD_IRQ_INTX)
            enable_irq(irq);
        free_irq(irq, vector);
    }
    if (vfud->mode != VFUD_IRQ_NONE)
        pci_free_irq_vectors(vfud->pdev);
    kfree(vfud->vector);
    vfud->vector = NULL;
    vfud->vectors = 0;
    vfud->requested = 0;
    vfud->mode = VFUD_IRQ_NONE;
}

int vfud_irq_setup(struct vfud *vfud, struct vfud_irq_setup *setup)
{
    static const unsigned int kinds[] = {0, PCI_IRQ_INTX, PCI_IRQ_MSI, PCI_IRQ_MSIX};
    bool exact = setup->vectors;
    bool line = setup->mode == VFUD_IRQ_INTX;
    unsigned int wanted = exact ? setup->vectors : VFUD_MAX_VECTORS;
    unsigned int i;
    int got, error;

    if (setup->mode >= ARRAY_SIZE(kinds) || wanted > VFUD_MAX_VECTORS)
        return -EINVAL;
    vfud_irq_free(vfud);
    vfud->foreign = 0;
    atomic64_set(&vfud->total, 0);
    setup->vectors = 0;
    if (setup->mode == VFUD_IRQ_NONE)
        return 0;
    if (line)
        wanted = 1;
    got = pci_alloc_irq_vectors(vfud->pdev, exact ? wanted : 1, wanted, kinds[setup->mode]);
    if (got < 0)
        return got;
    vfud->mode = setup->mode;
    vfud->vector = kcalloc(line ? CAUSES : got, sizeof(*vfud->vector), GFP_KERNEL);
    if (!vfud->vector) {
        vfud_irq_free(vfud);
        return -ENOMEM;
    }
    vfud->vectors = line ? CAUSES : got;
    for (i = 0; i < vfud->vectors; i++)
        vfud->vector[i].vfud = vfud;
    pci_intx(vfud->pdev, line);
    for (i = 0; i < (unsigned int)got; i++) {
        int irq = pci_irq_vector(vfud->pdev, i);

        /* Masking has to reach the device: the lazy way only ignores what it sends. */
        if (!line)
            irq_set_status_flags(irq, IRQ_DISABLE_UNLAZY);
        error = request_irq(irq, line ? vfud_line : vfud_message, line ? IRQF_SHARED : 0, vfud->misc.name,
                            &vfud->vector[i]);
        if (error) {
            vfud_irq_free(vfud);
            return error;
        }
        vfud->requested++;
    }
    setup->vectors = vfud->vectors;
    return 0;
}

int vfud_irq_mask(struct vfud *vfud, const struct vfud_irq_mask *mask)
{
    struct vfud_vector *vector;

    if (mask->vector >= vfud->requested || mask->masked > 1)
        return -EINVAL;
    vector = &vfud->vector[mask->vector];
    if (vector->masked == mask->masked)
        return 0;
    vector->masked = mask->masked;
    if (vfud->mode == VFUD_IRQ_INTX)
        pci_intx(vfud->pdev, !mask->masked);
    else if (mask->masked)
        disable_irq(pci_irq_vector(vfud->pdev, mask->vector));
    else
        enable_irq(pci_irq_vector(vfud->pdev, mask->vector));
    return 0;
}
