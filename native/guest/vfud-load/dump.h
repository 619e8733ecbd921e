/*
 * vfud-load --dump: the patterns without a device, for a test.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef DUMP_H
#define DUMP_H

#include <stdint.h>

int dump(uint64_t memory_bytes, uint64_t page_bytes, uint64_t seed_offset); /* the exit status */

#endif
