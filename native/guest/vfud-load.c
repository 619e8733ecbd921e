/*
 * vfud-load: write a known pattern to every vfu-dev device in this guest and remember what was written.
 *
 * The lab starts this program from the guest's init and talks to it over a serial port: one command a line
 * ("start rate=512 pattern=uniform"), one JSON object a line back. While it is writing, the VM may be moved
 * to another host; the journal (what the device's memory must hold) lives in guest RAM and moves with it, so
 * "verify" on the other side compares the device with what the guest knows, not with what a server claims.
 *
 * Registers, identifiers and the FILL pattern are the reference device's (vfu_dev/device).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define SYSFS_PCI "/sys/bus/pci/devices"
#define VENDOR_ID 0x4656
#define DEVICE_ID 0x4455

#define REG_ID 0x00
#define REG_VERSION 0x04
#define REG_MEMSIZE 0x08
#define REG_FILL 0x10
#define REG_GENERATION 0x28
#define REG_PAGE_SIZE 0x30
#define REG_SCRATCH 0x100
#define SCRATCH_WORDS 32

#define ID_VALUE 0x44554656u
#define BAR0_SIZE 4096
#define MAX_DEVICES 16

/* At most this many writes between two looks at the command line: about 10 ms of trapped accesses. */
#define BURST 256
/* Writes that a stall made late are made up for, up to this much time; the rest is counted as missed. */
#define MAX_BACKLOG_NS 250000000ull
#define GENERATION_POLL_NS 250000000ull
#define NS_PER_SECOND 1000000000ull

enum pattern { PATTERN_UNIFORM, PATTERN_SEQUENTIAL, PATTERN_HOTSET };

struct device {
    char address[NAME_MAX + 1];  /* 0000:00:03.0 */
    volatile uint8_t *registers; /* BAR0 */
    volatile uint64_t *memory;   /* BAR2, as the 64-bit words that the journal has */
    uint64_t *journal;           /* what memory must hold */
    uint64_t words;
    uint64_t page_words;
    uint64_t fill;
    uint64_t generation;
    uint64_t scratch_seed; /* 0: scratch was not written */
    uint64_t cursor;       /* sequential pattern: next page */
    uint64_t readback_checks;
    uint64_t readback_errors;
};

struct load {
    bool running;
    enum pattern pattern;
    double rate;         /* writes a second, per device; one write dirties one page */
    double hot_fraction; /* of the pages */
    double hot_share;    /* of the writes */
    uint64_t seed;
    uint64_t check_every; /* read one of so many writes back at once; 0: never */
    uint64_t tick_ns;     /* heartbeat on the command line; 0: none */
    uint64_t started_ns;
    uint64_t due_origin_ns; /* moved forward by what was missed */
    uint64_t sequence;      /* write rounds done (one write to each device) */
    uint64_t rounds;        /* since due_origin_ns */
    uint64_t missed;
    uint64_t last_tick_ns;
    uint64_t ticks;
    uint64_t busy_ns; /* time spent in the write itself */
    uint64_t max_access_ns;
    uint64_t max_gap_ns; /* longest pause between two bursts of a running load, on the guest's clock */
    uint64_t last_burst_ns;
    uint64_t stopped_ns;
};

static struct device devices[MAX_DEVICES];
static size_t device_count;
static struct load load;
static int line_fd = -1;
static uint64_t random_state;

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * NS_PER_SECOND + (uint64_t)ts.tv_nsec;
}

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014): the FILL pattern and our values are made of it. */
static uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

static uint64_t next_random(void)
{
    random_state += 0x9E3779B97F4A7C15ull;
    return mix(random_state);
}

static double next_fraction(void)
{
    return (double)(next_random() >> 11) * 0x1.0p-53;
}

