/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* The migration state machine, its requests, and bad ones. */

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/param.h>
#include <unistd.h>

#include "common.h"
#include "device_feature.h"
#include "dma.h"
#include "libvfio-user.h"
#include "migration.h"
#include "migration_priv.h"
#include "private.h"

#define ST(s) VFIO_DEVICE_STATE_ ## s
#define GET(f) (VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_ ## f)
#define SET(f) (VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_ ## f)
#define PROBE VFIO_DEVICE_FEATURE_PROBE

static const uint64_t all_flags[] = {
    VFIO_MIGRATION_STOP_COPY,
    VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P,
    VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY,
    VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY,
};

/* The device under test: what it was asked for, and what it is to answer. */
static struct {
    vfu_ctx_t *ctx;
    vfu_migr_state_t arcs[8];
    size_t nr_arcs;
    int fail_arc;               /* index of the arc that fails, or -1 */
    bool broken;                /* ... and takes the device to ERROR */
    int reset_errno;
    uint32_t state_in_reset;
    ssize_t read_ret;
    ssize_t write_ret;
    struct vfio_precopy_info info;
    int nr_v2;
} dev;

static vfu_msg_t msg;

static const vfu_migr_state_t to_vfu[] = {
    [ST(ERROR)] = VFU_MIGR_STATE_ERROR,
    [ST(STOP)] = VFU_MIGR_STATE_STOP,
    [ST(RUNNING)] = VFU_MIGR_STATE_RUNNING,
    [ST(STOP_COPY)] = VFU_MIGR_STATE_STOP_AND_COPY,
    [ST(RESUMING)] = VFU_MIGR_STATE_RESUME,
    [ST(RUNNING_P2P)] = VFU_MIGR_STATE_RUNNING_P2P,
    [ST(PRE_COPY)] = VFU_MIGR_STATE_PRE_COPY,
    [ST(PRE_COPY_P2P)] = VFU_MIGR_STATE_PRE_COPY_P2P,
};

static int
transition(vfu_ctx_t *ctx, vfu_migr_state_t state)
{
    assert_true(dev.nr_arcs < ARRAY_SIZE(dev.arcs));

    if (dev.fail_arc == (int)dev.nr_arcs) {
        if (dev.broken) {
            ctx->migration->state = ST(ERROR);
        }
        return ERROR_INT(EBUSY);
    }

    dev.arcs[dev.nr_arcs++] = state;
    return 0;
}

static ssize_t
read_data(vfu_ctx_t *ctx UNUSED, void *buf, uint64_t count)
{
    if (dev.read_ret < 0) {
        return ERROR_INT(EIO);
    }
    memset(buf, 0x5a, MIN(count, (uint64_t)dev.read_ret));
    return dev.read_ret;
}

static ssize_t
write_data(vfu_ctx_t *ctx UNUSED, void *buf, uint64_t count)
{
    if (dev.write_ret < 0) {
        return ERROR_INT(EBADMSG);
    }
    assert_int_equal(0xa5, ((uint8_t *)buf)[count - 1]);
    return dev.write_ret;
}

static int
reset_cb(vfu_ctx_t *ctx, vfu_reset_type_t type UNUSED)
{
    dev.state_in_reset = ctx->migration->state;
    return dev.reset_errno == 0 ? 0 : ERROR_INT(dev.reset_errno);
}

static const vfu_migration_callbacks_t callbacks = {
    .version = VFU_MIGR_CALLBACKS_VERS,
    .transition = transition,
    .read_data = read_data,
    .write_data = write_data,
};

#ifndef VFU_NO_MIGR_EXT
static int
precopy_info(vfu_ctx_t *ctx UNUSED, struct vfio_precopy_info *info)
{
    assert_int_equal(0, info->flags);
    assert_int_equal(0, info->initial_bytes);
    *info = dev.info;
    return 0;
}

static int
data_size(vfu_ctx_t *ctx UNUSED, uint64_t *stop_copy_length)
{
    *stop_copy_length = 0x123456789abcULL;
    return 0;
}

static int
precopy_info_v2(vfu_ctx_t *ctx UNUSED, bool enabled)
{
    assert_true(enabled);
    dev.nr_v2++;
    return 0;
}

static vfu_migration_ext_t
make_ext(uint64_t flags)
{
    return (vfu_migration_ext_t) {
        .version = VFU_MIGR_EXT_VERS,
        .migration_flags = flags,
        .precopy_info = precopy_info,
        .data_size = data_size,
        .precopy_info_v2 = precopy_info_v2,
    };
}

static void
extend(uint64_t flags)
{
    vfu_migration_ext_t ext = make_ext(flags);

    assert_int_equal(0, vfu_setup_device_migration_ext(dev.ctx, &ext));
}
#endif

static void
free_reply(void)
{
    free(msg.out.iov.iov_base);
    free(msg.out_iovecs);
    memset(&msg, 0, sizeof(msg));
}

static int
setup(void **state UNUSED)
{
    memset(&dev, 0, sizeof(dev));
    memset(&msg, 0, sizeof(msg));
    dev.fail_arc = -1;
    dev.ctx = vfu_create_ctx(VFU_TRANS_PIPE, "test", 0, NULL,
                             VFU_DEV_TYPE_PCI);
    if (dev.ctx == NULL ||
        vfu_setup_device_migration_callbacks(dev.ctx, &callbacks) < 0 ||
        vfu_setup_device_dma(dev.ctx, NULL, NULL) < 0 ||
        vfu_setup_device_reset_cb(dev.ctx, reset_cb) < 0) {
        return -1;
    }
    dev.ctx->client_max_data_xfer_size = SERVER_MAX_DATA_XFER_SIZE;
    return 0;
}

