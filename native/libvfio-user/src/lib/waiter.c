/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/param.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"
#include "private.h"
#include "waiter.h"

/* <linux/close_range.h>, Linux 5.9 */
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE (1U << 1)
#endif

/* By default it is ignored. */
#define KICK SIGURG
/* After a kick that came between the look at `due` and recv(). */
#define KICK_EVERY_MS 1

/* Where the waiting thread is. */
enum {
    AWAY,
    IN_RECV, /* or about to be, or just back */
    KICKED,  /* as IN_RECV, and must stay until the kick is sent */
};

struct waiter {
    /* Of the thread that watches: they change only when there is none. */
    int         fd;
    int         timer;
    pthread_t   waiting_thread;

    int         wake; /* eventfd: watch again, or end */
    pthread_t   thread;
    bool        started;
    bool        unable; /* to start it */
    bool        kickable;

    atomic_bool ending;
    /* The thread found something, and does not watch until it is woken. */
    atomic_bool due;
    atomic_int  place;
};

static void
on_kick(int signal UNUSED)
{
}

/* Take the signal if it is not the program's. */
static bool
take_signal(void)
{
    struct sigaction there, ours = { .sa_handler = on_kick };

    if (sigaction(KICK, NULL, &there) < 0) {
        return false;
    }
    if ((there.sa_flags & SA_SIGINFO) == 0 && there.sa_handler == on_kick) {
        return true;
    }
    if ((there.sa_flags & SA_SIGINFO) != 0 ||
        (there.sa_handler != SIG_DFL && there.sa_handler != SIG_IGN)) {
        return false;
    }
    /* Without SA_RESTART, so that it ends a recv(). */
    sigemptyset(&ours.sa_mask);
    return sigaction(KICK, &ours, NULL) == 0;
}

static bool
is_kickable(void)
{
    sigset_t blocked;

    return pthread_sigmask(SIG_BLOCK, NULL, &blocked) == 0 &&
           sigismember(&blocked, KICK) == 0 && take_signal();
}

static void
kick(struct waiter *waiter)
{
    struct pollfd wake = { .fd = waiter->wake, .events = POLLIN };

    /* Who wakes this thread has looked, and may be waiting again. */
    do {
        int place = IN_RECV;

        if (!atomic_compare_exchange_strong(&waiter->place, &place, KICKED)) {
            return;
        }
        take_signal(); /* once more, if the program gave up its own meanwhile */
        pthread_kill(waiter->waiting_thread, KICK);
        atomic_store(&waiter->place, IN_RECV);
    } while (poll(&wake, 1, KICK_EVERY_MS) <= 0);
}

/*
 * Have a table of descriptors with nothing but what this thread watches. While
 * threads share one, each system call takes a reference to its file, and drops
 * it: 40 ns of the two that a request costs. Where the kernel is older than
 * Linux 5.9, or a filter forbids it, they share one.
 */
static void
unshare_files(const struct waiter *waiter)
{
    const int watched[] = { waiter->wake, waiter->fd, waiter->timer };
    int last = MAX(MAX(watched[0], watched[1]), watched[2]);
    unsigned int first = 0;

    /* All others are closed: a connection must not be kept open here. */
    if (syscall(SYS_close_range, last + 1U, ~0U, CLOSE_RANGE_UNSHARE) < 0) {
        return;
    }
    while (first <= (unsigned int)last) {
        unsigned int next = last;
        size_t i;

        for (i = 0; i < ARRAY_SIZE(watched); i++) {
            if (watched[i] >= (int)first && (unsigned int)watched[i] < next) {
                next = watched[i];
            }
        }
        if (next > first) {
            syscall(SYS_close_range, first, next - 1, 0);
        }
        first = next + 1;
    }
}

static void *
watch(void *argument)
{
    struct waiter *waiter = argument;
    eventfd_t woken;

    pthread_setname_np(pthread_self(), "vfu-waiter");
    unshare_files(waiter);
    while (eventfd_read(waiter->wake, &woken) == 0 &&
           !atomic_load(&waiter->ending)) {
        struct pollfd fds[] = {
            { .fd = waiter->wake, .events = POLLIN },
            { .fd = waiter->fd, .events = POLLIN },
            { .fd = waiter->timer, .events = POLLIN },
        };

        /* If it fails, the waiting thread looks, too. */
        poll(fds, ARRAY_SIZE(fds), -1);
        if (fds[0].revents == 0) {
            atomic_store(&waiter->due, true);
            kick(waiter);
        }
    }
    return NULL;
}

static bool
start(struct waiter *waiter, int fd, int timer)
{
    sigset_t all, before;
    int ret;

    waiter->fd = fd;
    waiter->timer = timer;
    waiter->waiting_thread = pthread_self();

    /* The program's signals are for its own threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    ret = pthread_create(&waiter->thread, NULL, watch, waiter);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ret == 0;
}

struct waiter *
waiter_create(void)
{
    struct waiter *waiter = calloc(1, sizeof(*waiter));

    if (waiter == NULL) {
        return NULL;
    }
    waiter->wake = eventfd(0, EFD_CLOEXEC);
    if (waiter->wake < 0) {
        free(waiter);
        return NULL;
    }
    return waiter;
}

static void
stop(struct waiter *waiter)
{
    if (waiter->started) {
        atomic_store(&waiter->ending, true);
        eventfd_write(waiter->wake, 1);
        pthread_join(waiter->thread, NULL);
        atomic_store(&waiter->ending, false);
        waiter->started = false;
    }
}

void
waiter_destroy(struct waiter *waiter)
{
    if (waiter != NULL) {
        stop(waiter);
        close(waiter->wake);
        free(waiter);
    }
}

void
waiter_arm(struct waiter *waiter, int fd, int timer)
{
    waiter->kickable = is_kickable();
    if (!waiter->kickable) {
        return;
    }
    if (waiter->started &&
        (fd != waiter->fd || timer != waiter->timer ||
         !pthread_equal(waiter->waiting_thread, pthread_self()))) {
        stop(waiter);
    }
    if (!waiter->started && !waiter->unable) {
        waiter->started = start(waiter, fd, timer);
        waiter->unable = !waiter->started;
        atomic_store(&waiter->due, true);
    }
    if (waiter->started && atomic_load(&waiter->due)) {
        atomic_store(&waiter->due, false);
        eventfd_write(waiter->wake, 1);
    }
}

/* A kick is delivered in here at the latest: it interrupts nothing later. */
static void
leave_recv(struct waiter *waiter)
{
    int place = IN_RECV;

    while (!atomic_compare_exchange_strong(&waiter->place, &place, AWAY)) {
        place = IN_RECV;
        sched_yield();
    }
    if (atomic_load(&waiter->due)) {
        sched_yield(); /* as any system call that does not wait */
    }
}

int
waiter_recv(struct waiter *waiter, int sock)
{
    int found = 0;
    char byte;

    if (!waiter->started || !waiter->kickable) {
        return -1;
    }

    atomic_store(&waiter->place, IN_RECV);
    if (!atomic_load(&waiter->due)) {
        if (recv(sock, &byte, sizeof(byte), MSG_PEEK) >= 0) {
            found = 1;
        } else if (errno != EINTR) {
            found = -1; /* O_NONBLOCK, or an error that poll() shows */
        }
    }
    leave_recv(waiter);
    return found;
}
