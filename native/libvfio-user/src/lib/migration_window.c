/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * The window for migration data: memory that the client shares with us, and that
 * MIG_DATA_READ and MIG_DATA_WRITE refer to instead of carrying the data.
 */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/param.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "common.h"
#include "migration.h"
#include "migration_priv.h"
#include "private.h"

/* <linux/magic.h> */
#ifndef TMPFS_MAGIC
#define TMPFS_MAGIC 0x01021994
#endif

/* <linux/fcntl.h> of Linux 5.1 */
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* Without all of these the file can lose the pages that we are about to use. */
#define NEEDED_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)

#ifdef VFU_NO_MIGR_EXT

size_t
migration_max_window(const struct migration *migr UNUSED)
{
    return 0;
}

bool
migration_has_window(const struct migration *migr UNUSED)
{
    return false;
}

void
migration_drop_window(struct migration *migr UNUSED)
{
}

int
handle_mig_data_window(vfu_ctx_t *vfu_ctx UNUSED, vfu_msg_t *msg UNUSED)
{
    return ERROR_INT(EINVAL);
}

int
migration_window_read(vfu_ctx_t *vfu_ctx UNUSED, vfu_msg_t *msg UNUSED)
{
    return ERROR_INT(EINVAL);
}

int
migration_window_write(vfu_ctx_t *vfu_ctx UNUSED, vfu_msg_t *msg UNUSED)
{
    return ERROR_INT(EINVAL);
}

#else /* VFU_NO_MIGR_EXT */

size_t
migration_max_window(const struct migration *migr)
{
    return migr == NULL ? 0 : migr->max_window;
}

bool
migration_has_window(const struct migration *migr)
{
    return migr != NULL && migr->window.iov_base != NULL;
}

void
migration_drop_window(struct migration *migr)
{
    if (migration_has_window(migr)) {
        munmap(migr->window.iov_base, migr->window.iov_len);
        memset(&migr->window, 0, sizeof(migr->window));
    }
}

/*
 * Whether each of the @size bytes of @fd can be used at any time from now on,
 * whatever the client does: there is always a page, and nobody has to provide it.
 */
static bool
is_safe(vfu_ctx_t *vfu_ctx, int fd, uint64_t size)
{
    int seals = fcntl(fd, F_GET_SEALS);
    struct statfs fs;
    struct stat st;

    if (seals < 0 || (seals & NEEDED_SEALS) != NEEDED_SEALS ||
        (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0) {
        vfu_log(vfu_ctx, LOG_ERR, "the window is no memfd that is sealed "
                "against shrinking, growing and sealing (seals %#x)", seals);
        return false;
    }

    /* Of huge pages there may be none when one is touched. */
    if (fstatfs(fd, &fs) < 0 || fs.f_type != TMPFS_MAGIC) {
        vfu_log(vfu_ctx, LOG_ERR, "the window is not in ordinary memory");
        return false;
    }

    if (fstat(fd, &st) < 0 || (uint64_t)st.st_size != size) {
        vfu_log(vfu_ctx, LOG_ERR, "a window of %ju bytes, which has %ju",
                (uintmax_t)size, (uintmax_t)st.st_size);
        return false;
    }

    return true;
}

static int
map_window(vfu_ctx_t *vfu_ctx, int fd, uint64_t size)
{
    struct migration *migr = vfu_ctx->migration;
    void *base;

    if (!is_safe(vfu_ctx, fd, size)) {
        return ERROR_INT(EINVAL);
    }

    base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        vfu_log(vfu_ctx, LOG_ERR, "the window cannot be mapped: %m");
        return -1;
    }

    migr->window.iov_base = base;
    migr->window.iov_len = size;
    return 0;
}

