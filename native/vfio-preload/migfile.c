/*
 * The migration data descriptor, and the states that it lives in.
 *
 * What is written to it is collected while the message before is under way, since QEMU writes 32 KiB at a time and each
 * message is a round trip: a thread sends what has come together. Anything else that is asked of the device waits until
 * all of it is sent; so does a message that the same thread sends to somebody else, because it may say that the data
 * is there (QEMU's switchover-ack does).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device.h"

/* The state of a connection that does not answer any more. */
#define UNKNOWN VFIO_DEVICE_STATE_ERROR

struct migfile {
    struct file file;
    struct device *device; /* with a reference */
    bool resuming;
    bool ended; /* its session is over; with migration.lock */

    struct migfile *next; /* of all that resume */
    pthread_t sender;
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    char *filling, *sending; /* max_xfer bytes each */
    size_t filled;
    bool busy; /* a message is under way */
    bool closing;
    int error; /* what became of one; there is no way on after it */
};

/* All that resume, for migration_flush_thread(). */
static pthread_mutex_t resuming_lock = PTHREAD_MUTEX_INITIALIZER;
static struct migfile *resuming;
static __thread bool wrote; /* this thread, since it last waited */

static bool saving(uint32_t state)
{
    return state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P ||
           state == VFIO_DEVICE_STATE_STOP_COPY;
}

/* --- writing ---------------------------------------------------------------------------------------------------- */

static int send_data(struct device *device, const char *data, size_t size)
{
    struct vfio_user_mig_data head = { (uint32_t)(sizeof(head) + size), (uint32_t)size };
    struct wire_call call = {
        .command = VFIO_USER_MIG_DATA_WRITE,
        .request = { { &head, sizeof(head) }, { (void *)(uintptr_t)data, size } },
    };
    int result = wire_call(device->wire, &call);

    trace("device %u: MIG_DATA_WRITE of %zu bytes: %s", device->number, size, errno_name(result));
    return result;
}

static void *sender(void *opaque)
{
    struct migfile *migfile = opaque;

    pthread_mutex_lock(&migfile->lock);
    for (;;) {
        char *full = migfile->filling;
        size_t size;
        int error;

        while (migfile->filled == 0 && !migfile->closing) {
            pthread_cond_wait(&migfile->changed, &migfile->lock);
            full = migfile->filling;
        }
        if (migfile->filled == 0) {
            break;
        }
        size = migfile->filled;
        migfile->filling = migfile->sending;
        migfile->sending = full;
        migfile->filled = 0;
        migfile->busy = true;
        pthread_cond_broadcast(&migfile->changed);
        pthread_mutex_unlock(&migfile->lock);
        error = send_data(migfile->device, full, size);
        pthread_mutex_lock(&migfile->lock);
        migfile->busy = false;
        if (error != 0) {
            migfile->error = error;
            migfile->filled = 0;
        }
        pthread_cond_broadcast(&migfile->changed);
    }
    pthread_mutex_unlock(&migfile->lock);
    return NULL;
}

/* Wait until all is sent. Returns 0, or what went wrong. */
static int flush(struct migfile *migfile)
{
    int error;

    pthread_mutex_lock(&migfile->lock);
    while ((migfile->filled > 0 || migfile->busy) && migfile->error == 0) {
        pthread_cond_wait(&migfile->changed, &migfile->lock);
    }
    error = migfile->error;
    pthread_mutex_unlock(&migfile->lock);
    return error;
}

void migration_flush(struct device *device)
{
    struct migfile *migfile = NULL;

    if (!__atomic_load_n(&device->migration.collecting, __ATOMIC_ACQUIRE)) {
        return;
    }
    pthread_mutex_lock(&resuming_lock);
    for (migfile = resuming; migfile != NULL && migfile->device != device; migfile = migfile->next) {
    }
    if (migfile != NULL) {
        file_hold(&migfile->file);
    }
    pthread_mutex_unlock(&resuming_lock);
    if (migfile != NULL) {
        __atomic_store_n(&device->migration.collecting, false, __ATOMIC_RELEASE);
        flush(migfile);
        file_put(&migfile->file);
    }
}

void migration_flush_thread(void)
{
    struct migfile *one;
    size_t done = 0;

    if (!wrote) {
        return;
    }
    wrote = false;
    for (;;) {
        size_t at = 0;

        pthread_mutex_lock(&resuming_lock);
        for (one = resuming; one != NULL && at < done; one = one->next) {
            at++;
        }
        if (one != NULL) {
            file_hold(&one->file);
        }
        pthread_mutex_unlock(&resuming_lock);
        if (one == NULL) {
            return;
        }
        flush(one);
        file_put(&one->file);
        done++;
    }
}

static ssize_t write_data(struct file *file, const void *buffer, size_t count)
{
    struct migfile *migfile = (struct migfile *)file;
    struct migration *migration = &migfile->device->migration;
    size_t room = wire_limits(migfile->device->wire)->max_xfer, done = 0;
    bool ended;
    int error = 0;

    if (!migfile->resuming) {
        return -EBADF;
    }
    pthread_mutex_lock(&migration->lock);
    ended = migfile->ended;
    pthread_mutex_unlock(&migration->lock);
    if (ended) {
        return -ENODEV;
    }
    wrote = true;
    pthread_mutex_lock(&migfile->lock);
    while (done < count && error == 0) {
        size_t part;

        while (migfile->filled == room && migfile->error == 0) {
            pthread_cond_wait(&migfile->changed, &migfile->lock);
        }
        part = MIN(count - done, room - migfile->filled);
        error = migfile->error;
        if (error == 0) {
            error = copy_from_user(migfile->filling + migfile->filled, (uint64_t)(uintptr_t)buffer + done, part);
        }
        if (error == 0) {
            migfile->filled += part;
            done += part;
            __atomic_store_n(&migration->collecting, true, __ATOMIC_RELEASE);
            pthread_cond_broadcast(&migfile->changed);
        }
    }
    pthread_mutex_unlock(&migfile->lock);
    return done > 0 ? (ssize_t)done : error;
}

