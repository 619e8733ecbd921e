/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* The DMA log against a model that keeps a flag for every 4 KiB. */

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common.h"
#include "dma.h"
#include "dma_log.h"
#include "libvfio-user.h"
#include "private.h"

#define UNIT 4096UL
#define NR_UNITS 4096UL         /* of address space that the tests use */
#define BASE (1UL << 32)        /* its first address */

static vfu_ctx_t *ctx;
static bool model[NR_UNITS];
static unsigned int seed = 1;

static uint64_t
rnd(uint64_t n)
{
    return rand_r(&seed) % n;
}

static int
setup(void **state UNUSED)
{
    ctx = vfu_create_ctx(VFU_TRANS_PIPE, "test", 0, NULL, VFU_DEV_TYPE_PCI);
    if (ctx == NULL || vfu_setup_device_dma(ctx, NULL, NULL) < 0) {
        return -1;
    }
    memset(model, 0, sizeof(model));
    return 0;
}

static int
teardown(void **state UNUSED)
{
    vfu_destroy_ctx(ctx);
    return 0;
}

static void
add_region(uint64_t unit, uint64_t nr_units, bool mapped)
{
    int fd = -1;

    if (mapped) {
        fd = memfd_create("test", 0);
        assert_true(fd >= 0);
        assert_int_equal(0, ftruncate(fd, nr_units * UNIT));
    }
    assert_true(dma_controller_add_region(ctx->dma,
                                          (void *)(BASE + unit * UNIT),
                                          nr_units * UNIT, fd, 0,
                                          PROT_READ | PROT_WRITE) >= 0);
}

static void
mark(uint64_t start, uint64_t length)
{
    dma_sg_t sg[8];
    uint64_t u;
    int nr = dma_addr_to_sgl(ctx->dma, (void *)(BASE + start), length, sg, 8,
                             PROT_WRITE);

    assert_true(nr > 0);
    dma_sgl_mark_dirty(ctx->dma, sg, nr);

    for (u = start / UNIT; u <= (start + length - 1) / UNIT; u++) {
        model[u] = true;
    }
}

static bool
bit(const uint8_t *bitmap, uint64_t i)
{
    return bitmap[i / 8] >> (i % 8) & 1;
}

/* A log of 4 KiB pages: every report is known exactly. */
static void
test_exact(void **state UNUSED)
{
    uint64_t pgsize;
    int i, nr_dirty = 0;

    add_region(0, 1000, true);
    add_region(1000, 24, true);
    add_region(1024, 1, true);
    add_region(2000, 1777, true);
    assert_int_equal(0, dma_log_start(ctx->dma, UNIT, &pgsize));
    assert_int_equal(UNIT, pgsize);

    for (i = 0; i < 3000; i++) {
        uint64_t shift = rnd(10) + 12;
        uint64_t report = 1UL << shift;
        uint64_t first = rnd(NR_UNITS), nr = rnd(NR_UNITS - first) + 1;
        uint64_t size, u, j;
        uint8_t *bitmap;

        for (j = rnd(4); j > 0; j--) {
            uint64_t at = rnd(2) ? rnd(1024) : 2000 + rnd(1700);

            mark(at * UNIT + rnd(UNIT), rnd(3 * UNIT / 2) + 1);
        }

        size = dma_log_bitmap_size(BASE + first * UNIT, nr * UNIT, report);
        assert_int_equal((((nr * UNIT + report - 1) / report) + 63) / 64 * 8,
                         size);
        bitmap = calloc(1, size);
        assert_non_null(bitmap);
        assert_int_equal(0, dma_log_report(ctx->dma, BASE + first * UNIT,
                                           nr * UNIT, report, bitmap));

        for (j = 0; j < size * 8; j++) {
            bool dirty = false;

            for (u = j * (report / UNIT);
                 u < (j + 1) * (report / UNIT) && u < nr; u++) {
                dirty |= model[first + u];
                model[first + u] = false;
            }
            nr_dirty += dirty;
            assert_int_equal(dirty, bit(bitmap, j));
        }
        free(bitmap);
    }
    assert_in_range(nr_dirty, 100, 1000000);
}

