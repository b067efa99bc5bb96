/*
 * The median of what the rounds of a benchmark measured: of a noisy machine neither the best nor
 * the mean says much.
 */
#ifndef INTERNVLD_TESTS_BENCH_MEDIAN_H
#define INTERNVLD_TESTS_BENCH_MEDIAN_H

#include <stdlib.h>

static inline int bench_compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts values [n], n > 0. */
static inline double bench_median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof(*values), bench_compare_doubles);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

#endif
