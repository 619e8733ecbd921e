/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * A device that is nothing but memory (BAR2), and that can be migrated with
 * pre-copy: the least that a server has to do for it, in C.
 *
 * The migration data is a header (magic, number of pages), then records of a
 * page number and a page each, in pre-copy first all pages and then what has
 * changed, and a record that has END instead of a page number and no page.
 */

#include <err.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/param.h>
#include <unistd.h>

#include "common.h"
#include "libvfio-user.h"

#define PGSIZE      4096UL
#define RECORD_SIZE (sizeof(uint64_t) + PGSIZE)
#define MAGIC       0x31304d454d554656UL        /* "VFUMEM01" */
#define END         UINT64_MAX

struct record {
    uint64_t page;
    uint8_t data[PGSIZE];
};

struct server {
    uint8_t *memory;
    uint64_t nr_pages;

    /* The outgoing session. */
    uint64_t next_page;         /* of the first pass; nr_pages when done */
    uint8_t *dirty;             /* by page: changed after it was read */
    uint64_t nr_dirty;
    uint64_t next_dirty;
    bool stopped;
    bool ended;

    /* The record that is being read or written. */
    struct record record;
    size_t size;                /* of the record, as far as it is known */
    size_t done;

    /* The incoming session. */
    bool header_done;
    bool complete;
};

static volatile sig_atomic_t quit;

static void
handle_signal(int signum UNUSED)
{
    quit = 1;
}

static void
log_message(vfu_ctx_t *vfu_ctx UNUSED, int level UNUSED, const char *msg)
{
    fprintf(stderr, "vfu-ref-server: %s\n", msg);
}

static ssize_t
access_memory(vfu_ctx_t *vfu_ctx, char *buf, size_t count, loff_t offset,
              bool is_write)
{
    struct server *s = vfu_get_private(vfu_ctx);
    uint64_t page;

    if (!is_write) {
        memcpy(buf, s->memory + offset, count);
        return count;
    }

    if (s->stopped) {
        errno = EBUSY;
        return -1;
    }

    memcpy(s->memory + offset, buf, count);
    for (page = offset / PGSIZE; page <= (offset + count - 1) / PGSIZE;
         page++) {
        if (page < s->next_page && !s->dirty[page]) {
            s->dirty[page] = 1;
            s->nr_dirty++;
        }
    }
    return count;
}

static void
start_session(struct server *s)
{
    memset(s->dirty, 0, s->nr_pages);
    s->next_page = s->nr_dirty = s->next_dirty = 0;
    s->ended = s->header_done = s->complete = false;

    /* The header is a record that looks like no other. */
    s->record.page = MAGIC;
    memcpy(s->record.data, &s->nr_pages, sizeof(s->nr_pages));
    s->size = 2 * sizeof(uint64_t);
    s->done = 0;
}

/* Puts the next page into the record; false if there is none for now. */
static bool
next_record(struct server *s)
{
    uint64_t page = END;

    if (s->next_page < s->nr_pages) {
        page = s->next_page++;
    } else if (s->nr_dirty > 0) {
        while (!s->dirty[s->next_dirty]) {
            s->next_dirty = (s->next_dirty + 1) % s->nr_pages;
        }
        page = s->next_dirty;
        s->dirty[page] = 0;
        s->nr_dirty--;
    } else if (!s->stopped || s->ended) {
        return false;
    } else {
        s->ended = true;
    }

    s->record.page = page;
    s->size = sizeof(uint64_t);
    s->done = 0;
    if (page != END) {
        memcpy(s->record.data, s->memory + page * PGSIZE, PGSIZE);
        s->size = RECORD_SIZE;
    }
    return true;
}

static ssize_t
read_data(vfu_ctx_t *vfu_ctx, void *buf, uint64_t count)
{
    struct server *s = vfu_get_private(vfu_ctx);
    uint64_t filled = 0;

    while (filled < count && (s->done < s->size || next_record(s))) {
        size_t n = MIN(count - filled, s->size - s->done);

        memcpy((uint8_t *)buf + filled, (uint8_t *)&s->record + s->done, n);
        s->done += n;
        filled += n;
    }
    return filled;
}

