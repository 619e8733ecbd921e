/*
 * A device: its life, and its ioctls.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

/* Sockets that a device of this process is connected to: a server serves one client, and a second one would hang. */
static bool in_use[MAX_DEVICES];

int device_call(struct device *device, uint16_t command, const void *request, size_t size)
{
    struct wire_call call = { .command = command, .request = { { (void *)(uintptr_t)request, size } } };

    return wire_call(device->wire, &call);
}

/* --- its server's requests -------------------------------------------------------------------------------------- */

static int serve(void *opaque, uint16_t command, void *payload, size_t *size, size_t room)
{
    struct device *device = opaque;
    struct vfio_user_dma_access access;
    char *data = (char *)payload + sizeof(access);
    int result = -EINVAL;

    if (command != VFIO_USER_DMA_READ && command != VFIO_USER_DMA_WRITE) {
        return -ENOSYS;
    }
    if (*size < sizeof(access)) {
        return -EINVAL;
    }
    memcpy(&access, payload, sizeof(access));
    if (access.count > room - sizeof(access)) {
        result = -E2BIG;
    } else if (command == VFIO_USER_DMA_READ && *size == sizeof(access)) {
        result = dma_read(&device->dma, access.address, data, access.count);
        *size = sizeof(access) + access.count;
    } else if (command == VFIO_USER_DMA_WRITE && *size - sizeof(access) == access.count) {
        result = dma_write(&device->dma, access.address, data, access.count);
        *size = sizeof(access);
    }
    trace("device %u: server's %s of %#llx bytes at %#llx: %s", device->number,
          command == VFIO_USER_DMA_READ ? "DMA_READ" : "DMA_WRITE", (unsigned long long)access.count,
          (unsigned long long)access.address, errno_name(result));
    return result;
}

/* --- its memory ------------------------------------------------------------------------------------------------- */

static int send_map(struct device *device, const struct mapping *mapping, bool descriptor)
{
    struct vfio_user_dma_map request = { sizeof(request), mapping->flags, 0, mapping->iova, mapping->size };
    struct wire_call call = { .command = VFIO_USER_DMA_MAP, .request = { { &request, sizeof(request) } } };

    if (descriptor) {
        request.offset = mapping->offset;
        call.send_fds = &mapping->backing->fd;
        call.send_fd_count = 1;
    }
    return wire_call(device->wire, &call);
}

static int map(struct dma_client *client, const struct mapping *mapping)
{
    struct device *device = (struct device *)((char *)client - offsetof(struct device, dma));
    bool descriptor = device->maps_descriptors && mapping->backing != NULL;
    int result = send_map(device, mapping, descriptor);

    if (result < 0 && descriptor && !wire_dead(device->wire)) {
        say("%s: the server refused to map %#llx bytes at %#llx (%s); their DMA goes by message",
            config.sockets[device->number], (unsigned long long)mapping->size, (unsigned long long)mapping->iova,
            strerror(-result));
        descriptor = false;
        result = send_map(device, mapping, false);
    }
    trace("device %u: DMA_MAP [%#llx, +%#llx) flags %#x %s: %s", device->number, (unsigned long long)mapping->iova,
          (unsigned long long)mapping->size, mapping->flags, descriptor ? "by descriptor" : "by message",
          errno_name(result));
    /* A dead server maps nothing, and does no DMA. QEMU would give up the VM over it. */
    return wire_dead(device->wire) ? 0 : result;
}

static void unmap(struct dma_client *client, const struct mapping *mapping)
{
    struct device *device = (struct device *)((char *)client - offsetof(struct device, dma));
    struct vfio_user_dma_unmap request = { sizeof(request), 0, mapping->iova, mapping->size };
    struct vfio_user_dma_unmap reply;
    struct wire_call call = {
        .command = VFIO_USER_DMA_UNMAP,
        .request = { { &request, sizeof(request) } },
        .head = &reply,
        .head_room = sizeof(reply),
    };
    int result = wire_call(device->wire, &call);

    trace("device %u: DMA_UNMAP [%#llx, +%#llx): %s", device->number, (unsigned long long)mapping->iova,
          (unsigned long long)mapping->size, errno_name(result));
    if (result < 0 && !wire_dead(device->wire)) {
        say("%s: the server refused to unmap %#llx bytes at %#llx: %s", config.sockets[device->number],
            (unsigned long long)mapping->size, (unsigned long long)mapping->iova, strerror(-result));
    }
}

