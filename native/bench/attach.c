/*
 * A connection's start, and what is known of it from then on.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/un.h>
#include <unistd.h>

#include "attach.h"
#include "wire.h"

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

int sock;
uint16_t last_id;
uint16_t replied;
uint8_t *window;
uint32_t places_count;
uint8_t received[2 * PIECE];
size_t taken, have;

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

void
attach(const char *path, uint32_t places)
{
    const char *text = places > 0 ? with_window : plain;
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
    if (places > 0) {
        places_count = places;
        share_window();
    }
}
