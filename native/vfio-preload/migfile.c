/*
 * The migration data descriptor, and the states that it lives in.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device.h"

/* The state of a device that does not say. */
#define UNKNOWN VFIO_DEVICE_STATE_ERROR

struct migfile {
    struct file file;
    struct device *device; /* with a reference */
    struct collector *collector; /* what is written goes there; NULL: it is for reading */
    bool ended; /* its session is over; with migration.lock */
};

static bool saving(uint32_t state)
{
    return state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P ||
           state == VFIO_DEVICE_STATE_STOP_COPY;
}

/* --- what can be done with it ------------------------------------------------------------------------------------ */

static ssize_t write_data(struct file *file, const void *buffer, size_t count)
{
    struct migfile *migfile = (struct migfile *)file;
    struct migration *migration = &migfile->device->migration;
    bool ended;

    if (migfile->collector == NULL) {
        return -EBADF;
    }
    pthread_mutex_lock(&migration->lock);
    ended = migfile->ended;
    pthread_mutex_unlock(&migration->lock);
    return ended ? -ENODEV : collector_write(migfile->collector, ADDRESS(buffer), count);
}

static ssize_t read_window(struct device *device, void *buffer, size_t count)
{
    const char *data = window_piece(device, WINDOW_READ);
    size_t size = MIN(count, device->migration.window.piece);
    ssize_t found = window_call(device, VFIO_USER_MIG_DATA_READ, data, size);
    /* The server may go on writing to it: it is read once. */
    int error = found > 0 ? window_deliver(device, ADDRESS(buffer), data, (size_t)found) : 0;

    return error != 0 ? error : found;
}

static ssize_t read_some(struct device *device, void *buffer, size_t count)
{
    size_t size = MIN(count, wire_limits(device->wire)->max_xfer);
    struct vfio_user_mig_data request = { (uint32_t)(sizeof(request) + size), (uint32_t)size }, reply;
    struct wire_call call = {
        .command = VFIO_USER_MIG_DATA_READ,
        .request = { { &request, sizeof(request) } },
        .head = &reply,
        .head_room = sizeof(reply),
        .body = buffer,
        .body_room = size,
    };
    int result = wire_call(device->wire, &call);

    if (result < 0) {
        return result;
    }
    if (call.head_size != sizeof(reply) || reply.size != call.body_size) {
        say("%s: the server sent migration data of %zu bytes and calls it %u", config.sockets[device->number],
            call.body_size, reply.size);
        return -EIO;
    }
    return (ssize_t)call.body_size;
}

static ssize_t read_data(struct file *file, void *buffer, size_t count)
{
    struct migfile *migfile = (struct migfile *)file;
    struct migration *migration = &migfile->device->migration;
    ssize_t result = 0;

    if (migfile->collector != NULL) {
        return -EBADF;
    }
    pthread_mutex_lock(&migration->lock);
    if (migfile->ended) {
        result = -ENODEV;
    } else if (count > 0) {
        int window = window_have(migfile->device);

        result = window < 0    ? window
                 : window == 0 ? read_some(migfile->device, buffer, count)
                               : read_window(migfile->device, buffer, count);
        /* No data is the end in STOP_COPY, and not yet any in PRE_COPY. */
        if (result == 0 && migration->state != VFIO_DEVICE_STATE_STOP_COPY) {
            result = -ENOMSG;
        }
    }
    pthread_mutex_unlock(&migration->lock);
    trace("device %u: MIG_DATA_READ of %zu bytes: %zd (%s)", migfile->device->number, count, result,
          errno_name(result));
    return result;
}

static long precopy_info(struct migfile *migfile, void *argument)
{
    struct device *device = migfile->device;
    struct vfio_precopy_info info, reply;
    struct wire_call call = {
        .command = VFIO_USER_MIG_GET_PRECOPY_INFO,
        .request = { { &info, sizeof(info) } },
        .head = &reply,
        .head_room = sizeof(reply),
    };
    long result = fetch_argsz(&info, argument, sizeof(info));
    uint32_t argsz = info.argsz;

    if (result < 0) {
        return result;
    }
    if (migfile->ended) {
        return -ENODEV;
    }
    if (device->migration.state != VFIO_DEVICE_STATE_PRE_COPY &&
        device->migration.state != VFIO_DEVICE_STATE_PRE_COPY_P2P) {
        return -EINVAL;
    }
    info = (struct vfio_precopy_info){ .argsz = sizeof(info) };
    result = wire_call(device->wire, &call);
    if (result < 0) {
        return result;
    }
    if (call.head_size != sizeof(reply)) {
        say("%s: the server sent %zu bytes of pre-copy information", config.sockets[device->number], call.head_size);
        return -EIO;
    }
    reply.argsz = argsz;
    reply.flags &= __atomic_load_n(&device->migration.precopy_info_v2, __ATOMIC_ACQUIRE) ? VFIO_PRECOPY_INFO_REINIT : 0;
    trace("device %u: initial_bytes %llu dirty_bytes %llu flags %#x", device->number,
          (unsigned long long)reply.initial_bytes, (unsigned long long)reply.dirty_bytes, reply.flags);
    return copy_to_user(ADDRESS(argument), &reply, sizeof(reply));
}

