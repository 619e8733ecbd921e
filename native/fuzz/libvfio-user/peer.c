/*
 * The client's end of the device's connection, and time.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "device_private.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_TURNS 20000

/* With these names in place of poll() and clock_gettime() the library is compiled. */
int fuzz_poll(struct pollfd *polled, nfds_t count, int timeout);
static void drain(void);
int fuzz_clock_gettime(clockid_t clock, struct timespec *now);

bool (*feed)(void);

static int client = -1;
static uint16_t next_id;
static int64_t now_ms; /* since the device was opened */
static bool busy; /* the server waits for an answer: it cannot be run */

/* --- time -------------------------------------------------------------------------------------------------------- */

void time_passes(unsigned int ms)
{
    now_ms += ms;
}

int fuzz_clock_gettime(clockid_t clock, struct timespec *now)
{
    (void)clock;
    now->tv_sec = 1000 + now_ms / 1000;
    now->tv_nsec = now_ms % 1000 * 1000000;
    return 0;
}

int fuzz_poll(struct pollfd *polled, nfds_t count, int timeout)
{
    int ready = poll(polled, count, 0);

    if (busy) {
        drain(); /* what the server asks for is judged by what is mapped now, not when its patience is over */
    }
    while (ready == 0 && timeout != 0 && busy && feed != NULL && feed()) {
        ready = poll(polled, count, 0);
    }
    if (ready == 0 && timeout != 0) {
        now_ms += timeout > 0 ? timeout : 3600000;
    }
    return ready;
}

int peer_wait(vfu_ctx_t *ctx, int fd, int events, int timeout_ms)
{
    struct pollfd polled = { .fd = fd, .events = (short)events };

    (void)ctx;
    return fuzz_poll(&polled, 1, timeout_ms);
}

/* --- what is sent ------------------------------------------------------------------------------------------------ */

void client_send(const void *bytes, size_t size, const int *fds, size_t fd_count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control = { .bytes = { 0 } };
    struct iovec iov = { (void *)(uintptr_t)bytes, size };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

    if (client < 0 || size == 0) {
        return;
    }
    if (fd_count > 0) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        CMSG_FIRSTHDR(&message)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&message)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&message)->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), fds, sizeof(int) * fd_count);
    }
    for (bool again = false; iov.iov_len > 0;) {
        ssize_t count = sendmsg(client, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (count > 0) {
            messages_sent(iov.iov_base, (size_t)count);
            iov.iov_base = (char *)iov.iov_base + count;
            iov.iov_len -= (size_t)count;
            message.msg_controllen = 0;
            message.msg_control = NULL;
            again = false;
        } else if (count < 0 && errno == EAGAIN && !again && !busy) {
            device_run(); /* it has to take something first */
            again = true;
        } else {
            client_hang_up();
            return;
        }
        if (client < 0) {
            return;
        }
    }
}

uint16_t client_message(uint16_t command, uint32_t flags, const void *body, size_t size, const int *fds,
                        size_t fd_count)
{
    static uint8_t message[sizeof(struct vfio_user_header) + (1 << 17)];
    const uint32_t words[] = { (uint32_t)(sizeof(struct vfio_user_header) + size), flags, 0 };
    uint16_t id = next_id++;

    memcpy(message, &id, 2);
    memcpy(message + 2, &command, 2);
    memcpy(message + 4, words, sizeof(words));
    if (size > 0) {
        memcpy(message + sizeof(struct vfio_user_header), body, size);
    }
    client_send(message, sizeof(struct vfio_user_header) + size, fds, fd_count);
    return id;
}

/* --- what is received -------------------------------------------------------------------------------------------- */

/* Receive what there is; the descriptors that come with it are of no interest, but there may not be too many. */
static void drain(void)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * 64)];
    } control;

    while (client >= 0) {
        struct iovec iov;
        struct msghdr message = {
            .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
        };
        ssize_t count;

        iov.iov_base = messages_room(&iov.iov_len);
        count = recvmsg(client, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (count <= 0) {
            return;
        }
        for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part != NULL; part = CMSG_NXTHDR(&message, part)) {
            size_t fd_count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            int fd;

            for (size_t i = 0; i < fd_count; i++) {
                memcpy(&fd, CMSG_DATA(part) + i * sizeof(fd), sizeof(fd));
                close(fd);
            }
            if (fd_count > 16) {
                fault("%zu descriptors with one message", fd_count);
            }
        }
        if (message.msg_flags & MSG_CTRUNC) {
            fault("more descriptors with one message than there may be");
        }
        messages_received((size_t)count);
    }
}

static void forget_connection(void)
{
    drain();
    if (client >= 0) {
        close(client);
    }
    client = -1;
    messages_forget();
}

void client_hang_up(void)
{
    forget_connection();
    if (!busy) {
        device_run();
    }
}

/* --- the connection ---------------------------------------------------------------------------------------------- */

bool device_attached(void)
{
    return vfu_get_poll_fd(device) >= 0;
}

