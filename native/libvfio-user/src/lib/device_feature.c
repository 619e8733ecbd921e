/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/param.h>

#include "common.h"
#include "device_feature.h"
#include "dma.h"
#include "dma_log.h"
#include "migration.h"
#include "private.h"

#define OP_MASK (VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET | \
                 VFIO_DEVICE_FEATURE_PROBE)

/* What can be done with @feature: some of VFIO_DEVICE_FEATURE_{GET,SET}. */
static uint32_t
supported_ops(vfu_ctx_t *vfu_ctx, uint32_t feature)
{
    const struct migration *migr = vfu_ctx->migration;

    switch (feature) {
    case VFIO_DEVICE_FEATURE_MIGRATION:
        return migr != NULL ? VFIO_DEVICE_FEATURE_GET : 0;

    case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
        return migr != NULL ?
               VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET : 0;

    case VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
        return vfu_ctx->dma != NULL ? VFIO_DEVICE_FEATURE_SET : 0;

    case VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
        return vfu_ctx->dma != NULL ? VFIO_DEVICE_FEATURE_GET : 0;

    case VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
        return migration_has_data_size(migr) ? VFIO_DEVICE_FEATURE_GET : 0;

    case VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2:
        return migration_has_precopy_info(migr) ? VFIO_DEVICE_FEATURE_SET : 0;
    }

    return 0;
}

/*
 * Allocates the reply: the header and the first @copied data bytes of the
 * request, and zeros up to @size data bytes.
 *
 * Returns the reply's data, or NULL with errno set.
 */
static void *
alloc_reply(vfu_msg_t *msg, size_t copied, size_t size)
{
    struct vfio_user_device_feature *req = msg->in.iov.iov_base;
    struct vfio_user_device_feature *reply;

    assert(copied <= size);

    reply = calloc(1, sizeof(*reply) + size);
    if (reply == NULL) {
        return NULL;
    }

    memcpy(reply, req, sizeof(*reply) + copied);
    msg->out.iov.iov_base = reply;
    msg->out.iov.iov_len = sizeof(*reply) + size;
    return reply->data;
}

/* As alloc_reply(), for a GET of @size bytes, which have to fit into argsz. */
static void *
alloc_get_reply(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg, size_t copied, size_t size)
{
    struct vfio_user_device_feature *req = msg->in.iov.iov_base;
    struct vfio_user_device_feature *reply;
    void *data;

    if (req->argsz < sizeof(*req) + size) {
        vfu_log(vfu_ctx, LOG_ERR, "device feature %#x: argsz %u, need %zu",
                req->flags, req->argsz, sizeof(*req) + size);
        return ERROR_PTR(EINVAL);
    }

    data = alloc_reply(msg, copied, size);
    if (data != NULL) {
        reply = msg->out.iov.iov_base;
        reply->argsz = sizeof(*reply) + size;
    }
    return data;
}

static int
get_migration(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_device_feature_migration *data;

    data = alloc_get_reply(vfu_ctx, msg, 0, sizeof(*data));
    if (data == NULL) {
        return -1;
    }

    data->flags = migration_get_flags(vfu_ctx->migration);
    return 0;
}

static int
get_state(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_device_feature_mig_state *data;

    data = alloc_get_reply(vfu_ctx, msg, 0, sizeof(*data));
    if (data == NULL) {
        return -1;
    }

    data->device_state = migration_get_state(vfu_ctx->migration);
    data->data_fd = -1;
    return 0;
}

static int
set_state(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg, size_t size)
{
    struct vfio_user_device_feature *req = msg->in.iov.iov_base;
    struct vfio_device_feature_mig_state *data = (void *)req->data;

    if (size < sizeof(*data)) {
        return ERROR_INT(EINVAL);
    }

    /* First what may fail without a trace, then what may not. */
    if (alloc_reply(msg, size, size) == NULL) {
        return -1;
    }

    return migration_set_state(vfu_ctx, data->device_state);
}

static int
get_data_size(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_device_feature_mig_data_size *data;
    uint64_t length = 0;

    data = alloc_get_reply(vfu_ctx, msg, 0, sizeof(*data));
    if (data == NULL) {
        return -1;
    }

    if (migration_get_data_size(vfu_ctx, &length) < 0) {
        return -1;
    }

    data->stop_copy_length = length;
    return 0;
}

static int
set_precopy_info_v2(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg, size_t size)
{
    if (alloc_reply(msg, size, size) == NULL) {
        return -1;
    }

    return migration_set_precopy_info_v2(vfu_ctx);
}

static int
start_dma_logging(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg, size_t size)
{
    struct vfio_user_device_feature *req = msg->in.iov.iov_base;
    struct vfio_user_device_feature_dma_logging_control *ctl;
    uint32_t i, num_ranges;
    uint64_t pgsize;

    ctl = (void *)req->data;

    if (size < sizeof(*ctl)) {
        vfu_log(vfu_ctx, LOG_ERR, "DMA logging: bad size %zu", size);
        return ERROR_INT(EINVAL);
    }

    /*
     * Some clients send the kernel's structure as it is: behind the same 16
     * bytes is a pointer to the ranges, which means nothing here.
     */
    num_ranges = ctl->num_ranges;
    if (size == sizeof(*ctl) + sizeof(uint64_t)) {
        num_ranges = 0;
    }

    if ((size - sizeof(*ctl)) / sizeof(ctl->ranges[0]) < num_ranges) {
        vfu_log(vfu_ctx, LOG_ERR, "DMA logging: bad size %zu", size);
        return ERROR_INT(EINVAL);
    }

    /*
     * The ranges allow a device to track less. It costs nothing here to track
     * everything, so that they are only checked.
     */
    for (i = 0; i < num_ranges; i++) {
        uint64_t length = ctl->ranges[i].length;

        if (length == 0 || length - 1 > UINT64_MAX - ctl->ranges[i].iova) {
            vfu_log(vfu_ctx, LOG_ERR, "DMA logging: bad range [%#lx, +%#lx)",
                    ctl->ranges[i].iova, length);
            return ERROR_INT(EINVAL);
        }
    }

    if (dma_log_start(vfu_ctx->dma, ctl->page_size, &pgsize) < 0) {
        return -1;
    }

    ctl->page_size = pgsize;

    if (alloc_reply(msg, size, size) == NULL) {
        dma_controller_dirty_page_logging_stop(vfu_ctx->dma);
        return ERROR_INT(ENOMEM);
    }
    return 0;
}

