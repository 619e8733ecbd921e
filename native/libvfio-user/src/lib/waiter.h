/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef LIB_VFIO_USER_WAITER_H
#define LIB_VFIO_USER_WAITER_H

/*
 * Waits for a client's next message in recv(), and for everything else in a
 * thread of its own, which interrupts recv() with SIGURG.
 *
 * poll() in front of recv() makes each request 3 us slower, more than all else
 * that a request costs beyond its two system calls.
 *
 * No signal is lost, and none goes astray. The thread notes that something is
 * due before it looks whether the other one waits, and that one says that it
 * waits before it looks whether something is due: one of them sees the other.
 * A signal between that look and recv() interrupts nothing, so the thread sends
 * another one each millisecond. It sends them only to a thread that waits, and
 * that thread does not go on while one is being sent.
 */
struct waiter;

/* Returns NULL with errno set. The thread begins with waiter_arm(). */
struct waiter *
waiter_create(void);

void
waiter_destroy(struct waiter *waiter);

/*
 * Watch @fd (or -1) and @timer from now on, on behalf of the calling thread.
 * Each number must stay the same file's, and the thread has these files open
 * until it watches others, or ends. If that is not possible, waiter_recv()
 * says so: there can be no thread, or the program handles SIGURG itself, or has
 * blocked it.
 */
void
waiter_arm(struct waiter *waiter, int fd, int timer);

/*
 * Wait until @sock has something to receive, or is at its end.
 *
 * Returns 1 then, 0 if something else was readable first or a signal came, or
 * -1 if this cannot be waited for here.
 */
int
waiter_recv(struct waiter *waiter, int sock);

#endif /* LIB_VFIO_USER_WAITER_H */
