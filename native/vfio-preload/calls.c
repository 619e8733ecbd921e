/*
 * VFU_DEV_PRELOAD_CALLS: a line for each call about migration. Nothing is changed, whether this library answers the
 * call, or the kernel and a real device.
 *
 *     vfu-dev calls 1
 *     BEGIN END THREAD DEVICE CALL ASKED... = RESULT ANSWERED...
 *
 * BEGIN and END are nanoseconds of CLOCK_MONOTONIC, DEVICE counts devices from 0 in the order of their first call,
 * RESULT is -errno where the call failed. No name is in it, and nothing of the data.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "calls.h"

#define HEADER "vfu-dev calls 1\n"
#define MAX_CALLERS 255 /* what calls_data can hold */

int calls_fd = -1;
uint8_t calls_data[CALLS_MAX_FD];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int devices[MAX_CALLERS]; /* number -> descriptor */
static int device_count;
static bool begun; /* the header is there */

void calls_open(void)
{
    calls_fd = append_to("VFU_DEV_PRELOAD_CALLS", "no calls are recorded");
}

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* The number of a device by its descriptor, -1 if there are too many. */
static int device_number(int fd)
{
    int number;

    pthread_mutex_lock(&lock);
    for (number = 0; number < device_count && devices[number] != fd; number++) {
    }
    if (number == device_count && number < MAX_CALLERS) {
        devices[device_count++] = fd;
    }
    pthread_mutex_unlock(&lock);
    return number < MAX_CALLERS ? number : -1;
}

static void put(const char *line, size_t size)
{
    if (!begun) {
        begun = true;
        (void)!syscall(SYS_write, calls_fd, HEADER, strlen(HEADER));
    }
    (void)!syscall(SYS_write, calls_fd, line, size);
}

/* A line; `text` is CALL and what was asked, `answered` begins with a space unless it is empty. */
static void record(uint64_t begin, uint64_t end, int device, const char *text, long result, const char *answered)
{
    char line[512];
    int size;

    if (device < 0) {
        return;
    }
    size = snprintf(line, sizeof(line), "%llu %llu %ld %d %s = %ld%s\n", (unsigned long long)begin,
                    (unsigned long long)end, syscall(SYS_gettid), device, text, result, answered);
    pthread_mutex_lock(&lock);
    put(line, MIN((size_t)size, sizeof(line) - 1));
    pthread_mutex_unlock(&lock);
}

/* --- ioctl -------------------------------------------------------------------------------------------------------- */

/* Which descriptor has the data of a session: none, once the device has left it. */
static void note_session(int device, uint32_t state, int data_fd)
{
    bool moving = state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P ||
                  state == VFIO_DEVICE_STATE_STOP_COPY || state == VFIO_DEVICE_STATE_RESUMING;

    if (device < 0) {
        return;
    }
    for (int fd = 0; fd < CALLS_MAX_FD && (!moving || data_fd >= 0); fd++) {
        if (calls_data[fd] == device + 1) {
            __atomic_store_n(&calls_data[fd], 0, __ATOMIC_RELAXED);
        }
    }
    if (moving && data_fd >= 0 && data_fd < CALLS_MAX_FD) {
        __atomic_store_n(&calls_data[data_fd], (uint8_t)(device + 1), __ATOMIC_RELAXED);
    }
}

#define ASKED(...) snprintf(text, sizeof(text), __VA_ARGS__)
#define ANSWERED(...) (void)(result == 0 && snprintf(answered, sizeof(answered), __VA_ARGS__))

static void record_feature(uint64_t begin, uint64_t end, int fd, uint32_t flags, const union feature_data *asked,
                           const union feature_data *data, long result)
{
    char text[128], answered[128] = "";
    int device = device_number(fd);

    switch (flags & VFIO_DEVICE_FEATURE_MASK) {
    case VFIO_DEVICE_FEATURE_MIGRATION:
        ASKED("flags");
        ANSWERED(" %llu", (unsigned long long)data->migration.flags);
        break;
    case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
        if (flags & VFIO_DEVICE_FEATURE_SET) {
            ASKED("set-state %u", asked->state.device_state);
            if (result == 0) {
                note_session(device, asked->state.device_state, data->state.data_fd);
            }
        } else {
            ASKED("get-state");
            ANSWERED(" %u", data->state.device_state);
        }
        break;
    case VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
        ASKED("data-size");
        ANSWERED(" %llu", (unsigned long long)data->data_size.stop_copy_length);
        break;
    case VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2:
        ASKED("precopy-info-v2");
        break;
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
        ASKED("log-start %u", asked->control.num_ranges);
        break;
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
        ASKED("log-stop");
        break;
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
        ASKED("log-report %llu", (unsigned long long)asked->report.length);
        break;
    default:
        return; /* not about migration */
    }
    record(begin, end, device, text, result, answered);
}

