/*
 * Finding and mapping the devices; their registers.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arguments.h"
#include "device.h"
#include "line.h"
#include "mix.h"

#define SYSFS_PCI "/sys/bus/pci/devices"
#define SYSFS_DRIVER "/sys/bus/pci/drivers/vfud"
#define VENDOR_ID 0x4656
#define DEVICE_ID 0x4455

struct device devices[MAX_DEVICES];
size_t device_count;

static unsigned long read_sysfs_number(const char *address, const char *name)
{
    char path[PATH_MAX], text[32] = "";
    FILE *file;

    snprintf(path, sizeof(path), SYSFS_PCI "/%s/%s", address, name);
    file = fopen(path, "r");
    if (!file)
        return ULONG_MAX;
    if (!fgets(text, sizeof(text), file))
        text[0] = '\0';
    fclose(file);
    return strtoul(text, NULL, 0);
}

int write_sysfs(const char *address, const char *name, const char *text)
{
    char path[PATH_MAX];
    int fd, error = 0;

    snprintf(path, sizeof(path), SYSFS_PCI "/%s/%s", address, name);
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    if (write(fd, text, strlen(text)) < 0)
        error = errno;
    close(fd);
    return error;
}

/* Why a device was not opened. */
static char reason[256];

static bool failed(const char *format, ...) __attribute__((format(printf, 1, 2)));

static bool failed(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(reason, sizeof(reason), format, arguments);
    va_end(arguments);
    return false;
}

/* NULL: it failed(). */
static volatile void *map_bar(const char *address, int bar, uint64_t need, uint64_t *mapped)
{
    char path[PATH_MAX];
    struct stat info;
    void *base;
    int fd;

    snprintf(path, sizeof(path), SYSFS_PCI "/%s/resource%d", address, bar);
    fd = open(path, O_RDWR | O_SYNC | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) < 0) {
        failed("BAR %d: %s", bar, strerror(errno));
        if (fd >= 0)
            close(fd);
        return NULL;
    }
    if ((uint64_t)info.st_size < need) {
        failed("BAR %d: %lld bytes, %" PRIu64 " needed", bar, (long long)info.st_size, need);
        close(fd);
        return NULL;
    }
    base = mmap(NULL, (size_t)info.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (base == MAP_FAILED) {
        failed("mapping BAR %d: %s", bar, strerror(errno));
        return NULL;
    }
    *mapped = (uint64_t)info.st_size;
    return base;
}

/* The module's file for this device: /dev/vfudN, N as sysfs has it. -1: the module does not drive it (yet). */
static int open_driver(const char *address)
{
    char path[PATH_MAX];
    struct dirent **entries;
    int count, fd = -1;

    snprintf(path, sizeof(path), SYSFS_PCI "/%s/misc", address);
    count = scandir(path, &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        if (fd < 0 && !strncmp(entries[i]->d_name, "vfud", 4)) {
            snprintf(path, sizeof(path), "/dev/%s", entries[i]->d_name);
            fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd < 0)
                failed("%s: %s", path, strerror(errno));
        }
        free(entries[i]);
    }
    if (count >= 0)
        free(entries);
    return fd;
}

uint32_t read32(const struct device *dev, unsigned int offset)
{
    return *(volatile uint32_t *)(dev->registers + offset);
}

uint64_t read64(const struct device *dev, unsigned int offset)
{
    return *(volatile uint64_t *)(dev->registers + offset);
}

void write32(struct device *dev, unsigned int offset, uint32_t value)
{
    *(volatile uint32_t *)(dev->registers + offset) = value;
}

void write64(struct device *dev, unsigned int offset, uint64_t value)
{
    *(volatile uint64_t *)(dev->registers + offset) = value;
}

