/*
 * VFIO_DEVICE_FEATURE: migration, and the log of DMA writes.
 *
 * The log has two halves: the server's, of what it writes through descriptors, and ours, of what it has us write. A
 * report is both.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

#define MAX_LOGGING_RANGES (PAGE_BYTES / sizeof(struct vfio_device_feature_dma_logging_range)) /* the kernel's */

int feature_call(struct device *device, uint32_t flags, void *data, size_t size)
{
    bool get = flags & VFIO_DEVICE_FEATURE_GET;
    struct vfio_device_feature request = { .argsz = (uint32_t)(sizeof(request) + size), .flags = flags }, reply;
    struct wire_call call = {
        .command = VFIO_USER_DEVICE_FEATURE,
        .request = { { &request, sizeof(request) }, { data, get ? 0 : size } },
        .head = &reply,
        .head_room = sizeof(reply),
        .body = data,
        .body_room = size,
    };
    int result = wire_call(device->wire, &call);

    if (result == 0 && (call.head_size != sizeof(reply) || reply.flags != flags ||
                        call.body_size > size || (get && call.body_size != size))) {
        say("%s: the server answered another question than feature %#x", config.sockets[device->number], flags);
        result = -EIO;
    }
    trace("device %u: feature %u %s: %s", device->number, flags & VFIO_DEVICE_FEATURE_MASK,
          flags & VFIO_DEVICE_FEATURE_PROBE ? "PROBE" : get ? "GET" : "SET", errno_name(result));
    return result;
}

static bool has(struct device *device, uint32_t flags)
{
    return feature_call(device, flags | VFIO_DEVICE_FEATURE_PROBE, NULL, 0) == 0;
}

void features_probe(struct device *device)
{
    struct migration *migration = &device->migration;
    struct vfio_device_feature_migration flags = { 0 };
    struct vfio_device_feature_mig_state state = { VFIO_DEVICE_STATE_RUNNING, -1 };

    if (feature_call(device, VFIO_DEVICE_FEATURE_MIGRATION | VFIO_DEVICE_FEATURE_GET, &flags, sizeof(flags)) != 0) {
        return;
    }
    flags.flags &= VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY;
    if (!(flags.flags & VFIO_MIGRATION_STOP_COPY)) {
        say("%s: the server offers migration without STOP_COPY: it cannot be migrated", config.sockets[device->number]);
        return;
    }
    migration->flags = flags.flags;
    migration->has_data_size = has(device, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE | VFIO_DEVICE_FEATURE_GET);
    migration->has_precopy_info_v2 = has(device, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 | VFIO_DEVICE_FEATURE_SET);
    device->has_dma_log = has(device, VFIO_DEVICE_FEATURE_DMA_LOGGING_START | VFIO_DEVICE_FEATURE_SET);
    migration_get_state(device, &state);
}

/* --- the log of DMA writes -------------------------------------------------------------------------------------- */

static long check_ranges(const struct vfio_device_feature_dma_logging_range *ranges, uint32_t count, uint64_t page_size)
{
    for (uint32_t i = 0; i < count; i++) {
        if (page_size != 0 && (ranges[i].iova % page_size != 0 || ranges[i].length % page_size != 0)) {
            return -EINVAL;
        }
        if (ranges[i].length == 0) {
            return -EINVAL;
        }
        if (ranges[i].length - 1 > UINT64_MAX - ranges[i].iova) {
            return -EOVERFLOW;
        }
    }
    return 0;
}

static long logging_start(struct device *device, struct vfio_device_feature_dma_logging_control *control)
{
    struct {
        struct vfio_user_logging_control control;
        struct vfio_device_feature_dma_logging_range ranges[MAX_LOGGING_RANGES];
    } request;
    size_t ranges_size = control->num_ranges * sizeof(request.ranges[0]);
    long result;

    if (control->num_ranges == 0) {
        return -EINVAL;
    }
    if (control->num_ranges > MAX_LOGGING_RANGES) {
        return -E2BIG;
    }
    if (dirty_is_on(&device->dma.log)) {
        return -EBUSY;
    }
    result = copy_from_user(request.ranges, control->ranges, ranges_size);
    if (result == 0) {
        result = check_ranges(request.ranges, control->num_ranges, control->page_size);
    }
    if (result < 0) {
        return result;
    }
    /* Ours first: from the moment when the server says it logs, nothing may be missed. */
    dirty_start(&device->dma.log);
    if (device->has_dma_log) {
        request.control.page_size = control->page_size;
        request.control.num_ranges = control->num_ranges;
        request.control.reserved = 0;
        result = feature_call(device, VFIO_DEVICE_FEATURE_DMA_LOGGING_START | VFIO_DEVICE_FEATURE_SET, &request,
                              sizeof(request.control) + ranges_size);
        if (result < 0) {
            dirty_stop(&device->dma.log);
            return result;
        }
        control->page_size = request.control.page_size;
    } else {
        control->page_size = PAGE_BYTES;
    }
    return 0;
}

