// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * vfud: a Linux driver for the reference device of vfu-dev, for tests of migration.
 *
 * It enables the device, counts its interrupts by vector in whichever mode is asked for (INTx, MSI, MSI-X), and
 * hands out memory that the device may reach. It decides nothing: vfud-load, in user space, drives the device by
 * the registers that it maps from sysfs. For that, BARs are not requested here: with IO_STRICT_DEVMEM a BAR that a
 * driver has claimed cannot be mapped from sysfs.
 *
 * Copyright (c) the vfu-dev authors.
 */

#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "vfud.h"

#define VFUD_VENDOR 0x4656
#define VFUD_DEVICE 0x4455

/* The largest stretch that the page allocator of x86 has. */
#define BUFFER_MAX (4UL << 20)
/* Handles are this far apart, so that a buffer is found by its mmap offset. */
#define BUFFER_SPACING (1ULL << 24)

struct vfud_buffer {
    struct list_head link;
    u64 handle;
    size_t bytes;
    void *cpu;
    dma_addr_t dma;
};

struct vfud_file {
    struct vfud *vfud;
    u64 seen;
};

static DEFINE_IDA(vfud_numbers);

static void vfud_release(struct kref *kref)
{
    struct vfud *vfud = container_of(kref, struct vfud, kref);
    struct vfud_buffer *buffer, *next;

    list_for_each_entry_safe(buffer, next, &vfud->buffers, link) {
        dma_free_coherent(&vfud->pdev->dev, buffer->bytes, buffer->cpu, buffer->dma);
        kfree(buffer);
    }
    ida_free(&vfud_numbers, vfud->number);
    pci_dev_put(vfud->pdev);
    kfree(vfud->misc.name);
    kfree(vfud);
}

/* --- memory for DMA --------------------------------------------------------------------------------------- */

static int vfud_dma_alloc(struct vfud *vfud, struct vfud_dma_alloc *alloc)
{
    struct vfud_buffer *buffer;

    if (!alloc->bytes || alloc->bytes > BUFFER_MAX || alloc->bytes % PAGE_SIZE)
        return -EINVAL;
    buffer = kzalloc(sizeof(*buffer), GFP_KERNEL);
    if (!buffer)
        return -ENOMEM;
    buffer->bytes = alloc->bytes;
    buffer->cpu = dma_alloc_coherent(&vfud->pdev->dev, buffer->bytes, &buffer->dma, GFP_KERNEL | __GFP_NOWARN);
    if (!buffer->cpu) {
        kfree(buffer);
        return -ENOMEM;
    }
    buffer->handle = vfud->next_handle;
    vfud->next_handle += BUFFER_SPACING;
    list_add_tail(&buffer->link, &vfud->buffers);
    alloc->address = buffer->dma;
    alloc->handle = buffer->handle;
    return 0;
}

static int vfud_mmap(struct file *file, struct vm_area_struct *vma)
{
    struct vfud_file *opened = file->private_data;
    struct vfud *vfud = opened->vfud;
    u64 handle = (u64)vma->vm_pgoff << PAGE_SHIFT;
    struct vfud_buffer *buffer;
    int error = -EINVAL;

    mutex_lock(&vfud->lock);
    list_for_each_entry(buffer, &vfud->buffers, link) {
        if (buffer->handle == handle) {
            vma->vm_pgoff = 0;
            error = dma_mmap_coherent(&vfud->pdev->dev, vma, buffer->cpu, buffer->dma, buffer->bytes);
            break;
        }
    }
    mutex_unlock(&vfud->lock);
    return error;
}

/* --- the file --------------------------------------------------------------------------------------------- */

static int vfud_open(struct inode *inode, struct file *file)
{
    /* misc_open() holds the lock that misc_deregister() needs, so the device is still there. */
    struct vfud *vfud = container_of(file->private_data, struct vfud, misc);
    struct vfud_file *opened = kzalloc(sizeof(*opened), GFP_KERNEL);

    if (!opened)
        return -ENOMEM;
    kref_get(&vfud->kref);
    opened->vfud = vfud;
    file->private_data = opened;
    return 0;
}

static int vfud_close(struct inode *inode, struct file *file)
{
    struct vfud_file *opened = file->private_data;

    kref_put(&opened->vfud->kref, vfud_release);
    kfree(opened);
    return 0;
}

static ssize_t vfud_read(struct file *file, char __user *to, size_t bytes, loff_t *offset)
{
    struct vfud_file *opened = file->private_data;
    struct vfud *vfud = opened->vfud;
    size_t first = *offset / sizeof(u64), count = bytes / sizeof(u64), i;
    ssize_t done = 0;

    if (*offset % sizeof(u64))
        return -EINVAL;
    mutex_lock(&vfud->lock);
    opened->seen = atomic64_read(&vfud->total);
    for (i = first; i < vfud->vectors && i - first < count; i++) {
        if (put_user(READ_ONCE(vfud->vector[i].count), (u64 __user *)(to + done))) {
            done = -EFAULT;
            break;
        }
        done += sizeof(u64);
    }
    mutex_unlock(&vfud->lock);
    return done;
}

