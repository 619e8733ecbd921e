/*
 * A connection to a device server.
 *
 * A thread of its own receives: replies, for the callers that wait for them, and the server's requests, which it
 * answers. It never waits to send. Whoever holds `tx_lock` sends; a reply to the server that cannot be sent at once is
 * left in `owed`, and the thread that holds the lock sends it before it lets go. So a server that waits for a reply gets
 * it whatever else is under way, and a server that does not read is never waited for by the thread that reads.
 *
 * Nothing the server says about a length is believed before it is compared with the room there is. A stream that cannot
 * be trusted any more is closed, and stays closed: the device is dead then.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

#define MAX_CALLS 128 /* at a time; a thread has at most one */
#define MAX_OWED_BYTES (16 << 20)
#define MAX_VERSION_BYTES (64 << 10)

struct pending {
    struct wire_call *call; /* NULL: free */
    uint16_t id;
    bool arriving; /* the receiver is filling the caller's buffers */
    bool done;
    int result;
    pthread_cond_t changed;
};

struct owed {
    struct owed *next;
    size_t size, sent;
    char message[];
};

struct wire {
    int fd;
    char *socket;
    struct wire_limits limits;
    wire_handler *handler;
    void *opaque;
    pthread_t receiver;
    char *payload; /* of the server's request */

    pthread_mutex_t lock; /* what follows */
    bool dead, closing;
    uint16_t next_id;
    struct pending pending[MAX_CALLS];
    struct owed *owed, **owed_tail;
    size_t owed_bytes;

    pthread_mutex_t tx_lock; /* held while a message is sent; taken before `lock` */
};

static struct timespec deadline_in(unsigned int ms)
{
    struct timespec when;

    clock_gettime(CLOCK_MONOTONIC, &when);
    when.tv_sec += ms / 1000;
    when.tv_nsec += (long)(ms % 1000) * 1000000;
    if (when.tv_nsec >= 1000000000) {
        when.tv_sec++;
        when.tv_nsec -= 1000000000;
    }
    return when;
}

static int ms_until(const struct timespec *when)
{
    struct timespec now;
    long long ms;

    clock_gettime(CLOCK_MONOTONIC, &now);
    ms = (when->tv_sec - now.tv_sec) * 1000LL + (when->tv_nsec - now.tv_nsec + 999999) / 1000000;
    return ms < 0 ? 0 : (int)MIN(ms, 3600000);
}

/* The first reason is the reason. Everybody who waits is woken. */
static void fail_locked(struct wire *wire, const char *why)
{
    if (wire->dead) {
        return;
    }
    __atomic_store_n(&wire->dead, true, __ATOMIC_RELEASE);
    if (!wire->closing) {
        say("%s: %s; the device is dead: it reads all ones from now on", wire->socket, why);
    }
    shutdown(wire->fd, SHUT_RDWR); /* wakes whoever polls it */
    for (size_t i = 0; i < MAX_CALLS; i++) {
        struct pending *pending = &wire->pending[i];

        if (pending->call != NULL && !pending->arriving && !pending->done) {
            pending->result = -ENOTCONN;
            pending->done = true;
            pthread_cond_signal(&pending->changed);
        }
    }
}

static void fail(struct wire *wire, const char *why)
{
    pthread_mutex_lock(&wire->lock);
    fail_locked(wire, why);
    pthread_mutex_unlock(&wire->lock);
}

bool wire_dead(struct wire *wire)
{
    return __atomic_load_n(&wire->dead, __ATOMIC_ACQUIRE);
}

const struct wire_limits *wire_limits(const struct wire *wire)
{
    return &wire->limits;
}

/* --- sending: with tx_lock held ------------------------------------------------------------------------------- */

