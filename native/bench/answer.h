/*
 * The replies to commands.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef ANSWER_H
#define ANSWER_H

#include <stddef.h>
#include <stdint.h>

/* Answers a command on the standard output. */
void answer(const int64_t *values, size_t count);

#endif
