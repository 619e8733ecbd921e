/*
 * The device's autonomous writer, and the check of what it wrote.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef WRITER_H
#define WRITER_H

#include "device.h"

void command_writer(const char *arguments);
void command_writer_check(const char *arguments);
void writer_forget(struct device *dev);

#endif
