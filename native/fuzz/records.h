/*
 * A fuzzer's input: bytes to be taken one after the other, or a list of records.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef RECORDS_H
#define RECORDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct input {
    const uint8_t *at, *end;
};

/* A record is its kind, the size of its body in two bytes (little-endian), and the body. */
#define RECORD_HEAD 3

struct record {
    uint8_t kind;
    struct input body;
};

static inline size_t left(const struct input *input)
{
    return (size_t)(input->end - input->at);
}

/* The next `size` bytes as a little-endian number; zeros behind the end. */
uint64_t take(struct input *input, size_t size);

/* Copy what there is of the next `size` bytes, and zeros for the rest. */
void take_bytes(struct input *input, void *to, size_t size);

/* The next record; false: there is none. One that is cut off is as long as what is left. */
bool take_record(struct input *input, struct record *record);

/* For mutate.c: the bytes in front of the records, which say how the target is set up. */
extern const size_t setup_bytes;

#endif
