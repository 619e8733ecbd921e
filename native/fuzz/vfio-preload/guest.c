/*
 * The guest's memory, of which the program maps slots.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "guest.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "server.h"

uint8_t *guest;

void guest_open(void)
{
    int guest_file = memfd_create("fuzz-guest", MFD_CLOEXEC);

    if (guest_file < 0 || ftruncate(guest_file, SLOTS / 2 * SLOT_BYTES) != 0) {
        fault("no memfd");
    }
    guest = mmap(NULL, SLOTS * SLOT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (guest == MAP_FAILED ||
        mmap(guest + SLOTS / 2 * SLOT_BYTES, SLOTS / 2 * SLOT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
             guest_file, 0) == MAP_FAILED) {
        fault("no memory");
    }
}

void guest_fill(void)
{
    for (size_t slot = 0; slot < SLOTS; slot++) {
        uint8_t *start = guest + slot * SLOT_BYTES;

        memset(start, OUT_OF_BOUNDS, PAGE_BYTES);
        memset(start + PAGE_BYTES, 0x11, MAPPED_BYTES);
        memset(start + PAGE_BYTES + MAPPED_BYTES, OUT_OF_BOUNDS, PAGE_BYTES);
    }
}

void guest_check(void)
{
    for (size_t slot = 0; slot < SLOTS; slot++) {
        const uint8_t *start = guest + slot * SLOT_BYTES;

        for (size_t i = 0; i < SLOT_BYTES; i++) {
            bool mapped = i >= PAGE_BYTES && i < PAGE_BYTES + MAPPED_BYTES;

            if (mapped ? slot % 2 == 0 && start[i] != 0x11 : start[i] != OUT_OF_BOUNDS) {
                fault("the server wrote to guest memory at %zu of slot %zu", i, slot);
            }
        }
    }
}
