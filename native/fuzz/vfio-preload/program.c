/*
 * Target: the preloaded library as the client of a server that sends anything.
 *
 * The input: a byte for how DMA goes, with 0x80 for a server that lets nothing be mapped and 0x40 for one that takes a
 * window for migration data, then records. The first one is what the program does, a step after the other; all others
 * are what the server does, one or more for each request it gets. When they are used up it is honest.
 *
 * The library runs as it does in a program, receiver thread and all; only that the server is a thread here. What is not
 * linked is the interposed symbols: steps call what they would call.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include "guest.h"
#include "instead.h"
#include "server.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"
#include "iommufd.h"
#include "table.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

const size_t setup_bytes = 1;


static struct file *iommu, *file;
static struct device *device;
static uint32_t ioas;
static int data_fd;
static uint8_t buffer[70000];

/* --- what the program does ---------------------------------------------------------------------------------------- */

static long device_ioctl(unsigned long request, void *argument)
{
    return file->ops->ioctl(file, request, argument);
}

static void region(struct input *input, bool write)
{
    static const size_t sizes[] = { 0, 1, 2, 4, 8, 16, 4096, 70000 };
    uint64_t number = take(input, 1) % 10;
    size_t size = sizes[take(input, 1) % 8];
    uint64_t offset = number << REGION_SHIFT | take(input, 2);
    ssize_t done;

    memset(buffer, 0, size);
    done = write ? file->ops->pwrite(file, buffer, size, offset) : file->ops->pread(file, buffer, size, offset);
    if (done > (ssize_t)size) {
        fault("%zd of %zu bytes of a region", done, size);
    }
}

static void region_information(struct input *input)
{
    struct vfio_region_info *info = (void *)buffer;

    memset(buffer, 0, sizeof(*info));
    info->index = (uint32_t)take(input, 1) % 11;
    info->argsz = (uint32_t)(sizeof(*info) + take(input, 2));
    if (device_ioctl(VFIO_DEVICE_GET_REGION_INFO, info) == 0 && info->cap_offset != 0 &&
        info->cap_offset < sizeof(*info)) {
        fault("region info with capabilities at %u", info->cap_offset);
    }
}

/* Everything that can be mapped can be touched. */
static void map_region(struct input *input)
{
    uint64_t number = take(input, 1) % 10, offset = take(input, 1) * PAGE_BYTES;
    size_t size = (take(input, 1) + 1) * PAGE_BYTES;
    long mapped = file->ops->mmap(file, NULL, size, PROT_READ, MAP_SHARED, number << REGION_SHIFT | offset);

    if (mapped >= 0 || mapped < -4096) {
        for (size_t at = 0; at < size; at += PAGE_BYTES) {
            (void)*(volatile uint8_t *)(mapped + (long)at);
        }
        munmap((void *)mapped, size);
    }
}

static void irq_information(struct input *input)
{
    struct vfio_irq_info info = { .argsz = sizeof(info), .index = (uint32_t)take(input, 1) % 8 };

    if (device_ioctl(VFIO_DEVICE_GET_IRQ_INFO, &info) == 0 && info.count > MAX_IRQ_COUNT) {
        fault("%u interrupts", info.count);
    }
}

static void set_irqs(struct input *input)
{
    struct {
        struct vfio_irq_set set;
        int fds[64];
    } request = { .set = { .argsz = sizeof(request) } };
    uint32_t flags = (uint32_t)take(input, 1);

    request.set.flags = flags & 0x3f;
    request.set.index = (uint32_t)take(input, 1) % 6;
    request.set.start = flags >> 6;
    request.set.count = (uint32_t)take(input, 1) % 65;
    for (size_t i = 0; i < 64; i++) {
        request.fds[i] = i % 7 == 6 ? -1 : event_fd();
    }
    device_ioctl(VFIO_DEVICE_SET_IRQS, &request);
}

union any_feature {
    struct vfio_device_feature_mig_state state;
    struct vfio_device_feature_dma_logging_control control;
    struct vfio_device_feature_dma_logging_report report;
    uint64_t words[4];
};

