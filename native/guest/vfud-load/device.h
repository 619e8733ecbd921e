/*
 * The devices: their registers, which are the reference device's (docs/device.md), and what this program knows of
 * each: the journal that its memory must equal, its engine, its buffers.
 *
 * Copyright (c) the vfu-dev authors.  SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef DEVICE_H
#define DEVICE_H

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
/* Room for what find_devices() says. */
#define LEFT_BYTES 4096

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
    uint64_t polled_ns;
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

/* Open the devices that are not open yet. Those that cannot be (yet) are left: "0000:01:00.0: why; ..." in `left`. */
void find_devices(char *left, size_t size);
/* Let go of what is mapped and open; engine, DMA load and writer have forgotten the device before. */
void close_device(struct device *dev);
int write_sysfs(const char *address, const char *name, const char *text); /* 0 or errno */
/* The device that "device=N" names, the first if none is named; NULL after a refusal. */
struct device *chosen_device(const char *command, const char *arguments);
void poll_generations(void);

uint32_t read32(const struct device *dev, unsigned int offset);
uint64_t read64(const struct device *dev, unsigned int offset);
void write32(struct device *dev, unsigned int offset, uint32_t value);
void write64(struct device *dev, unsigned int offset, uint64_t value);
/* Write to its memory by accesses of 8, 4, 2 and 1 bytes, each aligned; returns how many. */
uint64_t write_memory(struct device *dev, uint64_t offset, const uint8_t *from, uint64_t count);

void write_scratch(struct device *dev, uint64_t seed);
unsigned int scratch_errors(const struct device *dev);

void command_reset(const char *arguments);

#endif
