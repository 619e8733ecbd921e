/*
 * The environment that README.md describes, read once.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

#define DEFAULT_TIMEOUT_MS 5000 /* QEMU's x-msg-timeout */

struct config config;

static long number(const char *name, long least, long most, long otherwise)
{
    const char *text = getenv(name);
    char *end;
    long value;

    if (text == NULL || *text == '\0') {
        return otherwise;
    }
    value = strtol(text, &end, 10);
    if (*end != '\0' || value < least || value > most) {
        say("%s=%s: not a number from %ld to %ld; it is ignored", name, text, least, most);
        return otherwise;
    }
    return value;
}

static enum dma_policy dma_policy(void)
{
    const char *text = getenv("VFU_DEV_PRELOAD_DMA");

    if (text == NULL || *text == '\0' || strcmp(text, "auto") == 0) {
        return DMA_AUTO;
    }
    if (strcmp(text, "message") == 0) {
        return DMA_MESSAGE;
    }
    if (strcmp(text, "mapped") == 0) {
        return DMA_MAPPED;
    }
    say("VFU_DEV_PRELOAD_DMA=%s: it is auto, message or mapped; it is ignored", text);
    return DMA_AUTO;
}

static bool refuse_cpr(void)
{
    const char *text = getenv("VFU_DEV_PRELOAD_CPR");

    if (text == NULL || *text == '\0' || strcmp(text, "late") == 0) {
        return false;
    }
    if (strcmp(text, "refuse") == 0) {
        return true;
    }
    say("VFU_DEV_PRELOAD_CPR=%s: it is late or refuse; it is ignored", text);
    return false;
}

void config_read(void)
{
    const char *fault = getenv("VFU_DEV_PRELOAD_FAULT");
    char name[64];

    config.iommufd = -1;
    for (unsigned int i = 0; i < MAX_DEVICES; i++) {
        const char *socket;

        snprintf(name, sizeof(name), "VFU_DEV_PRELOAD_SOCKET%u", i);
        socket = getenv(name);
        if (socket == NULL || *socket == '\0') {
            break;
        }
        /* The environment may be changed by the program, as Python's os.environ does. */
        config.sockets[i] = strdup(socket);
        snprintf(name, sizeof(name), "VFU_DEV_PRELOAD_FD%u", i);
        config.fds[i] = (int)number(name, 3, 1 << 20, -1);
        config.devices = i + 1;
    }
    if (config.devices == 0) {
        return;
    }
    config.iommufd = (int)number("VFU_DEV_PRELOAD_IOMMUFD", 3, 1 << 20, -1);
    config.timeout_ms = (unsigned int)number("VFU_DEV_PRELOAD_TIMEOUT_MS", 1, 3600000, DEFAULT_TIMEOUT_MS);
    config.dma = dma_policy();
    config.refuse_cpr = refuse_cpr();
    if (fault != NULL && strcmp(fault, "forget-writes") == 0) {
        config.forget_writes = true;
        say("VFU_DEV_PRELOAD_FAULT=forget-writes: DMA by message is not logged; guest memory will be lost");
    } else if (fault != NULL && *fault != '\0') {
        say("VFU_DEV_PRELOAD_FAULT=%s: there is only forget-writes; it is ignored", fault);
    }
}
