/*
 * A device on libvfio-user for the fuzzer, its client's end of the connection, and what must hold whatever is sent.
 *
 * One thread is client and server in turn. Time is made up: it passes only where somebody waits in vain, so that
 * every run of an input is the same and nothing sleeps.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef DEVICE_H
#define DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "check.h"
#include "libvfio-user.h"
#include "vfio-user.h"

/* What a device has; setups combine these. */
#define SETUP_OWN_CONFIG 0x1 /* it serves configuration space itself, as ours does */
#define SETUP_P2P 0x2
#define SETUP_PRE_COPY 0x4
#define SETUP_GATHER 0x8
#define SETUP_QUIESCE 0x10 /* it has to be quiesced, which it is at once */
#define SETUP_QUIESCE_LATE 0x20 /* or when it says so: device_quiesced() */
#define SETUP_NO_MIGRATION 0x40
#define SETUP_NO_DMA 0x80
#define SETUP_UNREAD 0x100 /* the client reads no replies until it has to */
#define SETUP_FAILURES 0x200 /* every third callback fails */
#define SETUP_VERSION 0x400 /* the client's VERSION is in the input; see device_attach() */
#define SETUP_WAIT 0x800 /* the device's program does the waiting for the client, as ours does */
#define SETUP_WINDOW 0x1000 /* it takes a window for migration data: the client's second file, which is sealed */
#define SETUP_ACCESSES 0x2000 /* it serves accesses while it reads migration data */
#define SETUP_MEMORY 0x4000 /* BAR 2 is memory that the library serves: the end of it, and what is behind */

#define DEVICE_MEMORY 65536
#define GUEST_FILE (1 << 20) /* bytes of each file that the client has */
#define GUEST_BASE 0x100000ULL
#define MAX_FDS 12

/* What the client may pass: kinds of descriptors, `kind` modulo their number. The descriptor is ours, until the end. */
enum { FD_FILE, FD_SECOND_FILE, FD_EVENT, FD_NULL, FD_PIPE, FD_SOCKET, FD_KINDS };
int client_fd(unsigned int kind);

/* A device without a client; and its end, which has to leave nothing behind. */
void device_open(unsigned int setup);
void device_close(void);

extern vfu_ctx_t *device; /* NULL: none */

/* Attach a client that sends this VERSION (its data; NULL: a good one). False: it was refused. */
bool device_attach(const void *data, size_t size);
bool device_attached(void);

/* Serve what there is, and take the replies. Called by the others where a client would be waiting. */
void device_run(void);

/* The client sends bytes, or a message with a new id, which is returned; and hangs up. */
void client_send(const void *bytes, size_t size, const int *fds, size_t fd_count);
uint16_t client_message(uint16_t command, uint32_t flags, const void *body, size_t size, const int *fds,
                        size_t fd_count);
void client_hang_up(void);

/* Send a request and serve it: returns 0 or the error of the reply; `reply` gets its data. -1: no reply. */
int client_call(uint16_t command, const void *body, size_t size, int fd, void *reply, size_t *reply_size);

/* The device's own doing: DMA, while which `feed` is asked for what the client sends, until it has no more. */
extern bool (*feed)(void);
int device_dma(uint64_t address, void *data, size_t size, int flags);
void device_quiesced(void);
extern bool device_quiescing; /* it was asked to quiesce, and has not yet: it does no DMA by message then */

/* The request for DMA that the client has received and not answered yet; false: there is none. */
struct dma_request {
    uint16_t id, command;
    uint64_t address, count;
};
bool client_asked(struct dma_request *request);
void client_answer(uint32_t flags, uint32_t error, const void *body, size_t size);
bool client_answers_late(const void *body, size_t size); /* the request before that, if there was one */

/* Time that passes; and the state of the device, by its own callbacks. */
void time_passes(unsigned int ms);
uint32_t device_state(void);

#endif