static void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fprintf(stderr, "vfud-load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

/* One JSON line to the lab. Lines are short, so a blocking write of a whole line is fine. */
static void reply(const char *format, ...)
{
    static char line[8192];
    va_list arguments;
    size_t length, done = 0;
    int needed;

    va_start(arguments, format);
    needed = vsnprintf(line, sizeof(line) - 1, format, arguments);
    va_end(arguments);
    length = needed < 0 ? 0 : (size_t)needed;
    if (length > sizeof(line) - 2)
        length = sizeof(line) - 2;
    line[length++] = '\n';
    while (done < length) {
        ssize_t n = write(line_fd, line + done, length - done);

        if (n < 0 && errno != EINTR && errno != EAGAIN)
            die("writing to the command line: %s", strerror(errno));
        if (n > 0)
            done += (size_t)n;
    }
}

/* --- finding and mapping devices ----------------------------------------------------------------------- */

static unsigned long read_sysfs_number(const char *address, const char *name)
{
    char path[PATH_MAX], text[32] = "";
    FILE *file;

    snprintf(path, sizeof(path), SYSFS_PCI "/%s/%s", address, name);
    file = fopen(path, "r");
    if (!file)
        return ULONG_MAX;
    if (!fgets(text, sizeof(text), file))
        text[0] = '\0';
    fclose(file);
    return strtoul(text, NULL, 0);
}

static int write_sysfs(const char *address, const char *name, const char *text)
{
    char path[PATH_MAX];
    int fd, error = 0;

    snprintf(path, sizeof(path), SYSFS_PCI "/%s/%s", address, name);
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    if (write(fd, text, strlen(text)) < 0)
        error = errno;
    close(fd);
    return error;
}

static volatile void *map_bar(const char *address, int bar, uint64_t need)
{
    char path[PATH_MAX];
    struct stat info;
    void *base;
    int fd;

    snprintf(path, sizeof(path), SYSFS_PCI "/%s/resource%d", address, bar);
    fd = open(path, O_RDWR | O_SYNC | O_CLOEXEC);
    if (fd < 0)
        die("%s: %s", path, strerror(errno));
    if (fstat(fd, &info) < 0 || (uint64_t)info.st_size < need)
        die("%s: %lld bytes, %" PRIu64 " needed", path, (long long)info.st_size, need);
    base = mmap(NULL, (size_t)info.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        die("mapping %s: %s", path, strerror(errno));
    close(fd);
    return base;
}

static uint32_t read32(const struct device *dev, unsigned int offset)
{
    return *(volatile uint32_t *)(dev->registers + offset);
}

static uint64_t read64(const struct device *dev, unsigned int offset)
{
    return *(volatile uint64_t *)(dev->registers + offset);
}

static void write64(struct device *dev, unsigned int offset, uint64_t value)
{
    *(volatile uint64_t *)(dev->registers + offset) = value;
}

static uint64_t fill_word(uint64_t seed, uint64_t index)
{
    return seed ? mix(seed + (index + 1) * 0x9E3779B97F4A7C15ull) : 0;
}

static void open_device(struct device *dev, const char *address)
{
    uint64_t size, page_size;
    int error;

    snprintf(dev->address, sizeof(dev->address), "%s", address);
    error = write_sysfs(address, "enable", "1");
    if (error)
        die("enabling %s: %s", address, strerror(error));
    dev->registers = map_bar(address, 0, BAR0_SIZE);
    if (read32(dev, REG_ID) != ID_VALUE)
        die("%s: ID register is %#x, not %#x", address, read32(dev, REG_ID), ID_VALUE);
    if (read32(dev, REG_VERSION) != 1)
        die("%s: register layout %u, this program knows 1", address, read32(dev, REG_VERSION));
    size = read64(dev, REG_MEMSIZE);
    page_size = read32(dev, REG_PAGE_SIZE);
    if (page_size < 8 || page_size & (page_size - 1) || size < page_size || size % page_size)
        die("%s: memory of %" PRIu64 " bytes in pages of %" PRIu64, address, size, page_size);
    dev->memory = map_bar(address, 2, size);
    dev->words = size / 8;
    dev->page_words = page_size / 8;
    dev->fill = read64(dev, REG_FILL);
    dev->generation = read64(dev, REG_GENERATION);
    dev->journal = malloc(size);
    if (!dev->journal)
        die("%s: no RAM for a journal of %" PRIu64 " bytes", address, size);
    for (uint64_t i = 0; i < dev->words; i++)
        dev->journal[i] = fill_word(dev->fill, i);
    printf("vfud-load: %s: %" PRIu64 " bytes, pages of %" PRIu64 ", fill %" PRIu64 ", generation %" PRIu64 "\n",
           address, size, page_size, dev->fill, dev->generation);
}

static void find_devices(void)
{
    struct dirent **entries;
    int count = scandir(SYSFS_PCI, &entries, NULL, alphasort);

    if (count < 0)
        die(SYSFS_PCI ": %s", strerror(errno));
    for (int i = 0; i < count; i++) {
        const char *name = entries[i]->d_name;

        if (name[0] != '.' && device_count < MAX_DEVICES && read_sysfs_number(name, "vendor") == VENDOR_ID &&
            read_sysfs_number(name, "device") == DEVICE_ID)
            open_device(&devices[device_count++], name);
        free(entries[i]);
    }
    free(entries);
}

/* --- the load ------------------------------------------------------------------------------------------ */

static uint64_t choose_page(struct device *dev)
{
    uint64_t pages = dev->words / dev->page_words;
    uint64_t hot;

    switch (load.pattern) {
    case PATTERN_SEQUENTIAL:
        return dev->cursor++ % pages;
    case PATTERN_HOTSET:
        hot = (uint64_t)((double)pages * load.hot_fraction);
        if (hot < 1)
            hot = 1;
        if (hot < pages && next_fraction() >= load.hot_share)
            return hot + next_random() % (pages - hot);
        return next_random() % hot;
    case PATTERN_UNIFORM:
    default:
        return next_random() % pages;
    }
}

static void note_access(uint64_t start_ns)
{
    uint64_t took = now_ns() - start_ns;

    load.busy_ns += took;
    if (took > load.max_access_ns)
        load.max_access_ns = took;
}

static void write_once(struct device *dev)
{
    uint64_t word = choose_page(dev) * dev->page_words + next_random() % dev->page_words;
    uint64_t value = mix(load.seed + load.sequence) ^ word;
    uint64_t start = now_ns();

    dev->journal[word] = value;
    dev->memory[word] = value;
    note_access(start);
    if (load.check_every && load.sequence % load.check_every == 0) {
        start = now_ns();
        dev->readback_checks++;
        if (dev->memory[word] != value)
            dev->readback_errors++;
        note_access(start);
    }
}

/* Do the writes that are due; return the nanoseconds until the next one is. */
static uint64_t run_load(void)
{
    uint64_t now = now_ns(), period = (uint64_t)(1e9 / load.rate), due;

    if (load.last_burst_ns) {
        uint64_t gap = now - load.last_burst_ns;

        if (gap > load.max_gap_ns)
            load.max_gap_ns = gap;
    }
    load.last_burst_ns = now;
    due = (uint64_t)((double)(now - load.due_origin_ns) * load.rate / 1e9);
    if (due > load.rounds && (due - load.rounds) * period > MAX_BACKLOG_NS) {
        uint64_t missed = due - load.rounds - MAX_BACKLOG_NS / period;

        load.missed += missed;
        load.rounds += missed;
    }
    for (int i = 0; i < BURST && load.rounds < due; i++) {
        for (size_t d = 0; d < device_count; d++)
            write_once(&devices[d]);
        load.sequence++;
        load.rounds++;
    }
    if (load.tick_ns && now - load.last_tick_ns >= load.tick_ns) {
        load.last_tick_ns = now;
        reply("{\"event\":\"tick\",\"tick\":%" PRIu64 ",\"writes\":%" PRIu64 "}", ++load.ticks,
              load.sequence * device_count);
    }
    return load.rounds < due ? 0 : period;
}

static void poll_generations(void)
{
    for (size_t d = 0; d < device_count; d++) {
        struct device *dev = &devices[d];
        uint64_t generation = read64(dev, REG_GENERATION);

        if (generation == dev->generation)
            continue;
        printf("vfud-load: %s: generation %" PRIu64 " -> %" PRIu64 "\n", dev->address, dev->generation, generation);
        reply("{\"event\":\"generation\",\"device\":%zu,\"from\":%" PRIu64 ",\"to\":%" PRIu64 "}", d,
              dev->generation, generation);
        dev->generation = generation;
    }
}

/* --- commands ------------------------------------------------------------------------------------------ */

/* The text after "key=" in `arguments`, or NULL. Values have no spaces. */
static const char *option(const char *arguments, const char *key)
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

static double number(const char *arguments, const char *key, double fallback)
{
    const char *text = option(arguments, key);

    return text ? strtod(text, NULL) : fallback;
}

static bool starts_with(const char *text, const char *word)
{
    return text && !strncmp(text, word, strlen(word));
}

static void write_scratch(struct device *dev)
{
    dev->scratch_seed = mix(load.seed + 1) | 1;
    for (unsigned int i = 0; i < SCRATCH_WORDS; i++)
        write64(dev, REG_SCRATCH + i * 8, mix(dev->scratch_seed + i));
}

static unsigned int scratch_errors(const struct device *dev)
{
    unsigned int errors = 0;

    if (!dev->scratch_seed)
        return 0;
    for (unsigned int i = 0; i < SCRATCH_WORDS; i++)
        errors += read64(dev, REG_SCRATCH + i * 8) != mix(dev->scratch_seed + i);
    return errors;
}

static void command_start(const char *arguments)
{
    const char *pattern = option(arguments, "pattern");
    uint64_t sequence = load.sequence;
    double rate = number(arguments, "rate", 512);

    if (!(rate > 0) || rate > 1e6) {
        reply("{\"reply\":\"start\",\"ok\":false,\"error\":\"rate must be above 0, at most 1000000 writes/s\"}");
        return;
    }
    memset(&load, 0, sizeof(load));
    load.sequence = sequence;
    load.rate = rate;
    load.pattern = starts_with(pattern, "sequential") ? PATTERN_SEQUENTIAL
                   : starts_with(pattern, "hotset")   ? PATTERN_HOTSET
                                                      : PATTERN_UNIFORM;
    load.hot_fraction = number(arguments, "hot_fraction", 0.1);
    load.hot_share = number(arguments, "hot_share", 0.9);
    load.seed = (uint64_t)number(arguments, "seed", 1);
    load.check_every = (uint64_t)number(arguments, "check", 64);
    load.tick_ns = (uint64_t)(number(arguments, "tick_ms", 0) * 1e6);
    random_state = mix(load.seed);
    for (size_t d = 0; d < device_count; d++)
        write_scratch(&devices[d]);
    load.started_ns = load.due_origin_ns = now_ns();
    load.running = true;
    reply("{\"reply\":\"start\",\"ok\":true,\"rate\":%.1f,\"devices\":%zu}", load.rate, device_count);
}

static void command_status(const char *name)
{
    uint64_t end = load.running ? now_ns() : load.stopped_ns;
    uint64_t checks = 0, errors = 0;

    for (size_t d = 0; d < device_count; d++) {
        checks += devices[d].readback_checks;
        errors += devices[d].readback_errors;
    }
    reply("{\"reply\":\"%s\",\"ok\":true,\"running\":%s,\"devices\":%zu,\"memory_bytes\":%" PRIu64
          ",\"writes\":%" PRIu64 ",\"missed_writes\":%" PRIu64 ",\"elapsed_ns\":%" PRIu64
          ",\"busy_ns\":%" PRIu64 ",\"max_access_ns\":%" PRIu64 ",\"max_gap_ns\":%" PRIu64
          ",\"readback_checks\":%" PRIu64 ",\"readback_errors\":%" PRIu64 ",\"generation\":%" PRIu64 "}",
          name, load.running ? "true" : "false", device_count, device_count ? devices[0].words * 8 : 0,
          load.sequence * device_count, load.missed, end - load.started_ns, load.busy_ns, load.max_access_ns,
          load.max_gap_ns, checks, errors, device_count ? read64(&devices[0], REG_GENERATION) : 0);
}

static void command_stop(void)
{
    load.running = false;
    load.stopped_ns = now_ns();
    command_status("stop");
}

static void command_verify(void)
{
    uint64_t compared = 0, mismatched = 0, checks = 0, errors = 0, total = 0, next_report;
    uint64_t first_offset = 0, first_expected = 0, first_found = 0, start = now_ns();
    size_t first_device = 0;
    unsigned int scratch = 0;
    bool verified;
    char first[160] = "null";

    for (size_t d = 0; d < device_count; d++)
        total += devices[d].words * 8;
    next_report = total / 20;
    for (size_t d = 0; d < device_count; d++) {
        struct device *dev = &devices[d];

        for (uint64_t i = 0; i < dev->words; i++) {
            uint64_t found = dev->memory[i], expected = dev->journal[i];

            compared += 8;
            if (found != expected) {
                if (!mismatched) {
                    first_device = d;
                    first_offset = i * 8;
                    first_expected = expected;
                    first_found = found;
                }
                for (uint64_t difference = found ^ expected; difference; difference >>= 8)
                    mismatched += (difference & 0xff) != 0;
            }
            if (compared >= next_report) {
                reply("{\"event\":\"progress\",\"compared_bytes\":%" PRIu64 ",\"total_bytes\":%" PRIu64 "}",
                      compared, total);
                next_report += total / 20;
            }
        }
        scratch += scratch_errors(dev);
        checks += dev->readback_checks;
        errors += dev->readback_errors;
    }
    if (mismatched)
        snprintf(first, sizeof(first),
                 "{\"device\":%zu,\"offset\":%" PRIu64 ",\"expected\":\"%016" PRIx64 "\",\"found\":\"%016" PRIx64 "\"}",
                 first_device, first_offset, first_expected, first_found);
    verified = device_count && !mismatched && !errors && !scratch;
    reply("{\"reply\":\"verify\",\"ok\":true,\"verified\":%s,\"compared_bytes\":%" PRIu64
          ",\"mismatched_bytes\":%" PRIu64 ",\"first_mismatch\":%s,\"scratch_errors\":%u,\"readback_checks\":%" PRIu64
          ",\"readback_errors\":%" PRIu64 ",\"generation\":%" PRIu64 ",\"verify_ns\":%" PRIu64 "}",
          verified ? "true" : "false", compared, mismatched, first, scratch, checks, errors,
          device_count ? read64(&devices[0], REG_GENERATION) : 0, now_ns() - start);
}

/* A reset by the guest's own kernel (FLR, PM or bus reset, whichever the device offers). */
static void command_reset(const char *arguments)
{
    double index = number(arguments, "device", 0);
    struct device *dev;
    bool cleared;
    int error;

    if (!(index >= 0 && index < (double)device_count)) {
        reply("{\"reply\":\"reset\",\"ok\":false,\"error\":\"no such device\"}");
        return;
    }
    dev = &devices[(size_t)index];
    write_scratch(dev);
    error = write_sysfs(dev->address, "reset", "1");
    /*
     * Registers do not survive a reset; the device's memory does. What the device shows decides, not the kernel's
     * word: after a bus reset it waits for a link, and a port over a device that is not Express has none (ENOTTY).
     */
    cleared = read64(dev, REG_SCRATCH) == 0;
    if (cleared)
        dev->scratch_seed = 0;
    reply("{\"reply\":\"reset\",\"ok\":%s,\"scratch_cleared\":%s,\"error\":\"%s\"}", cleared ? "true" : "false",
          cleared ? "true" : "false", error ? strerror(error) : "");
}

static void execute(char *line)
{
    char *arguments = strchr(line, ' ');

    if (arguments)
        *arguments++ = '\0';
    else
        arguments = line + strlen(line);
    if (!strcmp(line, "start"))
        command_start(arguments);
    else if (!strcmp(line, "stop"))
        command_stop();
    else if (!strcmp(line, "status"))
        command_status("status");
    else if (!strcmp(line, "verify"))
        command_verify();
    else if (!strcmp(line, "reset"))
        command_reset(arguments);
    else
        reply("{\"reply\":\"unknown\",\"ok\":false,\"error\":\"commands: start stop status verify reset\"}");
}

static void read_commands(void)
{
    static char line[512];
    static size_t used;
    char buffer[128];
    ssize_t n = read(line_fd, buffer, sizeof(buffer));

    for (ssize_t i = 0; i < n; i++) {
        if (buffer[i] == '\n' || buffer[i] == '\r') {
            line[used] = '\0';
            if (used)
                execute(line);
            used = 0;
        } else if (used < sizeof(line) - 1) {
            line[used++] = buffer[i];
        }
    }
}

static void open_line(const char *path)
{
    struct termios settings;

    line_fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (line_fd < 0)
        die("%s: %s", path, strerror(errno));
    if (tcgetattr(line_fd, &settings) == 0) {
        cfmakeraw(&settings);
        settings.c_cflag |= CLOCAL | CREAD;
        cfsetspeed(&settings, B115200);
        tcsetattr(line_fd, TCSANOW, &settings);
    }
}

int main(int argc, char **argv)
{
    uint64_t last_poll = 0;

    if (argc != 2) {
        fprintf(stderr, "usage: %s SERIAL\n", argv[0]);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    open_line(argv[1]);
    find_devices();
    reply("{\"event\":\"ready\",\"devices\":%zu}", device_count);
    for (;;) {
        uint64_t wait_ns = load.running ? run_load() : GENERATION_POLL_NS, now = now_ns();
        struct pollfd waited = {.fd = line_fd, .events = POLLIN};
        struct timespec timeout;

        if (now - last_poll >= GENERATION_POLL_NS) {
            last_poll = now;
            poll_generations();
        }
        if (wait_ns > GENERATION_POLL_NS)
            wait_ns = GENERATION_POLL_NS;
        timeout.tv_sec = (time_t)(wait_ns / NS_PER_SECOND);
        timeout.tv_nsec = (long)(wait_ns % NS_PER_SECOND);
        if (ppoll(&waited, 1, &timeout, NULL) > 0)
            read_commands();
    }
}
