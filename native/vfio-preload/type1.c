/*
 * The older way to an I/O address space: groups, and containers with a type 1 IOMMU.
 *
 * Each made-up device is alone in its group. Not here, and refused: version 1 semantics of unmapping, new virtual
 * addresses for old mappings (VFIO_UPDATE_VADDR, which CPR needs), and dirty tracking by the IOMMU.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device.h"

#define MAX_MAPPINGS 65535u /* the kernel's dma_entry_limit */

struct container {
    struct file file;
    int real;
    pthread_mutex_t lock; /* what follows */
    unsigned int groups;
    bool has_iommu;
    struct ioas ioas;
};

struct group {
    struct file file;
    unsigned int number; /* of the device */
    pthread_mutex_t lock; /* what follows */
    struct container *container; /* with a reference; NULL: none */
    unsigned int open_devices;
};

static bool group_open[MAX_DEVICES]; /* a group is opened once at a time */

/* --- containers -------------------------------------------------------------------------------------------------- */

static long check_extension(unsigned long extension)
{
    switch (extension) {
    case VFIO_TYPE1_IOMMU:
    case VFIO_TYPE1v2_IOMMU:
    case VFIO_DMA_CC_IOMMU:
    case VFIO_UNMAP_ALL:
        return 1;
    }
    return 0;
}

static long set_iommu(struct container *container, unsigned long type)
{
    long result = -EINVAL;

    pthread_mutex_lock(&container->lock);
    if (container->groups > 0 && !container->has_iommu && (type == VFIO_TYPE1_IOMMU || type == VFIO_TYPE1v2_IOMMU)) {
        container->has_iommu = true;
        result = 0;
    }
    pthread_mutex_unlock(&container->lock);
    return result;
}

static long get_info(struct container *container, void *argument)
{
    struct {
        struct vfio_iommu_type1_info head;
        struct vfio_iommu_type1_info_cap_iova_range ranges;
        struct vfio_iova_range range;
        struct vfio_iommu_type1_info_dma_avail available;
    } info;
    const size_t least = offsetof(struct vfio_iommu_type1_info, cap_offset);
    long result = fetch_argsz(&info.head, argument, least);
    uint32_t argsz = info.head.argsz;
    size_t mappings;

    if (result < 0) {
        return result;
    }
    pthread_mutex_lock(&container->ioas.change);
    mappings = container->ioas.count;
    pthread_mutex_unlock(&container->ioas.change);
    memset(&info, 0, sizeof(info));
    info.head.argsz = sizeof(info);
    info.head.flags = VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS;
    info.head.iova_pgsizes = ~(PAGE_BYTES - 1);
    info.ranges.header.id = VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE;
    info.ranges.header.version = 1;
    info.ranges.nr_iovas = 1;
    info.range.end = UINT64_MAX;
    info.available.header.id = VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL;
    info.available.header.version = 1;
    info.available.avail = MAX_MAPPINGS - (uint32_t)MIN(mappings, MAX_MAPPINGS);
    if (argsz < sizeof(info)) {
        return copy_to_user(ADDRESS(argument), &info, MIN(argsz, sizeof(info.head)));
    }
    info.head.argsz = argsz;
    info.head.cap_offset = sizeof(info.head);
    info.ranges.header.next = (uint32_t)((char *)&info.available - (char *)&info);
    return copy_to_user(ADDRESS(argument), &info, sizeof(info));
}

static long map(struct container *container, void *argument)
{
    const uint32_t known = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    struct vfio_iommu_type1_dma_map request;
    long result = fetch_argsz(&request, argument, sizeof(request));
    bool full;

    if (result < 0) {
        return result;
    }
    if ((request.flags & ~known) || request.flags == 0 || request.size == 0 ||
        (request.iova | request.size | request.vaddr) % PAGE_BYTES != 0 ||
        request.size - 1 > UINT64_MAX - request.iova || request.size - 1 > UINT64_MAX - request.vaddr) {
        return -EINVAL;
    }
    pthread_mutex_lock(&container->ioas.change);
    full = container->ioas.count >= MAX_MAPPINGS;
    pthread_mutex_unlock(&container->ioas.change);
    return full ? -ENOSPC : ioas_map(&container->ioas, request.iova, request.size, request.flags, request.vaddr);
}