static long feature(uint32_t flags, union any_feature *data)
{
    struct {
        struct vfio_device_feature head;
        union any_feature data;
    } request = { .head = { sizeof(request), flags }, .data = *data };
    long result = device_ioctl(VFIO_DEVICE_FEATURE, &request);

    *data = request.data;
    return result;
}

static void set_state(struct input *input)
{
    union any_feature data = { .state = { (uint32_t)take(input, 1) % 9, -1 } };
    long result = feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, &data);

    if (data.state.data_fd >= 0 && result == 0) {
        if (data_fd >= 0) {
            fuzz_close(data_fd);
        }
        data_fd = data.state.data_fd;
    }
}

static void move_data(struct input *input, unsigned int what)
{
    struct vfio_precopy_info info = { .argsz = sizeof(info) };
    size_t size = (size_t)take(input, 2);
    struct file *data = data_fd >= 0 ? file_get(data_fd, NULL) : NULL;
    ssize_t done = 0;

    if (data == NULL) {
        return;
    }
    if (what == 0) {
        done = data->ops->read(data, buffer, size);
    } else if (what == 1) {
        done = data->ops->write(data, buffer, size);
    } else {
        data->ops->ioctl(data, VFIO_MIG_GET_PRECOPY_INFO, &info);
    }
    if (done > (ssize_t)size) {
        fault("%zd of %zu bytes of migration data", done, size);
    }
    file_put(data);
}

static void log_dma(struct input *input, unsigned int what)
{
    static uint64_t bitmap[SLOTS * SLOT_BYTES / PAGE_BYTES / 64 + 64];
    struct vfio_device_feature_dma_logging_range range = { 0, SLOTS * SLOT_BYTES };
    union any_feature data = { .words = { 0 } };
    uint32_t flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;

    if (what == 0) {
        flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
        data.control.page_size = PAGE_BYTES;
        data.control.num_ranges = 1;
        data.control.ranges = ADDRESS(&range);
    } else if (what == 2) {
        flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
        data.report.page_size = PAGE_BYTES << take(input, 1) % 4;
        data.report.length = (take(input, 1) + 1) * PAGE_BYTES;
        data.report.bitmap = ADDRESS(bitmap);
    }
    feature(flags, &data);
}

static void map_memory(struct input *input)
{
    uint8_t number = (uint8_t)take(input, 1) % SLOTS;
    struct iommu_ioas_map map = {
        .size = sizeof(map),
        .flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE |
                 (number % 2 ? IOMMU_IOAS_MAP_WRITEABLE : 0),
        .ioas_id = ioas,
        .user_va = ADDRESS(guest) + number * SLOT_BYTES + PAGE_BYTES,
        .length = MAPPED_BYTES,
        .iova = number * SLOT_BYTES + PAGE_BYTES,
    };

    iommu->ops->ioctl(iommu, IOMMU_IOAS_MAP, &map);
}

static void unmap_memory(struct input *input)
{
    struct iommu_ioas_unmap unmap = {
        .size = sizeof(unmap), .ioas_id = ioas, .iova = take(input, 1) % SLOTS * SLOT_BYTES + PAGE_BYTES,
        .length = MAPPED_BYTES,
    };

    iommu->ops->ioctl(iommu, IOMMU_IOAS_UNMAP, &unmap);
}

/* What is asked of the iommufd beside mapping. */
static void ask_iommufd(struct input *input)
{
    static uint8_t info[64];
    struct iommu_ioas_change_process change = { .size = sizeof(change) };
    struct iommu_iova_range range;
    struct iommu_ioas_iova_ranges ranges = {
        .size = sizeof(ranges), .ioas_id = ioas, .num_iovas = 1, .allowed_iovas = ADDRESS(&range)
    };
    struct iommu_hwpt_alloc hwpt = { .size = sizeof(hwpt), .dev_id = device->id, .pt_id = ioas };
    struct iommu_hw_info hw = {
        .size = sizeof(hw), .dev_id = device->id, .data_len = sizeof(info), .data_uptr = ADDRESS(info)
    };
    struct iommu_destroy destroy = { .size = sizeof(destroy), .id = (uint32_t)take(input, 1) % 8 };
    struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof(attach), .pt_id = ioas };
    struct vfio_device_detach_iommufd_pt detach = { .argsz = sizeof(detach) };

    switch (take(input, 1) % 7) {
    case 0:
        iommu->ops->ioctl(iommu, IOMMU_IOAS_CHANGE_PROCESS, &change);
        break;
    case 1:
        iommu->ops->ioctl(iommu, IOMMU_IOAS_IOVA_RANGES, &ranges);
        break;
    case 2:
        iommu->ops->ioctl(iommu, IOMMU_HWPT_ALLOC, &hwpt);
        break;
    case 3:
        iommu->ops->ioctl(iommu, IOMMU_GET_HW_INFO, &hw);
        break;
    case 4:
        iommu->ops->ioctl(iommu, IOMMU_DESTROY, &destroy);
        break;
    case 5:
        device_ioctl(VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach);
        break;
    default:
        device_ioctl(VFIO_DEVICE_DETACH_IOMMUFD_PT, &detach);
    }
}

