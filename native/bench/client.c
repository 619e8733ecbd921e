/*
 * A vfio-user client that does nothing but time requests, for `vfu-dev bench`.
 *
 * Usage: vfu-bench-client SOCKET [PLACES]
 *
 * With PLACES migration data is in a window: PLACES requests are under way at a time,
 * each for 4 MiB of it, which no limit on messages forbids. Without, the data is in
 * messages of 1 MiB, as QEMU's are, one after the other.
 *
 * It connects, then takes one command a line from its standard input. The answer to
 * each is a line with a number N, and N 64-bit integers after it, in the machine's own
 * byte order. An error ends the program, with a line on its standard error.
 *
 *   read COUNT ACCESS          nanoseconds of each of COUNT reads
 *   write COUNT ACCESS         the same of writes
 *   post COUNT ACCESS          nanoseconds of COUNT writes without a reply and one
 *                              read, all together
 *   behind ACCESS              nanoseconds from a MIG_DATA_READ, with a write right
 *                              behind it, to the reply to the write
 *   during DELAY ACCESS        the same with a write DELAY nanoseconds later, from the
 *                              write on
 *   state STATE                nothing
 *   drain [FILE]               bytes of all migration data that is there now, and
 *                              nanoseconds
 *   feed FILE                  the same of handing it over, from RESUMING to STOP
 *
 * ACCESS is INDEX OFFSET BYTES STRIDE PLACES: up to 8 bytes of a region, in PLACES
 * places, a power of two, STRIDE bytes apart, in an order that no prefetcher knows.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#include <err.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "answer.h"
#include "attach.h"
#include "migration.h"
#include "mmio.h"

/* Takes COUNT off the start of a command's arguments. */
static uint32_t
parse_count(char **text)
{
    unsigned long count = strtoul(*text, text, 0);

    if (count == 0 || count > UINT32_MAX) {
        errx(EXIT_FAILURE, "COUNT: a number above 0");
    }
    return count;
}

static void
serve(const char *name, char *rest)
{
    struct places places;
    uint32_t count = 0;

    if (strcmp(name, "state") == 0) {
        set_state(strtoul(rest, NULL, 0));
        answer(NULL, 0);
        return;
    } else if (strcmp(name, "drain") == 0) {
        drain(rest);
        return;
    } else if (strcmp(name, "feed") == 0) {
        feed(rest);
        return;
    }

    if (strcmp(name, "behind") != 0) {
        count = parse_count(&rest); /* of "during": nanoseconds */
    }
    places = parse_places(rest);
    if (strcmp(name, "read") == 0) {
        time_calls(&places, count, false);
    } else if (strcmp(name, "write") == 0) {
        time_calls(&places, count, true);
    } else if (strcmp(name, "post") == 0) {
        time_posted(&places, count);
    } else if (strcmp(name, "behind") == 0) {
        time_behind(&places, -1);
    } else if (strcmp(name, "during") == 0) {
        time_behind(&places, count);
    } else {
        errx(EXIT_FAILURE, "no such command: %s", name);
    }
}

int
main(int argc, char *argv[])
{
    unsigned long places = 0;
    char line[4096];

    if (argc == 3) {
        places = strtoul(argv[2], NULL, 0);
    }
    if (argc < 2 || argc > 3 || (argc == 3 && places == 0) || places > 16) {
        fprintf(stderr, "Usage: %s SOCKET [PLACES]\n", argv[0]);
        return EXIT_FAILURE;
    }
    attach(argv[1], places);
    answer(NULL, 0);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        char *rest;

        line[strcspn(line, "\n")] = '\0';
        rest = line + strcspn(line, " ");
        if (*rest != '\0') {
            *rest++ = '\0';
        }
        serve(line, rest);
    }
    return EXIT_SUCCESS;
}
