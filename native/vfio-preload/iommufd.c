/*
 * /dev/iommu: I/O address spaces, what is mapped in them, and the devices attached to them.
 *
 * Not here, and refused: nested translation, faults, copying between address spaces, and dirty tracking by the IOMMU
 * (the devices' own does that).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "iommufd.h"

uint32_t iommufd_new_object(struct iommufd *iommufd, enum kind kind, struct ioas *ioas, uint32_t parent)
{
    for (uint32_t id = 1; id < MAX_OBJECTS; id++) {
        if (iommufd->objects[id].kind == FREE) {
            iommufd->objects[id] = (struct object){ .kind = kind, .ioas = ioas, .parent = parent };
            return id;
        }
    }
    return 0;
}

struct object *iommufd_find(struct iommufd *iommufd, uint32_t id, enum kind kind)
{
    return id < MAX_OBJECTS && iommufd->objects[id].kind == kind ? &iommufd->objects[id] : NULL;
}

/* An IOAS that stays until let go. */
static struct ioas *hold_ioas(struct iommufd *iommufd, uint32_t id)
{
    struct object *object;

    pthread_mutex_lock(&iommufd->lock);
    object = iommufd_find(iommufd, id, IOAS);
    if (object != NULL) {
        object->users++;
    }
    pthread_mutex_unlock(&iommufd->lock);
    return object == NULL ? NULL : object->ioas;
}

static void let_go(struct iommufd *iommufd, uint32_t id)
{
    pthread_mutex_lock(&iommufd->lock);
    iommufd->objects[id].users--;
    pthread_mutex_unlock(&iommufd->lock);
}

/* --- its ioctls: each gets a copy of the argument, and what it changes there is copied back ---------------------- */

static long destroy(struct iommufd *iommufd, void *data)
{
    const struct iommu_destroy *request = data;
    struct object *object;
    long result = 0;

    pthread_mutex_lock(&iommufd->lock);
    object = request->id < MAX_OBJECTS ? &iommufd->objects[request->id] : NULL;
    if (object == NULL || object->kind == FREE) {
        result = -ENOENT;
    } else if (object->users > 0 || object->kind == DEVICE) {
        result = -EBUSY;
    } else {
        if (object->kind == HWPT) {
            iommufd->objects[object->parent].users--;
        } else {
            ioas_destroy(object->ioas);
            free(object->ioas);
        }
        object->kind = FREE;
    }
    pthread_mutex_unlock(&iommufd->lock);
    return result;
}

static long ioas_alloc(struct iommufd *iommufd, void *data)
{
    struct iommu_ioas_alloc *request = data;
    struct ioas *ioas;

    if (request->flags != 0) {
        return -EOPNOTSUPP;
    }
    ioas = malloc(sizeof(*ioas));
    if (ioas == NULL) {
        return -ENOMEM;
    }
    ioas_init(ioas);
    pthread_mutex_lock(&iommufd->lock);
    request->out_ioas_id = iommufd_new_object(iommufd, IOAS, ioas, 0);
    pthread_mutex_unlock(&iommufd->lock);
    if (request->out_ioas_id == 0) {
        ioas_destroy(ioas);
        free(ioas);
        return -ENOMEM;
    }
    return 0;
}

/* A device server takes any address. */
static long iova_ranges(struct iommufd *iommufd, void *data)
{
    static const struct iommu_iova_range everything = { 0, UINT64_MAX };
    struct iommu_ioas_iova_ranges *request = data;
    uint32_t room = request->num_iovas;

    if (request->__reserved != 0) {
        return -EOPNOTSUPP;
    }
    if (hold_ioas(iommufd, request->ioas_id) == NULL) {
        return -ENOENT;
    }
    let_go(iommufd, request->ioas_id);
    request->num_iovas = 1;
    request->out_iova_alignment = PAGE_BYTES;
    return room < 1 ? -EMSGSIZE : copy_to_user(request->allowed_iovas, &everything, sizeof(everything));
}

static long check_map(uint32_t flags, uint64_t iova, uint64_t length, uint64_t start)
{
    const uint32_t known = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE;

    if (flags & ~known) {
        return -EOPNOTSUPP;
    }
    if (!(flags & IOMMU_IOAS_MAP_FIXED_IOVA)) {
        say("a mapping without IOMMU_IOAS_MAP_FIXED_IOVA is refused: addresses are not chosen here");
        return -EOPNOTSUPP;
    }
    if (length == 0 || !(flags & (IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE)) ||
        (iova | length | start) % PAGE_BYTES != 0) {
        return -EINVAL;
    }
    return length - 1 > UINT64_MAX - iova || length - 1 > UINT64_MAX - start ? -EOVERFLOW : 0;
}

