/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* The files behind DMA regions: their size, how they are shared, their end. */

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"
#include "dma.h"
#include "dma_access.h"
#include "dma_log.h"
#include "libvfio-user.h"
#include "private.h"

#define PAGE 4096UL
#define BASE (1UL << 32)
#define RW (PROT_READ | PROT_WRITE)

static vfu_ctx_t *ctx;
static int fd = -1;

static int
setup(void **state UNUSED)
{
    ctx = vfu_create_ctx(VFU_TRANS_PIPE, "test", 0, NULL, VFU_DEV_TYPE_PCI);
    fd = memfd_create("test", MFD_ALLOW_SEALING);
    if (ctx == NULL || fd < 0 || vfu_setup_device_dma(ctx, NULL, NULL) < 0) {
        return -1;
    }
    return 0;
}

static int
teardown(void **state UNUSED)
{
    vfu_destroy_ctx(ctx);
    close(fd);
    return 0;
}

static int
add(uint64_t page, uint64_t nr_pages, off_t offset, uint32_t prot)
{
    return dma_controller_add_region(ctx->dma, (void *)(BASE + page * PAGE),
                                     nr_pages * PAGE, fd, offset, prot);
}

static int
nr_files(void)
{
    dma_file_t *file;
    int nr = 0;

    LIST_FOREACH(file, &ctx->dma->files, entry) {
        nr++;
    }
    return nr;
}

static int
count_lines(const char *path)
{
    FILE *f = fopen(path, "r");
    int c, nr = 0;

    assert_non_null(f);
    while ((c = getc(f)) != EOF) {
        nr += c == '\n';
    }
    fclose(f);
    return nr;
}

static int
access_page(uint64_t page, char *data, int flags)
{
    return vfu_dma_access(ctx, (void *)(BASE + page * PAGE), data, PAGE,
                          flags);
}

/* No region is larger than its file, wherever it begins. */
static void
test_larger_than_file(void **state UNUSED)
{
    assert_int_equal(0, ftruncate(fd, 4 * PAGE));

    assert_int_equal(-1, add(0, 5, 0, RW));
    assert_int_equal(EINVAL, errno);
    assert_int_equal(-1, add(0, 1, 4 * PAGE, RW));
    assert_int_equal(EINVAL, errno);
    assert_int_equal(-1, add(0, 4, PAGE, RW));
    assert_int_equal(EINVAL, errno);
    assert_int_equal(-1, add(0, 1, 1L << 40, RW));
    assert_int_equal(EINVAL, errno);
    assert_int_equal(-1, add(0, 0, 0, RW));
    assert_int_equal(EINVAL, errno);
    assert_int_equal(0, nr_files());

    assert_int_equal(0, add(0, 4, 0, RW));
    assert_int_equal(1, add(4, 1, 3 * PAGE, RW));
    assert_int_equal(1, nr_files());
}

/* A file that is shortened costs the accesses that miss it, and nothing else. */
static void
test_shortened_file(void **state UNUSED)
{
    char data[PAGE];

    assert_int_equal(0, dma_access_init());     /* cmocka takes it over */
    assert_int_equal(0, ftruncate(fd, 4 * PAGE));
    assert_int_equal(0, add(0, 4, 0, RW));

    memset(data, 1, PAGE);
    assert_int_equal(0, access_page(3, data, VFU_DMA_WRITE));
    memset(data, 0, PAGE);
    assert_int_equal(0, access_page(3, data, 0));
    assert_int_equal(1, data[PAGE - 1]);

    assert_int_equal(0, ftruncate(fd, 2 * PAGE));
    /* Twice: nothing may be left blocked by the first one. */
    assert_int_equal(-1, access_page(3, data, 0));
    assert_int_equal(EFAULT, errno);
    assert_int_equal(-1, access_page(2, data, VFU_DMA_WRITE));
    assert_int_equal(EFAULT, errno);
    assert_int_equal(0, access_page(1, data, VFU_DMA_WRITE));

    assert_int_equal(0, ftruncate(fd, 4 * PAGE));
    assert_int_equal(0, access_page(3, data, 0));
    assert_int_equal(0, data[PAGE - 1]);
}