/* --- reading ---------------------------------------------------------------------------------------------------- */

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

    if (migfile->resuming) {
        return -EBADF;
    }
    pthread_mutex_lock(&migration->lock);
    if (migfile->ended) {
        result = -ENODEV;
    } else if (count > 0) {
        result = read_some(migfile->device, buffer, count);
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
    return copy_to_user((uint64_t)(uintptr_t)argument, &reply, sizeof(reply));
}

static long migfile_ioctl(struct file *file, unsigned long request, void *argument)
{
    struct migfile *migfile = (struct migfile *)file;
    struct migration *migration = &migfile->device->migration;
    long result;

    if (request != VFIO_MIG_GET_PRECOPY_INFO || migfile->resuming) {
        return -ENOTTY;
    }
    pthread_mutex_lock(&migration->lock);
    result = precopy_info(migfile, argument);
    pthread_mutex_unlock(&migration->lock);
    return result;
}

/* --- its life --------------------------------------------------------------------------------------------------- */

static void stop_sender(struct migfile *migfile)
{
    pthread_mutex_lock(&migfile->lock);
    migfile->closing = true;
    pthread_cond_broadcast(&migfile->changed);
    pthread_mutex_unlock(&migfile->lock);
    pthread_join(migfile->sender, NULL);
    free(migfile->filling);
    free(migfile->sending);
    pthread_cond_destroy(&migfile->changed);
    pthread_mutex_destroy(&migfile->lock);
}

static void release(struct file *file)
{
    struct migfile *migfile = (struct migfile *)file;
    struct migration *migration = &migfile->device->migration;

    pthread_mutex_lock(&migration->lock);
    if (migration->session == migfile) {
        migration->session = NULL;
    }
    pthread_mutex_unlock(&migration->lock);
    if (migfile->resuming) {
        stop_sender(migfile);
    }
    file_put(&migfile->device->file);
    free(migfile);
}

/* The last descriptor may be closed while a flush holds a reference: off the list when nobody has it any more. */
static void unlist(struct file *file)
{
    struct migfile *migfile = (struct migfile *)file, **link;

    pthread_mutex_lock(&resuming_lock);
    for (link = &resuming; *link != NULL && *link != migfile; link = &(*link)->next) {
    }
    if (*link != NULL) {
        *link = migfile->next;
    }
    pthread_mutex_unlock(&resuming_lock);
    release(file);
}

static const struct file_ops migfile_ops = {
    .name = "migration data",
    .ioctl = migfile_ioctl,
    .read = read_data,
    .write = write_data,
    .release = unlist,
};

static int start_sender(struct migfile *migfile)
{
    size_t room = wire_limits(migfile->device->wire)->max_xfer;
    sigset_t all, before;
    int error;

    migfile->filling = malloc(room);
    migfile->sending = malloc(room);
    if (migfile->filling == NULL || migfile->sending == NULL) {
        free(migfile->filling);
        free(migfile->sending);
        return -ENOMEM;
    }
    pthread_mutex_init(&migfile->lock, NULL);
    pthread_cond_init(&migfile->changed, NULL);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&migfile->sender, NULL, sender, migfile);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) {
        free(migfile->filling);
        free(migfile->sending);
        return -error;
    }
    migfile->resuming = true;
    pthread_mutex_lock(&resuming_lock);
    migfile->next = resuming;
    resuming = migfile;
    pthread_mutex_unlock(&resuming_lock);
    return 0;
}

static struct migfile *new_session(struct device *device, bool resume, int *error)
{
    struct migfile *migfile = calloc(1, sizeof(*migfile));

    *error = -ENOMEM;
    if (migfile == NULL) {
        return NULL;
    }
    file_init(&migfile->file, &migfile_ops);
    migfile->device = device;
    if (resume && (*error = start_sender(migfile)) != 0) {
        free(migfile);
        return NULL;
    }
    file_hold(&device->file);
    *error = 0;
    return migfile;
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
    if (session != NULL && !(session->resuming ? state == VFIO_DEVICE_STATE_RESUMING : saving(state))) {
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
    int result = 0, fd = -1;

    pthread_mutex_lock(&migration->lock);
    before = migration->state;
    /* -1 wherever no session begins: QEMU passes a zeroed structure, and would take descriptor 0 for one. */
    state->data_fd = -1;
    if (migration->session != NULL && migration->session->resuming) {
        result = flush(migration->session); /* what the server has is no state to run on if data did not arrive */
    }
    /* The descriptor first: without one, nothing has happened. */
    if (result == 0 && ((saving(wanted) && !saving(before)) || (resume && before != wanted))) {
        session = new_session(device, resume, &result);
        if (session != NULL) {
            fd = file_install(&session->file, O_CLOEXEC);
            result = MIN(fd, 0);
        }
    }
    if (result == 0) {
        result = feature_call(device, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_SET, &request,
                              sizeof(request));
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
    } else if (result != 0 && session != NULL) {
        file_put(&session->file);
    }
    return result;
}