static __poll_t vfud_poll(struct file *file, struct poll_table_struct *table)
{
    struct vfud_file *opened = file->private_data;
    struct vfud *vfud = opened->vfud;

    poll_wait(file, &vfud->changed, table);
    if (READ_ONCE(vfud->gone))
        return EPOLLHUP;
    return opened->seen != (u64)atomic64_read(&vfud->total) ? EPOLLIN | EPOLLRDNORM : 0;
}

static long vfud_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
    struct vfud_file *opened = file->private_data;
    struct vfud *vfud = opened->vfud;
    void __user *user = (void __user *)argument;
    union {
        struct vfud_irq_setup setup;
        struct vfud_irq_mask mask;
        struct vfud_irq_state state;
        struct vfud_dma_alloc alloc;
    } data = {};
    long result;

    if (_IOC_SIZE(command) > sizeof(data))
        return -ENOTTY;
    if (_IOC_DIR(command) & _IOC_WRITE && copy_from_user(&data, user, _IOC_SIZE(command)))
        return -EFAULT;
    mutex_lock(&vfud->lock);
    if (vfud->gone) {
        result = -ENODEV;
    } else {
        switch (command) {
        case VFUD_IRQ_SETUP:
            result = vfud_irq_setup(vfud, &data.setup);
            break;
        case VFUD_IRQ_MASK:
            result = vfud_irq_mask(vfud, &data.mask);
            break;
        case VFUD_IRQ_STATE:
            data.state.mode = vfud->mode;
            data.state.vectors = vfud->vectors;
            data.state.foreign = vfud->foreign;
            result = 0;
            break;
        case VFUD_DMA_ALLOC:
            result = vfud_dma_alloc(vfud, &data.alloc);
            break;
        default:
            result = -ENOTTY;
        }
    }
    mutex_unlock(&vfud->lock);
    if (!result && _IOC_DIR(command) & _IOC_READ && copy_to_user(user, &data, _IOC_SIZE(command)))
        return -EFAULT;
    return result;
}

static const struct file_operations vfud_operations = {
    .owner = THIS_MODULE,
    .open = vfud_open,
    .release = vfud_close,
    .read = vfud_read,
    .poll = vfud_poll,
    .mmap = vfud_mmap,
    .unlocked_ioctl = vfud_ioctl,
    .llseek = default_llseek,
};

/* --- the driver ------------------------------------------------------------------------------------------- */

static int vfud_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
    struct vfud *vfud = kzalloc(sizeof(*vfud), GFP_KERNEL);
    int error;

    if (!vfud)
        return -ENOMEM;
    kref_init(&vfud->kref);
    mutex_init(&vfud->lock);
    init_waitqueue_head(&vfud->changed);
    INIT_LIST_HEAD(&vfud->buffers);
    vfud->pdev = pci_dev_get(pdev);
    vfud->number = ida_alloc(&vfud_numbers, GFP_KERNEL);
    if (vfud->number < 0) {
        error = vfud->number;
        pci_dev_put(pdev);
        kfree(vfud);
        return error;
    }
    vfud->misc.minor = MISC_DYNAMIC_MINOR;
    vfud->misc.fops = &vfud_operations;
    vfud->misc.parent = &pdev->dev;
    vfud->misc.name = kasprintf(GFP_KERNEL, "vfud%d", vfud->number);
    error = -ENOMEM;
    if (!vfud->misc.name)
        goto put;
    error = pci_enable_device(pdev);
    if (error)
        goto put;
    error = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
    if (error)
        goto disable;
    vfud->registers = pci_iomap(pdev, 0, 0);
    error = -ENODEV;
    if (!vfud->registers)
        goto disable;
    pci_set_master(pdev);
    pci_set_drvdata(pdev, vfud);
    error = misc_register(&vfud->misc);
    if (error)
        goto unmap;
    pci_info(pdev, "%s\n", vfud->misc.name);
    return 0;

unmap:
    pci_iounmap(pdev, vfud->registers);
disable:
    pci_disable_device(pdev);
put:
    kref_put(&vfud->kref, vfud_release);
    return error;
}

static void vfud_remove(struct pci_dev *pdev)
{
    struct vfud *vfud = pci_get_drvdata(pdev);

    misc_deregister(&vfud->misc);
    mutex_lock(&vfud->lock);
    vfud_irq_free(vfud);
    WRITE_ONCE(vfud->gone, true);
    mutex_unlock(&vfud->lock);
    wake_up_interruptible(&vfud->changed);
    pci_iounmap(pdev, vfud->registers);
    pci_clear_master(pdev);
    pci_disable_device(pdev);
    kref_put(&vfud->kref, vfud_release);
}

static const struct pci_device_id vfud_ids[] = {{PCI_DEVICE(VFUD_VENDOR, VFUD_DEVICE)}, {}};
MODULE_DEVICE_TABLE(pci, vfud_ids);

static struct pci_driver vfud_driver = {
    .name = "vfud",
    .id_table = vfud_ids,
    .probe = vfud_probe,
    .remove = vfud_remove,
};
module_pci_driver(vfud_driver);

MODULE_DESCRIPTION("driver for the reference device of vfu-dev");
MODULE_AUTHOR("the vfu-dev authors");
MODULE_LICENSE("GPL");