/* What a write may have touched is dirty, though it failed. */
static void
test_failed_write_is_dirty(void **state UNUSED)
{
    uint64_t pgsize;
    uint8_t bitmap[8] = { 0 };
    char data[2 * PAGE] = { 0 };

    assert_int_equal(0, dma_access_init());
    assert_int_equal(0, ftruncate(fd, 4 * PAGE));
    assert_int_equal(0, add(0, 4, 0, RW));
    assert_int_equal(0, dma_log_start(ctx->dma, PAGE, &pgsize));

    assert_int_equal(0, access_page(0, data, VFU_DMA_WRITE | VFU_DMA_UNLOGGED));
    assert_int_equal(0, ftruncate(fd, 2 * PAGE));
    assert_int_equal(-1, vfu_dma_access(ctx, (void *)(BASE + PAGE), data,
                                        2 * PAGE, VFU_DMA_WRITE));
    assert_int_equal(0, dma_log_report(ctx->dma, BASE, 4 * PAGE, PAGE, bitmap));
    assert_int_equal(6, bitmap[0]);
}

/* Permissions and bounds hold for vfu_dma_access() as for vfu_addr_to_sgl(). */
static void
test_refused_access(void **state UNUSED)
{
    char data[2 * PAGE];

    assert_int_equal(0, ftruncate(fd, 4 * PAGE));
    assert_int_equal(0, add(0, 1, 0, PROT_READ));
    assert_int_equal(1, add(1, 1, PAGE, RW));

    assert_int_equal(-1, access_page(0, data, VFU_DMA_WRITE));
    assert_int_equal(EACCES, errno);
    assert_int_equal(-1, access_page(2, data, 0));
    assert_int_equal(ENOENT, errno);
    assert_int_equal(-1, vfu_dma_access(ctx, (void *)BASE, data, 2 * PAGE, 0));
    assert_int_equal(E2BIG, errno);
    assert_int_equal(-1, vfu_dma_access(ctx, (void *)BASE, data, 1, 1 << 7));
    assert_int_equal(EINVAL, errno);
    assert_int_equal(-1, vfu_dma_access(ctx, (void *)BASE, data, 0, 0));
    assert_int_equal(EINVAL, errno);
}

/* A SIGBUS that is none of ours is whose it was before: here, deadly. */
static void
test_foreign_sigbus(void **state UNUSED)
{
    int i;

    for (i = 0; i < 2; i++) {
        int status;
        pid_t pid;

        fflush(NULL);
        pid = fork();
        if (pid == 0) {
            char *there = mmap(NULL, PAGE, RW, MAP_SHARED, fd, 0);

            signal(SIGBUS, SIG_DFL);
            if (dma_access_init() == 0) {
                if (i == 0) {
                    there[0] = 1;
                } else {
                    raise(SIGBUS);
                }
            }
            _exit(1);
        }
        assert_int_equal(pid, waitpid(pid, &status, 0));
        assert_true(WIFSIGNALED(status));
        assert_int_equal(SIGBUS, WTERMSIG(status));
    }
}

/* All regions of one file share one mapping, and keep no file descriptor. */
static void
test_shared_mapping(void **state UNUSED)
{
    struct rlimit limit = { 64, 64 }, old;
    int before, maps;
    uint64_t i;

    assert_int_equal(0, ftruncate(fd, 16 * PAGE));
    assert_int_equal(0, getrlimit(RLIMIT_NOFILE, &old));
    limit.rlim_max = old.rlim_max;
    assert_int_equal(0, setrlimit(RLIMIT_NOFILE, &limit));
    maps = count_lines("/proc/self/maps");
    before = dup(fd);
    close(before);

    for (i = 0; i < MAX_DMA_REGIONS; i++) {
        assert_int_equal(i, add(i, 1, (i % 16) * PAGE, RW));
    }
    assert_int_equal(MAX_DMA_REGIONS, ctx->dma->nregions);
    assert_int_equal(1, nr_files());
    assert_true(count_lines("/proc/self/maps") < maps + 64);
    assert_int_equal(before, dup(fd));
    close(before);

    /* The ends are found, and each has its own part of the file. */
    assert_ptr_equal((char *)ctx->dma->regions[15].info.vaddr,
                     (char *)ctx->dma->regions[0].info.vaddr + 15 * PAGE);
    assert_int_equal(-1, add(MAX_DMA_REGIONS, 1, 0, RW));
    for (i = MAX_DMA_REGIONS; i-- > 1; ) {
        assert_int_equal(0, dma_controller_remove_region(ctx->dma,
                                (void *)(BASE + i * PAGE), PAGE, NULL, NULL));
    }
    assert_int_equal(1, nr_files());
    dma_controller_remove_all_regions(ctx->dma, NULL, NULL);
    assert_int_equal(0, nr_files());
    assert_int_equal(0, setrlimit(RLIMIT_NOFILE, &old));
}

