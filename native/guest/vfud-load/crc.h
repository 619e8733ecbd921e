/*
 * CRC-32 as zlib computes it.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef CRC_H
#define CRC_H

#include <stdint.h>

uint32_t crc32(const uint8_t *data, uint64_t bytes);

#endif