static void plain_feature(uint32_t flags)
{
    union any_feature data = { .words = { 0 } };

    feature(flags, &data);
}

static void step(struct input *input)
{
    unsigned int what = (unsigned int)take(input, 1) % 21;
    struct vfio_device_info info = { .argsz = sizeof(info) };

    switch (what) {
    case 0:
    case 1:
        region(input, what == 1);
        break;
    case 2:
        region_information(input);
        break;
    case 3:
        map_region(input);
        break;
    case 4:
        irq_information(input);
        break;
    case 5:
        set_irqs(input);
        break;
    case 6:
        device_ioctl(VFIO_DEVICE_RESET, NULL);
        break;
    case 7:
    case 8:
        set_state(input);
        break;
    case 9:
        plain_feature(VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE);
        break;
    case 10:
    case 11:
    case 12:
        move_data(input, what - 10);
        break;
    case 13:
    case 14:
    case 15:
        log_dma(input, what - 13);
        break;
    case 16:
        map_memory(input);
        break;
    case 17:
        unmap_memory(input);
        break;
    case 18:
        plain_feature(VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE);
        plain_feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2);
        break;
    case 19:
        ask_iommufd(input);
        break;
    default:
        device_ioctl(VFIO_DEVICE_GET_INFO, &info);
    }
}

/* --- its life ---------------------------------------------------------------------------------------------------- */

static bool bind_device(void)
{
    struct vfio_device_bind_iommufd bind = { .argsz = sizeof(bind) };
    struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
    struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof(attach) };

    bind.iommufd = file_install(iommu, O_CLOEXEC);
    if (bind.iommufd < 0) {
        fault("no descriptor for the iommufd");
    }
    file_hold(iommu); /* ours, beside the descriptor's */
    if (device_ioctl(VFIO_DEVICE_BIND_IOMMUFD, &bind) != 0) {
        fuzz_close(bind.iommufd);
        return false;
    }
    fuzz_close(bind.iommufd);
    if (iommu->ops->ioctl(iommu, IOMMU_IOAS_ALLOC, &alloc) != 0) {
        fault("no address space");
    }
    ioas = attach.pt_id = alloc.out_ioas_id;
    device_ioctl(VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach);
    return true;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    config.devices = 1;
    config.sockets[0] = "fuzz";
    config.fds[0] = config.iommufd = -1;
    config.timeout_ms = 60000;
    table_open();
    guest_open();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, data + size };
    struct record steps = { 0 };
    uint8_t setup;

    descriptors_before();
    guest_fill();
    setup = (uint8_t)take(&input, 1);
    config.dma = (enum dma_policy)((setup & 0x3f) % 3);
    take_record(&input, &steps);
    server_script(input, !(setup & 0x80), setup & 0x40);
    data_fd = -1;
    iommu = iommufd_new(-1);
    device = device_new(0);
    if (iommu == NULL || device == NULL) {
        fault("no memory");
    }
    file = &device->file;
    if (bind_device()) {
        while (left(&steps.body) > 0) {
            step(&steps.body);
        }
    }
    if (data_fd >= 0) {
        fuzz_close(data_fd);
    }
    file_put(file);
    file_put(iommu);
    server_end();
    guest_check();
    descriptors_after();
    return 0;
}