/* Send one message whole. Returns 0 or -errno; `begun`: part of it is sent, so that the stream is of no use any more. */
static int send_all(struct wire *wire, struct iovec *iov, size_t count, const int *fds, size_t fd_count,
                    const struct timespec *deadline, bool *begun)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * WIRE_MAX_FDS)];
    } control;
    struct msghdr message = { .msg_iov = iov, .msg_iovlen = count };

    if (fd_count > 0) {
        struct cmsghdr *header;

        memset(&control, 0, sizeof(control));
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(header), fds, sizeof(int) * fd_count);
    }
    while (message.msg_iovlen > 0) {
        /* Not sendmsg(): that is the one in interpose.c. */
        ssize_t sent = syscall(SYS_sendmsg, wire->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent < 0 && errno == EAGAIN) {
            struct pollfd poll_out = { wire->fd, POLLOUT, 0 };
            int left = ms_until(deadline);

            if (left == 0) {
                return -ETIMEDOUT;
            }
            poll(&poll_out, 1, left);
            continue;
        }
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0) {
            return errno == EPIPE || errno == ECONNRESET ? -ENOTCONN : -errno;
        }
        *begun = true;
        message.msg_control = NULL;
        message.msg_controllen = 0;
        while (message.msg_iovlen > 0 && (size_t)sent >= message.msg_iov->iov_len) {
            sent -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (sent > 0) {
            message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

/* Send what is owed to the server: all of it until `deadline`, or (NULL) what it takes at once. */
static int send_owed(struct wire *wire, const struct timespec *deadline)
{
    for (;;) {
        struct owed *owed;
        ssize_t sent;

        pthread_mutex_lock(&wire->lock);
        owed = wire->owed;
        pthread_mutex_unlock(&wire->lock);
        if (owed == NULL) {
            return 0;
        }
        /* Only the holder of tx_lock takes from the queue, so `owed` stays its first. */
        sent = send(wire->fd, owed->message + owed->sent, owed->size - owed->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            struct pollfd poll_out = { wire->fd, POLLOUT, 0 };

            if (deadline == NULL) {
                return -EAGAIN;
            }
            if (ms_until(deadline) == 0) {
                return -ETIMEDOUT;
            }
            poll(&poll_out, 1, ms_until(deadline));
            continue;
        }
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0) {
            return -ENOTCONN;
        }
        owed->sent += (size_t)sent;
        if (owed->sent == owed->size) {
            pthread_mutex_lock(&wire->lock);
            wire->owed = owed->next;
            wire->owed_bytes -= owed->size;
            if (wire->owed == NULL) {
                wire->owed_tail = &wire->owed;
            }
            pthread_mutex_unlock(&wire->lock);
            free(owed);
        }
    }
}

static bool owes(struct wire *wire)
{
    bool any;

    pthread_mutex_lock(&wire->lock);
    any = wire->owed != NULL;
    pthread_mutex_unlock(&wire->lock);
    return any;
}

static int send_request(struct wire *wire, const struct wire_call *call, uint16_t id, uint32_t flags,
                        const struct timespec *deadline)
{
    struct vfio_user_header header = { id, call->command, sizeof(header), flags, 0 };
    struct iovec iov[1 + ARRAY_SIZE(call->request)];
    size_t count = 1;
    bool begun = false;
    int result;

    iov[0] = (struct iovec){ &header, sizeof(header) };
    for (size_t i = 0; i < ARRAY_SIZE(call->request); i++) {
        if (call->request[i].iov_len > 0) {
            iov[count++] = call->request[i];
            header.size += (uint32_t)call->request[i].iov_len;
        }
    }
    pthread_mutex_lock(&wire->tx_lock);
    result = send_owed(wire, deadline); /* one may be sent in part */
    if (result == 0) {
        result = send_all(wire, iov, count, call->send_fds, call->send_fd_count, deadline, &begun);
    }
    pthread_mutex_unlock(&wire->tx_lock);
    /* The receiver may have left a reply meanwhile, as it could not take the lock. */
    while (result == 0 && owes(wire) && pthread_mutex_trylock(&wire->tx_lock) == 0) {
        result = send_owed(wire, deadline);
        pthread_mutex_unlock(&wire->tx_lock);
    }
    /* What else can go wrong before anything is sent is the caller's: a buffer or a descriptor that is not there. */
    if (result == -ETIMEDOUT || result == -ENOTCONN || (result < 0 && begun)) {
        fail(wire, result == -ETIMEDOUT ? "the server takes no messages" : "the server is gone");
    }
    return result;
}

/* --- calls ------------------------------------------------------------------------------------------------------ */

static struct pending *enlist(struct wire *wire, struct wire_call *call)
{
    struct pending *pending = NULL;
    pthread_condattr_t attributes;

    for (size_t i = 0; i < MAX_CALLS && pending == NULL; i++) {
        if (wire->pending[i].call == NULL) {
            pending = &wire->pending[i];
        }
    }
    if (pending == NULL) {
        return NULL;
    }
    pending->call = call;
    /* The slot is part of the id, which makes it unique among those under way. */
    pending->id = (uint16_t)((wire->next_id++ * MAX_CALLS) | (uint16_t)(pending - wire->pending));
    pending->arriving = pending->done = false;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&pending->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    return pending;
}

int wire_call(struct wire *wire, struct wire_call *call)
{
    struct timespec deadline = deadline_in(config.timeout_ms);
    struct pending *pending;
    int result;

    call->head_size = call->body_size = call->fd_count = 0;
    pthread_mutex_lock(&wire->lock);
    if (wire->dead) {
        pthread_mutex_unlock(&wire->lock);
        return -ENOTCONN;
    }
    pending = enlist(wire, call);
    pthread_mutex_unlock(&wire->lock);
    if (pending == NULL) {
        return -EAGAIN;
    }
    result = send_request(wire, call, pending->id, 0, &deadline);
    pthread_mutex_lock(&wire->lock);
    if (result < 0 && !wire->dead) {
        pending->done = true; /* never sent */
    }
    while (!pending->done) {
        if (pthread_cond_timedwait(&pending->changed, &wire->lock, &deadline) == ETIMEDOUT && !pending->done) {
            char why[96];

            snprintf(why, sizeof(why), "no reply to command %u within %u ms (is it stuck, or busy with another client?)",
                     call->command, config.timeout_ms);
            result = -ETIMEDOUT;
            fail_locked(wire, why);
            /* The receiver lets go of our buffers as soon as it sees that. */
            while (!pending->done) {
                pthread_cond_wait(&pending->changed, &wire->lock);
            }
        }
    }
    if (result == 0) {
        result = pending->result;
    }
    pthread_cond_destroy(&pending->changed);
    pending->call = NULL;
    pthread_mutex_unlock(&wire->lock);
    return result;
}

int wire_post(struct wire *wire, struct wire_call *call)
{
    struct timespec deadline = deadline_in(config.timeout_ms);
    uint16_t id;

    pthread_mutex_lock(&wire->lock);
    if (wire->dead) {
        pthread_mutex_unlock(&wire->lock);
        return -ENOTCONN;
    }
    id = wire->next_id++;
    pthread_mutex_unlock(&wire->lock);
    return send_request(wire, call, id, VFIO_USER_FLAG_NO_REPLY, &deadline);
}

/* --- receiving: the connection's own thread ------------------------------------------------------------------- */

/*
 * Fill `buffer`. A message that has begun has to go on: false when it does not, and the connection has failed. When the
 * caller's buffer is not there, which sets `fault`, the rest is read past.
 */
static bool receive(struct wire *wire, void *buffer, size_t size, bool *fault)
{
    struct timespec deadline = { 0, 0 };
    char scratch[512];

    while (size > 0) {
        ssize_t count = recv(wire->fd, *fault ? scratch : buffer, *fault ? MIN(size, sizeof(scratch)) : size,
                             MSG_DONTWAIT);

        if (count < 0 && errno == EAGAIN) {
            struct pollfd poll_in = { wire->fd, POLLIN, 0 };

            if (deadline.tv_sec == 0) {
                deadline = deadline_in(config.timeout_ms);
            }
            if (ms_until(&deadline) == 0) {
                fail(wire, "the server stopped in the middle of a message");
                return false;
            }
            poll(&poll_in, 1, ms_until(&deadline));
            continue;
        }
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count < 0 && errno == EFAULT && !*fault) {
            *fault = true;
            continue;
        }
        if (count <= 0) {
            fail(wire, "the server closed the connection in the middle of a message");
            return false;
        }
        buffer = *fault ? buffer : (char *)buffer + count;
        size -= (size_t)count;
    }
    return true;
}

