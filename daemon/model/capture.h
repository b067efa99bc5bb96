/*
 * Tensors taken on the way (Forward): a growing list of struct captured with its own memory.
 *
 * Only steps that capture something allocate here; the data is freed once the result message is
 * packed. Names are those of batch.h.
 */
#ifndef INTERNVLD_MODEL_CAPTURE_H
#define INTERNVLD_MODEL_CAPTURE_H

#include "kernels/backend.h"
#include "parallel/batch.h"

struct capture_list {
    struct captured *items; // [n]
    int32_t n, capacity;
};

/* Adds an entry and returns its memory [n_rows, n_cols] to be filled. */
float *capture_add(struct capture_list *l, const char *name, int32_t owner, int32_t first_row,
                   int32_t n_rows, int32_t n_cols);
/* Adds a copy of float32 tensor `x` seen as [n_rows, n_cols], in back-end memory. */
void capture_tensor(struct capture_list *l, struct backend *b, const char *name, int32_t owner,
                    int32_t first_row, const struct tensor *x);
void capture_clear(struct capture_list *l);   // keeps the list's own memory
void capture_release(struct capture_list *l); // accepts a zeroed struct

#endif
