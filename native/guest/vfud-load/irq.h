/*
 * Interrupts: ask the module for them, count them, raise and mask them.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef IRQ_H
#define IRQ_H

void command_irq(const char *arguments);
void command_irqs(const char *arguments);
void command_irq_raise(const char *arguments);
void command_irq_mask(const char *arguments);

#endif
