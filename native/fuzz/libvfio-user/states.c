/*
 * The device for the fuzzer: its migration states and data, by what the library has it do.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "device_private.h"

#include <errno.h>
#include <string.h>

#define STREAM_BYTES 5000 /* of migration data that a save has */

static uint32_t state; /* enum vfio_device_mig_state */
static size_t unread; /* bytes of migration data */

void states_open(void)
{
    state = VFIO_DEVICE_STATE_RUNNING;
    unread = 0;
}

/* Out of ERROR, and after a change that failed, a reset leads to RUNNING without a callback: that is not an arc. */
void states_reset(bool connection_lost)
{
    if (connection_lost || (!(setup & SETUP_NO_MIGRATION) && vfu_migration_get_state(device) == VFU_MIGR_STATE_RUNNING)) {
        state = VFIO_DEVICE_STATE_RUNNING;
    }
}

uint32_t device_state(void)
{
    return state;
}

/* The arcs of enum vfio_device_mig_state in <linux/vfio.h>, as "from, to"; those without P2P lead past it. */
static bool is_arc(uint32_t from, uint32_t to)
{
    static const uint8_t with_p2p[][2] = {
        { VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_STOP },
        { VFIO_DEVICE_STATE_STOP_COPY, VFIO_DEVICE_STATE_STOP },
        { VFIO_DEVICE_STATE_RESUMING, VFIO_DEVICE_STATE_STOP },
        { VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_RUNNING_P2P },
        { VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING_P2P },
        { VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_STOP_COPY },
        { VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RESUMING },
        { VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_RUNNING },
        { VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_PRE_COPY },
        { VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_RUNNING },
        { VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_PRE_COPY_P2P },
        { VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_RUNNING_P2P },
        { VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_PRE_COPY_P2P },
        { VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_PRE_COPY },
        { VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_STOP_COPY },
    };
    static const uint8_t without[][2] = {
        { VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_STOP },
        { VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING },
        { VFIO_DEVICE_STATE_STOP_COPY, VFIO_DEVICE_STATE_STOP },
        { VFIO_DEVICE_STATE_RESUMING, VFIO_DEVICE_STATE_STOP },
        { VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_STOP_COPY },
        { VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RESUMING },
        { VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_PRE_COPY },
        { VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_RUNNING },
        { VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_STOP_COPY },
    };
    const uint8_t(*arcs)[2] = setup & SETUP_P2P ? with_p2p : without;
    size_t count = setup & SETUP_P2P ? sizeof(with_p2p) / 2 : sizeof(without) / 2;

    if (!(setup & SETUP_PRE_COPY) && (to == VFIO_DEVICE_STATE_PRE_COPY || to == VFIO_DEVICE_STATE_PRE_COPY_P2P)) {
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        if (arcs[i][0] == from && arcs[i][1] == to) {
            return true;
        }
    }
    return false;
}

static int on_transition(vfu_ctx_t *ctx, vfu_migr_state_t named)
{
    static const uint32_t states[] = {
        [VFU_MIGR_STATE_STOP] = VFIO_DEVICE_STATE_STOP,
        [VFU_MIGR_STATE_RUNNING] = VFIO_DEVICE_STATE_RUNNING,
        [VFU_MIGR_STATE_STOP_AND_COPY] = VFIO_DEVICE_STATE_STOP_COPY,
        [VFU_MIGR_STATE_PRE_COPY] = VFIO_DEVICE_STATE_PRE_COPY,
        [VFU_MIGR_STATE_RESUME] = VFIO_DEVICE_STATE_RESUMING,
        [VFU_MIGR_STATE_RUNNING_P2P] = VFIO_DEVICE_STATE_RUNNING_P2P,
        [VFU_MIGR_STATE_PRE_COPY_P2P] = VFIO_DEVICE_STATE_PRE_COPY_P2P,
    };
    uint32_t next;

    (void)ctx;
    if ((size_t)named >= sizeof(states) / sizeof(states[0])) {
        fault("the device is sent to state %d, which there is not", named);
    }
    next = states[named];
    if (!is_arc(state, next)) {
        fault("%u -> %u is no arc", state, next);
    }
    if (callback_fails()) {
        return -1;
    }
    if ((next == VFIO_DEVICE_STATE_PRE_COPY || next == VFIO_DEVICE_STATE_PRE_COPY_P2P ||
         next == VFIO_DEVICE_STATE_STOP_COPY) &&
        state != VFIO_DEVICE_STATE_PRE_COPY && state != VFIO_DEVICE_STATE_PRE_COPY_P2P) {
        unread = STREAM_BYTES;
    }
    state = next;
    return 0;
}