static long migfile_ioctl(struct file *file, unsigned long request, void *argument)
{
    struct migfile *migfile = (struct migfile *)file;
    struct migration *migration = &migfile->device->migration;
    long result;

    if (request != VFIO_MIG_GET_PRECOPY_INFO || migfile->collector != NULL) {
        return -ENOTTY;
    }
    pthread_mutex_lock(&migration->lock);
    result = precopy_info(migfile, argument);
    pthread_mutex_unlock(&migration->lock);
    return result;
}

/* --- its life ---------------------------------------------------------------------------------------------------- */

static void release(struct file *file)
{
    struct migfile *migfile = (struct migfile *)file;
    struct migration *migration = &migfile->device->migration;

    pthread_mutex_lock(&migration->lock);
    if (migration->session == migfile) {
        migration->session = NULL;
    }
    pthread_mutex_unlock(&migration->lock);
    if (migfile->collector != NULL) {
        collector_end(migfile->collector);
    }
    file_put(&migfile->device->file);
    free(migfile);
}

static const struct file_ops migfile_ops = {
    .name = "migration data",
    .ioctl = migfile_ioctl,
    .read = read_data,
    .write = write_data,
    .release = release,
};

/* A session and its descriptor; or -errno, and nothing has happened. */
static int open_session(struct device *device, bool resume, struct migfile **result)
{
    struct migfile *migfile = calloc(1, sizeof(*migfile));
    int fd = migfile == NULL ? -ENOMEM : 0;

    if (fd == 0 && resume) {
        fd = collector_new(device, &migfile->collector);
    }
    if (fd == 0) {
        file_init(&migfile->file, &migfile_ops);
        migfile->device = device;
        fd = file_install(&migfile->file, O_CLOEXEC);
    }
    if (fd < 0) {
        if (migfile != NULL && migfile->collector != NULL) {
            collector_end(migfile->collector);
        }
        free(migfile);
        return fd;
    }
    file_hold(&device->file);
    *result = migfile;
    return fd;
}

/* --- the states: with migration.lock ---------------------------------------------------------------------------- */

static int ask_state(struct device *device, uint32_t *state)
{
    struct vfio_device_feature_mig_state found;
    int result = feature_call(device, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_GET, &found,
                              sizeof(found));

    if (result == 0 && found.device_state >= VFIO_DEVICE_STATE_NR) {
        say("%s: the server is in state %u, which there is not", config.sockets[device->number], found.device_state);
        result = -EIO;
    }
    *state = result == 0 ? found.device_state : UNKNOWN;
    return result;
}

/* The device is in `state` now: the session that does not belong there is over. */
static void arrive(struct device *device, uint32_t state)
{
    struct migration *migration = &device->migration;
    struct migfile *session = migration->session;

    migration->state = state;
    if (session != NULL && !(session->collector != NULL ? state == VFIO_DEVICE_STATE_RESUMING : saving(state))) {
        session->ended = true;
        migration->session = NULL;
    }
}

long migration_get_state(struct device *device, struct vfio_device_feature_mig_state *state)
{
    uint32_t found;
    int result;

    pthread_mutex_lock(&device->migration.lock);
    result = ask_state(device, &found);
    arrive(device, found);
    pthread_mutex_unlock(&device->migration.lock);
    state->device_state = found;
    state->data_fd = -1;
    return result;
}

void migration_after_reset(struct device *device)
{
    struct vfio_device_feature_mig_state state;

    if (device->migration.flags != 0) {
        migration_get_state(device, &state);
    }
}

long migration_set_state(struct device *device, struct vfio_device_feature_mig_state *state)
{
    struct migration *migration = &device->migration;
    struct vfio_device_feature_mig_state request = { state->device_state, -1 };
    uint32_t wanted = state->device_state, before;
    bool resume = wanted == VFIO_DEVICE_STATE_RESUMING;
    struct migfile *session = NULL;
    int result = 0, lost = 0, fd = -1;

    pthread_mutex_lock(&migration->lock);
    before = migration->state;
    /* -1 wherever no session begins: QEMU passes a zeroed structure, and would take descriptor 0 for one. */
    state->data_fd = -1;
    if (migration->session != NULL && migration->session->collector != NULL) {
        /* A write that was taken and then refused is an error of what ends the session. The server is asked all the
         * same: a device whose last change of state was refused is one that a reset brings back to RUNNING. */
        lost = collector_flush(migration->session->collector);
    }
    /* The descriptor first: without one, nothing has happened. */
    if (result == 0 && ((saving(wanted) && !saving(before)) || (resume && before != wanted))) {
        fd = open_session(device, resume, &session);
        result = MIN(fd, 0);
    }
    if (result == 0) {
        result = feature_call(device, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_SET, &request,
                              sizeof(request));
        result = result != 0 ? result : lost;
        if (result != 0) {
            ask_state(device, &wanted);
        } else if (session != NULL && migration->session != NULL) {
            /* The way led out of one session, through STOP, into another. */
            migration->session->ended = true;
            migration->session = NULL;
        }
        arrive(device, wanted);
    }
    if (result == 0 && session != NULL) {
        migration->session = session;
        state->data_fd = fd;
    }
    trace("device %u: state %u -> %u, data_fd %d: %s", device->number, before, request.device_state, state->data_fd,
          errno_name(result));
    pthread_mutex_unlock(&migration->lock);
    if (result != 0 && fd >= 0) {
        close(fd);
    }
    return result;
}
