/* The guest under test: writes records to a disk, one after the other, durably, and checks what it wrote before.
 *
 *     recorder DISK SEED
 *
 * The disk is cut into slots of 4096 bytes. Record N goes to a slot that follows from SEED and N, and fills it with words
 * that follow from SEED, slot and N (records.py has the same in Python); record 0 of a slot is there from the beginning. A
 * record counts when its write (O_DIRECT, O_SYNC) has been answered; then its number is told on standard output. After each
 * one, the newest record of some slot is read back and compared: an older one, or a torn one, is told as "bad".
 * A second process dirties memory, so that a migration has something to do. A line on standard input ends it all: every slot
 * is checked, "verified RECORDS BAD" is told.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

enum { SLOT = 4096, WORDS = SLOT / 8, HEAD = 3, DIRTIED = 16 << 20 };

static uint64_t seed, slots, bad;
static uint32_t *newest;
static uint64_t *buffer, *expected;
static int disk;

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static uint64_t slot_of(uint64_t number)
{
    return mix(mix(seed) ^ number) % slots;
}

static void fill(uint64_t *words, uint64_t slot, uint64_t number)
{
    uint64_t key = mix(mix(mix(seed) ^ slot) ^ number);

    words[0] = seed;
    words[1] = slot;
    words[2] = number;
    for (uint64_t i = HEAD; i < WORDS; i++)
        words[i] = mix(key + i);
}

static void fail(const char *what)
{
    perror(what);
    fflush(stdout);
    exit(1);
}

static void check(uint64_t slot)
{
    if (pread(disk, buffer, SLOT, slot * SLOT) != SLOT)
        fail("bad: read");
    fill(expected, slot, newest[slot]);
    if (memcmp(buffer, expected, SLOT)) {
        bad++;
        printf("bad: slot %llu has record %llu of slot %llu, not %u\n", (unsigned long long)slot,
               (unsigned long long)buffer[2], (unsigned long long)buffer[1], newest[slot]);
    }
}

static void dirty_memory(void)
{
    volatile uint8_t *memory = mmap(0, DIRTIED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct timespec pause = {0, 1000000};

    for (uint64_t n = 0;; n++) {
        for (int i = 0; i < 4; i++)
            memory[mix(4 * n + i) % DIRTIED]++;
        nanosleep(&pause, 0);
    }
}

int main(int count, char **words)
{
    struct pollfd input = {0, POLLIN, 0};
    struct timespec pause = {0, 2000000};
    uint64_t size, number;

    if (count != 3 || (disk = open(words[1], O_RDWR | O_DIRECT | O_SYNC)) < 0 || ioctl(disk, BLKGETSIZE64, &size))
        fail("bad: disk");
    seed = strtoull(words[2], 0, 10);
    slots = size / SLOT;
    newest = calloc(slots, sizeof *newest);
    if (!newest || posix_memalign((void **)&buffer, SLOT, SLOT) || posix_memalign((void **)&expected, SLOT, SLOT))
        fail("bad: memory");
    if (fork() == 0)
        dirty_memory();
    for (number = 1; poll(&input, 1, 0) == 0; number++) {
        uint64_t slot = slot_of(number);

        fill(buffer, slot, number);
        if (pwrite(disk, buffer, SLOT, slot * SLOT) != SLOT)
            fail("bad: write");
        newest[slot] = number;
        printf("record %llu\n", (unsigned long long)number);
        fflush(stdout);
        check(mix(~number) % slots);
        nanosleep(&pause, 0);
    }
    for (uint64_t slot = 0; slot < slots; slot++)
        check(slot);
    printf("verified %llu %llu\n", (unsigned long long)number - 1, (unsigned long long)bad);
    fflush(stdout);
    return 0;
}