int
handle_mig_data_window(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    struct vfio_user_mig_data_window *req = msg->in.iov.iov_base;
    struct migration *migr = vfu_ctx->migration;
    int fd, ret, saved_errno;

    if (vfu_ctx->client_max_window == 0 || migration_max_window(migr) == 0) {
        vfu_log(vfu_ctx, LOG_ERR, "a window, which was not negotiated");
        return ERROR_INT(EINVAL);
    }

    if (msg->in.iov.iov_len != sizeof(*req) || req->argsz < sizeof(*req) ||
        req->flags != 0 || msg->in.nr_fds != 1) {
        vfu_log(vfu_ctx, LOG_ERR, "bad window request (%zu bytes, %zu file "
                "descriptors)", msg->in.iov.iov_len, msg->in.nr_fds);
        return ERROR_INT(EINVAL);
    }

    if (migration_has_window(migr)) {
        vfu_log(vfu_ctx, LOG_ERR, "there is a window already");
        return ERROR_INT(EEXIST);
    }

    if (req->size == 0 || req->size % (uint64_t)sysconf(_SC_PAGESIZE) != 0 ||
        req->size > MIN(vfu_ctx->client_max_window, migr->max_window)) {
        vfu_log(vfu_ctx, LOG_ERR, "a window of %ju bytes, at most %zu",
                (uintmax_t)req->size,
                MIN(vfu_ctx->client_max_window, migr->max_window));
        return ERROR_INT(EINVAL);
    }

    fd = consume_fd(msg->in.fds, msg->in.nr_fds, 0);
    ret = map_window(vfu_ctx, fd, req->size);
    saved_errno = errno;
    close(fd);
    errno = saved_errno;
    return ret;
}

/* Where in the window a request's data is, or NULL with errno set. */
static char *
find_range(vfu_ctx_t *vfu_ctx, const vfu_msg_t *msg)
{
    const struct vfio_user_mig_window_data *req = msg->in.iov.iov_base;
    const struct iovec *window = &vfu_ctx->migration->window;

    if (msg->in.iov.iov_len != sizeof(*req) || req->argsz < sizeof(*req)) {
        vfu_log(vfu_ctx, LOG_ERR, "bad size of migration data request (%zu)",
                msg->in.iov.iov_len);
        return ERROR_PTR(EINVAL);
    }

    if (req->offset > window->iov_len ||
        req->size > window->iov_len - req->offset) {
        vfu_log(vfu_ctx, LOG_ERR, "migration data of %u bytes at %ju of a window "
                "of %zu", req->size, (uintmax_t)req->offset, window->iov_len);
        return ERROR_PTR(EINVAL);
    }

    return (char *)window->iov_base + req->offset;
}

int
migration_window_read(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    const struct vfio_user_mig_window_data *req = msg->in.iov.iov_base;
    struct vfio_user_mig_window_data *reply;
    char *data = find_range(vfu_ctx, msg);
    ssize_t ret;

    if (data == NULL) {
        return -1;
    }

    reply = malloc(sizeof(*reply));
    if (reply == NULL) {
        return -1;
    }
    msg->out.iov.iov_base = reply;
    msg->out.iov.iov_len = sizeof(*reply);

    ret = vfu_ctx->migration->callbacks.read_data(vfu_ctx, data, req->size);
    if (ret < 0) {
        vfu_log(vfu_ctx, LOG_ERR, "reading migration data failed: %m");
        return -1;
    }
    if ((uint64_t)ret > req->size) {
        vfu_log(vfu_ctx, LOG_ERR, "device read %zd of %u bytes", ret, req->size);
        return ERROR_INT(EIO);
    }

    *reply = (struct vfio_user_mig_window_data){
        .argsz = sizeof(*reply), .size = ret, .offset = req->offset
    };
    return 0;
}

int
migration_window_write(vfu_ctx_t *vfu_ctx, vfu_msg_t *msg)
{
    const struct vfio_user_mig_window_data *req = msg->in.iov.iov_base;
    char *data = find_range(vfu_ctx, msg);

    return data == NULL ? -1 : migration_write(vfu_ctx, data, req->size);
}

EXPORT int
vfu_setup_migration_window(vfu_ctx_t *vfu_ctx, size_t max_size)
{
    assert(vfu_ctx != NULL);

    if (vfu_ctx->migration == NULL) {
        vfu_log(vfu_ctx, LOG_ERR, "migration callbacks must be set up first");
        return ERROR_INT(EINVAL);
    }

    vfu_ctx->migration->max_window = max_size;
    return 0;
}

#endif /* VFU_NO_MIGR_EXT */
