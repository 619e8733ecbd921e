/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* The wait in recv() ends for everything; its signal ends nothing else. */

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "common.h"
#include "waiter.h"

#define ROUNDS 20000

struct ends {
    int client;
    int server;
    int event;
    int seen; /* eventfd: the server has read `event` */
    int timer;
    struct waiter *waiter;
};

/* What becomes due when the look whether anything is has been. */
static struct ends *late;

/* Instead of libc's. */
ssize_t
recv(int sock, void *buf, size_t len, int flags)
{
    struct timespec long_time = { .tv_sec = 60 };

    if (late != NULL) {
        assert_int_equal(eventfd_write(late->event, 1), 0);
        late = NULL;
        /* The signal comes here, too early for recv(). */
        assert_int_equal(nanosleep(&long_time, NULL), -1);
    }
    return recvfrom(sock, buf, len, flags, NULL, NULL);
}

static int
setup(void **state)
{
    static struct ends ends;
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0) {
        return -1;
    }
    ends.client = pair[0];
    ends.server = pair[1];
    ends.event = eventfd(0, EFD_NONBLOCK);
    ends.seen = eventfd(0, 0);
    ends.timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    ends.waiter = waiter_create();
    *state = &ends;
    /* Against hanging. */
    alarm(120);
    return ends.event < 0 || ends.seen < 0 || ends.timer < 0 ||
           ends.waiter == NULL;
}

static int
teardown(void **state)
{
    struct ends *ends = *state;

    waiter_destroy(ends->waiter);
    close(ends->client);
    close(ends->server);
    close(ends->event);
    close(ends->seen);
    close(ends->timer);
    alarm(0);
    return 0;
}

static void *
ask(void *argument)
{
    struct ends *ends = argument;
    char byte = 'x';
    int i;

    for (i = 0; i < ROUNDS; i++) {
        if (write(ends->client, &byte, 1) != 1 ||
            read(ends->client, &byte, 1) != 1) {
            break;
        }
    }
    return NULL;
}

static void *
disturb(void *argument)
{
    struct ends *ends = argument;
    eventfd_t seen;
    int i;

    for (i = 0; i < ROUNDS; i++) {
        if (eventfd_write(ends->event, 1) < 0 ||
            eventfd_read(ends->seen, &seen) < 0) {
            break;
        }
    }
    return NULL;
}

/* Each side waits until it was served, so that one lost wake-up hangs it. */
static void
serve(struct ends *ends, bool busy)
{
    struct timespec moment = { .tv_nsec = 1000 };
    int asked = busy ? 0 : ROUNDS, disturbed = 0, interrupted = 0;
    pthread_t threads[2];
    eventfd_t event;
    char byte;

    assert_int_equal(pthread_create(&threads[0], NULL, disturb, ends), 0);
    if (busy) {
        assert_int_equal(pthread_create(&threads[1], NULL, ask, ends), 0);
    }

    while (asked < ROUNDS || disturbed < ROUNDS) {
        waiter_arm(ends->waiter, ends->event, ends->timer);
        switch (waiter_recv(ends->waiter, ends->server)) {
        case 1:
            assert_int_equal(read(ends->server, &byte, 1), 1);
            assert_int_equal(write(ends->server, &byte, 1), 1);
            asked++;
            break;
        case 0:
            break;
        default:
            fail();
        }
        /* A hook, with a system call that waits. */
        interrupted += nanosleep(&moment, NULL) != 0;
        if (eventfd_read(ends->event, &event) == 0) {
            assert_int_equal(event, 1);
            disturbed++;
            assert_int_equal(eventfd_write(ends->seen, 1), 0);
        }
    }

    assert_int_equal(pthread_join(threads[0], NULL), 0);
    if (busy) {
        assert_int_equal(pthread_join(threads[1], NULL), 0);
    }
    assert_int_equal(interrupted, 0);
}

static void
test_nothing_is_lost_beside_a_busy_client(void **state)
{
    serve(*state, true);
}

/* Whose next request does not make up for a signal that is lost. */
static void
test_nothing_is_lost_beside_an_idle_client(void **state)
{
    serve(*state, false);
}

/* Whether the wait ends for an event after the look at what is due. */
static bool
ends_for_event(struct ends *ends)
{
    eventfd_t event;

    late = ends;
    return waiter_recv(ends->waiter, ends->server) == 0 && late == NULL &&
           eventfd_read(ends->event, &event) == 0;
}

static void
test_a_signal_before_recv_is_followed_by_another(void **state)
{
    struct ends *ends = *state;

    waiter_arm(ends->waiter, ends->event, ends->timer);
    assert_true(ends_for_event(ends));
}

/* As by a hook, after it had a handler of its own. */
static void
test_a_signal_that_is_given_up_is_taken_again(void **state)
{
    struct ends *ends = *state;

    waiter_arm(ends->waiter, ends->event, ends->timer);
    signal(SIGURG, SIG_DFL);
    assert_true(ends_for_event(ends));
}

static void *
wait_elsewhere(void *argument)
{
    struct ends *ends = argument;

    waiter_arm(ends->waiter, ends->seen, ends->event);
    return ends_for_event(ends) ? ends : NULL;
}

