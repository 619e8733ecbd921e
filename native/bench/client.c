/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * A vfio-user client that does nothing but time requests, for `vfu-dev bench`.
 *
 * Usage: vfu-bench-client SOCKET [PLACES]
 *
 * With PLACES migration data is in a window: as many requests are under way at a
 * time, each for 4 MiB of it, which no limit on messages forbids. Without, the data
 * is in messages of 1 MiB, as QEMU's are, one after the other.
 *
 * It connects, then takes one command a line from its standard input. Each is
 * answered by a line with a number, and as many 64-bit integers after it, in the
 * machine's own byte order. What is wrong ends the program, with a line on its
 * standard error.
 *
 *   read COUNT ACCESS          nanoseconds of each of COUNT reads
 *   write COUNT ACCESS         the same of writes
 *   post COUNT ACCESS          nanoseconds of COUNT writes without a reply and one
 *                              read, all together
 *   behind ACCESS              nanoseconds from a MIG_DATA_READ, with a write right
 *                              behind it, to the reply to the write
 *   during DELAY ACCESS        the same with a write DELAY nanoseconds later, from the
 *                              write on
 *   state STATE                nothing
 *   drain [FILE]               bytes of all migration data that is there now, and
 *                              nanoseconds
 *   feed FILE                  the same of handing it over, from RESUMING to STOP
 *
 * ACCESS is INDEX OFFSET BYTES STRIDE PLACES: up to 8 bytes of a region, in PLACES
 * places, a power of two, STRIDE bytes apart, in an order that no prefetcher knows.
 */

#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <linux/vfio.h>

/* vfio-user.rst */
enum {
    VERSION = 1,
    REGION_READ = 9,
    REGION_WRITE = 10,
    DEVICE_FEATURE = 16,
    MIG_DATA_READ = 17,
    MIG_DATA_WRITE = 18,
    MIG_DATA_WINDOW = 27, /* native/spec */
};

#define TYPE_MASK   0xfU
#define TYPE_REPLY  0x1U
#define NO_REPLY    0x10U

#define PIECE       (1U << 20)
#define PLACE       (4U << 20)
#define MAX_BYTES   8U

/* Odd, so that multiples of it visit every place; the golden ratio of 2^32. */
#define SCATTER     2654435769U

struct header {
    uint16_t id;
    uint16_t command;
    uint32_t size;
    uint32_t flags;
    uint32_t error;
};

struct region_access {
    struct header header;
    uint64_t offset;
    uint32_t index;
    uint32_t count;
    uint8_t data[MAX_BYTES];
};

struct mig_data {
    struct header header;
    uint32_t argsz;
    uint32_t size;
};

struct mig_window {
    struct header header;
    uint32_t argsz;
    uint32_t flags;
    uint64_t size;
};

/* What MIG_DATA_READ and MIG_DATA_WRITE are with a window, and the reply to a read. */
struct mig_place {
    struct header header;
    uint32_t argsz;
    uint32_t size;
    uint64_t offset;
};

struct mig_state {
    struct header header;
    uint32_t argsz;
    uint32_t flags;
    uint32_t state;
    int32_t fd;
};

#define CAPABILITIES(more) \
    "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576" more "}}"

static const char plain[] = CAPABILITIES("");
static const char with_window[] =
    CAPABILITIES(",\"migration_data_window\":67108864");

struct version {
    struct header header;
    uint16_t major;
    uint16_t minor;
    char text[sizeof(with_window)];
};

static int sock;
static uint16_t last_id;
static uint16_t replied; /* the id of the last reply */

/* The window: PLACE bytes for each of the requests that can be under way. */
static uint8_t *window;
static uint32_t places_count = 1;

/* What was received: replies from `taken` on, the last one perhaps in part. */
static uint8_t received[2 * PIECE];
static size_t taken, have;

static int64_t
now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static struct header
header(uint16_t command, size_t size)
{
    return (struct header){ .id = ++last_id, .command = command, .size = size };
}

