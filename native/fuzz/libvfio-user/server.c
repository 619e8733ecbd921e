/*
 * Target: a client that sends anything to libvfio-user, while the device does what devices do.
 *
 * The input: two bytes of SETUP_*, then records. Their kinds are below; a message gets an id and its right size.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "device.h"
#include "records.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

const size_t setup_bytes = 2;

enum kind {
    MESSAGE, /* descriptors, command, flags, then the body */
    BYTES, /* descriptors, then bytes as they are */
    DMA, /* direction and flags, address (8), size (2): by the device */
    ANSWER, /* how, then data: to the server's request for DMA */
    DEVICE, /* what else the device does, and a number (2) */
    FILES, /* which, and its new size in pages: the client shortens a file */
    PAUSE, /* milliseconds (2) */
    HANG_UP, /* the data of the next client's VERSION; empty: a good one */
    KINDS,
};

static struct input records;

static size_t take_fds(struct input *input, int *fds)
{
    uint8_t word = (uint8_t)take(input, 1);
    size_t count = word & 7;

    if (count == 7) {
        count = MAX_FDS;
    }
    for (size_t i = 0; i < count; i++) {
        fds[i] = client_fd((word >> 3) + (unsigned int)i);
    }
    return count;
}

static void message(struct input *input)
{
    int fds[MAX_FDS];
    size_t fd_count = take_fds(input, fds);
    uint16_t command = (uint16_t)take(input, 1);
    uint32_t flags = (uint32_t)take(input, 1);

    client_message(command, flags, input->at, left(input), fds, fd_count);
}

static void bytes(struct input *input)
{
    int fds[MAX_FDS];
    size_t fd_count = take_fds(input, fds);

    client_send(input->at, left(input), fds, fd_count);
}

/*
 * What `how` says: 0 as it should be, 1 shorter or longer data, 2 an error, 3 with nothing, 4 about something else.
 * From 0xf0 on it is about the request before, which the server may have given up.
 */
static void answer(struct input *input)
{
    static uint8_t body[sizeof(struct vfio_user_dma_region_access) + 0x10000];
    uint8_t word = (uint8_t)take(input, 1), how = word % 5;
    struct dma_request request;
    size_t size = sizeof(struct vfio_user_dma_region_access);

    if (!client_asked(&request) || (word >= 0xf0 && client_answers_late(input->at, left(input)))) {
        return;
    }
    memcpy(body, &request.address, 8);
    memcpy(body + 8, &request.count, 8);
    if (request.command == VFIO_USER_DMA_READ && how != 1) {
        size += request.count < sizeof(body) - size ? (size_t)request.count : 0;
    } else if (how == 1) {
        size += left(input);
    }
    take_bytes(input, body + sizeof(struct vfio_user_dma_region_access),
               size - sizeof(struct vfio_user_dma_region_access));
    body[0] ^= how == 4;
    client_answer(how == 2 ? 0x21 : 0x1, how == 2 ? (uint32_t)take(input, 4) : 0, body, how == 2 || how == 3 ? 0 : size);
}

static void dma(struct input *input, bool nested)
{
    static uint8_t content[0x10000];
    uint8_t flags = (uint8_t)take(input, 1);
    uint64_t address = take(input, 8);
    size_t size = (size_t)take(input, 2);

    /* In the middle of a transfer a device starts no other: libvfio-user says EBUSY, by the library's own rules. */
    if (!nested && !device_quiescing) {
        device_dma(address, content, size, flags & (VFU_DMA_WRITE | VFU_DMA_UNLOGGED | 4));
    }
}

static void act(struct input *input, bool nested)
{
    uint8_t what = (uint8_t)take(input, 1);
    uint32_t number = (uint32_t)take(input, 2);
    dma_sg_t *sg;
    struct iovec iov;

    switch (what % 8) {
    case 0:
        vfu_irq_trigger(device, number);
        break;
    case 1:
        vfu_irq_set_level(device, number & 1);
        break;
    case 2:
        vfu_irq_take_back(device, number);
        break;
    case 3:
        vfu_irq_get_type(device, &number);
        break;
    case 4:
        if (!nested) {
            vfu_reset_device(device, number & 1 ? VFU_RESET_DEVICE : VFU_RESET_PCI_FLR);
        }
        break;
    case 5:
        vfu_migration_fail(device);
        break;
    case 6:
        if (!nested) {
            device_quiesced();
        }
        break;
    default:
        sg = (dma_sg_t *)__builtin_alloca(dma_sg_size());
        if (vfu_addr_to_sgl(device, (vfu_dma_addr_t)(uintptr_t)(GUEST_BASE + number * 16), number, sg, 1,
                            PROT_WRITE) == 1 &&
            vfu_sgl_get(device, sg, &iov, 1, 0) == 0) {
            vfu_sgl_mark_dirty(device, sg, 1);
            vfu_sgl_put(device, sg, &iov, 1);
        }
    }
}

static void carry_out(struct record *record, bool nested)
{
    struct input *input = &record->body;
    uint8_t number;

    switch ((enum kind)(record->kind % KINDS)) {
    case MESSAGE:
        message(input);
        break;
    case BYTES:
        bytes(input);
        break;
    case DMA:
        dma(input, nested);
        break;
    case ANSWER:
        answer(input);
        break;
    case DEVICE:
        act(input, nested);
        break;
    case FILES:
        number = (uint8_t)take(input, 1);
        (void)!ftruncate(client_fd(number & 1), (off_t)take(input, 1) << 12);
        break;
    case PAUSE:
        time_passes((unsigned int)take(input, 2));
        break;
    default:
        client_hang_up();
        if (!nested) {
            device_attach(left(input) > 0 ? input->at : NULL, left(input));
        }
    }
}

/* What comes while the server waits for the answer to its own request. */
static bool next_while_waiting(void)
{
    struct record record;

    if (!take_record(&records, &record)) {
        return false;
    }
    carry_out(&record, true);
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct record record;
    unsigned int setup;

    records = (struct input){ data, data + size };
    setup = (unsigned int)take(&records, 2);
    device_open(setup);
    feed = next_while_waiting;
    if (!(setup & SETUP_VERSION)) {
        device_attach(NULL, 0);
    }
    while (take_record(&records, &record)) {
        carry_out(&record, false);
        device_run();
    }
    device_close();
    return 0;
}
