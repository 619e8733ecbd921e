/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* Regions that are nothing but memory: bounds, marks, windows, counts. */

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "libvfio-user.h"
#include "private.h"
#include "region_memory.h"

#define PAGE 64U
#define PAGES 8U
#define SIZE (PAGE * PAGES)
#define NR_EDGES 3
#define NR_COUNTS (VFU_REGION_COUNTS_BUCKETS + NR_EDGES + 1)
#define WRITTEN 1
#define ROUNDS 20000

/* Of their exact size, so that a sanitizer sees every step beyond. */
static char *data, *expected;
static uint8_t *marks;
static uint64_t *reads, *writes;
static uint64_t window;
static uint8_t running = 1;
static const uint64_t edges[NR_EDGES] = { 0, 1000, UINT64_MAX };
static vfu_region_memory_t memory;

static int
setup(void **state UNUSED)
{
    data = calloc(1, SIZE);
    expected = calloc(1, SIZE);
    marks = calloc(1, PAGES);
    reads = calloc(NR_COUNTS, sizeof(*reads));
    writes = calloc(NR_COUNTS, sizeof(*writes));
    memory = (vfu_region_memory_t){
        .data = data,
        .size = SIZE,
        .marks = marks,
        .page_shift = 6,
        .mark = WRITTEN,
        .enabled = 1,
        .nr_edges = NR_EDGES,
        .edges = edges,
        .window = &window,
        .running = &running,
        .reads = reads,
        .writes = writes,
    };
    window = 0;
    return data && expected && marks && reads && writes ? 0 : -1;
}

static int
teardown(void **state UNUSED)
{
    free(data);
    free(expected);
    free(marks);
    free(reads);
    free(writes);
    return 0;
}

static uint64_t
sum_of_buckets(const uint64_t *counts)
{
    uint64_t sum = 0;
    size_t i;

    for (i = VFU_REGION_COUNTS_BUCKETS; i < NR_COUNTS; i++) {
        sum += counts[i];
    }
    return sum;
}

/* Accesses of any size and alignment, in windows that begin anywhere. */
static void
test_model(void **state UNUSED)
{
    uint64_t nr_reads = 0, nr_writes = 0, read_bytes = 0, written_bytes = 0;
    unsigned seed = 1;
    int round;

    for (round = 0; round < ROUNDS; round++) {
        size_t count = 1 + rand_r(&seed) % (rand_r(&seed) % 8 ? 8 : 2 * PAGE + 9);
        uint64_t offset = rand_r(&seed) % (SIZE + 16);
        bool is_write = rand_r(&seed) % 2;
        uint8_t marked[PAGES] = { 0 };
        char *buf = malloc(count);
        size_t i;

        assert_non_null(buf);
        window = rand_r(&seed) % 4 ? 0 : rand_r(&seed) % (SIZE + 16);
        memset(marks, 0, PAGES);
        for (i = 0; i < count; i++) {
            buf[i] = rand_r(&seed);
        }
        for (i = 0; is_write && i < count && window + offset + i < SIZE; i++) {
            expected[window + offset + i] = buf[i];
            marked[(window + offset + i) / PAGE] = WRITTEN;
        }

        region_memory_access(&memory, buf, count, offset, is_write);

        for (i = 0; !is_write && i < count; i++) {
            uint64_t at = window + offset + i;

            assert_int_equal(buf[i], at < SIZE ? expected[at] : (char)0xff);
        }
        assert_memory_equal(data, expected, SIZE);
        assert_memory_equal(marks, marked, PAGES);
        *(is_write ? &nr_writes : &nr_reads) += 1;
        *(is_write ? &written_bytes : &read_bytes) += count;
        free(buf);
    }

    assert_int_equal(reads[VFU_REGION_COUNTS_ACCESSES], nr_reads);
    assert_int_equal(writes[VFU_REGION_COUNTS_ACCESSES], nr_writes);
    assert_int_equal(reads[VFU_REGION_COUNTS_BYTES], read_bytes);
    assert_int_equal(writes[VFU_REGION_COUNTS_BYTES], written_bytes);
    assert_int_equal(sum_of_buckets(reads), nr_reads);
    assert_int_equal(sum_of_buckets(writes), nr_writes);
    assert_true(nr_reads > 0 && nr_writes > 0);
    assert_true(writes[VFU_REGION_COUNTS_NS] > 0);
    /* Nothing takes longer than the last edge. */
    assert_int_equal(reads[NR_COUNTS - 1], 0);
}