static uint32_t dma_flags(uint32_t flags)
{
    return (flags & IOMMU_IOAS_MAP_READABLE ? VFIO_DMA_MAP_FLAG_READ : 0) |
           (flags & IOMMU_IOAS_MAP_WRITEABLE ? VFIO_DMA_MAP_FLAG_WRITE : 0);
}

static long map(struct iommufd *iommufd, void *data)
{
    const struct iommu_ioas_map *request = data;
    long result = check_map(request->flags, request->iova, request->length, request->user_va);
    struct ioas *ioas;

    if (request->__reserved != 0) {
        return -EOPNOTSUPP;
    }
    if (result < 0) {
        return result;
    }
    ioas = hold_ioas(iommufd, request->ioas_id);
    if (ioas == NULL) {
        return -ENOENT;
    }
    result = ioas_map(ioas, request->iova, request->length, dma_flags(request->flags), request->user_va);
    let_go(iommufd, request->ioas_id);
    return result;
}

static long map_file(struct iommufd *iommufd, void *data)
{
    const struct iommu_ioas_map_file *request = data;
    long result = check_map(request->flags, request->iova, request->length, request->start);
    struct ioas *ioas;

    if (result < 0) {
        return result;
    }
    ioas = hold_ioas(iommufd, request->ioas_id);
    if (ioas == NULL) {
        return -ENOENT;
    }
    result = ioas_map_file(ioas, request->iova, request->length, dma_flags(request->flags), request->fd,
                           request->start);
    let_go(iommufd, request->ioas_id);
    return result;
}

static long unmap(struct iommufd *iommufd, void *data)
{
    struct iommu_ioas_unmap *request = data;
    bool everything = request->iova == 0 && request->length == UINT64_MAX;
    struct ioas *ioas;
    uint64_t unmapped;
    long result;

    if (request->length == 0) {
        return -EINVAL;
    }
    if (request->length - 1 > UINT64_MAX - request->iova) {
        return -EOVERFLOW;
    }
    ioas = hold_ioas(iommufd, request->ioas_id);
    if (ioas == NULL) {
        return -ENOENT;
    }
    result = ioas_unmap(ioas, request->iova, everything ? UINT64_MAX : request->iova + (request->length - 1),
                        &unmapped);
    let_go(iommufd, request->ioas_id);
    /* Of nothing, and of a part, as in the kernel. */
    if (result == -EBUSY || (result == 0 && unmapped == 0 && !everything)) {
        return -ENOENT;
    }
    request->length = unmapped;
    return result;
}

static long hwpt_alloc(struct iommufd *iommufd, void *data)
{
    struct iommu_hwpt_alloc *request = data;
    struct object *parent;
    long result = 0;

    if (request->flags != 0 || request->data_type != IOMMU_HWPT_DATA_NONE || request->__reserved != 0) {
        return -EOPNOTSUPP;
    }
    pthread_mutex_lock(&iommufd->lock);
    parent = iommufd_find(iommufd, request->pt_id, IOAS);
    if (parent == NULL || iommufd_find(iommufd, request->dev_id, DEVICE) == NULL) {
        result = -ENOENT;
    } else {
        request->out_hwpt_id = iommufd_new_object(iommufd, HWPT, parent->ioas, request->pt_id);
        if (request->out_hwpt_id == 0) {
            result = -ENOMEM;
        } else {
            parent->users++;
        }
    }
    pthread_mutex_unlock(&iommufd->lock);
    return result;
}

/* No IOMMU that the user could know about; no dirty tracking by it. */
static long get_hw_info(struct iommufd *iommufd, void *data)
{
    static const char zeros[256];
    struct iommu_hw_info *request = data;
    bool found;

    pthread_mutex_lock(&iommufd->lock);
    found = iommufd_find(iommufd, request->dev_id, DEVICE) != NULL;
    pthread_mutex_unlock(&iommufd->lock);
    if (!found) {
        return -ENOENT;
    }
    for (uint32_t done = 0; done < request->data_len; done += sizeof(zeros)) {
        if (copy_to_user(request->data_uptr + done, zeros, MIN(request->data_len - done, sizeof(zeros))) != 0) {
            return -EFAULT;
        }
    }
    request->data_len = 0;
    request->out_data_type = IOMMU_HW_INFO_TYPE_NONE;
    request->out_capabilities = 0;
    return 0;
}

