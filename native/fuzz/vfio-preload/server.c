/*
 * A server that answers as its script says, and honestly when that is used up.
 *
 * It runs in a thread of its own. What it sends is whole messages, or the last thing it sends: so nobody waits for it
 * in vain, and no run depends on a time limit.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "server_private.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

int fuzz_connect(int fd, const struct sockaddr *address, socklen_t size);

enum kind {
    HONEST, /* descriptors, then changes of the right reply: offset (2), value (1) */
    REPLY, /* descriptors, flags, error (4), then the data */
    ASK, /* command, flags, address (4), count (4), then data: a request of its own */
    BYTES, /* descriptors, then bytes as they are; the last that it sends */
    LEAVE,
    KINDS,
};

int memory_fd = -1;

static struct input script;
static pthread_t thread;
static bool connected;
static int server = -1, null_fd = -1, event = -1;
static uint16_t next_id;
static bool silent; /* it has said its last */

struct message request, reply;

int event_fd(void)
{
    if (event < 0) {
        event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    return event;
}

/* --- sending ----------------------------------------------------------------------------------------------------- */

static size_t take_fds(struct input *input, int *fds)
{
    uint8_t word = (uint8_t)take(input, 1);
    size_t count = MIN(word & 0x1fu, MAX_SENT_FDS);

    for (size_t i = 0; i < count; i++) {
        fds[i] = word & 0x20 ? null_fd : memory_fd;
    }
    return count;
}

static void leave(void)
{
    shutdown(server, SHUT_WR);
    silent = true;
}

static void send_all(const void *bytes, size_t size, const int *fds, size_t fd_count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * MAX_SENT_FDS)];
    } control;
    struct iovec iov = { (void *)(uintptr_t)bytes, size };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

    if (fd_count > 0) {
        memset(&control, 0, sizeof(control));
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        CMSG_FIRSTHDR(&message)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&message)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&message)->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), fds, sizeof(int) * fd_count);
    }
    while (iov.iov_len > 0 && !silent) {
        ssize_t count = sendmsg(server, &message, MSG_NOSIGNAL);

        if (count < 0) {
            leave(); /* the client has given up */
            return;
        }
        iov.iov_base = (char *)iov.iov_base + count;
        iov.iov_len -= (size_t)count;
        message.msg_control = NULL;
        message.msg_controllen = 0;
    }
}

/* --- what the script says ---------------------------------------------------------------------------------------- */

static void send_reply(uint32_t flags, uint32_t error, size_t size, const int *fds, size_t fd_count)
{
    reply.header.id = request.header.id;
    reply.header.command = request.header.command;
    reply.header.size = (uint32_t)(sizeof(reply.header) + size);
    reply.header.flags = flags;
    reply.header.error = error;
    send_all(&reply, sizeof(reply.header) + size, fds, fd_count);
}

static void send_honest(struct input *changes, size_t size)
{
    int fds[MAX_SENT_FDS];
    size_t fd_count, count, total;

    total = honest(size, fds, &fd_count);
    if (changes != NULL && left(changes) > 0) {
        int others[MAX_SENT_FDS];

        count = take_fds(changes, others);
        if (count > 0) {
            memcpy(fds, others, sizeof(others));
            fd_count = count;
        }
        while (left(changes) > 0) {
            size_t offset = (size_t)take(changes, 2);
            uint8_t value = (uint8_t)take(changes, 1);

            if (offset < total) {
                reply.data[offset] ^= value;
            }
        }
    }
    send_reply(VFIO_USER_FLAG_REPLY, 0, total, fds, fd_count);
}

/* Only what has no OUT_OF_BOUNDS in it is written, so that this is seen where it should not be. */
static void ask(struct input *input)
{
    struct {
        struct vfio_user_header header;
        struct vfio_user_dma_access access;
        uint8_t data[512];
    } message = { .header = { .id = next_id++ } };
    size_t size = sizeof(message.access);

    message.header.command = (uint16_t)(VFIO_USER_DMA_READ + take(input, 1) % 3);
    message.header.flags = (uint32_t)take(input, 1) & VFIO_USER_FLAG_NO_REPLY;
    message.access.address = take(input, 4);
    message.access.count = take(input, 4);
    if (message.header.command != VFIO_USER_DMA_READ) {
        size_t count = MIN(left(input), sizeof(message.data));

        take_bytes(input, message.data, count);
        for (size_t i = 0; i < count; i++) {
            message.data[i] &= 0x7f;
        }
        size += count;
        if (message.access.count % 4 != 3) {
            message.access.count = count;
        }
    }
    message.header.size = (uint32_t)(sizeof(message.header) + size);
    send_all(&message, message.header.size, NULL, 0);
}

