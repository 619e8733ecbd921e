/*
 * A device on libvfio-user, set up for the fuzzer: its callbacks, its life, and the descriptors that a client has.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "device_private.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <syslog.h>
#include <unistd.h>

#define MAX_REGIONS 4096

vfu_ctx_t *device;
unsigned int setup;
bool device_quiescing;

static uint8_t *memory; /* of BAR 0, exactly as long as it is */
static uint8_t *config_space;
static unsigned int calls; /* of callbacks that may fail */
static int fds[FD_KINDS], other_ends[FD_KINDS];

static struct {
    uint64_t iova, size;
} regions[MAX_REGIONS];
static size_t region_count;

bool callback_fails(void)
{
    if (!(setup & SETUP_FAILURES) || ++calls % 3 != 0) {
        return false;
    }
    errno = calls % 2 ? EIO : ENOSPC;
    return true;
}

void require(bool holds, const char *what)
{
    if (!holds) {
        fault("set up: %s: %s", what, strerror(errno));
    }
}

/* --- the callbacks ----------------------------------------------------------------------------------------------- */

/* The text of every line is composed, as with --log-level debug, and then nobody reads it. */
static void no_log(vfu_ctx_t *ctx, int level, const char *text)
{
    (void)ctx, (void)level;
    if (memchr(text, '\0', 1 << 16) == NULL) {
        fault("a line of the log without an end");
    }
}

static ssize_t access_memory(vfu_ctx_t *ctx, char *buffer, size_t count, loff_t offset, bool write)
{
    (void)ctx;
    if (callback_fails()) {
        return -1;
    }
    /* No check of ours: the sanitizer is the one. */
    if (write) {
        memcpy(memory + offset, buffer, count);
    } else {
        memcpy(buffer, memory + offset, count);
    }
    return (ssize_t)count;
}

static ssize_t access_config(vfu_ctx_t *ctx, char *buffer, size_t count, loff_t offset, bool write)
{
    (void)ctx;
    if (write) {
        memcpy(config_space + offset, buffer, count);
        if (offset == 0x48 && (buffer[0] & 1)) {
            vfu_reset_device(device, VFU_RESET_PCI_FLR);
        }
    } else {
        memcpy(buffer, config_space + offset, count);
    }
    return (ssize_t)count;
}

static void registered(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
    uint64_t iova = (uint64_t)(uintptr_t)info->iova.iov_base, size = info->iova.iov_len;

    (void)ctx;
    if (size == 0 || size - 1 > UINT64_MAX - iova) {
        fault("a region [%#lx, +%#lx) was registered", iova, size);
    }
    for (size_t i = 0; i < region_count; i++) {
        if (iova <= regions[i].iova + (regions[i].size - 1) && regions[i].iova <= iova + (size - 1)) {
            fault("the region [%#lx, +%#lx) overlaps one that is registered", iova, size);
        }
    }
    if (info->vaddr != NULL && info->iova.iov_len > GUEST_FILE) {
        fault("a mapping of %#lx bytes is larger than any file", size);
    }
    if (region_count < MAX_REGIONS) {
        regions[region_count].iova = iova;
        regions[region_count++].size = size;
    }
}

static void unregistered(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
    uint64_t iova = (uint64_t)(uintptr_t)info->iova.iov_base;

    (void)ctx;
    for (size_t i = 0; i < region_count; i++) {
        if (regions[i].iova == iova && regions[i].size == info->iova.iov_len) {
            regions[i] = regions[--region_count];
            return;
        }
    }
    fault("a region was unregistered that was not registered, at %#lx", iova);
}

bool region_holds(uint64_t address, uint64_t count)
{
    for (size_t i = 0; i < region_count; i++) {
        if (address >= regions[i].iova && address - regions[i].iova < regions[i].size &&
            count <= regions[i].size - (address - regions[i].iova)) {
            return true;
        }
    }
    return region_count == MAX_REGIONS; /* not all are known */
}

static int on_reset(vfu_ctx_t *ctx, vfu_reset_type_t kind)
{
    (void)ctx;
    if (kind != VFU_RESET_LOST_CONN && callback_fails()) {
        return -1;
    }
    if (kind == VFU_RESET_LOST_CONN && region_count != 0) {
        fault("%zu regions are left of a client that has gone", region_count);
    }
    states_reset(kind == VFU_RESET_LOST_CONN);
    return 0;
}

