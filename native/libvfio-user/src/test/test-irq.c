/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * The three kinds of interrupts, of which a client uses one at a time: INTx as
 * a line with a level, and interrupts that are taken back.
 */

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common.h"
#include "irq.h"
#include "libvfio-user.h"
#include "private.h"

#define SOCK "/tmp/test-irq.sock"
#define INTX VFIO_PCI_INTX_IRQ_INDEX
#define MSI VFIO_PCI_MSI_IRQ_INDEX
#define MSIX VFIO_PCI_MSIX_IRQ_INDEX
#define TRIGGER VFIO_IRQ_SET_ACTION_TRIGGER
#define MASK VFIO_IRQ_SET_ACTION_MASK
#define UNMASK VFIO_IRQ_SET_ACTION_UNMASK
#define NONE VFIO_IRQ_SET_DATA_NONE
#define BOOL VFIO_IRQ_SET_DATA_BOOL
#define EVENTFD VFIO_IRQ_SET_DATA_EVENTFD

static vfu_ctx_t *ctx;
static int efds[4];
static int nr_masked, nr_unmasked;

static void
state_cb(vfu_ctx_t *c UNUSED, uint32_t start UNUSED, uint32_t count UNUSED,
         bool mask)
{
    *(mask ? &nr_masked : &nr_unmasked) += 1;
}

static int
setup(void **state UNUSED)
{
    size_t i;

    nr_masked = nr_unmasked = 0;
    unlink(SOCK);
    ctx = vfu_create_ctx(VFU_TRANS_SOCK, SOCK, LIBVFIO_USER_FLAG_ATTACH_NB,
                         NULL, VFU_DEV_TYPE_PCI);
    if (ctx == NULL ||
        vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, PCI_HEADER_TYPE_NORMAL,
                     0) < 0 ||
        vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1) < 0 ||
        vfu_setup_device_nr_irqs(ctx, VFU_DEV_MSI_IRQ, 4) < 0 ||
        vfu_setup_device_nr_irqs(ctx, VFU_DEV_MSIX_IRQ, 4) < 0 ||
        vfu_setup_irq_state_callback(ctx, VFU_DEV_INTX_IRQ, state_cb) < 0 ||
        vfu_realize_ctx(ctx) < 0) {
        return -1;
    }
    for (i = 0; i < ARRAY_SIZE(efds); i++) {
        efds[i] = eventfd(0, EFD_NONBLOCK);
    }
    return 0;
}

static int
teardown(void **state UNUSED)
{
    size_t i;

    vfu_destroy_ctx(ctx);
    for (i = 0; i < ARRAY_SIZE(efds); i++) {
        close(efds[i]);
    }
    unlink(SOCK);
    return 0;
}

/* Handles VFIO_USER_DEVICE_SET_IRQS with @nr_fds of efds; returns its errno. */
static int
set_irqs(uint32_t index, uint32_t flags, uint32_t start, uint32_t count,
         size_t nr_fds)
{
    char buf[sizeof(struct vfio_irq_set) + 1] = { 0 };
    struct vfio_irq_set set = {
        .argsz = sizeof(set), .flags = flags, .index = index, .start = start,
        .count = count
    };
    int fds[4];
    vfu_msg_t msg = {
        .in.iov = { buf, sizeof(set) + !!(flags & BOOL) },
        .in.fds = fds, .in.nr_fds = nr_fds
    };
    int err = 0;
    size_t i;

    memcpy(buf, &set, sizeof(set));
    buf[sizeof(set)] = 1;
    for (i = 0; i < nr_fds; i++) {
        fds[i] = dup(efds[i]);
    }
    if (handle_device_set_irqs(ctx, &msg) < 0) {
        err = errno;
    }
    for (i = 0; i < nr_fds; i++) {
        if (fds[i] != -1) {
            close(fds[i]);
        }
    }
    return err;
}

/* How often an eventfd was written to since the last call. */
static int
heard(int efd)
{
    eventfd_t val;

    return eventfd_read(efd, &val) == 0 ? (int)val : 0;
}

