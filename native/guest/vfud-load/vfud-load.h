/*
 * vfud-load: drive every vfu-dev device in this guest, remember what was written, and check it.
 *
 * The lab starts this program from the guest's init and talks to it over a serial port: one command a line
 * ("irq mode=msix"), one JSON object a line back. While it works, the VM may be moved to another host; the journals
 * (what the device's memory and the buffers must hold) live in guest RAM and move with it, so "verify" on the other
 * side compares the device with what the guest knows, not with what a server claims.
 *
 * Registers, identifiers and the FILL pattern are the reference device's (docs/device.md).
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef VFUD_LOAD_H
#define VFUD_LOAD_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define REG_ID 0x00
#define REG_VERSION 0x04
#define REG_MEMSIZE 0x08
#define REG_FILL 0x10
#define REG_CTRL 0x18
#define CTRL_RESET 1u
#define REG_IRQ_RAISE 0x20
#define REG_IRQ_COUNT 0x24
#define REG_GENERATION 0x28
#define REG_PAGE_SIZE 0x30
#define REG_DMA_TABLE 0x80
#define REG_DMA_COUNT 0x88
#define REG_DMA_CTRL 0x8c
#define REG_DMA_STATUS 0x90
#define REG_WRITER_BUFFER 0x98
#define REG_WRITER_LENGTH 0xa0
#define REG_WRITER_RATE 0xa8
#define REG_WRITER_CTRL 0xb0
#define REG_WRITER_STATUS 0xb4
#define REG_WRITER_COUNT 0xb8
#define REG_SCRATCH 0x100
#define SCRATCH_WORDS 32

#define ID_VALUE 0x44554656u
#define BAR0_SIZE 4096
#define MAX_DEVICES 16

#define NS_PER_SECOND 1000000000ull
#define GOLDEN 0x9E3779B97F4A7C15ull

#define ENGINE_DESCRIPTORS 1024

/* Memory that the device may reach too; the module's. */
struct buffer {
    uint8_t *data;
    uint64_t address; /* as the device knows it */
    uint64_t bytes;
};

/* The device's DMA engine (engine.h). */
struct engine {
    struct buffer table;
    struct buffer bounce[2]; /* for verify */
    struct buffer source;    /* what a load by DMA writes */
    uint32_t count;          /* descriptors of the run under way; 0: none */
    uint64_t looked_ns;
    uint64_t lost_statuses; /* runs that ended without their last status in guest memory */
};

struct device {
    char address[NAME_MAX + 1];  /* 0000:01:00.0 */
    int driver;                  /* /dev/vfudN, -1 without the module */
    volatile uint8_t *registers; /* BAR0 */
    volatile uint64_t *memory;   /* BAR2, as the 64-bit words that the journal has */
    uint64_t *journal;           /* what memory must hold */
    uint64_t registers_mapped; /* bytes */
    uint64_t memory_mapped;
    uint64_t words;
    uint64_t page_words;
    uint64_t fill;
    uint64_t generation;
    uint64_t scratch_seed; /* 0: scratch was not written */
    uint64_t readback_checks;
    uint64_t readback_errors;
    struct engine engine;
    struct dma_state *dma; /* dma.c; NULL: there was none yet */
    struct buffer stamps;  /* of the writer */
    uint64_t stamp_rate;
};

extern struct device devices[MAX_DEVICES];
extern size_t device_count;

/* --- main.c: the line, and what all need ------------------------------------------------------------------ */

void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* One JSON line to the lab; in pieces, the last of which is ended by reply_end(). */
void reply(const char *format, ...) __attribute__((format(printf, 1, 2)));
void reply_part(const char *format, ...) __attribute__((format(printf, 1, 2)));
void reply_end(void);
/* {"reply":command,"ok":false,"error":...} */
void refuse(const char *command, const char *format, ...) __attribute__((format(printf, 2, 3)));

uint64_t now_ns(void);

/* The text after "key=" in `arguments`, or NULL. It ends at a space or the end. */
const char *option(const char *arguments, const char *key);
bool option_is(const char *arguments, const char *key, const char *word);
double number(const char *arguments, const char *key, double fallback);
uint64_t integer(const char *arguments, const char *key, uint64_t fallback);

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014): the FILL pattern and our values are made of it. */
static inline uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

uint32_t crc32(const uint8_t *data, uint64_t bytes); /* crc.c */

/* --- device.c --------------------------------------------------------------------------------------------- */

void find_devices(void);                 /* and open those that are not open yet */
void close_device(struct device *dev); /* let go of all that is mapped and open */
int write_sysfs(const char *address, const char *name, const char *text); /* 0 or errno */
/* The device that "device=N" names, the first if none is named; NULL after a refusal. */
struct device *chosen_device(const char *command, const char *arguments);
void poll_generations(void);

uint32_t read32(const struct device *dev, unsigned int offset);
uint64_t read64(const struct device *dev, unsigned int offset);
void write32(struct device *dev, unsigned int offset, uint32_t value);
void write64(struct device *dev, unsigned int offset, uint64_t value);

void write_scratch(struct device *dev, uint64_t seed);
unsigned int scratch_errors(const struct device *dev);

/* --- the commands, by file -------------------------------------------------------------------------------- */

void command_reset(const char *arguments); /* device.c */

void command_program(const char *arguments); /* load.c */
void command_start(const char *arguments);
void command_stop(const char *arguments);
void command_status(const char *arguments);
bool load_running(void);
bool load_uses_engine(void);
bool load_overlaps(uint64_t offset, uint64_t bytes); /* in device memory */
void load_settle(void);                              /* wait for DMA under way */
uint64_t run_load(void); /* do the writes that are due; nanoseconds until the next one is */

void command_dma(const char *arguments); /* dma.c */
void command_dma_stop(const char *arguments);
void command_dma_status(const char *arguments);
bool dma_running(void);
bool dma_overlaps(const struct device *dev, uint64_t offset, uint64_t bytes);
void dma_settle(void);
uint64_t dma_mismatched(const struct device *dev); /* bytes of its buffers that are not as the journal says */
void dma_forget(struct device *dev);
uint64_t run_dma_load(void);

void command_writer(const char *arguments); /* writer.c */
void command_writer_check(const char *arguments);
void writer_forget(struct device *dev);

void command_verify(const char *arguments); /* verify.c */

void command_irq(const char *arguments); /* irq.c */
void command_irqs(const char *arguments);
void command_irq_raise(const char *arguments);
void command_irq_mask(const char *arguments);

void command_lspci(const char *arguments); /* pci.c */
void command_dmesg(const char *arguments);
void command_config(const char *arguments);
void command_release(const char *arguments);
void command_rescan(const char *arguments);
void command_reboot(const char *arguments);

int dump(uint64_t memory_bytes, uint64_t page_bytes, uint64_t seed_offset); /* dump.c */

#endif
