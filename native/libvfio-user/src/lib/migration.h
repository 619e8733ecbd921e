/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef LIB_VFIO_USER_MIGRATION_H
#define LIB_VFIO_USER_MIGRATION_H

/*
 * Migration protocol v2: the device's migration state and its data transfer
 * session. Requests arrive here from libvfio-user.c (commands 17 to 19) and
 * from device_feature.c (the migration features).
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "libvfio-user.h"
#include "private.h"

struct migration *
init_migration(const vfu_migration_callbacks_t *callbacks, int *err);

/* The page size offered in the version exchange, in bytes. */
size_t
migration_get_pgsize(struct migration *migr);

int
migration_set_pgsize(struct migration *migr, size_t pgsize);

/* True if the device can answer VFIO_USER_MIG_GET_PRECOPY_INFO. */
bool
migration_has_precopy_info(const struct migration *migr);

/* True if the device can answer VFIO_DEVICE_FEATURE_MIG_DATA_SIZE. */
bool
migration_has_data_size(const struct migration *migr);

/* The VFIO_MIGRATION_* flags that the device announces. */
uint64_t
migration_get_flags(const struct migration *migr);

/* The current state, from enum vfio_device_mig_state. */
uint32_t
migration_get_state(const struct migration *migr);

/*
 * Takes the device to @state, arc by arc. On failure, the device remains in the
 * last state that it reached.
 *
 * Returns 0, or -1 with errno set; EINVAL if there is no path to @state.
 */
int
migration_set_state(vfu_ctx_t *vfu_ctx, uint32_t state);

int
migration_get_data_size(vfu_ctx_t *vfu_ctx, uint64_t *stop_copy_length);

int
migration_set_precopy_info_v2(vfu_ctx_t *vfu_ctx);

/*
 * A reset is about to be told to the device: if it takes the migration state
 * back to RUNNING, it does so here.
 *
 * Returns the state before, for migration_reset_failed().
 */
uint32_t
migration_reset(vfu_ctx_t *vfu_ctx, vfu_reset_type_t reason);

/* The device refused the reset: it is still where it was. */
void
migration_reset_failed(vfu_ctx_t *vfu_ctx, uint32_t old_state);

int
handle_mig_data_read(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg);

int
handle_mig_data_write(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg);

int
handle_mig_get_precopy_info(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg);

int
handle_mig_data_window(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg);

/* The largest window for migration data that the device takes, or 0. */
size_t
migration_max_window(const struct migration *migr);

/* The window is the client's that made it, and ends with the connection. */
void
migration_drop_window(struct migration *migr);

/*
 * Have the device gather the reply to a MIG_DATA_READ of @size bytes.
 *
 * Returns 0, or -1 with errno set: to ENOSYS if it has to be asked for a copy.
 */
int
migration_gather(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg, uint32_t size);

#endif /* LIB_VFIO_USER_MIGRATION_H */
