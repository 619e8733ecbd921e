/*
 * I/O address spaces.
 *
 * Two locks. `change` of an address space lets one change happen at a time and is held while servers are told of it.
 * `spaces` protects the lists themselves and is taken for a look or an update only, never while a server is waited for:
 * threads that receive take it for DMA, and a server may well ask for DMA before it answers to DMA_MAP.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "iova.h"
#include "uapi.h"

/* DMA is read-only use, and there is a lot of it: a change must not wait for a pause. */
static pthread_rwlock_t spaces = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

void ioas_init(struct ioas *ioas)
{
    memset(ioas, 0, sizeof(*ioas));
    pthread_mutex_init(&ioas->change, NULL);
}

static void release(struct mapping *mapping)
{
    if (mapping->own != NULL) {
        munmap(mapping->own, mapping->own_size);
    }
    if (mapping->backing != NULL) {
        backing_put(mapping->backing);
    }
}

void ioas_destroy(struct ioas *ioas)
{
    for (size_t i = 0; i < ioas->count; i++) {
        release(&ioas->mappings[i]);
    }
    free(ioas->mappings);
    pthread_mutex_destroy(&ioas->change);
}

/* The first mapping that ends at or behind `iova`. */
static size_t position(const struct ioas *ioas, uint64_t iova)
{
    size_t low = 0, high = ioas->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct mapping *mapping = &ioas->mappings[middle];

        if (mapping->iova + (mapping->size - 1) < iova) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* --- changes: with `change` held -------------------------------------------------------------------------------- */

static int insert(struct ioas *ioas, const struct mapping *mapping)
{
    size_t at = position(ioas, mapping->iova);
    int result = 0;

    if (at < ioas->count && ioas->mappings[at].iova <= mapping->iova + (mapping->size - 1)) {
        return -EEXIST;
    }
    pthread_rwlock_wrlock(&spaces);
    if (ioas->count == ioas->room) {
        size_t room = ioas->room == 0 ? 64 : ioas->room * 2;
        struct mapping *mappings = realloc(ioas->mappings, room * sizeof(*mappings));

        if (mappings == NULL) {
            result = -ENOMEM;
            goto out;
        }
        ioas->mappings = mappings;
        ioas->room = room;
    }
    memmove(&ioas->mappings[at + 1], &ioas->mappings[at], (ioas->count - at) * sizeof(*mapping));
    ioas->mappings[at] = *mapping;
    ioas->count++;
out:
    pthread_rwlock_unlock(&spaces);
    return result;
}

static void take_out(struct ioas *ioas, size_t at, size_t count)
{
    pthread_rwlock_wrlock(&spaces);
    for (size_t i = at; i < at + count; i++) {
        release(&ioas->mappings[i]);
    }
    memmove(&ioas->mappings[at], &ioas->mappings[at + count], (ioas->count - at - count) * sizeof(*ioas->mappings));
    ioas->count -= count;
    pthread_rwlock_unlock(&spaces);
}

/* Add a mapping, known to us before servers hear of it and may use it. It is ours to release if that fails. */
static int add(struct ioas *ioas, struct mapping *mapping)
{
    struct dma_client *client;
    int result;

    pthread_mutex_lock(&ioas->change);
    result = insert(ioas, mapping);
    if (result != 0) {
        release(mapping);
        goto out;
    }
    for (client = ioas->clients; client != NULL; client = client->next) {
        result = client->map(client, mapping);
        if (result != 0) {
            for (struct dma_client *done = ioas->clients; done != client; done = done->next) {
                done->unmap(done, mapping);
            }
            take_out(ioas, position(ioas, mapping->iova), 1);
            break;
        }
    }
out:
    pthread_mutex_unlock(&ioas->change);
    return result;
}

int ioas_map(struct ioas *ioas, uint64_t iova, uint64_t size, uint32_t flags, uint64_t address)
{
    struct mapping mapping = { .iova = iova, .size = size, .flags = flags, .address = address };

    mapping.backing = backing_of_memory(address, size, flags & VFIO_DMA_MAP_FLAG_WRITE, &mapping.offset);
    return add(ioas, &mapping);
}

int ioas_map_file(struct ioas *ioas, uint64_t iova, uint64_t size, uint32_t flags, int fd, uint64_t start)
{
    struct mapping mapping = { .iova = iova, .size = size, .flags = flags, .offset = start };
    struct stat status;
    uint64_t lead;

    mapping.backing = backing_of_file(fd, start, size, flags & VFIO_DMA_MAP_FLAG_WRITE);
    if (mapping.backing == NULL || syscall(SYS_fstat, fd, &status) != 0) {
        return -EINVAL;
    }
    /* For DMA by message; in whole pages of the file, which may be huge ones. */
    lead = start % MAX((uint64_t)status.st_blksize, PAGE_BYTES);
    mapping.own_size = lead + size;
    mapping.own = mmap(NULL, mapping.own_size, PROT_READ | (flags & VFIO_DMA_MAP_FLAG_WRITE ? PROT_WRITE : 0),
                       MAP_SHARED | MAP_NORESERVE, mapping.backing->fd, (off_t)(start - lead));
    if (mapping.own == MAP_FAILED) {
        int error = errno;

        backing_put(mapping.backing);
        return -error;
    }
    mapping.address = ADDRESS(mapping.own) + lead;
    return add(ioas, &mapping);
}

int ioas_unmap(struct ioas *ioas, uint64_t iova, uint64_t last, uint64_t *unmapped)
{
    size_t first, count = 0;
    int result = 0;

    *unmapped = 0;
    pthread_mutex_lock(&ioas->change);
    first = position(ioas, iova);
    while (first + count < ioas->count && ioas->mappings[first + count].iova <= last) {
        const struct mapping *mapping = &ioas->mappings[first + count];

        if (mapping->iova < iova || mapping->iova + (mapping->size - 1) > last) {
            say("an unmap of [%#llx, %#llx] would split the mapping at %#llx of %#llx bytes: refused",
                (unsigned long long)iova, (unsigned long long)last, (unsigned long long)mapping->iova,
                (unsigned long long)mapping->size);
            result = -EBUSY;
            goto out;
        }
        count++;
    }
    for (size_t i = first; i < first + count; i++) {
        for (struct dma_client *client = ioas->clients; client != NULL; client = client->next) {
            client->unmap(client, &ioas->mappings[i]);
        }
        *unmapped += ioas->mappings[i].size;
    }
    if (count > 0) {
        take_out(ioas, first, count);
    }
out:
    pthread_mutex_unlock(&ioas->change);
    return result;
}

bool ioas_is_used(struct ioas *ioas)
{
    bool used;

    pthread_rwlock_rdlock(&spaces);
    used = ioas->count > 0;
    pthread_rwlock_unlock(&spaces);
    return used;
}

int ioas_attach(struct ioas *ioas, struct dma_client *client)
{
    int result = 0;

    pthread_mutex_lock(&ioas->change);
    pthread_rwlock_wrlock(&spaces);
    client->ioas = ioas;
    pthread_rwlock_unlock(&spaces);
    for (size_t i = 0; i < ioas->count && result == 0; i++) {
        result = client->map(client, &ioas->mappings[i]);
        if (result != 0) {
            while (i-- > 0) {
                client->unmap(client, &ioas->mappings[i]);
            }
            break;
        }
    }
    pthread_rwlock_wrlock(&spaces);
    if (result == 0) {
        client->next = ioas->clients;
        ioas->clients = client;
    } else {
        client->ioas = NULL;
    }
    pthread_rwlock_unlock(&spaces);
    pthread_mutex_unlock(&ioas->change);
    return result;
}

void ioas_detach(struct dma_client *client)
{
    struct ioas *ioas = client->ioas;
    struct dma_client **link;

    if (ioas == NULL) {
        return;
    }
    pthread_mutex_lock(&ioas->change);
    for (size_t i = 0; i < ioas->count; i++) {
        client->unmap(client, &ioas->mappings[i]);
    }
    pthread_rwlock_wrlock(&spaces);
    for (link = &ioas->clients; *link != client; link = &(*link)->next) {
    }
    *link = client->next;
    client->ioas = NULL;
    pthread_rwlock_unlock(&spaces);
    pthread_mutex_unlock(&ioas->change);
}

/* --- DMA by message: in the thread that receives ---------------------------------------------------------------- */

/* Do the part of an access that lies in one mapping; its size, or -errno. */
static ssize_t access_one(const struct mapping *mapping, bool write, uint64_t iova, void *data, size_t size)
{
    uint64_t start = iova - mapping->iova;
    size_t part = (size_t)MIN((uint64_t)size, mapping->size - start);
    int result;

    if (!(mapping->flags & (write ? VFIO_DMA_MAP_FLAG_WRITE : VFIO_DMA_MAP_FLAG_READ))) {
        return -EPERM;
    }
    if (write) {
        result = copy_to_user(mapping->address + start, data, part);
    } else {
        result = copy_from_user(data, mapping->address + start, part);
    }
    return result != 0 ? result : (ssize_t)part;
}

static int access_all(struct dma_client *client, bool write, uint64_t iova, void *data, size_t size)
{
    int result = 0;

    pthread_rwlock_rdlock(&spaces);
    while (size > 0) {
        const struct ioas *ioas = client->ioas;
        size_t at = ioas == NULL ? 0 : position(ioas, iova);
        ssize_t done;

        if (ioas == NULL || at == ioas->count || ioas->mappings[at].iova > iova) {
            result = -EFAULT;
            break;
        }
        done = access_one(&ioas->mappings[at], write, iova, data, size);
        if (done < 0) {
            result = (int)done;
            break;
        }
        iova += (uint64_t)done;
        data = (char *)data + done;
        size -= (size_t)done;
    }
    pthread_rwlock_unlock(&spaces);
    return result;
}

int dma_read(struct dma_client *client, uint64_t iova, void *data, size_t size)
{
    return access_all(client, false, iova, data, size);
}

int dma_write(struct dma_client *client, uint64_t iova, const void *data, size_t size)
{
    int result = access_all(client, true, iova, (void *)(uintptr_t)data, size);

    /* After the write: a page marked before it could be reported, copied and only then written to. */
    if (!config.forget_writes) {
        dirty_mark(&client->log, iova, size);
    }
    return result;
}

void dma_mark_mapped(struct dma_client *client)
{
    pthread_rwlock_rdlock(&spaces);
    for (size_t i = 0; client->ioas != NULL && i < client->ioas->count; i++) {
        const struct mapping *mapping = &client->ioas->mappings[i];

        if (mapping->flags & VFIO_DMA_MAP_FLAG_WRITE) {
            dirty_mark(&client->log, mapping->iova, mapping->size);
        }
    }
    pthread_rwlock_unlock(&spaces);
}