/* A record has arrived in full, or as much of it as its kind is known from. */
static int
take_record(struct server *s)
{
    uint64_t nr_pages;

    if (s->complete) {
        return -1;
    }
    if (!s->header_done) {
        memcpy(&nr_pages, s->record.data, sizeof(nr_pages));
        if (s->record.page != MAGIC || nr_pages != s->nr_pages) {
            return -1;
        }
        s->header_done = true;
    } else if (s->done == sizeof(uint64_t)) {
        if (s->record.page == END) {
            s->complete = true;
        } else if (s->record.page >= s->nr_pages) {
            return -1;
        } else {
            s->size = RECORD_SIZE;
            return 0;
        }
    } else {
        memcpy(s->memory + s->record.page * PGSIZE, s->record.data, PGSIZE);
    }
    s->size = sizeof(uint64_t);
    s->done = 0;
    return 0;
}

static ssize_t
write_data(vfu_ctx_t *vfu_ctx, void *buf, uint64_t count)
{
    struct server *s = vfu_get_private(vfu_ctx);
    uint64_t taken = 0;

    while (taken < count) {
        size_t n = MIN(count - taken, s->size - s->done);

        memcpy((uint8_t *)&s->record + s->done, (uint8_t *)buf + taken, n);
        s->done += n;
        taken += n;
        if (s->done == s->size && take_record(s) < 0) {
            s->complete = false;
            s->header_done = false;
            errno = EINVAL;
            return -1;
        }
    }
    return count;
}

static int
transition(vfu_ctx_t *vfu_ctx, vfu_migr_state_t state)
{
    struct server *s = vfu_get_private(vfu_ctx);
    int from = vfu_migration_get_state(vfu_ctx);

    switch (state) {
    case VFU_MIGR_STATE_PRE_COPY:
    case VFU_MIGR_STATE_PRE_COPY_P2P:
        if (from == VFU_MIGR_STATE_RUNNING ||
            from == VFU_MIGR_STATE_RUNNING_P2P) {
            start_session(s);
        }
        break;
    case VFU_MIGR_STATE_STOP_AND_COPY:
        if (from == VFU_MIGR_STATE_STOP) {
            start_session(s);
        }
        break;
    case VFU_MIGR_STATE_RESUME:
        start_session(s);
        break;
    case VFU_MIGR_STATE_STOP:
        if (from == VFU_MIGR_STATE_RESUME && (!s->complete || s->done != 0)) {
            errno = EINVAL;
            return -1;
        }
        break;
    default:
        break;
    }

    s->stopped = state == VFU_MIGR_STATE_STOP ||
                 state == VFU_MIGR_STATE_STOP_AND_COPY ||
                 state == VFU_MIGR_STATE_RESUME;
    return 0;
}

static int
precopy_info(vfu_ctx_t *vfu_ctx, struct vfio_precopy_info *info)
{
    struct server *s = vfu_get_private(vfu_ctx);

    info->initial_bytes = (s->nr_pages - s->next_page) * RECORD_SIZE;
    info->dirty_bytes = s->nr_dirty * RECORD_SIZE;

    /* What has been begun belongs to the pass that it was begun in. */
    if (info->initial_bytes > 0) {
        info->initial_bytes += s->size - s->done;
    } else {
        info->dirty_bytes += s->size - s->done;
    }
    return 0;
}

static int
data_size(vfu_ctx_t *vfu_ctx, uint64_t *stop_copy_length)
{
    struct server *s = vfu_get_private(vfu_ctx);
    struct vfio_precopy_info info;

    switch (vfu_migration_get_state(vfu_ctx)) {
    case VFU_MIGR_STATE_PRE_COPY:
    case VFU_MIGR_STATE_PRE_COPY_P2P:
    case VFU_MIGR_STATE_STOP_AND_COPY:
        precopy_info(vfu_ctx, &info);
        *stop_copy_length = info.initial_bytes + info.dirty_bytes +
                            (s->ended ? 0 : sizeof(uint64_t));
        break;
    default:
        *stop_copy_length = 3 * sizeof(uint64_t) + s->nr_pages * RECORD_SIZE;
    }
    return 0;
}

static int
reset(vfu_ctx_t *vfu_ctx, vfu_reset_type_t type UNUSED)
{
    struct server *s = vfu_get_private(vfu_ctx);

    /* The memory survives; a session does if the migration state does. */
    if (vfu_migration_get_state(vfu_ctx) == VFU_MIGR_STATE_RUNNING) {
        s->stopped = false;
        s->next_page = s->nr_dirty = 0;
        s->size = s->done = 0;
    }
    return 0;
}

