/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * A real socket, with a client that is slow, silent, wrong, or gone. Built with
 * a TRAN_SOCK_TIMEOUT_MS of its own.
 */

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/param.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "common.h"
#include "dma.h"
#include "libvfio-user.h"
#include "private.h"
#include "tran_sock.h"

#define MIB (1UL << 20)
#define GIB (1UL << 30)

static char dir[] = "/tmp/test-tran-sock.XXXXXX";
static char path[64];
static vfu_ctx_t *ctx;
static int sock = -1;
static int nr_resets;
static char memory[MIB];

static ssize_t
region_cb(vfu_ctx_t *c UNUSED, char *buf, size_t count, loff_t offset,
          bool is_write)
{
    offset %= MIB;
    if (is_write) {
        memcpy(memory + offset, buf, count);
    } else {
        memcpy(buf, memory + offset, count);
    }
    return count;
}

static int
reset_cb(vfu_ctx_t *c UNUSED, vfu_reset_type_t type)
{
    nr_resets += type == VFU_RESET_LOST_CONN;
    return 0;
}

static int
transition(vfu_ctx_t *c UNUSED, vfu_migr_state_t state UNUSED)
{
    return 0;
}

static ssize_t
no_data(vfu_ctx_t *c UNUSED, void *buf UNUSED, uint64_t count UNUSED)
{
    return 0;
}

#ifndef VFU_NO_MIGR_EXT
static int
precopy_info(vfu_ctx_t *c UNUSED, struct vfio_precopy_info *info UNUSED)
{
    return 0;
}
#endif

static int64_t
now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static int
setup(void **state UNUSED)
{
    static const vfu_migration_callbacks_t callbacks = {
        .version = VFU_MIGR_CALLBACKS_VERS,
        .transition = transition,
        .read_data = no_data,
        .write_data = no_data,
    };

    nr_resets = 0;
    unlink(path);
    ctx = vfu_create_ctx(VFU_TRANS_SOCK, path, LIBVFIO_USER_FLAG_ATTACH_NB,
                         NULL, VFU_DEV_TYPE_PCI);
    if (ctx == NULL ||
        vfu_pci_init(ctx, VFU_PCI_TYPE_EXPRESS, PCI_HEADER_TYPE_NORMAL,
                     0) < 0) {
        return -1;
    }
    vfu_pci_get_config_space(ctx)->hdr.bars[2].raw |=
        PCI_BASE_ADDRESS_MEM_TYPE_64;
    if (vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, MIB, region_cb,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, NULL, 0, -1,
                         0) < 0 ||
        vfu_setup_region(ctx, VFU_PCI_DEV_BAR2_REGION_IDX, 8 * GIB, region_cb,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, NULL, 0, -1,
                         0) < 0 ||
        vfu_setup_device_nr_irqs(ctx, VFU_DEV_MSIX_IRQ, 2) < 0 ||
        vfu_setup_device_reset_cb(ctx, reset_cb) < 0 ||
        vfu_setup_device_dma(ctx, NULL, NULL) < 0 ||
        vfu_setup_device_migration_callbacks(ctx, &callbacks) < 0 ||
        vfu_realize_ctx(ctx) < 0) {
        return -1;
    }
    return 0;
}

static int
teardown(void **state UNUSED)
{
    if (sock != -1) {
        close(sock);
        sock = -1;
    }
    vfu_destroy_ctx(ctx);
    unlink(path);
    return 0;
}

static void
connect_client(void)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };

    strcpy(addr.sun_path, path);
    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_true(sock >= 0);
    assert_int_equal(0, connect(sock, (struct sockaddr *)&addr, sizeof(addr)));
}

static void
send_bytes(const void *data, size_t size)
{
    assert_int_equal(size, send(sock, data, size, MSG_NOSIGNAL));
}

static size_t
make_msg(void *buf, uint16_t cmd, const void *body, size_t size)
{
    struct vfio_user_header hdr = {
        .msg_id = 7, .cmd = cmd, .msg_size = sizeof(hdr) + size
    };

    memcpy(buf, &hdr, sizeof(hdr));
    memcpy((char *)buf + sizeof(hdr), body, size);
    return sizeof(hdr) + size;
}

static void
send_msg(uint16_t cmd, const void *body, size_t size)
{
    char buf[4096];

    assert_true(size <= sizeof(buf) - 16);
    send_bytes(buf, make_msg(buf, cmd, body, size));
}

/* Receives a reply, whose body has @size bytes; returns its errno. */
static int
recv_reply(void *body, size_t size)
{
    struct vfio_user_header hdr;

    assert_int_equal(sizeof(hdr), recv(sock, &hdr, sizeof(hdr), MSG_WAITALL));
    assert_int_equal(7, hdr.msg_id);
    assert_int_equal(VFIO_USER_F_TYPE_REPLY, hdr.flags.type);
    if (hdr.flags.error) {
        assert_int_equal(sizeof(hdr), hdr.msg_size);
        return hdr.error_no;
    }
    assert_int_equal(sizeof(hdr) + size, hdr.msg_size);
    assert_true(size == 0 ||
                recv(sock, body, size, MSG_WAITALL) == (ssize_t)size);
    return 0;
}

static void
assert_run_fails(int err)
{
    assert_int_equal(-1, vfu_run_ctx(ctx));
    assert_int_equal(err, errno);
}

/* As vfu_run_ctx() fails in the end, without ever holding us up. */
static void
assert_run_fails_in_time(int err)
{
    int64_t start = now();
    int timeout;

    while (vfu_run_ctx(ctx) >= 0) {
        assert_true(now() - start < 20 * TRAN_SOCK_TIMEOUT_MS);
        assert_int_not_equal(0, vfu_get_poll_events(ctx, &timeout));
        assert_in_range(timeout, 0, TRAN_SOCK_TIMEOUT_MS);
        poll(NULL, 0, MIN(timeout, 10));
    }
    assert_int_equal(err, errno);
    assert_in_range(now() - start, TRAN_SOCK_TIMEOUT_MS - 1,
                    20 * TRAN_SOCK_TIMEOUT_MS);
}

