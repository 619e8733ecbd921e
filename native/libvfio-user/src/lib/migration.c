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
#include <unistd.h>

#include "common.h"
#include "migration.h"
#include "migration_priv.h"
#include "private.h"

#define MIN_PGSIZE 4096

struct migration *
init_migration(const vfu_migration_callbacks_t *callbacks, int *err)
{
    struct migration *migr;

    if (callbacks->transition == NULL || callbacks->read_data == NULL ||
        callbacks->write_data == NULL) {
        *err = EINVAL;
        return NULL;
    }

    migr = calloc(1, sizeof(*migr));
    if (migr == NULL) {
        *err = ENOMEM;
        return NULL;
    }

    migr->callbacks = *callbacks;
    migr->flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY;
    migr->pgsize = sysconf(_SC_PAGESIZE);
    migr->state = VFIO_DEVICE_STATE_RUNNING;

    return migr;
}

size_t
migration_get_pgsize(struct migration *migr)
{
    assert(migr != NULL);

    return migr->pgsize;
}

int
migration_set_pgsize(struct migration *migr, size_t pgsize)
{
    assert(migr != NULL);

    if (pgsize < MIN_PGSIZE || (pgsize & (pgsize - 1)) != 0) {
        return ERROR_INT(EINVAL);
    }

    migr->pgsize = pgsize;
    return 0;
}

uint64_t
migration_get_flags(const struct migration *migr)
{
    assert(migr != NULL);

    return migr->flags;
}

uint32_t
migration_get_state(const struct migration *migr)
{
    assert(migr != NULL);

    return migr->state;
}

bool
migration_is_saving(const struct migration *migr)
{
    return migr_is_pre_copy(migr->state) ||
           migr->state == VFIO_DEVICE_STATE_STOP_COPY;
}

static int
take_arc(vfu_ctx_t *vfu_ctx, uint32_t next)
{
    struct migration *migr = vfu_ctx->migration;
    int ret;

    vfu_log(vfu_ctx, LOG_DEBUG, "migration: %s -> %s",
            migr_state_names[migr->state], migr_state_names[next]);

    vfu_ctx->in_cb = CB_MIGR_STATE;
    ret = migr->callbacks.transition(vfu_ctx, migr_state_vfio_to_vfu(next));
    vfu_ctx->in_cb = CB_NONE;

    if (ret != 0) {
        /* A device that returned something else did not say why. */
        if (ret != -1 || errno == 0) {
            errno = EIO;
        }
        vfu_log(vfu_ctx, LOG_ERR, "migration: %s -> %s failed: %m",
                migr_state_names[migr->state], migr_state_names[next]);
        return -1;
    }

    if (migr->state == VFIO_DEVICE_STATE_ERROR) {
        /* The device gave up on itself, see vfu_migration_fail(). */
        return ERROR_INT(EIO);
    }

    migr->state = next;
    return 0;
}

int
migration_set_state(vfu_ctx_t *vfu_ctx, uint32_t state)
{
    struct migration *migr = vfu_ctx->migration;

    assert(migr != NULL);

    /* Cleared when the client has the state it asked for. */
    migr->set_failed = true;

    while (migr->state != state || state == VFIO_DEVICE_STATE_ERROR) {
        uint32_t next = migr_next_state(migr->flags, migr->state, state);

        if (next == VFIO_DEVICE_STATE_ERROR) {
            vfu_log(vfu_ctx, LOG_ERR, "migration: no way from %s to state %u",
                    migr_state_names[migr->state], state);
            return ERROR_INT(EINVAL);
        }

        if (take_arc(vfu_ctx, next) < 0) {
            return -1;
        }
    }

    migr->set_failed = false;
    return 0;
}

uint32_t
migration_reset(vfu_ctx_t *vfu_ctx, vfu_reset_type_t reason)
{
    struct migration *migr = vfu_ctx->migration;
    uint32_t old_state;

    if (migr == NULL) {
        return VFIO_DEVICE_STATE_RUNNING;
    }

    old_state = migr->state;

    /*
     * <linux/vfio.h> and the vfio-user specification know a reset as the way
     * out of ERROR. Neither says what it does to the other states. Linux's own
     * drivers go to RUNNING from all of them, but there the guest's reset of a
     * device under migration ends the migration, as it did here: the client's
     * next request is for a state that cannot be reached from RUNNING. So a
     * reset of a sound device leaves its migration state alone, as in upstream
     * libvfio-user since its commit 4f4fce4.
     *
     * One more case is needed. When a change of state fails and so does the
     * way back, QEMU (vfio_migration_set_state()) resets the device and takes
     * it to be RUNNING, whether or not the device went to ERROR.
     */
    if (reason == VFU_RESET_LOST_CONN ||
        migr->state == VFIO_DEVICE_STATE_ERROR || migr->set_failed) {
        migr->state = VFIO_DEVICE_STATE_RUNNING;
        migr->set_failed = false;
    }

    if (reason == VFU_RESET_LOST_CONN) {
        /* The next client has to opt in itself. */
        migr->precopy_info_v2 = false;
        migration_drop_window(migr);
    }

    return old_state;
}

void
migration_reset_failed(vfu_ctx_t *vfu_ctx, uint32_t old_state)
{
    struct migration *migr = vfu_ctx->migration;

    if (migr != NULL && migr->state != old_state) {
        migr->state = old_state;
        migr->set_failed = true;
    }
}

/*
 * The number of data bytes in a reply of at most @argsz bytes that the client
 * asks for, checked against what either side accepts in one message.
 */
