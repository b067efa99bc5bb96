/*
 * The hash that the fake models of these tests are made of.
 */
#ifndef INTERNVLD_TESTS_UNIT_ENGINE_MIX_H
#define INTERNVLD_TESTS_UNIT_ENGINE_MIX_H

#include <stdint.h>

/* splitmix64's finaliser. */
static inline uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

#endif
