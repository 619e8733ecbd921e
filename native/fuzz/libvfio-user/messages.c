/*
 * What the client sends and gets, message by message.
 *
 * Whatever the input: each reply answers a request that was sent, once, with an error or with data; each request has
 * got its reply when nothing is left to be done; what the server asks for lies in memory that the client has given.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "device_private.h"

#include <string.h>

#define MAX_SENT 4096
#define MAX_RECEIVED ((1 << 20) + 256) /* a report of the DMA log is the longest */
#define REPLY 0x1

/* What was sent, may be answered, and was not yet. */
static struct {
    uint16_t id, command;
    bool needs_reply;
} sent[MAX_SENT];
static size_t sent_count;

/* The message that is being sent, and the one that is being received. */
static struct {
    uint8_t header[sizeof(struct vfio_user_header)];
    size_t have, body_left;
} going;
static struct {
    uint8_t bytes[MAX_RECEIVED];
    size_t have;
} coming;

static struct dma_request asked, asked_before;
static bool is_asked;

/* What client_call() waits for. */
static struct {
    bool on, done;
    uint16_t id;
    int error;
    uint8_t *data;
    size_t room, size;
} awaited;

void messages_forget(void)
{
    sent_count = 0;
    memset(&going, 0, sizeof(going));
    coming.have = 0;
    asked = asked_before = (struct dma_request){ 0 };
    is_asked = false;
    awaited.on = false;
}

/* Find the messages in what was sent. */
void messages_sent(const uint8_t *bytes, size_t size)
{
    struct vfio_user_header header;

    while (size > 0) {
        size_t part = going.body_left < size ? going.body_left : size;

        if (part == 0) {
            going.header[going.have++] = *bytes++;
            size--;
        } else {
            going.body_left -= part;
            bytes += part;
            size -= part;
        }
        if (going.have == sizeof(header)) {
            memcpy(&header, going.header, sizeof(header));
            going.body_left = header.msg_size > sizeof(header) ? header.msg_size - sizeof(header) : 0;
            going.have++;
        }
        if (going.have > sizeof(header) && going.body_left == 0) {
            memcpy(&header, going.header, sizeof(header));
            if (sent_count < MAX_SENT && !header.flags.no_reply) {
                sent[sent_count].id = header.msg_id;
                sent[sent_count].command = header.cmd;
                sent[sent_count++].needs_reply = header.flags.type == 0;
            }
            going.have = 0;
        }
    }
}

static void answered(const struct vfio_user_header *header)
{
    size_t found = sent_count;

    /* A request before what is none: the answer to that is an error, or there is none. */
    for (size_t i = 0; i < sent_count && (found == sent_count || !sent[found].needs_reply); i++) {
        if (sent[i].id == header->msg_id && sent[i].command == header->cmd &&
            (found == sent_count || sent[i].needs_reply)) {
            found = i;
        }
    }
    if (found < sent_count) {
        memmove(&sent[found], &sent[found + 1], (sent_count - found - 1) * sizeof(sent[0]));
        sent_count--;
        return;
    }
    /* A message that is too long for anything is answered before its end, and is the last one. */
    if (going.have > sizeof(*header) && memcmp(going.header, header, 4) == 0) {
        return;
    }
    fault("a reply to message %u, command %u, which was not sent or has its reply", header->msg_id, header->cmd);
}

static void take_request(const struct vfio_user_header *header, const uint8_t *body, size_t size)
{
    struct vfio_user_dma_region_access access;

    if (header->cmd != VFIO_USER_DMA_READ && header->cmd != VFIO_USER_DMA_WRITE) {
        fault("the server sent command %u", header->cmd);
    }
    if (header->flags.no_reply || header->flags.error || size < sizeof(access)) {
        fault("a DMA request with bad flags, or of %zu bytes", size);
    }
    memcpy(&access, body, sizeof(access));
    if (access.count == 0 || access.count > VFIO_USER_DEFAULT_MAX_DATA_XFER_SIZE ||
        size - sizeof(access) != (header->cmd == VFIO_USER_DMA_WRITE ? access.count : 0)) {
        fault("a DMA request about %#lx bytes in %zu", access.count, size);
    }
    if (!region_holds(access.addr, access.count)) {
        fault("DMA of %#lx bytes at %#lx, where the client has nothing", access.count, access.addr);
    }
    asked_before = asked;
    asked = (struct dma_request){ header->msg_id, header->cmd, access.addr, access.count };
    is_asked = true;
}

static void take_reply(const struct vfio_user_header *header, const uint8_t *body, size_t size)
{
    if (header->flags.error ? size != 0 || header->error_no == 0 : header->error_no != 0) {
        fault("a reply to command %u with error %u and %zu bytes", header->cmd, header->error_no, size);
    }
    answered(header);
    if (awaited.on && awaited.id == header->msg_id) {
        awaited.on = false;
        awaited.done = true;
        awaited.error = (int)header->error_no;
        awaited.size = size;
        if (awaited.data != NULL && size > 0) {
            memcpy(awaited.data, body, size < awaited.room ? size : awaited.room);
        }
    }
}

uint8_t *messages_room(size_t *room)
{
    *room = sizeof(coming.bytes) - coming.have;
    return coming.bytes + coming.have;
}

void messages_received(size_t size)
{
    struct vfio_user_header header;

    coming.have += size;
    while (coming.have >= sizeof(header)) {
        memcpy(&header, coming.bytes, sizeof(header));
        if (header.msg_size < sizeof(header) || header.msg_size > sizeof(coming.bytes)) {
            fault("the server sent a message of %u bytes", header.msg_size);
        }
        if (coming.have < header.msg_size) {
            return;
        }
        if (header.flags.type == REPLY) {
            take_reply(&header, coming.bytes + sizeof(header), header.msg_size - sizeof(header));
        } else if (header.flags.type == 0) {
            take_request(&header, coming.bytes + sizeof(header), header.msg_size - sizeof(header));
        } else {
            fault("the server sent a message of type %u", header.flags.type);
        }
        coming.have -= header.msg_size;
        memmove(coming.bytes, coming.bytes + header.msg_size, coming.have);
    }
}

bool messages_asked(struct dma_request *request, bool answered)
{
    bool is = is_asked;

    *request = asked;
    is_asked = is_asked && !answered;
    return is;
}

struct dma_request messages_asked_before(void)
{
    return asked_before;
}

void messages_check_answered(void)
{
    for (size_t i = 0; i < sent_count; i++) {
        if (sent[i].needs_reply) {
            fault("no reply to message %u, command %u", sent[i].id, sent[i].command);
        }
    }
}

void messages_await(uint16_t id, void *data, size_t room)
{
    memset(&awaited, 0, sizeof(awaited));
    awaited.on = true;
    awaited.id = id;
    awaited.data = data;
    awaited.room = room;
}

int messages_awaited(size_t *size)
{
    awaited.on = false;
    if (size != NULL) {
        *size = awaited.size;
    }
    return awaited.done ? awaited.error : -1;
}
