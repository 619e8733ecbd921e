/*
 * Everything at once, for the thread sanitizer: threads that read and write regions, map and unmap memory, look for dirty
 * pages, migrate, reset, and duplicate and close descriptors, while the device writes to memory by message.
 *
 * threads ROUNDS WRITER-REGISTERS...: offsets in BAR0 of writer_buffer, writer_length, writer_rate, writer_ctrl
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/iommufd.h>
#include <linux/vfio.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define BUFFER (64 * PAGE)
#define PLACE(region, offset) (((uint64_t)(region) << 40) + (offset))

static int iommufd, device, rounds;
static uint32_t ioas;
static char *memory;

static void check(int good, const char *what)
{
    if (!good) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static void map(uint64_t iova, void *address, uint64_t size)
{
    struct iommu_ioas_map request = {
        .size = sizeof(request),
        .flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE,
        .ioas_id = ioas,
        .user_va = (uintptr_t)address,
        .iova = iova,
        .length = size,
    };

    check(ioctl(iommufd, IOMMU_IOAS_MAP, &request) == 0, "map");
}

static void unmap(uint64_t iova, uint64_t size)
{
    struct iommu_ioas_unmap request = { .size = sizeof(request), .ioas_id = ioas, .iova = iova, .length = size };

    check(ioctl(iommufd, IOMMU_IOAS_UNMAP, &request) == 0, "unmap");
}

static int feature(uint32_t flags, void *data, size_t size)
{
    char buffer[128] __attribute__((aligned(8)));
    struct vfio_device_feature *request = (void *)buffer;
    int result;

    request->argsz = (uint32_t)(sizeof(*request) + size);
    request->flags = flags;
    memcpy(request->data, data, size);
    result = ioctl(device, VFIO_DEVICE_FEATURE, request);
    memcpy(data, request->data, size);
    return result;
}

static int set_state(uint32_t state)
{
    struct vfio_device_feature_mig_state request = { state, 0 };

    check(feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, &request, sizeof(request)) == 0,
          "set state");
    return request.data_fd;
}

/* A vCPU: it reads and writes memory of its own. */
static void *access_regions(void *opaque)
{
    uint64_t number = (uintptr_t)opaque;
    uint64_t place = PLACE(VFIO_PCI_BAR2_REGION_INDEX, number * 64);

    for (int i = 0; i < rounds * 20; i++) {
        uint64_t value = (uint64_t)i << 8 | number, found = 0;

        check(pwrite(device, &value, sizeof(value), (off_t)place) == sizeof(value), "write");
        check(pread(device, &found, sizeof(found), (off_t)place) == sizeof(found), "read");
        check(found == value, "what was written is read");
    }
    return NULL;
}

/* Another: it changes the memory map. */
static void *change_map(void *opaque)
{
    uint64_t place = (1UL << 32) + (uintptr_t)opaque * BUFFER;
    char *own = mmap(NULL, BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    for (int i = 0; i < rounds; i++) {
        map(place, own, BUFFER);
        unmap(place, BUFFER);
    }
    munmap(own, BUFFER);
    return NULL;
}

/* The migration thread: dirty pages. */
static void *follow_log(void *opaque)
{
    struct vfio_device_feature_dma_logging_range range = { 0, BUFFER };
    uint64_t bitmap[BUFFER / PAGE / 64 + 1];
    unsigned long dirty = 0;

    (void)opaque;
    for (int i = 0; i < rounds; i++) {
        struct vfio_device_feature_dma_logging_control start = { PAGE, 1, 0, (uintptr_t)&range };
        struct vfio_device_feature_dma_logging_report report = { 0, BUFFER, PAGE, (uintptr_t)bitmap };

        check(feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START, &start, sizeof(start)) == 0,
              "start the log");
        for (int j = 0; j < 5; j++) {
            memset(bitmap, 0, sizeof(bitmap));
            check(feature(VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, &report, sizeof(report)) == 0,
                  "report");
            dirty += (unsigned long)__builtin_popcountl(bitmap[0]);
        }
        check(feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, &start, 0) == 0, "stop the log");
    }
    printf("dirty %lu\n", dirty);
    return NULL;
}

