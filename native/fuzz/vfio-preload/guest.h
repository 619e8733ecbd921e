/*
 * The guest's memory, of which the program maps slots.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef GUEST_H
#define GUEST_H

#include "common.h"

#define SLOTS 8
#define SLOT_BYTES (8 * PAGE_BYTES) /* the first and the last page are no part of what is mapped */
#define MAPPED_BYTES (6 * PAGE_BYTES)

extern uint8_t *guest; /* SLOTS of them; the upper half is a file's. Those with odd numbers are mapped for writing. */

void guest_open(void);
void guest_fill(void);

/* What is not mapped, or not for writing, is as it was filled. */
void guest_check(void);

#endif