static int
stop_dma_logging(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg, size_t size)
{
    if (alloc_reply(msg, size, size) == NULL) {
        return -1;
    }

    dma_controller_dirty_page_logging_stop(vfu_ctx->dma);
    return 0;
}

static int
report_dma_logging(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg, size_t size)
{
    struct vfio_user_device_feature *req = msg->in.iov.iov_base;
    struct vfio_user_device_feature_dma_logging_report *report;
    uint64_t bitmap_size;

    report = (void *)req->data;

    if (size < sizeof(*report)) {
        return ERROR_INT(EINVAL);
    }

    bitmap_size = dma_log_bitmap_size(report->iova, report->length,
                                      report->page_size);
    if (bitmap_size == 0) {
        vfu_log(vfu_ctx, LOG_ERR, "DMA logging: bad range [%#lx, +%#lx), "
                "page size %#lx", report->iova, report->length,
                report->page_size);
        return ERROR_INT(EINVAL);
    }
    if (bitmap_size > SERVER_MAX_DATA_XFER_SIZE) {
        vfu_log(vfu_ctx, LOG_ERR, "DMA logging: report too large: %#lx bytes in "
                "pages of %#lx need a bitmap of %lu bytes, max_bitmap_size is %u",
                report->length, report->page_size, bitmap_size,
                SERVER_MAX_DATA_XFER_SIZE);
        return ERROR_INT(EINVAL);
    }

    report = alloc_get_reply(vfu_ctx, msg, sizeof(*report),
                             sizeof(*report) + bitmap_size);
    if (report == NULL) {
        return -1;
    }

    return dma_log_report(vfu_ctx->dma, report->iova, report->length,
                          report->page_size, report->bitmap);
}

int
handle_device_feature(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_user_device_feature *req = msg->in.iov.iov_base;
    uint32_t feature, ops, supported;
    size_t size;

    assert(vfu_ctx != NULL);
    assert(msg != NULL);

    if (msg->in.iov.iov_len < sizeof(*req) || req->argsz < sizeof(*req)) {
        vfu_log(vfu_ctx, LOG_ERR, "device feature: bad size %zu",
                msg->in.iov.iov_len);
        return ERROR_INT(EINVAL);
    }

    size = msg->in.iov.iov_len - sizeof(*req);
    feature = req->flags & VFIO_DEVICE_FEATURE_MASK;
    ops = req->flags & OP_MASK;

    if (ops == VFIO_DEVICE_FEATURE_SET) {
        /* What the client does not count in is not there, as in the kernel. */
        size = MIN(size, req->argsz - sizeof(*req));
    }

    if ((req->flags & ~(VFIO_DEVICE_FEATURE_MASK | OP_MASK)) != 0 || ops == 0 ||
        ops == (VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET)) {
        vfu_log(vfu_ctx, LOG_ERR, "device feature: bad flags %#x", req->flags);
        return ERROR_INT(EINVAL);
    }

    supported = supported_ops(vfu_ctx, feature);

    if (supported == 0) {
        vfu_log(vfu_ctx, LOG_DEBUG, "device feature %u: not supported",
                feature);
        return ERROR_INT(ENOTTY);
    }

    if ((ops & ~(supported | VFIO_DEVICE_FEATURE_PROBE)) != 0) {
        vfu_log(vfu_ctx, LOG_ERR, "device feature %u: bad operation %#x",
                feature, ops);
        return ERROR_INT(EINVAL);
    }

    if ((ops & VFIO_DEVICE_FEATURE_PROBE) != 0) {
        return alloc_reply(msg, size, size) == NULL ? -1 : 0;
    }

    switch (feature) {
    case VFIO_DEVICE_FEATURE_MIGRATION:
        return get_migration(vfu_ctx, msg);

    case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
        if (ops == VFIO_DEVICE_FEATURE_GET) {
            return get_state(vfu_ctx, msg);
        }
        return set_state(vfu_ctx, msg, size);

    case VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
        return start_dma_logging(vfu_ctx, msg, size);

    case VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
        return stop_dma_logging(vfu_ctx, msg, size);

    case VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
        return report_dma_logging(vfu_ctx, msg, size);

    case VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
        return get_data_size(vfu_ctx, msg);

    case VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2:
        return set_precopy_info_v2(vfu_ctx, msg, size);
    }

    return ERROR_INT(ENOTTY);
}

bool
device_feature_needs_quiesce(vfu_ctx_t *vfu_ctx, const vfu_msg_t *msg)
{
    const struct vfio_user_device_feature *req = msg->in.iov.iov_base;
    uint32_t feature;

    /* A malformed request changes nothing. */
    if (msg->in.iov.iov_len < sizeof(*req) ||
        (req->flags & OP_MASK) != VFIO_DEVICE_FEATURE_SET) {
        return false;
    }

    feature = req->flags & VFIO_DEVICE_FEATURE_MASK;

    switch (feature) {
    case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
        return supported_ops(vfu_ctx, feature) != 0;
    }

    return false;
}