/* The version exchange; returns the server's capabilities. */
static const char *
attach(const char *caps)
{
    static char reply[1024];
    struct vfio_user_header *hdr = (void *)reply;
    char body[512] = { LIB_VFIO_USER_MAJOR, 0, LIB_VFIO_USER_MINOR, 0 };

    connect_client();
    strcpy(body + 4, caps);
    send_msg(VFIO_USER_VERSION, body, 4 + strlen(caps) + 1);
    if (vfu_attach_ctx(ctx) < 0) {
        close(sock);
        sock = -1;
        return NULL;
    }
    assert_int_equal(16, recv(sock, reply, 16, MSG_WAITALL));
    assert_true(hdr->msg_size < sizeof(reply));
    assert_int_equal(hdr->msg_size - 16, recv(sock, reply + 16,
                                              hdr->msg_size - 16, MSG_WAITALL));
    return reply + 20;
}

#define CAPS(c) "{\"capabilities\":{" c "}}"

static void
test_version(void **state UNUSED)
{
    static const char *const bad[] = {
        "{", CAPS("\"max_msg_fds\":-1"), CAPS("\"max_msg_fds\":\"1\""),
        CAPS("\"max_msg_fds\":4294967297"), CAPS("\"max_data_xfer_size\":0"),
        CAPS("\"max_data_xfer_size\":-1"), CAPS("\"migration\":1"),
        CAPS("\"migration\":{\"pgsize\":4095}"),
        CAPS("\"migration_precopy_info\":1"),
    };
    static const char *const one[][2] = {
        { CAPS(""), CAPS("") },
        { CAPS("\"something\":{}"), CAPS("") },
        { CAPS("\"max_msg_fds\":1"), CAPS("\"max_msg_fds\":8") },
        { CAPS("\"max_data_xfer_size\":1"),
          CAPS("\"max_data_xfer_size\":1048576") },
        { CAPS("\"migration\":{\"pgsize\":8192}"),
          CAPS("\"migration\":{\"pgsize\":8192,\"max_bitmap_size\":1048576}") },
    };
    const char *caps;
    size_t i;

    for (i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_null(attach(bad[i]));
        assert_int_equal(EINVAL, errno);
    }

    /* Only what the client proposed, and what the device can do. */
    caps = attach(CAPS("\"migration_precopy_info\":true"));
    assert_non_null(caps);
    assert_null(strstr(caps, "precopy"));
    close(sock);
    assert_run_fails(ENOTCONN);

#ifndef VFU_NO_MIGR_EXT
    vfu_migration_ext_t ext = {
        .version = VFU_MIGR_EXT_VERS,
        .migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY,
        .precopy_info = precopy_info,
    };

    assert_true(vfu_client_has_precopy_info(ctx));
    assert_int_equal(0, vfu_setup_device_migration_ext(ctx, &ext));
    caps = attach(CAPS("\"migration_precopy_info\":true"));
    assert_non_null(strstr(caps, "\"migration_precopy_info\":true"));
    assert_true(vfu_client_has_precopy_info(ctx));
    close(sock);
    assert_run_fails(ENOTCONN);

    caps = attach(CAPS(""));
    assert_null(strstr(caps, "precopy"));
    assert_false(vfu_client_has_precopy_info(ctx));
    close(sock);
    assert_run_fails(ENOTCONN);
#endif

    /* Whatever is proposed comes alone, and the report's limit with migration. */
    for (i = 0; i < ARRAY_SIZE(one); i++) {
        caps = attach(one[i][0]);
        assert_string_equal(one[i][1], caps);
        close(sock);
        assert_run_fails(ENOTCONN);
    }
    caps = attach(CAPS("\"max_msg_fds\":1,\"max_data_xfer_size\":4096"));
    assert_string_equal(CAPS("\"max_msg_fds\":8,\"max_data_xfer_size\":1048576"),
                        caps);
}

static void
test_silent(void **state UNUSED)
{
    int64_t start = now();

    connect_client();
    assert_int_equal(-1, vfu_attach_ctx(ctx));
    assert_int_equal(ETIMEDOUT, errno);
    assert_in_range(now() - start, TRAN_SOCK_TIMEOUT_MS,
                    20 * TRAN_SOCK_TIMEOUT_MS);
    close(sock);

    assert_int_equal(-1, vfu_attach_ctx(ctx));
    assert_int_equal(EAGAIN, errno);
    assert_non_null(attach(CAPS("")));
}

static struct {
    const char *data;
    size_t size, chunk;
    int pause_ms;
} script;

static void *
send_script(void *arg UNUSED)
{
    size_t done = 0;

    while (done < script.size) {
        ssize_t ret = send(sock, script.data + done,
                           MIN(script.chunk, script.size - done), MSG_NOSIGNAL);

        if (ret <= 0) {
            break;
        }
        done += ret;
        poll(NULL, 0, script.pause_ms);
    }
    return (void *)done;
}

static void *
recv_script(void *arg UNUSED)
{
    static char sink[16 + 16 + MIB];

    poll(NULL, 0, 50);
    return (void *)recv(sock, sink, sizeof(sink), MSG_WAITALL);
}