/*
 * A coarse log: nothing that was written may be missing, or be reported twice
 * once a report has covered it, and bits come in blocks of the log's pages.
 */
static void
test_coarse(void **state UNUSED)
{
    uint8_t bitmap[NR_UNITS / 8];
    uint64_t pgsize, u;

    /* Not aligned to the page of the log; ends within one. */
    add_region(3, 61, true);
    assert_int_equal(0, dma_log_start(ctx->dma, 16 * UNIT, &pgsize));
    assert_int_equal(16 * UNIT, pgsize);
    mark(20 * UNIT, 1);

    /* A part of a page of the log: reported, and still there afterwards. */
    memset(bitmap, 0, sizeof(bitmap));
    assert_int_equal(0, dma_log_report(ctx->dma, BASE + 24 * UNIT, 4 * UNIT,
                                       UNIT, bitmap));
    assert_int_equal(0x0f, bitmap[0]);

    memset(bitmap, 0, sizeof(bitmap));
    assert_int_equal(0, dma_log_report(ctx->dma, BASE, NR_UNITS * UNIT, UNIT,
                                       bitmap));
    for (u = 0; u < NR_UNITS; u++) {
        assert_int_equal(u >= 19 && u < 35, bit(bitmap, u));
    }

    memset(bitmap, 0, sizeof(bitmap));
    assert_int_equal(0, dma_log_report(ctx->dma, BASE, NR_UNITS * UNIT, UNIT,
                                       bitmap));
    for (u = 0; u < NR_UNITS; u++) {
        assert_false(bit(bitmap, u));
    }

    /* The last page of the log is cut by the region's end, and is cleared. */
    mark(63 * UNIT + 4095, 1);
    assert_int_equal(0, dma_log_report(ctx->dma, BASE + 51 * UNIT, 13 * UNIT,
                                       UNIT, bitmap));
    assert_int_equal(0xff, bitmap[0]);
    assert_int_equal(0x1f, bitmap[1]);
    memset(bitmap, 0, sizeof(bitmap));
    assert_int_equal(0, dma_log_report(ctx->dma, BASE + 51 * UNIT, 13 * UNIT,
                                       UNIT, bitmap));
    assert_int_equal(0, bitmap[0]);
}

/* Regions without a mapping, regions that come and go. */
static void
test_regions(void **state UNUSED)
{
    uint64_t pgsize, bitmap[1] = { 0 };
    dma_sg_t sg;

    add_region(0, 16, false);
    add_region(16, 16, true);
    /* Larger than one of the regions. */
    assert_int_equal(0, dma_log_start(ctx->dma, 64 * UNIT, &pgsize));
    dma_controller_dirty_page_logging_stop(ctx->dma);
    assert_int_equal(0, dma_log_start(ctx->dma, UNIT, &pgsize));

    assert_int_equal(1, dma_addr_to_sgl(ctx->dma, (void *)BASE, UNIT, &sg, 1,
                                        PROT_WRITE));
    dma_sgl_mark_dirty(ctx->dma, &sg, 1);
    add_region(32, 16, true);
    mark(33 * UNIT, 1);
    mark(17 * UNIT, 1);
    assert_int_equal(0, dma_log_report(ctx->dma, BASE, 64 * UNIT, UNIT,
                                       (uint8_t *)bitmap));
    assert_int_equal(1UL << 17 | 1UL << 33, bitmap[0]);

    /* Both ends of the address space, and what is next to them. */
    assert_int_equal(0, dma_log_report(ctx->dma, 0, 1, UNIT,
                                       (uint8_t *)bitmap));
    assert_int_equal(0, dma_log_report(ctx->dma, UINT64_MAX, 1, UNIT,
                                       (uint8_t *)bitmap));
    assert_int_equal(0, dma_log_bitmap_size(UINT64_MAX, 2, UNIT));
    assert_int_equal(0, dma_log_bitmap_size(0, 0, UNIT));
    assert_int_equal(0, dma_log_bitmap_size(0, UNIT, UNIT / 2));
    assert_int_equal(0, dma_log_bitmap_size(0, UNIT, 3 * UNIT));
    assert_int_equal(8, dma_log_bitmap_size(1, UINT64_MAX, 1UL << 63));

    assert_int_equal(0, dma_controller_remove_region(ctx->dma,
        (void *)(BASE + 16 * UNIT), 16 * UNIT, NULL, ctx));
    dma_controller_dirty_page_logging_stop(ctx->dma);
    assert_int_equal(-1, dma_log_report(ctx->dma, BASE, UNIT, UNIT,
                                        (uint8_t *)bitmap));
    assert_int_equal(EINVAL, errno);
}