static void
test_one_type_at_a_time(void **state UNUSED)
{
    uint32_t count = 7;

    assert_int_equal(-1, vfu_irq_get_type(ctx, &count));
    assert_int_equal(0, count);

    assert_int_equal(0, set_irqs(INTX, TRIGGER | EVENTFD, 0, 1, 1));
    assert_int_equal(VFU_DEV_INTX_IRQ, vfu_irq_get_type(ctx, NULL));
    assert_int_equal(EINVAL, set_irqs(MSIX, TRIGGER | EVENTFD, 0, 4, 4));
    assert_int_equal(EINVAL, set_irqs(MSI, TRIGGER | BOOL, 0, 1, 0));
    /* What is not enabled can be disabled, which does nothing. */
    assert_int_equal(0, set_irqs(MSI, TRIGGER | NONE, 0, 0, 0));
    assert_int_equal(VFU_DEV_INTX_IRQ, vfu_irq_get_type(ctx, NULL));
    assert_int_equal(0, set_irqs(INTX, TRIGGER | NONE, 0, 0, 0));
    assert_int_equal(-1, vfu_irq_get_type(ctx, NULL));

    /* Fewer messages than there could be. */
    assert_int_equal(0, set_irqs(MSI, TRIGGER | EVENTFD, 0, 2, 2));
    assert_int_equal(VFU_DEV_MSI_IRQ, vfu_irq_get_type(ctx, &count));
    assert_int_equal(2, count);
    assert_int_equal(0, vfu_irq_trigger(ctx, 1));
    assert_int_equal(1, heard(efds[1]));
    assert_int_equal(0, set_irqs(MSI, TRIGGER | NONE, 0, 0, 0));

    /* MSI-X is enabled without a vector, which is what QEMU does first. */
    assert_int_equal(0, set_irqs(MSIX, TRIGGER | EVENTFD, 0, 1, 0));
    assert_int_equal(VFU_DEV_MSIX_IRQ, vfu_irq_get_type(ctx, &count));
    assert_int_equal(0, count);
    assert_int_equal(0, set_irqs(MSIX, TRIGGER | EVENTFD, 0, 4, 4));
    vfu_irq_get_type(ctx, &count);
    assert_int_equal(4, count);
}

static void
test_intx_is_a_level(void **state UNUSED)
{
    assert_int_equal(0, vfu_irq_set_level(ctx, true));
    /* It was asserted before there was anybody to hear of it. */
    assert_int_equal(0, set_irqs(INTX, TRIGGER | EVENTFD, 0, 1, 1));
    assert_int_equal(1, heard(efds[0]));

    /* Once, until it is unmasked. */
    assert_int_equal(0, vfu_irq_set_level(ctx, true));
    assert_int_equal(0, vfu_irq_set_level(ctx, false));
    assert_int_equal(0, vfu_irq_set_level(ctx, true));
    assert_int_equal(0, heard(efds[0]));
    assert_int_equal(0, set_irqs(INTX, UNMASK | NONE, 0, 1, 0));
    assert_int_equal(1, heard(efds[0]));
    assert_int_equal(0, set_irqs(INTX, UNMASK | BOOL, 0, 1, 0));
    assert_int_equal(1, heard(efds[0]));

    /* Not any more. */
    assert_int_equal(0, vfu_irq_set_level(ctx, false));
    assert_int_equal(0, set_irqs(INTX, UNMASK | NONE, 0, 1, 0));
    assert_int_equal(0, heard(efds[0]));

    /* Masked by the client. */
    assert_int_equal(0, set_irqs(INTX, MASK | NONE, 0, 1, 0));
    assert_int_equal(0, vfu_irq_set_level(ctx, true));
    assert_int_equal(0, heard(efds[0]));
    assert_int_equal(0, set_irqs(INTX, UNMASK | NONE, 0, 1, 0));
    assert_int_equal(1, heard(efds[0]));
    assert_int_equal(1, nr_masked);
    assert_int_equal(4, nr_unmasked);
}

static void
test_intx_falls_unheard(void **state UNUSED)
{
    assert_int_equal(0, set_irqs(INTX, TRIGGER | EVENTFD, 0, 1, 1));
    assert_int_equal(0, vfu_irq_set_level(ctx, true));
    assert_int_equal(0, vfu_irq_set_level(ctx, false));
    assert_int_equal(0, heard(efds[0]));
    /* So the next time counts again, without an unmask. */
    assert_int_equal(0, vfu_irq_set_level(ctx, true));
    assert_int_equal(1, heard(efds[0]));

    /* Another type has no line; back again, it is still asserted. */
    assert_int_equal(0, set_irqs(INTX, TRIGGER | NONE, 0, 0, 0));
    assert_int_equal(0, set_irqs(MSIX, TRIGGER | EVENTFD, 0, 4, 4));
    assert_int_equal(0, vfu_irq_set_level(ctx, false));
    assert_int_equal(0, vfu_irq_set_level(ctx, true));
    assert_int_equal(0, heard(efds[0]));
    assert_int_equal(0, set_irqs(MSIX, TRIGGER | NONE, 0, 0, 0));
    assert_int_equal(0, set_irqs(INTX, TRIGGER | EVENTFD, 0, 1, 1));
    assert_int_equal(1, heard(efds[0]));
}