/* The largest write, which no socket buffer holds, and the largest read. */
static void
test_large(void **state UNUSED)
{
    struct vfio_user_region_access ra = {
        .region = VFU_PCI_DEV_BAR0_REGION_IDX, .count = MIB
    };
    char *buf = malloc(16 + 16 + MIB), *body = malloc(16 + MIB);
    pthread_t thread;
    void *ret;
    size_t i;

    assert_non_null(attach(CAPS("")));
    memcpy(body, &ra, sizeof(ra));
    for (i = 0; i < MIB; i++) {
        body[16 + i] = i * 7 + (i >> 8);
    }
    script.data = buf;
    script.size = make_msg(buf, VFIO_USER_REGION_WRITE, body, 16 + MIB);
    script.chunk = 100000;
    script.pause_ms = 2;
    assert_int_equal(0, pthread_create(&thread, NULL, send_script, NULL));
    while (vfu_run_ctx(ctx) == 0) {
        poll(NULL, 0, 1);
    }
    pthread_join(thread, &ret);
    assert_int_equal(script.size, (size_t)ret);
    assert_int_equal(0, recv_reply(&ra, sizeof(ra)));
    assert_int_equal(MIB, ra.count);
    assert_memory_equal(body + 16, memory, MIB);

    send_msg(VFIO_USER_REGION_READ, &ra, sizeof(ra));
    assert_int_equal(0, pthread_create(&thread, NULL, recv_script, NULL));
    assert_int_equal(1, vfu_run_ctx(ctx));
    while (vfu_get_poll_events(ctx, NULL) == POLLOUT) {
        assert_int_equal(0, vfu_run_ctx(ctx));
    }
    pthread_join(thread, &ret);
    assert_int_equal(16 + 16 + MIB, (size_t)ret);
    assert_int_equal(0, nr_resets);
    free(buf);
    free(body);
}

/* A header in two pieces, each of every length. */
static void
test_split_header(void **state UNUSED)
{
    struct vfio_user_device_info info = { .argsz = sizeof(info) };
    char buf[64];
    size_t size, i;

    assert_non_null(attach(CAPS("")));
    size = make_msg(buf, VFIO_USER_DEVICE_GET_INFO, &info, sizeof(info));
    for (i = 1; i < size; i++) {
        pthread_t thread;

        script.data = buf;
        script.size = size;
        script.chunk = i;
        script.pause_ms = 1;
        assert_int_equal(0, pthread_create(&thread, NULL, send_script, NULL));
        while (vfu_run_ctx(ctx) == 0) {
            poll(NULL, 0, 1);
        }
        pthread_join(thread, NULL);
        assert_int_equal(0, recv_reply(&info, sizeof(info)));
        assert_int_equal(VFU_PCI_DEV_NUM_REGIONS, info.num_regions);
        assert_int_equal(9, info.num_regions);
    }
}

/* The client falls silent, or leaves, after each part of a message. */
static void
test_half_message(void **state UNUSED)
{
    struct vfio_user_device_info info = { .argsz = sizeof(info) };
    char buf[64];
    size_t size = make_msg(buf, VFIO_USER_DEVICE_GET_INFO, &info, sizeof(info));
    size_t i;

    for (i = 1; i < size; i++) {
        assert_non_null(attach(CAPS("")));
        send_bytes(buf, i);
        if (i != 8 && i != 24) {
            close(sock);
            sock = -1;
        }
        if (sock != -1) {
            assert_run_fails_in_time(ENOTCONN);
            close(sock);
        } else {
            assert_run_fails(ENOTCONN);
        }
        assert_int_equal(i, nr_resets);
    }
    assert_non_null(attach(CAPS("")));
}

/* A byte now and then does not extend the time. */
static void
test_drip(void **state UNUSED)
{
    char buf[16 + 1000], body[1000] = { 0 };
    pthread_t thread;
    int64_t start;
    void *sent;

    assert_non_null(attach(CAPS("")));
    script.data = buf;
    script.size = make_msg(buf, VFIO_USER_REGION_WRITE, body, sizeof(body));
    script.chunk = 1;
    script.pause_ms = 10;
    start = now();
    assert_int_equal(0, pthread_create(&thread, NULL, send_script, NULL));
    while (vfu_run_ctx(ctx) == 0) {
        poll(NULL, 0, 1);
    }
    assert_int_equal(ENOTCONN, errno);
    assert_in_range(now() - start, TRAN_SOCK_TIMEOUT_MS,
                    20 * TRAN_SOCK_TIMEOUT_MS);
    pthread_join(thread, &sent);
    assert_true((size_t)sent < script.size);
    assert_int_equal(1, nr_resets);
}

/* The server's end of the connection takes no more than about @size bytes. */
static void
limit_buffer(int size)
{
    size /= 2;          /* the kernel doubles it */
    assert_int_equal(0, setsockopt(vfu_get_poll_fd(ctx), SOL_SOCKET, SO_SNDBUF,
                                   &size, sizeof(size)));
}

/* A client that asks, but does not read the answers. */
static void
test_never_reads(void **state UNUSED)
{
    struct vfio_user_region_access ra = {
        .region = VFU_PCI_DEV_BAR0_REGION_IDX, .count = MIB
    };
    struct vfio_user_device_info info = { .argsz = sizeof(info) };
    static char reply[16 + 16 + MIB];
    struct vfio_user_header hdr;
    int timeout;
    size_t i;

    /* If it reads in the end, all is there, in order, and nothing was lost. */
    assert_non_null(attach(CAPS("")));
    limit_buffer(200000);
    for (i = 0; i < MIB; i++) {
        memory[i] = i * 11 + (i >> 8);
    }
    send_msg(VFIO_USER_REGION_READ, &ra, sizeof(ra));
    send_msg(VFIO_USER_DEVICE_GET_INFO, &info, sizeof(info));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, vfu_run_ctx(ctx));
    assert_int_equal(POLLOUT, vfu_get_poll_events(ctx, &timeout));
    assert_in_range(timeout, 1, TRAN_SOCK_TIMEOUT_MS);
    for (i = 0; i < sizeof(reply); ) {
        ssize_t ret = recv(sock, reply + i, MIN(10000, sizeof(reply) - i),
                           MSG_DONTWAIT);

        assert_true(ret > 0);
        i += ret;
        if (i < sizeof(reply)) {
            assert_int_equal(0, vfu_run_ctx(ctx) & ~1);
        }
    }
    memcpy(&hdr, reply, sizeof(hdr));
    assert_int_equal(sizeof(reply), hdr.msg_size);
    assert_memory_equal(reply + 32, memory, MIB);
    while (vfu_get_poll_events(ctx, NULL) == POLLOUT) {
        vfu_run_ctx(ctx);
    }
    vfu_run_ctx(ctx);
    assert_int_equal(0, recv_reply(&info, sizeof(info)));
    assert_int_equal(POLLIN, vfu_get_poll_events(ctx, &timeout));
    assert_int_equal(-1, timeout);

    send_msg(VFIO_USER_REGION_READ, &ra, sizeof(ra));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_run_fails_in_time(ENOTCONN);
    assert_int_equal(1, nr_resets);
}