static long unmap(struct container *container, void *argument)
{
    struct vfio_iommu_type1_dma_unmap request;
    long result = fetch_argsz(&request, argument, sizeof(request));
    uint64_t last, unmapped;

    if (result < 0) {
        return result;
    }
    if (request.flags == VFIO_DMA_UNMAP_FLAG_ALL) {
        if (request.iova != 0 || request.size != 0) {
            return -EINVAL;
        }
        last = UINT64_MAX;
    } else if (request.flags != 0 || request.size == 0 || (request.iova | request.size) % PAGE_BYTES != 0 ||
               request.size - 1 > UINT64_MAX - request.iova) {
        return -EINVAL;
    } else {
        last = request.iova + (request.size - 1);
    }
    result = ioas_unmap(&container->ioas, request.iova, last, &unmapped);
    if (result < 0) {
        return result == -EBUSY ? -EINVAL : result; /* it would split a mapping */
    }
    request.size = unmapped;
    return copy_to_user(ADDRESS(argument), &request, sizeof(request));
}

static long container_ioctl(struct file *file, unsigned long request, void *argument)
{
    struct container *container = (struct container *)file;
    bool has_iommu;

    if (container->real >= 0) {
        long result = syscall(SYS_ioctl, container->real, request, argument);

        return result < 0 ? -errno : result;
    }
    pthread_mutex_lock(&container->lock);
    has_iommu = container->has_iommu;
    pthread_mutex_unlock(&container->lock);
    switch (request) {
    case VFIO_GET_API_VERSION:
        return VFIO_API_VERSION;
    case VFIO_CHECK_EXTENSION:
        return check_extension((unsigned long)(uintptr_t)argument);
    case VFIO_SET_IOMMU:
        return set_iommu(container, (unsigned long)(uintptr_t)argument);
    case VFIO_IOMMU_GET_INFO:
        return has_iommu ? get_info(container, argument) : -EINVAL;
    case VFIO_IOMMU_MAP_DMA:
        return has_iommu ? map(container, argument) : -EINVAL;
    case VFIO_IOMMU_UNMAP_DMA:
        return has_iommu ? unmap(container, argument) : -EINVAL;
    }
    return has_iommu ? -ENOTTY : -EINVAL;
}

static void container_release(struct file *file)
{
    struct container *container = (struct container *)file;

    ioas_destroy(&container->ioas);
    if (container->real >= 0) {
        internal_close(container->real);
    }
    pthread_mutex_destroy(&container->lock);
    free(container);
}

const struct file_ops container_ops = {
    .name = "container",
    .ioctl = container_ioctl,
    .release = container_release,
};

struct file *container_new(int real)
{
    struct container *container = calloc(1, sizeof(*container));

    if (container == NULL) {
        return NULL;
    }
    file_init(&container->file, &container_ops);
    container->real = real;
    pthread_mutex_init(&container->lock, NULL);
    ioas_init(&container->ioas);
    return &container->file;
}

int container_give_up(struct file *file)
{
    /* QEMU tries every container that it has, and opens another one when the kernel says no: nothing to report. */
    return ((struct container *)file)->real < 0 ? -EINVAL : 0;
}

/* --- groups ------------------------------------------------------------------------------------------------------ */

static long get_status(struct group *group, void *argument)
{
    struct vfio_group_status status;
    long result = fetch_argsz(&status, argument, sizeof(status));

    if (result < 0) {
        return result;
    }
    pthread_mutex_lock(&group->lock);
    status.flags = VFIO_GROUP_FLAGS_VIABLE | (group->container != NULL ? VFIO_GROUP_FLAGS_CONTAINER_SET : 0);
    pthread_mutex_unlock(&group->lock);
    return copy_to_user(ADDRESS(argument), &status, sizeof(status));
}