static int
teardown(void **state UNUSED)
{
    free_reply();
    vfu_destroy_ctx(dev.ctx);
    return 0;
}

/*
 * Makes @data the body of a request, in memory of exactly this size, so that
 * reading past its end does not go unnoticed by a sanitizer.
 */
static int
request(int (*handler)(vfu_ctx_t *, vfu_msg_t *), const void *data, size_t size)
{
    void *body = malloc(size == 0 ? 1 : size);
    int ret;

    assert_non_null(body);
    memcpy(body, data, size);
    free_reply();
    msg.in.iov.iov_base = body;
    msg.in.iov.iov_len = size;
    errno = 0;
    ret = handler(dev.ctx, &msg);
    free(body);
    msg.in.iov.iov_base = NULL;
    return ret;
}

static int
feature(uint32_t flags, uint32_t argsz, const void *data, size_t size)
{
    uint8_t buf[512];

    assert_true(size + 8 <= sizeof(buf));
    memcpy(buf, &argsz, 4);
    memcpy(buf + 4, &flags, 4);
    memcpy(buf + 8, data, size);
    return request(handle_device_feature, buf, size + 8);
}

static void
assert_fails(int err, int ret)
{
    assert_int_equal(-1, ret);
    assert_int_equal(err, errno);
}

static int
set_state(uint32_t state)
{
    uint32_t data[2] = { state, -1 };

    return feature(SET(MIG_DEVICE_STATE), 16, data, 8);
}

static uint32_t
get_state(void)
{
    uint32_t reply[4];

    assert_int_equal(0, feature(GET(MIG_DEVICE_STATE), 16, "", 0));
    assert_int_equal(sizeof(reply), msg.out.iov.iov_len);
    memcpy(reply, msg.out.iov.iov_base, sizeof(reply));
    assert_int_equal(16, reply[0]);
    assert_int_equal(GET(MIG_DEVICE_STATE), reply[1]);
    assert_int_equal((uint32_t)-1, reply[3]);
    return reply[2];
}

static void
force_state(uint32_t state)
{
    dev.ctx->migration->state = state;
    dev.ctx->migration->set_failed = false;
    dev.nr_arcs = 0;
    dev.fail_arc = -1;
    dev.broken = false;
}

/*
 * The oracle: the arcs that <linux/vfio.h> lists, or, for a device without P2P,
 * the vfio-user specification, and a breadth-first search.
 */
static const struct {
    uint32_t from, to;
    bool p2p, no_p2p;           /* in a device with, without P2P */
} arcs[] = {
    { ST(RUNNING_P2P), ST(STOP), true, false },
    { ST(STOP_COPY), ST(STOP), true, true },
    { ST(RESUMING), ST(STOP), true, true },
    { ST(PRE_COPY), ST(RUNNING), true, true },
    { ST(RUNNING_P2P), ST(RUNNING), true, false },
    { ST(PRE_COPY_P2P), ST(RUNNING_P2P), true, false },
    { ST(RUNNING), ST(RUNNING_P2P), true, false },
    { ST(STOP), ST(RUNNING_P2P), true, false },
    { ST(RUNNING), ST(PRE_COPY), true, true },
    { ST(RUNNING_P2P), ST(PRE_COPY_P2P), true, false },
    { ST(STOP), ST(STOP_COPY), true, true },
    { ST(PRE_COPY), ST(PRE_COPY_P2P), true, false },
    { ST(PRE_COPY_P2P), ST(PRE_COPY), true, false },
    { ST(PRE_COPY_P2P), ST(STOP_COPY), true, false },
    { ST(STOP), ST(RESUMING), true, true },
    { ST(RUNNING), ST(STOP), false, true },
    { ST(STOP), ST(RUNNING), false, true },
    { ST(PRE_COPY), ST(STOP_COPY), false, true },
};

static bool
exists(uint64_t flags, uint32_t state)
{
    switch (state) {
    case ST(RUNNING_P2P):
        return (flags & VFIO_MIGRATION_P2P) != 0;
    case ST(PRE_COPY):
        return (flags & VFIO_MIGRATION_PRE_COPY) != 0;
    case ST(PRE_COPY_P2P):
        return (flags & VFIO_MIGRATION_P2P) != 0 &&
               (flags & VFIO_MIGRATION_PRE_COPY) != 0;
    }
    return state < MIGR_NR_STATES;
}

static bool
is_saving(uint32_t state)
{
    return state == ST(STOP_COPY) || state == ST(PRE_COPY) ||
           state == ST(PRE_COPY_P2P);
}

/*
 * Searches for the shortest path whose interior states are all outside or, with
 * @inside, all inside the saving group. Stores it without its start; returns
 * its length, 0 for none. Two shortest paths would make the rules ambiguous.
 */
static size_t
search(uint64_t flags, uint32_t from, uint32_t to, bool inside, uint32_t *path)
{
    bool p2p = (flags & VFIO_MIGRATION_P2P) != 0;
    uint32_t queue[MIGR_NR_STATES], prev[MIGR_NR_STATES];
    size_t dist[MIGR_NR_STATES] = { 0 }, ways[MIGR_NR_STATES] = { 0 };
    size_t head = 0, tail = 0, i, len;

    queue[tail++] = from;
    ways[from] = 1;

    while (head < tail) {
        uint32_t at = queue[head++];

        if (at != from && is_saving(at) != inside) {
            continue;
        }
        for (i = 0; i < ARRAY_SIZE(arcs); i++) {
            uint32_t next = arcs[i].to;

            if (arcs[i].from != at || !exists(flags, at) ||
                !exists(flags, next) ||
                !(p2p ? arcs[i].p2p : arcs[i].no_p2p)) {
                continue;
            }
            if (ways[next] == 0) {
                ways[next] = ways[at];
                dist[next] = dist[at] + 1;
                prev[next] = at;
                queue[tail++] = next;
            } else if (dist[next] == dist[at] + 1) {
                ways[next] += ways[at];
            }
        }
    }

    if (ways[to] == 0) {
        return 0;
    }
    assert_int_equal(1, ways[to]);
    len = dist[to];
    for (i = len; i > 0; i--) {
        path[i - 1] = to;
        to = prev[to];
    }
    return len;
}

