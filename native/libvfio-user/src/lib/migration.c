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

#define ALL_MIGRATION_FLAGS (VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | \
                             VFIO_MIGRATION_PRE_COPY)

static const char *const state_names[MIGR_NR_STATES] = {
    [VFIO_DEVICE_STATE_ERROR] = "ERROR",
    [VFIO_DEVICE_STATE_STOP] = "STOP",
    [VFIO_DEVICE_STATE_RUNNING] = "RUNNING",
    [VFIO_DEVICE_STATE_STOP_COPY] = "STOP_COPY",
    [VFIO_DEVICE_STATE_RESUMING] = "RESUMING",
    [VFIO_DEVICE_STATE_RUNNING_P2P] = "RUNNING_P2P",
    [VFIO_DEVICE_STATE_PRE_COPY] = "PRE_COPY",
    [VFIO_DEVICE_STATE_PRE_COPY_P2P] = "PRE_COPY_P2P",
};

/*
 * The first step of the path from [one state] to [another], for a device that
 * has every state; 0 is VFIO_DEVICE_STATE_ERROR and means that there is none.
 *
 * The rules are those of <linux/vfio.h> (enum vfio_device_mig_state): take the
 * shortest path, and do not pass through the saving group. The latter keeps a
 * path from opening a data transfer session only to throw it away, so it does
 * not forbid PRE_COPY -> PRE_COPY_P2P -> STOP_COPY, which stays in one session.
 * STOP_COPY -> PRE_COPY* is refused outright, although a path exists.
 *
 * A device without some of the optional states behaves as if it passed through
 * them: the arcs on either side become one, see migr_next_state().
 */
static const uint8_t next_state[MIGR_NR_STATES][MIGR_NR_STATES] = {
    [VFIO_DEVICE_STATE_STOP] = {
        [VFIO_DEVICE_STATE_STOP]         = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_RUNNING]      = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_STOP_COPY]    = VFIO_DEVICE_STATE_STOP_COPY,
        [VFIO_DEVICE_STATE_RESUMING]     = VFIO_DEVICE_STATE_RESUMING,
        [VFIO_DEVICE_STATE_RUNNING_P2P]  = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_PRE_COPY]     = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_PRE_COPY_P2P] = VFIO_DEVICE_STATE_RUNNING_P2P,
    },
    [VFIO_DEVICE_STATE_RUNNING] = {
        [VFIO_DEVICE_STATE_STOP]         = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_RUNNING]      = VFIO_DEVICE_STATE_RUNNING,
        [VFIO_DEVICE_STATE_STOP_COPY]    = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_RESUMING]     = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_RUNNING_P2P]  = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_PRE_COPY]     = VFIO_DEVICE_STATE_PRE_COPY,
        [VFIO_DEVICE_STATE_PRE_COPY_P2P] = VFIO_DEVICE_STATE_RUNNING_P2P,
    },
    [VFIO_DEVICE_STATE_STOP_COPY] = {
        [VFIO_DEVICE_STATE_STOP]         = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_RUNNING]      = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_STOP_COPY]    = VFIO_DEVICE_STATE_STOP_COPY,
        [VFIO_DEVICE_STATE_RESUMING]     = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_RUNNING_P2P]  = VFIO_DEVICE_STATE_STOP,
    },
    [VFIO_DEVICE_STATE_RESUMING] = {
        [VFIO_DEVICE_STATE_STOP]         = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_RUNNING]      = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_STOP_COPY]    = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_RESUMING]     = VFIO_DEVICE_STATE_RESUMING,
        [VFIO_DEVICE_STATE_RUNNING_P2P]  = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_PRE_COPY]     = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_PRE_COPY_P2P] = VFIO_DEVICE_STATE_STOP,
    },
    [VFIO_DEVICE_STATE_RUNNING_P2P] = {
        [VFIO_DEVICE_STATE_STOP]         = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_RUNNING]      = VFIO_DEVICE_STATE_RUNNING,
        [VFIO_DEVICE_STATE_STOP_COPY]    = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_RESUMING]     = VFIO_DEVICE_STATE_STOP,
        [VFIO_DEVICE_STATE_RUNNING_P2P]  = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_PRE_COPY]     = VFIO_DEVICE_STATE_RUNNING,
        [VFIO_DEVICE_STATE_PRE_COPY_P2P] = VFIO_DEVICE_STATE_PRE_COPY_P2P,
    },
    [VFIO_DEVICE_STATE_PRE_COPY] = {
        [VFIO_DEVICE_STATE_STOP]         = VFIO_DEVICE_STATE_RUNNING,
        [VFIO_DEVICE_STATE_RUNNING]      = VFIO_DEVICE_STATE_RUNNING,
        [VFIO_DEVICE_STATE_STOP_COPY]    = VFIO_DEVICE_STATE_PRE_COPY_P2P,
        [VFIO_DEVICE_STATE_RESUMING]     = VFIO_DEVICE_STATE_RUNNING,
        [VFIO_DEVICE_STATE_RUNNING_P2P]  = VFIO_DEVICE_STATE_RUNNING,
        [VFIO_DEVICE_STATE_PRE_COPY]     = VFIO_DEVICE_STATE_PRE_COPY,
        [VFIO_DEVICE_STATE_PRE_COPY_P2P] = VFIO_DEVICE_STATE_PRE_COPY_P2P,
    },
    [VFIO_DEVICE_STATE_PRE_COPY_P2P] = {
        [VFIO_DEVICE_STATE_STOP]         = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_RUNNING]      = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_STOP_COPY]    = VFIO_DEVICE_STATE_STOP_COPY,
        [VFIO_DEVICE_STATE_RESUMING]     = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_RUNNING_P2P]  = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFIO_DEVICE_STATE_PRE_COPY]     = VFIO_DEVICE_STATE_PRE_COPY,
        [VFIO_DEVICE_STATE_PRE_COPY_P2P] = VFIO_DEVICE_STATE_PRE_COPY_P2P,
    },
};

