/*
 * From a checkpoint's files to the back end's memory, one shard at a time.
 *
 * weights_open() holds the files against weight_list.h: every listed tensor present with its shape,
 * as floats or as a quantised checkpoint's codes, no other tensor present. After that binding fails
 * for no reason in the files but numbers that are none, and reads only the bytes of the ranges it
 * is asked for. Owns the mappings until released; what it binds belongs
 * to the caller.
 */
#ifndef INTERNVLD_MODEL_WEIGHTS_H
#define INTERNVLD_MODEL_WEIGHTS_H

#include "daemon/model/safetensors.h"
#include "daemon/model/stored_codes.h"
#include "daemon/model/weight_list.h"
#include "kernels/backend.h"

struct weight_source {                       // where one listed tensor's bytes are
    const struct safetensors_tensor *tensor; // NULL: absent (optional), or dummy weights
    int64_t first_row;                       // its row 0 in a packed tensor
    struct stored_codes codes;               // of a quantised one; `tensor` is then its codes
};

struct weights {
    struct weight_list list;
    struct safetensors files;
    struct weight_source *sources; // [list.n]
    int dummy;
    int has_lm_head;             // else the embedding serves (tied)
    uint64_t n_bytes;            // bound so far, in the back end's memory
    uint64_t read_bytes;         // taken from the files so far
    enum weight_format x_format; // as struct quantization's
    int n_products, n_x_rounded; // bound so far; of these, with an x_format
    void *staging;               // one weight on its way
    size_t staging_bytes;
};

/* Error: one line with tensor, expected, found. `dummy`: no files are read; weights are random
 * numbers of a function of (name, index), the same under every layout. */
int weights_open(struct weights *w, const char *dir, const struct model_config *c, int dummy,
                 struct error *err);
void weights_release(struct weights *w); // accepts a zeroed struct

/* One tensor as float32 in back-end memory: norms, biases, layer scales, tables. All of it; the
 * caller frees with op_free(). NULL when the config has none (a bias). */
float *weights_vector(struct weights *w, struct backend *b, const char *name);
/* Rows of a 2-d tensor in back-end memory as `dtype`; rows past its end are zeros. */
struct tensor weights_table(struct weights *w, struct backend *b, const char *name,
                            struct range rows, enum dtype dtype);

/* The codes of a listed tensor, NULL where the files have floats. Borrowed. */
const struct stored_codes *weights_codes(const struct weights *w, const struct weight_spec *s);
/* Row `row` of a listed tensor, all its columns, as float32; past its end, zeros. May be called by
 * several threads at once. */
void weights_row(const struct weights *w, const struct weight_spec *s, int64_t row, float *dst);

/* A linear stacked from parts (q, k, v; gate, up): rows of each, one after the other. Each part is
 * PREFIX + name + ".weight" and, where the config has it and `with_bias`, ".bias". `cut` NULL:
 * whole tensors. lanes NULL: one lane. Held quantised where the list says so of the first part;
 * parts that a checkpoint quantised unlike each other are held as floats. */
struct weight_parts {
    const char *prefix;
    const char *names[3]; // NULL-terminated when fewer
    int with_bias;
};
void weights_linear(struct weights *w, struct backend *b, struct linear *l, enum dtype dtype,
                    const struct weight_parts *parts, const struct weight_cut *cut,
                    const struct text_config *t, const struct lanes *lanes);

#endif