static size_t
oracle(uint64_t flags, uint32_t from, uint32_t to, uint32_t *path)
{
    size_t len;

    /* Not permitted, although there is a way round through STOP. */
    if (from == ST(STOP_COPY) && is_saving(to)) {
        return 0;
    }
    /* Within one data transfer session, if possible. */
    if (is_saving(from) && is_saving(to)) {
        len = search(flags, from, to, true, path);
        if (len != 0) {
            return len;
        }
    }
    return search(flags, from, to, false, path);
}

static void
test_paths(void **state UNUSED)
{
    size_t f, nr_paths = 0, nr_refused = 0;
    uint32_t from, to;

    for (f = 0; f < ARRAY_SIZE(all_flags); f++) {
        for (from = 0; from < MIGR_NR_STATES; from++) {
            for (to = 0; to < MIGR_NR_STATES + 2; to++) {
                uint32_t path[MIGR_NR_STATES];
                size_t len = 0, i;

                if (!exists(all_flags[f], from)) {
                    continue;
                }
                dev.ctx->migration->flags = all_flags[f];
                force_state(from);

                if (from != ST(ERROR) && to != ST(ERROR) &&
                    exists(all_flags[f], to)) {
                    len = oracle(all_flags[f], from, to, path);
                }

                if (len == 0 && (from != to || from == ST(ERROR))) {
                    assert_fails(EINVAL, set_state(to));
                    assert_int_equal(from, get_state());
                    assert_int_equal(0, dev.nr_arcs);
                    nr_refused++;
                    continue;
                }

                assert_int_equal(0, set_state(to));
                assert_int_equal(16, msg.out.iov.iov_len);
                assert_int_equal(to, get_state());
                assert_int_equal(len, dev.nr_arcs);
                for (i = 0; i < len; i++) {
                    assert_int_equal(to_vfu[path[i]], dev.arcs[i]);
                }
                nr_paths++;

                /* Each arc fails once: the last state reached remains. */
                for (i = 0; i < len; i++) {
                    force_state(from);
                    dev.fail_arc = i;
                    assert_fails(EBUSY, set_state(to));
                    assert_int_equal(i == 0 ? from : path[i - 1], get_state());

                    force_state(from);
                    dev.fail_arc = i;
                    dev.broken = true;
                    assert_fails(EBUSY, set_state(to));
                    assert_int_equal(ST(ERROR), get_state());
                }
            }
        }
    }

    /*
     * A device has 4, 5, 5 or 7 states besides ERROR, and each of them leads to
     * all of them, except for STOP_COPY to those of pre-copy.
     */
    assert_int_equal(4 * 4 + 5 * 5 + (5 * 5 - 1) + (7 * 7 - 2), nr_paths);
    assert_int_not_equal(0, nr_refused);
}

static void
test_examples(void **state UNUSED)
{
    dev.ctx->migration->flags = all_flags[2];
    force_state(ST(RUNNING));
    assert_int_equal(0, set_state(ST(STOP_COPY)));
    assert_int_equal(2, dev.nr_arcs);
    assert_int_equal(VFU_MIGR_STATE_STOP, dev.arcs[0]);

    force_state(ST(PRE_COPY));
    assert_int_equal(0, set_state(ST(STOP_COPY)));
    assert_int_equal(1, dev.nr_arcs);

    dev.ctx->migration->flags = all_flags[3];
    force_state(ST(PRE_COPY));
    assert_int_equal(0, set_state(ST(STOP_COPY)));
    assert_int_equal(2, dev.nr_arcs);
    assert_int_equal(VFU_MIGR_STATE_PRE_COPY_P2P, dev.arcs[0]);

    force_state(ST(RESUMING));
    assert_int_equal(0, set_state(ST(PRE_COPY)));
    assert_int_equal(4, dev.nr_arcs);
    assert_int_equal(VFU_MIGR_STATE_STOP, dev.arcs[0]);
    assert_int_equal(VFU_MIGR_STATE_RUNNING_P2P, dev.arcs[1]);
    assert_int_equal(VFU_MIGR_STATE_RUNNING, dev.arcs[2]);
}

