/*
 * Target: the migration states of a device on libvfio-user, by sequences of valid requests, against <linux/vfio.h>.
 *
 * The input: a byte that says what the device has, then a byte for each step: what in the lower half, a number in the
 * upper one. That the device takes one arc at a time is checked by device.c.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "device.h"

#include <errno.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define STATES 8

static unsigned int setup;
static bool failed; /* the device said that it is in ERROR */

static bool saving(uint32_t state)
{
    return state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P ||
           state == VFIO_DEVICE_STATE_STOP_COPY;
}

static bool pre_copy(uint32_t state)
{
    return saving(state) && state != VFIO_DEVICE_STATE_STOP_COPY;
}

static bool has(uint32_t state)
{
    switch (state) {
    case VFIO_DEVICE_STATE_RUNNING_P2P:
        return setup & SETUP_P2P;
    case VFIO_DEVICE_STATE_PRE_COPY:
        return setup & SETUP_PRE_COPY;
    case VFIO_DEVICE_STATE_PRE_COPY_P2P:
        return (setup & SETUP_P2P) && (setup & SETUP_PRE_COPY);
    }
    return state >= VFIO_DEVICE_STATE_STOP && state <= VFIO_DEVICE_STATE_RESUMING;
}

/* Whether there is a way: from everywhere to everywhere but from ERROR, to ERROR, and back from STOP_COPY to PRE_COPY. */
static bool leads(uint32_t from, uint32_t to)
{
    return !failed && has(to) && !(from == VFIO_DEVICE_STATE_STOP_COPY && pre_copy(to));
}

struct feature {
    struct vfio_user_device_feature head;
    uint64_t data[2];
};

static int feature(uint32_t flags, const void *data, size_t size, struct feature *reply, size_t *reply_size)
{
    struct feature request = { .head = { sizeof(request), flags } };

    if (size > 0) {
        memcpy(request.data, data, size);
    }
    *reply_size = sizeof(*reply);
    return client_call(VFIO_USER_DEVICE_FEATURE, &request, sizeof(request.head) + size, -1, reply, reply_size);
}

static void set_state(uint32_t wanted)
{
    const struct vfio_device_feature_mig_state change = { wanted, -1 };
    uint32_t before = device_state();
    bool there_is = leads(before, wanted);
    struct feature reply;
    size_t size;
    int error = feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, &change, sizeof(change), &reply,
                        &size);

    if (error < 0) {
        fault("no reply to a change from state %u to %u", before, wanted);
    }
    if (error == 0 ? !there_is || device_state() != wanted : there_is && !(setup & SETUP_FAILURES)) {
        fault("from state %u to %u: error %d, in state %u now", before, wanted, error, device_state());
    }
    if (error != 0 && !there_is && device_state() != before) {
        fault("a change from state %u to %u is refused, and ends in %u", before, wanted, device_state());
    }
}

static void get_state(void)
{
    struct vfio_device_feature_mig_state found;
    struct feature reply;
    size_t size;
    int error = feature(VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, NULL, 0, &reply, &size);

    if (error != 0 || size != sizeof(reply.head) + sizeof(found)) {
        fault("the state cannot be asked for: error %d, %zu bytes", error, size);
    }
    memcpy(&found, reply.data, sizeof(found));
    if (found.device_state != (failed ? (uint32_t)VFIO_DEVICE_STATE_ERROR : device_state())) {
        fault("the state is said to be %u, and is %u", found.device_state, device_state());
    }
}