static void
dma_register(vfu_ctx_t *vfu_ctx UNUSED, vfu_dma_info_t *info UNUSED)
{
}

static void
dma_unregister(vfu_ctx_t *vfu_ctx UNUSED, vfu_dma_info_t *info UNUSED)
{
}

int
main(int argc, char *argv[])
{
    static const vfu_migration_callbacks_t callbacks = {
        .version = VFU_MIGR_CALLBACKS_VERS,
        .transition = transition,
        .read_data = read_data,
        .write_data = write_data,
    };
    static const vfu_migration_ext_t ext = {
        .version = VFU_MIGR_EXT_VERS,
        .migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P |
                           VFIO_MIGRATION_PRE_COPY,
        .precopy_info = precopy_info,
        .data_size = data_size,
    };
    struct sigaction act = { .sa_handler = handle_signal };
    struct server s = { 0 };
    uint64_t mib, i, seed = 0;
    vfu_ctx_t *ctx;

    if (argc < 3 || argc > 4 || (mib = strtoull(argv[2], NULL, 0)) == 0 ||
        (mib & (mib - 1)) != 0) {
        fprintf(stderr, "Usage: %s SOCKET MIB [SEED]\n"
                "MIB is a power of two; the memory is filled if there is a "
                "SEED\n", argv[0]);
        return EXIT_FAILURE;
    }

    s.nr_pages = (mib << 20) / PGSIZE;
    s.memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    s.dirty = calloc(1, s.nr_pages);
    if (s.memory == MAP_FAILED || s.dirty == NULL) {
        err(EXIT_FAILURE, "no memory");
    }
    if (argc == 4) {
        seed = strtoull(argv[3], NULL, 0);
        for (i = 0; i < (mib << 20) / sizeof(uint64_t); i++) {
            seed = seed * 6364136223846793005UL + 1442695040888963407UL;
            ((uint64_t *)s.memory)[i] = seed;
        }
    }

    sigaction(SIGINT, &act, NULL);
    sigaction(SIGTERM, &act, NULL);

    ctx = vfu_create_ctx(VFU_TRANS_SOCK, argv[1], 0, &s, VFU_DEV_TYPE_PCI);
    if (ctx == NULL) {
        err(EXIT_FAILURE, "failed to create %s", argv[1]);
    }

    if (vfu_setup_log(ctx, log_message, LOG_ERR) < 0 ||
        vfu_pci_init(ctx, VFU_PCI_TYPE_EXPRESS, PCI_HEADER_TYPE_NORMAL,
                     1) < 0) {
        err(EXIT_FAILURE, "failed to set up the device");
    }
    vfu_pci_set_id(ctx, 0x4656, 0x4d52, 0, 0);
    vfu_pci_set_class(ctx, 0x05, 0x80, 0);
    vfu_pci_get_config_space(ctx)->hdr.bars[2].raw |=
        PCI_BASE_ADDRESS_MEM_TYPE_64 | PCI_BASE_ADDRESS_MEM_PREFETCH;

    if (vfu_setup_region(ctx, VFU_PCI_DEV_BAR2_REGION_IDX, mib << 20,
                         access_memory, VFU_REGION_FLAG_RW |
                         VFU_REGION_FLAG_MEM, NULL, 0, -1, 0) < 0 ||
        vfu_setup_device_dma(ctx, dma_register, dma_unregister) < 0 ||
        vfu_setup_device_reset_cb(ctx, reset) < 0 ||
        vfu_setup_device_migration_callbacks(ctx, &callbacks) < 0 ||
        vfu_setup_device_migration_ext(ctx, &ext) < 0 ||
        vfu_realize_ctx(ctx) < 0) {
        err(EXIT_FAILURE, "failed to set up the device");
    }

    while (!quit) {
        if (vfu_attach_ctx(ctx) < 0) {
            if (errno != EINTR) {
                warn("failed to attach");
            }
            continue;
        }
        /* Returns when the client has gone, or at a signal. */
        while (!quit && vfu_run_ctx(ctx) < 0 && errno == EINTR) {
            continue;
        }
    }

    vfu_destroy_ctx(ctx);
    unlink(argv[1]);
    munmap(s.memory, mib << 20);
    free(s.dirty);
    return EXIT_SUCCESS;
}
