/*
 * What a device is asked about its iommufd: to be bound to it, and attached to an address space.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <string.h>

#include "iommufd.h"

static void leave(struct device *device)
{
    struct iommufd *iommufd = (struct iommufd *)device->space;

    pthread_mutex_lock(&iommufd->lock);
    if (iommufd->objects[device->id].parent != 0) {
        iommufd->objects[iommufd->objects[device->id].parent].users--;
    }
    iommufd->objects[device->id].kind = FREE;
    pthread_mutex_unlock(&iommufd->lock);
}

long iommufd_bind(struct device *device, void *argument)
{
    struct vfio_device_bind_iommufd bind;
    long result = fetch_sized(&bind, sizeof(bind), argument, END_OF(vfio_device_bind_iommufd, out_devid));
    struct iommufd *iommufd;

    if (result < 0) {
        return result;
    }
    if (bind.flags != 0 || device->space != NULL) {
        return -EINVAL;
    }
    iommufd = (struct iommufd *)file_get(bind.iommufd, &iommufd_ops);
    if (iommufd == NULL) {
        say("%s: descriptor %d is not our /dev/iommu: a made-up device cannot be bound to a real one",
            config.sockets[device->number], bind.iommufd);
        return -EBADF;
    }
    result = device_connect(device);
    if (result < 0) {
        file_put(&iommufd->file);
        return result;
    }
    pthread_mutex_lock(&iommufd->lock);
    if (iommufd->real >= 0) { /* now it is known whose it is */
        internal_close(iommufd->real);
        iommufd->real = -1;
    }
    device->id = iommufd_new_object(iommufd, DEVICE, NULL, 0);
    pthread_mutex_unlock(&iommufd->lock);
    if (device->id == 0) {
        file_put(&iommufd->file);
        return -ENOMEM;
    }
    device->leave = leave;
    device->space = &iommufd->file;
    bind.out_devid = device->id;
    return copy_to_user(ADDRESS(argument), &bind, MIN(bind.argsz, sizeof(bind)));
}

static void detach(struct iommufd *iommufd, struct device *device)
{
    struct object *object = &iommufd->objects[device->id];

    ioas_detach(&device->dma);
    pthread_mutex_lock(&iommufd->lock);
    if (object->parent != 0) {
        iommufd->objects[object->parent].users--;
        object->parent = 0;
    }
    pthread_mutex_unlock(&iommufd->lock);
}

long iommufd_attach(struct device *device, void *argument)
{
    struct iommufd *iommufd = (struct iommufd *)device->space;
    struct vfio_device_attach_iommufd_pt attach;
    long result = fetch_sized(&attach, sizeof(attach), argument, END_OF(vfio_device_attach_iommufd_pt, pt_id));
    struct object *object;

    if (result < 0) {
        return result;
    }
    if (attach.flags != 0 || device->id == 0) {
        return -EINVAL;
    }
    pthread_mutex_lock(&iommufd->lock);
    object = iommufd_find(iommufd, attach.pt_id, IOAS);
    if (object == NULL) {
        object = iommufd_find(iommufd, attach.pt_id, HWPT);
    }
    if (object != NULL) {
        object->users++;
    }
    pthread_mutex_unlock(&iommufd->lock);
    if (object == NULL) {
        return -ENOENT;
    }
    detach(iommufd, device); /* attaching it elsewhere replaces what it was attached to */
    result = ioas_attach(object->ioas, &device->dma);
    pthread_mutex_lock(&iommufd->lock);
    if (result == 0) {
        iommufd->objects[device->id].parent = attach.pt_id;
    } else {
        object->users--;
    }
    pthread_mutex_unlock(&iommufd->lock);
    return result < 0 ? result : copy_to_user(ADDRESS(argument), &attach, MIN(attach.argsz, sizeof(attach)));
}

long iommufd_detach(struct device *device, void *argument)
{
    struct vfio_device_detach_iommufd_pt request;
    long result = fetch_sized(&request, sizeof(request), argument, END_OF(vfio_device_detach_iommufd_pt, flags));

    if (result < 0) {
        return result;
    }
    if (request.flags != 0 || device->id == 0) {
        return -EINVAL;
    }
    detach((struct iommufd *)device->space, device);
    return 0;
}
