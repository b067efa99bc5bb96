/*
 * The one clock: of deadlines, timings and the timeline.
 */
#ifndef INTERNVLD_KERNELS_CLOCK_H
#define INTERNVLD_KERNELS_CLOCK_H

#include <stdint.h>
#include <time.h>

/* CLOCK_MONOTONIC. */
static inline uint64_t clock_now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
