/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * Fills the gaps of an older <linux/vfio.h>. The library needs the migration
 * interface as of Linux 6.2, and two definitions of Linux 7.1; distributions
 * ship headers that end anywhere in between. Enumerators cannot be tested by
 * the preprocessor, so each block is keyed on a macro that arrived in the same
 * kernel release.
 */

#ifndef VFIO_USER_COMPAT_H
#define VFIO_USER_COMPAT_H

#include <linux/types.h>
#include <linux/vfio.h>

/* Linux 5.18: migration protocol v2. */
#ifndef VFIO_DEVICE_FEATURE_MIGRATION
struct vfio_device_feature_migration {
    __aligned_u64 flags;
#define VFIO_MIGRATION_STOP_COPY    (1 << 0)
#define VFIO_MIGRATION_P2P          (1 << 1)
};
#define VFIO_DEVICE_FEATURE_MIGRATION 1

struct vfio_device_feature_mig_state {
    __u32 device_state;
    __s32 data_fd;
};
#define VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE 2

enum vfio_device_mig_state {
    VFIO_DEVICE_STATE_ERROR = 0,
    VFIO_DEVICE_STATE_STOP = 1,
    VFIO_DEVICE_STATE_RUNNING = 2,
    VFIO_DEVICE_STATE_STOP_COPY = 3,
    VFIO_DEVICE_STATE_RESUMING = 4,
    VFIO_DEVICE_STATE_RUNNING_P2P = 5,
};
#endif

/* Linux 6.1: DMA logging. */
#ifndef VFIO_DEVICE_FEATURE_DMA_LOGGING_START
#define VFIO_DEVICE_FEATURE_DMA_LOGGING_START   6
#define VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP    7
#define VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT  8
#endif

/* Linux 6.2: pre-copy and the stop-copy size. */
#ifndef VFIO_MIGRATION_PRE_COPY
#define VFIO_MIGRATION_PRE_COPY (1 << 2)
#define VFIO_DEVICE_STATE_PRE_COPY      6
#define VFIO_DEVICE_STATE_PRE_COPY_P2P  7
#endif

#ifndef VFIO_MIG_GET_PRECOPY_INFO
struct vfio_precopy_info {
    __u32 argsz;
    __u32 flags;
    __aligned_u64 initial_bytes;
    __aligned_u64 dirty_bytes;
};
#define VFIO_MIG_GET_PRECOPY_INFO _IO(VFIO_TYPE, VFIO_BASE + 21)
#endif

#ifndef VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
struct vfio_device_feature_mig_data_size {
    __aligned_u64 stop_copy_length;
};
#define VFIO_DEVICE_FEATURE_MIG_DATA_SIZE 9
#endif

/* Linux 7.1: new initial data may appear during pre-copy. */
#ifndef VFIO_PRECOPY_INFO_REINIT
#define VFIO_PRECOPY_INFO_REINIT (1 << 0)
#endif

#ifndef VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
#define VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 12
#endif

#endif /* VFIO_USER_COMPAT_H */
