/*
 * The ioctls of /dev/iommu that are about address spaces and what is mapped in them.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <stdlib.h>

#include "iommufd.h"

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

long iommufd_ioas_alloc(struct iommufd *iommufd, void *data)
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
long iommufd_iova_ranges(struct iommufd *iommufd, void *data)
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

long iommufd_map(struct iommufd *iommufd, void *data)
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

long iommufd_map_file(struct iommufd *iommufd, void *data)
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

long iommufd_unmap(struct iommufd *iommufd, void *data)
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

/*
 * QEMU asks at the start, with nothing mapped, whether its CPR could use this, and again when it is about to. QEMU 10.1
 * and 10.2 end by SIGSEGV if the first fails (vfio_iommufd_cpr_register_iommufd() returns an int as a bool). So it
 * succeeds, as in the kernel for a process that has not changed. The second is refused: a connection stays where it is.
 */
long iommufd_change_process(struct iommufd *iommufd, void *data)
{
    const struct iommu_ioas_change_process *request = data;
    long result = 0;

    /* QEMU 10.2 ends by SIGSEGV if the first of these fails, 11.1 if a descriptor cannot be sent in the end. */
    if (config.refuse_cpr) {
        return -ENOTTY;
    }
    if (request->__reserved != 0) {
        return -EOPNOTSUPP;
    }
    pthread_mutex_lock(&iommufd->lock);
    for (uint32_t id = 1; id < MAX_OBJECTS && result == 0; id++) {
        if (iommufd->objects[id].kind == IOAS && ioas_is_used(iommufd->objects[id].ioas)) {
            say("IOMMU_IOAS_CHANGE_PROCESS is refused: a made-up device cannot be handed to another process (CPR)");
            result = -EINVAL;
        }
    }
    pthread_mutex_unlock(&iommufd->lock);
    return result;
}
