/*
 * How a target says that something does not hold, and that nothing is left open.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#ifndef CHECK_H
#define CHECK_H

/* Says so and ends the process, which the fuzzer takes for a crash. */
void fault(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* Between these two, as many descriptors are closed as were opened. */
void descriptors_before(void);
void descriptors_after(void);

#endif