static long logging_stop(struct device *device)
{
    if (!dirty_is_on(&device->dma.log)) {
        return -EINVAL;
    }
    dirty_stop(&device->dma.log);
    if (!device->has_dma_log || wire_dead(device->wire)) {
        return 0;
    }
    return feature_call(device, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP | VFIO_DEVICE_FEATURE_SET, NULL, 0);
}

/* OR `size` bytes of a bitmap into the caller's. */
static long merge(uint64_t bitmap, uint64_t *words, size_t size)
{
    uint64_t before[512];
    long result = 0;

    for (size_t done = 0; done < size && result == 0; done += sizeof(before)) {
        size_t part = MIN(size - done, sizeof(before));

        result = copy_from_user(before, bitmap + done, part);
        for (size_t i = 0; i < part / sizeof(before[0]); i++) {
            before[i] |= words[done / sizeof(before[0]) + i];
        }
        if (result == 0) {
            result = copy_to_user(bitmap + done, before, part);
        }
    }
    return result;
}

/* The server's half, in as many questions as its limit on a reply asks for. */
static long report_of_server(struct device *device, const struct vfio_device_feature_dma_logging_report *asked)
{
    size_t limit = (wire_limits(device->wire)->max_xfer / 2) & ~(sizeof(uint64_t) - 1);
    uint64_t pages = (asked->length - 1) / asked->page_size + 1;
    struct vfio_user_logging_report *report;
    long result = 0;

    limit = MAX(limit, sizeof(uint64_t));
    report = malloc(sizeof(*report) + MIN(limit, (size_t)((pages + 63) / 64 * 8)));
    if (report == NULL) {
        return -ENOMEM;
    }
    for (uint64_t done = 0; done < pages && result == 0;) {
        uint64_t part = MIN(pages - done, limit * 8);
        size_t size = (size_t)((part + 63) / 64 * 8);
        struct vfio_user_logging_report request = {
            asked->iova + done * asked->page_size,
            MIN(part * asked->page_size, asked->length - done * asked->page_size),
            asked->page_size,
        };
        struct vfio_device_feature head = {
            .argsz = (uint32_t)(sizeof(head) + sizeof(request) + size),
            .flags = VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT | VFIO_DEVICE_FEATURE_GET,
        }, reply;
        struct wire_call call = {
            .command = VFIO_USER_DEVICE_FEATURE,
            .request = { { &head, sizeof(head) }, { &request, sizeof(request) } },
            .head = &reply,
            .head_room = sizeof(reply),
            .body = report,
            .body_room = sizeof(request) + size,
        };

        result = wire_call(device->wire, &call);
        if (result == 0 && (call.body_size != sizeof(request) + size || reply.flags != head.flags ||
                            memcmp(report, &request, sizeof(request)) != 0)) {
            say("%s: the server sent a DMA log of something else", config.sockets[device->number]);
            result = -EIO;
        }
        if (result == 0) {
            result = merge(asked->bitmap + done / 8, (uint64_t *)(report + 1), size);
        }
        done += part;
    }
    free(report);
    return result;
}

static long logging_report(struct device *device, const struct vfio_device_feature_dma_logging_report *report)
{
    long result = 0;

    if (report->page_size < PAGE_BYTES || (report->page_size & (report->page_size - 1)) != 0 || report->length == 0) {
        return -EINVAL;
    }
    if (report->length - 1 > UINT64_MAX - report->iova) {
        return -EOVERFLOW;
    }
    if (!dirty_is_on(&device->dma.log)) {
        return -EINVAL;
    }
    /* What a dead server wrote since the last report is in its half of the log, and that is gone. */
    if (device->maps_descriptors && (!device->has_dma_log || wire_dead(device->wire))) {
        dma_mark_mapped(&device->dma);
    } else if (device->has_dma_log && !wire_dead(device->wire)) {
        result = report_of_server(device, report);
    }
    if (result == 0) {
        result = dirty_report(&device->dma.log, report->iova, report->length, report->page_size, report->bitmap);
    }
    trace("device %u: dirty pages of [%#llx, +%#llx): %s", device->number, (unsigned long long)report->iova,
          (unsigned long long)report->length, errno_name(result));
    return result;
}