static void
test_reset(void **state UNUSED)
{
    uint32_t s;

    /* A sound device stays where it is, whatever the guest does. */
    for (s = ST(STOP); s < MIGR_NR_STATES; s++) {
        force_state(s);
        assert_int_equal(0, handle_device_reset(dev.ctx, VFU_RESET_DEVICE));
        assert_int_equal(s, dev.state_in_reset);
        assert_int_equal(0, vfu_reset_device(dev.ctx, VFU_RESET_PCI_FLR));
        assert_int_equal(s, dev.state_in_reset);
        assert_int_equal(s, get_state());
        assert_int_equal(0, dev.nr_arcs);
    }

    /* The way out of ERROR. */
    force_state(ST(ERROR));
    assert_fails(EINVAL, set_state(ST(RUNNING)));
    assert_int_equal(0, handle_device_reset(dev.ctx, VFU_RESET_DEVICE));
    assert_int_equal(ST(RUNNING), dev.state_in_reset);
    assert_int_equal(ST(RUNNING), get_state());

    /* The same by a reset that the device found in its configuration space. */
    force_state(ST(ERROR));
    assert_int_equal(0, vfu_reset_device(dev.ctx, VFU_RESET_PCI_FLR));
    assert_int_equal(ST(RUNNING), dev.state_in_reset);
    assert_int_equal(ST(RUNNING), get_state());
    assert_fails(EINVAL, vfu_reset_device(dev.ctx, VFU_RESET_LOST_CONN));

    /* After a failure, once. */
    force_state(ST(STOP));
    dev.fail_arc = 0;
    assert_fails(EBUSY, set_state(ST(STOP_COPY)));
    assert_int_equal(0, handle_device_reset(dev.ctx, VFU_RESET_DEVICE));
    assert_int_equal(ST(RUNNING), dev.state_in_reset);
    dev.fail_arc = -1;
    assert_int_equal(0, set_state(ST(STOP)));
    assert_int_equal(0, handle_device_reset(dev.ctx, VFU_RESET_DEVICE));
    assert_int_equal(ST(STOP), get_state());

    /* After a failure and a success. */
    dev.fail_arc = dev.nr_arcs;
    assert_fails(EBUSY, set_state(ST(RESUMING)));
    dev.fail_arc = -1;
    assert_int_equal(0, set_state(ST(RESUMING)));
    assert_int_equal(0, handle_device_reset(dev.ctx, VFU_RESET_DEVICE));
    assert_int_equal(ST(RESUMING), get_state());

    /* The device refuses: it is where it was, and the next try works. */
    force_state(ST(ERROR));
    dev.reset_errno = EAGAIN;
    assert_fails(EAGAIN, handle_device_reset(dev.ctx, VFU_RESET_DEVICE));
    assert_int_equal(ST(ERROR), get_state());
    dev.reset_errno = 0;
    assert_int_equal(0, handle_device_reset(dev.ctx, VFU_RESET_DEVICE));
    assert_int_equal(ST(RUNNING), get_state());

    /* A lost connection. */
    for (s = ST(ERROR); s < MIGR_NR_STATES; s++) {
        force_state(s);
        assert_int_equal(s, migration_reset(dev.ctx, VFU_RESET_LOST_CONN));
        assert_int_equal(ST(RUNNING), get_state());
    }
}

static void
test_read(void **state UNUSED)
{
    uint32_t req[3] = { 8 + 100, 100, 0 };
    const uint8_t *reply;
    uint32_t head[2], s, i;

    for (s = ST(ERROR); s < MIGR_NR_STATES; s++) {
        force_state(s);
        dev.read_ret = 60;
        if (!is_saving(s)) {
            assert_fails(EINVAL, request(handle_mig_data_read, req, 8));
            continue;
        }
        for (i = 0; i <= 100; i += 50) {
            dev.read_ret = i;
            assert_int_equal(0, request(handle_mig_data_read, req, 8));
            assert_int_equal(8 + i, msg.out.iov.iov_len);
            reply = msg.out.iov.iov_base;
            memcpy(head, reply, sizeof(head));
            assert_int_equal(8 + i, head[0]);
            assert_int_equal(i, head[1]);
            assert_true(i == 0 || reply[8 + i - 1] == 0x5a);
        }
    }

    /* The device fails, or claims to have overrun the buffer. */
    dev.read_ret = -1;
    assert_fails(EIO, request(handle_mig_data_read, req, 8));
    dev.read_ret = 101;
    assert_fails(EIO, request(handle_mig_data_read, req, 8));

    /* Lengths of the client. */
    dev.read_ret = 0;
    for (i = 0; i < 8; i++) {
        assert_fails(EINVAL, request(handle_mig_data_read, req, i));
    }
    req[0] = 8 + 99;
    assert_fails(EINVAL, request(handle_mig_data_read, req, 8));
    req[0] = 0;
    assert_fails(EINVAL, request(handle_mig_data_read, req, 8));
    req[0] = UINT32_MAX;
    req[1] = UINT32_MAX;
    assert_fails(EINVAL, request(handle_mig_data_read, req, 8));
    req[1] = SERVER_MAX_DATA_XFER_SIZE + 1;
    assert_fails(EINVAL, request(handle_mig_data_read, req, 8));
    req[1]--;
    assert_int_equal(0, request(handle_mig_data_read, req, 8));
    dev.ctx->client_max_data_xfer_size = 4096;
    assert_fails(EINVAL, request(handle_mig_data_read, req, 8));
}

static void
test_write(void **state UNUSED)
{
    uint8_t req[8 + 100];
    uint32_t size = 100, s, i;

    memset(req, 0xa5, sizeof(req));
    memcpy(req + 4, &size, 4);

    for (s = ST(ERROR); s < MIGR_NR_STATES; s++) {
        force_state(s);
        dev.write_ret = size;
        if (s == ST(RESUMING)) {
            assert_int_equal(0, request(handle_mig_data_write, req, 108));
            assert_int_equal(0, msg.out.iov.iov_len);
        } else {
            assert_fails(EINVAL, request(handle_mig_data_write, req, 108));
        }
    }

    force_state(ST(RESUMING));
    for (i = 0; i < 108; i++) {
        assert_fails(EINVAL, request(handle_mig_data_write, req, i));
    }
    dev.write_ret = 99;
    assert_fails(EIO, request(handle_mig_data_write, req, 108));
    dev.write_ret = -1;
    assert_fails(EBADMSG, request(handle_mig_data_write, req, 108));
    size = UINT32_MAX;
    memcpy(req + 4, &size, 4);
    assert_fails(EINVAL, request(handle_mig_data_write, req, 108));
    size = 0;
    memcpy(req + 4, &size, 4);
    assert_int_equal(0, request(handle_mig_data_write, req, 8));
}