/* Do what the script has for this request: the last of it is the reply, or the server's end. */
static void respond(size_t size)
{
    struct record record;
    int fds[MAX_SENT_FDS];
    size_t fd_count, total;
    uint32_t flags, error;

    while (!silent) {
        if (!take_record(&script, &record)) {
            send_honest(NULL, size);
            return;
        }
        switch ((enum kind)(record.kind % KINDS)) {
        case HONEST:
            send_honest(&record.body, size);
            return;
        case REPLY:
            fd_count = take_fds(&record.body, fds);
            flags = (uint32_t)take(&record.body, 1) | VFIO_USER_FLAG_REPLY;
            error = (uint32_t)take(&record.body, 4);
            total = left(&record.body);
            take_bytes(&record.body, reply.data, total);
            send_reply(flags, error, total, fds, fd_count);
            return;
        case ASK:
            ask(&record.body);
            break;
        case BYTES:
            fd_count = take_fds(&record.body, fds);
            send_all(record.body.at, left(&record.body), fds, fd_count);
            leave();
            break;
        default:
            leave();
        }
    }
}

/* The client's answer to a request of ours. */
static void judge(size_t size)
{
    if (request.header.flags & VFIO_USER_FLAG_ERROR) {
        if (size != 0 || request.header.error == 0) {
            fault("an error reply with error %u and %zu bytes", request.header.error, size);
        }
        return;
    }
    for (size_t i = sizeof(struct vfio_user_dma_access); i < size; i++) {
        if (request.data[i] == OUT_OF_BOUNDS) {
            fault("a DMA_READ got memory that is not mapped");
        }
    }
}

static bool receive(void *to, size_t size)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * 64)];
    } control;

    for (size_t done = 0; done < size;) {
        struct iovec iov = { (char *)to + done, size - done };
        struct msghdr message = {
            .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
        };
        ssize_t count = recvmsg(server, &message, MSG_CMSG_CLOEXEC);

        if (count <= 0) {
            return false;
        }
        for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part != NULL; part = CMSG_NXTHDR(&message, part)) {
            for (size_t at = 0; at < part->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
                int fd;

                memcpy(&fd, CMSG_DATA(part) + at, sizeof(fd));
                close(fd);
            }
        }
        done += (size_t)count;
    }
    return true;
}

static void *serve(void *opaque)
{
    (void)opaque;
    while (receive(&request.header, sizeof(request.header))) {
        size_t size = request.header.size - sizeof(request.header);

        if (request.header.size < sizeof(request.header) || size > ROOM || request.header.error != 0) {
            if (!(request.header.flags & VFIO_USER_FLAG_ERROR)) {
                fault("the client sent a message of %u bytes with error %u", request.header.size, request.header.error);
            }
        }
        if (!receive(request.data, size)) {
            break;
        }
        if ((request.header.flags & VFIO_USER_FLAG_TYPE) == VFIO_USER_FLAG_REPLY) {
            judge(size);
        } else if (!(request.header.flags & VFIO_USER_FLAG_NO_REPLY)) {
            memset(request.data + size, 0, MIN(ROOM - size, 64));
            respond(size);
        }
    }
    return NULL;
}

/* --- its life ---------------------------------------------------------------------------------------------------- */

void server_script(struct input records, bool maps, bool has_window)
{
    script = records;
    connected = silent = false;
    honest_open(maps, has_window);
    next_id = 0;
}

/* In place of connect(). */
int fuzz_connect(int fd, const struct sockaddr *address, socklen_t size)
{
    int ends[2];

    (void)address, (void)size;
    memory_fd = memfd_create("fuzz-server", MFD_CLOEXEC);
    null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (connected || memory_fd < 0 || ftruncate(memory_fd, MEMORY_BYTES) != 0 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0 || dup3(ends[0], fd, O_CLOEXEC) < 0) {
        fault("no server: %s", strerror(errno));
    }
    close(ends[0]);
    server = ends[1];
    connected = true;
    if (pthread_create(&thread, NULL, serve, NULL) != 0) {
        fault("no thread");
    }
    return 0;
}

void server_end(void)
{
    if (connected) {
        pthread_join(thread, NULL); /* its client has gone */
        close(server);
        close(memory_fd);
        close(null_fd);
    }
    if (event >= 0) {
        close(event);
    }
    event = -1;
}
