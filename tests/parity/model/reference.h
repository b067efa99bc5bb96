/*
 * The reference data of tests/data/reference (two checkpoints) and ../shared/reference (all of
 * them): where it is, golden tensors by name, largest differences.
 */
#ifndef INTERNVLD_TESTS_PARITY_MODEL_REFERENCE_H
#define INTERNVLD_TESTS_PARITY_MODEL_REFERENCE_H

#include <cjson/cJSON.h>

#include "daemon/model/safetensors.h"

/* The first of INTERNVLD_REFERENCE, the tree's own set and the one beside the checkout that has
 * checkpoints/NAME, in buf; NULL when none has. */
const char *reference_find(const char *name, char *buf, size_t n_bytes);

/* goldens/GOLDENS/FILE.safetensors under `dir`; exits when it cannot be read. */
void golden_open(struct safetensors *s, const char *dir, const char *goldens, const char *file);
/* The tensor as float32 [n]; NULL when the file lacks it. The caller frees. */
float *golden_floats(const struct safetensors *s, const char *name, int64_t *n);
int64_t *golden_ints(const struct safetensors *s, const char *name, int64_t *n);
/* A number of goldens/GOLDENS/scalars.json. */
double golden_scalar(const char *dir, const char *goldens, const char *key);

/* Largest |a - b|; a NaN counts as infinite. */
double largest_difference(const float *a, const float *b, int64_t n);
double largest_value(const float *a, int64_t n);

#endif
