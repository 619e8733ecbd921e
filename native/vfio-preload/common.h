/*
 * What every part uses: the log, messages to the user, the environment, and memory of the caller's.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef COMMON_H
#define COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The oldest versions of symbols that got a second one since, most of them when glibc 2.34 merged its libraries. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.2.5");
__asm__(".symver pthread_sigmask, pthread_sigmask@GLIBC_2.2.5");
__asm__(".symver pthread_mutex_trylock, pthread_mutex_trylock@GLIBC_2.2.5");
__asm__(".symver pthread_rwlock_rdlock, pthread_rwlock_rdlock@GLIBC_2.2.5");
__asm__(".symver pthread_rwlock_wrlock, pthread_rwlock_wrlock@GLIBC_2.2.5");
__asm__(".symver pthread_rwlock_unlock, pthread_rwlock_unlock@GLIBC_2.2.5");
__asm__(".symver pthread_condattr_setclock, pthread_condattr_setclock@GLIBC_2.3.3");
#endif

#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define PAGE_BYTES 4096ULL

/* A pointer of the caller's, as its structures have them; and how long a structure is up to a member. */
#define ADDRESS(pointer) ((uint64_t)(uintptr_t)(pointer))
#define END_OF(type, member) (offsetof(struct type, member) + sizeof(((struct type *)0)->member))

/* --- config.c: the environment, as README.md describes it --- */

#define MAX_DEVICES 64
/* Names that the kernel cannot give: its devices are vfio<number>, its groups are numbered from 0. */
#define CDEV_PREFIX "/dev/vfio/devices/vfio-user"
#define FIRST_GROUP 1000000u

enum dma_policy {
    DMA_AUTO, /* descriptors, unless the server keeps no log of its writes through them */
    DMA_MESSAGE, /* never descriptors */
    DMA_MAPPED, /* descriptors always; without the server's log, all memory is dirty */
};

struct config {
    unsigned int devices; /* 0: the library does nothing */
    const char *sockets[MAX_DEVICES];
    int fds[MAX_DEVICES]; /* descriptors that stand for devices; -1: none */
    int iommufd; /* the one that stands for /dev/iommu; -1: none */
    unsigned int timeout_ms;
    enum dma_policy dma;
    bool refuse_cpr; /* IOMMU_IOAS_CHANGE_PROCESS is not known; else it fails once anything is mapped */
    bool forget_writes; /* a fault, for tests: DMA by message is not logged */
};

extern struct config config;

void config_read(void);

/* --- log.c --- */

/* Something the user has to know, on stderr and in the log. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Our own descriptors' numbers begin here: programs expect theirs from 3 on. */
#define INTERNAL_FROM 500

/* A line of VFU_DEV_PRELOAD_LOG. Arguments are evaluated only if there is one. */
extern int log_fd;
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define trace(...) (__builtin_expect(log_fd >= 0, 0) ? log_line(__VA_ARGS__) : (void)0)

void log_open(void);

/* The file that an environment variable names, to append to: a descriptor, or -1, which is said with `otherwise`. */
int append_to(const char *variable, const char *otherwise);
const char *errno_name(long result);

/* --- user.c: memory of the caller's, which may not be there --- */

/* Copy like the kernel's functions of these names: 0, or -EFAULT with part of it done. */
int copy_from_user(void *to, uint64_t from, size_t size);
int copy_to_user(uint64_t to, const void *from, size_t size);

/* As copy_from_user for a structure that begins with its own size: `known` bytes of it, at least `least`. */
#define fetch_argsz(structure, address, least) fetch_sized(structure, sizeof(*(structure)), address, least)
int fetch_sized(void *structure, size_t known, const void *address, size_t least);

#endif