/* Saving; the data is read while others read and write the device. */
static void *save(void *opaque)
{
    char *buffer = malloc(1 << 20);
    unsigned long got = 0;

    (void)opaque;
    for (int i = 0; i < rounds / 4 + 1; i++) {
        struct vfio_precopy_info info = { .argsz = sizeof(info) };
        int fd = set_state(VFIO_DEVICE_STATE_PRE_COPY);
        ssize_t size;

        check(fd >= 0, "a data descriptor");
        for (int j = 0; j < 8; j++) {
            size = read(fd, buffer, 1 << 16);
            check(size >= 0 || errno == ENOMSG, "read data");
            got += size > 0 ? (unsigned long)size : 0;
            check(ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info) == 0, "pre-copy info");
        }
        check(set_state(VFIO_DEVICE_STATE_RUNNING) == -1, "no data descriptor");
        check(read(fd, buffer, 1) < 0 && errno == ENODEV, "the session is over");
        close(fd);
    }
    printf("data %lu\n", got);
    free(buffer);
    return NULL;
}

static void *duplicate(void *opaque)
{
    (void)opaque;
    for (int i = 0; i < rounds * 20; i++) {
        struct vfio_device_info info = { .argsz = sizeof(info) };
        int copy = dup(device), other = open("/dev/null", O_RDWR | O_CLOEXEC);

        check(ioctl(copy, VFIO_DEVICE_GET_INFO, &info) == 0 && info.num_regions == 9, "info of a duplicate");
        check(dup2(other, copy) == copy && write(copy, "x", 1) == 1, "a file in its place");
        close(copy);
        close(other);
    }
    return NULL;
}

static void write_register(long offset, uint64_t value, size_t size)
{
    check(pwrite(device, &value, size, (off_t)PLACE(VFIO_PCI_BAR0_REGION_INDEX, offset)) == (ssize_t)size, "register");
}

int main(int argc, char **argv)
{
    void *(*const bodies[])(void *) = { access_regions, access_regions, access_regions, change_map, change_map,
                                        follow_log, save, duplicate };
    struct vfio_device_bind_iommufd bind = { .argsz = sizeof(bind) };
    struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof(attach) };
    struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
    pthread_t threads[sizeof(bodies) / sizeof(bodies[0])];
    uint16_t command = 6;

    if (argc != 6) {
        return 2;
    }
    rounds = atoi(argv[1]);
    iommufd = open("/dev/iommu", O_RDWR);
    device = open("/dev/vfio/devices/vfio-user0", O_RDWR);
    bind.iommufd = iommufd;
    check(ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, &bind) == 0, "bind");
    check(ioctl(iommufd, IOMMU_IOAS_ALLOC, &alloc) == 0, "alloc");
    attach.pt_id = ioas = alloc.out_ioas_id;
    check(ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach) == 0, "attach");
    memory = mmap(NULL, BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    map(0, memory, BUFFER);
    check(pwrite(device, &command, 2, (off_t)PLACE(VFIO_PCI_CONFIG_REGION_INDEX, 4)) == 2, "bus master");
    write_register(atol(argv[2]), 0, 8);
    write_register(atol(argv[3]), BUFFER, 8);
    write_register(atol(argv[4]), 16 << 20, 8);
    write_register(atol(argv[5]), 1, 4);
    for (size_t i = 0; i < sizeof(threads) / sizeof(threads[0]); i++) {
        check(pthread_create(&threads[i], NULL, bodies[i], (void *)(uintptr_t)i) == 0, "thread");
    }
    for (size_t i = 0; i < sizeof(threads) / sizeof(threads[0]); i++) {
        pthread_join(threads[i], NULL);
    }
    write_register(atol(argv[5]), 0, 4);
    close(iommufd);
    close(device);
    puts("done");
    return 0;
}
