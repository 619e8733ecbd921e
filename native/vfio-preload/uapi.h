/*
 * The kernel's interface and vfio-user's: constants and structures, and what the headers at hand lack of them.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef UAPI_H
#define UAPI_H

#include <linux/iommufd.h>
#include <linux/kvm.h>
#include <linux/vfio.h>
#include <stdint.h>

/* Linux 7.1, newer than the pinned header. */
#ifndef VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
#define VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 12
#endif
#ifndef VFIO_PRECOPY_INFO_REINIT
#define VFIO_PRECOPY_INFO_REINIT (1 << 0)
#endif

/* What follows struct vfio_device_feature, of the features of migration. */
union feature_data {
    struct vfio_device_feature_migration migration;
    struct vfio_device_feature_mig_state state;
    struct vfio_device_feature_mig_data_size data_size;
    struct vfio_device_feature_dma_logging_control control;
    struct vfio_device_feature_dma_logging_report report;
};

/* vfio-user: QEMU's docs/interop/vfio-user.rst, and native/spec/ for command 19. */

enum vfio_user_command {
    VFIO_USER_VERSION = 1,
    VFIO_USER_DMA_MAP = 2,
    VFIO_USER_DMA_UNMAP = 3,
    VFIO_USER_DEVICE_GET_INFO = 4,
    VFIO_USER_DEVICE_GET_REGION_INFO = 5,
    VFIO_USER_DEVICE_GET_IRQ_INFO = 7,
    VFIO_USER_DEVICE_SET_IRQS = 8,
    VFIO_USER_REGION_READ = 9,
    VFIO_USER_REGION_WRITE = 10,
    VFIO_USER_DMA_READ = 11,
    VFIO_USER_DMA_WRITE = 12,
    VFIO_USER_DEVICE_RESET = 13,
    VFIO_USER_DEVICE_FEATURE = 16,
    VFIO_USER_MIG_DATA_READ = 17,
    VFIO_USER_MIG_DATA_WRITE = 18,
    VFIO_USER_MIG_GET_PRECOPY_INFO = 19,
    VFIO_USER_MIG_DATA_WINDOW = 27,
};

#define VFIO_USER_FLAG_REPLY 0x1
#define VFIO_USER_FLAG_TYPE 0xf
#define VFIO_USER_FLAG_NO_REPLY 0x10
#define VFIO_USER_FLAG_ERROR 0x20

struct vfio_user_header {
    uint16_t id;
    uint16_t command;
    uint32_t size; /* of the whole message */
    uint32_t flags;
    uint32_t error;
};

struct vfio_user_version {
    uint16_t major;
    uint16_t minor;
    /* JSON and its NUL follow. */
};

struct vfio_user_dma_map {
    uint32_t argsz;
    uint32_t flags; /* VFIO_DMA_MAP_FLAG_{READ,WRITE} */
    uint64_t offset; /* in the file whose descriptor comes with it */
    uint64_t iova;
    uint64_t size;
};

struct vfio_user_dma_unmap {
    uint32_t argsz;
    uint32_t flags;
    uint64_t iova;
    uint64_t size;
};

struct vfio_user_region_access {
    uint64_t offset;
    uint32_t region;
    uint32_t count;
};

/* The text of the specification gives `count` 4 bytes and libvfio-user 8; upstream settled on 8. */
struct vfio_user_dma_access {
    uint64_t address;
    uint64_t count;
};

struct vfio_user_mig_data {
    uint32_t argsz;
    uint32_t size;
};

/* The memory's descriptor comes with it. */
struct vfio_user_mig_data_window {
    uint32_t argsz;
    uint32_t flags;
    uint64_t size;
};

/* What the structure above is while there is a window: the data is there. */
struct vfio_user_mig_window_data {
    uint32_t argsz;
    uint32_t size;
    uint64_t offset;
};

/* Unlike the kernel's structures of these names, the ranges and the bitmap follow inline. */
struct vfio_user_logging_control {
    uint64_t page_size;
    uint32_t num_ranges;
    uint32_t reserved;
};

struct vfio_user_logging_report {
    uint64_t iova;
    uint64_t length;
    uint64_t page_size;
};

#endif
