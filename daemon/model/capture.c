/*
 * Tensors taken on the way (capture.h).
 */
#include "daemon/model/capture.h"

#include <stdio.h>
#include <stdlib.h>

#include "kernels/log.h"

float *capture_add(struct capture_list *l, const char *name, int32_t owner, int32_t first_row,
                   int32_t n_rows, int32_t n_cols)
{
    if (l->n == l->capacity) {
        l->capacity = l->capacity ? 2 * l->capacity : 64;
        l->items = xrealloc(l->items, (size_t)l->capacity, sizeof(*l->items));
    }
    float *data = xcalloc((size_t)n_rows * (size_t)n_cols + 1, sizeof(float));
    struct captured *c = &l->items[l->n++];
    *c = (struct captured){
        .owner = owner, .first_row = first_row, .n_rows = n_rows, .n_cols = n_cols, .data = data};
    snprintf(c->name, sizeof(c->name), "%s", name);
    return data;
}

void capture_tensor(struct capture_list *l, struct backend *b, const char *name, int32_t owner,
                    int32_t first_row, const struct tensor *x)
{
    int64_t n_rows = tensor_n_rows(x), n_cols = tensor_n_cols(x);
    float *data = capture_add(l, name, owner, first_row, (int32_t)n_rows, (int32_t)n_cols);
    size_t size = dtype_size(x->dtype), n_bytes = (size_t)n_cols * size;
    void *row = xcalloc(n_bytes + 1, 1);
    for (int64_t r = 0; r < n_rows; r++) {
        op_download(b, row, (const char *)x->data + (size_t)(r * x->row_stride) * size, n_bytes);
        tensor_widen(data + r * n_cols, row, x->dtype, n_cols);
    }
    free(row);
}

void capture_clear(struct capture_list *l)
{
    for (int32_t i = 0; i < l->n; i++)
        free((void *)(uintptr_t)l->items[i].data);
    l->n = 0;
}

void capture_release(struct capture_list *l)
{
    capture_clear(l);
    free(l->items);
    *l = (struct capture_list){0};
}
