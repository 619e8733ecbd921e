/*
 * The file behind memory.
 *
 * The kernel's VFIO takes addresses, a vfio-user server descriptors. Which file an address is a mapping of is in
 * /proc/self/maps, by device and inode. A descriptor of that file is in /proc/self/fd: QEMU keeps its memory's open.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "iova.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct backing *all;

static bool mappable(int fd, bool writable)
{
    int mode = fcntl(fd, F_GETFL);

    return mode >= 0 && !(mode & O_PATH) &&
           ((mode & O_ACCMODE) == O_RDWR || (!writable && (mode & O_ACCMODE) == O_RDONLY));
}

/* syscall(): fstat() has a new version in glibc 2.33, which older C libraries lack. */
static int file_status(int fd, struct stat *status)
{
    return (int)syscall(SYS_fstat, fd, status);
}

static bool long_enough(const struct stat *status, uint64_t offset, uint64_t size)
{
    uint64_t whole = ((uint64_t)status->st_size + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);

    return S_ISREG(status->st_mode) && offset <= whole && size <= whole - offset;
}

/* A descriptor that this process has open for the file, with the right mode; -1: none. */
static int find_descriptor(dev_t device, ino_t inode, bool writable)
{
    char buffer[4096] __attribute__((aligned(8)));
    int folder = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int found = -1;
    long size;

    if (folder < 0) {
        return -1;
    }
    while (found < 0 && (size = syscall(SYS_getdents64, folder, buffer, sizeof(buffer))) > 0) {
        for (long at = 0; at < size && found < 0;) {
            struct entry { /* struct linux_dirent64 */
                uint64_t inode;
                int64_t next;
                uint16_t size;
                uint8_t type;
                char name[];
            } const *entry = (const void *)(buffer + at);
            struct stat status;
            int fd = atoi(entry->name);

            at += entry->size;
            if (entry->name[0] != '.' && fd != folder && file_status(fd, &status) == 0 && S_ISREG(status.st_mode) &&
                status.st_dev == device && status.st_ino == inode && mappable(fd, writable)) {
                found = fd;
            }
        }
    }
    close(folder);
    return found;
}

/* The backing of a file. `fd`: a descriptor of the caller's; -1: look for one. */
static struct backing *get(dev_t device, ino_t inode, int fd, bool writable)
{
    struct backing *backing;

    pthread_mutex_lock(&lock);
    for (backing = all; backing != NULL; backing = backing->next) {
        if (backing->device == device && backing->inode == inode && mappable(backing->fd, writable)) {
            backing->references++;
            goto out;
        }
    }
    if (fd < 0) {
        fd = find_descriptor(device, inode, writable);
    }
    if (fd < 0 || (backing = calloc(1, sizeof(*backing))) == NULL) {
        goto out;
    }
    backing->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (backing->fd < 0) {
        say("there is no descriptor left for guest memory: %s; its DMA goes by message", strerror(errno));
        free(backing);
        backing = NULL;
        goto out;
    }
    backing->references = 1;
    backing->device = device;
    backing->inode = inode;
    backing->next = all;
    all = backing;
out:
    pthread_mutex_unlock(&lock);
    return backing;
}

void backing_put(struct backing *backing)
{
    pthread_mutex_lock(&lock);
    if (--backing->references == 0) {
        struct backing **link = &all;

        while (*link != backing) {
            link = &(*link)->next;
        }
        *link = backing->next;
        close(backing->fd);
        free(backing);
    }
    pthread_mutex_unlock(&lock);
}

/* Read /proc/self/maps and find the one file that all of the memory is a shared mapping of, without a break. */
static bool find_file(uint64_t address, uint64_t size, dev_t *device, ino_t *inode, uint64_t *offset)
{
    uint64_t end = address + size, reached = address;
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[512];

    if (maps == NULL) {
        return false;
    }
    while (reached < end && fgets(line, sizeof(line), maps) != NULL) {
        unsigned long first, last, from, number;
        unsigned int major, minor;
        char mode[5];

        if (strchr(line, '\n') == NULL) { /* a long path; the next bytes begin no line */
            int rest;

            while ((rest = fgetc(maps)) != EOF && rest != '\n') {
            }
        }
        if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &first, &last, mode, &from, &major, &minor, &number) != 7 ||
            last <= reached) {
            continue;
        }
        if (first > reached || mode[3] != 's' || number == 0) {
            break;
        }
        if (reached == address) {
            *device = makedev(major, minor);
            *inode = number;
            *offset = from + (address - first);
        } else if (*device != makedev(major, minor) || *inode != number ||
                   from != *offset + (first - address)) {
            break;
        }
        reached = last;
    }
    fclose(maps);
    return reached >= end;
}

struct backing *backing_of_memory(uint64_t address, uint64_t size, bool writable, uint64_t *offset)
{
    struct backing *backing;
    struct stat status;
    dev_t device = 0;
    ino_t inode = 0;

    if (!find_file(address, size, &device, &inode, offset)) {
        return NULL;
    }
    backing = get(device, inode, -1, writable);
    if (backing != NULL && (file_status(backing->fd, &status) != 0 || !long_enough(&status, *offset, size))) {
        backing_put(backing);
        return NULL;
    }
    return backing;
}

struct backing *backing_of_file(int fd, uint64_t offset, uint64_t size, bool writable)
{
    struct stat status;

    if (file_status(fd, &status) != 0 || !long_enough(&status, offset, size) || !mappable(fd, writable)) {
        return NULL;
    }
    return get(status.st_dev, status.st_ino, fd, writable);
}