/* Another permission is another mapping; a file that has grown is one, too. */
static void
test_kinds_of_mappings(void **state UNUSED)
{
    int other = fd;
    char data[PAGE] = { 0 };

    assert_int_equal(0, ftruncate(fd, 2 * PAGE));
    assert_int_equal(0, add(0, 1, 0, RW));
    assert_int_equal(1, add(1, 1, 0, PROT_READ));
    assert_int_equal(2, nr_files());
    assert_int_equal(0, ftruncate(fd, 4 * PAGE));
    assert_int_equal(2, add(2, 1, 3 * PAGE, RW));
    assert_int_equal(3, nr_files());
    assert_int_equal(3, add(3, 1, PAGE, RW));
    assert_int_equal(3, nr_files());
    data[0] = 5;
    assert_int_equal(0, access_page(2, data, VFU_DMA_WRITE));

    /* A second file is not taken for the first. */
    fd = memfd_create("other", MFD_ALLOW_SEALING);
    assert_int_equal(0, ftruncate(fd, 4 * PAGE));
    assert_int_equal(4, add(4, 1, 3 * PAGE, RW));
    assert_int_equal(4, nr_files());
    assert_int_equal(0, access_page(4, data, 0));
    assert_int_equal(0, data[0]);
    close(other);
}

/* A file that is sealed against writing can still be read. */
static void
test_sealed_file(void **state UNUSED)
{
    assert_int_equal(0, ftruncate(fd, PAGE));
    assert_int_equal(0, fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE));
    assert_int_equal(-1, add(0, 1, 0, RW));
    assert_int_equal(EPERM, errno);
    assert_int_equal(0, add(0, 1, 0, PROT_READ));
}

/* A file that is larger than all that can be mapped: a part of it is enough. */
static void
test_giant_file(void **state UNUSED)
{
    char data[PAGE];

    assert_int_equal(0, ftruncate(fd, MAX_DMA_SIZE + 2 * PAGE));
    assert_int_equal(0, add(0, 1, MAX_DMA_SIZE + PAGE, RW));
    assert_int_equal(0, access_page(0, data, 0));
    assert_int_equal(1, add(1, 1, MAX_DMA_SIZE, RW));
    assert_int_equal(2, nr_files());
}

/* What is there already is refused, if it is the very same region as well. */
static void
test_there_already(void **state UNUSED)
{
    assert_int_equal(0, ftruncate(fd, 4 * PAGE));
    assert_int_equal(0, add(2, 2, 0, RW));
    assert_int_equal(-1, add(2, 2, 0, RW));
    assert_int_equal(EEXIST, errno);
    assert_int_equal(-1, add(1, 2, 0, RW));
    assert_int_equal(EEXIST, errno);
    assert_int_equal(-1, add(3, 2, 0, RW));
    assert_int_equal(EEXIST, errno);
    assert_int_equal(-1, add(1, 4, 0, RW));
    assert_int_equal(EEXIST, errno);
    assert_int_equal(0, add(1, 1, 0, RW));
    assert_int_equal(2, add(4, 1, 0, RW));
    assert_int_equal(3, ctx->dma->nregions);
}

int
main(void)
{
#define TEST(t) cmocka_unit_test_setup_teardown(t, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_larger_than_file),
        TEST(test_shortened_file),
        TEST(test_failed_write_is_dirty),
        TEST(test_refused_access),
        TEST(test_foreign_sigbus),
        TEST(test_shared_mapping),
        TEST(test_kinds_of_mappings),
        TEST(test_sealed_file),
        TEST(test_giant_file),
        TEST(test_there_already),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
