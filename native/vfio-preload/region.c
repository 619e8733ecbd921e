/*
 * Regions: what they are, access to them, and mapping them.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device.h"

#define MAX_INFO_BYTES (64 << 10)
#define POSTED_BYTES 8

/* --- what they are ---------------------------------------------------------------------------------------------- */

/* What a server says about a region, judged: NULL, or what is wrong with it. */
static const char *judge(struct region *region, const struct vfio_region_info *info, size_t size, uint32_t index,
                         bool *msix_mappable)
{
    size_t lowest = sizeof(*info), at;

    if (size < sizeof(*info) || info->index != index || info->argsz > size) {
        return "cut short, or about another region";
    }
    if (info->size > REGION_MASK) {
        return "too large";
    }
    *msix_mappable = false;
    at = info->flags & VFIO_REGION_INFO_FLAG_CAPS ? info->cap_offset : 0;
    while (at != 0) {
        const struct vfio_info_cap_header *header = (const void *)((const char *)info + at);
        const struct vfio_region_info_cap_sparse_mmap *sparse = (const void *)header;

        /* Forward only, so that it ends. */
        if (at < lowest || at % 8 != 0 || at > size - sizeof(*header)) {
            return "with a broken chain of capabilities";
        }
        if (header->id == VFIO_REGION_INFO_CAP_MSIX_MAPPABLE) {
            *msix_mappable = true;
        } else if (header->id == VFIO_REGION_INFO_CAP_SPARSE_MMAP) {
            if (at > size - sizeof(*sparse) || region->areas != NULL ||
                sparse->nr_areas > (size - at - sizeof(*sparse)) / sizeof(sparse->areas[0])) {
                return "with a sparse mmap capability that does not fit";
            }
            region->areas = calloc(sparse->nr_areas + 1, sizeof(*region->areas));
            if (region->areas == NULL) {
                return "too much for memory";
            }
            for (uint32_t i = 0; i < sparse->nr_areas; i++) {
                if (sparse->areas[i].offset > info->size ||
                    sparse->areas[i].size > info->size - sparse->areas[i].offset) {
                    return "with an area outside of it";
                }
                region->areas[region->area_count] = sparse->areas[i];
                region->area_count += sparse->areas[i].size > 0;
            }
        }
        lowest = at + sizeof(*header);
        at = header->next;
    }
    return NULL;
}

/* Whether every area can be mapped from the file: one that is shorter would kill the program with SIGBUS. */
static bool mappable(const struct region *region)
{
    struct stat status;

    if (syscall(SYS_fstat, region->fd, &status) != 0 || region->area_count == 0) {
        return false;
    }
    for (size_t i = 0; i < region->area_count; i++) {
        uint64_t start = region->fd_offset + region->areas[i].offset;

        if (start < region->fd_offset || start % PAGE_BYTES != 0 || start > (uint64_t)status.st_size ||
            region->areas[i].size > (uint64_t)status.st_size - start) {
            return false;
        }
    }
    return true;
}

/* Put together what GET_REGION_INFO answers: what was judged, and nothing else of the server's. */
static int compose(struct region *region, uint32_t index, bool msix_mappable)
{
    size_t sparse_size = sizeof(struct vfio_region_info_cap_sparse_mmap) + region->area_count * sizeof(*region->areas);
    struct vfio_info_cap_header *header;
    bool sparse = region->fd >= 0 && !(region->area_count == 1 && region->areas[0].size == region->size);
    size_t at = sizeof(*region->info);

    region->info = calloc(1, at + sparse_size + sizeof(*header));
    if (region->info == NULL) {
        return -ENOMEM;
    }
    if (sparse) {
        struct vfio_region_info_cap_sparse_mmap *capability = (void *)((char *)region->info + at);

        capability->header = (struct vfio_info_cap_header){ VFIO_REGION_INFO_CAP_SPARSE_MMAP, 1, 0 };
        capability->nr_areas = (uint32_t)region->area_count;
        memcpy(capability->areas, region->areas, region->area_count * sizeof(*region->areas));
        at += sparse_size;
        capability->header.next = msix_mappable ? (uint32_t)at : 0;
    }
    if (msix_mappable) {
        header = (void *)((char *)region->info + at);
        *header = (struct vfio_info_cap_header){ VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 1, 0 };
        at += sizeof(*header);
    }
    region->info_size = at;
    if (at > sizeof(*region->info)) {
        region->flags |= VFIO_REGION_INFO_FLAG_CAPS;
        region->info->cap_offset = sizeof(*region->info);
    }
    region->info->flags = region->flags;
    region->info->index = index;
    region->info->size = region->size;
    region->info->offset = (uint64_t)index << REGION_SHIFT;
    return 0;
}

