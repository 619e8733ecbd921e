/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* What vfu_setup_device_migration_ext() adds to migration version 2. */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "migration.h"
#include "migration_priv.h"
#include "private.h"

#define ALL_MIGRATION_FLAGS (VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | \
                             VFIO_MIGRATION_PRE_COPY)

#ifdef VFU_NO_MIGR_EXT

bool
migration_has_precopy_info(const struct migration *migr UNUSED)
{
    return false;
}

bool
migration_has_data_size(const struct migration *migr UNUSED)
{
    return false;
}

int
migration_get_data_size(vfu_ctx_t *vfu_ctx UNUSED,
                        uint64_t *stop_copy_length UNUSED)
{
    return ERROR_INT(ENOTTY);
}

int
migration_set_precopy_info_v2(vfu_ctx_t *vfu_ctx UNUSED)
{
    return ERROR_INT(ENOTTY);
}

int
handle_mig_get_precopy_info(vfu_ctx_t *vfu_ctx UNUSED, vfu_msg_t *msg UNUSED)
{
    return ERROR_INT(EINVAL);
}

int
migration_gather(vfu_ctx_t *vfu_ctx UNUSED, vfu_msg_t *msg UNUSED,
                 uint32_t size UNUSED)
{
    return ERROR_INT(ENOSYS);
}

#else /* VFU_NO_MIGR_EXT */

bool
migration_has_precopy_info(const struct migration *migr)
{
    return migr != NULL && (migr->flags & VFIO_MIGRATION_PRE_COPY) != 0 &&
           migr->ext.precopy_info != NULL;
}

bool
migration_has_data_size(const struct migration *migr)
{
    return migr != NULL && migr->ext.data_size != NULL;
}

int
migration_get_data_size(vfu_ctx_t *vfu_ctx, uint64_t *stop_copy_length)
{
    assert(migration_has_data_size(vfu_ctx->migration));

    return vfu_ctx->migration->ext.data_size(vfu_ctx, stop_copy_length);
}

int
migration_set_precopy_info_v2(vfu_ctx_t *vfu_ctx)
{
    struct migration *migr = vfu_ctx->migration;

    assert(migration_has_precopy_info(migr));

    if (migr->ext.precopy_info_v2 != NULL &&
        migr->ext.precopy_info_v2(vfu_ctx, true) < 0) {
        return -1;
    }

    migr->precopy_info_v2 = true;
    return 0;
}

int
handle_mig_get_precopy_info(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_precopy_info *req = msg->in.iov.iov_base;
    struct migration *migr = vfu_ctx->migration;
    struct vfio_precopy_info info = { .argsz = sizeof(info) };
    struct vfio_precopy_info *reply;

    if (!migration_has_precopy_info(migr)) {
        vfu_log(vfu_ctx, LOG_ERR, "pre-copy sizes not configured");
        return ERROR_INT(EINVAL);
    }

    /* There are clients that leave argsz zero. */
    if (msg->in.iov.iov_len < sizeof(*req) ||
        (req->argsz != 0 && req->argsz < sizeof(*req))) {
        vfu_log(vfu_ctx, LOG_ERR, "bad size of pre-copy info request (%zu)",
                msg->in.iov.iov_len);
        return ERROR_INT(EINVAL);
    }

    if (!migr_is_pre_copy(migr->state)) {
        vfu_log(vfu_ctx, LOG_ERR, "pre-copy info in state %s",
                migr_state_names[migr->state]);
        return ERROR_INT(EINVAL);
    }

    if (migr->ext.precopy_info(vfu_ctx, &info) < 0) {
        vfu_log(vfu_ctx, LOG_ERR, "device has no pre-copy info: %m");
        return -1;
    }

    reply = malloc(sizeof(*reply));
    if (reply == NULL) {
        return -1;
    }

    /* An older client may treat a flag that it does not know as an error. */
    *reply = info;
    reply->argsz = sizeof(*reply);
    reply->flags &= migr->precopy_info_v2 ? VFIO_PRECOPY_INFO_REINIT : 0;

    msg->out.iov.iov_base = reply;
    msg->out.iov.iov_len = sizeof(*reply);
    return 0;
}

