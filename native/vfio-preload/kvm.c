/*
 * KVM's VFIO device: it is told of VFIO files, to know about their DMA. Ours are not the kernel's, and do none.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "device.h"

bool kvm_swallows(int fd, unsigned long request, void *argument)
{
    static const char kind[] = "anon_inode:kvm-vfio";
    struct kvm_device_attr attribute;
    char path[32], target[sizeof(kind)];
    struct file *file;
    int about;

    if (request != KVM_SET_DEVICE_ATTR ||
        copy_from_user(&attribute, ADDRESS(argument), sizeof(attribute)) != 0 ||
        attribute.group != KVM_DEV_VFIO_FILE || copy_from_user(&about, attribute.addr, sizeof(about)) != 0) {
        return false;
    }
    file = file_get(about, NULL);
    if (file == NULL) {
        return false;
    }
    file_put(file);
    /* Other devices of KVM's have attributes of the same numbers. */
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return readlink(path, target, sizeof(target)) == sizeof(kind) - 1 && memcmp(target, kind, sizeof(kind) - 1) == 0;
}