static void
send_parts(struct iovec *parts, int count)
{
    struct msghdr msg = { .msg_iov = parts, .msg_iovlen = count };

    while (msg.msg_iovlen > 0) {
        ssize_t sent = sendmsg(sock, &msg, MSG_NOSIGNAL);

        if (sent < 0) {
            if (errno == EINTR) {
                continue;
            }
            err(EXIT_FAILURE, "send");
        }
        while (msg.msg_iovlen > 0 && (size_t)sent >= msg.msg_iov->iov_len) {
            sent -= msg.msg_iov->iov_len;
            msg.msg_iov++;
            msg.msg_iovlen--;
        }
        if (msg.msg_iovlen > 0) {
            msg.msg_iov->iov_base = (uint8_t *)msg.msg_iov->iov_base + sent;
            msg.msg_iov->iov_len -= sent;
        }
    }
}

static void
send_all(void *data, size_t size)
{
    struct iovec part = { data, size };

    send_parts(&part, 1);
}

static void
receive(size_t wanted)
{
    while (have - taken < wanted) {
        ssize_t count;

        if (taken > 0) {
            memmove(received, received + taken, have - taken);
            have -= taken;
            taken = 0;
        }
        count = recv(sock, received + have, sizeof(received) - have, 0);
        if (count == 0) {
            errx(EXIT_FAILURE, "the server closed the connection");
        }
        if (count < 0 && errno != EINTR) {
            err(EXIT_FAILURE, "recv");
        }
        have += count > 0 ? count : 0;
    }
}

/* Receives a reply; its payload is there until the next one is received. */
static const uint8_t *
reply(size_t *size)
{
    struct header head;
    const uint8_t *payload;

    receive(sizeof(head));
    memcpy(&head, received + taken, sizeof(head));
    if ((head.flags & TYPE_MASK) != TYPE_REPLY || head.error != 0 ||
        head.size < sizeof(head) || head.size > PIECE + 4096) {
        errx(EXIT_FAILURE, "a reply to command %u with flags %#x, error %u",
             head.command, head.flags, head.error);
    }
    receive(head.size);
    replied = head.id;
    payload = received + taken + sizeof(head);
    taken += head.size;
    *size = head.size - sizeof(head);
    return payload;
}

static void
skip_reply(void)
{
    size_t size;

    (void)reply(&size);
}

static void
answer(const int64_t *values, size_t count)
{
    printf("%zu\n", count);
    fwrite(values, sizeof(*values), count, stdout);
    if (fflush(stdout) != 0) {
        err(EXIT_FAILURE, "stdout");
    }
}

static int64_t *
numbers(size_t count)
{
    int64_t *values = calloc(count, sizeof(*values));

    if (values == NULL) {
        err(EXIT_FAILURE, "%zu results", count);
    }
    return values;
}

/* --- MMIO ---------------------------------------------------------------- */

/* What a command says of its accesses. */
struct places {
    uint32_t index;
    uint64_t offset;
    uint32_t bytes;
    uint64_t stride;
    uint32_t count;
};

static struct places
parse_places(const char *text)
{
    struct places places;

    if (sscanf(text, "%" SCNu32 " %" SCNu64 " %" SCNu32 " %" SCNu64 " %" SCNu32,
               &places.index, &places.offset, &places.bytes, &places.stride,
               &places.count) != 5 || places.count == 0 ||
        (places.count & (places.count - 1)) != 0 || places.bytes == 0 ||
        places.bytes > MAX_BYTES) {
        errx(EXIT_FAILURE, "INDEX OFFSET BYTES STRIDE PLACES: %s", text);
    }
    return places;
}

/* Takes COUNT off the start of a command's arguments. */
static uint32_t
parse_count(char **text)
{
    unsigned long count = strtoul(*text, text, 0);

    if (count == 0 || count > UINT32_MAX) {
        errx(EXIT_FAILURE, "COUNT: a number above 0");
    }
    return count;
}

static struct region_access
region_access(const struct places *places, bool is_write, uint32_t number)
{
    size_t size = offsetof(struct region_access, data) +
                  (is_write ? places->bytes : 0);
    uint32_t place = (number * SCATTER) & (places->count - 1);
    struct region_access access = {
        .header = header(is_write ? REGION_WRITE : REGION_READ, size),
        .offset = places->offset + place * places->stride,
        .index = places->index,
        .count = places->bytes,
        .data = { 0, 1, 2, 3, 4, 5, 6, 7 },
    };

    return access;
}