static int on_quiesce(vfu_ctx_t *ctx)
{
    (void)ctx;
    if (setup & SETUP_QUIESCE_LATE) {
        device_quiescing = true;
        errno = EBUSY;
        return -1;
    }
    return 0;
}

static void on_irq_state(vfu_ctx_t *ctx, uint32_t start, uint32_t count, bool mask)
{
    (void)ctx, (void)mask;
    if (start + (uint64_t)count > 8) {
        fault("interrupts [%u, +%u) changed, of at most 8", start, count);
    }
}

/* --- descriptors of the client's ---------------------------------------------------------------------------------- */

static int a_file(bool sealed)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, GUEST_FILE) != 0 ||
        (sealed && fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW) != 0)) {
        fault("no memfd");
    }
    return fd;
}

int client_fd(unsigned int kind)
{
    int pair[2] = { -1, -1 };

    kind %= FD_KINDS;
    if (fds[kind] >= 0) {
        return fds[kind];
    }
    switch (kind) {
    case FD_FILE:
        fds[kind] = a_file(false);
        break;
    case FD_SECOND_FILE:
        fds[kind] = a_file(setup & SETUP_WINDOW);
        break;
    case FD_EVENT:
        fds[kind] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        break;
    case FD_NULL:
        fds[kind] = open("/dev/null", O_RDWR | O_CLOEXEC);
        break;
    case FD_PIPE:
        if (pipe2(pair, O_CLOEXEC | O_NONBLOCK) != 0) {
            fault("no pipe");
        }
        break;
    default:
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) {
            fault("no pair of sockets");
        }
    }
    if (pair[0] >= 0) {
        fds[kind] = pair[0];
        other_ends[kind] = pair[1];
    }
    return fds[kind];
}

static void close_all(int *list)
{
    for (size_t i = 0; i < FD_KINDS; i++) {
        if (list[i] >= 0) {
            close(list[i]);
        }
        list[i] = -1;
    }
}

/* --- its life ---------------------------------------------------------------------------------------------------- */

static void set_up_pci(void)
{
    struct pmcap pm = { .hdr.id = PCI_CAP_ID_PM };
    struct msixcap msix = { .hdr.id = PCI_CAP_ID_MSIX, .mxc.ts = 7 };
    struct pxcap express = {
        .hdr.id = PCI_CAP_ID_EXP, .pxcaps.ver = 2, .pxdcap.rer = 1, .pxdcap.flrc = 1
    };
    struct dsncap serial = { .hdr.id = PCI_EXT_CAP_ID_DSN };
    uint8_t vendor[16] = { PCI_CAP_ID_VNDR, 0, sizeof(vendor) };
    const int flags = VFU_REGION_FLAG_RW | (setup & SETUP_OWN_CONFIG ? VFU_REGION_FLAG_ALWAYS_CB : 0);

    require(vfu_pci_init(device, VFU_PCI_TYPE_EXPRESS, PCI_HEADER_TYPE_NORMAL, 0) == 0, "PCI");
    vfu_pci_set_id(device, 0x1b36, 0x11, 0, 0);
    require(vfu_setup_region(device, VFU_PCI_DEV_CFG_REGION_IDX, 4096, access_config, flags, NULL, 0, -1, 0) == 0,
            "configuration space");
    if (!(setup & SETUP_OWN_CONFIG)) {
        require(vfu_pci_add_capability(device, 0, 0, &pm) >= 0, "PM");
        require(vfu_pci_add_capability(device, 0, 0, &msix) >= 0, "MSI-X");
        require(vfu_pci_add_capability(device, 0, 0, &express) >= 0, "PCI Express");
        require(vfu_pci_add_capability(device, 0, VFU_CAP_FLAG_EXTENDED, &serial) >= 0, "serial number");
        require(vfu_pci_add_capability(device, 0, 0, vendor) >= 0, "vendor's own");
    }
}

