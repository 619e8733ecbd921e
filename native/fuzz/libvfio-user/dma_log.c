/*
 * Target: regions, DMA and its log in libvfio-user, against a model that keeps a flag for every page.
 *
 * The input is steps, each a byte and its numbers. Guest memory is 16 slots of 1 MiB; a slot holds a region at its
 * start, or none. A report may never miss a page that was written; where page sizes agree it has no other page either.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "device.h"
#include "records.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define SLOTS 16
#define SLOT_PAGES 256
#define PAGE 4096ULL
#define SLOT_BYTES (SLOT_PAGES * PAGE)
#define PAGES (SLOTS * SLOT_PAGES)

static struct slot {
    bool mapped, writable, by_message;
    unsigned int pages, file, first_page; /* of the file */
} slots[SLOTS];
static bool dirty[PAGES];
static unsigned int log_page; /* bytes; 0: no log */
static unsigned int file_pages[2]; /* how long each file is now */

static uint64_t slot_iova(unsigned int number)
{
    return GUEST_BASE + number * SLOT_BYTES;
}

/* What the client's memory holds where the server reaches it by message. */
static uint8_t pattern(uint64_t address)
{
    return (uint8_t)(address * 37 >> 3);
}

/* --- the steps --------------------------------------------------------------------------------------------------- */

static void map(struct input *input)
{
    unsigned int number = (unsigned int)take(input, 1) % SLOTS;
    struct slot wanted = { .mapped = true, .pages = (unsigned int)take(input, 1) % SLOT_PAGES + 1 };
    uint8_t how = (uint8_t)take(input, 1);
    struct vfio_user_dma_map request = {
        .argsz = sizeof(request), .addr = slot_iova(number), .size = wanted.pages * PAGE
    };
    bool fits;
    int error;

    wanted.writable = how & 1;
    wanted.by_message = how >> 1 & 1;
    wanted.file = how >> 2 & 1;
    wanted.first_page = how >> 3;
    request.flags = VFIO_USER_F_DMA_REGION_READ | (wanted.writable ? VFIO_USER_F_DMA_REGION_WRITE : 0);
    request.offset = wanted.by_message ? 0 : wanted.first_page * PAGE;
    fits = wanted.by_message || wanted.first_page + wanted.pages <= file_pages[wanted.file];
    error = client_call(VFIO_USER_DMA_MAP, &request, sizeof(request),
                        wanted.by_message ? -1 : client_fd(wanted.file ? FD_SECOND_FILE : FD_FILE), NULL, NULL);
    if (error != (slots[number].mapped ? EEXIST : fits ? 0 : EINVAL)) {
        fault("DMA_MAP of %u pages in slot %u: error %d", wanted.pages, number, error);
    }
    if (error == 0) {
        slots[number] = wanted;
    }
}

static void forget(unsigned int number)
{
    slots[number].mapped = false;
    memset(&dirty[number * SLOT_PAGES], 0, SLOT_PAGES * sizeof(dirty[0]));
}

static void unmap(struct input *input)
{
    unsigned int number = (unsigned int)take(input, 1) % SLOTS;
    struct vfio_user_dma_unmap request = {
        .argsz = sizeof(request), .addr = slot_iova(number), .size = slots[number].pages * PAGE
    };
    int error = client_call(VFIO_USER_DMA_UNMAP, &request, sizeof(request), -1, NULL, NULL);

    if (error != (slots[number].mapped ? 0 : ENOENT)) {
        fault("DMA_UNMAP of slot %u: error %d", number, error);
    }
    forget(number);
}

static void unmap_all(void)
{
    struct vfio_user_dma_unmap request = { .argsz = sizeof(request), .flags = VFIO_DMA_UNMAP_FLAG_ALL };

    if (client_call(VFIO_USER_DMA_UNMAP, &request, sizeof(request), -1, NULL, NULL) != 0) {
        fault("DMA_UNMAP of everything");
    }
    for (unsigned int i = 0; i < SLOTS; i++) {
        forget(i);
    }
}