bool
migr_state_supported(uint64_t flags, uint32_t state)
{
    const uint64_t p2p = VFIO_MIGRATION_P2P;
    const uint64_t pre_copy = VFIO_MIGRATION_PRE_COPY;

    switch (state) {
    case VFIO_DEVICE_STATE_ERROR:
    case VFIO_DEVICE_STATE_STOP:
    case VFIO_DEVICE_STATE_RUNNING:
    case VFIO_DEVICE_STATE_STOP_COPY:
    case VFIO_DEVICE_STATE_RESUMING:
        return true;
    case VFIO_DEVICE_STATE_RUNNING_P2P:
        return flags & p2p;
    case VFIO_DEVICE_STATE_PRE_COPY:
        return flags & pre_copy;
    case VFIO_DEVICE_STATE_PRE_COPY_P2P:
        return (flags & (p2p | pre_copy)) == (p2p | pre_copy);
    }
    return false;
}

uint32_t
migr_next_state(uint64_t flags, uint32_t from, uint32_t to)
{
    uint32_t next = from;

    if (from >= MIGR_NR_STATES || to >= MIGR_NR_STATES ||
        !migr_state_supported(flags, from) ||
        !migr_state_supported(flags, to)) {
        return VFIO_DEVICE_STATE_ERROR;
    }

    do {
        next = next_state[next][to];
    } while (!migr_state_supported(flags, next));

    return next;
}

static vfu_migr_state_t
state_vfio_to_vfu(uint32_t state)
{
    switch (state) {
    case VFIO_DEVICE_STATE_STOP:
        return VFU_MIGR_STATE_STOP;
    case VFIO_DEVICE_STATE_RUNNING:
        return VFU_MIGR_STATE_RUNNING;
    case VFIO_DEVICE_STATE_STOP_COPY:
        return VFU_MIGR_STATE_STOP_AND_COPY;
    case VFIO_DEVICE_STATE_RESUMING:
        return VFU_MIGR_STATE_RESUME;
    case VFIO_DEVICE_STATE_RUNNING_P2P:
        return VFU_MIGR_STATE_RUNNING_P2P;
    case VFIO_DEVICE_STATE_PRE_COPY:
        return VFU_MIGR_STATE_PRE_COPY;
    case VFIO_DEVICE_STATE_PRE_COPY_P2P:
        return VFU_MIGR_STATE_PRE_COPY_P2P;
    }
    return VFU_MIGR_STATE_ERROR;
}