int
migration_gather(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg, uint32_t size)
{
    struct migration *migr = vfu_ctx->migration;
    const struct iovec *data = NULL;
    struct iovec *parts;
    size_t i, total = 0;
    ssize_t nr;

    if (migr->gather == NULL) {
        return ERROR_INT(ENOSYS);
    }

    nr = migr->gather(vfu_ctx, size, &data);
    if (nr < 0) {
        return -1;
    }
    for (i = 0; i < (size_t)nr; i++) {
        if (data[i].iov_len > size - total) {
            vfu_log(vfu_ctx, LOG_ERR, "device gathered more than %u bytes",
                    size);
            return ERROR_INT(EIO);
        }
        total += data[i].iov_len;
    }

    parts = calloc((size_t)nr + 1, sizeof(*parts));
    if (parts == NULL) {
        return -1;
    }
    migr->gathered.argsz = sizeof(migr->gathered) + total;
    migr->gathered.size = total;
    parts[0].iov_base = &migr->gathered;
    parts[0].iov_len = sizeof(migr->gathered);
    if (nr > 0) {
        memcpy(parts + 1, data, (size_t)nr * sizeof(*parts));
    }
    msg->out_iovecs = parts;
    msg->nr_out_iovecs = (size_t)nr + 1;
    return 0;
}

EXPORT int
vfu_setup_migration_gather(vfu_ctx_t *vfu_ctx,
                           vfu_migration_gather_cb_t *gather)
{
    assert(vfu_ctx != NULL);

    if (vfu_ctx->migration == NULL) {
        vfu_log(vfu_ctx, LOG_ERR, "migration callbacks must be set up first");
        return ERROR_INT(EINVAL);
    }

    vfu_ctx->migration->gather = gather;
    return 0;
}

EXPORT int
vfu_setup_device_migration_ext(vfu_ctx_t *vfu_ctx,
                               const vfu_migration_ext_t *ext)
{
    assert(vfu_ctx != NULL);
    assert(ext != NULL);

    if (vfu_ctx->migration == NULL) {
        vfu_log(vfu_ctx, LOG_ERR, "migration callbacks must be set up first");
        return ERROR_INT(EINVAL);
    }

    if (ext->version != VFU_MIGR_EXT_VERS || ext->reserved != 0) {
        vfu_log(vfu_ctx, LOG_ERR, "unsupported migration extension version %d",
                ext->version);
        return ERROR_INT(EINVAL);
    }

    /* <linux/vfio.h>: GET_PRECOPY_INFO is mandatory for PRE_COPY. */
    if ((ext->migration_flags & ~(uint64_t)ALL_MIGRATION_FLAGS) != 0 ||
        (ext->migration_flags & VFIO_MIGRATION_STOP_COPY) == 0 ||
        ((ext->migration_flags & VFIO_MIGRATION_PRE_COPY) != 0 &&
         ext->precopy_info == NULL)) {
        vfu_log(vfu_ctx, LOG_ERR, "bad migration flags %#lx",
                ext->migration_flags);
        return ERROR_INT(EINVAL);
    }

    vfu_ctx->migration->ext = *ext;
    vfu_ctx->migration->flags = ext->migration_flags;
    return 0;
}

EXPORT int
vfu_migration_get_state(vfu_ctx_t *vfu_ctx)
{
    assert(vfu_ctx != NULL);

    if (vfu_ctx->migration == NULL) {
        return ERROR_INT(ENOTSUP);
    }

    return migr_state_vfio_to_vfu(vfu_ctx->migration->state);
}

EXPORT int
vfu_migration_fail(vfu_ctx_t *vfu_ctx)
{
    assert(vfu_ctx != NULL);

    if (vfu_ctx->migration == NULL) {
        return ERROR_INT(ENOTSUP);
    }

    vfu_log(vfu_ctx, LOG_ERR, "migration: %s -> ERROR",
            migr_state_names[vfu_ctx->migration->state]);
    vfu_ctx->migration->state = VFIO_DEVICE_STATE_ERROR;
    return 0;
}

EXPORT int
vfu_reset_device(vfu_ctx_t *vfu_ctx, vfu_reset_type_t reason)
{
    assert(vfu_ctx != NULL);

    /* Whether a connection is lost is not for the device to say. */
    if (reason != VFU_RESET_DEVICE && reason != VFU_RESET_PCI_FLR) {
        return ERROR_INT(EINVAL);
    }

    return handle_device_reset(vfu_ctx, reason);
}

EXPORT bool
vfu_client_has_precopy_info(vfu_ctx_t *vfu_ctx)
{
    assert(vfu_ctx != NULL);

    return vfu_ctx->client_precopy_info;
}

EXPORT uint32_t
vfu_ext_api_version(void)
{
    return VFU_MIGR_EXT_VERS;
}

#endif /* VFU_NO_MIGR_EXT */
