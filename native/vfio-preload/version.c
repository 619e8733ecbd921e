/*
 * The version exchange: a little JSON, from a server that may send anything.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "wire.h"

const char version_proposal[] = "{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,"
                                "\"migration\":{\"pgsize\":4096},\"migration_precopy_info\":true,"
                                "\"migration_data_window\":3145728}}";

#define MAX_DEPTH 16

/* The text is NUL-terminated, so that looking at the next byte is always allowed. */
struct parser {
    const char *at;
    struct wire_limits *limits;
    const char *why;
};

static bool fail(struct parser *p, const char *why)
{
    p->why = why;
    return false;
}

static char next(struct parser *p)
{
    while (*p->at == ' ' || *p->at == '\t' || *p->at == '\n' || *p->at == '\r') {
        p->at++;
    }
    return *p->at;
}

static bool take(struct parser *p, char wanted)
{
    if (next(p) != wanted) {
        return false;
    }
    p->at++;
    return true;
}

/* `key` gets the string as it is written, cut to its room: names that matter have no escapes and fit. */
static bool string(struct parser *p, char *key, size_t room)
{
    size_t length = 0;

    if (!take(p, '"')) {
        return fail(p, "no string where one belongs");
    }
    for (; *p->at != '"'; p->at++) {
        if (*p->at == '\0' || (*p->at == '\\' && *++p->at == '\0')) {
            return fail(p, "a string without an end");
        }
        if (length + 1 < room) {
            key[length++] = *p->at;
        }
    }
    p->at++;
    if (room > 0) {
        key[length] = '\0';
    }
    return true;
}

static bool limit(struct parser *p, size_t *value)
{
    char *end;
    unsigned long long number;

    if (!isdigit((unsigned char)next(p))) {
        return fail(p, "a limit that is no number");
    }
    errno = 0;
    number = strtoull(p->at, &end, 10);
    if (errno != 0 || number == 0 || *end == '.' || *end == 'e' || *end == 'E') {
        return fail(p, "a limit that is no positive integer");
    }
    p->at = end;
    *value = (size_t)number;
    return true;
}

static bool value(struct parser *p, int depth, const char *inside);

static bool object(struct parser *p, int depth, const char *inside)
{
    bool capabilities = depth == 1 && strcmp(inside, "capabilities") == 0;
    char key[32];

    p->at++;
    if (take(p, '}')) {
        return true;
    }
    do {
        if (!string(p, key, sizeof(key))) {
            return false;
        }
        if (!take(p, ':')) {
            return fail(p, "a name without a value");
        }
        if (capabilities && strcmp(key, "max_data_xfer_size") == 0) {
            if (!limit(p, &p->limits->max_xfer)) {
                return false;
            }
        } else if (capabilities && strcmp(key, "max_msg_fds") == 0) {
            if (!limit(p, &p->limits->max_fds)) {
                return false;
            }
        } else if (capabilities && strcmp(key, "migration_data_window") == 0) {
            if (!limit(p, &p->limits->max_window)) {
                return false;
            }
        } else if (!value(p, depth + 1, key)) {
            return false;
        }
    } while (take(p, ','));
    return take(p, '}') || fail(p, "an object without an end");
}

static bool value(struct parser *p, int depth, const char *inside)
{
    static const char *const words[] = { "true", "false", "null" };

    if (depth > MAX_DEPTH) {
        return fail(p, "too many levels");
    }
    switch (next(p)) {
    case '{':
        return object(p, depth, inside);
    case '"':
        return string(p, NULL, 0);
    case '[':
        p->at++;
        if (take(p, ']')) {
            return true;
        }
        do {
            if (!value(p, depth + 1, "")) {
                return false;
            }
        } while (take(p, ','));
        return take(p, ']') || fail(p, "a list without an end");
    }
    for (size_t i = 0; i < ARRAY_SIZE(words); i++) {
        if (strncmp(p->at, words[i], strlen(words[i])) == 0) {
            p->at += strlen(words[i]);
            return true;
        }
    }
    if (*p->at != '-' && !isdigit((unsigned char)*p->at)) {
        return fail(p, "something that is no value");
    }
    p->at += strspn(p->at, "+-.0123456789eE");
    return true;
}

int version_parse(const char *data, size_t size, struct wire_limits *limits, const char **why)
{
    struct parser p = { data, limits, NULL };
    struct vfio_user_version version;

    limits->max_xfer = WIRE_XFER_BYTES; /* these two are the specification's defaults */
    limits->max_fds = 1;
    limits->max_window = 0;
    if (size < sizeof(version)) {
        *why = "no version";
        return -EPROTO;
    }
    memcpy(&version, data, sizeof(version));
    if (version.major != 0) {
        *why = "another major version than 0";
        return -EPROTO;
    }
    if (size == sizeof(version)) {
        return 0; /* the version data is optional */
    }
    if (data[size - 1] != '\0') {
        *why = "version data without its final NUL";
        return -EPROTO;
    }
    p.at = data + sizeof(version);
    if (next(&p) != '{') {
        fail(&p, "version data that is no object");
    } else if (value(&p, 0, "") && next(&p) != '\0') {
        fail(&p, "something behind the version data");
    }
    limits->max_xfer = MIN(limits->max_xfer, WIRE_XFER_BYTES);
    limits->max_fds = MIN(limits->max_fds, WIRE_MAX_FDS);
    limits->max_window = MIN(limits->max_window, WIRE_WINDOW_BYTES);
    *why = p.why;
    return p.why == NULL ? 0 : -EPROTO;
}
