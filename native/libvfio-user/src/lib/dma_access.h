/*
 * Copyright (c) 2026 The vfu-dev authors.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef LIB_VFIO_USER_DMA_ACCESS_H
#define LIB_VFIO_USER_DMA_ACCESS_H

#include <stddef.h>

/*
 * Have accesses to memory that is not there any more fail, where they are made
 * by guarded_copy(). Other causes of SIGBUS go to who handled it before.
 *
 * Returns 0 on success, or -1 with errno set. Once is enough for a process, as
 * long as nobody takes the signal over.
 */
int
dma_access_init(void);

/*
 * Copy @len bytes from or to a mapping of a file that somebody else may shorten.
 *
 * Returns 0 on success, or -1 with errno set to EFAULT: a part of it is not
 * there, and any part may have been copied.
 */
int
guarded_copy(void *dst, const void *src, size_t len);

#endif /* LIB_VFIO_USER_DMA_ACCESS_H */