static bool
is_pre_copy(uint32_t state)
{
    return state == VFIO_DEVICE_STATE_PRE_COPY ||
           state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

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

static int
take_arc(vfu_ctx_t *vfu_ctx, uint32_t next)
{
    struct migration *migr = vfu_ctx->migration;
    int ret;

    vfu_log(vfu_ctx, LOG_DEBUG, "migration: %s -> %s", state_names[migr->state],
            state_names[next]);

    vfu_ctx->in_cb = CB_MIGR_STATE;
    ret = migr->callbacks.transition(vfu_ctx, state_vfio_to_vfu(next));
    vfu_ctx->in_cb = CB_NONE;

    if (ret != 0) {
        /* A device that returned something else did not say why. */
        if (ret != -1 || errno == 0) {
            errno = EIO;
        }
        vfu_log(vfu_ctx, LOG_ERR, "migration: %s -> %s failed: %m",
                state_names[migr->state], state_names[next]);
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
                    state_names[migr->state], state);
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

    if (!is_pre_copy(migr->state) &&
        migr->state != VFIO_DEVICE_STATE_STOP_COPY) {
        vfu_log(vfu_ctx, LOG_ERR, "migration data read in state %s",
                state_names[migr->state]);
        return ERROR_INT(EINVAL);
    }

    if (check_data_size(vfu_ctx, req->argsz, req->size) < 0) {
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
handle_mig_data_write(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_user_mig_data *req = msg->in.iov.iov_base;
    struct migration *migr = vfu_ctx->migration;
    ssize_t ret;

    if (migr == NULL) {
        vfu_log(vfu_ctx, LOG_ERR, "migration not configured");
        return ERROR_INT(EINVAL);
    }

    if (msg->in.iov.iov_len < sizeof(*req) ||
        msg->in.iov.iov_len - sizeof(*req) != req->size ||
        req->size > SERVER_MAX_DATA_XFER_SIZE) {
        vfu_log(vfu_ctx, LOG_ERR, "bad size of migration data write (%zu)",
                msg->in.iov.iov_len);
        return ERROR_INT(EINVAL);
    }

    if (migr->state != VFIO_DEVICE_STATE_RESUMING) {
        vfu_log(vfu_ctx, LOG_ERR, "migration data write in state %s",
                state_names[migr->state]);
        return ERROR_INT(EINVAL);
    }

    if (req->size == 0) {
        return 0;
    }

    ret = migr->callbacks.write_data(vfu_ctx, req->data, req->size);
    if (ret < 0) {
        vfu_log(vfu_ctx, LOG_ERR, "writing migration data failed: %m");
        return -1;
    }
    if ((uint64_t)ret != req->size) {
        vfu_log(vfu_ctx, LOG_ERR, "device took %zd of %u bytes", ret,
                req->size);
        return ERROR_INT(EIO);
    }

    return 0;
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

    if (msg->in.iov.iov_len < sizeof(*req) || req->argsz < sizeof(*req)) {
        vfu_log(vfu_ctx, LOG_ERR, "bad size of pre-copy info request (%zu)",
                msg->in.iov.iov_len);
        return ERROR_INT(EINVAL);
    }

    if (!is_pre_copy(migr->state)) {
        vfu_log(vfu_ctx, LOG_ERR, "pre-copy info in state %s",
                state_names[migr->state]);
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

    return state_vfio_to_vfu(vfu_ctx->migration->state);
}

EXPORT int
vfu_migration_fail(vfu_ctx_t *vfu_ctx)
{
    assert(vfu_ctx != NULL);

    if (vfu_ctx->migration == NULL) {
        return ERROR_INT(ENOTSUP);
    }

    vfu_log(vfu_ctx, LOG_ERR, "migration: %s -> ERROR",
            state_names[vfu_ctx->migration->state]);
    vfu_ctx->migration->state = VFIO_DEVICE_STATE_ERROR;
    return 0;
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
