/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef LIB_VFIO_USER_MIGRATION_PRIV_H
#define LIB_VFIO_USER_MIGRATION_PRIV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "libvfio-user.h"
#include "private.h"
#include "vfio-user.h"

#define MIGR_NR_STATES (VFIO_DEVICE_STATE_PRE_COPY_P2P + 1)

struct migration {
    vfu_migration_callbacks_t callbacks;
#ifndef VFU_NO_MIGR_EXT
    vfu_migration_ext_t ext;
    vfu_migration_gather_cb_t *gather;
    struct vfio_user_mig_data gathered; /* of the reply that is being sent */
    size_t max_window;          /* 0: migration data comes in messages only */
    struct iovec window;        /* where it is now, while there is one */
#endif
    uint64_t flags;             /* VFIO_MIGRATION_* */
    size_t pgsize;
    uint32_t state;             /* enum vfio_device_mig_state */
    bool set_failed;            /* the client's last change of state failed */
    bool precopy_info_v2;       /* the client understands REINIT */
};

/*
 * The next state on the way from @from to @to for a device that announces
 * @flags, or VFIO_DEVICE_STATE_ERROR if there is no way.
 */
uint32_t
migr_next_state(uint64_t flags, uint32_t from, uint32_t to);

/* Whether a device that announces @flags has @state. */
bool
migr_state_supported(uint64_t flags, uint32_t state);

bool
migr_is_pre_copy(uint32_t state);

/* Whether there is migration data to be read. */
bool
migration_is_saving(const struct migration *migr);

/* Have the device take @size bytes of migration data. */
int
migration_write(vfu_ctx_t *vfu_ctx, void *data, uint32_t size);

/*
 * migration_window.c: the data of a request is in the window. Whoever has the
 * other end can change it at any time.
 */
bool
migration_has_window(const struct migration *migr);

int
migration_window_read(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg);

int
migration_window_write(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg);

vfu_migr_state_t
migr_state_vfio_to_vfu(uint32_t state);

extern const char *const migr_state_names[MIGR_NR_STATES];

#endif /* LIB_VFIO_USER_MIGRATION_PRIV_H */