/* --- its life --------------------------------------------------------------------------------------------------- */

struct device *device_new(unsigned int number)
{
    struct device *device = calloc(1, sizeof(*device));

    if (device == NULL) {
        return NULL;
    }
    file_init(&device->file, &device_ops);
    device->number = number;
    device->dma.map = map;
    device->dma.unmap = unmap;
    device->migration.state = VFIO_DEVICE_STATE_RUNNING;
    dirty_init(&device->dma.log);
    pthread_mutex_init(&device->migration.lock, NULL);
    pthread_mutex_init(&device->irq_lock, NULL);
    return device;
}

static int fetch_info(struct device *device)
{
    struct vfio_user_device_info {
        uint32_t argsz, flags, regions, irqs;
    } info = { sizeof(info), 0, 0, 0 };
    struct wire_call call = {
        .command = VFIO_USER_DEVICE_GET_INFO,
        .request = { { &info, sizeof(info) } },
        .head = &info,
        .head_room = sizeof(info),
    };
    int result = wire_call(device->wire, &call);

    if (result < 0) {
        return result;
    }
    if (call.head_size != sizeof(info) || !(info.flags & VFIO_DEVICE_FLAGS_PCI) || info.regions > MAX_REGIONS ||
        info.irqs > MAX_IRQ_TYPES) {
        say("%s: the server sent impossible device info (%u regions, %u kinds of interrupts, flags %#x)",
            config.sockets[device->number], info.regions, info.irqs, info.flags);
        return -EPROTO;
    }
    device->info.flags = info.flags & (VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET);
    device->info.num_regions = info.regions;
    device->info.num_irqs = info.irqs;
    return 0;
}

/* Which way its DMA goes, and what becomes of the dirty pages. */
static void choose_dma(struct device *device)
{
    const char *socket = config.sockets[device->number];

    device->maps_descriptors = config.dma != DMA_MESSAGE;
    if (device->has_dma_log || device->migration.flags == 0) {
        return;
    }
    if (config.dma == DMA_AUTO) {
        device->maps_descriptors = false;
        say("%s: the server keeps no log of its DMA: all of it goes by message, so that dirty pages are known", socket);
    } else if (config.dma == DMA_MAPPED) {
        say("%s: the server keeps no log of its DMA: all of its memory is reported as dirty", socket);
    }
}

static void disconnect(struct device *device)
{
    wire_close(device->wire);
    device->wire = NULL;
    regions_free(device);
    __atomic_clear(&in_use[device->number], __ATOMIC_RELEASE);
}

int device_connect(struct device *device)
{
    int result;

    if (__atomic_test_and_set(&in_use[device->number], __ATOMIC_ACQ_REL)) {
        return -EBUSY;
    }
    result = wire_open(&device->wire, config.sockets[device->number], serve, device);
    if (result < 0) {
        device->wire = NULL;
        __atomic_clear(&in_use[device->number], __ATOMIC_RELEASE);
        return result;
    }
    result = fetch_info(device);
    if (result == 0) {
        result = regions_fetch(device);
    }
    if (result == 0) {
        features_probe(device);
        choose_dma(device);
        result = wire_dead(device->wire) ? -ENOTCONN : 0;
    }
    if (result < 0) {
        disconnect(device);
    }
    return result;
}

static void release(struct file *file)
{
    struct device *device = (struct device *)file;

    resample_stop(device);
    if (device->wire != NULL) {
        ioas_detach(&device->dma);
        disconnect(device);
    }
    if (device->leave != NULL) {
        device->leave(device);
    }
    if (device->space != NULL) {
        file_put(device->space);
    }
    dirty_destroy(&device->dma.log);
    window_drop(device);
    pthread_mutex_destroy(&device->migration.lock);
    pthread_mutex_destroy(&device->irq_lock);
    free(device);
}

/* --- its ioctls ------------------------------------------------------------------------------------------------- */

static long get_info(struct device *device, void *argument)
{
    size_t least = offsetof(struct vfio_device_info, cap_offset);
    struct vfio_device_info info;
    int result = fetch_argsz(&info, argument, least);
    uint32_t argsz = info.argsz;

    if (result < 0) {
        return result;
    }
    info = device->info;
    info.argsz = sizeof(info);
    return copy_to_user(ADDRESS(argument), &info, MIN(argsz, sizeof(info)));
}

