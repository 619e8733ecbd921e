/*
 * Taking an input apart.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "records.h"

#include <string.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))

uint64_t take(struct input *input, size_t size)
{
    uint64_t value = 0;

    for (size_t i = 0; i < size; i++) {
        value |= (uint64_t)(input->at < input->end ? *input->at++ : 0) << (8 * i);
    }
    return value;
}

void take_bytes(struct input *input, void *to, size_t size)
{
    size_t there = MIN(size, left(input));

    if (there > 0) {
        memcpy(to, input->at, there);
    }
    memset((char *)to + there, 0, size - there);
    input->at += there;
}

bool take_record(struct input *input, struct record *record)
{
    size_t size;

    if (left(input) < RECORD_HEAD) {
        return false;
    }
    record->kind = (uint8_t)take(input, 1);
    size = (size_t)take(input, 2);
    record->body.at = input->at;
    input->at += MIN(size, left(input));
    record->body.end = input->at;
    return true;
}
