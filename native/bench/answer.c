/*
 * The replies to commands.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <err.h>
#include <stdio.h>
#include <stdlib.h>

#include "answer.h"

void
answer(const int64_t *values, size_t count)
{
    printf("%zu\n", count);
    fwrite(values, sizeof(*values), count, stdout);
    if (fflush(stdout) != 0) {
        err(EXIT_FAILURE, "stdout");
    }
}