static int fetch(struct device *device, uint32_t index, struct vfio_region_info *info)
{
    struct vfio_region_info request = { .argsz = MAX_INFO_BYTES, .index = index };
    struct region *region = &device->regions[index];
    struct wire_call call = {
        .command = VFIO_USER_DEVICE_GET_REGION_INFO,
        .request = { { &request, sizeof(request) } },
        .head = info,
        .head_room = MAX_INFO_BYTES,
        .fds = &region->fd,
        .fd_room = 1,
    };
    int result = wire_call(device->wire, &call);
    bool msix_mappable;
    const char *wrong;

    if (result < 0) {
        /* A region that the server does not have: EINVAL, as for VGA in the kernel. */
        return wire_dead(device->wire) ? result : 0;
    }
    wrong = judge(region, info, call.head_size, index, &msix_mappable);
    if (wrong != NULL) {
        say("%s: the server describes region %u %s", config.sockets[device->number], index, wrong);
        return -EPROTO;
    }
    region->size = info->size;
    region->flags = info->flags & (VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE);
    region->fd_offset = info->offset;
    if (region->fd >= 0 && (info->flags & VFIO_REGION_INFO_FLAG_MMAP)) {
        if (region->areas == NULL && region->size > 0) {
            region->areas = calloc(1, sizeof(*region->areas));
            if (region->areas == NULL) {
                return -ENOMEM;
            }
            region->areas[0].size = region->size;
            region->area_count = 1;
        }
        if (mappable(region)) {
            region->flags |= VFIO_REGION_INFO_FLAG_MMAP;
        } else {
            say("%s: the file of region %u is shorter than the region, or not in pages; it is not mapped",
                config.sockets[device->number], index);
        }
    }
    if (!(region->flags & VFIO_REGION_INFO_FLAG_MMAP)) {
        if (region->fd >= 0) {
            close(region->fd);
        }
        region->fd = -1;
        region->area_count = 0;
    }
    return compose(region, index, msix_mappable);
}

int regions_fetch(struct device *device)
{
    struct vfio_region_info *info = malloc(MAX_INFO_BYTES);
    int result = 0;

    device->regions = calloc(device->info.num_regions + 1, sizeof(*device->regions));
    if (info == NULL || device->regions == NULL) {
        free(info);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < device->info.num_regions; i++) {
        device->regions[i].fd = -1;
    }
    device->posts = true;
    for (uint32_t i = 0; i < device->info.num_regions && result == 0; i++) {
        result = fetch(device, i, info);
        /* A read of memory that is mapped does not wait for the writes before it: each write must. */
        device->posts = device->posts && device->regions[i].fd < 0;
    }
    free(info);
    return result;
}

void regions_free(struct device *device)
{
    for (uint32_t i = 0; device->regions != NULL && i < device->info.num_regions; i++) {
        if (device->regions[i].fd >= 0) {
            close(device->regions[i].fd);
        }
        free(device->regions[i].info);
        free(device->regions[i].areas);
    }
    free(device->regions);
    device->regions = NULL;
}

long region_info(struct device *device, void *argument)
{
    uint64_t to = ADDRESS(argument);
    const struct region *region;
    struct vfio_region_info info;
    int result = fetch_argsz(&info, argument, sizeof(info));
    uint32_t argsz = info.argsz;

    if (result < 0) {
        return result;
    }
    if (info.index >= device->info.num_regions || device->regions[info.index].info == NULL) {
        return -EINVAL;
    }
    region = &device->regions[info.index];
    info = *region->info;
    info.argsz = argsz;
    if (argsz < region->info_size) {
        info.argsz = (uint32_t)region->info_size;
        info.cap_offset = 0;
        return copy_to_user(to, &info, sizeof(info));
    }
    result = copy_to_user(to + sizeof(info), region->info + 1, region->info_size - sizeof(info));
    return result < 0 ? result : copy_to_user(to, &info, sizeof(info));
}

/* --- access ----------------------------------------------------------------------------------------------------- */