static void start(struct input *input)
{
    struct {
        struct vfio_user_device_feature head;
        struct vfio_user_device_feature_dma_logging_control control;
    } request = { .head = { sizeof(request), VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START } }, reply;
    unsigned int shift = (unsigned int)take(input, 1) % 40;
    size_t size = sizeof(reply);
    int error;

    request.control.page_size = shift == 0 ? 0 : 1ULL << shift;
    error = client_call(VFIO_USER_DEVICE_FEATURE, &request, sizeof(request), -1, &reply, &size);
    if (error != (log_page == 0 ? 0 : EINVAL)) {
        fault("DMA_LOGGING_START: error %d", error);
    }
    if (error == 0) {
        if (size != sizeof(reply) || reply.control.page_size < PAGE ||
            (reply.control.page_size & (reply.control.page_size - 1)) != 0) {
            fault("a log of pages of %#lx bytes", reply.control.page_size);
        }
        log_page = (unsigned int)reply.control.page_size;
        memset(dirty, 0, sizeof(dirty));
    }
}

static void stop(void)
{
    const struct vfio_user_device_feature request = {
        sizeof(request), VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
    };

    if (client_call(VFIO_USER_DEVICE_FEATURE, &request, sizeof(request), -1, NULL, NULL) != 0) {
        fault("DMA_LOGGING_STOP");
    }
    log_page = 0;
    memset(dirty, 0, sizeof(dirty));
}

/* The client answers as it should, with what it has there. */
static bool answer(void)
{
    static uint8_t body[sizeof(struct vfio_user_dma_region_access) + 0x10000];
    struct dma_request request;
    size_t size = sizeof(struct vfio_user_dma_region_access);

    if (!client_asked(&request)) {
        return false;
    }
    memcpy(body, &request.address, 8);
    memcpy(body + 8, &request.count, 8);
    if (request.command == VFIO_USER_DMA_READ) {
        for (uint64_t i = 0; i < request.count; i++) {
            body[size + i] = pattern(request.address + i);
        }
        size += request.count;
    }
    client_answer(1, 0, body, size);
    return true;
}

static void check_data(const struct slot *slot, uint64_t start, const uint8_t *data, size_t size)
{
    static uint8_t found[0x10000];

    if (slot->by_message) {
        for (size_t i = 0; i < size; i++) {
            found[i] = pattern(slot_iova((unsigned int)(slot - slots)) + start + i);
        }
    } else if (pread(client_fd(slot->file ? FD_SECOND_FILE : FD_FILE), found, size,
                     (off_t)(slot->first_page * PAGE + start)) != (ssize_t)size) {
        return; /* it was shortened */
    }
    if (memcmp(found, data, size) != 0) {
        fault("DMA of %zu bytes at %#lx moved something else", size, start);
    }
}

static void dma(struct input *input, bool write, bool unlogged)
{
    static uint8_t data[0x10000];
    unsigned int number = (unsigned int)take(input, 1) % SLOTS;
    uint64_t start = take(input, 1) * PAGE + take(input, 2) % PAGE;
    size_t size = (size_t)take(input, 2);
    const struct slot *slot = &slots[number];
    bool there = slot->mapped && start + size <= slot->pages * PAGE && (!write || slot->writable) && size > 0;
    int result;

    memset(data, write ? (int)(start + size) : 0, size);
    result = device_dma(slot_iova(number) + start, data, size,
                        (write ? VFU_DMA_WRITE : 0) | (unlogged ? VFU_DMA_UNLOGGED : 0));
    if (result == 0 && !there && size > 0) {
        /* It may go on in the next slot only where the region fills this one, and then it is two accesses. */
        fault("DMA of %zu bytes at %#lx of slot %u, which has %u pages", size, start, number, slot->pages);
    }
    if (there && result != 0 && (slot->by_message || slot->first_page + slot->pages <= file_pages[slot->file])) {
        fault("no DMA of %zu bytes at %#lx of slot %u: %s", size, start, number, strerror(errno));
    }
    if (there && result == 0 && !(write && slot->by_message)) {
        check_data(slot, start, data, size);
    }
    if (there && write && !unlogged && !slot->by_message && log_page != 0) {
        for (uint64_t page = start / PAGE; page <= (start + size - 1) / PAGE; page++) {
            dirty[number * SLOT_PAGES + page] = true;
        }
    }
}

