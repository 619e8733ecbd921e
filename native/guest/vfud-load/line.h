/*
 * The command line: a serial port that carries one command a line in, one JSON object a line out.
 * What every command needs: a reply or a refusal, the time.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef LINE_H
#define LINE_H

#include <stdbool.h>
#include <stdint.h>

#define NS_PER_SECOND 1000000000ull

/* Open the serial port and return its descriptor, for poll() and read(). */
int open_line(const char *path);

void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* One JSON line to the lab; in pieces, the last of which is ended by reply_end(). */
void reply(const char *format, ...) __attribute__((format(printf, 1, 2)));
void reply_part(const char *format, ...) __attribute__((format(printf, 1, 2)));
void reply_end(void);
/* {"reply":command,"ok":false,"error":...} */
void refuse(const char *command, const char *format, ...) __attribute__((format(printf, 2, 3)));

uint64_t now_ns(void);

#endif