static long reset(struct device *device)
{
    int result = device_call(device, VFIO_USER_DEVICE_RESET, NULL, 0);

    /* QEMU's answer to a failure of this one is hw_error(). */
    if (wire_dead(device->wire)) {
        return 0;
    }
    migration_after_reset(device);
    return result;
}

/* Each device is alone in its slot: a hot reset of it resets nothing else. */
static long hot_reset_info(struct device *device, void *argument)
{
    struct {
        struct vfio_pci_hot_reset_info head;
        struct vfio_pci_dependent_device device;
    } info;
    int result = fetch_argsz(&info, argument, sizeof(info.head));
    uint32_t argsz = info.head.argsz;

    if (result < 0) {
        return result;
    }
    memset(&info, 0, sizeof(info));
    info.head.argsz = sizeof(info);
    info.head.count = 1;
    info.device.devfn = (uint8_t)(device->number << 3);
    if (device->id != 0) {
        info.head.flags = VFIO_PCI_HOT_RESET_FLAG_DEV_ID | VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED;
        info.device.devid = device->id;
    } else {
        info.device.group_id = device->group;
    }
    result = copy_to_user(ADDRESS(argument), &info, MIN(argsz, sizeof(info)));
    return result < 0 ? result : argsz < sizeof(info) ? -ENOSPC : 0;
}

static long hot_reset(struct device *device, void *argument)
{
    struct vfio_pci_hot_reset request;
    int result = fetch_argsz(&request, argument, sizeof(request));

    if (result < 0) {
        return result;
    }
    if (request.flags != 0 || (device->id != 0) != (request.count == 0)) {
        return -EINVAL;
    }
    return reset(device);
}

static long device_ioctl(struct file *file, unsigned long request, void *argument)
{
    struct device *device = (struct device *)file;

    if (request == VFIO_DEVICE_BIND_IOMMUFD) {
        return iommufd_bind(device, argument);
    }
    if (device->space == NULL) {
        return -EINVAL; /* as in the kernel, before it is bound */
    }
    collectors_flush(device);
    switch (request) {
    case VFIO_DEVICE_ATTACH_IOMMUFD_PT:
        return iommufd_attach(device, argument);
    case VFIO_DEVICE_DETACH_IOMMUFD_PT:
        return iommufd_detach(device, argument);
    case VFIO_DEVICE_GET_INFO:
        return get_info(device, argument);
    case VFIO_DEVICE_GET_REGION_INFO:
        return region_info(device, argument);
    case VFIO_DEVICE_GET_IRQ_INFO:
        return irq_info(device, argument);
    case VFIO_DEVICE_SET_IRQS:
        return irq_set(device, argument);
    case VFIO_DEVICE_RESET:
        return device->info.flags & VFIO_DEVICE_FLAGS_RESET ? reset(device) : -EINVAL;
    case VFIO_DEVICE_GET_PCI_HOT_RESET_INFO:
        return hot_reset_info(device, argument);
    case VFIO_DEVICE_PCI_HOT_RESET:
        return hot_reset(device, argument);
    case VFIO_DEVICE_FEATURE:
        return feature_ioctl(device, argument);
    }
    return -ENOTTY;
}

static ssize_t device_pread(struct file *file, void *buffer, size_t count, uint64_t offset)
{
    struct device *device = (struct device *)file;

    return device->space == NULL ? -EINVAL : region_read(device, buffer, count, offset);
}

static ssize_t device_pwrite(struct file *file, const void *buffer, size_t count, uint64_t offset)
{
    struct device *device = (struct device *)file;

    return device->space == NULL ? -EINVAL : region_write(device, buffer, count, offset);
}

static long device_mmap(struct file *file, void *address, size_t length, int protection, int flags, uint64_t offset)
{
    struct device *device = (struct device *)file;

    return device->space == NULL ? -EINVAL : region_mmap(device, address, length, protection, flags, offset);
}

const struct file_ops device_ops = {
    .name = "device",
    .ioctl = device_ioctl,
    .pread = device_pread,
    .pwrite = device_pwrite,
    .mmap = device_mmap,
    .release = release,
};