static void
test_bad_header(void **state UNUSED)
{
    struct vfio_user_device_info info = { .argsz = sizeof(info) };
    struct vfio_user_header hdr = { .msg_id = 7, .cmd = 4 };
    char buf[64];
    size_t size;

    assert_non_null(attach(CAPS("")));

    /* Its body is not the next header. */
    size = make_msg(buf, VFIO_USER_DEVICE_GET_INFO, &info, sizeof(info));
    ((struct vfio_user_header *)buf)->flags.type = VFIO_USER_F_TYPE_REPLY;
    send_bytes(buf, size);
    assert_int_equal(0, vfu_run_ctx(ctx));
    assert_int_equal(EINVAL, recv_reply(NULL, 0));
    send_msg(VFIO_USER_DEVICE_GET_INFO, &info, sizeof(info));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(&info, sizeof(info)));

    /* An error comes without what was prepared for success. */
    send_msg(VFIO_USER_MAX, &info, sizeof(info));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(EINVAL, recv_reply(NULL, 0));

    /* Too large to skip. */
    hdr.msg_size = UINT32_MAX;
    send_bytes(&hdr, sizeof(hdr));
    assert_run_fails(ENOTCONN);
    assert_int_equal(EINVAL, recv_reply(NULL, 0));
    assert_int_equal(0, recv(sock, buf, 1, 0));
}

static uint32_t
config(size_t offset, uint32_t val, size_t count, bool is_write)
{
    struct vfio_user_region_access ra = {
        .offset = offset, .region = VFU_PCI_DEV_CFG_REGION_IDX, .count = count
    };
    char body[20];

    memcpy(body, &ra, sizeof(ra));
    memcpy(body + sizeof(ra), &val, count);
    send_msg(is_write ? VFIO_USER_REGION_WRITE : VFIO_USER_REGION_READ, body,
             sizeof(ra) + (is_write ? count : 0));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(body, sizeof(ra) + (is_write ? 0 : count)));
    memcpy(&val, body + sizeof(ra), count);
    return val;
}

static void
test_config_space(void **state UNUSED)
{
    struct vfio_region_info info = {
        .argsz = sizeof(info), .index = VFU_PCI_DEV_BAR2_REGION_IDX
    };

    assert_non_null(attach(CAPS("")));

    /* A byte of a register leaves the others alone. */
    config(PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, 2, true);
    config(PCI_COMMAND, PCI_COMMAND_MEMORY, 1, true);
    assert_int_equal(PCI_COMMAND_INTX_DISABLE | PCI_COMMAND_MEMORY,
                     config(PCI_COMMAND, 0, 2, false));

    /* A region of more than 4 GiB, and its BAR. */
    send_msg(VFIO_USER_DEVICE_GET_REGION_INFO, &info, sizeof(info));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(&info, sizeof(info)));
    assert_int_equal(8 * GIB, info.size);
    assert_int_equal(4, config(PCI_BASE_ADDRESS_2, 0, 4, false));
    assert_int_equal(0, config(PCI_BASE_ADDRESS_3, 0, 4, false));
    config(PCI_BASE_ADDRESS_2, ~0U, 4, true);
    config(PCI_BASE_ADDRESS_3, ~0U, 4, true);
    assert_int_equal(4, config(PCI_BASE_ADDRESS_2, 0, 4, false));
    assert_int_equal(~0U << 1, config(PCI_BASE_ADDRESS_3, 0, 4, false));
    config(PCI_BASE_ADDRESS_3, 0x10, 4, true);
    assert_int_equal(0x10, config(PCI_BASE_ADDRESS_3, 0, 4, false));
}

static void
send_with_fd(uint16_t cmd, const void *body, size_t size, int fd)
{
    char buf[256], control[CMSG_SPACE(sizeof(fd))] = { 0 };
    struct iovec iov = { .iov_base = buf };
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1,
        .msg_control = control, .msg_controllen = sizeof(control)
    };
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&m);

    iov.iov_len = make_msg(buf, cmd, body, size);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof(fd));
    memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
    assert_int_equal(iov.iov_len, sendmsg(sock, &m, MSG_NOSIGNAL));
}