static void
test_granularity(void **state UNUSED)
{
    static const uint64_t hints[][2] = {
        { 0, 4096 }, { 1, 4096 }, { 4095, 4096 }, { 12288, 4096 },
        { 2UL << 20, 2UL << 20 }, { 1UL << 30, 1UL << 30 },
        { 1UL << 63, 1UL << 30 },
    };
    uint64_t pgsize;
    size_t i;

    add_region(0, 1, true);
    for (i = 0; i < ARRAY_SIZE(hints); i++) {
        assert_int_equal(0, dma_log_start(ctx->dma, hints[i][0], &pgsize));
        assert_int_equal(hints[i][1], pgsize);
        assert_int_equal(-1, dma_log_start(ctx->dma, hints[i][0], &pgsize));
        dma_controller_dirty_page_logging_stop(ctx->dma);
    }
}

/* What a client can ask for in VFIO_USER_DMA_MAP. */
static void
test_map_bounds(void **state UNUSED)
{
    int fd = memfd_create("test", 0);
    struct iovec iov = { 0 };
    dma_sg_t sg;

    assert_int_equal(0, ftruncate(fd, 2 * UNIT));

    /* An offset within a page: the last byte is still in the mapping. */
    assert_int_equal(0, dma_controller_add_region(ctx->dma, (void *)BASE, UNIT,
                                                  fd, 2048,
                                                  PROT_READ | PROT_WRITE));
    assert_int_equal(1, dma_addr_to_sgl(ctx->dma, (void *)BASE, UNIT, &sg, 1,
                                        PROT_WRITE));
    assert_int_equal(0, dma_sgl_get(ctx->dma, &sg, &iov, 1));
    assert_true(iov_end(&iov) <= iov_end(&ctx->dma->regions[0].info.mapping));
    ((char *)iov.iov_base)[UNIT - 1] = 1;

    /* A length that wraps around does not fit into the region. */
    assert_int_equal(-1, dma_addr_to_sgl(ctx->dma, (void *)(BASE + 1),
                                         UINT64_MAX - BASE, &sg, 1,
                                         PROT_WRITE));

    /* Neither does a region into the address space. */
    assert_int_equal(-1, dma_controller_add_region(ctx->dma, (void *)-UNIT,
                                                   2 * UNIT, -1, 0, 0));
    assert_int_equal(EINVAL, errno);

    /* No permission at all. */
    fd = memfd_create("test", 0);
    assert_int_equal(0, ftruncate(fd, UNIT));
    assert_int_equal(1, dma_controller_add_region(ctx->dma,
                                                  (void *)(BASE + UNIT), UNIT,
                                                  fd, 0, PROT_NONE));
    assert_int_equal(-1, dma_addr_to_sgl(ctx->dma, (void *)(BASE + UNIT), 1,
                                         &sg, 1, PROT_READ));
    assert_int_equal(EACCES, errno);
}

/* More than the 16 regions that used to be the limit, to the new one. */
static void
test_many_regions(void **state UNUSED)
{
    uint64_t i;

    for (i = 0; i < 3000; i++) {
        add_region(2 * i, 1, false);
    }
    ctx->dma->max_regions = 3000;
    assert_int_equal(-1, dma_controller_add_region(ctx->dma, (void *)UNIT,
                                                   UNIT, -1, 0, 0));
    assert_int_equal(3000, ctx->dma->nregions);
}

int
main(void)
{
#define TEST(t) cmocka_unit_test_setup_teardown(t, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_exact),
        TEST(test_coarse),
        TEST(test_regions),
        TEST(test_granularity),
        TEST(test_map_bounds),
        TEST(test_many_regions),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