static void transfer(bool write, unsigned int number)
{
    static const uint32_t sizes[16] = { 0, 1, 7, 8, 64, 100, 4096, 4097, 5000, 6000, 10000, 20000, 1, 2, 3, 30000 };
    static uint8_t message[sizeof(struct vfio_user_mig_data) + 30000], reply[sizeof(message)];
    uint32_t asked = sizes[number], state = device_state();
    struct vfio_user_mig_data head = { (uint32_t)(sizeof(head) + asked), asked };
    bool right = !failed && (write ? state == VFIO_DEVICE_STATE_RESUMING : saving(state));
    size_t size = sizeof(reply);
    int error;

    memcpy(message, &head, sizeof(head));
    error = client_call(write ? VFIO_USER_MIG_DATA_WRITE : VFIO_USER_MIG_DATA_READ, message,
                        sizeof(head) + (write ? asked : 0), -1, reply, &size);
    if (error == 0 ? !right : right && !(setup & SETUP_FAILURES)) {
        fault("%s of %u bytes in state %u: error %d", write ? "a write" : "a read", asked, state, error);
    }
    if (error == 0 && !write) {
        memcpy(&head, reply, sizeof(head));
        if (size < sizeof(head) || size != sizeof(head) + head.size || head.argsz != size || head.size > asked) {
            fault("a read of %u bytes got %u in %zu, argsz %u", asked, head.size, size, head.argsz);
        }
    }
}

static void precopy_info(void)
{
    const struct vfio_precopy_info request = { .argsz = sizeof(request) };
    struct vfio_precopy_info reply;
    size_t size = sizeof(reply);
    bool right = !failed && pre_copy(device_state());
    int error = client_call(VFIO_USER_MIG_GET_PRECOPY_INFO, &request, sizeof(request), -1, &reply, &size);

    if (error == 0 ? !right || size != sizeof(reply) : right && !(setup & SETUP_FAILURES)) {
        fault("pre-copy info in state %u: error %d, %zu bytes", device_state(), error, size);
    }
}

static void reset(bool by_device)
{
    uint32_t before = device_state();
    int error = by_device ? vfu_reset_device(device, VFU_RESET_PCI_FLR)
                          : client_call(VFIO_USER_DEVICE_RESET, NULL, 0, -1, NULL, NULL);

    if (error == 0) {
        if (failed && device_state() != VFIO_DEVICE_STATE_RUNNING) {
            fault("a reset leads from ERROR to state %u", device_state());
        }
        failed = false;
    }
    if (device_state() != before && device_state() != VFIO_DEVICE_STATE_RUNNING) {
        fault("a reset leads from state %u to %u", before, device_state());
    }
}

static void step(unsigned int what, unsigned int number)
{
    struct feature reply;
    size_t size;

    switch (what) {
    case 0:
    case 1:
    case 2:
        set_state(number % (STATES + 1));
        break;
    case 3:
        get_state();
        break;
    case 4:
    case 5:
        transfer(false, number);
        break;
    case 6:
        transfer(true, number);
        break;
    case 7:
        precopy_info();
        break;
    case 8:
        feature(VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, NULL, 0, &reply, &size);
        break;
    case 9:
        reset(number & 1);
        break;
    case 10:
        vfu_migration_fail(device);
        failed = true;
        break;
    case 11:
        client_hang_up();
        device_attach(NULL, 0);
        failed = false;
        if (device_state() != VFIO_DEVICE_STATE_RUNNING) {
            fault("a new client finds state %u", device_state());
        }
        break;
    case 12:
        feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, NULL, 0, &reply, &size);
        break;
    default:
        time_passes(number * 1000);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const unsigned int bits[] = { SETUP_P2P, SETUP_PRE_COPY, SETUP_GATHER, SETUP_FAILURES, SETUP_QUIESCE };

    if (size < 1) {
        return 0;
    }
    setup = SETUP_OWN_CONFIG;
    for (size_t i = 0; i < sizeof(bits) / sizeof(bits[0]); i++) {
        setup |= data[0] >> i & 1 ? bits[i] : 0;
    }
    failed = false;
    device_open(setup);
    device_attach(NULL, 0);
    for (size_t i = 1; i < size; i++) {
        step(data[i] & 0xf, data[i] >> 4);
    }
    device_close();
    return 0;
}
