/*
 * Opening: the files of /dev that are made up, and looking whether they are there.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device.h"
#include "symbols.h"

/* The kernel's own file, if there is one: it may be meant, for a real device. Both numbers are ours to look after. */
static int open_real(const char *path, int flags, int *duplicate)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0);

    *duplicate = -1;
    if (fd >= 0) {
        *duplicate = internal_duplicate(fd);
    }
    return fd;
}

static int open_shared(const char *path, int flags, struct file *(*create)(int real))
{
    int real, fd = open_real(path, flags, &real);
    struct file *file = create(real);
    int result;

    if (file == NULL) {
        return -ENOMEM;
    }
    result = fd >= 0 ? file_install_at(file, fd) : file_install(file, flags);
    if (result < 0) {
        file_put(file);
    }
    return result;
}

static bool number_in(const char *text, unsigned int first, unsigned int *number)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);

    if (*text < '0' || *text > '9' || *end != '\0' || value < first || value - first >= config.devices) {
        return false;
    }
    *number = (unsigned int)value - first;
    return true;
}

/* Whether `path` is one of ours; `result`: its new descriptor, or -errno. */
static bool opens(enum symbol symbol, const char *path, int flags, int *result)
{
    struct file *file = NULL;
    unsigned int number;

    if (!active || strncmp(path, "/dev/", 5) != 0) {
        return false;
    }
    *result = 0;
    if (strcmp(path, "/dev/iommu") == 0) {
        *result = open_shared(path, flags, iommufd_new);
    } else if (strcmp(path, "/dev/vfio/vfio") == 0) {
        *result = open_shared(path, flags, container_new);
    } else if (strncmp(path, CDEV_PREFIX, strlen(CDEV_PREFIX)) == 0 &&
               number_in(path + strlen(CDEV_PREFIX), 0, &number)) {
        file = (struct file *)device_new(number);
        *result = file == NULL ? -ENOMEM : 0;
    } else if (strncmp(path, "/dev/vfio/", 10) == 0 && number_in(path + 10, FIRST_GROUP, &number)) {
        *result = group_new(number, &file);
    } else {
        return false;
    }
    if (file != NULL) {
        *result = file_install(file, flags);
        if (*result < 0) {
            file_put(file);
        }
    }
    symbol_count(symbol);
    trace("open %s: %d (%s)", path, *result, errno_name(*result));
    return true;
}

/* The third argument, if there is one. */
#define TAKE_MODE(mode, flags) \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list arguments; \
\
        va_start(arguments, flags); \
        mode = va_arg(arguments, mode_t); \
        va_end(arguments); \
    }

#define OPEN(name) \
    EXPORT int name(const char *path, int flags, ...) \
    { \
        int result, saved = errno; \
        mode_t mode = 0; \
\
        if (opens(SYM_##name, path, flags, &result)) { \
            return (int)symbol_finish(NULL, result, saved); \
        } \
        TAKE_MODE(mode, flags) \
        return NEXT(name, int, const char *, int, ...)(path, flags, mode); \
    }

#define OPENAT(name) \
    EXPORT int name(int folder, const char *path, int flags, ...) \
    { \
        int result, saved = errno; \
        mode_t mode = 0; \
\
        if (opens(SYM_##name, path, flags, &result)) { \
            return (int)symbol_finish(NULL, result, saved); \
        } \
        TAKE_MODE(mode, flags) \
        return NEXT(name, int, int, const char *, int, ...)(folder, path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* What <fcntl.h> makes of these with _FORTIFY_SOURCE; nothing declares them otherwise. */
#define OPEN_2(name) \
    EXPORT int name(const char *path, int flags); \
    EXPORT int name(const char *path, int flags) \
    { \
        int result, saved = errno; \
\
        if (opens(SYM_##name, path, flags, &result)) { \
            return (int)symbol_finish(NULL, result, saved); \
        } \
        return NEXT(name, int, const char *, int)(path, flags); \
    }

#define OPENAT_2(name) \
    EXPORT int name(int folder, const char *path, int flags); \
    EXPORT int name(int folder, const char *path, int flags) \
    { \
        int result, saved = errno; \
\
        if (opens(SYM_##name, path, flags, &result)) { \
            return (int)symbol_finish(NULL, result, saved); \
        } \
        return NEXT(name, int, int, const char *, int)(folder, path, flags); \
    }

OPEN_2(__open_2)
OPEN_2(__open64_2)
OPENAT_2(__openat_2)
OPENAT_2(__openat64_2)

/* QEMU 11 looks whether there is an iommufd before it opens it. */
EXPORT int access(const char *path, int mode)
{
    if (active && strcmp(path, "/dev/iommu") == 0) {
        symbol_count(SYM_access);
        return 0;
    }
    return NEXT(access, int, const char *, int)(path, mode);
}

EXPORT int faccessat(int folder, const char *path, int mode, int flags)
{
    if (active && strcmp(path, "/dev/iommu") == 0) {
        symbol_count(SYM_faccessat);
        return 0;
    }
    return NEXT(faccessat, int, int, const char *, int, int)(folder, path, mode, flags);
}