static void needs(bool holds, const char *what)
{
    if (!holds) {
        fault("%s in state %u", what, state);
    }
}

static bool saving(void)
{
    return state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P ||
           state == VFIO_DEVICE_STATE_STOP_COPY;
}

static ssize_t on_read_data(vfu_ctx_t *ctx, void *buffer, uint64_t count)
{
    size_t part = count < unread ? (size_t)count : unread;

    (void)ctx;
    needs(saving(), "a read of migration data");
    if (callback_fails() || ((setup & SETUP_ACCESSES) && vfu_serve_accesses(device) < 0)) {
        return -1; /* without the connection the buffer may be gone */
    }
    part = part < unread ? part : unread; /* a reset may have come in between */
    memset(buffer, 0x5a, part);
    unread -= part;
    return (ssize_t)part;
}

static ssize_t on_gather(vfu_ctx_t *ctx, uint64_t count, const struct iovec **iov)
{
    static uint8_t content[STREAM_BYTES];
    static struct iovec parts[2];
    size_t part = count < unread ? (size_t)count : unread;

    (void)ctx;
    needs(saving(), "a gathered read of migration data");
    if (count % 5 == 1) {
        errno = ENOSYS;
        return -1;
    }
    if (callback_fails()) {
        return -1;
    }
    parts[0] = (struct iovec){ content, part / 2 };
    parts[1] = (struct iovec){ content + part / 2, part - part / 2 };
    unread -= part;
    *iov = parts;
    return part == 0 ? 0 : 2;
}

static ssize_t on_write_data(vfu_ctx_t *ctx, void *buffer, uint64_t count)
{
    static uint8_t taken[VFIO_USER_DEFAULT_MAX_DATA_XFER_SIZE];

    (void)ctx;
    needs(state == VFIO_DEVICE_STATE_RESUMING, "a write of migration data");
    if (count > sizeof(taken)) {
        fault("a write of %lu bytes of migration data", count);
    }
    memcpy(taken, buffer, count);
    return callback_fails() ? -1 : (ssize_t)count;
}

static int on_precopy_info(vfu_ctx_t *ctx, struct vfio_precopy_info *info)
{
    (void)ctx;
    needs(state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P, "pre-copy info");
    if (callback_fails()) {
        return -1;
    }
    info->initial_bytes = unread;
    info->dirty_bytes = 1;
    info->flags = VFIO_PRECOPY_INFO_REINIT;
    return 0;
}

static int on_data_size(vfu_ctx_t *ctx, uint64_t *length)
{
    (void)ctx;
    *length = unread;
    return callback_fails() ? -1 : 0;
}

static int on_precopy_info_v2(vfu_ctx_t *ctx, bool enabled)
{
    (void)ctx, (void)enabled;
    return callback_fails() ? -1 : 0;
}

void states_set_up(void)
{
    const vfu_migration_callbacks_t callbacks = { VFU_MIGR_CALLBACKS_VERS, on_transition, on_read_data, on_write_data };
    const vfu_migration_ext_t ext = {
        .version = VFU_MIGR_EXT_VERS,
        .migration_flags = VFIO_MIGRATION_STOP_COPY | (setup & SETUP_P2P ? VFIO_MIGRATION_P2P : 0) |
                           (setup & SETUP_PRE_COPY ? VFIO_MIGRATION_PRE_COPY : 0),
        .precopy_info = on_precopy_info,
        .data_size = on_data_size,
        .precopy_info_v2 = on_precopy_info_v2,
    };

    require(vfu_setup_device_migration_callbacks(device, &callbacks) == 0, "migration");
    require(vfu_setup_device_migration_ext(device, &ext) == 0, "its extensions");
    require(vfu_setup_migration_gather(device, setup & SETUP_GATHER ? on_gather : NULL) == 0, "gathering");
    require(vfu_setup_migration_window(device, setup & SETUP_WINDOW ? GUEST_FILE : 0) == 0, "the window");
}