/* Receive a header and the descriptors that come with its first byte. */
static bool receive_header(struct wire *wire, struct vfio_user_header *header, int *fds, size_t *fd_count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * WIRE_MAX_FDS)];
    } control;
    struct iovec iov = { header, sizeof(*header) };
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
    };
    ssize_t count = recvmsg(wire->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    bool fault = false;

    *fd_count = 0;
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
        return true; /* with header->size as the caller left it: nothing there */
    }
    if (count <= 0) {
        fail(wire, "the server closed the connection");
        return false;
    }
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part != NULL; part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS) {
            *fd_count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(part), *fd_count * sizeof(int));
        }
    }
    if (message.msg_flags & MSG_CTRUNC) {
        fail(wire, "the server sent more descriptors than a message may have");
        return false;
    }
    return receive(wire, (char *)header + count, sizeof(*header) - (size_t)count, &fault);
}

static void receive_reply(struct wire *wire, const struct vfio_user_header *header, int *fds, size_t *fd_count)
{
    struct pending *pending = &wire->pending[header->id % MAX_CALLS];
    size_t size = header->size - sizeof(*header);
    struct wire_call *call;
    bool whole = true, fault = false;
    int result = 0;

    pthread_mutex_lock(&wire->lock);
    call = pending->call;
    if (wire->dead) {
        pthread_mutex_unlock(&wire->lock);
        return;
    }
    if (call == NULL || pending->done || pending->id != header->id || call->command != header->command) {
        fail_locked(wire, "the server sent a reply to what it was not asked");
    } else if ((header->flags & VFIO_USER_FLAG_ERROR) && size > 0) {
        fail_locked(wire, "the server sent an error with data");
    } else if (size > call->head_room + call->body_room) {
        fail_locked(wire, "the server sent a longer reply than there is room for");
    } else if (*fd_count > call->fd_room) {
        fail_locked(wire, "the server sent descriptors that were not asked for");
    } else {
        pending->arriving = true;
    }
    pthread_mutex_unlock(&wire->lock);
    if (wire_dead(wire)) {
        return;
    }

    if (header->flags & VFIO_USER_FLAG_ERROR) {
        result = header->error > 0 && header->error < 4096 ? -(int)header->error : -EIO;
    } else {
        call->head_size = MIN(size, call->head_room);
        call->body_size = size - call->head_size;
        whole = receive(wire, call->head, call->head_size, &fault) &&
                receive(wire, call->body, call->body_size, &fault);
        if (fault) {
            result = -EFAULT;
        } else if (whole && *fd_count > 0) {
            memcpy(call->fds, fds, *fd_count * sizeof(int));
            call->fd_count = *fd_count;
            *fd_count = 0;
        }
    }
    pthread_mutex_lock(&wire->lock);
    pending->arriving = false;
    pending->result = whole ? result : -ENOTCONN;
    pending->done = true;
    pthread_cond_signal(&pending->changed);
    pthread_mutex_unlock(&wire->lock);
}

