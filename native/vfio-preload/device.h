/*
 * A device: what stands behind a VFIO device descriptor.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef DEVICE_H
#define DEVICE_H

#include <pthread.h>

#include "file.h"
#include "iova.h"
#include "wire.h"

#define MAX_REGIONS 100 /* QEMU's VFIO_USER_MAX_REGIONS */
#define MAX_IRQ_TYPES 50 /* QEMU's VFIO_USER_MAX_IRQS */
#define MAX_IRQ_COUNT 2048 /* MSI-X table size field, PCI Local Bus 3.0 section 6.8.2.3 */

/* Where a region is in the device descriptor, as in the kernel's vfio-pci. */
#define REGION_SHIFT 40
#define REGION_MASK ((1ULL << REGION_SHIFT) - 1)

struct migfile;
struct collector;
struct resampler;

struct region {
    uint64_t size;
    uint32_t flags;
    int fd; /* to map it; -1: it cannot be */
    uint64_t fd_offset;
    struct vfio_region_info *info; /* the answer to GET_REGION_INFO, capabilities included */
    size_t info_size;
    struct vfio_region_sparse_mmap_area *areas; /* that can be mapped */
    size_t area_count;
};

/* Migration data in memory that the server shares: window.c. */
struct window {
    char *base; /* NULL: there is none */
    int fd; /* of its memory, for window_deliver() */
    size_t piece; /* the size of each of its pieces */
    bool tried;
};

/* A device's migration: migfile.c. */
struct migration {
    pthread_mutex_t lock;
    uint64_t flags; /* VFIO_MIGRATION_*; 0: there is none */
    bool has_data_size, has_precopy_info_v2;
    bool precopy_info_v2; /* was set */
    uint32_t state; /* enum vfio_device_mig_state */
    struct migfile *session; /* the one that lasts; not a reference */
    bool collecting; /* there is, or was, a collector */
    struct window window;
};

struct device {
    struct file file;
    unsigned int number;
    struct wire *wire; /* NULL until it is connected */
    struct dma_client dma;
    struct vfio_device_info info;
    struct region *regions;
    bool posts; /* small writes to BARs go without a reply */
    bool has_dma_log, maps_descriptors;
    struct migration migration;
    pthread_mutex_t irq_lock; /* one change of interrupts at a time */
    struct resampler *resampler; /* NULL: INTx is not unmasked by eventfd */
    struct file *space; /* the iommufd or group it belongs to, with a reference; NULL: none yet */
    void (*leave)(struct device *device); /* tells it that the device is gone */
    uint32_t id; /* in the iommufd; 0: it belongs to a group */
    uint32_t group; /* its number */
};

extern const struct file_ops device_ops;

/* A device that is not connected yet; the caller has the reference. NULL: no memory. */
struct device *device_new(unsigned int number);

/* Connect and learn all about it. 0 or -errno; -EBUSY: somebody in this process has it. */
int device_connect(struct device *device);

/* A call without data in the reply. */
int device_call(struct device *device, uint16_t command, const void *request, size_t size);

/* --- region.c --- */

int regions_fetch(struct device *device);
void regions_free(struct device *device);
long region_info(struct device *device, void *argument);
ssize_t region_read(struct device *device, void *buffer, size_t count, uint64_t offset);
ssize_t region_write(struct device *device, const void *buffer, size_t count, uint64_t offset);
long region_mmap(struct device *device, void *address, size_t length, int protection, int flags, uint64_t offset);

/* --- irq.c --- */

long irq_info(struct device *device, void *argument);
long irq_set(struct device *device, void *argument);

/* --- resample.c: with irq_lock --- */

int resample_start(struct device *device, int fd);
void resample_stop(struct device *device);

/* --- feature.c --- */

/* Ask the server for a feature: `data` of `size` bytes goes and comes. */
int feature_call(struct device *device, uint32_t flags, void *data, size_t size);
void features_probe(struct device *device);
long feature_ioctl(struct device *device, void *argument);

/* --- migfile.c --- */

long migration_get_state(struct device *device, struct vfio_device_feature_mig_state *state);
long migration_set_state(struct device *device, struct vfio_device_feature_mig_state *state);
void migration_after_reset(struct device *device);

/* --- window.c: with migration.lock, but for window_call() about a piece that nobody else uses --- */

enum { WINDOW_READ, WINDOW_WRITE, WINDOW_WRITE_NEXT };

/* Have a window if the server takes one: 1 or 0, or -errno where it does not answer. */
int window_have(struct device *device);
char *window_piece(const struct device *device, unsigned int number);

/* Ask for, or send, data that is at `data` in the window. Returns bytes or -errno. */
ssize_t window_call(struct device *device, uint16_t command, const char *data, size_t size);

/* Copy data that is at `data` in the window to the caller's buffer: 0, or -EFAULT with part of it done. */
int window_deliver(const struct device *device, uint64_t to, const char *data, size_t size);
void window_drop(struct device *device);

/* --- collect.c --- */

int collector_new(struct device *device, struct collector **collector);
void collector_end(struct collector *collector);
ssize_t collector_write(struct collector *collector, uint64_t from, size_t count);

/* Wait until all that was written has been sent. Returns 0, or what went wrong. */
int collector_flush(struct collector *collector);

/* The same for all of a device's, and for all that this thread may have written to. */
void collectors_flush(struct device *device);
void collectors_flush_thread(void);

/* --- iommufd.c --- */

/* A new /dev/iommu: `real` is the kernel's own, for as long as it is not known whose it is; -1: it is ours. */
struct file *iommufd_new(int real);

/* What a device is asked about its iommufd. */
long iommufd_bind(struct device *device, void *argument);
long iommufd_attach(struct device *device, void *argument);
long iommufd_detach(struct device *device, void *argument);

/* --- type1.c --- */

/* A new /dev/vfio/vfio; `real` as above. */
struct file *container_new(int real);

/* /dev/vfio/<FIRST_GROUP + number>; -EBUSY: it is open. */
int group_new(unsigned int number, struct file **group);

/* --- kvm.c --- */

/* Whether a device attribute of KVM's is about a descriptor of ours, of which KVM must not know. */
bool kvm_swallows(int fd, unsigned long request, void *argument);

/* --- interpose.c calls these about requests on descriptors that are not ours ---------------------------------- */

/* A real device or group is put into `file`: 0 if that becomes the kernel's (it was nobody's yet), or -errno. */
int iommufd_give_up(struct file *file);
int container_give_up(struct file *file);

extern const struct file_ops iommufd_ops, container_ops;

#endif
