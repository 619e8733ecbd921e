/*
 * The symbols that are interposed, and the next library's functions of those names.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef SYMBOLS_H
#define SYMBOLS_H

#include "table.h"

#define EXPORT __attribute__((visibility("default")))

#define SYMBOLS(X) \
    X(open) X(open64) X(__open_2) X(__open64_2) X(openat) X(openat64) X(__openat_2) X(__openat64_2) \
    X(access) X(faccessat) X(ioctl) X(read) X(__read_chk) X(write) X(pread) X(pread64) X(__pread_chk) X(__pread64_chk) \
    X(pwrite) X(pwrite64) X(readv) X(writev) X(preadv) X(preadv64) X(pwritev) X(pwritev64) X(preadv2) X(preadv64v2) \
    X(pwritev2) X(pwritev64v2) X(mmap) X(mmap64) \
    X(close) X(close_range) X(closefrom) X(dup) X(dup2) X(dup3) X(fcntl) X(fcntl64) X(sendmsg) X(sendfile) \
    X(sendfile64) X(splice) X(copy_file_range)

enum symbol {
#define X(name) SYM_##name,
    SYMBOLS(X)
#undef X
    SYMBOL_COUNT
};

/* The next library's function, to be called with these types. */
#define NEXT(symbol, result, ...) ((result(*)(__VA_ARGS__))symbol_next(SYM_##symbol))
void *symbol_next(enum symbol symbol);

/* Calls that reached us, by symbol: one that is missing in the log went past. */
void symbol_count(enum symbol symbol);
void symbols_log(void);
const char *symbol_name(enum symbol symbol);

/* The file behind `fd`, with a reference, counted; NULL: the call is for the next library, or (`error`) for nobody. */
struct file *symbol_take(enum symbol symbol, int fd, int *error);

/* What a call returns: `result`, with the caller's errno untouched if it is no error. */
long symbol_finish(struct file *file, long result, int saved);

/* There are devices to make up. */
extern bool active;

#endif