static void report(struct input *input)
{
    static struct {
        struct vfio_user_device_feature head;
        struct vfio_user_device_feature_dma_logging_report report;
        uint8_t bitmap[PAGES / 8 + 8];
    } request, reply;
    unsigned int first = (unsigned int)take(input, 2) % PAGES, count = (unsigned int)take(input, 2) % PAGES + 1;
    unsigned int shift = 12 + (unsigned int)take(input, 1) % 12;
    size_t size = sizeof(reply), pages;
    int error;

    count = count < PAGES - first ? count : PAGES - first;
    request.head.argsz = sizeof(request);
    request.head.flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
    request.report.iova = GUEST_BASE + first * PAGE;
    request.report.length = count * PAGE;
    request.report.page_size = 1ULL << shift;
    memset(&reply, 0, sizeof(reply));
    error = client_call(VFIO_USER_DEVICE_FEATURE, &request, sizeof(request.head) + sizeof(request.report), -1, &reply,
                        &size);
    if (error != (log_page != 0 ? 0 : EINVAL)) {
        fault("a report of %u pages: error %d", count, error);
    }
    if (error != 0) {
        return;
    }
    pages = (size_t)((request.report.length - 1) >> shift) + 1;
    if (size != sizeof(reply.head) + sizeof(reply.report) + (pages + 63) / 64 * 8) {
        fault("a report of %zu pages in %zu bytes", pages, size);
    }
    for (unsigned int i = 0; i < count; i++) {
        uint64_t bit = i * PAGE >> shift;
        bool set = reply.bitmap[bit / 8] >> (bit % 8) & 1;

        if (dirty[first + i] && !set) {
            fault("page %u was written, and is not in the report", first + i);
        }
        if (set && !dirty[first + i] && log_page == PAGE && shift == 12) {
            fault("page %u is in the report, and was not written", first + i);
        }
    }
    for (unsigned int i = 0; i < count; i++) {
        dirty[first + i] = false;
    }
    for (size_t bit = pages; bit < (pages + 63) / 64 * 64; bit++) {
        if (reply.bitmap[bit / 8] >> (bit % 8) & 1) {
            fault("bit %zu of a report of %zu pages", bit, pages);
        }
    }
}

static void resize(struct input *input)
{
    unsigned int file = (unsigned int)take(input, 1) & 1, pages = (unsigned int)take(input, 1) + 1;

    if (ftruncate(client_fd(file ? FD_SECOND_FILE : FD_FILE), (off_t)(pages * PAGE)) != 0) {
        fault("a file cannot be made %u pages long", pages);
    }
    file_pages[file] = pages;
}

static void new_client(void)
{
    client_hang_up();
    device_attach(NULL, 0);
    for (unsigned int i = 0; i < SLOTS; i++) {
        forget(i);
    }
    log_page = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, data + size };

    memset(slots, 0, sizeof(slots));
    memset(dirty, 0, sizeof(dirty));
    log_page = 0;
    file_pages[0] = file_pages[1] = GUEST_FILE / PAGE;
    device_open(SETUP_OWN_CONFIG | SETUP_P2P | SETUP_PRE_COPY);
    device_attach(NULL, 0);
    feed = answer;
    while (left(&input) > 0) {
        switch (take(&input, 1) % 12) {
        case 0:
        case 1:
            map(&input);
            break;
        case 2:
            unmap(&input);
            break;
        case 3:
            unmap_all();
            break;
        case 4:
            start(&input);
            break;
        case 5:
            stop();
            break;
        case 6:
            dma(&input, false, false);
            break;
        case 7:
        case 8:
            dma(&input, true, false);
            break;
        case 9:
            dma(&input, true, true);
            break;
        case 10:
            report(&input);
            break;
        default:
            if (take(&input, 1) % 4 == 0) {
                new_client();
            } else {
                resize(&input);
            }
        }
    }
    device_close();
    return 0;
}