static const struct {
    unsigned long request;
    size_t size, least;
    long (*carry_out)(struct iommufd *iommufd, void *data);
} requests[] = {
#define END_OF(type, member) (offsetof(struct type, member) + sizeof(((struct type *)0)->member))
    { IOMMU_DESTROY, sizeof(struct iommu_destroy), END_OF(iommu_destroy, id), destroy },
    { IOMMU_IOAS_ALLOC, sizeof(struct iommu_ioas_alloc), END_OF(iommu_ioas_alloc, out_ioas_id), ioas_alloc },
    { IOMMU_IOAS_IOVA_RANGES, sizeof(struct iommu_ioas_iova_ranges),
      END_OF(iommu_ioas_iova_ranges, out_iova_alignment), iova_ranges },
    { IOMMU_IOAS_MAP, sizeof(struct iommu_ioas_map), END_OF(iommu_ioas_map, iova), map },
    { IOMMU_IOAS_MAP_FILE, sizeof(struct iommu_ioas_map_file), END_OF(iommu_ioas_map_file, iova), map_file },
    { IOMMU_IOAS_UNMAP, sizeof(struct iommu_ioas_unmap), END_OF(iommu_ioas_unmap, length), unmap },
    { IOMMU_HWPT_ALLOC, sizeof(struct iommu_hwpt_alloc), END_OF(iommu_hwpt_alloc, __reserved), hwpt_alloc },
    { IOMMU_GET_HW_INFO, sizeof(struct iommu_hw_info), END_OF(iommu_hw_info, __reserved), get_hw_info },
};

/* Copy in by the kernel's rule: what is longer than what we know has to be zero there. */
static long fetch(void *data, size_t known, size_t least, void *argument, uint32_t *size)
{
    long result = fetch_sized(data, known, argument, least);
    char beyond;

    if (result < 0) {
        return result;
    }
    memcpy(size, data, sizeof(*size));
    if (*size > PAGE_BYTES) {
        return -E2BIG;
    }
    for (size_t i = known; i < *size; i++) {
        if (copy_from_user(&beyond, (uint64_t)(uintptr_t)argument + i, 1) != 0) {
            return -EFAULT;
        }
        if (beyond != 0) {
            return -E2BIG;
        }
    }
    return 0;
}

static long iommufd_ioctl(struct file *file, unsigned long request, void *argument)
{
    struct iommufd *iommufd = (struct iommufd *)file;
    uint64_t data[16];
    uint32_t size;
    long result;

    if (iommufd->real >= 0) {
        result = syscall(SYS_ioctl, iommufd->real, request, argument);
        return result < 0 ? -errno : result;
    }
    for (size_t i = 0; i < ARRAY_SIZE(requests); i++) {
        if (requests[i].request != request) {
            continue;
        }
        result = fetch(data, requests[i].size, requests[i].least, argument, &size);
        if (result < 0) {
            return result;
        }
        result = requests[i].carry_out(iommufd, data);
        if (result == 0 || result == -EMSGSIZE) {
            long copied = copy_to_user((uint64_t)(uintptr_t)argument, data, MIN(size, requests[i].size));

            result = copied < 0 ? copied : result;
        }
        return result;
    }
    return -ENOTTY;
}

/* --- its life ---------------------------------------------------------------------------------------------------- */

static void release(struct file *file)
{
    struct iommufd *iommufd = (struct iommufd *)file;

    for (uint32_t id = 1; id < MAX_OBJECTS; id++) {
        if (iommufd->objects[id].kind == IOAS) {
            ioas_destroy(iommufd->objects[id].ioas);
            free(iommufd->objects[id].ioas);
        }
    }
    if (iommufd->real >= 0) {
        internal_close(iommufd->real);
    }
    pthread_mutex_destroy(&iommufd->lock);
    free(iommufd);
}

const struct file_ops iommufd_ops = {
    .name = "iommufd",
    .ioctl = iommufd_ioctl,
    .release = release,
};

struct file *iommufd_new(int real)
{
    struct iommufd *iommufd = calloc(1, sizeof(*iommufd));

    if (iommufd == NULL) {
        return NULL;
    }
    file_init(&iommufd->file, &iommufd_ops);
    iommufd->real = real;
    pthread_mutex_init(&iommufd->lock, NULL);
    return &iommufd->file;
}

int iommufd_give_up(struct file *file)
{
    struct iommufd *iommufd = (struct iommufd *)file;

    if (iommufd->real < 0) {
        say("a real device cannot share the iommufd of a made-up one: give it an -object iommufd of its own");
        return -EINVAL;
    }
    return 0;
}