static void
time_calls(const struct places *places, uint32_t count, bool is_write)
{
    int64_t *times = numbers(count);
    uint32_t number;

    for (number = 0; number < count; number++) {
        struct region_access access = region_access(places, is_write, number);
        int64_t began = now_ns();

        send_all(&access, access.header.size);
        skip_reply();
        times[number] = now_ns() - began;
    }
    answer(times, count);
    free(times);
}

static void
time_posted(const struct places *places, uint32_t count)
{
    int64_t began = now_ns(), took;
    struct region_access access;
    uint32_t number;

    for (number = 0; number < count; number++) {
        access = region_access(places, true, number);
        access.header.flags = NO_REPLY;
        send_all(&access, access.header.size);
    }
    access = region_access(places, false, 0);
    send_all(&access, access.header.size);
    skip_reply();
    took = now_ns() - began;
    answer(&took, 1);
}

/* --- migration ----------------------------------------------------------- */

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

static void
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

static void
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

/* Whoever reads migration data has it in memory of its own afterwards. */
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

static void
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

static void
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

/* --- the program --------------------------------------------------------- */

/* Makes the window and hands it to the server. */
static void
share_window(void)
{
    struct mig_window request = {
        .header = header(MIG_DATA_WINDOW, sizeof(request)),
        .argsz = sizeof(request) - sizeof(request.header),
        .size = (uint64_t)places_count * PLACE,
    };
    struct iovec part = { &request, sizeof(request) };
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(sizeof(int))];
    } control = { 0 };
    struct msghdr msg = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
    int fd = memfd_create("vfu-bench-window", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, request.size) < 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW) < 0) {
        err(EXIT_FAILURE, "the window");
    }
    window = mmap(NULL, request.size, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_POPULATE, fd, 0);
    if (window == MAP_FAILED) {
        err(EXIT_FAILURE, "the window");
    }
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
    if (sendmsg(sock, &msg, MSG_NOSIGNAL) != sizeof(request)) {
        err(EXIT_FAILURE, "send");
    }
    close(fd);
    skip_reply();
}

static void
attach(const char *path, bool has_window)
{
    const char *text = has_window ? with_window : plain;
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct version request = {
        .header = header(VERSION, offsetof(struct version, text) +
                                  strlen(text) + 1),
    };

    if (strlen(path) >= sizeof(address.sun_path)) {
        errx(EXIT_FAILURE, "%s: too long for a socket", path);
    }
    strcpy(address.sun_path, path);
    strcpy(request.text, text);
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&address,
                            sizeof(address)) < 0) {
        err(EXIT_FAILURE, "%s", path);
    }
    send_all(&request, request.header.size);
    skip_reply();
    if (has_window) {
        share_window();
    }
}

static void
serve(const char *name, char *rest)
{
    struct places places;
    uint32_t count = 0;

    if (strcmp(name, "state") == 0) {
        set_state(strtoul(rest, NULL, 0));
        answer(NULL, 0);
        return;
    } else if (strcmp(name, "drain") == 0) {
        drain(rest);
        return;
    } else if (strcmp(name, "feed") == 0) {
        feed(rest);
        return;
    }

    if (strcmp(name, "behind") != 0) {
        count = parse_count(&rest); /* of "during": nanoseconds */
    }
    places = parse_places(rest);
    if (strcmp(name, "read") == 0) {
        time_calls(&places, count, false);
    } else if (strcmp(name, "write") == 0) {
        time_calls(&places, count, true);
    } else if (strcmp(name, "post") == 0) {
        time_posted(&places, count);
    } else if (strcmp(name, "behind") == 0) {
        time_behind(&places, -1);
    } else if (strcmp(name, "during") == 0) {
        time_behind(&places, count);
    } else {
        errx(EXIT_FAILURE, "no such command: %s", name);
    }
}

int
main(int argc, char *argv[])
{
    char line[4096];

    if (argc == 3) {
        places_count = strtoul(argv[2], NULL, 0);
    }
    if (argc < 2 || argc > 3 || places_count == 0 || places_count > 16) {
        fprintf(stderr, "Usage: %s SOCKET [PLACES]\n", argv[0]);
        return EXIT_FAILURE;
    }
    attach(argv[1], argc == 3);
    answer(NULL, 0);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        char *rest;

        line[strcspn(line, "\n")] = '\0';
        rest = line + strcspn(line, " ");
        if (*rest != '\0') {
            *rest++ = '\0';
        }
        serve(line, rest);
    }
    return EXIT_SUCCESS;
}
