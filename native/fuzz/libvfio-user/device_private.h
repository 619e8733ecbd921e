/*
 * The parts of the device for the fuzzer: device.c and states.c (the device), peer.c and messages.c (its client).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef DEVICE_PRIVATE_H
#define DEVICE_PRIVATE_H

#include "device.h"

extern unsigned int setup;

/* --- device.c --- */

void require(bool holds, const char *what); /* while it is set up */
bool callback_fails(void); /* with SETUP_FAILURES, and errno set */
bool region_holds(uint64_t address, uint64_t count); /* one that the client has registered, all of it */

/* --- states.c --- */

void states_open(void);
void states_set_up(void);
void states_reset(bool connection_lost);

/* --- peer.c --- */

int peer_wait(vfu_ctx_t *ctx, int fd, int events, int timeout_ms); /* a vfu_wait_cb_t */
void peer_open(void);
void peer_settle(void); /* all that was sent is served, and has to have been answered */
void peer_close(void);

/* --- messages.c: each message that goes and comes --- */

void messages_forget(void); /* the connection is another one */
void messages_sent(const uint8_t *bytes, size_t size);
uint8_t *messages_room(size_t *room); /* where to receive to, and then how many bytes were received */
void messages_received(size_t size);
bool messages_asked(struct dma_request *request, bool answered);
struct dma_request messages_asked_before(void);
void messages_check_answered(void);

/* The reply to the next message with this id goes to `data`; its error, -1 for none, and its size. */
void messages_await(uint16_t id, void *data, size_t room);
int messages_awaited(size_t *size);

#endif