uint64_t write_memory(struct device *dev, uint64_t offset, const uint8_t *from, uint64_t count)
{
    volatile uint8_t *to = (volatile uint8_t *)dev->memory + offset;
    uint64_t accesses = 0;

    while (count) {
        uint64_t step = 8;

        while (step > count || (uintptr_t)to % step)
            step /= 2;
        switch (step) {
        case 8:
            *(volatile uint64_t *)to = *(const uint64_t *)from;
            break;
        case 4:
            *(volatile uint32_t *)to = *(const uint32_t *)from;
            break;
        case 2:
            *(volatile uint16_t *)to = *(const uint16_t *)from;
            break;
        default:
            *to = *from;
        }
        to += step;
        from += step;
        count -= step;
        accesses++;
    }
    return accesses;
}

static uint64_t fill_word(uint64_t seed, uint64_t index)
{
    return seed ? mix(seed + (index + 1) * GOLDEN) : 0;
}

/* Whether the device is open now; where not, `reason` says why, and the next rescan tries again. */
static bool open_device(struct device *dev, const char *address)
{
    uint64_t size, page_size;
    int error;

    memset(dev, 0, sizeof(*dev));
    snprintf(dev->address, sizeof(dev->address), "%s", address);
    failed("the module does not drive it yet");
    dev->driver = open_driver(address);
    if (dev->driver < 0 && !access(SYSFS_DRIVER, F_OK))
        return false;
    /* A driver enabled the device when it was bound; then this is not ours to do. */
    error = dev->driver < 0 ? write_sysfs(address, "enable", "1") : 0;
    if (error)
        return failed("enabling it: %s", strerror(error));
    dev->registers = map_bar(address, 0, BAR0_SIZE, &dev->registers_mapped);
    if (!dev->registers)
        return false;
    if (read32(dev, REG_ID) != ID_VALUE)
        return failed("ID register is %#x, not %#x", read32(dev, REG_ID), ID_VALUE);
    if (read32(dev, REG_VERSION) != 1)
        return failed("register layout %u, this program knows 1", read32(dev, REG_VERSION));
    size = read64(dev, REG_MEMSIZE);
    page_size = read32(dev, REG_PAGE_SIZE);
    if (page_size < 8 || page_size & (page_size - 1) || size < page_size || size % page_size)
        return failed("memory of %" PRIu64 " bytes in pages of %" PRIu64, size, page_size);
    dev->memory = map_bar(address, 2, size, &dev->memory_mapped);
    if (!dev->memory)
        return false;
    dev->words = size / 8;
    dev->page_words = page_size / 8;
    dev->fill = read64(dev, REG_FILL);
    dev->generation = read64(dev, REG_GENERATION);
    dev->journal = malloc(size);
    if (!dev->journal)
        return failed("no RAM for a journal of %" PRIu64 " bytes", size);
    for (uint64_t i = 0; i < dev->words; i++)
        dev->journal[i] = fill_word(dev->fill, i);
    printf("vfud-load: %s: %" PRIu64 " bytes, pages of %" PRIu64 ", fill %" PRIu64 ", generation %" PRIu64 "%s\n",
           address, size, page_size, dev->fill, dev->generation, dev->driver < 0 ? ", no driver" : "");
    return true;
}

void close_device(struct device *dev)
{
    if (dev->registers)
        munmap((void *)(uintptr_t)dev->registers, dev->registers_mapped);
    if (dev->memory)
        munmap((void *)(uintptr_t)dev->memory, dev->memory_mapped);
    if (dev->driver >= 0)
        close(dev->driver);
    free(dev->journal);
}

static bool is_open(const char *address)
{
    for (size_t d = 0; d < device_count; d++)
        if (!strcmp(devices[d].address, address))
            return true;
    return false;
}

