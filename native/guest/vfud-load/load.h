/*
 * The load: writes to the memory of every device, as a program of patterns says.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef LOAD_H
#define LOAD_H

#include <stdbool.h>
#include <stdint.h>

void command_program(const char *arguments);
void command_start(const char *arguments);
void command_stop(const char *arguments);
void command_status(const char *arguments);
bool load_running(void);
void load_settle(void); /* wait for DMA under way */
uint64_t run_load(void); /* do the writes that are due; nanoseconds until the next one is */

#endif