static void
test_features(void **state UNUSED)
{
    uint32_t f, i;

    /* What each feature can do, as upstream's version 2 has it. */
    static const uint32_t can[16] = {
        [VFIO_DEVICE_FEATURE_MIGRATION] = VFIO_DEVICE_FEATURE_GET,
        [VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE] =
            VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET,
        [VFIO_DEVICE_FEATURE_DMA_LOGGING_START] = VFIO_DEVICE_FEATURE_SET,
        [VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP] = VFIO_DEVICE_FEATURE_SET,
        [VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT] = VFIO_DEVICE_FEATURE_GET,
    };

    for (f = 0; f < ARRAY_SIZE(can); f++) {
        for (i = 0; i < 4; i++) {
            uint32_t ops = i << 16;
            int err = can[f] == 0 ? ENOTTY : (ops & ~can[f]) != 0 ? EINVAL : 0;
            int ret = feature(PROBE | ops | f, 8, "", 0);

            if (err == 0) {
                assert_int_equal(0, ret);
                assert_int_equal(8, msg.out.iov.iov_len);
            } else {
                assert_fails(err, ret);
            }
        }
    }
    assert_int_equal(ST(RUNNING), get_state());

    /* The reply to a probe is the request. */
    assert_int_equal(0, feature(PROBE | SET(MIG_DEVICE_STATE), 11, "abc", 3));
    assert_int_equal(11, msg.out.iov.iov_len);
    assert_memory_equal("abc", (char *)msg.out.iov.iov_base + 8, 3);

    assert_fails(EINVAL, feature(VFIO_DEVICE_FEATURE_MIGRATION, 16, "", 0));
    assert_fails(EINVAL, feature(GET(MIGRATION) | VFIO_DEVICE_FEATURE_SET, 16,
                                 "", 0));
    assert_fails(EINVAL, feature(GET(MIGRATION) | 1 << 19, 16, "", 0));
    assert_fails(EINVAL, feature(GET(MIGRATION), 15, "", 0));
    assert_fails(EINVAL, feature(GET(MIGRATION), 7, "", 0));
    assert_int_equal(0, feature(GET(MIGRATION), 16, "", 0));
    assert_int_equal(16, msg.out.iov.iov_len);

    /* Bodies of every length that is too short. */
    for (i = 0; i < 8; i++) {
        uint32_t body[2] = { 16, GET(MIGRATION) };

        assert_fails(EINVAL, request(handle_device_feature, body, i));
        assert_fails(EINVAL, feature(SET(MIG_DEVICE_STATE), 16, body, i));
    }
}

static void
test_dma_logging_requests(void **state UNUSED)
{
    uint64_t start[2 + 4] = { 8192, 2, 0x1000, 0x1000, 0x8000, 0x2000 };
    uint64_t report[3] = { 0x1000, 65 * 4096, 4096 };
    uint64_t big[3] = { 0, (1ULL << 23) * 4096, 4096 };
    uint64_t *reply;
    size_t i;

    assert_fails(EINVAL, feature(GET(DMA_LOGGING_REPORT), 1024, report, 24));
    assert_int_equal(0, feature(SET(DMA_LOGGING_STOP), 8, "", 0));

    for (i = 0; i < sizeof(start); i++) {
        assert_fails(EINVAL, feature(SET(DMA_LOGGING_START), 8, start, i));
    }
    start[1] = UINT32_MAX;
    assert_fails(EINVAL, feature(SET(DMA_LOGGING_START), 8, start, 48));
    start[1] = 1ULL << 32 | 2;  /* the reserved field */
    start[3] = 0;
    assert_fails(EINVAL, feature(SET(DMA_LOGGING_START), 8, start, 48));
    start[3] = UINT64_MAX;
    assert_fails(EINVAL, feature(SET(DMA_LOGGING_START), 8, start, 48));
    start[3] = 0x1000;
    assert_int_equal(0, feature(SET(DMA_LOGGING_START), 56, start, 48));
    assert_int_equal(56, msg.out.iov.iov_len);
    assert_memory_equal(start, (char *)msg.out.iov.iov_base + 8, 48);

    /* "Another start is not allowed in the meantime." */
    assert_fails(EINVAL, feature(SET(DMA_LOGGING_START), 56, start, 48));

    assert_fails(EINVAL, feature(GET(DMA_LOGGING_REPORT), 47, report, 24));
    assert_int_equal(0, feature(GET(DMA_LOGGING_REPORT), 48, report, 24));
    assert_int_equal(48, msg.out.iov.iov_len);
    reply = (uint64_t *)((char *)msg.out.iov.iov_base + 8);
    assert_memory_equal(report, reply, 24);
    assert_true(reply[3] == 0 && reply[4] == 0);

    for (i = 0; i < 24; i++) {
        assert_fails(EINVAL, feature(GET(DMA_LOGGING_REPORT), 48, report, i));
    }

    /* One MiB of bitmap is the most. */
    assert_int_equal(0, feature(GET(DMA_LOGGING_REPORT), UINT32_MAX, big, 24));
    assert_int_equal(32 + (1 << 20), msg.out.iov.iov_len);
    big[1]++;
    assert_fails(EINVAL, feature(GET(DMA_LOGGING_REPORT), UINT32_MAX, big, 24));
    big[1] = UINT64_MAX;
    assert_fails(EINVAL, feature(GET(DMA_LOGGING_REPORT), UINT32_MAX, big, 24));
    big[0] = UINT64_MAX;
    big[1] = 2;
    assert_fails(EINVAL, feature(GET(DMA_LOGGING_REPORT), UINT32_MAX, big, 24));

    assert_int_equal(0, feature(SET(DMA_LOGGING_STOP), 8, "", 0));

    /* The library chooses what cannot be had. */
    start[0] = 0;
    assert_int_equal(0, feature(SET(DMA_LOGGING_START), 56, start, 48));
    reply = (uint64_t *)((char *)msg.out.iov.iov_base + 8);
    assert_int_equal(4096, reply[0]);
}