/* --- the ioctl -------------------------------------------------------------------------------------------------- */

/* What can be done with a feature, and how large its data is; 0: there is no such feature. */
static uint32_t methods(const struct device *device, uint32_t feature, size_t *size)
{
    const struct migration *migration = &device->migration;

    *size = 0;
    if (migration->flags == 0) {
        return 0;
    }
    switch (feature) {
    case VFIO_DEVICE_FEATURE_MIGRATION:
        *size = sizeof(struct vfio_device_feature_migration);
        return VFIO_DEVICE_FEATURE_GET;
    case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
        *size = sizeof(struct vfio_device_feature_mig_state);
        return VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET;
    case VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
        *size = sizeof(struct vfio_device_feature_mig_data_size);
        return migration->has_data_size ? VFIO_DEVICE_FEATURE_GET : 0;
    case VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2:
        return migration->has_precopy_info_v2 ? VFIO_DEVICE_FEATURE_SET : 0;
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
        *size = sizeof(struct vfio_device_feature_dma_logging_control);
        return VFIO_DEVICE_FEATURE_SET;
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
        return VFIO_DEVICE_FEATURE_SET;
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
        *size = sizeof(struct vfio_device_feature_dma_logging_report);
        return VFIO_DEVICE_FEATURE_GET;
    }
    return 0;
}

static long carry_out(struct device *device, uint32_t feature, bool get, union feature_data *data)
{
    switch (feature) {
    case VFIO_DEVICE_FEATURE_MIGRATION:
        data->migration.flags = device->migration.flags;
        return 0;
    case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
        return get ? migration_get_state(device, &data->state) : migration_set_state(device, &data->state);
    case VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
        return feature_call(device, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE | VFIO_DEVICE_FEATURE_GET, &data->data_size,
                            sizeof(data->data_size));
    case VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: {
        long result = feature_call(device, feature | VFIO_DEVICE_FEATURE_SET, NULL, 0);

        __atomic_store_n(&device->migration.precopy_info_v2, result == 0, __ATOMIC_RELEASE);
        return result;
    }
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
        return logging_start(device, &data->control);
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
        return logging_stop(device);
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
        return logging_report(device, &data->report);
    }
    return -ENOTTY;
}

long feature_ioctl(struct device *device, void *argument)
{
    const uint32_t operations = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET;
    uint64_t data_at = ADDRESS(argument) + sizeof(struct vfio_device_feature);
    struct vfio_device_feature head;
    union feature_data data;
    uint32_t feature, asked, supported;
    size_t size;
    long result = fetch_argsz(&head, argument, sizeof(head));

    if (result < 0) {
        return result;
    }
    /* vfio_ioctl_device_feature() and vfio_check_feature() of the kernel */
    feature = head.flags & VFIO_DEVICE_FEATURE_MASK;
    asked = head.flags & operations;
    if ((head.flags & ~(VFIO_DEVICE_FEATURE_MASK | operations | VFIO_DEVICE_FEATURE_PROBE)) ||
        (!(head.flags & VFIO_DEVICE_FEATURE_PROBE) && asked != VFIO_DEVICE_FEATURE_GET &&
         asked != VFIO_DEVICE_FEATURE_SET)) {
        return -EINVAL;
    }
    supported = methods(device, feature, &size);
    if (supported == 0) {
        return -ENOTTY;
    }
    if (asked & ~supported) {
        return -EINVAL;
    }
    if (head.flags & VFIO_DEVICE_FEATURE_PROBE) {
        return 0;
    }
    if (head.argsz < sizeof(head) + size) {
        return -EINVAL;
    }
    result = copy_from_user(&data, data_at, size);
    if (result < 0) {
        return result;
    }
    result = carry_out(device, feature, asked == VFIO_DEVICE_FEATURE_GET, &data);
    return result < 0 ? result : copy_to_user(data_at, &data, size);
}
