/*
 * The messages of vfio-user.rst, and of native/spec, that the client sends.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef MESSAGES_H
#define MESSAGES_H

#include <stdint.h>

/* vfio-user.rst */
enum {
    VERSION = 1,
    REGION_READ = 9,
    REGION_WRITE = 10,
    DEVICE_FEATURE = 16,
    MIG_DATA_READ = 17,
    MIG_DATA_WRITE = 18,
    MIG_DATA_WINDOW = 27, /* native/spec */
};

#define TYPE_MASK   0xfU
#define TYPE_REPLY  0x1U
#define NO_REPLY    0x10U

#define MAX_BYTES   8U /* of one access */

struct header {
    uint16_t id;
    uint16_t command;
    uint32_t size;
    uint32_t flags;
    uint32_t error;
};

struct region_access {
    struct header header;
    uint64_t offset;
    uint32_t index;
    uint32_t count;
    uint8_t data[MAX_BYTES];
};

struct mig_data {
    struct header header;
    uint32_t argsz;
    uint32_t size;
};

struct mig_window {
    struct header header;
    uint32_t argsz;
    uint32_t flags;
    uint64_t size;
};

/* What MIG_DATA_READ and MIG_DATA_WRITE are with a window, and the reply to a read. */
struct mig_place {
    struct header header;
    uint32_t argsz;
    uint32_t size;
    uint64_t offset;
};

struct mig_state {
    struct header header;
    uint32_t argsz;
    uint32_t flags;
    uint32_t state;
    int32_t fd;
};

#endif
