/*
 * CRC-32 as zlib computes it (polynomial 0xEDB88320, reflected), eight bytes at a time.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <string.h>

#include "crc.h"

static uint32_t table[8][256];

static void make_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;

        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
        table[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++)
            table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 0xff];
}

uint32_t crc32(const uint8_t *data, uint64_t bytes)
{
    uint32_t crc = ~0u;

    if (!table[0][1])
        make_table();
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint64_t word;

        memcpy(&word, data, sizeof(word));
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++)
            crc ^= table[7 - k][word >> 8 * k & 0xff];
    }
    while (bytes--)
        crc = crc >> 8 ^ table[0][(crc ^ *data++) & 0xff];
    return ~crc;
}