static long set_container(struct group *group, void *argument)
{
    struct container *container;
    long result = 0;
    int fd;

    if (copy_from_user(&fd, ADDRESS(argument), sizeof(fd)) != 0) {
        return -EFAULT;
    }
    container = (struct container *)file_get(fd, &container_ops);
    if (container == NULL) {
        return -EINVAL; /* of a real device: a made-up one needs another */
    }
    pthread_mutex_lock(&group->lock);
    if (group->container != NULL) {
        result = -EINVAL;
    } else {
        pthread_mutex_lock(&container->lock);
        container->groups++;
        if (container->real >= 0) { /* now it is known whose it is */
            internal_close(container->real);
            container->real = -1;
        }
        pthread_mutex_unlock(&container->lock);
        group->container = container;
    }
    pthread_mutex_unlock(&group->lock);
    if (result != 0) {
        file_put(&container->file);
    }
    return result;
}

static long unset_container(struct group *group)
{
    struct container *container = NULL;
    long result = 0;

    pthread_mutex_lock(&group->lock);
    if (group->container == NULL) {
        result = -EINVAL;
    } else if (group->open_devices > 0) {
        result = -EBUSY;
    } else {
        container = group->container;
        group->container = NULL;
    }
    pthread_mutex_unlock(&group->lock);
    if (container != NULL) {
        pthread_mutex_lock(&container->lock);
        if (--container->groups == 0) {
            container->has_iommu = false;
        }
        pthread_mutex_unlock(&container->lock);
        file_put(&container->file);
    }
    return result;
}

static void leave(struct device *device)
{
    struct group *group = (struct group *)device->space;

    pthread_mutex_lock(&group->lock);
    group->open_devices--;
    pthread_mutex_unlock(&group->lock);
}

/* Any name: there is one device in the group, and only the launcher knows what it is called. */
static long get_device_fd(struct group *group)
{
    struct container *container;
    struct device *device;
    bool ready = false;
    int result;

    pthread_mutex_lock(&group->lock);
    container = group->container;
    if (container != NULL) {
        pthread_mutex_lock(&container->lock);
        ready = container->has_iommu;
        pthread_mutex_unlock(&container->lock);
        group->open_devices += ready;
    }
    pthread_mutex_unlock(&group->lock);
    if (!ready) {
        return -EINVAL;
    }
    device = device_new(group->number);
    if (device == NULL) {
        pthread_mutex_lock(&group->lock);
        group->open_devices--;
        pthread_mutex_unlock(&group->lock);
        return -ENOMEM;
    }
    file_hold(&group->file);
    device->space = &group->file;
    device->leave = leave;
    device->group = FIRST_GROUP + group->number;
    result = device_connect(device);
    if (result == 0) {
        result = ioas_attach(&container->ioas, &device->dma);
    }
    if (result == 0) {
        result = file_install(&device->file, O_CLOEXEC);
    }
    if (result < 0) {
        file_put(&device->file);
    }
    return result;
}

static long group_ioctl(struct file *file, unsigned long request, void *argument)
{
    struct group *group = (struct group *)file;

    switch (request) {
    case VFIO_GROUP_GET_STATUS:
        return get_status(group, argument);
    case VFIO_GROUP_SET_CONTAINER:
        return set_container(group, argument);
    case VFIO_GROUP_UNSET_CONTAINER:
        return unset_container(group);
    case VFIO_GROUP_GET_DEVICE_FD:
        return get_device_fd(group);
    }
    return -ENOTTY;
}

static void group_release(struct file *file)
{
    struct group *group = (struct group *)file;
    unset_container(group);
    __atomic_clear(&group_open[group->number], __ATOMIC_RELEASE);
    pthread_mutex_destroy(&group->lock);
    free(group);
}

static const struct file_ops group_ops = {
    .name = "group",
    .ioctl = group_ioctl,
    .release = group_release,
};

int group_new(unsigned int number, struct file **result)
{
    struct group *group;

    if (__atomic_test_and_set(&group_open[number], __ATOMIC_ACQ_REL)) {
        return -EBUSY;
    }
    group = calloc(1, sizeof(*group));
    if (group == NULL) {
        __atomic_clear(&group_open[number], __ATOMIC_RELEASE);
        return -ENOMEM;
    }
    file_init(&group->file, &group_ops);
    group->number = number;
    pthread_mutex_init(&group->lock, NULL);
    *result = &group->file;
    return 0;
}