/* Leave a reply in the queue: the receiver sends it next, or whoever is sending now. */
static void reply(struct wire *wire, const struct vfio_user_header *request, int error, size_t size)
{
    struct vfio_user_header header = { request->id, request->command, sizeof(header), VFIO_USER_FLAG_REPLY, 0 };
    struct owed *owed;

    if (error != 0) {
        header.flags |= VFIO_USER_FLAG_ERROR;
        header.error = (uint32_t)-error;
        size = 0;
    }
    header.size += (uint32_t)size;
    owed = malloc(sizeof(*owed) + header.size);
    if (owed == NULL) {
        fail(wire, "there is no memory for a reply to the server");
        return;
    }
    owed->next = NULL;
    owed->size = header.size;
    owed->sent = 0;
    memcpy(owed->message, &header, sizeof(header));
    memcpy(owed->message + sizeof(header), wire->payload, size);
    pthread_mutex_lock(&wire->lock);
    *wire->owed_tail = owed;
    wire->owed_tail = &owed->next;
    wire->owed_bytes += owed->size;
    if (wire->owed_bytes > MAX_OWED_BYTES) {
        fail_locked(wire, "the server asks without taking the answers");
    }
    pthread_mutex_unlock(&wire->lock);
}

static void receive_request(struct wire *wire, const struct vfio_user_header *header)
{
    size_t room = sizeof(struct vfio_user_dma_access) + WIRE_XFER_BYTES;
    size_t size = header->size - sizeof(*header);
    bool fault = false;
    int error;

    if (size > room) {
        fail(wire, "the server sent a request that is too long");
        return;
    }
    if (!receive(wire, wire->payload, size, &fault)) {
        return;
    }
    error = wire->handler(wire->opaque, header->command, wire->payload, &size, room);
    if (!(header->flags & VFIO_USER_FLAG_NO_REPLY)) {
        reply(wire, header, error, size);
    }
}

