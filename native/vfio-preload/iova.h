/*
 * I/O address spaces: what is mapped, the devices that may reach it, and DMA by message.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef IOVA_H
#define IOVA_H

#include <pthread.h>

#include "common.h"

/* --- backing.c: the file behind memory, which a server can map --- */

struct backing {
    struct backing *next;
    unsigned int references;
    dev_t device;
    ino_t inode;
    int fd; /* our own */
    bool checked; /* whether the program has it mapped privately */
};

/*
 * The file that `size` bytes at `address` are a shared mapping of, and their offset in it; NULL if there is none that a
 * server could map: anonymous and private memory, memory of several files, files that no descriptor is open for.
 */
struct backing *backing_of_memory(uint64_t address, uint64_t size, bool writable, uint64_t *offset);

/* The same for a file: NULL if it is too short, or not one to map. */
struct backing *backing_of_file(int fd, uint64_t offset, uint64_t size, bool writable);

void backing_put(struct backing *backing);

/* --- dirty.c: which pages were written to, by I/O address --- */

struct dirty_log {
    pthread_mutex_t lock;
    bool on;
    struct dirty_chunk *chunks; /* a hash table */
    size_t count, room; /* room: a power of two */
    bool overflowed; /* there was no memory for it: everything is dirty */
};

void dirty_init(struct dirty_log *log);
void dirty_destroy(struct dirty_log *log);
void dirty_start(struct dirty_log *log);
void dirty_stop(struct dirty_log *log);
bool dirty_is_on(struct dirty_log *log);
void dirty_mark(struct dirty_log *log, uint64_t iova, uint64_t size);

/* OR the pages of [iova, iova + length) into the caller's bitmap, a bit for `page_size` bytes, and forget them. */
int dirty_report(struct dirty_log *log, uint64_t iova, uint64_t length, uint64_t page_size, uint64_t bitmap);

/* --- iova.c --- */

struct mapping {
    uint64_t iova, size;
    uint32_t flags; /* VFIO_DMA_MAP_FLAG_{READ,WRITE} */
    uint64_t address;
    void *own; /* memory of ours at `address`, mapped for this; NULL: it is the caller's */
    size_t own_size;
    struct backing *backing; /* NULL: DMA only by message */
    uint64_t offset; /* in the backing */
};

/* Somebody who does DMA. `map` and `unmap` tell its server and may wait: no lock of the DMA path is held then. */
struct dma_client {
    struct dma_client *next; /* of the same ioas */
    struct ioas *ioas;
    int (*map)(struct dma_client *client, const struct mapping *mapping);
    void (*unmap)(struct dma_client *client, const struct mapping *mapping);
    struct dirty_log log;
};

struct ioas {
    pthread_mutex_t change; /* one change at a time; held while servers are told */
    struct mapping *mappings; /* ascending */
    size_t count, room;
    struct dma_client *clients;
};

void ioas_init(struct ioas *ioas);
void ioas_destroy(struct ioas *ioas);

/* Each returns 0 or -errno. -EEXIST: something is mapped there. */
int ioas_map(struct ioas *ioas, uint64_t iova, uint64_t size, uint32_t flags, uint64_t address);
int ioas_map_file(struct ioas *ioas, uint64_t iova, uint64_t size, uint32_t flags, int fd, uint64_t start);

/* -EBUSY: a mapping is partly outside; nothing is changed then. `unmapped`: bytes. */
int ioas_unmap(struct ioas *ioas, uint64_t iova, uint64_t last, uint64_t *unmapped);

/* Whether anything is mapped. */
bool ioas_is_used(struct ioas *ioas);

int ioas_attach(struct ioas *ioas, struct dma_client *client);
void ioas_detach(struct dma_client *client);

/* DMA of the client's server, by message: 0, -EFAULT (nothing there), -EPERM (not in this direction). */
int dma_read(struct dma_client *client, uint64_t iova, void *data, size_t size);
int dma_write(struct dma_client *client, uint64_t iova, const void *data, size_t size);

/* Whether all of [iova, iova + length) that is mapped has to be taken for dirty: mark it in the client's log. */
void dma_mark_mapped(struct dma_client *client);

#endif