static void
test_it_follows_to_other_files_and_another_thread(void **state)
{
    struct ends *ends = *state;
    pthread_t thread;
    void *ended;

    waiter_arm(ends->waiter, ends->seen, ends->timer);
    waiter_arm(ends->waiter, ends->event, ends->timer);
    assert_true(ends_for_event(ends));

    waiter_arm(ends->waiter, ends->seen, ends->timer);
    waiter_arm(ends->waiter, ends->seen, ends->event);
    assert_true(ends_for_event(ends));

    assert_int_equal(pthread_create(&thread, NULL, wait_elsewhere, ends), 0);
    assert_int_equal(pthread_join(thread, &ended), 0);
    assert_ptr_equal(ended, ends);
}

/* Whoever closes a file has closed it, whatever was open when the thread began. */
static void
test_it_keeps_no_other_file_open(void **state)
{
    struct ends *ends = *state;
    struct pollfd poll_fd = { .events = POLLIN };
    int before[2], after[2];
    int high;

    /* Below what is watched and above it. */
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, before), 0);
    high = fcntl(ends->event, F_DUPFD, 200);
    assert_true(high >= 200);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, after), 0);
    assert_true(dup2(after[0], 300) == 300);
    close(after[0]);
    after[0] = 300;

    waiter_arm(ends->waiter, high, ends->timer);
    close(before[0]);
    close(after[0]);
    poll_fd.fd = before[1];
    assert_int_equal(poll(&poll_fd, 1, -1), 1);
    assert_int_equal(recv(before[1], &(char){ 0 }, 1, 0), 0);
    poll_fd.fd = after[1];
    assert_int_equal(poll(&poll_fd, 1, -1), 1);
    assert_int_equal(recv(after[1], &(char){ 0 }, 1, 0), 0);

    /* And what is watched is. */
    assert_int_equal(eventfd_write(ends->event, 1), 0);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), 0);
    close(before[1]);
    close(after[1]);
    waiter_destroy(ends->waiter);
    ends->waiter = NULL;
    close(high);
}

static void
test_a_timer_ends_it_and_so_does_the_client(void **state)
{
    struct ends *ends = *state;
    struct itimerspec soon = { .it_value.tv_nsec = 1000000 }, never = { 0 };

    assert_int_equal(timerfd_settime(ends->timer, 0, &soon, NULL), 0);
    waiter_arm(ends->waiter, -1, ends->timer);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), 0);
    /* It is due until the next turn. */
    assert_int_equal(waiter_recv(ends->waiter, ends->server), 0);

    assert_int_equal(timerfd_settime(ends->timer, 0, &never, NULL), 0);
    assert_int_equal(shutdown(ends->client, SHUT_WR), 0);
    waiter_arm(ends->waiter, -1, ends->timer);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), 1);
}

static void
own(int number UNUSED)
{
}

static void
test_the_program_keeps_its_signal(void **state)
{
    struct ends *ends = *state;
    struct sigaction there;
    sigset_t urgent;

    assert_int_equal(write(ends->client, "x", 1), 1);
    waiter_arm(ends->waiter, ends->event, ends->timer);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), 1);

    signal(SIGURG, own);
    waiter_arm(ends->waiter, ends->event, ends->timer);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), -1);
    assert_int_equal(sigaction(SIGURG, NULL, &there), 0);
    assert_true(there.sa_handler == own);

    signal(SIGURG, SIG_DFL);
    sigemptyset(&urgent);
    sigaddset(&urgent, SIGURG);
    pthread_sigmask(SIG_BLOCK, &urgent, NULL);
    waiter_arm(ends->waiter, ends->event, ends->timer);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), -1);

    pthread_sigmask(SIG_UNBLOCK, &urgent, NULL);
    waiter_arm(ends->waiter, ends->event, ends->timer);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), 1);
}

/* As where there may be no more threads. */
static void
test_without_a_thread_it_waits_for_nothing(void **state)
{
    struct ends *ends = *state;
    pthread_attr_t attr, before;

    assert_int_equal(write(ends->client, "x", 1), 1);

    assert_int_equal(pthread_getattr_default_np(&before), 0);
    assert_int_equal(pthread_getattr_default_np(&attr), 0);
    assert_int_equal(pthread_attr_setstacksize(&attr, SIZE_MAX / 2), 0);
    assert_int_equal(pthread_setattr_default_np(&attr), 0);
    waiter_arm(ends->waiter, ends->event, ends->timer);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), -1);

    /* It is not tried with each request. */
    assert_int_equal(pthread_setattr_default_np(&before), 0);
    waiter_arm(ends->waiter, ends->event, ends->timer);
    assert_int_equal(waiter_recv(ends->waiter, ends->server), -1);
    pthread_attr_destroy(&attr);
    pthread_attr_destroy(&before);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(
            test_nothing_is_lost_beside_a_busy_client, setup, teardown),
        cmocka_unit_test_setup_teardown(
            test_nothing_is_lost_beside_an_idle_client, setup, teardown),
        cmocka_unit_test_setup_teardown(
            test_a_signal_before_recv_is_followed_by_another, setup, teardown),
        cmocka_unit_test_setup_teardown(
            test_a_signal_that_is_given_up_is_taken_again, setup, teardown),
        cmocka_unit_test_setup_teardown(
            test_it_follows_to_other_files_and_another_thread, setup, teardown),
        cmocka_unit_test_setup_teardown(
            test_it_keeps_no_other_file_open, setup, teardown),
        cmocka_unit_test_setup_teardown(
            test_a_timer_ends_it_and_so_does_the_client, setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_program_keeps_its_signal,
                                        setup, teardown),
        cmocka_unit_test_setup_teardown(
            test_without_a_thread_it_waits_for_nothing, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
