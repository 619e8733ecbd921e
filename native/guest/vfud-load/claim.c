/*
 * Who uses the devices' engine and which part of their memory.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "claim.h"

static struct {
    bool engine;
    uint64_t offset, bytes; /* 0 bytes: nothing */
} claims[CLAIMANTS];

void claim(enum claimant who, bool engine, uint64_t offset, uint64_t bytes)
{
    claims[who].engine = engine;
    claims[who].offset = offset;
    claims[who].bytes = bytes;
}

void claim_release(enum claimant who)
{
    claim(who, false, 0, 0);
}

bool claims_engine(enum claimant who)
{
    return claims[who].engine;
}

bool claims_memory(enum claimant who, uint64_t offset, uint64_t bytes)
{
    return offset < claims[who].offset + claims[who].bytes && claims[who].offset < offset + bytes;
}
