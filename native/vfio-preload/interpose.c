/*
 * The symbols that are interposed. Each asks whether the descriptor is ours, and goes on to the next library if not.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include "device.h"
#include "table.h"

#define EXPORT __attribute__((visibility("default")))

static bool active; /* there are devices to make up */

/* --- the next library's functions, and a count of the calls that were for us -------------------------------------- */

#define SYMBOLS(X) \
    X(open) X(open64) X(__open_2) X(__open64_2) X(openat) X(openat64) X(__openat_2) X(__openat64_2) \
    X(access) X(faccessat) X(ioctl) X(read) X(__read_chk) X(write) X(pread) X(pread64) X(__pread_chk) X(__pread64_chk) \
    X(pwrite) X(pwrite64) X(readv) X(writev) X(preadv) X(preadv64) X(pwritev) X(pwritev64) X(mmap) X(mmap64) \
    X(close) X(close_range) X(closefrom) X(dup) X(dup2) X(dup3) X(fcntl) X(fcntl64) X(sendmsg) X(sendfile) \
    X(sendfile64) X(splice) X(copy_file_range)

enum symbol {
#define X(name) SYM_##name,
    SYMBOLS(X)
#undef X
    SYMBOL_COUNT
};

static struct {
    const char *name;
    void *function;
    unsigned long calls;
} symbols[SYMBOL_COUNT] = {
#define X(name) [SYM_##name] = { #name, NULL, 0 },
    SYMBOLS(X)
#undef X
};

static void *next(enum symbol symbol)
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

/* As `prototype`, to be called. */
#define NEXT(symbol, result, ...) ((result(*)(__VA_ARGS__))next(SYM_##symbol))

static void count(enum symbol symbol)
{
    __atomic_add_fetch(&symbols[symbol].calls, 1, __ATOMIC_RELAXED);
}

/* The file behind `fd`, with a reference, counted; NULL: the call is for the next library. `error`: or for nobody. */
static struct file *take(enum symbol symbol, int fd, int *error)
{
    struct file *file = NULL;

    *error = table_take(fd, &file);
    if (*error == 0) {
        return NULL;
    }
    count(symbol);
    *error = MIN(*error, 0);
    return file;
}

/* What a call returns: `result`, with the caller's errno untouched if it is no error. */
static long finish(struct file *file, long result, int saved)
{
    if (file != NULL) {
        file_put(file);
    }
    errno = result < 0 ? (int)-result : saved;
    return result < 0 ? -1 : result;
}

/* --- opening ------------------------------------------------------------------------------------------------------ */

/* The kernel's own file, if there is one: it may be meant, for a real device. Both numbers are ours to look after. */
static int open_real(const char *path, int flags, int *duplicate)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0);

    *duplicate = -1;
    if (fd >= 0) {
        *duplicate = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, INTERNAL_FROM);
        internal_open(*duplicate);
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
    count(symbol);
    trace("open %s: %d (%s)", path, *result, errno_name(*result));
    return true;
}

