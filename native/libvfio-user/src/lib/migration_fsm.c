/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* The states, and the ways between them. */

#include <stdbool.h>
#include <stdint.h>

#include "libvfio-user.h"
#include "migration_priv.h"

const char *const migr_state_names[MIGR_NR_STATES] = {
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

vfu_migr_state_t
migr_state_vfio_to_vfu(uint32_t state)
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

bool
migr_is_pre_copy(uint32_t state)
{
    return state == VFIO_DEVICE_STATE_PRE_COPY ||
           state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}