bool device_attach(const void *data, size_t size)
{
    static const char good[] = "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576,"
                               "\"migration\":{\"pgsize\":4096},\"migration_precopy_info\":true,"
                               "\"migration_data_window\":1048576}}";
    static uint8_t message[sizeof(struct vfio_user_header) + sizeof(struct vfio_user_version) + (1 << 16)];
    struct vfio_user_header header = { .msg_id = next_id++, .cmd = VFIO_USER_VERSION };
    int ends[2];

    if (data == NULL) {
        memset(message + sizeof(header), 0, sizeof(struct vfio_user_version));
        memcpy(message + sizeof(header) + sizeof(struct vfio_user_version), good, sizeof(good));
        size = sizeof(struct vfio_user_version) + sizeof(good);
    } else {
        memcpy(message + sizeof(header), data, size);
    }
    header.msg_size = (uint32_t)(sizeof(header) + size);
    memcpy(message, &header, sizeof(header));
    if (device_attached() || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        return false;
    }
    forget_connection();
    client = ends[0];
    messages_sent(message, header.msg_size);
    if (vfu_attach_fd(device, ends[1], message, header.msg_size) != 0) {
        close(ends[1]);
        forget_connection();
        return false;
    }
    drain();
    return true;
}

/* The server has something to do: a message to go on with, a queued request, or room for what it owes. */
static bool has_work(void)
{
    struct pollfd polled = { .fd = vfu_get_poll_fd(device) };
    int left;

    polled.events = (short)vfu_get_poll_events(device, &left);
    return polled.events == 0 || poll(&polled, 1, 0) > 0 || left == 0;
}

void device_run(void)
{
    int turns = 0;

    while (!busy && device_attached() && has_work()) {
        int result = vfu_run_ctx(device);

        if (result < 0 && errno == EBUSY) {
            break; /* it quiesces */
        }
        if (!(setup & SETUP_UNREAD)) {
            drain();
        }
        if (++turns > MAX_TURNS) {
            fault("the server is busy for ever");
        }
    }
    if (!busy && !device_attached()) {
        forget_connection();
    }
}

int client_call(uint16_t command, const void *body, size_t size, int fd, void *reply, size_t *reply_size)
{
    messages_await(next_id, reply, reply_size != NULL ? *reply_size : 0);
    client_message(command, 0, body, size, &fd, fd >= 0);
    device_run();
    drain();
    return messages_awaited(reply_size);
}

/* --- the device's own doing -------------------------------------------------------------------------------------- */

int device_dma(uint64_t address, void *data, size_t size, int flags)
{
    int result;

    busy = true;
    result = vfu_dma_access(device, (vfu_dma_addr_t)(uintptr_t)address, data, size, flags);
    busy = false;
    messages_asked(&(struct dma_request){ 0 }, true);
    device_run();
    return result;
}

void device_quiesced(void)
{
    device_quiescing = false;
    vfu_device_quiesced(device, 0); /* a device that fails to: see native/libvfio-user/README.md */
    device_run();
}

bool client_asked(struct dma_request *request)
{
    drain();
    return messages_asked(request, false);
}

bool client_answers_late(const void *body, size_t size)
{
    static uint8_t message[sizeof(struct vfio_user_header) + (1 << 17)];
    const struct dma_request before = messages_asked_before();
    const struct vfio_user_header header = {
        .msg_id = before.id, .cmd = before.command, .flags.type = VFIO_USER_F_TYPE_REPLY,
        .msg_size = (uint32_t)(sizeof(header) + size),
    };

    if (before.count == 0) {
        return false;
    }
    memcpy(message, &header, sizeof(header));
    memcpy(message + sizeof(header), body, size);
    client_send(message, sizeof(header) + size, NULL, 0);
    return true;
}

void client_answer(uint32_t flags, uint32_t error, const void *body, size_t size)
{
    static uint8_t message[sizeof(struct vfio_user_header) + (1 << 17)];
    const uint32_t words[] = { (uint32_t)(sizeof(struct vfio_user_header) + size), flags, error };
    struct dma_request asked;

    messages_asked(&asked, true);
    memcpy(message, &asked.id, 2);
    memcpy(message + 2, &asked.command, 2);
    memcpy(message + 4, words, sizeof(words));
    if (size > 0) {
        memcpy(message + sizeof(struct vfio_user_header), body, size);
    }
    client_send(message, sizeof(struct vfio_user_header) + size, NULL, 0);
}

/* --- for device.c ------------------------------------------------------------------------------------------------ */

void peer_open(void)
{
    now_ms = 0;
    next_id = 1;
    busy = false;
    feed = NULL;
    client = -1;
    forget_connection();
}

void peer_settle(void)
{
    for (int i = 0; i < 64 && device_attached(); i++) {
        drain(); /* first: a server whose replies are not read has nothing else to do */
        if (i > 0 && !has_work()) {
            break;
        }
        device_run();
    }
    drain();
    if (!device_attached() || (setup & SETUP_QUIESCE_LATE)) {
        return;
    }
    messages_check_answered();
}

void peer_close(void)
{
    forget_connection();
}
