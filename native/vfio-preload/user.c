/*
 * Memory of the caller's, and of the guest's: it may be gone, which must be EFAULT and no crash.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common.h"

/* The way to go where a sandbox refuses process_vm_readv(): the same memory as a file. */
static ssize_t through_proc(bool write, void *ours, uint64_t theirs, size_t size)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/mem", (write ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
    long done;

    if (fd < 0) {
        return -1;
    }
    done = syscall(write ? SYS_pwrite64 : SYS_pread64, fd, ours, size, theirs);
    syscall(SYS_close, fd);
    return done;
}

static int copy(bool write, void *ours, uint64_t theirs, size_t size)
{
    static bool no_process_vm; /* atomic enough: set once, to the one value it ever gets */

    while (size > 0) {
        struct iovec local = { ours, size }, remote = { (void *)(uintptr_t)theirs, size };
        ssize_t done = -1;

        if (!__atomic_load_n(&no_process_vm, __ATOMIC_RELAXED)) {
            done = syscall(write ? SYS_process_vm_writev : SYS_process_vm_readv, getpid(), &local, 1UL, &remote, 1UL,
                           0UL);
            if (done < 0 && (errno == EPERM || errno == ENOSYS)) {
                __atomic_store_n(&no_process_vm, true, __ATOMIC_RELAXED);
            }
        }
        if (__atomic_load_n(&no_process_vm, __ATOMIC_RELAXED)) {
            done = through_proc(write, ours, theirs, size);
        }
        if (done <= 0) {
            return -EFAULT;
        }
        ours = (char *)ours + done;
        theirs += (uint64_t)done;
        size -= (size_t)done;
    }
    return 0;
}

int copy_from_user(void *to, uint64_t from, size_t size)
{
    return copy(false, to, from, size);
}

int copy_to_user(uint64_t to, const void *from, size_t size)
{
    return copy(true, (void *)(uintptr_t)from, to, size);
}

int fetch_sized(void *structure, size_t known, const void *address, size_t least)
{
    uint64_t from = ADDRESS(address);
    uint32_t size;

    memset(structure, 0, known);
    if (copy_from_user(&size, from, sizeof(size)) != 0) {
        return -EFAULT;
    }
    if (size < least) {
        return -EINVAL;
    }
    return copy_from_user(structure, from, MIN(size, known));
}
