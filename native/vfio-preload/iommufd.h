/*
 * The inside of /dev/iommu: iommufd.c (its objects), ioas.c (address spaces) and bind.c (devices).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef IOMMUFD_H
#define IOMMUFD_H

#include "device.h"

#define MAX_OBJECTS 1024

/* What an id stands for. */
enum kind { FREE, DEVICE, IOAS, HWPT };

struct object {
    enum kind kind;
    unsigned int users; /* objects made of it, devices attached to it, calls under way */
    struct ioas *ioas; /* an HWPT's: that of its parent */
    uint32_t parent; /* an HWPT's IOAS; a device's attachment, 0: none */
};

struct iommufd {
    struct file file;
    int real;
    pthread_mutex_t lock;
    struct object objects[MAX_OBJECTS]; /* id 0 is none */
};

/* Both with `lock`. A new id, 0: there is none left. What `id` stands for, if it is of that kind. */
uint32_t iommufd_new_object(struct iommufd *iommufd, enum kind kind, struct ioas *ioas, uint32_t parent);
struct object *iommufd_find(struct iommufd *iommufd, uint32_t id, enum kind kind);

/* ioas.c. Each gets a copy of the argument, and what it changes there is copied back. */
long iommufd_ioas_alloc(struct iommufd *iommufd, void *data);
long iommufd_iova_ranges(struct iommufd *iommufd, void *data);
long iommufd_map(struct iommufd *iommufd, void *data);
long iommufd_map_file(struct iommufd *iommufd, void *data);
long iommufd_unmap(struct iommufd *iommufd, void *data);
long iommufd_change_process(struct iommufd *iommufd, void *data);

#endif
