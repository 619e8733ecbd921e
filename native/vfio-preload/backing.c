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

/* A line of /proc/self/maps. */
struct area {
    unsigned long first, last, offset, inode;
    dev_t device;
    bool shared;
};

static bool next_area(FILE *maps, struct area *area)
{
    unsigned int major, minor;
    char line[512], mode[5];

    do {
        if (fgets(line, sizeof(line), maps) == NULL) {
            return false;
        }
        if (strchr(line, '\n') == NULL) { /* a long path; the next bytes begin no line */
            int rest;

            while ((rest = fgetc(maps)) != EOF && rest != '\n') {
            }
        }
    } while (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &area->first, &area->last, mode, &area->offset, &major, &minor,
                    &area->inode) != 7);
    area->device = makedev(major, minor);
    area->shared = mode[3] == 's';
    return true;
}

/* The one file that all of the memory is a shared mapping of, without a break; `found` begins where the memory does. */
static bool find_file(uint64_t address, uint64_t size, struct area *found)
{
    uint64_t end = address + size, reached = address;
    FILE *maps = fopen("/proc/self/maps", "re");
    struct area area;

    if (maps == NULL) {
        return false;
    }
    while (reached < end && next_area(maps, &area)) {
        if (area.last <= reached) {
            continue;
        }
        if (area.first > reached || !area.shared || area.inode == 0) {
            break;
        }
        if (reached == address) {
            *found = area;
            found->offset += address - area.first;
        } else if (found->device != area.device || found->inode != area.inode ||
                   area.offset != found->offset + (area.first - address)) {
            break;
        }
        reached = area.last;
    }
    fclose(maps);
    return reached >= end;
}

/*
 * The program has the file mapped privately: DMA to the file is not what it sees. QEMU 10.1 and 10.2 ask for that with
 * share=off and an iommufd, from a kernel just so; hw/vfio/container.c does not look whether the memory is shared.
 */
static void warn_if_private(struct backing *backing)
{
    bool checked = __atomic_exchange_n(&backing->checked, true, __ATOMIC_RELAXED);
    FILE *maps = checked ? NULL : fopen("/proc/self/maps", "re");
    struct area area;

    while (maps != NULL && next_area(maps, &area)) {
        if (!area.shared && area.device == backing->device && area.inode == backing->inode) {
            say("DMA is asked for to a file that this program has mapped privately (share=off): it will see none of "
                "it, as with the kernel's VFIO; QEMU 10.1 and 10.2 need share=on, or the type 1 way");
            break;
        }
    }
    if (maps != NULL) {
        fclose(maps);
    }
}

struct backing *backing_of_memory(uint64_t address, uint64_t size, bool writable, uint64_t *offset)
{
    struct area area = { 0 };
    struct backing *backing;
    struct stat status;

    if (!find_file(address, size, &area)) {
        return NULL;
    }
    *offset = area.offset;
    backing = get(area.device, area.inode, -1, writable);
    if (backing != NULL && (file_status(backing->fd, &status) != 0 || !long_enough(&status, *offset, size))) {
        backing_put(backing);
        return NULL;
    }
    return backing;
}

struct backing *backing_of_file(int fd, uint64_t offset, uint64_t size, bool writable)
{
    struct backing *backing;
    struct stat status;

    if (file_status(fd, &status) != 0 || !long_enough(&status, offset, size) || !mappable(fd, writable)) {
        return NULL;
    }
    backing = get(status.st_dev, status.st_ino, fd, writable);
    if (backing != NULL) {
        warn_if_private(backing);
    }
    return backing;
}
