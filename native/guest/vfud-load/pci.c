/*
 * The PCI bus as the guest's kernel sees it: lspci, its messages, configuration space, devices that come and go.
 * And the kernel's own reset.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "arguments.h"
#include "device.h"
#include "dma.h"
#include "engine.h"
#include "line.h"
#include "load.h"
#include "pci.h"
#include "writer.h"

/* Text that fits into one reply even if every character has to be escaped with one more. */
#define TEXT_MAX 30000
#define SYSLOG_ACTION_READ_ALL 3
#define LEVEL_DEBUG 7

static char text[TEXT_MAX + 1];

static void reply_text(const char *command)
{
    reply_part("{\"reply\":\"%s\",\"ok\":true,\"text\":\"", command);
    for (const char *at = text; *at; at++) {
        if (*at == '\n')
            reply_part("\\n");
        else if (*at == '"' || *at == '\\')
            reply_part("\\%c", *at);
        else
            reply_part("%c", *at >= ' ' && *at <= '~' ? *at : ' ');
    }
    reply_part("\"}");
    reply_end();
}

/* lspci [device=N]: what `lspci -vvv` says about a device, about all that there are unless one is named. */
void command_lspci(const char *arguments)
{
    char line[NAME_MAX + 64] = "/bin/lspci -vvv -nn 2>&1";
    size_t length;
    int status;
    FILE *pipe;

    if (option(arguments, "device")) {
        struct device *dev = chosen_device("lspci", arguments);

        if (!dev)
            return;
        snprintf(line, sizeof(line), "/bin/lspci -vvv -nn -s %s 2>&1", dev->address);
    }
    pipe = popen(line, "r");
    if (!pipe) {
        refuse("lspci", "%s", strerror(errno));
        return;
    }
    length = fread(text, 1, TEXT_MAX, pipe);
    text[length] = '\0';
    status = pclose(pipe);
    if (status)
        refuse("lspci", "status %#x", (unsigned int)status);
    else
        reply_text("lspci");
}

/*
 * dmesg [level=N] [match=WORD]: the kernel's messages of that level and more severe ones; 4 is a warning, 3 an error.
 * With a word, only lines that have it.
 */
void command_dmesg(const char *arguments)
{
    static char log[1 << 18];
    unsigned long most = (unsigned long)integer(arguments, "level", LEVEL_DEBUG), level = LEVEL_DEBUG;
    int length = klogctl(SYSLOG_ACTION_READ_ALL, log, sizeof(log) - 1);
    const char *match = option(arguments, "match");
    char word[64];
    size_t used = 0;

    snprintf(word, sizeof(word), "%.*s", match ? (int)strcspn(match, " ") : 0, match ? match : "");
    if (length < 0) {
        refuse("dmesg", "%s", strerror(errno));
        return;
    }
    log[length] = '\0';
    for (char *line = strtok(log, "\n"); line; line = strtok(NULL, "\n")) {
        size_t size;

        if (*line == '<')
            level = strtoul(line + 1, NULL, 10) & 7; /* the rest is the facility; further lines have no prefix */
        size = strlen(line);
        if (level > most || !strstr(line, word))
            continue;
        if (used + size + 1 > TEXT_MAX) {
            refuse("dmesg", "more than %d bytes; ask for a level, or for a word", TEXT_MAX);
            return;
        }
        memcpy(text + used, line, size);
        text[used + size] = '\n';
        used += size + 1;
    }
    text[used] = '\0';
    reply_text("dmesg");
}

/* config offset=N [size=1|2|4] [value=N] [device=N]: read configuration space; with a value, write it first. */
void command_config(const char *arguments)
{
    struct device *dev = chosen_device("config", arguments);
    uint64_t offset = integer(arguments, "offset", 0), size = integer(arguments, "size", 2);
    uint32_t value = (uint32_t)integer(arguments, "value", 0);
    char path[PATH_MAX];
    bool good;
    int fd;

    if (!dev)
        return;
    if (offset >= 4096 || (size != 1 && size != 2 && size != 4) || offset % size) {
        refuse("config", "offset: below 4096 and a multiple of size: 1, 2 or 4");
        return;
    }
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/config", dev->address);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        refuse("config", "%s: %s", path, strerror(errno));
        return;
    }
    good = !option(arguments, "value") || pwrite(fd, &value, size, (off_t)offset) == (ssize_t)size;
    value = 0;
    good = good && pread(fd, &value, size, (off_t)offset) == (ssize_t)size;
    if (good)
        reply("{\"reply\":\"config\",\"ok\":true,\"value\":%u}", value);
    else
        refuse("config", "%s", strerror(errno));
    close(fd);
}

/*
 * release [device=N]: let go of a device before it is unplugged; what is behind its BARs then is a bus error. Those
 * after it move up. It must not be under load.
 */
void command_release(const char *arguments)
{
    struct device *dev = chosen_device("release", arguments);

    if (!dev)
        return;
    if (load_running() || dma_running()) {
        refuse("release", "a load is running");
        return;
    }
    writer_forget(dev);
    dma_forget(dev);
    engine_forget(dev);
    close_device(dev);
    device_count--;
    memmove(dev, dev + 1, (size_t)(devices + device_count - dev) * sizeof(*dev));
    reply("{\"reply\":\"release\",\"ok\":true,\"devices\":%zu}", device_count);
}

/* rescan: take up devices that were plugged in; they come after those that are there. One may not be ready yet. */
void command_rescan(const char *arguments)
{
    char left[LEFT_BYTES];

    (void)arguments;
    if (load_running() || dma_running()) {
        refuse("rescan", "a load is running");
        return;
    }
    find_devices(left, sizeof(left));
    reply("{\"reply\":\"rescan\",\"ok\":true,\"devices\":%zu,\"left\":\"%s\"}", device_count, left);
}

/* reboot: the machine's own way, by the kernel; this program starts anew then and knows of nothing it did. */
void command_reboot(const char *arguments)
{
    (void)arguments;
    reply("{\"reply\":\"reboot\",\"ok\":true}");
    sync();
    if (reboot(RB_AUTOBOOT) < 0)
        printf("vfud-load: reboot: %s\n", strerror(errno));
}
