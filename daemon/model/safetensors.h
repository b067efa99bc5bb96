/*
 * safetensors files, memory-mapped: names, types, shapes and where the bytes are.
 *
 * Owns the mappings and the index of names. Everything in a file is checked before it is believed:
 * header size and nesting, duplicate names, types, shapes against byte counts, offsets that cover
 * the data exactly once and in order. Knows no model.
 * Format: huggingface/safetensors README ("Format").
 */
#ifndef INTERNVLD_MODEL_SAFETENSORS_H
#define INTERNVLD_MODEL_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"
#include "kernels/tensor.h"

#define SAFETENSORS_MAX_DIMS 8
#define SAFETENSORS_MAX_HEADER_BYTES 100000000u // the format's own limit

struct safetensors_tensor {
    const char *name;
    const char *file; // base name, for messages
    enum dtype dtype;
    int n_dims;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    const uint8_t *data; // in the mapping; not necessarily aligned
    uint64_t n_bytes;
};

struct safetensors {
    struct safetensors_tensor *tensors; // [n_tensors] sorted by name
    int64_t n_tensors;
    struct safetensors_file *files; // [n_files]
    int n_files;
};

/* `path`: one file, or a directory with model.safetensors, or with model.safetensors.index.json and
 * the files it names. Error: one line with file and tensor. *s needs a release only on success. */
int safetensors_open(struct safetensors *s, const char *path, struct error *err);
void safetensors_release(struct safetensors *s); // accepts a zeroed struct
/* NULL when there is no such tensor. Borrowed. */
const struct safetensors_tensor *safetensors_find(const struct safetensors *s, const char *name);
/* What has been read of the mappings is no longer this process's memory; it can be read again. */
void safetensors_forget(const struct safetensors *s);
/* The same checks on bytes in memory (fuzzing); `bytes` must outlive *s. */
int safetensors_parse(struct safetensors *s, const uint8_t *bytes, uint64_t n_bytes,
                      const char *file, struct error *err);
/* "[2, 3]" into buf, returned. */
const char *safetensors_shape(const int64_t *shape, int n_dims, char *buf, size_t n_bytes);
/* Error: one line with tensor, expected and found. */
int safetensors_expect_shape(const struct safetensors_tensor *t, const int64_t *shape, int n_dims,
                             struct error *err);

#endif
