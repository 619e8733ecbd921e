/*
 * Who uses the devices' engine and which part of their memory: two loads must not meet, for each has a journal that
 * the other does not know.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef CLAIM_H
#define CLAIM_H

#include <stdbool.h>
#include <stdint.h>

enum claimant { CLAIM_LOAD, CLAIM_DMA, CLAIMANTS };

/* `who` uses `bytes` of every device's memory from `offset` on, and its engine; until it is released. */
void claim(enum claimant who, bool engine, uint64_t offset, uint64_t bytes);
void claim_release(enum claimant who);
bool claims_engine(enum claimant who);
bool claims_memory(enum claimant who, uint64_t offset, uint64_t bytes); /* any of it */

#endif
