/*
 * Migration states and data, timed.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/vfio.h>

#include "answer.h"
#include "migration.h"
#include "wire.h"

static struct mig_place
place(uint16_t command, uint32_t number, size_t size)
{
    struct mig_place request = {
        .header = header(command, sizeof(request)),
        .argsz = sizeof(request) - sizeof(request.header),
        .size = size,
        .offset = (uint64_t)number * PLACE,
    };

    return request;
}

/* Takes the reply to a read; returns the bytes that it brought. */
static size_t
placed(void)
{
    const size_t head = sizeof(struct mig_place) - sizeof(struct header);
    struct mig_place found;
    size_t size;
    const uint8_t *payload = reply(&size);

    if (size != head) {
        errx(EXIT_FAILURE, "a reply of %zu bytes for data in the window", size);
    }
    memcpy((uint8_t *)&found + sizeof(found.header), payload, head);
    if (found.size > PLACE) {
        errx(EXIT_FAILURE, "%u bytes of data", found.size);
    }
    return found.size;
}

static struct mig_data
data_read(void)
{
    struct mig_data request = {
        .header = header(MIG_DATA_READ, sizeof(request)),
        .argsz = sizeof(request) - sizeof(request.header) + PIECE,
        .size = PIECE,
    };

    return request;
}

void
time_behind(const struct places *places, int64_t delay)
{
    struct mig_data read = data_read();
    struct mig_place in_window = place(MIG_DATA_READ, 0, PIECE);
    struct region_access access = region_access(places, true, 0);
    struct iovec parts[] = {
        { &read, sizeof(read) },
        { &access, access.header.size },
    };
    int64_t began = now_ns(), took = -1;
    int replies;

    if (window != NULL) {
        parts[0] = (struct iovec){ &in_window, sizeof(in_window) };
    }
    if (delay < 0) {
        send_parts(parts, 2);
    } else {
        send_parts(parts, 1);
        while (now_ns() < began + delay) {
        }
        began = now_ns();
        send_parts(parts + 1, 1);
    }
    /* With a window the write may be replied to first. */
    for (replies = 0; replies < 2; replies++) {
        skip_reply();
        if (replied == access.header.id) {
            took = now_ns() - began;
        }
    }
    answer(&took, 1);
}

void
set_state(uint32_t state)
{
    struct mig_state request = {
        .header = header(DEVICE_FEATURE, sizeof(request)),
        .argsz = sizeof(request) - sizeof(request.header),
        .flags = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_SET,
        .state = state,
        .fd = -1,
    };

    send_all(&request, sizeof(request));
    skip_reply();
}

/* Copies the data: a client that migrates has it in memory of its own afterwards. */
static int64_t
drain_window(FILE *file)
{
    static uint8_t copy[PLACE];
    uint32_t number, asked = 0, next = 0;
    bool ended = false;
    int64_t total = 0;

    while (!ended || next != asked) {
        size_t size;

        while (!ended && asked - next < places_count) {
            struct mig_place request = place(MIG_DATA_READ, asked % places_count,
                                             PLACE);

            send_all(&request, sizeof(request));
            asked++;
        }
        number = next++ % places_count;
        size = placed();
        ended = ended || size < PLACE;
        memcpy(copy, window + (size_t)number * PLACE, size);
        total += size;
        if (file != NULL && size > 0 && fwrite(copy, size, 1, file) != 1) {
            err(EXIT_FAILURE, "the file for the data");
        }
    }
    return total;
}

static int64_t
drain_messages(FILE *file)
{
    int64_t total = 0;

    for (;;) {
        struct mig_data request = data_read();
        const size_t head = sizeof(request) - sizeof(request.header);
        const uint8_t *payload;
        size_t size;

        send_all(&request, sizeof(request));
        payload = reply(&size);
        if (size <= head) {
            return total;
        }
        total += size - head;
        if (file != NULL && fwrite(payload + head, size - head, 1, file) != 1) {
            err(EXIT_FAILURE, "the file for the data");
        }
    }
}

void
drain(const char *path)
{
    FILE *file = *path != '\0' ? fopen(path, "wb") : NULL;
    int64_t result[2];
    int64_t began;

    if (*path != '\0' && file == NULL) {
        err(EXIT_FAILURE, "%s", path);
    }
    began = now_ns();
    result[0] = window != NULL ? drain_window(file) : drain_messages(file);
    result[1] = now_ns() - began;
    if (file != NULL && fclose(file) != 0) {
        err(EXIT_FAILURE, "%s", path);
    }
    answer(result, 2);
}

static void
feed_window(uint8_t *data, size_t size)
{
    uint32_t asked = 0, answered = 0;
    size_t done = 0;

    while (done < size || answered != asked) {
        while (done < size && asked - answered < places_count) {
            uint32_t number = asked++ % places_count;
            size_t count = size - done < PLACE ? size - done : PLACE;
            struct mig_place request = place(MIG_DATA_WRITE, number, count);

            memcpy(window + (size_t)number * PLACE, data + done, count);
            send_all(&request, sizeof(request));
            done += count;
        }
        skip_reply();
        answered++;
    }
}

static void
feed_messages(uint8_t *data, size_t size)
{
    size_t done = 0;

    while (done < size) {
        size_t count = size - done < PIECE ? size - done : PIECE;
        struct mig_data request = {
            .header = header(MIG_DATA_WRITE, sizeof(request) + count),
            .argsz = sizeof(request) - sizeof(request.header) + count,
            .size = count,
        };
        struct iovec parts[] = {
            { &request, sizeof(request) },
            { data + done, count },
        };

        send_parts(parts, 2);
        skip_reply();
        done += count;
    }
}

void
feed(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    uint8_t *data;
    size_t size;
    int64_t began, result[2];

    if (fd < 0 || fstat(fd, &status) < 0) {
        err(EXIT_FAILURE, "%s", path);
    }
    size = status.st_size;
    data = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (data == MAP_FAILED) {
        err(EXIT_FAILURE, "%s", path);
    }
    close(fd);
    set_state(VFIO_DEVICE_STATE_RESUMING);
    began = now_ns();
    if (window != NULL) {
        feed_window(data, size);
    } else {
        feed_messages(data, size);
    }
    set_state(VFIO_DEVICE_STATE_STOP);
    result[0] = size;
    result[1] = now_ns() - began;
    set_state(VFIO_DEVICE_STATE_RUNNING);
    munmap(data, size);
    answer(result, 2);
}
