/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

/*
 * Access to the client's memory that the client cannot turn into our death.
 *
 * A mapping of a file that was shortened raises SIGBUS where it is touched. No
 * check beforehand helps, as the client can shorten it a moment later; reading
 * the file instead would cost a system call for every access. So the copy itself
 * is what is guarded: it costs a sigsetjmp() that saves no signal mask.
 */

#include <assert.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

#include "dma.h"
#include "dma_access.h"
#include "libvfio-user.h"
#include "private.h"

/* Where the copy goes on that this thread is at, or NULL. */
static __thread sigjmp_buf *volatile guard
    __attribute__((tls_model("initial-exec")));
static struct sigaction before;

static void
forward(int sig, siginfo_t *info, void *context)
{
    if ((before.sa_flags & SA_SIGINFO) != 0) {
        before.sa_sigaction(sig, info, context);
    } else if (before.sa_handler == SIG_DFL) {
        /* It comes again as soon as this handler returns, if not sent by kill(). */
        sigaction(sig, &before, NULL);
        if (info->si_code <= 0) {
            raise(sig);
        }
    } else if (before.sa_handler != SIG_IGN) {
        before.sa_handler(sig);
    }
}

static void
on_sigbus(int sig, siginfo_t *info, void *context)
{
    if (guard != NULL && info->si_code > 0) {
        siglongjmp(*guard, 1);
    }
    forward(sig, info, context);
}

int
dma_access_init(void)
{
    struct sigaction action = {
        .sa_sigaction = on_sigbus,
        /* A jump out of the handler must not leave the signal blocked. */
        .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK,
    };
    struct sigaction now;

    if (sigaction(SIGBUS, NULL, &now) < 0) {
        return -1;
    }
    if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_sigbus) {
        return 0;
    }

    sigemptyset(&action.sa_mask);
    before = now;
    return sigaction(SIGBUS, &action, NULL);
}

int
guarded_copy(void *dst, const void *src, size_t len)
{
    sigjmp_buf env;

    assert(guard == NULL);

    if (sigsetjmp(env, 0) != 0) {
        guard = NULL;
        return ERROR_INT(EFAULT);
    }

    guard = &env;
    atomic_signal_fence(memory_order_seq_cst);
    memcpy(dst, src, len);
    atomic_signal_fence(memory_order_seq_cst);
    guard = NULL;
    return 0;
}

EXPORT int
vfu_dma_access(vfu_ctx_t *vfu_ctx, vfu_dma_addr_t dma_addr, void *data,
               size_t len, int flags)
{
    bool is_write = (flags & VFU_DMA_WRITE) != 0;
    dma_memory_region_t *region;
    dma_sg_t sg;
    void *guest;
    int ret;

    if ((flags & ~(VFU_DMA_WRITE | VFU_DMA_UNLOGGED)) != 0 || len == 0) {
        return ERROR_INT(EINVAL);
    }

    ret = vfu_addr_to_sgl(vfu_ctx, dma_addr, len, &sg, 1,
                          is_write ? PROT_WRITE : PROT_READ);
    if (ret != 1) {
        /* Several regions are several accesses. */
        return ret < -1 ? ERROR_INT(E2BIG) : -1;
    }

    region = &vfu_ctx->dma->regions[sg.region];
    if (region->info.vaddr == NULL) {
        return is_write ? vfu_sgl_write(vfu_ctx, &sg, 1, data)
                        : vfu_sgl_read(vfu_ctx, &sg, 1, data);
    }

    guest = region->info.vaddr + sg.offset;
    if (!is_write) {
        return guarded_copy(data, guest, len);
    }

    ret = guarded_copy(guest, data, len);
    /* What failed half way has written half. */
    if ((flags & VFU_DMA_UNLOGGED) == 0) {
        int saved_errno = errno;

        dma_sgl_mark_dirty(vfu_ctx->dma, &sg, 1);
        errno = saved_errno;
    }
    return ret;
}

/* ex: set tabstop=4 shiftwidth=4 softtabstop=4 expandtab: */