#ifndef VFU_NO_MIGR_EXT
static void
test_precopy_info(void **state UNUSED)
{
    struct vfio_precopy_info req = { .argsz = sizeof(req) }, reply;
    uint32_t s, i;

    /* Nothing to ask. */
    force_state(ST(PRE_COPY));
    assert_fails(EINVAL, request(handle_mig_get_precopy_info, &req, 24));
    assert_fails(ENOTTY, feature(SET(MIG_PRECOPY_INFOv2), 8, "", 0));
    assert_fails(ENOTTY, feature(GET(MIG_DATA_SIZE), 16, "", 0));

    extend(all_flags[3]);
    dev.info = (struct vfio_precopy_info) {
        .argsz = 5, .flags = ~0U, .initial_bytes = 1ULL << 40, .dirty_bytes = 7
    };

    for (s = ST(ERROR); s < MIGR_NR_STATES; s++) {
        force_state(s);
        if (s != ST(PRE_COPY) && s != ST(PRE_COPY_P2P)) {
            assert_fails(EINVAL, request(handle_mig_get_precopy_info, &req,
                                         24));
            continue;
        }
        assert_int_equal(0, request(handle_mig_get_precopy_info, &req, 24));
        assert_int_equal(24, msg.out.iov.iov_len);
        memcpy(&reply, msg.out.iov.iov_base, sizeof(reply));
        assert_int_equal(24, reply.argsz);
        assert_int_equal(0, reply.flags);
        assert_int_equal(1ULL << 40, reply.initial_bytes);
        assert_int_equal(7, reply.dirty_bytes);
    }

    force_state(ST(PRE_COPY));
    for (i = 0; i < 24; i++) {
        assert_fails(EINVAL, request(handle_mig_get_precopy_info, &req, i));
    }
    req.argsz = 23;
    assert_fails(EINVAL, request(handle_mig_get_precopy_info, &req, 24));
    req.argsz = 24;

    /* REINIT is shown once the client opted in, and to this client only. */
    assert_int_equal(0, feature(SET(MIG_PRECOPY_INFOv2), 8, "", 0));
    assert_int_equal(1, dev.nr_v2);
    assert_int_equal(0, request(handle_mig_get_precopy_info, &req, 24));
    memcpy(&reply, msg.out.iov.iov_base, sizeof(reply));
    assert_int_equal(VFIO_PRECOPY_INFO_REINIT, reply.flags);
    migration_reset(dev.ctx, VFU_RESET_LOST_CONN);
    force_state(ST(PRE_COPY));
    assert_int_equal(0, request(handle_mig_get_precopy_info, &req, 24));
    memcpy(&reply, msg.out.iov.iov_base, sizeof(reply));
    assert_int_equal(0, reply.flags);
}

static void
test_data_size(void **state UNUSED)
{
    uint64_t length;
    uint32_t s;

    extend(all_flags[0]);
    for (s = ST(ERROR); s < MIGR_NR_STATES; s++) {
        force_state(s);
        assert_int_equal(0, feature(GET(MIG_DATA_SIZE), 16, "", 0));
        assert_int_equal(16, msg.out.iov.iov_len);
        memcpy(&length, (char *)msg.out.iov.iov_base + 8, sizeof(length));
        assert_int_equal(0x123456789abcULL, length);
    }
    assert_fails(EINVAL, feature(GET(MIG_DATA_SIZE), 15, "", 0));
    assert_fails(EINVAL, feature(SET(MIG_DATA_SIZE), 16, &length, 8));
}

static struct iovec gathered[2];
static ssize_t nr_gathered;

static ssize_t
gather(vfu_ctx_t *ctx UNUSED, uint64_t count UNUSED, const struct iovec **iov)
{
    *iov = gathered;
    return nr_gathered < 0 ? ERROR_INT(-nr_gathered) : nr_gathered;
}

/* A reply is where the device said that it is; or read_data fills it. */
static void
test_gather(void **state UNUSED)
{
    uint32_t req[2] = { 8 + 100, 100 };
    static uint8_t data[100];
    uint32_t head[2];

    assert_int_equal(0, vfu_setup_migration_gather(dev.ctx, gather));
    force_state(ST(STOP_COPY));
    gathered[0] = (struct iovec){ data, 60 };
    gathered[1] = (struct iovec){ data + 60, 40 };
    for (nr_gathered = 0; nr_gathered <= 2; nr_gathered++) {
        uint32_t size = nr_gathered == 0 ? 0 : nr_gathered == 1 ? 60 : 100;

        assert_int_equal(0, request(handle_mig_data_read, req, 8));
        assert_int_equal(nr_gathered + 1, msg.nr_out_iovecs);
        memcpy(head, msg.out_iovecs[0].iov_base, sizeof(head));
        assert_int_equal(8, msg.out_iovecs[0].iov_len);
        assert_int_equal(8 + size, head[0]);
        assert_int_equal(size, head[1]);
        assert_memory_equal(msg.out_iovecs + 1, gathered,
                            nr_gathered * sizeof(gathered[0]));
    }

    /* More than was asked for, even where the sum of it is not. */
    nr_gathered = 2;
    gathered[1].iov_len = 41;
    assert_fails(EIO, request(handle_mig_data_read, req, 8));
    gathered[1].iov_len = SIZE_MAX - 59;
    assert_fails(EIO, request(handle_mig_data_read, req, 8));
    assert_null(msg.out_iovecs);

    nr_gathered = -EBUSY;
    assert_fails(EBUSY, request(handle_mig_data_read, req, 8));

    nr_gathered = -ENOSYS;
    dev.read_ret = 100;
    assert_int_equal(0, request(handle_mig_data_read, req, 8));
    assert_null(msg.out_iovecs);
    assert_int_equal(108, msg.out.iov.iov_len);

    assert_int_equal(0, vfu_setup_migration_gather(dev.ctx, NULL));
    nr_gathered = 1;
    assert_int_equal(0, request(handle_mig_data_read, req, 8));
    assert_null(msg.out_iovecs);
}