static void receive_message(struct wire *wire)
{
    struct vfio_user_header header = { .size = 0 };
    int fds[WIRE_MAX_FDS];
    size_t fd_count = 0;

    if (receive_header(wire, &header, fds, &fd_count) && header.size != 0) {
        uint32_t type = header.flags & VFIO_USER_FLAG_TYPE;

        if (header.size < sizeof(header) || type > VFIO_USER_FLAG_REPLY) {
            fail(wire, "the server sent what is no message");
        } else if (type == VFIO_USER_FLAG_REPLY) {
            receive_reply(wire, &header, fds, &fd_count);
        } else {
            receive_request(wire, &header);
        }
    }
    while (fd_count > 0) {
        close(fds[--fd_count]);
    }
}

static void *receiver(void *opaque)
{
    struct wire *wire = opaque;
    bool left = false; /* a reply that the server did not take at once */

    while (!wire_dead(wire)) {
        struct pollfd events = { wire->fd, (short)(POLLIN | (left ? POLLOUT : 0)), 0 };

        if (poll(&events, 1, -1) < 0) {
            continue;
        }
        if (events.revents & ~POLLOUT) {
            receive_message(wire);
        }
        left = false;
        if (owes(wire) && pthread_mutex_trylock(&wire->tx_lock) == 0) {
            int result = send_owed(wire, NULL);

            pthread_mutex_unlock(&wire->tx_lock);
            left = result == -EAGAIN;
            if (result < 0 && !left) {
                fail(wire, "the server is gone");
            }
        }
    }
    return NULL;
}

/* --- opening and closing ---------------------------------------------------------------------------------------- */

static int negotiate(struct wire *wire)
{
    static const struct vfio_user_version version = { 0, 0 };
    struct wire_call call = {
        .command = VFIO_USER_VERSION,
        .request = { { (void *)&version, sizeof(version) }, { (void *)version_proposal, strlen(version_proposal) + 1 } },
    };
    const char *why;
    int result;

    call.head_room = MAX_VERSION_BYTES;
    call.head = malloc(call.head_room);
    if (call.head == NULL) {
        return -ENOMEM;
    }
    result = wire_call(wire, &call);
    if (result == 0 && (result = version_parse(call.head, call.head_size, &wire->limits, &why)) != 0) {
        say("%s: the server sent %s", wire->socket, why);
    }
    free(call.head);
    return result;
}

static int start(struct wire *wire)
{
    sigset_t all, before;
    int error;

    /* The program's signals are for the program's threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&wire->receiver, NULL, receiver, wire);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -error;
}

static void release(struct wire *wire)
{
    close(wire->fd);
    while (wire->owed != NULL) {
        struct owed *owed = wire->owed;

        wire->owed = owed->next;
        free(owed);
    }
    pthread_mutex_destroy(&wire->lock);
    pthread_mutex_destroy(&wire->tx_lock);
    free(wire->payload);
    free(wire->socket);
    free(wire);
}

int wire_open(struct wire **result, const char *socket_path, wire_handler *handler, void *opaque)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct wire *wire;
    int error;

    if (strlen(socket_path) >= sizeof(address.sun_path)) {
        say("%s: too long for the name of a socket", socket_path);
        return -ENAMETOOLONG;
    }
    strcpy(address.sun_path, socket_path);
    wire = calloc(1, sizeof(*wire));
    if (wire == NULL) {
        return -ENOMEM;
    }
    wire->socket = strdup(socket_path);
    wire->payload = malloc(sizeof(struct vfio_user_dma_access) + WIRE_XFER_BYTES);
    wire->handler = handler;
    wire->opaque = opaque;
    wire->owed_tail = &wire->owed;
    pthread_mutex_init(&wire->lock, NULL);
    pthread_mutex_init(&wire->tx_lock, NULL);
    wire->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (wire->fd < 0 || wire->socket == NULL || wire->payload == NULL ||
        connect(wire->fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        error = errno;
        say("%s: cannot connect: %s%s", socket_path, strerror(error),
            error == ECONNREFUSED || error == ENOENT ? " (is the device server running?)" : "");
        release(wire);
        return -error;
    }
    error = start(wire);
    if (error != 0) {
        release(wire);
        return error;
    }
    error = negotiate(wire);
    if (error != 0) {
        wire_close(wire);
        return error;
    }
    *result = wire;
    return 0;
}

void wire_close(struct wire *wire)
{
    pthread_mutex_lock(&wire->lock);
    wire->closing = true;
    fail_locked(wire, "closed");
    pthread_mutex_unlock(&wire->lock);
    pthread_join(wire->receiver, NULL);
    release(wire);
}