/* No callback of ours, so no check either: the sanitizer sees every step beyond the memory and its marks. */
static void serve_in_library(void)
{
    static uint8_t marks[DEVICE_MEMORY / 4096];
    static uint64_t reads[VFU_REGION_COUNTS_BUCKETS + 2], writes[VFU_REGION_COUNTS_BUCKETS + 2];
    static const uint64_t edge = 1000, window = DEVICE_MEMORY - 1000;
    static const uint8_t running = 1;
    static vfu_region_memory_t served;

    served = (vfu_region_memory_t){
        .data = (char *)memory, .size = DEVICE_MEMORY, .marks = marks, .page_shift = 12, .mark = 1, .enabled = 1,
        .nr_edges = 1, .edges = &edge, .window = &window, .running = &running, .reads = reads, .writes = writes,
    };
    require(vfu_setup_region_memory(device, VFU_PCI_DEV_BAR2_REGION_IDX, &served) == 0, "memory of BAR 2");
}

static void set_up_regions(void)
{
    struct iovec areas[] = { { NULL, 4096 }, { (void *)8192, 8192 } };
    const int flags = VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM;

    require(vfu_setup_region(device, VFU_PCI_DEV_BAR0_REGION_IDX, DEVICE_MEMORY, access_memory, flags, areas, 2,
                             client_fd(FD_FILE), 0) == 0,
            "BAR 0");
    require(vfu_setup_region(device, VFU_PCI_DEV_BAR2_REGION_IDX, 4096, access_memory, flags, NULL, 0, -1, 0) == 0,
            "BAR 2");
    if (setup & SETUP_MEMORY) {
        serve_in_library();
    }
    require(vfu_setup_region(device, VFU_PCI_DEV_ROM_REGION_IDX, 4096, NULL, VFU_REGION_FLAG_READ, NULL, 0, -1, 0) == 0,
            "ROM");
    for (uint32_t i = 0; i < 3; i++) {
        require(vfu_create_ioeventfd(device, VFU_PCI_DEV_BAR0_REGION_IDX, client_fd(FD_EVENT), 64 * i, 8, 0, i) == 0,
                "ioeventfd");
    }
}

void device_open(unsigned int wanted)
{
    setup = wanted;
    calls = 0;
    states_open();
    region_count = 0;
    device_quiescing = false;
    memset(fds, 0xff, sizeof(fds));
    memset(other_ends, 0xff, sizeof(other_ends));
    descriptors_before();
    memory = calloc(1, DEVICE_MEMORY);
    config_space = calloc(1, 4096);
    device = vfu_create_ctx(VFU_TRANS_SOCK, "", LIBVFIO_USER_FLAG_ATTACH_NB | LIBVFIO_USER_FLAG_ATTACH_FD, NULL,
                            VFU_DEV_TYPE_PCI);
    require(memory != NULL && config_space != NULL && device != NULL, "context");
    require(vfu_setup_log(device, no_log, LOG_DEBUG) == 0, "log");
    set_up_pci();
    set_up_regions();
    require(vfu_setup_device_nr_irqs(device, VFU_DEV_INTX_IRQ, 1) == 0, "INTx");
    require(vfu_setup_device_nr_irqs(device, VFU_DEV_MSI_IRQ, 4) == 0, "MSI");
    require(vfu_setup_device_nr_irqs(device, VFU_DEV_MSIX_IRQ, 8) == 0, "MSI-X");
    for (enum vfu_dev_irq_type kind = VFU_DEV_INTX_IRQ; kind <= VFU_DEV_MSIX_IRQ; kind++) {
        vfu_setup_irq_state_callback(device, kind, on_irq_state);
    }
    require(vfu_setup_device_reset_cb(device, on_reset) == 0, "reset");
    if (setup & (SETUP_QUIESCE | SETUP_QUIESCE_LATE)) {
        vfu_setup_device_quiesce_cb(device, on_quiesce);
    }
    if (setup & SETUP_WAIT) {
        vfu_setup_wait_cb(device, peer_wait);
    }
    if (!(setup & SETUP_NO_DMA)) {
        require(vfu_setup_device_dma(device, registered, unregistered) == 0, "DMA");
    }
    if (!(setup & SETUP_NO_MIGRATION)) {
        states_set_up();
    }
    require(vfu_realize_ctx(device) == 0, "realize");
    peer_open();
}

void device_close(void)
{
    vfu_ctx_t *gone = device;

    peer_settle();
    vfu_destroy_ctx(gone);
    device = NULL;
    peer_close();
    if (region_count != 0) {
        fault("%zu regions are left of a device that has gone", region_count);
    }
    close_all(fds);
    close_all(other_ends);
    free(memory);
    free(config_space);
    descriptors_after();
}