static size_t data_of(uint32_t flags)
{
    switch (flags & VFIO_DEVICE_FEATURE_MASK) {
    case VFIO_DEVICE_FEATURE_MIGRATION:
        return sizeof(struct vfio_device_feature_migration);
    case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
        return sizeof(struct vfio_device_feature_mig_state);
    case VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
        return sizeof(struct vfio_device_feature_mig_data_size);
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
        return sizeof(struct vfio_device_feature_dma_logging_control);
    case VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
        return sizeof(struct vfio_device_feature_dma_logging_report);
    }
    return 0;
}

static int feature(int (*next)(int, unsigned long, void *), int fd, void *argument)
{
    uint64_t data_at = ADDRESS(argument) + sizeof(struct vfio_device_feature), begin, end;
    struct vfio_device_feature head;
    union feature_data asked = { 0 }, data = { 0 };
    int result, error;

    if (copy_from_user(&head, ADDRESS(argument), sizeof(head)) < 0 || (head.flags & VFIO_DEVICE_FEATURE_PROBE)) {
        return next(fd, VFIO_DEVICE_FEATURE, argument);
    }
    copy_from_user(&asked, data_at, data_of(head.flags));
    begin = now();
    result = next(fd, VFIO_DEVICE_FEATURE, argument);
    end = now();
    error = errno;
    copy_from_user(&data, data_at, data_of(head.flags));
    record_feature(begin, end, fd, head.flags, &asked, &data, result < 0 ? -error : result);
    errno = error;
    return result;
}

int calls_ioctl(int (*next)(int, unsigned long, void *), int fd, unsigned long request, void *argument)
{
    char answered[128] = "";
    struct vfio_precopy_info info = { 0 };
    uint64_t begin, end;
    int result, error, device;

    if (request == VFIO_DEVICE_FEATURE) {
        return feature(next, fd, argument);
    }
    device = request == VFIO_DEVICE_RESET ? device_number(fd) : calls_have_data(fd) ? calls_data[fd] - 1 : -1;
    begin = now();
    result = next(fd, request, argument);
    end = now();
    error = errno;
    if (request == VFIO_DEVICE_RESET) {
        note_session(device, VFIO_DEVICE_STATE_RUNNING, -1);
        record(begin, end, device, "reset", result < 0 ? -error : result, answered);
    } else {
        if (result == 0 && copy_from_user(&info, ADDRESS(argument), sizeof(info)) == 0) {
            snprintf(answered, sizeof(answered), " %llu %llu %u", (unsigned long long)info.initial_bytes,
                     (unsigned long long)info.dirty_bytes, info.flags);
        }
        record(begin, end, device, "precopy-info", result < 0 ? -error : result, answered);
    }
    errno = error;
    return result;
}

/* --- data --------------------------------------------------------------------------------------------------------- */

static void record_data(uint64_t begin, int device, const char *call, size_t size, ssize_t result)
{
    uint64_t end = now();
    int error = errno;
    char text[64];

    snprintf(text, sizeof(text), "%s %zu", call, size);
    record(begin, end, device, text, result < 0 ? -error : result, "");
    errno = error;
}

ssize_t calls_read(ssize_t (*next)(int, void *, size_t), int fd, void *buffer, size_t size)
{
    int device = calls_data[fd] - 1;
    uint64_t begin = now();
    ssize_t result = next(fd, buffer, size);

    record_data(begin, device, "read", size, result);
    return result;
}

ssize_t calls_write(ssize_t (*next)(int, const void *, size_t), int fd, const void *buffer, size_t size)
{
    int device = calls_data[fd] - 1;
    uint64_t begin = now();
    ssize_t result = next(fd, buffer, size);

    record_data(begin, device, "write", size, result);
    return result;
}
