/*
 * The table of descriptors, for interpose.c.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef TABLE_H
#define TABLE_H

#include "file.h"

#define TABLE_SIZE 65536

extern struct file *table[TABLE_SIZE];

/* All that a call on a descriptor of the program's own costs. */
static inline bool ours(int fd)
{
    return __builtin_expect((unsigned int)fd < TABLE_SIZE && __atomic_load_n(&table[fd], __ATOMIC_RELAXED) != NULL, 0);
}

void table_open(void);

/* 1: `file`, with a reference. 0: not ours after all. -errno: not in this process. */
int table_take(int fd, struct file **file);

/* The descriptor is about to be closed, or is of the kernel's own. */
enum closing { CLOSE_IT, KEEP_IT } table_close(int fd);
void table_forget(int fd);

/* `to` is a duplicate of `from`. */
void table_copy(int from, int to);

/* Whether it stands for a file: more than `ours`, which is true of what we use ourselves too. */
bool table_is_file(int fd);

#endif