static void
test_irqs(void **state UNUSED)
{
    struct vfio_irq_set set = {
        .argsz = sizeof(set),
        .flags = VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_EVENTFD,
        .index = VFIO_PCI_ERR_IRQ_INDEX, .count = 1
    };
    int err_fd = eventfd(0, EFD_NONBLOCK), fd = eventfd(0, EFD_NONBLOCK);
    eventfd_t val;

    assert_non_null(attach(CAPS("")));

    /* ERR is not vector 0. */
    send_with_fd(VFIO_USER_DEVICE_SET_IRQS, &set, sizeof(set), err_fd);
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(NULL, 0));
    assert_int_equal(-1, vfu_irq_trigger(ctx, 0));
    assert_int_equal(-1, eventfd_read(err_fd, &val));

    set.index = VFIO_PCI_MSIX_IRQ_INDEX;
    set.start = 1;
    send_with_fd(VFIO_USER_DEVICE_SET_IRQS, &set, sizeof(set), fd);
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(NULL, 0));
    assert_int_equal(0, vfu_irq_trigger(ctx, 1));
    assert_int_equal(0, eventfd_read(fd, &val));

    /* start + count is 0 in 32 bits. */
    set.count = UINT32_MAX;
    send_msg(VFIO_USER_DEVICE_SET_IRQS, &set, sizeof(set));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(EINVAL, recv_reply(NULL, 0));
    assert_int_equal(0, vfu_irq_trigger(ctx, 1));

    set.count = 1;
    send_msg(VFIO_USER_DEVICE_SET_IRQS, &set, sizeof(set));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(NULL, 0));
    assert_int_equal(-1, vfu_irq_trigger(ctx, 1));
    close(err_fd);
    close(fd);
}

/* Answers DMA by message; stops after the number of messages in @arg. */
static void *
serve_dma(void *arg)
{
    int left = *(int *)arg;

    while (left-- > 0) {
        char buf[16 + 16 + 100];
        struct vfio_user_header *hdr = (void *)buf;
        struct vfio_user_dma_region_access *dma = (void *)(buf + 16);
        size_t size;

        if (recv(sock, hdr, 16, MSG_WAITALL) != 16 ||
            hdr->msg_size > sizeof(buf)) {
            return NULL;
        }
        size = hdr->msg_size - 16;
        if (recv(sock, dma, size, MSG_WAITALL) != (ssize_t)size ||
            dma->count > 100 || dma->addr < 0x10000) {
            return NULL;
        }
        hdr->msg_size = 32;
        hdr->flags.type = VFIO_USER_F_TYPE_REPLY;
        if (hdr->cmd == VFIO_USER_DMA_READ) {
            memcpy(dma->data, memory + dma->addr - 0x10000, dma->count);
            hdr->msg_size += dma->count;
        } else if (size != 16 + dma->count) {
            return NULL;
        } else {
            memcpy(memory + dma->addr - 0x10000, dma->data, dma->count);
        }
        if (send(sock, buf, hdr->msg_size, MSG_NOSIGNAL) < 0) {
            return NULL;
        }
    }
    return arg;
}

static void
test_dma_by_message(void **state UNUSED)
{
    struct vfio_user_dma_map map = {
        .argsz = sizeof(map), .flags = 3, .addr = 0x10000, .size = 0x10000
    };
    char out[250], in[250];
    dma_sg_t sg;
    pthread_t thread;
    int nr = 6;
    void *ok;
    size_t i;

    assert_non_null(attach(CAPS("\"max_data_xfer_size\":100")));
    send_msg(VFIO_USER_DMA_MAP, &map, sizeof(map));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(NULL, 0));
    for (i = 0; i < sizeof(out); i++) {
        out[i] = i * 3;
    }
    memset(memory, 0, sizeof(memory));

    assert_int_equal(0, pthread_create(&thread, NULL, serve_dma, &nr));
    assert_int_equal(1, vfu_addr_to_sgl(ctx, (void *)0x12345, sizeof(out), &sg,
                                        1, PROT_READ | PROT_WRITE));
    assert_int_equal(0, vfu_sgl_write(ctx, &sg, 1, out));
    assert_int_equal(0, vfu_sgl_read(ctx, &sg, 1, in));
    pthread_join(thread, &ok);
    assert_ptr_equal(&nr, ok);
    assert_memory_equal(out, memory + 0x2345, sizeof(out));
    assert_int_equal(0, memory[0x2344]);
    assert_int_equal(0, memory[0x2345 + sizeof(out)]);
    assert_memory_equal(out, in, sizeof(out));

    /* Nobody answers. */
    assert_int_equal(-1, vfu_sgl_read(ctx, &sg, 1, in));
    assert_int_equal(ENOTCONN, errno);
    assert_int_equal(1, nr_resets);
}

/* What cross_dma() does when a request for DMA has come. */
struct crossing {
    bool reads;         /* read a region, and wait for that reply first */
    int nr_infos;       /* send requests that have to wait */
    bool large;         /* large ones */
    bool silent;        /* leave it at that */
    uint16_t id_offset; /* reply to another message than this */
    int pause_ms;       /* reply after so long */
    const char *rest;   /* send the rest of a message first */
    size_t rest_size;
    struct vfio_user_header late;
    bool ok;
};

static void *
cross_dma(void *arg)
{
    struct vfio_user_region_access read = {
        .region = VFU_PCI_DEV_BAR0_REGION_IDX, .offset = 0x100, .count = 4
    };
    uint32_t info[1000] = { sizeof(struct vfio_device_info) };
    struct vfio_user_dma_region_access dma;
    struct vfio_user_header hdr;
    struct crossing *x = arg;
    char reply[36];
    int i;

    x->ok = recv(sock, &hdr, 16, MSG_WAITALL) == 16 &&
            recv(sock, &dma, 16, MSG_WAITALL) == 16 && dma.count == 4;
    if (x->rest_size > 0) {
        send_bytes(x->rest, x->rest_size);
    }
    poll(NULL, 0, x->pause_ms);
    if (x->reads) {
        send_msg(VFIO_USER_REGION_READ, &read, sizeof(read));
        x->ok = x->ok && recv_reply(reply, 20) == 0 &&
                memcmp(reply + 16, "abcd", 4) == 0;
    }
    for (i = 0; i < x->nr_infos; i++) {
        send_msg(VFIO_USER_DEVICE_GET_INFO, info,
                 x->large ? sizeof(info) : info[0]);
    }
    hdr.msg_size = 36;
    hdr.flags.type = VFIO_USER_F_TYPE_REPLY;
    hdr.msg_id += x->id_offset;
    x->late = hdr;
    if (!x->silent) {
        memcpy(reply, &hdr, 16);
        memcpy(reply + 16, &dma, 16);
        memcpy(reply + 32, "efgh", 4);
        send_bytes(reply, 36);
    }
    return NULL;
}

