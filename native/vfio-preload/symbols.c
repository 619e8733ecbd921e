/*
 * The symbols that are interposed: what they share.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>

#include "symbols.h"

bool active;

static struct {
    const char *name;
    void *function;
    unsigned long calls;
} symbols[SYMBOL_COUNT] = {
#define X(name) [SYM_##name] = { #name, NULL, 0 },
    SYMBOLS(X)
#undef X
};

void *symbol_next(enum symbol symbol)
{
    void *function = __atomic_load_n(&symbols[symbol].function, __ATOMIC_RELAXED);

    if (__builtin_expect(function == NULL, 0)) {
        function = dlsym(RTLD_NEXT, symbols[symbol].name);
        if (function == NULL) {
            say("%s: the C library has no such function", symbols[symbol].name);
            abort();
        }
        __atomic_store_n(&symbols[symbol].function, function, __ATOMIC_RELAXED);
    }
    return function;
}

void symbol_count(enum symbol symbol)
{
    __atomic_add_fetch(&symbols[symbol].calls, 1, __ATOMIC_RELAXED);
}

const char *symbol_name(enum symbol symbol)
{
    return symbols[symbol].name;
}

void symbols_log(void)
{
    for (size_t i = 0; log_fd >= 0 && i < SYMBOL_COUNT; i++) {
        unsigned long calls = __atomic_load_n(&symbols[i].calls, __ATOMIC_RELAXED);

        if (calls > 0) {
            trace("calls of %s: %lu", symbols[i].name, calls);
        }
    }
}

struct file *symbol_take(enum symbol symbol, int fd, int *error)
{
    struct file *file = NULL;

    *error = table_take(fd, &file);
    if (*error == 0) {
        return NULL;
    }
    symbol_count(symbol);
    *error = MIN(*error, 0);
    return file;
}

long symbol_finish(struct file *file, long result, int saved)
{
    if (file != NULL) {
        file_put(file);
    }
    errno = result < 0 ? (int)-result : saved;
    return result < 0 ? -1 : result;
}