void find_devices(char *left, size_t size)
{
    struct dirent **entries;
    int count = scandir(SYSFS_PCI, &entries, NULL, alphasort);
    size_t used = 0;

    left[0] = '\0';
    if (count < 0) {
        snprintf(left, size, SYSFS_PCI ": %s", strerror(errno));
        return;
    }
    for (int i = 0; i < count; i++) {
        const char *name = entries[i]->d_name;

        if (name[0] != '.' && device_count < MAX_DEVICES && !is_open(name) &&
            read_sysfs_number(name, "vendor") == VENDOR_ID && read_sysfs_number(name, "device") == DEVICE_ID) {
            if (open_device(&devices[device_count], name)) {
                device_count++;
            } else {
                close_device(&devices[device_count]);
                printf("vfud-load: %s: left: %s\n", name, reason);
                if (used < size)
                    used += (size_t)snprintf(left + used, size - used, "%s%s: %s", used ? "; " : "", name, reason);
            }
        }
        free(entries[i]);
    }
    free(entries);
}

struct device *chosen_device(const char *command, const char *arguments)
{
    uint64_t index = integer(arguments, "device", 0);

    if (index >= device_count) {
        refuse(command, "no device %" PRIu64 ", there are %zu", index, device_count);
        return NULL;
    }
    return &devices[index];
}

void poll_generations(void)
{
    for (size_t d = 0; d < device_count; d++) {
        struct device *dev = &devices[d];
        uint64_t generation = read64(dev, REG_GENERATION);

        if (generation == dev->generation)
            continue;
        printf("vfud-load: %s: generation %" PRIu64 " -> %" PRIu64 "\n", dev->address, dev->generation, generation);
        reply("{\"event\":\"generation\",\"device\":%zu,\"from\":%" PRIu64 ",\"to\":%" PRIu64 "}", d,
              dev->generation, generation);
        dev->generation = generation;
    }
}

void write_scratch(struct device *dev, uint64_t seed)
{
    dev->scratch_seed = mix(seed + 1) | 1;
    for (unsigned int i = 0; i < SCRATCH_WORDS; i++)
        write64(dev, REG_SCRATCH + i * 8, mix(dev->scratch_seed + i));
}

unsigned int scratch_errors(const struct device *dev)
{
    unsigned int errors = 0;

    if (!dev->scratch_seed)
        return 0;
    for (unsigned int i = 0; i < SCRATCH_WORDS; i++)
        errors += read64(dev, REG_SCRATCH + i * 8) != mix(dev->scratch_seed + i);
    return errors;
}

/* The methods by which the kernel could reset the device, its choice first: "flr bus". */
static void reset_methods(const struct device *dev, char *methods, size_t size)
{
    char path[PATH_MAX];
    FILE *file;

    snprintf(path, sizeof(path), SYSFS_PCI "/%s/reset_method", dev->address);
    file = fopen(path, "r");
    if (!file || !fgets(methods, (int)size, file))
        methods[0] = '\0';
    methods[strcspn(methods, "\n")] = '\0';
    if (file)
        fclose(file);
}

/*
 * reset [kind=kernel|soft] [device=N]: by the guest's own kernel, which does a function level reset where the device
 * offers it; or by the bit in the device's own control register.
 */
void command_reset(const char *arguments)
{
    struct device *dev = chosen_device("reset", arguments);
    char methods[64];
    bool cleared;
    int error = 0;

    if (!dev)
        return;
    write_scratch(dev, now_ns());
    reset_methods(dev, methods, sizeof(methods));
    if (option_is(arguments, "kind", "soft"))
        write32(dev, REG_CTRL, CTRL_RESET);
    else
        error = write_sysfs(dev->address, "reset", "1");
    /* Registers do not survive a reset; the device's memory does. */
    cleared = read64(dev, REG_SCRATCH) == 0;
    if (cleared)
        dev->scratch_seed = 0;
    reply("{\"reply\":\"reset\",\"ok\":%s,\"scratch_cleared\":%s,\"methods\":\"%s\",\"error\":\"%s\"}",
          cleared && !error ? "true" : "false", cleared ? "true" : "false", methods, error ? strerror(error) : "");
}