/* The region that a part of the descriptor belongs to, and how much of it is in there; -EINVAL as in the kernel. */
static ssize_t locate(struct device *device, uint64_t offset, size_t count, uint32_t *index)
{
    uint64_t number = offset >> REGION_SHIFT, start = offset & REGION_MASK;

    if (number >= device->info.num_regions || start >= device->regions[number].size) {
        return -EINVAL;
    }
    *index = (uint32_t)number;
    return (ssize_t)MIN(MIN((uint64_t)count, device->regions[number].size - start), (uint64_t)SSIZE_MAX);
}

/* One message. Returns 0 or -errno. */
static int access_one(struct device *device, bool write, uint32_t region, uint64_t start, void *buffer, size_t count)
{
    struct vfio_user_region_access request = { start, region, (uint32_t)count }, reply;
    struct wire_call call = {
        .command = write ? VFIO_USER_REGION_WRITE : VFIO_USER_REGION_READ,
        .request = { { &request, sizeof(request) }, { write ? buffer : NULL, write ? count : 0 } },
        .head = &reply,
        .head_room = sizeof(reply),
        .body = write ? NULL : buffer,
        .body_room = write ? 0 : count,
    };
    int result;

    if (write && device->posts && count <= POSTED_BYTES && region <= VFIO_PCI_BAR5_REGION_INDEX) {
        return wire_post(device->wire, &call);
    }
    result = wire_call(device->wire, &call);
    if (result == 0 && (call.head_size != sizeof(reply) || call.body_size != call.body_room ||
                        memcmp(&reply, &request, sizeof(reply)) != 0)) {
        say("%s: the server answered another access to region %u than it was asked for",
            config.sockets[device->number], region);
        result = -EIO;
    }
    return result;
}

static ssize_t access_all(struct device *device, bool write, char *buffer, size_t count, uint64_t offset)
{
    size_t limit = wire_limits(device->wire)->max_xfer;
    uint64_t value = 0;
    uint32_t region;
    ssize_t found = locate(device, offset, count, &region);
    size_t done = 0;
    int result = 0;

    if (found < 0) {
        return found;
    }
    collectors_flush(device);
    while (done < (size_t)found && result == 0) {
        size_t part = MIN((size_t)found - done, limit);

        result = access_one(device, write, region, (offset & REGION_MASK) + done, buffer + done, part);
        done += result == 0 ? part : 0;
    }
    if (result < 0 && wire_dead(device->wire)) {
        /* As hardware that is not there: reads are all ones, writes go nowhere. */
        if (!write) {
            memset(buffer + done, 0xff, (size_t)found - done);
        }
        done = (size_t)found;
        result = 0;
    }
    if (log_fd >= 0) {
        (void)copy_from_user(&value, ADDRESS(buffer), MIN(done, sizeof(value))); /* nothing has checked the address */
    }
    trace("device %u: region %u %s %#llx, %zd bytes, value %#llx: %s", device->number, region,
          write ? "write" : "read", (unsigned long long)(offset & REGION_MASK), found, (unsigned long long)value,
          errno_name(result));
    return done > 0 || result == 0 ? (ssize_t)done : result;
}

ssize_t region_read(struct device *device, void *buffer, size_t count, uint64_t offset)
{
    return access_all(device, false, buffer, count, offset);
}

ssize_t region_write(struct device *device, const void *buffer, size_t count, uint64_t offset)
{
    return access_all(device, true, (char *)(uintptr_t)buffer, count, offset);
}

long region_mmap(struct device *device, void *address, size_t length, int protection, int flags, uint64_t offset)
{
    uint64_t number = offset >> REGION_SHIFT, start = offset & REGION_MASK;
    const struct region *region;

    if (number >= device->info.num_regions || !(flags & MAP_SHARED)) {
        return -EINVAL;
    }
    region = &device->regions[number];
    for (size_t i = 0; i < region->area_count; i++) {
        const struct vfio_region_sparse_mmap_area *area = &region->areas[i];
        uint64_t whole = (area->size + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);

        if (start >= area->offset && start - area->offset < whole && length <= whole - (start - area->offset)) {
            long mapped = syscall(SYS_mmap, address, length, protection, flags, region->fd, region->fd_offset + start);

            return mapped == -1 ? -errno : mapped;
        }
    }
    return -EINVAL;
}
