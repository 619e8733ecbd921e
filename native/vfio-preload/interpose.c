/*
 * Calls on descriptors: each asks whether the descriptor is ours, and goes on to the next library if not.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include "calls.h"
#include "device.h"
#include "symbols.h"

/* --- ioctl -------------------------------------------------------------------------------------------------------- */

/* A real device or group is put where ours are, or may be: the number of that descriptor, or -1. */
static int shared_with(unsigned long request, void *argument)
{
    struct vfio_device_bind_iommufd bind;
    int fd = -1;

    if (request == VFIO_DEVICE_BIND_IOMMUFD &&
        copy_from_user(&bind, ADDRESS(argument), END_OF(vfio_device_bind_iommufd, iommufd)) == 0) {
        fd = bind.iommufd;
    } else if (request == VFIO_GROUP_SET_CONTAINER) {
        copy_from_user(&fd, ADDRESS(argument), sizeof(fd));
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

static int any_ioctl(int fd, unsigned long request, void *argument)
{
    int saved = errno, error;
    struct file *file;

    if (ours(fd) && ((file = symbol_take(SYM_ioctl, fd, &error)) != NULL || error != 0)) {
        long result = file == NULL ? error : file->ops->ioctl(file, request & UINT32_MAX, argument);

        trace("ioctl %d (%s) %#lx: %ld (%s)", fd, file == NULL ? "?" : file->ops->name, request, result,
              errno_name(result));
        return (int)symbol_finish(file, result, saved);
    }
    if (active && about_others(request)) {
        error = concerns(fd, request, argument);
        if (error != 0) {
            symbol_count(SYM_ioctl);
            return (int)symbol_finish(NULL, MIN(error, 0), saved);
        }
    }
    return NEXT(ioctl, int, int, unsigned long, ...)(fd, request, argument);
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    void *argument;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    return calls_have_ioctl(request) ? calls_ioctl(any_ioctl, fd, request, argument)
                                     : any_ioctl(fd, request, argument);
}

/* --- reading and writing ------------------------------------------------------------------------------------------ */

#define CALL(operation, ...) \
    (file == NULL ? error : file->ops->operation == NULL ? -EINVAL : file->ops->operation(file, __VA_ARGS__))

#define OURS(symbol) (ours(fd) && ((file = symbol_take(SYM_##symbol, fd, &error)) != NULL || error != 0))

#define READ(name, ...) \
    { \
        int saved = errno, error; \
        struct file *file; \
\
        if (OURS(name)) { \
            return symbol_finish(file, CALL(read, buffer, size), saved); \
        } \
        __VA_ARGS__; \
    }

static ssize_t any_read(int fd, void *buffer, size_t size)
    READ(read, return NEXT(read, ssize_t, int, void *, size_t)(fd, buffer, size))

EXPORT ssize_t read(int fd, void *buffer, size_t size)
{
    return calls_have_data(fd) ? calls_read(any_read, fd, buffer, size) : any_read(fd, buffer, size);
}

EXPORT ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room);
EXPORT ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room)
    READ(__read_chk, return NEXT(__read_chk, ssize_t, int, void *, size_t, size_t)(fd, buffer, size, room))

static ssize_t any_write(int fd, const void *buffer, size_t size)
{
    int saved = errno, error;
    struct file *file;

    if (OURS(write)) {
        return symbol_finish(file, CALL(write, buffer, size), saved);
    }
    return NEXT(write, ssize_t, int, const void *, size_t)(fd, buffer, size);
}

EXPORT ssize_t write(int fd, const void *buffer, size_t size)
{
    return calls_have_data(fd) ? calls_write(any_write, fd, buffer, size) : any_write(fd, buffer, size);
}

#define PREAD(name, prototype, ...) \
    EXPORT ssize_t name prototype; \
    EXPORT ssize_t name prototype \
    { \
        int saved = errno, error; \
        struct file *file; \
\
        if (OURS(name)) { \
            return symbol_finish(file, CALL(pread, buffer, size, (uint64_t)offset), saved); \
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
            return symbol_finish(file, CALL(pwrite, buffer, size, (uint64_t)offset), saved); \
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
            return symbol_finish(file, file == NULL ? error : each(file, iov, count, write, NULL), saved); \
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
            return symbol_finish(file, file == NULL ? error : each(file, iov, count, write, &at), saved); \
        } \
        return NEXT(name, ssize_t, int, const struct iovec *, int, type)(fd, iov, count, offset); \
    }

VECTOR(readv, false)
VECTOR(writev, true)
VECTOR_AT(preadv, false, off_t)
VECTOR_AT(preadv64, false, off64_t)
VECTOR_AT(pwritev, true, off_t)
VECTOR_AT(pwritev64, true, off64_t)

/* No position is the descriptor's own, which ours have not; of the flags, the kernel's VFIO knows none either. */
#define VECTOR_AT_2(name, write, type) \
    EXPORT ssize_t name(int fd, const struct iovec *iov, int count, type offset, int flags) \
    { \
        int saved = errno, error; \
        off64_t at = offset; \
        struct file *file; \
\
        if (OURS(name)) { \
            error = error < 0 ? error : flags != 0 ? -EOPNOTSUPP : 0; \
            return symbol_finish(file, error < 0 ? error : each(file, iov, count, write, at == -1 ? NULL : &at), \
                                 saved); \
        } \
        return NEXT(name, ssize_t, int, const struct iovec *, int, type, int)(fd, iov, count, offset, flags); \
    }

VECTOR_AT_2(preadv2, false, off_t)
VECTOR_AT_2(preadv64v2, false, off64_t)
VECTOR_AT_2(pwritev2, true, off_t)
VECTOR_AT_2(pwritev64v2, true, off64_t)

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
            return (void *)symbol_finish(file, result, saved); \
        } \
        return NEXT(name, void *, void *, size_t, int, int, int, type)(address, length, protection, flags, fd, \
                                                                       offset); \
    }

MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

/* Copies within the kernel cannot reach us. */
static bool refuses(enum symbol symbol, int first, int second)
{
    if (!table_is_file(first) && !table_is_file(second)) {
        return false;
    }
    symbol_count(symbol);
    say("%s() on a VFIO descriptor is refused", symbol_name(symbol));
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

/* --- the beginning and the end ------------------------------------------------------------------------------------ */

/* A descriptor that the environment says is for us, open on /dev/null: it becomes one that the kernel does not use. */
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
    calls_open();
    config_read();
    if (config.devices == 0) {
        return;
    }
    internal_open(log_fd);
    internal_open(calls_fd);
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

__attribute__((destructor)) static void end(void)
{
    symbols_log();
}