static void
test_setup(void **state UNUSED)
{
    vfu_migration_ext_t ext = make_ext(all_flags[3]);
    vfu_migration_callbacks_t bad = callbacks;
    struct migration *migr = dev.ctx->migration;

    assert_int_equal(1, vfu_ext_api_version());
    assert_fails(EEXIST, vfu_setup_device_migration_callbacks(dev.ctx, &bad));

    dev.ctx->migration = NULL;
    assert_fails(EINVAL, vfu_setup_device_migration_ext(dev.ctx, &ext));
    assert_fails(ENOTSUP, vfu_migration_get_state(dev.ctx));
    assert_fails(ENOTSUP, vfu_migration_fail(dev.ctx));
    assert_fails(EINVAL, vfu_setup_migration_gather(dev.ctx, gather));
    assert_fails(ENOTTY, feature(GET(MIGRATION), 16, "", 0));
    assert_fails(EINVAL, request(handle_mig_data_read, "12345678", 8));
    assert_fails(EINVAL, request(handle_mig_data_write, "12345678", 8));
    bad.version = 1;
    assert_fails(EINVAL, vfu_setup_device_migration_callbacks(dev.ctx, &bad));
    bad = callbacks;
    bad.read_data = NULL;
    assert_fails(EINVAL, vfu_setup_device_migration_callbacks(dev.ctx, &bad));
    dev.ctx->migration = migr;

    ext.migration_flags = VFIO_MIGRATION_PRE_COPY;
    assert_fails(EINVAL, vfu_setup_device_migration_ext(dev.ctx, &ext));
    ext.migration_flags = all_flags[3] | 1 << 3;
    assert_fails(EINVAL, vfu_setup_device_migration_ext(dev.ctx, &ext));
    ext = make_ext(all_flags[3]);
    ext.precopy_info = NULL;
    assert_fails(EINVAL, vfu_setup_device_migration_ext(dev.ctx, &ext));
    ext = make_ext(all_flags[3]);
    ext.version = 2;
    assert_fails(EINVAL, vfu_setup_device_migration_ext(dev.ctx, &ext));

    assert_int_equal(VFU_MIGR_STATE_RUNNING, vfu_migration_get_state(dev.ctx));
    assert_int_equal(0, vfu_migration_fail(dev.ctx));
    assert_int_equal(VFU_MIGR_STATE_ERROR, vfu_migration_get_state(dev.ctx));
}

/* --- the window ---------------------------------------------------------- */

#define WINDOW_SIZE (4 * 4096UL)
#define ALL_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)

