/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef LIB_VFIO_USER_DEVICE_FEATURE_H
#define LIB_VFIO_USER_DEVICE_FEATURE_H

#include <stdbool.h>

#include "private.h"

/* VFIO_USER_DEVICE_FEATURE: get, set, or probe for a feature of the device. */
int
handle_device_feature(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg);

/*
 * True if the request changes something that a device should not be busy with
 * meanwhile: its migration state, or whether its DMA is logged.
 */
bool
device_feature_needs_quiesce(vfu_ctx_t *vfu_ctx, const vfu_msg_t *msg);

#endif /* LIB_VFIO_USER_DEVICE_FEATURE_H */