static int
crossed_read(struct crossing *x, char *in)
{
    pthread_t thread;
    dma_sg_t sg;
    int ret, err;

    assert_int_equal(1, vfu_addr_to_sgl(ctx, (void *)0x12000, 4, &sg, 1,
                                        PROT_READ));
    assert_int_equal(0, pthread_create(&thread, NULL, cross_dma, x));
    ret = vfu_sgl_read(ctx, &sg, 1, in);
    err = errno;
    pthread_join(thread, NULL);
    assert_true(x->ok);
    return ret == 0 ? 0 : err;
}

static void
attach_with_dma(void)
{
    struct vfio_user_dma_map map = {
        .argsz = sizeof(map), .flags = 3, .addr = 0x10000, .size = 0x10000
    };

    assert_non_null(attach(CAPS("")));
    send_msg(VFIO_USER_DMA_MAP, &map, sizeof(map));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(NULL, 0));
}

/*
 * A client need not reply to DMA before its own requests were replied to.
 */
static void
test_requests_cross_dma(void **state UNUSED)
{
    struct crossing x = { .reads = true }, y = { .nr_infos = 2 };
    struct crossing z = { .nr_infos = 1, .silent = true };
    struct crossing lost = { .id_offset = 100 };
    char in[4], info[sizeof(struct vfio_user_device_info)];
    int64_t began;
    int i;

    attach_with_dma();
    memcpy(memory + 0x100, "abcd", 4);

    /* An access to a region is served in the middle. */
    assert_int_equal(0, crossed_read(&x, in));
    assert_memory_equal("efgh", in, 4);
    assert_false(vfu_has_request(ctx));

    /* Others wait until it is over, and then are served in their order. */
    memset(in, 0, 4);
    assert_int_equal(0, crossed_read(&y, in));
    assert_memory_equal("efgh", in, 4);
    for (i = 0; i < 2; i++) {
        assert_true(vfu_has_request(ctx));
        assert_int_equal(1, vfu_run_ctx(ctx));
        assert_int_equal(0, recv_reply(info, sizeof(info)));
    }
    assert_false(vfu_has_request(ctx));

    /* They do not wait for ever, and a reply that is late does no harm. */
    began = now();
    assert_int_equal(EBUSY, crossed_read(&z, in));
    assert_in_range(now() - began, TRAN_SOCK_TIMEOUT_MS / 5 - 1,
                    TRAN_SOCK_TIMEOUT_MS - 1);
    assert_true(vfu_has_request(ctx));
    send_bytes(&z.late, 16);
    send_bytes("0123456789abcdefghij", 20);
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(info, sizeof(info)));
    assert_int_equal(0, vfu_run_ctx(ctx));
    assert_int_equal(0, crossed_read(&x, in));

    /* It may come while the next one is waited for. */
    assert_int_equal(EBUSY, crossed_read(&z, in));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(info, sizeof(info)));
    send_bytes(&z.late, 16);
    send_bytes("0123456789abcdefghij", 20);
    assert_int_equal(0, crossed_read(&x, in));
    assert_int_equal(0, nr_resets);

    /* Another reply than any that is due is the end. */
    assert_int_equal(ENOTCONN, crossed_read(&lost, in));
    assert_int_equal(1, nr_resets);
}

static ssize_t
reading_cb(vfu_ctx_t *c, char *buf UNUSED, size_t count, loff_t offset UNUSED,
           bool is_write UNUSED)
{
    dma_sg_t sg;
    char in[4];

    assert_int_equal(1, vfu_addr_to_sgl(c, (void *)0x12000, 4, &sg, 1,
                                        PROT_READ));
    assert_int_equal(-1, vfu_sgl_read(c, &sg, 1, in));
    assert_int_equal(EBUSY, errno);
    memcpy(buf, "abcd", 4);
    return count;
}

/* No transfer in a transfer; and what waits is not kept from a lost client. */
static void
test_crossing_ends(void **state UNUSED)
{
    struct crossing x = { .reads = true };
    /* One more than are kept, and some that are still on their way then. */
    struct crossing y = {
        .nr_infos = MAX_QUEUED_SIZE / (sizeof(vfu_msg_t) + 16 + 4000) + 10,
        .large = true
    };
    char in[4];

    attach_with_dma();

    ctx->reg_info[VFU_PCI_DEV_BAR0_REGION_IDX].cb = reading_cb;
    assert_int_equal(0, crossed_read(&x, in));

    /* A client that asks and asks finds an end to it. */
    assert_int_equal(EBUSY, crossed_read(&y, in));
    assert_true(vfu_has_request(ctx));
    close(sock);
    sock = -1;
    while (vfu_run_ctx(ctx) >= 0) {
    }
    assert_int_equal(ENOTCONN, errno);
    assert_false(vfu_has_request(ctx));
    assert_int_equal(1, nr_resets);
}

static ssize_t
silent_cb(vfu_ctx_t *c UNUSED, char *buf UNUSED, size_t count UNUSED,
          loff_t offset UNUSED, bool is_write UNUSED)
{
    return ERROR_INT(0);
}

/* Whoever fails and does not say why has failed. */
static void
test_failure_without_errno(void **state UNUSED)
{
    struct vfio_user_region_access read = {
        .region = VFU_PCI_DEV_BAR0_REGION_IDX, .count = 4
    };

    assert_non_null(attach(CAPS("")));
    ctx->reg_info[VFU_PCI_DEV_BAR0_REGION_IDX].cb = silent_cb;
    send_msg(VFIO_USER_REGION_READ, &read, sizeof(read));
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(EIO, recv_reply(NULL, 0));
}