static int
sealed(size_t size, int seals)
{
    int fd = memfd_create("test-window", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    assert_true(fd >= 0);
    assert_int_equal(0, ftruncate(fd, size));
    assert_int_equal(0, fcntl(fd, F_ADD_SEALS, seals));
    return fd;
}

/* Hand over a window with @nr_fds file descriptors, which are closed. */
static int
window(uint64_t size, uint32_t flags, int fd, size_t nr_fds)
{
    struct vfio_user_mig_data_window req = { sizeof(req), flags, size };
    int fds[2] = { fd, nr_fds > 1 ? dup(fd) : -1 };
    void *body = malloc(sizeof(req));
    int ret, err;
    size_t i;

    assert_non_null(body);
    memcpy(body, &req, sizeof(req));
    free_reply();
    msg.in.iov.iov_base = body;
    msg.in.iov.iov_len = sizeof(req);
    msg.in.fds = fds;
    msg.in.nr_fds = nr_fds;
    ret = handle_mig_data_window(dev.ctx, &msg);
    err = errno;
    for (i = 0; i < ARRAY_SIZE(fds); i++) {
        if (fds[i] != -1) {
            close(fds[i]);
        }
    }
    free(body);
    memset(&msg, 0, sizeof(msg));
    errno = err;
    return ret;
}

static void
allow_window(void)
{
    dev.ctx->client_max_window = 1 << 20;
    assert_int_equal(0, vfu_setup_migration_window(dev.ctx, 4 * WINDOW_SIZE));
}

static void
test_window_is_judged(void **state UNUSED)
{
    static const int seals[] = {
        0, ALL_SEALS & ~F_SEAL_SEAL, ALL_SEALS & ~F_SEAL_SHRINK,
        ALL_SEALS & ~F_SEAL_GROW, ALL_SEALS | F_SEAL_WRITE,
    };
    size_t i;

    assert_fails(EINVAL, window(WINDOW_SIZE, 0, sealed(WINDOW_SIZE, ALL_SEALS), 1));
    allow_window();
    assert_int_equal(4 * WINDOW_SIZE, migration_max_window(dev.ctx->migration));
    for (i = 0; i < ARRAY_SIZE(seals); i++) {
        assert_fails(EINVAL, window(WINDOW_SIZE, 0, sealed(WINDOW_SIZE, seals[i]), 1));
    }
    assert_fails(EINVAL, window(WINDOW_SIZE, 0, -1, 0));
    assert_fails(EINVAL, window(WINDOW_SIZE, 0, sealed(WINDOW_SIZE, ALL_SEALS), 2));
    assert_fails(EINVAL, window(WINDOW_SIZE, 1, sealed(WINDOW_SIZE, ALL_SEALS), 1));
    assert_fails(EINVAL, window(WINDOW_SIZE, 0, sealed(4096, ALL_SEALS), 1));
    assert_fails(EINVAL, window(4096, 0, sealed(WINDOW_SIZE, ALL_SEALS), 1));
    assert_fails(EINVAL, window(0, 0, sealed(0, ALL_SEALS), 1));
    assert_fails(EINVAL, window(100, 0, sealed(100, ALL_SEALS), 1));
    assert_fails(EINVAL, window(8 * WINDOW_SIZE, 0, sealed(8 * WINDOW_SIZE, ALL_SEALS), 1));
    assert_fails(EINVAL, window(1ULL << 63, 0, sealed(WINDOW_SIZE, ALL_SEALS), 1));
    assert_false(migration_has_window(dev.ctx->migration));
    assert_int_equal(0, window(WINDOW_SIZE, 0, sealed(WINDOW_SIZE, ALL_SEALS), 1));
    assert_fails(EEXIST, window(WINDOW_SIZE, 0, sealed(WINDOW_SIZE, ALL_SEALS), 1));

    /* It ends with the connection, and with it what the client may ask for. */
    migration_reset(dev.ctx, VFU_RESET_DEVICE);
    assert_true(migration_has_window(dev.ctx->migration));
    migration_reset(dev.ctx, VFU_RESET_LOST_CONN);
    assert_false(migration_has_window(dev.ctx->migration));
    assert_int_equal(0, window(WINDOW_SIZE, 0, sealed(WINDOW_SIZE, ALL_SEALS), 1));
}

static int
in_window(int (*handler)(vfu_ctx_t *, vfu_msg_t *), uint64_t offset,
          uint32_t size)
{
    struct vfio_user_mig_window_data req = { sizeof(req), size, offset };

    return request(handler, &req, sizeof(req));
}

static void
test_window_has_the_data(void **state UNUSED)
{
    static const struct { uint64_t offset; uint32_t size; } outside[] = {
        { WINDOW_SIZE, 1 }, { WINDOW_SIZE - 1, 2 }, { 0, WINDOW_SIZE + 1 },
        { UINT64_MAX, 1 }, { UINT64_MAX, UINT32_MAX }, { 1, UINT32_MAX },
        { 1ULL << 63, 1 },
    };
    const struct vfio_user_mig_window_data *reply;
    int fd = sealed(WINDOW_SIZE, ALL_SEALS);
    uint8_t *client;
    size_t i;

    client = mmap(NULL, WINDOW_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(client != MAP_FAILED);
    allow_window();
    assert_int_equal(0, window(WINDOW_SIZE, 0, fd, 1));

    assert_fails(EINVAL, in_window(handle_mig_data_read, 0, 1));
    assert_fails(EINVAL, in_window(handle_mig_data_write, 0, 1));

    force_state(ST(STOP_COPY));
    for (i = 0; i < ARRAY_SIZE(outside); i++) {
        assert_fails(EINVAL, in_window(handle_mig_data_read, outside[i].offset,
                                       outside[i].size));
    }
    assert_fails(EINVAL, request(handle_mig_data_read, "12345678", 8));
    dev.read_ret = 100;
    assert_int_equal(0, in_window(handle_mig_data_read, 1000, 200));
    reply = msg.out.iov.iov_base;
    assert_int_equal(sizeof(*reply), msg.out.iov.iov_len);
    assert_int_equal(sizeof(*reply), reply->argsz);
    assert_int_equal(100, reply->size);
    assert_int_equal(1000, reply->offset);
    assert_int_equal(0, client[999]);
    assert_int_equal(0x5a, client[1000]);
    assert_int_equal(0x5a, client[1099]);
    assert_int_equal(0, client[1100]);
    assert_fails(EIO, in_window(handle_mig_data_read, 0, 99));
    dev.read_ret = -1;
    assert_fails(EIO, in_window(handle_mig_data_read, 0, 99));
    dev.read_ret = 0;
    assert_int_equal(0, in_window(handle_mig_data_read, WINDOW_SIZE, 0));

    force_state(ST(RESUMING));
    for (i = 0; i < ARRAY_SIZE(outside); i++) {
        assert_fails(EINVAL, in_window(handle_mig_data_write, outside[i].offset,
                                       outside[i].size));
    }
    memset(client + WINDOW_SIZE - 64, 0xa5, 64);
    dev.write_ret = 64;
    assert_int_equal(0, in_window(handle_mig_data_write, WINDOW_SIZE - 64, 64));
    assert_int_equal(0, msg.out.iov.iov_len);
    assert_int_equal(0, in_window(handle_mig_data_write, WINDOW_SIZE, 0));
    dev.write_ret = -1;
    assert_fails(EBADMSG, in_window(handle_mig_data_write, WINDOW_SIZE - 64, 64));
    munmap(client, WINDOW_SIZE);
}
#endif

int
main(void)
{
#define TEST(t) cmocka_unit_test_setup_teardown(t, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_paths),
        TEST(test_examples),
        TEST(test_reset),
        TEST(test_read),
        TEST(test_write),
        TEST(test_features),
        TEST(test_dma_logging_requests),
#ifndef VFU_NO_MIGR_EXT
        TEST(test_precopy_info),
        TEST(test_data_size),
        TEST(test_gather),
        TEST(test_setup),
        TEST(test_window_is_judged),
        TEST(test_window_has_the_data),
#endif
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
