/*
 * The PCI bus as the guest's kernel sees it.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef PCI_H
#define PCI_H

void command_lspci(const char *arguments);
void command_dmesg(const char *arguments);
void command_config(const char *arguments);
void command_release(const char *arguments);
void command_rescan(const char *arguments);
void command_reboot(const char *arguments);

#endif
