/*
 * What the tests of collectives under mpirun share: a check that ends the job and names itself.
 */
#ifndef INTERNVLD_TESTS_COMM_CHECK_H
#define INTERNVLD_TESTS_COMM_CHECK_H

#include "kernels/log.h"

static long n_checks;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        n_checks++;                                                                                \
        if (!(condition))                                                                          \
            die("check failed: %s", #condition);                                                   \
    } while (0)

#endif
