/*
 * The check: device memory against the journal.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef VERIFY_H
#define VERIFY_H

void command_verify(const char *arguments);

#endif
