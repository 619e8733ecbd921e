/*
 * The library closes its own descriptors by the symbol that it interposes; here that has another name.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef INSTEAD_H
#define INSTEAD_H

int fuzz_close(int fd);

#endif
