/*
 * The arguments of a command: KEY=VALUE words, judged before the command sees them.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef ARGUMENTS_H
#define ARGUMENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * False, with a text for people in `problem`, unless `arguments` are words of `keys`, each at most once. `keys` has
 * spaces between them, and behind a key what it takes: "#" a whole number or a size (4096, 64K, 1.5M, 0x100), "."
 * a number, "=one|other" one of these words, nothing: any text.
 */
bool judge_arguments(const char *arguments, const char *keys, char *problem, size_t size);

/* Whether one of `keys` (as above) is among `arguments`. */
bool has_any(const char *arguments, const char *keys);

/* A whole number or a size, with binary multiples, that ends at a space or the end. False: it is none. */
bool parse_size(const char *text, uint64_t *value);

/* The same, or a part of one (2.5, 0.001M), as numerator / denominator; *pages: it ends with a p (2000p). */
bool parse_amount(const char *text, uint64_t *numerator, uint64_t *denominator, bool *pages);

/* The text after "key=" in `arguments`, or NULL. It ends at a space or the end. */
const char *option(const char *arguments, const char *key);
bool option_is(const char *arguments, const char *key, const char *word);
double number(const char *arguments, const char *key, double fallback);
uint64_t integer(const char *arguments, const char *key, uint64_t fallback);

#endif