#define OPEN(name, mode_wanted) \
    EXPORT int name(const char *path, int flags, ...) \
    { \
        int result, saved = errno; \
        mode_t mode = 0; \
\
        if (opens(SYM_##name, path, flags, &result)) { \
            return (int)finish(NULL, result, saved); \
        } \
        if (mode_wanted(flags)) { \
            va_list arguments; \
\
            va_start(arguments, flags); \
            mode = va_arg(arguments, mode_t); \
            va_end(arguments); \
        } \
        return NEXT(name, int, const char *, int, ...)(path, flags, mode); \
    }

#define OPENAT(name, mode_wanted) \
    EXPORT int name(int folder, const char *path, int flags, ...) \
    { \
        int result, saved = errno; \
        mode_t mode = 0; \
\
        if (opens(SYM_##name, path, flags, &result)) { \
            return (int)finish(NULL, result, saved); \
        } \
        if (mode_wanted(flags)) { \
            va_list arguments; \
\
            va_start(arguments, flags); \
            mode = va_arg(arguments, mode_t); \
            va_end(arguments); \
        } \
        return NEXT(name, int, int, const char *, int, ...)(folder, path, flags, mode); \
    }

#define MODE_WANTED(flags) (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE)

OPEN(open, MODE_WANTED)
OPEN(open64, MODE_WANTED)
OPENAT(openat, MODE_WANTED)
OPENAT(openat64, MODE_WANTED)

/* What <fcntl.h> makes of these with _FORTIFY_SOURCE; nothing declares them otherwise. */
#define OPEN_2(name) \
    EXPORT int name(const char *path, int flags); \
    EXPORT int name(const char *path, int flags) \
    { \
        int result, saved = errno; \
\
        if (opens(SYM_##name, path, flags, &result)) { \
            return (int)finish(NULL, result, saved); \
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
            return (int)finish(NULL, result, saved); \
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
        count(SYM_access);
        return 0;
    }
    return NEXT(access, int, const char *, int)(path, mode);
}

EXPORT int faccessat(int folder, const char *path, int mode, int flags)
{
    if (active && strcmp(path, "/dev/iommu") == 0) {
        count(SYM_faccessat);
        return 0;
    }
    return NEXT(faccessat, int, int, const char *, int, int)(folder, path, mode, flags);
}

/* --- ioctl -------------------------------------------------------------------------------------------------------- */

/* A real device or group is put where ours are, or may be: the number of that descriptor, or -1. */
static int shared_with(unsigned long request, void *argument)
{
    struct vfio_device_bind_iommufd bind;
    int fd = -1;

    if (request == VFIO_DEVICE_BIND_IOMMUFD &&
        copy_from_user(&bind, (uint64_t)(uintptr_t)argument, offsetof(struct vfio_device_bind_iommufd, out_devid)) == 0) {
        fd = bind.iommufd;
    } else if (request == VFIO_GROUP_SET_CONTAINER) {
        copy_from_user(&fd, (uint64_t)(uintptr_t)argument, sizeof(fd));
    }
    return ours(fd) ? fd : -1;
}

/* What is not on a descriptor of ours, but about one: 0 to go on to the kernel, 1: done, or -errno. */
static int concerns(int fd, unsigned long request, void *argument)
{
    struct file *file;
    int other, result = 0;

    if (request == KVM_SET_DEVICE_ATTR) {
        return kvm_swallows(fd, request, argument);
    }
    other = shared_with(request, argument);
    if (other < 0) {
        return 0;
    }
    if ((file = file_get(other, &iommufd_ops)) != NULL) {
        result = iommufd_give_up(file);
    } else if ((file = file_get(other, &container_ops)) != NULL) {
        result = container_give_up(file);
    } else {
        return 0;
    }
    file_put(file);
    if (result == 0) {
        table_forget(other);
    }
    return result;
}

static bool about_others(unsigned long request)
{
    return request == VFIO_DEVICE_BIND_IOMMUFD || request == VFIO_GROUP_SET_CONTAINER || request == KVM_SET_DEVICE_ATTR;
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    int saved = errno, error;
    struct file *file;
    va_list arguments;
    void *argument;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    if (ours(fd) && ((file = take(SYM_ioctl, fd, &error)) != NULL || error != 0)) {
        long result = file == NULL ? error : file->ops->ioctl(file, request & UINT32_MAX, argument);

        trace("ioctl %d (%s) %#lx: %ld (%s)", fd, file == NULL ? "?" : file->ops->name, request, result,
              errno_name(result));
        return (int)finish(file, result, saved);
    }
    if (active && about_others(request)) {
        error = concerns(fd, request, argument);
        if (error != 0) {
            count(SYM_ioctl);
            return (int)finish(NULL, MIN(error, 0), saved);
        }
    }
    return NEXT(ioctl, int, int, unsigned long, ...)(fd, request, argument);
}

/* --- reading and writing ------------------------------------------------------------------------------------------ */

#define CALL(operation, ...) \
    (file == NULL ? error : file->ops->operation == NULL ? -EINVAL : file->ops->operation(file, __VA_ARGS__))

#define OURS(symbol) (ours(fd) && ((file = take(SYM_##symbol, fd, &error)) != NULL || error != 0))

#define READ(name, ...) \
    { \
        int saved = errno, error; \
        struct file *file; \
\
        if (OURS(name)) { \
            return finish(file, CALL(read, buffer, size), saved); \
        } \
        __VA_ARGS__; \
    }

EXPORT ssize_t read(int fd, void *buffer, size_t size)
    READ(read, return NEXT(read, ssize_t, int, void *, size_t)(fd, buffer, size))

EXPORT ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room);
EXPORT ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room)
    READ(__read_chk, return NEXT(__read_chk, ssize_t, int, void *, size_t, size_t)(fd, buffer, size, room))

EXPORT ssize_t write(int fd, const void *buffer, size_t size)
{
    int saved = errno, error;
    struct file *file;

    if (OURS(write)) {
        return finish(file, CALL(write, buffer, size), saved);
    }
    return NEXT(write, ssize_t, int, const void *, size_t)(fd, buffer, size);
}

#define PREAD(name, prototype, ...) \
    EXPORT ssize_t name prototype; \
    EXPORT ssize_t name prototype \
    { \
        int saved = errno, error; \
        struct file *file; \
\
        if (OURS(name)) { \
            return finish(file, CALL(pread, buffer, size, (uint64_t)offset), saved); \
        } \
        __VA_ARGS__; \
    }

PREAD(pread, (int fd, void *buffer, size_t size, off_t offset),
      return NEXT(pread, ssize_t, int, void *, size_t, off_t)(fd, buffer, size, offset))
PREAD(pread64, (int fd, void *buffer, size_t size, off64_t offset),
      return NEXT(pread64, ssize_t, int, void *, size_t, off64_t)(fd, buffer, size, offset))
PREAD(__pread_chk, (int fd, void *buffer, size_t size, off_t offset, size_t room),
      return NEXT(__pread_chk, ssize_t, int, void *, size_t, off_t, size_t)(fd, buffer, size, offset, room))
PREAD(__pread64_chk, (int fd, void *buffer, size_t size, off64_t offset, size_t room),
      return NEXT(__pread64_chk, ssize_t, int, void *, size_t, off64_t, size_t)(fd, buffer, size, offset, room))

#define PWRITE(name, type) \
    EXPORT ssize_t name(int fd, const void *buffer, size_t size, type offset) \
    { \
        int saved = errno, error; \
        struct file *file; \
\
        if (OURS(name)) { \
            return finish(file, CALL(pwrite, buffer, size, (uint64_t)offset), saved); \
        } \
        return NEXT(name, ssize_t, int, const void *, size_t, type)(fd, buffer, size, offset); \
    }

PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

/* One piece after the other, until one comes out short. */
static long each(struct file *file, const struct iovec *iov, int count, bool write, const off64_t *offset)
{
    const struct file_ops *ops = file->ops;
    long done = 0;

    for (int i = 0; i < count; i++) {
        uint64_t at = offset == NULL ? 0 : (uint64_t)(*offset + done);
        long part = -EINVAL;

        if (iov[i].iov_len == 0) {
            continue;
        }
        if (offset == NULL && !write && ops->read != NULL) {
            part = ops->read(file, iov[i].iov_base, iov[i].iov_len);
        } else if (offset == NULL && write && ops->write != NULL) {
            part = ops->write(file, iov[i].iov_base, iov[i].iov_len);
        } else if (offset != NULL && !write && ops->pread != NULL) {
            part = ops->pread(file, iov[i].iov_base, iov[i].iov_len, at);
        } else if (offset != NULL && write && ops->pwrite != NULL) {
            part = ops->pwrite(file, iov[i].iov_base, iov[i].iov_len, at);
        }
        if (part < 0) {
            return done > 0 ? done : part;
        }
        done += part;
        if ((size_t)part < iov[i].iov_len) {
            break;
        }
    }
    return done;
}

#define VECTOR(name, write) \
    EXPORT ssize_t name(int fd, const struct iovec *iov, int count) \
    { \
        int saved = errno, error; \
        struct file *file; \
\
        if (OURS(name)) { \
            return finish(file, file == NULL ? error : each(file, iov, count, write, NULL), saved); \
        } \
        return NEXT(name, ssize_t, int, const struct iovec *, int)(fd, iov, count); \
    }

#define VECTOR_AT(name, write, type) \
    EXPORT ssize_t name(int fd, const struct iovec *iov, int count, type offset) \
    { \
        int saved = errno, error; \
        off64_t at = offset; \
        struct file *file; \
\
        if (OURS(name)) { \
            return finish(file, file == NULL ? error : each(file, iov, count, write, &at), saved); \
        } \
        return NEXT(name, ssize_t, int, const struct iovec *, int, type)(fd, iov, count, offset); \
    }

VECTOR(readv, false)
VECTOR(writev, true)
VECTOR_AT(preadv, false, off_t)
VECTOR_AT(preadv64, false, off64_t)
VECTOR_AT(pwritev, true, off_t)
VECTOR_AT(pwritev64, true, off64_t)

#define MMAP(name, type) \
    EXPORT void *name(void *address, size_t length, int protection, int flags, int fd, type offset) \
    { \
        int saved = errno, error; \
        struct file *file; \
\
        if (!(flags & MAP_ANONYMOUS) && OURS(name)) { \
            long result = CALL(mmap, address, length, protection, flags, (uint64_t)offset); \
\
            trace("mmap %d +%#llx, %#zx bytes: %#lx (%s)", fd, (unsigned long long)offset, length, result, \
                  errno_name(result)); \
            return (void *)finish(file, result, saved); \
        } \
        return NEXT(name, void *, void *, size_t, int, int, int, type)(address, length, protection, flags, fd, offset); \
    }

MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

/* Copies within the kernel cannot reach us. */
static bool refuses(enum symbol symbol, int first, int second)
{
    if (!table_is_file(first) && !table_is_file(second)) {
        return false;
    }
    count(symbol);
    say("%s() on a VFIO descriptor is refused", symbols[symbol].name);
    errno = EINVAL;
    return true;
}

EXPORT ssize_t sendfile(int to, int from, off_t *offset, size_t size)
{
    return refuses(SYM_sendfile, to, from) ? -1 :
           NEXT(sendfile, ssize_t, int, int, off_t *, size_t)(to, from, offset, size);
}

EXPORT ssize_t sendfile64(int to, int from, off64_t *offset, size_t size)
{
    return refuses(SYM_sendfile64, to, from) ? -1 :
           NEXT(sendfile64, ssize_t, int, int, off64_t *, size_t)(to, from, offset, size);
}

EXPORT ssize_t splice(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t size, unsigned int flags)
{
    return refuses(SYM_splice, from, to) ? -1 :
           NEXT(splice, ssize_t, int, off64_t *, int, off64_t *, size_t, unsigned int)(from, from_offset, to, to_offset,
                                                                                       size, flags);
}

EXPORT ssize_t copy_file_range(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t size,
                               unsigned int flags)
{
    return refuses(SYM_copy_file_range, from, to) ? -1 :
           NEXT(copy_file_range, ssize_t, int, off64_t *, int, off64_t *, size_t, unsigned int)(
               from, from_offset, to, to_offset, size, flags);
}

/* --- closing and duplicating -------------------------------------------------------------------------------------- */

EXPORT int close(int fd)
{
    if (ours(fd)) {
        count(SYM_close);
        if (table_close(fd) == KEEP_IT) {
            errno = EBADF;
            return -1;
        }
    }
    return NEXT(close, int, int)(fd);
}

/* Close what is ours in a range; call `rest` for each part of it that has nothing in it that stays open. */
static int close_parts(unsigned int first, unsigned int last, int flags)
{
    int result = 0;

    for (unsigned int fd = first; fd <= last && fd < TABLE_SIZE; fd++) {
        if (ours((int)fd) && table_close((int)fd) == KEEP_IT) {
            if (fd > first) {
                result |= (int)syscall(SYS_close_range, first, fd - 1, flags);
            }
            first = fd + 1;
        }
    }
    return first > last ? result : result | (int)syscall(SYS_close_range, first, last, flags);
}

EXPORT int close_range(unsigned int first, unsigned int last, int flags)
{
    if (active && first <= last && !(flags & (int)CLOSE_RANGE_CLOEXEC)) {
        count(SYM_close_range);
        return close_parts(first, last, flags);
    }
    return NEXT(close_range, int, unsigned int, unsigned int, int)(first, last, flags);
}

EXPORT void closefrom(int first)
{
    if (active && close_parts(first < 0 ? 0 : (unsigned int)first, UINT32_MAX, 0) == 0) {
        count(SYM_closefrom);
        return;
    }
    NEXT(closefrom, void, int)(first);
}

EXPORT int dup(int fd)
{
    int copy = NEXT(dup, int, int)(fd);

    if (ours(fd) && copy >= 0) {
        count(SYM_dup);
        table_copy(fd, copy);
    }
    return copy;
}

/* dup2() and dup3() close what was there. */
static int duplicated(enum symbol symbol, int from, int to, int result)
{
    if (result >= 0 && from != to && (ours(from) || ours(to))) {
        count(symbol);
        table_close(to);
        table_copy(from, to);
    }
    return result;
}

static bool taken(int fd)
{
    if (!ours(fd) || table_is_file(fd)) {
        return false;
    }
    errno = EBUSY; /* in use here; the program does not know of it */
    return true;
}

EXPORT int dup2(int from, int to)
{
    return taken(to) ? -1 : duplicated(SYM_dup2, from, to, NEXT(dup2, int, int, int)(from, to));
}

EXPORT int dup3(int from, int to, int flags)
{
    return taken(to) ? -1 : duplicated(SYM_dup3, from, to, NEXT(dup3, int, int, int, int)(from, to, flags));
}

#define FCNTL(name) \
    EXPORT int name(int fd, int command, ...) \
    { \
        va_list arguments; \
        void *argument; \
        int result; \
\
        va_start(arguments, command); \
        argument = va_arg(arguments, void *); \
        va_end(arguments); \
        result = NEXT(name, int, int, int, ...)(fd, command, argument); \
        if (ours(fd) && result >= 0 && (command == F_DUPFD || command == F_DUPFD_CLOEXEC)) { \
            count(SYM_##name); \
            table_copy(fd, result); \
        } \
        return result; \
    }

FCNTL(fcntl)
FCNTL(fcntl64)

/* What is sent elsewhere is an open /dev/null there. And whoever is told something may be told that data has arrived. */
EXPORT ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    migration_flush_thread();
    for (struct cmsghdr *part = active ? CMSG_FIRSTHDR(message) : NULL; part != NULL;
         part = CMSG_NXTHDR((struct msghdr *)(uintptr_t)message, part)) {
        size_t size = part->cmsg_len - CMSG_LEN(0);

        for (size_t i = 0; part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS && i < size / sizeof(int); i++) {
            int sent;

            memcpy(&sent, CMSG_DATA(part) + i * sizeof(sent), sizeof(sent));
            if (table_is_file(sent)) {
                count(SYM_sendmsg);
                say("descriptor %d is a VFIO descriptor of ours, which works only in this process: it is not sent", sent);
                errno = EOPNOTSUPP;
                return -1;
            }
        }
    }
    return NEXT(sendmsg, ssize_t, int, const struct msghdr *, int)(fd, message, flags);
}

/* --- the beginning and the end ------------------------------------------------------------------------------------- */

/* A descriptor that the environment says is for us: an open /dev/null, which is made one that the kernel refuses to use. */
static void adopt(int fd, struct file *file)
{
    struct stat status;
    int null;

    if (file == NULL || syscall(SYS_fstat, fd, &status) != 0 || !S_ISCHR(status.st_mode) ||
        status.st_rdev != makedev(1, 3)) {
        trace("descriptor %d is no /dev/null: left alone", fd);
        return;
    }
    null = (int)syscall(SYS_openat, AT_FDCWD, "/dev/null", O_PATH);
    if (null >= 0) {
        syscall(SYS_dup3, null, fd, 0);
        syscall(SYS_close, null);
    }
    file_install_at(file, fd);
}

__attribute__((constructor)) static void begin(void)
{
    log_open();
    config_read();
    if (config.devices == 0) {
        return;
    }
    internal_open(log_fd);
    table_open();
    trace("process %d: %u devices", (int)getpid(), config.devices);
    if (config.iommufd >= 0) {
        adopt(config.iommufd, iommufd_new(-1));
    }
    for (unsigned int i = 0; i < config.devices; i++) {
        if (config.fds[i] >= 0) {
            adopt(config.fds[i], (struct file *)device_new(i));
        }
    }
    active = true;
}

/* Calls that reached us, by symbol: a call that is missing here went past. */
__attribute__((destructor)) static void end(void)
{
    for (size_t i = 0; active && log_fd >= 0 && i < SYMBOL_COUNT; i++) {
        if (symbols[i].calls > 0) {
            trace("calls of %s: %lu", symbols[i].name, symbols[i].calls);
        }
    }
}
