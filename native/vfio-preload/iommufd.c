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
    { IOMMU_DESTROY, sizeof(struct iommu_destroy), END_OF(iommu_destroy, id), destroy },
    { IOMMU_IOAS_ALLOC, sizeof(struct iommu_ioas_alloc), END_OF(iommu_ioas_alloc, out_ioas_id), iommufd_ioas_alloc },
    { IOMMU_IOAS_IOVA_RANGES, sizeof(struct iommu_ioas_iova_ranges),
      END_OF(iommu_ioas_iova_ranges, out_iova_alignment), iommufd_iova_ranges },
    { IOMMU_IOAS_MAP, sizeof(struct iommu_ioas_map), END_OF(iommu_ioas_map, iova), iommufd_map },
    { IOMMU_IOAS_MAP_FILE, sizeof(struct iommu_ioas_map_file), END_OF(iommu_ioas_map_file, iova), iommufd_map_file },
    { IOMMU_IOAS_UNMAP, sizeof(struct iommu_ioas_unmap), END_OF(iommu_ioas_unmap, length), iommufd_unmap },
    { IOMMU_HWPT_ALLOC, sizeof(struct iommu_hwpt_alloc), END_OF(iommu_hwpt_alloc, __reserved), hwpt_alloc },
    { IOMMU_IOAS_CHANGE_PROCESS, sizeof(struct iommu_ioas_change_process),
      END_OF(iommu_ioas_change_process, __reserved), iommufd_change_process },
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
        if (copy_from_user(&beyond, ADDRESS(argument) + i, 1) != 0) {
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
            long copied = copy_to_user(ADDRESS(argument), data, MIN(size, requests[i].size));

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