static int
check_data_size(vfu_ctx_t *vfu_ctx, uint32_t argsz, uint32_t size)
{
    size_t max = MIN(SERVER_MAX_DATA_XFER_SIZE,
                     vfu_ctx->client_max_data_xfer_size);

    if (size > max) {
        vfu_log(vfu_ctx, LOG_ERR, "migration data size %u, at most %zu", size,
                max);
        return ERROR_INT(EINVAL);
    }

    /* A shorter reply instead would tell the client that the data has ended. */
    if (argsz < sizeof(struct vfio_user_mig_data) ||
        argsz - sizeof(struct vfio_user_mig_data) < size) {
        vfu_log(vfu_ctx, LOG_ERR, "migration data size %u in argsz %u", size,
                argsz);
        return ERROR_INT(EINVAL);
    }

    return 0;
}

int
handle_mig_data_read(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_user_mig_data *req = msg->in.iov.iov_base;
    struct migration *migr = vfu_ctx->migration;
    struct vfio_user_mig_data *reply;
    ssize_t ret;

    if (migr == NULL) {
        vfu_log(vfu_ctx, LOG_ERR, "migration not configured");
        return ERROR_INT(EINVAL);
    }

    if (msg->in.iov.iov_len < sizeof(*req)) {
        vfu_log(vfu_ctx, LOG_ERR, "message size too small (%zu)",
                msg->in.iov.iov_len);
        return ERROR_INT(EINVAL);
    }

    if (!migration_is_saving(migr)) {
        vfu_log(vfu_ctx, LOG_ERR, "migration data read in state %s",
                migr_state_names[migr->state]);
        return ERROR_INT(EINVAL);
    }

    if (migration_has_window(migr)) {
        return migration_window_read(vfu_ctx, msg);
    }

    if (check_data_size(vfu_ctx, req->argsz, req->size) < 0) {
        return -1;
    }

    if (migration_gather(vfu_ctx, msg, req->size) == 0) {
        return 0;
    } else if (errno != ENOSYS) {
        vfu_log(vfu_ctx, LOG_ERR, "gathering migration data failed: %m");
        return -1;
    }

    /* Not cleared: only what the device filled in leaves this process. */
    reply = malloc(sizeof(*reply) + req->size);
    if (reply == NULL) {
        return -1;
    }
    msg->out.iov.iov_base = reply;

    ret = migr->callbacks.read_data(vfu_ctx, reply->data, req->size);
    if (ret < 0) {
        vfu_log(vfu_ctx, LOG_ERR, "reading migration data failed: %m");
        return -1;
    }
    if ((uint64_t)ret > req->size) {
        vfu_log(vfu_ctx, LOG_ERR, "device read %zd of %u bytes", ret,
                req->size);
        return ERROR_INT(EIO);
    }

    reply->size = ret;
    reply->argsz = sizeof(*reply) + ret;
    msg->out.iov.iov_len = reply->argsz;
    return 0;
}

int
migration_write(vfu_ctx_t *vfu_ctx, void *data, uint32_t size)
{
    struct migration *migr = vfu_ctx->migration;
    ssize_t ret;

    if (migr->state != VFIO_DEVICE_STATE_RESUMING) {
        vfu_log(vfu_ctx, LOG_ERR, "migration data write in state %s",
                migr_state_names[migr->state]);
        return ERROR_INT(EINVAL);
    }

    if (size == 0) {
        return 0;
    }

    ret = migr->callbacks.write_data(vfu_ctx, data, size);
    if (ret < 0) {
        vfu_log(vfu_ctx, LOG_ERR, "writing migration data failed: %m");
        return -1;
    }
    if ((uint64_t)ret != size) {
        vfu_log(vfu_ctx, LOG_ERR, "device took %zd of %u bytes", ret, size);
        return ERROR_INT(EIO);
    }

    return 0;
}

int
handle_mig_data_write(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_user_mig_data *req = msg->in.iov.iov_base;
    struct migration *migr = vfu_ctx->migration;

    if (migr == NULL) {
        vfu_log(vfu_ctx, LOG_ERR, "migration not configured");
        return ERROR_INT(EINVAL);
    }

    if (migration_has_window(migr)) {
        return migration_window_write(vfu_ctx, msg);
    }

    if (msg->in.iov.iov_len < sizeof(*req) ||
        msg->in.iov.iov_len - sizeof(*req) != req->size ||
        req->size > SERVER_MAX_DATA_XFER_SIZE) {
        vfu_log(vfu_ctx, LOG_ERR, "bad size of migration data write (%zu)",
                msg->in.iov.iov_len);
        return ERROR_INT(EINVAL);
    }

    return migration_write(vfu_ctx, req->data, req->size);
}

EXPORT int
vfu_setup_device_migration_callbacks(vfu_ctx_t *vfu_ctx,
                                     const vfu_migration_callbacks_t *callbacks)
{
    struct migration *migr;
    int err = 0;

    assert(vfu_ctx != NULL);
    assert(callbacks != NULL);

    if (callbacks->version != VFU_MIGR_CALLBACKS_VERS) {
        vfu_log(vfu_ctx, LOG_ERR, "unsupported migration callbacks version %d",
                callbacks->version);
        return ERROR_INT(EINVAL);
    }

    if (vfu_ctx->migration != NULL) {
        vfu_log(vfu_ctx, LOG_ERR, "migration already configured");
        return ERROR_INT(EEXIST);
    }

    migr = init_migration(callbacks, &err);
    if (migr == NULL) {
        vfu_log(vfu_ctx, LOG_ERR, "failed to initialize device migration");
        return ERROR_INT(err);
    }

    vfu_ctx->migration = migr;
    return 0;
}