/*
 * Every command with bodies of every length, whether it makes sense or not:
 * each gets one reply, and a sanitizer sees what is read of it.
 */
static void
test_any_length(void **state UNUSED)
{
    char body[64], reply[4096];
    struct vfio_user_header *hdr = (void *)reply;
    uint16_t cmd;
    size_t size;
    int fill;

    assert_non_null(attach(CAPS("")));
    for (cmd = VFIO_USER_VERSION; cmd <= VFIO_USER_MAX; cmd++) {
        for (size = 1; size < sizeof(body); size++) {
            for (fill = 0; fill < 256; fill += 51) {
                memset(body, fill, sizeof(body));
                send_msg(cmd, body, size);
                assert_int_equal(1, vfu_run_ctx(ctx));
                assert_int_equal(16, recv(sock, reply, 16, MSG_WAITALL));
                assert_in_range(hdr->msg_size, 16, sizeof(reply));
                size_t left = hdr->msg_size - 16;
                assert_true(left == 0 || recv(sock, reply, left, MSG_WAITALL)
                                         == (ssize_t)left);
            }
        }
    }
    assert_int_equal(0, nr_resets);
}

/* A client that others accepted, and that has said who it is. */
static void
test_attach_fd(void **state UNUSED)
{
    char body[] = { LIB_VFIO_USER_MAJOR, 0, LIB_VFIO_USER_MINOR, 0 };
    struct vfio_user_device_info info = { .argsz = sizeof(info) };
    char msg[64], reply[1024];
    size_t i, size = make_msg(msg, VFIO_USER_VERSION, body, sizeof(body));
    vfu_ctx_t *other;
    int pair[2];

    other = vfu_create_ctx(VFU_TRANS_SOCK, "", LIBVFIO_USER_FLAG_ATTACH_NB |
                           LIBVFIO_USER_FLAG_ATTACH_FD, NULL,
                           VFU_DEV_TYPE_PCI);
    assert_non_null(other);
    assert_int_equal(0, socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    sock = pair[0];
    assert_int_equal(-1, vfu_attach_fd(other, pair[1], msg, size));
    assert_int_equal(EINVAL, errno);        /* not realized */
    assert_int_equal(0, vfu_pci_init(other, VFU_PCI_TYPE_EXPRESS,
                                     PCI_HEADER_TYPE_NORMAL, 0));
    assert_int_equal(0, vfu_realize_ctx(other));
    assert_int_equal(-1, vfu_get_poll_fd(other));

    /* Less than it says it is, or nothing of the kind. */
    for (i = 0; i < size; i++) {
        assert_int_equal(-1, vfu_attach_fd(other, pair[1], msg, i));
        assert_int_equal(EINVAL, errno);
    }
    msg[2] = VFIO_USER_DMA_MAP;
    assert_int_equal(-1, vfu_attach_fd(other, pair[1], msg, size));
    assert_int_equal(EINVAL, recv_reply(NULL, 0));
    msg[2] = VFIO_USER_VERSION;

    assert_int_equal(0, vfu_attach_fd(other, pair[1], msg, size));
    assert_int_equal(pair[1], vfu_get_poll_fd(other));
    assert_true(recv(sock, reply, sizeof(reply), 0) > 20);
    assert_int_equal(-1, vfu_attach_fd(other, pair[1], msg, size));
    assert_int_equal(EBUSY, errno);
    send_msg(VFIO_USER_DEVICE_GET_INFO, &info, sizeof(info));
    assert_int_equal(1, vfu_run_ctx(other));
    assert_int_equal(0, recv_reply(&info, sizeof(info)));
    close(sock);
    sock = -1;
    assert_int_equal(-1, vfu_run_ctx(other));
    assert_int_equal(ENOTCONN, errno);
    assert_int_equal(-1, vfu_get_poll_fd(other));
    vfu_destroy_ctx(other);
}

/* No room for what comes with a message: that one is refused, no more. */
static void
test_no_free_fd(void **state UNUSED)
{
    struct vfio_user_dma_map map = {
        .argsz = sizeof(map), .flags = 3, .addr = 0x10000, .size = 0x1000
    };
    struct rlimit limit, none;
    int fd = memfd_create("test", 0);

    assert_int_equal(0, ftruncate(fd, 0x1000));
    assert_non_null(attach(CAPS("")));
    send_with_fd(VFIO_USER_DMA_MAP, &map, sizeof(map), fd);
    assert_int_equal(0, getrlimit(RLIMIT_NOFILE, &limit));
    none = (struct rlimit){ dup(fd), limit.rlim_max };
    close(none.rlim_cur);
    assert_int_equal(0, setrlimit(RLIMIT_NOFILE, &none));
    assert_int_equal(0, vfu_run_ctx(ctx));
    assert_int_equal(EMFILE, recv_reply(NULL, 0));
    assert_int_equal(0, setrlimit(RLIMIT_NOFILE, &limit));
    send_with_fd(VFIO_USER_DMA_MAP, &map, sizeof(map), fd);
    assert_int_equal(1, vfu_run_ctx(ctx));
    assert_int_equal(0, recv_reply(NULL, 0));
    close(fd);
}

static int nr_waits;
static bool give_up;

static int
wait_cb(vfu_ctx_t *c, int fd, int events, int timeout_ms)
{
    struct pollfd pfd = { .fd = fd, .events = events };

    assert_ptr_equal(ctx, c);
    assert_int_equal(vfu_get_poll_fd(c), fd);
    assert_in_range(timeout_ms, 0, TRAN_SOCK_TIMEOUT_MS);
    nr_waits++;
    return give_up ? 0 : poll(&pfd, 1, timeout_ms);
}

/* While the reply to a DMA transfer is waited for, others can be served. */
static void
test_wait_cb(void **state UNUSED)
{
    struct crossing x = { 0 };
    char in[4];

    attach_with_dma();
    vfu_setup_wait_cb(ctx, wait_cb);
    nr_waits = 0;
    give_up = false;
    x.pause_ms = 50;
    assert_int_equal(0, crossed_read(&x, in));
    assert_true(nr_waits > 0);

    /* It may also decide that it is no use. */
    give_up = true;
    x.silent = true;
    assert_int_equal(ENOTCONN, crossed_read(&x, in));
}

/* A request of which a part has come when a transfer begins. */
static void
test_part_before_dma(void **state UNUSED)
{
    struct vfio_user_device_info info = { .argsz = sizeof(info) };
    char buf[64], in[4];
    size_t i, size = make_msg(buf, VFIO_USER_DEVICE_GET_INFO, &info,
                              sizeof(info));

    attach_with_dma();
    for (i = 1; i < size; i++) {
        struct crossing x = { .rest = buf + i, .rest_size = size - i };

        send_bytes(buf, i);
        assert_int_equal(0, vfu_run_ctx(ctx));
        memset(in, 0, sizeof(in));
        assert_int_equal(0, crossed_read(&x, in));
        assert_memory_equal("efgh", in, 4);
        assert_int_equal(0, vfu_get_poll_events(ctx, NULL));
        assert_int_equal(1, vfu_run_ctx(ctx));
        assert_int_equal(0, recv_reply(&info, sizeof(info)));
    }
}

#ifndef VFU_NO_MIGR_EXT
/* More vectors than one sendmsg() takes, of odd lengths, MIB bytes together. */
static struct iovec vectors[3000];

static ssize_t
gather(vfu_ctx_t *c UNUSED, uint64_t count, const struct iovec **iov)
{
    assert_int_equal(MIB, count);
    *iov = vectors;
    return ARRAY_SIZE(vectors);
}

/*
 * What was gathered arrives as it was when it was asked for: to a client that
 * reads at once, and to one that reads when the device has gone on.
 */
static void
test_gather(void **state UNUSED)
{
    static char reply[8 + MIB], expected[MIB];
    uint32_t req[2] = { 8 + MIB, MIB };
    uint32_t to_pre_copy[4] = {
        16, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_SET,
        VFIO_DEVICE_STATE_PRE_COPY, -1
    };
    size_t i, done = 0;
    int late;

    for (i = 0; i < MIB; i++) {
        memory[i] = i * 31 + (i >> 10);
    }
    for (i = 0; i < ARRAY_SIZE(vectors); i++) {
        size_t len = i + 1 == ARRAY_SIZE(vectors) ? MIB - done : 1 + i % 600;

        vectors[i] = (struct iovec){ memory + done, len };
        done += len;
    }

    for (late = 0; late < 2; late++) {
        memcpy(expected, memory, MIB);
        assert_non_null(attach(CAPS("\"max_data_xfer_size\":1048576")));
        if (late) {
            /* Too small for the reply: the library has to keep a part. */
            limit_buffer(200000);
        }
        assert_int_equal(0, vfu_setup_migration_gather(ctx, gather));
        send_msg(VFIO_USER_DEVICE_FEATURE, to_pre_copy, sizeof(to_pre_copy));
        assert_int_equal(1, vfu_run_ctx(ctx));
        assert_int_equal(0, recv_reply(reply, 16));
        send_msg(VFIO_USER_MIG_DATA_READ, req, sizeof(req));
        assert_int_equal(1, vfu_run_ctx(ctx));
        assert_int_equal(late ? POLLOUT : POLLIN,
                         vfu_get_poll_events(ctx, NULL));
        memset(memory, late, MIB);
        if (late) {
            struct vfio_user_header hdr;
            char *data = reply;
            size_t left = sizeof(reply);

            assert_int_equal(sizeof(hdr), recv(sock, &hdr, sizeof(hdr),
                                               MSG_WAITALL));
            assert_int_equal(sizeof(hdr) + sizeof(reply), hdr.msg_size);
            while (left > 0) {
                ssize_t ret = recv(sock, data, left, MSG_DONTWAIT);

                if (ret > 0) {
                    data += ret;
                    left -= ret;
                } else {
                    assert_true(vfu_run_ctx(ctx) >= 0);
                }
            }
        } else {
            assert_int_equal(0, recv_reply(reply, sizeof(reply)));
        }
        assert_memory_equal(reply + 8, expected, MIB);
        close(sock);
        sock = -1;
        assert_run_fails(ENOTCONN);
    }
}
#endif

int
main(void)
{
#define TEST(t) cmocka_unit_test_setup_teardown(t, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_version),
        TEST(test_silent),
        TEST(test_large),
        TEST(test_split_header),
        TEST(test_half_message),
        TEST(test_drip),
        TEST(test_never_reads),
        TEST(test_bad_header),
        TEST(test_config_space),
        TEST(test_irqs),
        TEST(test_dma_by_message),
        TEST(test_requests_cross_dma),
        TEST(test_crossing_ends),
        TEST(test_failure_without_errno),
        TEST(test_any_length),
        TEST(test_attach_fd),
        TEST(test_no_free_fd),
        TEST(test_wait_cb),
        TEST(test_part_before_dma),
#ifndef VFU_NO_MIGR_EXT
        TEST(test_gather),
#endif
    };
    int ret;

    if (mkdtemp(dir) == NULL) {
        return EXIT_FAILURE;
    }
    snprintf(path, sizeof(path), "%s/sock", dir);
    ret = cmocka_run_group_tests(tests, NULL, NULL);
    rmdir(dir);
    return ret;
}
