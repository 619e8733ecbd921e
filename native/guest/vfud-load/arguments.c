/*
 * The arguments of a command, and amounts as people write them.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "arguments.h"

#define MAX_DECIMALS 9
#define WORD_END " "
/* What ends the name of a key in a list of keys. */
#define KEY_END " #.="

typedef unsigned __int128 wide;

static bool ended(const char *text)
{
    return *text == '\0' || *text == ' ';
}

bool parse_amount(const char *text, uint64_t *numerator, uint64_t *denominator, bool *pages)
{
    static const char units[] = "KMGT";
    wide value = 0, scale = 1;
    const char *unit, *start = text;

    *pages = false;
    if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X') && isxdigit((unsigned char)text[2])) {
        char *end;

        *numerator = strtoull(text, &end, 16);
        *denominator = 1;
        return ended(end) && end - text <= 18;
    }
    for (; isdigit((unsigned char)*text) && value <= UINT64_MAX; text++)
        value = value * 10 + (wide)(*text - '0');
    if (text == start)
        return false;
    if (*text == '.') {
        start = ++text;
        for (; isdigit((unsigned char)*text) && value <= UINT64_MAX; text++) {
            value = value * 10 + (wide)(*text - '0');
            scale *= 10;
        }
        if (text == start || text - start > MAX_DECIMALS)
            return false;
    }
    unit = *text ? strchr(units, toupper((unsigned char)*text)) : NULL;
    if (unit) {
        value <<= 10 * (unit - units + 1);
        text++;
    }
    if (*text == 'p' && !unit) {
        *pages = true;
        text++;
    } else if (!strncasecmp(text, "iB", 2)) {
        text += 2;
    } else if (*text == 'b' || *text == 'B') {
        text++;
    }
    if (!strncasecmp(text, "/s", 2))
        text += 2;
    *numerator = (uint64_t)value;
    *denominator = (uint64_t)scale;
    return ended(text) && value <= UINT64_MAX;
}

bool parse_size(const char *text, uint64_t *value)
{
    uint64_t denominator;
    bool pages;

    if (!parse_amount(text, value, &denominator, &pages) || pages || *value % denominator)
        return false;
    *value /= denominator;
    return true;
}

static bool is_number(const char *text)
{
    char *end;

    strtod(text, &end);
    return end != text && !isspace((unsigned char)*text) && ended(end);
}

/* Whether the value at `text` is one of the words "one|other" at `words`. */
static bool is_one_of(const char *text, const char *words)
{
    size_t length = strcspn(text, WORD_END);

    for (;;) {
        size_t word = strcspn(words, "| ");

        if (word == length && !strncmp(text, words, length))
            return true;
        if (words[word] != '|')
            return false;
        words += word + 1;
    }
}

/* The place in `keys` of the key that begins at `word` and is `length` long; NULL: it is not there. */
static const char *find_key(const char *keys, const char *word, size_t length)
{
    for (const char *key = keys; *key;) {
        if (strcspn(key, KEY_END) == length && !strncmp(key, word, length))
            return key;
        key += strcspn(key, " ");
        key += strspn(key, " ");
    }
    return NULL;
}

/* The names of `keys`, for people: "via, offset, bytes". */
static void list_keys(const char *keys, char *text, size_t size)
{
    size_t used = 0;

    text[0] = '\0';
    while (*keys && used < size) {
        int length = snprintf(text + used, size - used, "%s%.*s", used ? ", " : "", (int)strcspn(keys, KEY_END), keys);

        used += length > 0 ? (size_t)length : size;
        keys += strcspn(keys, " ");
        keys += strspn(keys, " ");
    }
}

/* What goes into a message, which is JSON: no quotes, no control characters. */
static int shown(const char *word, size_t length)
{
    size_t good = 0;

    while (good < length && good < 40 && isprint((unsigned char)word[good]) && word[good] != '"' && word[good] != '\\')
        good++;
    return (int)good;
}

bool judge_arguments(const char *arguments, const char *keys, char *problem, size_t size)
{
    for (const char *word = arguments + strspn(arguments, " "); *word; word += strspn(word, " ")) {
        size_t length = strcspn(word, WORD_END), name = strcspn(word, "= ");
        const char *key = word[name] == '=' ? find_key(keys, word, name) : NULL, *value = word + name + 1, *kind;
        char there[512];
        uint64_t ignored;

        if (!key) {
            list_keys(keys, there, sizeof(there));
            snprintf(problem, size, "%.*s: expected KEY=VALUE, and of keys %s%s", shown(word, length), word,
                     *keys ? "one of " : "none", there);
            return false;
        }
        kind = key + name;
        for (const char *more = word + length + strspn(word + length, " "); *more; more += strspn(more, " ")) {
            if (!strncmp(more, word, name + 1)) {
                snprintf(problem, size, "%.*s: given twice", (int)name, word);
                return false;
            }
            more += strcspn(more, WORD_END);
        }
        if (*kind == '#' && !parse_size(value, &ignored)) {
            snprintf(problem, size, "%.*s: expected a whole number or a size (4096, 64K, 1.5M)", (int)name, word);
            return false;
        }
        if (*kind == '.' && !is_number(value)) {
            snprintf(problem, size, "%.*s: expected a number", (int)name, word);
            return false;
        }
        if (*kind == '=' && !is_one_of(value, kind + 1)) {
            snprintf(problem, size, "%.*s: expected %.*s", (int)name, word, (int)strcspn(kind + 1, " "), kind + 1);
            return false;
        }
        word += length;
    }
    return true;
}

bool has_any(const char *arguments, const char *keys)
{
    for (const char *word = arguments + strspn(arguments, " "); *word; word += strspn(word, " ")) {
        if (find_key(keys, word, strcspn(word, "= ")))
            return true;
        word += strcspn(word, WORD_END);
    }
    return false;
}

const char *option(const char *arguments, const char *key)
{
    size_t length = strlen(key);

    for (const char *at = arguments; at && *at; at = strchr(at, ' ')) {
        while (*at == ' ')
            at++;
        if (!strncmp(at, key, length) && at[length] == '=')
            return at + length + 1;
    }
    return NULL;
}

bool option_is(const char *arguments, const char *key, const char *word)
{
    const char *text = option(arguments, key);
    size_t length = strlen(word);

    return text && !strncmp(text, word, length) && (text[length] == ' ' || text[length] == '\0');
}

double number(const char *arguments, const char *key, double fallback)
{
    const char *text = option(arguments, key);

    return text ? strtod(text, NULL) : fallback;
}

uint64_t integer(const char *arguments, const char *key, uint64_t fallback)
{
    const char *text = option(arguments, key);
    uint64_t value;

    return text && parse_size(text, &value) ? value : fallback;
}
