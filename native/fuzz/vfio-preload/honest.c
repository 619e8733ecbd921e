/*
 * What a server that does not lie answers to each request.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "server_private.h"

#include <string.h>

static uint32_t state; /* enum vfio_device_mig_state */
static bool maps, windows, window; /* it would take a window; it has one */

void honest_open(bool region_0_is_mapped, bool has_window)
{
    windows = has_window;
    window = false;
    maps = region_0_is_mapped;
    state = VFIO_DEVICE_STATE_RUNNING;
}

static void put(size_t *size, const void *data, size_t count)
{
    memcpy(reply.data + *size, data, count);
    *size += count;
}

static size_t region_info(const struct vfio_region_info *asked, int *fds, size_t *fd_count)
{
    struct {
        struct vfio_region_info info;
        struct vfio_region_info_cap_sparse_mmap sparse;
        struct vfio_region_sparse_mmap_area areas[2];
    } info = { .info = { .argsz = sizeof(info.info), .index = asked->index, .size = 4096 } };
    size_t size = 0;

    info.info.flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    if (asked->index == 0 && maps) {
        info.info.argsz = sizeof(info);
        info.info.flags |= VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS;
        info.info.cap_offset = sizeof(info.info);
        info.info.size = MEMORY_BYTES;
        info.sparse.header.id = VFIO_REGION_INFO_CAP_SPARSE_MMAP;
        info.sparse.header.version = 1;
        info.sparse.nr_areas = 2;
        info.areas[0].size = 4096;
        info.areas[1].offset = 8192;
        info.areas[1].size = 8192;
        fds[0] = memory_fd;
        *fd_count = 1;
    }
    put(&size, &info, info.info.argsz);
    return size;
}

static size_t feature(size_t size)
{
    struct vfio_device_feature head;
    struct vfio_device_feature_mig_state found;
    struct vfio_user_logging_report report;
    size_t done = 0, bits;

    memcpy(&head, request.data, sizeof(head));
    if (!(head.flags & VFIO_DEVICE_FEATURE_PROBE)) {
        switch (head.flags & VFIO_DEVICE_FEATURE_MASK) {
        case VFIO_DEVICE_FEATURE_MIGRATION:
            put(&done, &head, sizeof(head));
            put(&done, &(uint64_t){ 7 }, 8);
            return done;
        case VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
            put(&done, &head, sizeof(head));
            put(&done, &(uint64_t){ 5000 }, 8);
            return done;
        case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
            memcpy(&found, request.data + sizeof(head), sizeof(found));
            state = head.flags & VFIO_DEVICE_FEATURE_SET ? found.device_state : state;
            found.device_state = state;
            put(&done, &head, sizeof(head));
            put(&done, &found, sizeof(found));
            return done;
        case VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
            memcpy(&report, request.data + sizeof(head), sizeof(report));
            bits = (size_t)((report.length - 1) / report.page_size) + 1;
            put(&done, &head, sizeof(head));
            put(&done, &report, sizeof(report));
            memset(reply.data + done, 0x10, MIN((bits + 63) / 64 * 8, ROOM - done));
            return done + MIN((bits + 63) / 64 * 8, ROOM - done);
        }
    }
    put(&done, request.data, size);
    return done;
}

size_t honest(size_t size, int *fds, size_t *fd_count)
{
    static const char version[] = "\0\0\0\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":65536,"
                                  "\"migration_precopy_info\":true}}";
    static const char with_window[] = "\0\0\0\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":65536,"
                                      "\"migration_precopy_info\":true,\"migration_data_window\":1048576}}";
    struct vfio_user_mig_window_data at;
    struct vfio_user_region_access access;
    struct vfio_user_mig_data data;
    struct vfio_irq_info irqs;
    size_t done = 0;

    *fd_count = 0;
    switch (request.header.command) {
    case VFIO_USER_VERSION:
        if (windows) {
            put(&done, with_window, sizeof(with_window));
        } else {
            put(&done, version, sizeof(version));
        }
        break;
    case VFIO_USER_DEVICE_GET_INFO:
        put(&done, (const uint32_t[]){ 16, VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET, 9, 5 }, 16);
        break;
    case VFIO_USER_DEVICE_GET_REGION_INFO:
        return region_info((const void *)request.data, fds, fd_count);
    case VFIO_USER_DEVICE_GET_IRQ_INFO:
        memcpy(&irqs, request.data, sizeof(irqs));
        irqs.flags = VFIO_IRQ_INFO_EVENTFD;
        irqs.count = 4;
        put(&done, &irqs, sizeof(irqs));
        break;
    case VFIO_USER_REGION_READ:
    case VFIO_USER_REGION_WRITE:
        memcpy(&access, request.data, sizeof(access));
        put(&done, &access, sizeof(access));
        if (request.header.command == VFIO_USER_REGION_READ) {
            memset(reply.data + done, 0x77, MIN(access.count, ROOM - done));
            done += MIN(access.count, ROOM - done);
        }
        break;
    case VFIO_USER_DMA_UNMAP:
        put(&done, request.data, size);
        break;
    case VFIO_USER_DEVICE_FEATURE:
        return feature(size);
    case VFIO_USER_MIG_DATA_WINDOW:
        window = windows;
        put(&done, request.data, size);
        break;
    case VFIO_USER_MIG_DATA_READ:
        if (window) {
            memcpy(&at, request.data, sizeof(at));
            at.argsz = sizeof(at);
            at.size = MIN(at.size, 1000u);
            put(&done, &at, sizeof(at));
            break;
        }
        memcpy(&data, request.data, sizeof(data));
        data.size = MIN(data.size, 1000u);
        data.argsz = (uint32_t)sizeof(data) + data.size;
        put(&done, &data, sizeof(data));
        memset(reply.data + done, 0x33, data.size);
        done += data.size;
        break;
    case VFIO_USER_MIG_GET_PRECOPY_INFO:
        put(&done, &(struct vfio_precopy_info){ sizeof(struct vfio_precopy_info), 1, 2, 3 },
            sizeof(struct vfio_precopy_info));
        break;
    }
    return done;
}