static void
test_what_is_refused(void **state UNUSED)
{
    struct vfio_irq_info info = { .argsz = sizeof(info), .index = INTX };
    vfu_msg_t msg = { .in.iov = { &info, sizeof(info) } };

    assert_int_equal(EINVAL, set_irqs(INTX, UNMASK | NONE, 0, 1, 0));
    assert_int_equal(0, set_irqs(INTX, TRIGGER | EVENTFD, 0, 1, 1));
    assert_int_equal(ENOTSUP, set_irqs(INTX, UNMASK | EVENTFD, 0, 1, 1));

    assert_int_equal(0, handle_device_get_irq_info(ctx, &msg));
    info = *(struct vfio_irq_info *)msg.out.iov.iov_base;
    assert_int_equal(VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE |
                     VFIO_IRQ_INFO_AUTOMASKED, info.flags);
    assert_int_equal(1, info.count);
    free(msg.out.iov.iov_base);

    vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 0);
    assert_int_equal(-1, vfu_irq_set_level(ctx, true));
    assert_int_equal(EINVAL, errno);
    vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1);
}

static void
test_take_back(void **state UNUSED)
{
    int flags = fcntl(efds[1], F_GETFL);

    assert_int_equal(0, vfu_irq_take_back(ctx, 1));
    assert_int_equal(0, set_irqs(MSIX, TRIGGER | EVENTFD, 0, 4, 4));
    assert_int_equal(0, vfu_irq_take_back(ctx, 1));

    /* One of the two has it. */
    assert_int_equal(0, vfu_irq_trigger(ctx, 1));
    assert_int_equal(0, vfu_irq_trigger(ctx, 1));
    assert_int_equal(1, vfu_irq_take_back(ctx, 1));
    assert_int_equal(0, heard(efds[1]));
    assert_int_equal(0, vfu_irq_trigger(ctx, 1));
    assert_int_equal(1, heard(efds[1]));
    assert_int_equal(0, vfu_irq_take_back(ctx, 1));

    /* It never waits, whatever the client made of its eventfd. */
    assert_int_equal(0, fcntl(efds[1], F_SETFL, flags & ~O_NONBLOCK));
    assert_int_equal(0, vfu_irq_take_back(ctx, 1));
    assert_int_equal(0, fcntl(efds[1], F_GETFL) & O_NONBLOCK);

    assert_int_equal(-1, vfu_irq_take_back(ctx, 4));
    assert_int_equal(EINVAL, errno);
}

/* What the client has filled up itself is not waited for. */
static void
test_full(void **state UNUSED)
{
    int i;

    for (i = 0; i < 2; i++) {
        close(efds[i]);
        efds[i] = eventfd(0, 0);        /* one that blocks */
        assert_int_equal(0, eventfd_write(efds[i], UINT64_MAX - 1));
    }

    assert_int_equal(0, set_irqs(MSIX, TRIGGER | EVENTFD, 0, 2, 2));
    assert_int_equal(0, vfu_irq_trigger(ctx, 1));
    assert_int_equal(0, set_irqs(MSIX, TRIGGER | NONE, 0, 2, 0));
    assert_int_equal(0, set_irqs(MSIX, TRIGGER | BOOL, 0, 1, 0));
    assert_true(heard(efds[1]) != 0);
    assert_int_equal(0, vfu_irq_trigger(ctx, 1));
    assert_int_equal(1, heard(efds[1]));

    assert_int_equal(0, set_irqs(MSIX, TRIGGER | NONE, 0, 0, 0));
    assert_int_equal(0, set_irqs(INTX, TRIGGER | EVENTFD, 0, 1, 1));
    assert_int_equal(0, vfu_irq_set_level(ctx, true));
}

int
main(void)
{
#define TEST(t) cmocka_unit_test_setup_teardown(t, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_one_type_at_a_time),
        TEST(test_intx_is_a_level),
        TEST(test_intx_falls_unheard),
        TEST(test_what_is_refused),
        TEST(test_take_back),
        TEST(test_full),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
