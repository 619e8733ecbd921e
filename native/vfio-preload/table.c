/*
 * The table of descriptors: which of the process's are ours, and what they stand for.
 *
 * Our descriptors are open with O_PATH on /dev/null. The kernel refuses to read, write, map or control such a one, so
 * that a call which does not come by here fails with EBADF, and cannot pass for one that worked.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "table.h"

struct file *table[TABLE_SIZE];

/* Marks what we use ourselves. */
static struct file internal;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t home; /* whose memory this is; a child of vfork() has another id and shares it */
static int null_fd = -1;

/* --- files ------------------------------------------------------------------------------------------------------- */

void file_init(struct file *file, const struct file_ops *ops)
{
    file->ops = ops;
    file->references = 1;
    file->process = 0;
}

void file_hold(struct file *file)
{
    __atomic_add_fetch(&file->references, 1, __ATOMIC_RELAXED);
}

void file_put(struct file *file)
{
    if (__atomic_sub_fetch(&file->references, 1, __ATOMIC_ACQ_REL) == 0) {
        file->ops->release(file);
    }
}

/* --- slots ------------------------------------------------------------------------------------------------------- */

static struct file *slot(int fd)
{
    return (unsigned int)fd < TABLE_SIZE ? __atomic_load_n(&table[fd], __ATOMIC_ACQUIRE) : NULL;
}

static void set_slot(int fd, struct file *file)
{
    __atomic_store_n(&table[fd], file, __ATOMIC_RELEASE);
}

int file_install_at(struct file *file, int fd)
{
    if ((unsigned int)fd >= TABLE_SIZE) {
        say("descriptor %d: only those below %d can be ours", fd, TABLE_SIZE);
        return -EMFILE;
    }
    pthread_mutex_lock(&lock);
    set_slot(fd, file);
    pthread_mutex_unlock(&lock);
    return fd;
}

int file_install(struct file *file, int flags)
{
    int fd = (int)syscall(SYS_fcntl, null_fd, flags & O_CLOEXEC ? F_DUPFD_CLOEXEC : F_DUPFD, 0);
    int result;

    if (fd < 0) {
        return -errno;
    }
    result = file_install_at(file, fd);
    if (result < 0) {
        syscall(SYS_close, fd);
    }
    return result;
}

int table_take(int fd, struct file **result)
{
    pid_t process = getpid();
    struct file *file;

    pthread_mutex_lock(&lock);
    file = slot(fd);
    if (file == NULL || file == &internal) {
        pthread_mutex_unlock(&lock);
        return 0;
    }
    if (file->process == 0) {
        file->process = process;
    }
    if (file->process != process) {
        pthread_mutex_unlock(&lock);
        say("process %d: descriptor %d (%s) works only in process %d, which has the connection to the device server",
            (int)process, fd, file->ops->name, (int)file->process);
        return -EIO;
    }
    file_hold(file);
    pthread_mutex_unlock(&lock);
    *result = file;
    return 1;
}

struct file *file_get(int fd, const struct file_ops *ops)
{
    struct file *file;

    if (slot(fd) == NULL || table_take(fd, &file) != 1) {
        return NULL;
    }
    if (ops != NULL && file->ops != ops) {
        file_put(file);
        return NULL;
    }
    return file;
}

enum closing table_close(int fd)
{
    pid_t process = getpid();
    struct file *file;

    if (process != __atomic_load_n(&home, __ATOMIC_RELAXED)) {
        return CLOSE_IT; /* the child's copy of the descriptors, but not of this table */
    }
    pthread_mutex_lock(&lock);
    file = slot(fd);
    if (file == &internal) {
        pthread_mutex_unlock(&lock);
        return KEEP_IT;
    }
    if (file != NULL) {
        set_slot(fd, NULL);
    }
    pthread_mutex_unlock(&lock);
    /* A forked child has a copy of what its parent goes on using: only the number is let go of. */
    if (file != NULL && (file->process == 0 || file->process == process)) {
        file_put(file);
    }
    return CLOSE_IT;
}

void table_forget(int fd)
{
    table_close(fd);
}

void table_copy(int from, int to)
{
    struct file *file;

    if (to < 0 || getpid() != __atomic_load_n(&home, __ATOMIC_RELAXED)) {
        return;
    }
    pthread_mutex_lock(&lock);
    file = slot(from);
    if (file != NULL && file != &internal) {
        if ((unsigned int)to < TABLE_SIZE) {
            file_hold(file);
            set_slot(to, file);
        } else {
            say("descriptor %d: only those below %d can be ours", to, TABLE_SIZE);
        }
    }
    pthread_mutex_unlock(&lock);
}

bool table_is_file(int fd)
{
    struct file *file = slot(fd);

    return file != NULL && file != &internal;
}

void internal_open(int fd)
{
    if ((unsigned int)fd < TABLE_SIZE) {
        file_install_at(&internal, fd);
    }
}

int internal_duplicate(int fd)
{
    int high = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, INTERNAL_FROM);

    internal_open(high);
    return high;
}

void internal_close(int fd)
{
    if (fd >= 0) {
        pthread_mutex_lock(&lock);
        if (slot(fd) == &internal) {
            set_slot(fd, NULL);
        }
        pthread_mutex_unlock(&lock);
        syscall(SYS_close, fd);
    }
}

/* --- fork -------------------------------------------------------------------------------------------------------- */

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

static void in_child(void)
{
    __atomic_store_n(&home, getpid(), __ATOMIC_RELAXED);
    pthread_mutex_unlock(&lock);
}

void table_open(void)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, "/dev/null", O_PATH | O_CLOEXEC);

    home = getpid();
    pthread_atfork(before_fork, after_fork, in_child);
    /* Kept, so that it is there when a sandbox lets nothing be opened. */
    null_fd = internal_duplicate(fd);
    if (null_fd >= 0) {
        syscall(SYS_close, fd);
    } else {
        null_fd = fd;
        internal_open(null_fd);
    }
    if (null_fd < 0) {
        say("/dev/null cannot be opened: there will be no devices");
    }
}