/* A guest's register may say where a window begins. */
static void
test_wild_windows(void **state UNUSED)
{
    static const uint64_t windows[] = {
        SIZE, SIZE - 1, 1UL << 63, UINT64_MAX, UINT64_MAX - 7, -(uint64_t)SIZE
    };
    char last[] = "xyz";
    size_t i;

    for (i = 0; i < ARRAY_SIZE(windows); i++) {
        char buf[8] = "abcdefg";

        window = windows[i];
        region_memory_access(&memory, buf, sizeof(buf), SIZE, true);
        region_memory_access(&memory, buf, sizeof(buf), SIZE, false);
        assert_memory_equal(buf, "\xff\xff\xff\xff\xff\xff\xff\xff", 8);
        region_memory_access(&memory, buf, sizeof(buf), UINT64_MAX, true);
    }
    assert_memory_equal(data, expected, SIZE);
    for (i = 0; i < PAGES; i++) {
        assert_int_equal(marks[i], 0);
    }

    window = SIZE - 1;
    region_memory_access(&memory, last, sizeof(last), 0, true);
    assert_int_equal(data[SIZE - 1], 'x');
    assert_int_equal(marks[PAGES - 1], WRITTEN);
}

static ssize_t
callback(vfu_ctx_t *ctx UNUSED, char *buf UNUSED, size_t count,
         loff_t offset UNUSED, bool is_write UNUSED)
{
    return count;
}

static void
test_setup(void **state UNUSED)
{
    vfu_ctx_t *ctx = vfu_create_ctx(VFU_TRANS_PIPE, "test", 0, NULL,
                                    VFU_DEV_TYPE_PCI);
    vfu_region_memory_t bad = memory;

    assert_non_null(ctx);
    assert_int_equal(vfu_setup_region(ctx, VFU_PCI_DEV_BAR2_REGION_IDX, SIZE,
                                      callback, VFU_REGION_FLAG_RW |
                                      VFU_REGION_FLAG_MEM, NULL, 0, -1, 0), 0);
    assert_int_equal(vfu_setup_region_memory(ctx, VFU_PCI_DEV_BAR2_REGION_IDX,
                                             &memory), 0);
    assert_true(region_memory_serves(
        ctx->reg_info[VFU_PCI_DEV_BAR2_REGION_IDX].memory));
    running = 0;
    assert_false(region_memory_serves(&memory));
    running = 1;
    memory.enabled = 0;
    assert_false(region_memory_serves(&memory));
    assert_false(region_memory_serves(NULL));

    assert_int_equal(vfu_setup_region_memory(ctx, VFU_PCI_DEV_CFG_REGION_IDX,
                                             &memory), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(vfu_setup_region_memory(ctx, -1, &memory), -1);
    assert_int_equal(vfu_setup_region_memory(ctx, VFU_PCI_DEV_NUM_REGIONS,
                                             &memory), -1);
    bad.page_shift = 64;
    assert_int_equal(vfu_setup_region_memory(ctx, VFU_PCI_DEV_BAR2_REGION_IDX,
                                             &bad), -1);
    assert_int_equal(vfu_setup_region_memory(ctx, VFU_PCI_DEV_BAR2_REGION_IDX,
                                             NULL), 0);
    assert_null(ctx->reg_info[VFU_PCI_DEV_BAR2_REGION_IDX].memory);
    vfu_destroy_ctx(ctx);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_model, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wild_windows, setup, teardown),
        cmocka_unit_test_setup_teardown(test_setup, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
