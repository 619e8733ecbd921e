/*
 * What a descriptor of ours stands for.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef FILE_H
#define FILE_H

#include "common.h"

struct file;

/* What can be done with one kind; each returns a result or -errno. NULL: -EINVAL, or -ENOTTY for ioctl. */
struct file_ops {
    const char *name;
    long (*ioctl)(struct file *file, unsigned long request, void *argument);
    ssize_t (*read)(struct file *file, void *buffer, size_t count);
    ssize_t (*write)(struct file *file, const void *buffer, size_t count);
    ssize_t (*pread)(struct file *file, void *buffer, size_t count, uint64_t offset);
    ssize_t (*pwrite)(struct file *file, const void *buffer, size_t count, uint64_t offset);
    long (*mmap)(struct file *file, void *address, size_t length, int protection, int flags, uint64_t offset);
    void (*release)(struct file *file); /* nobody has it any more: free it */
};

struct file {
    const struct file_ops *ops;
    unsigned int references; /* descriptors, calls under way, and other files that need it */
    pid_t process; /* that uses it; 0: nobody yet */
};

void file_init(struct file *file, const struct file_ops *ops);
void file_hold(struct file *file);
void file_put(struct file *file);

/* --- the table of descriptors: interpose.c --- */

/* A new descriptor for `file`, which takes over the caller's reference; or -errno, and the reference stays. */
int file_install(struct file *file, int flags);

/* The same for a descriptor that is open already. */
int file_install_at(struct file *file, int fd);

/* Descriptors for our own use: the program cannot close them by mistake, as with close_range(). */
void internal_open(int fd);
/* A duplicate of `fd` for our own use, from INTERNAL_FROM on; or -1. */
int internal_duplicate(int fd);
void internal_close(int fd);

/* What `fd` stands for, if that is of kind `ops`, with a reference; else NULL. */
struct file *file_get(int fd, const struct file_ops *ops);

#endif
